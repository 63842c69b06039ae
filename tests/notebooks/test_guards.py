"""Every notebook passes every guard; and every guard finds the fault it is there for, in a small
made-up notebook."""

import base64
import io
import re
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from nbval.plugin import get_sanitize_patterns
from notebook_guards import (
    GUARDS,
    NOTEBOOKS,
    SANITIZE,
    code_cells,
    exercises,
    idle_rules,
    mark,
    setup_cell,
    written,
)
from PIL import Image

COURSE = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))


def read(path):
    return nbformat.read(path, as_version=4)


@pytest.fixture(params=COURSE, ids=[path.stem for path in COURSE])
def notebook(request):
    return request.param


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.__name__)
def test_notebook(notebook, guard):
    assert guard(read(notebook), notebook) == []


def test_stubs_fail_and_solutions_pass(notebook):
    nb = read(notebook)
    for name in exercises(nb):
        stub, solution = mark(nb, name, "exercise"), mark(nb, name, "solution")
        assert not stub, f"the untouched stub of {name} passes its check: {stub}"
        assert solution, f"the solution of {name} fails its check: {solution}"


@pytest.mark.skipif(not COURSE, reason="there are no notebooks yet")
def test_every_notebook_begins_with_the_same_cell():
    assert {setup_cell(read(path)) for path in COURSE} == {setup_cell(read(COURSE[0]))}


@pytest.mark.skipif(not COURSE, reason="there are no notebooks yet")
def test_every_sanitize_rule_is_needed():
    texts = [written(cell) for path in COURSE for cell in code_cells(read(path))]
    assert idle_rules(get_sanitize_patterns(SANITIZE.read_text()), texts) == []


@pytest.mark.skipif(not COURSE, reason="there are no notebooks yet")
def test_the_teachers_page_leads_to_every_notebook():
    links = set(re.findall(r"\]\(([^)#]+)", (NOTEBOOKS / "README.md").read_text(encoding="utf-8")))
    assert {path.name for path in COURSE} <= links
    assert [link for link in links if not link.startswith("http")
            and not (NOTEBOOKS / link).exists()] == []


@pytest.mark.skipif(not COURSE, reason="there are no notebooks yet")
def test_the_glossary_names_sections_that_are_there():
    page = (NOTEBOOKS / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+) \| .+ \| \[\d\d\]\((.+)\), (.+) \|$", page, re.MULTILINE)
    titles = {(path.name, title) for path in COURSE for cell in read(path).cells
              for title in re.findall(r"^#+ (.+)$", cell.source, re.MULTILINE)}
    assert len(rows) > 50
    assert [row for row in rows if row[1:] not in titles] == []


@pytest.mark.parametrize("name", ["09_your_own_subject"])
def test_colab_gives_a_gpu_to_those_who_bring_photos(name):
    assert read(NOTEBOOKS / f"{name}.ipynb").metadata.accelerator == "GPU"


# --- the guards themselves ------------------------------------------------------------------------


def png():
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "teal").save(buffer, "png")
    return base64.b64encode(buffer.getvalue()).decode()


def exercise(name, answer=4):
    return [
        new_code_cell("def double(x):\n    ...", metadata={"tags": [f"exercise:{name}"]}),
        new_code_cell(f"double(2) == {answer}", metadata={"tags": [f"check:{name}"]}),
        new_markdown_cell("<details>\n\n```python\ndef double(x):\n    return WIDE * "
                          "x\n```\n\n</details>", metadata={"tags": [f"solution:{name}"]}),
    ]


def sound():
    """A notebook without a fault: cell 1 sets up, 2 has the parameters, 3 shows a picture."""
    picture = new_output("execute_result", {"image/png": png(), "text/plain": "<Picture>"},
                         execution_count=3)
    nb = new_notebook(cells=[
        new_markdown_cell("# 00 A title\n![a dog in the snow](00.png)\n[next](01_next.ipynb), "
                          "[up](#00-A-title)"),
        new_code_cell('DBCORE_REPO = ""\nimport dbcore', metadata={"tags": ["setup"]}),
        new_code_cell("SEED = 0  # @param {}", metadata={"tags": ["parameters"]}),
        new_code_cell("WIDE = 2", outputs=[picture], metadata={"tags": ["exercise-context"]}),
        *exercise("a"), *exercise("b"), *exercise("c"),
    ])  # fmt: skip
    for count, cell in enumerate(code_cells(nb), 1):
        cell.execution_count = count
    return nb


@pytest.fixture
def folder(tmp_path):
    for name in ("00.png", "00_first.ipynb", "01_next.ipynb"):
        (tmp_path / name).write_text("")
    return tmp_path


def complaints(nb, folder):
    path = Path(folder, "00_first.ipynb")
    nbformat.write(nb, path)
    return {guard.__name__: guard(nb, path) for guard in GUARDS if guard(nb, path)}


def test_a_sound_notebook_passes(folder):
    assert complaints(sound(), folder) == {}


def printing(text, name="stdout"):
    def fault(nb):
        code_cells(nb)[2].outputs.append(new_output("stream", name=name, text=text))
    return fault


def tagging(*numbers, tag="nbval-ignore-output"):
    def fault(nb):
        for number in numbers:
            code_cells(nb)[number].metadata.setdefault("tags", []).append(tag)
    return fault


def saying(text):
    def fault(nb):
        nb.cells.append(new_markdown_cell(text))
    return fault


def coding(number, source):
    def fault(nb):
        code_cells(nb)[number].source = source
    return fault


def unrun(nb):
    code_cells(nb)[4].execution_count = None


def out_of_order(nb):
    code_cells(nb)[4].execution_count = 99


def failed(nb):
    code_cells(nb)[3].outputs.append(new_output("error", ename="ValueError", evalue="x",
                                                traceback=[]))


def widget_state(nb):
    nb.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {}}


def live_view(nb):
    view = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}}
    code_cells(nb)[3].outputs.append(new_output("display_data", view))


def too_big(nb):
    code_cells(nb)[3].outputs.append(new_output("display_data", {"image/png": "A" * 1_500_000}))


def no_picture(nb):
    code_cells(nb)[2].outputs = []


def no_opening_picture(nb):
    nb.cells[0].source = "# 00\n[next](01_next.ipynb)"


def long_cells(nb):
    for cell in code_cells(nb)[3:]:
        cell.source = "1\n" * 7


def two_exercises(nb):
    nb.cells = nb.cells[:-3]


def no_solution(nb):
    nb.cells = nb.cells[:-1]


def no_next(nb):
    nb.cells[0].source = nb.cells[0].source.replace("[next](01_next.ipynb), ", "")


@pytest.mark.parametrize(("guard", "fault"), [
    ("run_in_order", unrun),
    ("run_in_order", out_of_order),
    ("nothing_went_wrong", failed),
    ("nothing_went_wrong", printing("UserWarning: deprecated", "stderr")),
    ("few_are_ignored", tagging(2, 3)),
    ("few_are_ignored", tagging(2, 3, tag="nbval-skip")),
    ("few_are_ignored", lambda nb: [coding(k, "# NBVAL_IGNORE_OUTPUT\n1")(nb) for k in (2, 3)]),
    ("no_widget_state", widget_state),
    ("no_widget_state", live_view),
    ("nothing_private", printing("saved to /home/ada/lora.safetensors")),
    ("nothing_private", printing(r"saved to C:\Users\ada")),
    ("nothing_private", coding(3, "open('/root/x')")),
    ("nothing_private", saying("it lies in /Users/ada/photos")),
    ("nothing_passing", printing("<object at 0x7f9a12345678>")),
    ("nothing_passing", printing("started 12:30:59")),
    ("nothing_passing", printing("on 2024-02-29")),
    ("nothing_passing", printing("torch 2.13.0")),
    ("not_too_big", too_big),
    ("pictures_have_alt_text", saying("![](00.png)")),
    ("pictures_have_alt_text", saying('<img src="00.png">')),
    ("links_lead_somewhere", saying("[gone](09_gone.ipynb)")),
    ("links_lead_somewhere", saying("![a picture that is gone](gone.png)")),
    ("links_lead_somewhere", saying("[nowhere]()")),
    ("links_lead_somewhere", saying("as [Hu et al.][hu2021] have shown")),
    ("links_lead_somewhere", saying("[up](#No-such-heading)")),
    ("a_picture_early", no_picture),
    ("opens_with_a_picture", no_opening_picture),
    ("cells_are_short", long_cells),
    ("one_parameters_cell", tagging(4, tag="parameters")),
    ("one_parameters_cell", coding(1, "pass")),
    ("one_parameters_cell", coding(1, "SEED = int(0)  # @param {}")),
    ("one_parameters_cell", coding(1, "SEED = 0")),
    ("setup_comes_first", tagging(4, tag="setup")),
    ("has_exercises", two_exercises),
    ("has_exercises", no_solution),
    ("leads_on", no_next),
    ("pictures_are_compared", tagging(2, tag="picture:loose")),
])  # fmt: skip
def test_a_guard_finds_its_fault(folder, guard, fault):
    nb = sound()
    fault(nb)
    assert guard in complaints(nb, folder)


@pytest.mark.parametrize("harmless", [
    saying("The product $W[0][1]$ and `a[b][c]`, see [the "
           "paper](https://arxiv.org/abs/2106.09685)."),
    saying("[Hu et al.][hu]\n\n[hu]: https://arxiv.org/abs/2106.09685"),
    saying("the folder work_dirs/my_subject, and lora/home/x"),
    printing("0.123 of 255; 3 of 10; seed 20240229"),
    tagging(2),
])  # fmt: skip
def test_a_guard_lets_the_rest_be(folder, harmless):
    nb = sound()
    harmless(nb)
    assert complaints(nb, folder) == {}


def test_an_exercise_is_marked_in_the_notebooks_own_words():
    nb = sound()
    assert exercises(nb) == ["a", "b", "c"]
    assert not mark(nb, "b", "exercise")
    assert mark(nb, "b", "solution")


def test_a_check_that_lets_everything_pass_is_noticed():
    nb = sound()
    nb.cells += exercise("d", "double(2)")
    assert mark(nb, "d", "exercise")


def test_an_idle_sanitize_rule_is_noticed():
    rules = get_sanitize_patterns("regex: Hardware: .*\nreplace: Hardware: any\n\nregex: "
                                  "1/1/70\nreplace: DATE\n")
    assert len(rules) == 2
    assert idle_rules(rules, ["Hardware: a CPU", "no date"]) == ["1/1/70"]


def test_the_address_of_the_project_is_no_part_of_the_set_up_cell():
    one, other = sound(), sound()
    code_cells(other)[0].source = code_cells(other)[0].source.replace('""',
                                                                      '"https://example.org/x.zip"')
    assert setup_cell(one) == setup_cell(other)
    code_cells(other)[0].source += "\nimport torch"
    assert setup_cell(one) != setup_cell(other)

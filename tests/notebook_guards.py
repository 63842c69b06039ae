"""What a notebook of the course must be, apart from running: each guard returns complaints, an
empty list if none.

nbval passes over a cell that was never run and compares no picture, so a notebook may rot while it
stays green.
"""

import ast
import re
from pathlib import Path
from statistics import median

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
SANITIZE = Path(__file__).parent / "nbval_sanitize.cfg"
VIEW = "application/vnd.jupyter.widget-view+json"
MAX_BYTES = 1_500_000
IGNORED_TAGS = {"nbval-ignore-output", "nbval-skip"}
IGNORED_COMMENT = re.compile(
    r"^\s*#\s*(NBVAL_IGNORE_OUTPUT|NBVAL_SKIP|PYTEST_VALIDATE_IGNORE_OUTPUT)\s*$", re.MULTILINE)
# A Drive in Colab has this one path for everybody.
PRIVATE = re.compile(r"(?<![\w.])/(home|root|Users|work|tmp|content(?!/drive))/[\w.]"
                     r"|[A-Z]:\\+Users\\", re.MULTILINE)
PASSING = {
    "a memory address": re.compile(r"\b0x[0-9a-f]{6,}"),
    "a time of day": re.compile(r"\b\d{1,2}:\d{2}:\d{2}\b"),
    "a date": re.compile(r"\b20\d\d-\d\d-\d\d\b"),
    "a version": re.compile(r"(?<![\d.])\d+\.\d+\.\d+(?![\d.])"),
}


def tags(cell):
    return cell.metadata.get("tags", [])


def code_cells(nb):
    return [cell for cell in nb.cells if cell.cell_type == "code"]


def markdown(nb):
    """All markdown of a notebook without code and formulas, in which brackets mean other things."""
    text = "\n\n".join(cell.source for cell in nb.cells if cell.cell_type == "markdown")
    for other in (r"```.*?```", r"`[^`\n]*`", r"\$\$.*?\$\$", r"\$[^$\n]+\$"):
        text = re.sub(other, "", text, flags=re.DOTALL)
    return text


def written(cell):
    """Everything textual that a code cell put out: printed, or the words beside a picture."""
    texts = []
    for output in cell.outputs:
        texts.append(output.get("text", ""))
        texts += [value for kind, value in output.get("data", {}).items()
                  if not kind.startswith("image/")]
    return "\n".join(text if isinstance(text, str) else str(text) for text in texts)


def run_in_order(nb, path):
    counts = [cell.execution_count for cell in code_cells(nb) if cell.source.strip()]
    if counts == list(range(1, len(counts) + 1)):
        return []
    return [f"cells were run as {counts}, not 1, 2, 3, ...: restart the kernel and run all"]


def nothing_went_wrong(nb, path):
    found = []
    for cell in code_cells(nb):
        for output in cell.outputs:
            if output.output_type == "error" and "raises-exception" not in tags(cell):
                found.append(f"{cell.id} stored an error: {output.ename}")
            if output.output_type == "stream" and output.name == "stderr":
                found.append(f"{cell.id} stored stderr: {output.text[:80]!r}")
    return found


def few_are_ignored(nb, path):
    cells = code_cells(nb)
    ignored = [cell.id for cell in cells if IGNORED_TAGS & set(tags(cell))
               or IGNORED_COMMENT.search(cell.source)]
    return ([f"{len(ignored)} of {len(cells)} cells are ignored: {ignored}"]
            if 7 * len(ignored) > len(cells) else [])


def no_widget_state(nb, path):
    found = ["metadata.widgets is stored: clear it"] if "widgets" in nb.metadata else []
    views = [cell.id for cell in code_cells(nb)
             if any(VIEW in output.get("data", {}) for output in cell.outputs)]
    return found + [f"{name} stores a live widget, which no kernel will know again"
                    for name in views]


def nothing_private(nb, path):
    texts = [(cell.id, cell.source) for cell in nb.cells] + [(cell.id, written(cell))
                                                             for cell in code_cells(nb)]
    return [f"{name} names a path of one machine: {match[0]}" for name, text in texts
            for match in PRIVATE.finditer(text)]  # fmt: skip


def nothing_passing(nb, path):
    return [f"{cell.id} put out {what}: {match[0]}" for cell in code_cells(nb)
            if not IGNORED_TAGS & set(tags(cell))
            for what, pattern in PASSING.items() for match in pattern.finditer(written(cell))]


def not_too_big(nb, path):
    size = path.stat().st_size
    return [f"{size:,} bytes, above {MAX_BYTES:,}"] if size > MAX_BYTES else []


def pictures_have_alt_text(nb, path):
    text = markdown(nb)
    found = [f"![{alt}]({target}) needs words for who cannot see it"
             for alt, target in re.findall(r"!\[([^\]]*)\]\(([^)\s]+)", text) if len(alt) < 10]
    found += [f"{tag} has no alt text" for tag in re.findall(r"<img\b[^>]*>", text)
              if not re.search(r"""alt=(["'])[^"']{10,}\1""", tag)]  # fmt: skip
    return found


def links_lead_somewhere(nb, path):
    text = markdown(nb)
    targets = re.findall(r"\]\(([^)\s]*)", text) + re.findall(r"""(?:src|href)=["']([^"']*)""",
                                                              text)
    defined = {name.lower() for name in re.findall(r"^\s{0,3}\[([^\]]+)\]:", text, re.MULTILINE)}
    found = [f"[{words}][{name}] is defined nowhere"
             for words, name in re.findall(r"\[([^\]]+)\]\[([^\]]*)\]", text)
             if (name or words).lower() not in defined]  # fmt: skip
    anchors = {re.sub(r"\s", "-", title.strip())
               for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}
    for target in targets:
        file, _, anchor = target.partition("#")
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        if not target or (file and not (path.parent / file).exists()):
            found.append(f"link to {target or 'nothing'}: there is no such file beside {path.name}")
        elif not file and anchor not in anchors:
            found.append(f"link to #{anchor}: no heading of this notebook")
    return found


def a_picture_early(nb, path):
    first = code_cells(nb)[:3]
    seen = any("image/png" in output.get("data", {}) for cell in first for output in cell.outputs)
    return [] if seen else ["none of the first three code cells shows a picture"]


def opens_with_a_picture(nb, path):
    if nb.cells and nb.cells[0].cell_type == "markdown" and re.search(r"!\[[^\]]*\]\((?!http)",
                                                                      nb.cells[0].source):
        return []
    return ["the first cell shows no picture of what will come out"]


def cells_are_short(nb, path):
    lengths = [sum(bool(line.strip()) for line in cell.source.splitlines())
               for cell in code_cells(nb)]
    return ([f"half of the code cells have more than 6 lines: {sorted(lengths)}"]
            if median(lengths or [0]) > 6 else [])


def one_parameters_cell(nb, path):
    cells = [cell for cell in code_cells(nb) if "parameters" in tags(cell)]
    if len(cells) != 1:
        return [f"{len(cells)} cells are tagged parameters; one should be"]
    found = []
    for statement in ast.parse(cells[0].source).body:
        try:
            ast.literal_eval(statement.value)
        except (AttributeError, ValueError):
            found.append(f"{ast.unparse(statement)}: only name = value in the parameters cell")
    found += [f"{line}: no '# @param' for Colab's form" for line in cells[0].source.splitlines()
              if line.strip() and "# @param" not in line and not line.lstrip().startswith("#")]
    return found


def setup_comes_first(nb, path):
    cells = code_cells(nb)
    marked = [k for k, cell in enumerate(cells) if "setup" in tags(cell)]
    return [] if marked == [0] else [(f"code cells {marked} are tagged setup; "
                                      "the first should be, and it alone")]


def has_exercises(nb, path):
    names = exercises(nb)
    found = [] if len(names) >= 3 else [f"{len(names)} exercises; three or more"]
    for name in names:
        for part in ("check", "solution"):
            number = sum(f"{part}:{name}" in tags(cell) for cell in nb.cells)
            found += [] if number == 1 else [(f"{number} cells are tagged "
                                              f"{part}:{name}; one should be")]
    return found


def leads_on(nb, path):
    """Links to the notebooks before and after this one, if they are there."""
    names = sorted(other.name for other in path.parent.glob("[0-9][0-9]_*.ipynb"))
    if path.name not in names:
        return []
    here = names.index(path.name)
    neighbours = names[max(0, here - 1):here] + names[here + 1:here + 2]
    return [f"no link to {name}" for name in neighbours if f"]({name})" not in markdown(nb)]


def pictures_are_compared(nb, path):
    """Most pictures are compared closely: `picture:loose` is for what training has made."""
    pictured = [cell for cell in code_cells(nb)
                if any("image/png" in output.get("data", {}) for output in cell.outputs)]
    loose = [cell.id for cell in pictured if "picture:loose" in tags(cell)]
    return ([f"{len(loose)} of {len(pictured)} pictures are compared loosely"]
            if 2 * len(loose) > len(pictured) else [])


GUARDS = (run_in_order, nothing_went_wrong, few_are_ignored, no_widget_state, nothing_private,
          nothing_passing,
          not_too_big, pictures_have_alt_text, links_lead_somewhere, a_picture_early,
          opens_with_a_picture,
          cells_are_short, one_parameters_cell, setup_comes_first, has_exercises, leads_on,
          pictures_are_compared)


# --- of all notebooks together --------------------------------------------------------------------


def idle_rules(rules, texts):
    """The sanitize rules, [(regex, replacement)], that change none of `texts`."""
    return [regex for regex, replacement in rules
            if all(re.sub(regex, replacement, text) == text for text in texts)]


def setup_cell(nb):
    """Its set-up cell, with whatever address `make badges` has written into it left out."""
    (source,) = [cell.source for cell in code_cells(nb) if "setup" in tags(cell)]
    return re.sub(r'^DBCORE_REPO = ".*?"', 'DBCORE_REPO = ""', source, flags=re.MULTILINE)


# --- exercises ------------------------------------------------------------------------------------


def exercises(nb):
    """The names of its exercises, in order: cells tagged exercise:<name>."""
    return [tag.partition(":")[2] for cell in code_cells(nb) for tag in tags(cell)
            if tag.startswith("exercise:")]


def mark(nb, name, part):
    """Run the check of one exercise on its `part`, 'exercise' (the untouched stub) or 'solution':
    the verdict.

    The cells tagged exercise-context are run first, in order, then the part, then the check cell,
    whose last line is the verdict.
    """
    space = {"__name__": "__main__"}
    for cell in code_cells(nb):
        if "exercise-context" in tags(cell):
            exec(cell.source, space)  # noqa: S102 - the notebook's own cell
    (source,) = [cell.source for cell in nb.cells if f"{part}:{name}" in tags(cell)]
    if part == "solution":
        (source,) = re.findall(r"```python\n(.*?)```", source, re.DOTALL)
    exec(source, space)  # noqa: S102
    (check,) = [cell.source for cell in code_cells(nb) if f"check:{name}" in tags(cell)]
    *before, last = ast.parse(check).body
    exec(compile(ast.Module(before, []), f"check:{name}", "exec"), space)  # noqa: S102
    return eval(compile(ast.Expression(last.value), f"check:{name}", "eval"), space)

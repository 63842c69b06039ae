"""The course in JupyterLab, as a newcomer has it: Run All Cells, then every control of every panel
is moved.

Leaves a screenshot of each panel in work_dirs/browser, before and after. They are to be looked at.
"""

import json
import re
import time
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
PANELS = ("explore(", "timestep_slider(", "before_after(", "photo_doctor(", "CropBox(",
          "design_subject(")


def with_panels():
    for path in sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        if any(call in cell.source for cell in cells if cell.cell_type == "code"
               for call in PANELS):
            yield path


COURSE = list(with_panels())
pytestmark = [pytest.mark.browser,
              pytest.mark.skipif(not COURSE, reason="there are no notebooks with panels yet")]
SLIDER, MENU, BOX, LINE = (".noUi-handle", ".widget-dropdown select", ".widget-checkbox input",
                           ".widget-text input")


@pytest.mark.parametrize("path", COURSE, ids=[path.stem for path in COURSE])
def test_run_all_and_move_every_control(path, open_copy):
    page = open_copy(path)
    page.run_all(seconds=900)
    stderr = ".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr']"
    errors = [error.text for error in page.find(stderr)]
    assert not [text for text in errors if "Traceback" in text]
    panels = [panel for panel in page.find(".jp-OutputArea-output > .widget-vbox, "
                                           ".jp-OutputArea-output .jupyter-widgets.widget-vbox")
              if panel.find_elements("css selector", f"{SLIDER}, {MENU}, {BOX}, {LINE}")]
    assert panels, "no panel is on the page"
    for number, panel in enumerate(panels, 1):
        move_all(page, panel, f"{path.stem}-{number}")


def move_all(page, panel, name):
    """Move each control of one panel, and back; each time the picture or the words of the panel
    have to be others.

    Back, because one control may silence another: a plain character has no second colour to see.
    """
    page.look_at(panel)
    page.screenshot(f"{name}-before")
    controls = panel.find_elements("css selector", f"{SLIDER}, {MENU}, {BOX}, {LINE}")
    for control in controls:
        before, back = settled(page, panel), move(control)
        page.wait(lambda before=before: shown(panel) != before, 120)
        moved = settled(page, panel)
        words = [element.text for element in panel.find_elements("css selector", "pre")]
        assert not [line for line in words if "Error: " in line]
        page.screenshot(f"{name}-after")
        back()
        page.wait(lambda moved=moved: shown(panel) != moved, 120)


def settled(page, panel):
    """What is shown once the kernel has answered: a late picture of one control is not another
    control's work."""
    def twice_the_same():
        first = shown(panel)
        time.sleep(0.5)
        return page.kernel() == "idle" and shown(panel) == first and first
    return page.wait(twice_the_same, 120)


def move(control):
    """Move a control, and return the function that moves it back."""
    from selenium.webdriver import Keys
    from selenium.webdriver.support.ui import Select

    if control.tag_name == "select":
        menu = Select(control)
        here = [option.text for option in menu.options].index(menu.first_selected_option.text)
        menu.select_by_index((here + 1) % len(menu.options))
        return lambda: menu.select_by_index(here)
    if control.get_attribute("type") == "checkbox":
        control.click()
        return control.click
    if control.tag_name == "input":
        added = " on the beach"
        control.send_keys(added, Keys.ENTER)
        return lambda: control.send_keys(Keys.END, *len(added) * [Keys.BACKSPACE], Keys.ENTER)
    at, first, last = (float(control.get_attribute(f"aria-value{which}"))
                       for which in ("now", "min", "max"))
    there, again = ((Keys.ARROW_LEFT, Keys.ARROW_RIGHT) if at > (first + last) / 2
                    else (Keys.ARROW_RIGHT, Keys.ARROW_LEFT))
    control.send_keys(*3 * [there])

    def back():
        for _ in range(3):
            # it may have met its end before
            if float(control.get_attribute("aria-valuenow")) != at:
                control.send_keys(again)
    return back


def shown(panel):
    """The addresses of its pictures, and its words."""
    pictures = [image.get_attribute("src")
                for image in panel.find_elements("css selector", ".widget-image")]
    return pictures, [words.text for words in panel.find_elements("css selector", ".widget-html")]


def test_stop_on_the_courses_dashboard_and_run_it_again(open_copy, folder):
    """Stop, read how to go on, run the same cells again: the run goes on from its checkpoint to its
    end."""
    path = NOTEBOOKS / "04_gpu_training.ipynb"
    steps = int(re.search(r"\bSTEPS = (\d+)", path.read_text(encoding="utf-8"))[1])
    page = open_copy(path)
    page.start_all()
    page.wait(lambda: any(f" of {steps}, about" in label.text
                          for label in page.find(".widget-label")), 300)
    page.click(page.find("button.widget-button")[0])
    page.wait(lambda: any("Interrupted: Stopped after step" in words.text
                          for words in page.find(".widget-html pre")), 120)
    page.look_at(page.find("button.widget-button")[0])
    page.screenshot("04_gpu_training-stopped")
    page.run_from("dashboard = Dashboard()")
    page.wait(lambda: any("is there: True" in output.text
                          for output in page.find(".jp-OutputArea-output")), 300)
    assert any(label.text == f"step {steps} of {steps}" for label in page.find(".widget-label"))
    page.look_at(page.find("button.widget-button")[0])
    page.screenshot("04_gpu_training-resumed")
    log = (folder / "work_dirs" / "04" / "watched" / "log.jsonl").read_text().splitlines()
    done = [json.loads(line)["step"] for line in log if "loss" in json.loads(line)]
    assert done == list(range(1, steps + 1))


TRAIN = """
from dbcore import SUBJECTS, TOY_BASE
from dbcore.config import TrainConfig
from dbcore.engines.trainer import train
from dbcore.course.widgets import Dashboard

dashboard = Dashboard()
config = TrainConfig(
    pretrained_model_name_or_path=str(TOY_BASE), instance_data_dir=str(SUBJECTS / "dog"),
    instance_prompt="a photo of sks dog", max_train_steps=5000, output_dir="stopped",
    report_to="none")
dashboard.run(lambda: train(config, callback=dashboard.update,
                            should_stop=dashboard.should_stop))"""


def test_stop_ends_a_real_run_and_saves(open_cells, folder):
    page = open_cells("training", TRAIN, "await dashboard")
    page.start_all()
    page.wait(lambda: any("of 5000, about" in label.text for label in page.find(".widget-label")),
              180)
    page.click(page.find("button.widget-button")[0])
    page.wait(lambda: any("Interrupted: Stopped after step" in words.text
                          for words in page.find(".widget-html pre")), 60)
    page.screenshot("stopped")
    assert list((folder / "stopped").glob("checkpoint-*/pytorch_lora_weights.safetensors"))

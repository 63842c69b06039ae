"""Panels in JupyterLab: a control is moved in the browser, and the screen is looked at."""

import base64
import io

import pytest
from nbformat.v4 import new_code_cell, new_output
from PIL import Image

pytestmark = pytest.mark.browser

SWATCH = """
from PIL import Image
from dbcore.course.widgets import explore

def swatch(red=0, place="snow"):
    if red > 250:
        raise ValueError("too red")
    return Image.new("RGB", (64, 64), (red, 0, 255 if place == "water" else 0)), f"red is {red}"

panel = explore(swatch, red=(0, 255, 50), place=["snow", "water"])
panel"""

TRAIN = """
import time
from dbcore.course.widgets import Dashboard

dashboard = Dashboard()

def train():
    for step in range(1, 2001):
        dashboard.update({"step": step, "steps": 2000, "loss": 1 / step})
        time.sleep(0.05)
        if dashboard.should_stop():
            return f"saved at step {step}"

dashboard.run(train)"""


def test_a_slider_moves_the_picture_and_a_menu_too(open_cells):
    from selenium.webdriver import Keys
    from selenium.webdriver.support.ui import Select

    page = open_cells("panel", SWATCH)
    page.run_all()
    (image,) = page.wait(lambda: page.find(".widget-image"))
    page.wait(lambda: page.colour(image) == [0, 0, 0])
    (handle,) = page.find(".noUi-handle")
    handle.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    page.wait(lambda: page.colour(image) == [100, 0, 0])
    (words,) = page.find(".widget-html pre")
    assert words.text == "red is 100"
    Select(page.find(".widget-dropdown select")[0]).select_by_visible_text("water")
    page.wait(lambda: page.colour(image) == [100, 0, 255])
    page.screenshot("panel")


def test_what_goes_wrong_is_read_on_the_panel(open_cells):
    from selenium.webdriver import Keys

    page = open_cells("wrong", SWATCH.replace("red > 250", "red > 0"))
    page.run_all()
    page.wait(lambda: page.find(".noUi-handle"))[0].send_keys(Keys.ARROW_RIGHT)
    page.wait(lambda: any("ValueError: too red" in words.text
                          for words in page.find(".widget-html pre")))
    assert not page.find(".widget-image")[0].is_displayed()


def test_stop_ends_a_training_run(open_cells):
    page = open_cells("dashboard", TRAIN, "1 + 1")
    page.run_all()
    page.wait(lambda: any("of 2000, about" in label.text for label in page.find(".widget-label")))
    page.wait(lambda: page.find(".widget-image")[0].is_displayed())
    page.screenshot("dashboard")
    (button,) = page.find("button.widget-button")
    assert button.text == "Stop"
    button.click()
    page.wait(lambda: button.text == "Stopped", 10)
    assert not button.is_enabled()
    assert any(label.text.startswith("step ") for label in page.find(".widget-label"))


def test_without_a_kernel_the_still_picture_is_seen(open_cells):
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (0, 128, 0)).save(buffer, "png")
    data = {"image/png": base64.b64encode(buffer.getvalue()).decode(),
            "text/plain": "Panel with red"}
    stored = new_output("execute_result", data, execution_count=1)
    page = open_cells("still", new_code_cell(SWATCH, execution_count=1, outputs=[stored]))
    (image,) = page.wait(lambda: page.find(".jp-RenderedImage img"))
    page.wait(lambda: page.colour(image) == [0, 128, 0])


def test_stop_is_heard_while_another_cell_waits_for_the_run(open_cells):
    page = open_cells("waiting", TRAIN, "await dashboard")
    page.start_all()
    page.wait(lambda: any("of 2000, about" in label.text for label in page.find(".widget-label")))
    page.find("button.widget-button")[0].click()
    page.wait(lambda: any("saved at step" in output.text
                          for output in page.find(".jp-OutputArea-output")), 15)

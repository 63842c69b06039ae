"""Panels, driven as a browser drives them: a control's value is set, and what the panel then shows
is looked at."""

import asyncio
import base64
import io
import sys
import threading
import time
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dbcore.course import widgets
from dbcore.datasets.photos import Photo, Problem, check_box, gather_photos
from dbcore.toybox.scene import CLASSES, COLORS, PATTERNS, PROPORTIONS, Character

ipywidgets = pytest.importorskip("ipywidgets")


def swatch(red=10, size=64):
    return Image.new("RGB", (size, size), (red, 0, 0))


def seen(panel):
    """What the panel's image shows now, decoded, as an array; None if it is hidden."""
    image = panel._screen.image
    if image.layout.display == "none":
        return None
    return np.asarray(Image.open(io.BytesIO(image.value)).convert("RGB")).astype(int)


def words(panel):
    return panel._screen.text.value


# --- explore --------------------------------------------------------------------------------------


def test_moving_a_control_shows_the_function_of_its_value():
    panel = widgets.explore(swatch, red=(0, 255))
    panel._repr_mimebundle_()
    assert seen(panel)[0, 0].tolist() == [10, 0, 0]
    panel.controls["red"].value = 200
    assert seen(panel)[0, 0].tolist() == [200, 0, 0]
    assert panel.value == {"red": 200}
    assert panel.image().getpixel((0, 0)) == (200, 0, 0)


def test_moving_from_code_is_moving_by_hand():
    panel = widgets.explore(swatch, red=(0, 255))
    panel.set(red=77)
    assert panel.controls["red"].value == 77
    assert seen(panel)[0, 0, 0] == 77


@pytest.mark.parametrize(("spec", "kind", "value", "other"), [
    ((0, 10), "IntSlider", 0, 3),
    ((0, 10, 5), "IntSlider", 0, 5),
    ((0.0, 2.0), "FloatSlider", 0.0, 1.3),
    ((0, 1, 0.25), "FloatSlider", 0, 0.25),
    ([0, 250, 999], "SelectionSlider", 0, 999),
    (["snow", "beach"], "Dropdown", "snow", "beach"),
    (True, "Checkbox", True, False),
    ("a dog", "Text", "a dog", "a cat"),
])  # fmt: skip
def test_kinds_of_controls(spec, kind, value, other):
    panel = widgets.explore(lambda x: str(x), x=spec)
    control = panel.controls["x"]
    assert type(control).__name__ == kind
    assert panel.value == {"x": value}
    assert control.value == value
    control.value = other
    assert panel.value == {"x": other}
    assert str(other) in words(panel)
    assert not getattr(control, "continuous_update",
                       False), "every pixel of a drag would call the function"


def test_the_functions_defaults_are_where_controls_start():
    panel = widgets.explore(lambda steps=20, place="beach": f"{steps} {place}", steps=(5, 50),
                            place=["snow", "beach"])
    assert panel.value == {"steps": 20, "place": "beach"}
    assert panel.controls["place"].value == "beach"


@pytest.mark.parametrize(("result", "pictured", "worded"), [
    (swatch(), True, False), ("a < b", False, True), ((swatch(), "why"), True, True),
    ((None, "why"), False, True),
])  # fmt: skip
def test_images_and_words(result, pictured, worded):
    panel = widgets.explore(lambda x: result, x=(0, 1))
    panel.controls["x"].value = 1
    assert (seen(panel) is not None) == pictured
    assert bool(words(panel)) == worded
    assert "a < b" not in words(panel)  # escaped


def test_an_error_stands_on_the_panel_and_goes_away():
    def root(x):
        if x < 0:
            raise ValueError("x must not be negative")
        return swatch()

    panel = widgets.explore(root, x=(-1, 1))
    panel.set(x=1)
    panel.set(x=-1)
    assert seen(panel) is None
    assert "ValueError: x must not be negative" in words(panel)
    panel.set(x=1)
    assert seen(panel) is not None
    assert words(panel) == ""


def test_a_panel_is_a_live_view_a_still_image_and_a_line_of_words():
    panel = widgets.explore(swatch, red=(0, 255))
    bundle = panel._repr_mimebundle_()
    assert bundle["text/plain"] == "Panel with red"
    assert bundle[widgets.VIEW]["model_id"] == panel.widget.model_id
    still = Image.open(io.BytesIO(base64.b64decode(bundle["image/png"])))
    assert still.size == (256, 256)
    assert still.getpixel((5, 5)) == (10, 0, 0)


def test_on_colab_only_the_live_view_is_sent(monkeypatch):
    monkeypatch.setitem(sys.modules, "google.colab", object())
    assert "image/png" not in widgets.explore(swatch, red=(0, 255))._repr_mimebundle_()


def test_without_ipywidgets_the_still_image_remains(monkeypatch):
    monkeypatch.setattr(widgets, "ipywidgets", None)
    panel = widgets.explore(swatch, red=(0, 255))
    panel.set(red=99)
    bundle = panel._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "image/png"}
    assert panel.image().getpixel((0, 0)) == (99, 0, 0)


# --- the course's panels --------------------------------------------------------------------------


def test_timestep_slider_shows_the_frame_of_its_timestep():
    panel = widgets.timestep_slider([[swatch(0), swatch(50)], [swatch(100), swatch(150)]],
                                    [0, 999], ["the photo", "with noise"])
    panel.controls["timestep"].value = 999
    assert panel.value == {"timestep": 999}
    assert {100, 150} <= set(seen(panel)[..., 0].flat)
    figure = panel.image()
    assert figure.get_suptitle() == "timestep 999"
    assert [axis.get_title() for axis in figure.axes] == ["the photo", "with noise"]
    step = widgets.timestep_slider([[swatch(9)]], [1], ["image"], label="step")
    assert step.image().get_suptitle() == "step 1"


def test_a_frame_is_needed_for_every_timestep():
    with pytest.raises(ValueError, match="shorter"):
        widgets.timestep_slider([[swatch()]], [0, 1], ["image"])


def test_before_after_shows_both_images_of_a_label():
    panel = widgets.before_after([swatch(20), swatch(40)], [swatch(200), swatch(220)],
                                 ["seed 0", "seed 1"])
    panel.controls["image"].value = "seed 1"
    assert {40, 220} <= set(seen(panel)[..., 0].flat)
    assert not {20, 200} <= set(seen(panel)[..., 0].flat)


@pytest.fixture
def folder_of_photos(tmp_path):
    swatch(120, 300).save(tmp_path / "good.png")
    swatch(60, 20).save(tmp_path / "small.png")
    photos = [Photo(tmp_path / "good.png", (300, 300)), Photo(tmp_path / "small.png", (20, 20))]
    problems = [Problem(tmp_path / "small.png", "small", "20 pixels only"),
                Problem(tmp_path / "notes.png", "broken", "not an image", skipped=True)]
    return photos, problems


def test_the_doctor_shows_each_file_and_what_is_wrong(folder_of_photos):
    panel = widgets.photo_doctor(*folder_of_photos)
    panel._repr_mimebundle_()
    assert 120 in seen(panel)[..., 0]
    assert panel.image().get_suptitle() == "good.png: good"
    assert "Nothing wrong" in words(panel)
    panel.controls["photo"].value = "small.png"
    assert 60 in seen(panel)[..., 0]
    assert panel.image().get_suptitle() == "small.png: small"
    assert "20 pixels only" in words(panel)
    panel.controls["photo"].value = "notes.png"
    assert seen(panel) is None
    assert "not an image [skipped]" in words(panel)


def test_the_doctor_shows_a_copy_beside_the_photo_that_it_repeats(tmp_path):
    Image.effect_noise((64, 64), 80).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())
    panel = widgets.photo_doctor(*gather_photos(tmp_path, resolution=32))
    assert len(panel.image().axes) == 1
    panel.controls["photo"].value = "b.png"
    assert [axis.get_title() for axis in panel.image().axes] == ["b.png", "a.png"]


def test_the_doctors_sheet_has_every_photo_with_its_verdict(folder_of_photos):
    titles = [axis.get_title() for axis in widgets.doctor_sheet(*folder_of_photos).axes]
    assert titles[:2] == ["good.png: good", "small.png: small"]
    assert set(titles[2:]) == {""}


def test_a_photo_whose_mask_is_bad_is_not_called_good(folder_of_photos):
    photos, problems = folder_of_photos
    path = photos[0].path
    problems = [*problems, Problem(path.with_suffix(".mask.png"), "mask",
                                   "black: nothing is learnt", photo=path)]
    assert widgets.doctor_sheet(photos, problems).axes[0].get_title() == "good.png: mask"
    assert widgets.photo_doctor(photos, problems)._call()[1] == "black: nothing is learnt"


def test_the_crop_box_follows_its_sliders_and_is_always_legal():
    photo = Image.new("RGB", (300, 200), "white")
    photo.paste((200, 0, 0), (0, 0, 150, 200))
    panel = widgets.CropBox(photo)
    assert panel.box == (50, 0, 250, 200)
    panel.controls["side"].value, panel.controls["across"].value = 0.5, 0.0
    assert panel.box == (0, 50, 100, 150)
    for across in (0, 0.33, 1):
        for side in (0.2, 0.77, 1):
            panel.set(across=across, down=across, side=side)
            assert check_box(panel.box, photo.size) == panel.box


def test_what_is_outside_the_crop_box_is_darker():
    photo = Image.new("RGB", (300, 200), (200, 200, 200))
    left, right = widgets.draw_crop(photo, (0, 50, 100, 150)).axes
    dark, kept = (np.asarray(axis.images[0].get_array()) for axis in (left, right))
    assert kept.shape[:2] == (100, 100)
    assert (kept == 200).all()
    assert dark[100, 50, 0] == 200
    assert dark[100, 250, 0] in (79, 80)
    assert dark[50, 0, 0] == 255


def test_a_designed_subject_is_a_character():
    drawn = []

    def render(values):
        drawn.append(dict(values))
        return swatch()

    menus = {"kind": CLASSES, "color": COLORS, "pattern": PATTERNS, "color2": COLORS,
             "hat": ["", *COLORS]}
    panel = widgets.design_subject(render, menus, PROPORTIONS, {"kind": "duck", "color": "pink"})
    panel.controls["hat"].value = "blue"
    panel.controls["ears"].value = 0.9
    wanted = {"kind": "duck", "color": "pink", "hat": "blue", "ears": 0.9, "tail": 0.5}
    assert wanted.items() <= panel.value.items()
    assert drawn[-1] == panel.value
    assert Character(**panel.value).ears == 0.9


# --- the dashboard --------------------------------------------------------------------------------


def trainer(dashboard, steps, begun=None, gate=None):
    """A run that keeps to the contract: callback after each step, should_stop asked after it."""
    def train():
        for step in range(1, steps + 1):
            dashboard.update({"step": step, "steps": steps, "loss": 1 / step, "lr": 1e-4,
                              "seconds": 0.1 * step})
            if begun:
                begun.set()
            if gate:
                gate.wait(5)
            if dashboard.should_stop():
                return step
        dashboard.update({"step": steps, "images": {"a dog": [swatch(200)]}})
        return steps
    return train


def test_a_run_is_shown_to_its_end():
    dashboard = widgets.Dashboard()
    assert dashboard.run(trainer(dashboard, 30)) is dashboard
    assert dashboard.result() == 30
    assert list(dashboard.losses) == list(range(1, 31))
    assert dashboard.losses[10] == 0.1
    assert (dashboard.bar.value, dashboard.bar.max) == (30, 30)
    assert dashboard.words.value == "step 30 of 30"
    assert dashboard.button.disabled
    assert dashboard.button.description == "Done"
    line = dashboard.loss_plot().axes[0].lines[0]
    assert line.get_ydata()[-1] == 1 / 30
    assert dashboard.validation().axes[0].get_ylabel() == "a dog"
    assert 200 in seen(dashboard)[..., 0]


def test_the_stop_button_ends_the_run_after_its_step():
    dashboard, begun, gate = widgets.Dashboard(), threading.Event(), threading.Event()
    dashboard.run(trainer(dashboard, 1000, begun, gate))
    assert begun.wait(5)
    dashboard.button.click()
    assert dashboard.button.disabled
    assert dashboard.button.description == "Stopping"
    gate.set()
    assert dashboard.result() == 1
    assert dashboard.button.description == "Stopped"


def test_interrupting_the_wait_stops_the_run_in_order(monkeypatch):
    dashboard, gate = widgets.Dashboard(), threading.Event()
    dashboard.run(trainer(dashboard, 1000, gate=gate))
    join = dashboard._thread.join

    def interrupted(timeout):
        if not gate.is_set():
            gate.set()
            raise KeyboardInterrupt
        join(timeout)

    monkeypatch.setattr(dashboard._thread, "join", interrupted)
    assert dashboard.result() < 1000


def test_a_dashboard_is_awaited():
    dashboard, gate = widgets.Dashboard(), threading.Event()

    async def cell():
        asyncio.get_running_loop().call_later(0.2, gate.set)  # while it waits, other things go on
        return await dashboard

    dashboard.run(trainer(dashboard, 30, gate=gate))
    assert asyncio.run(cell()) == 30


def test_cancelling_the_wait_stops_the_run_in_order():
    dashboard, gate = widgets.Dashboard(), threading.Event()

    async def interrupted():
        waiting = asyncio.ensure_future(dashboard._wait())
        await asyncio.sleep(0.2)
        waiting.cancel()  # what a kernel makes of an interrupt
        threading.Timer(0.3, gate.set).start()
        return await waiting

    dashboard.run(trainer(dashboard, 1000, gate=gate))
    assert asyncio.run(interrupted()) < 1000
    assert dashboard.stopped


def test_an_error_of_the_run_is_shown_and_raised_in_the_waiting_cell():
    dashboard = widgets.Dashboard()

    def fails():
        raise ValueError("no photo in the folder")

    dashboard.run(fails)
    with pytest.raises(ValueError, match="no photo in the folder"):
        dashboard.result()
    assert dashboard.words.value == "ended before the first step"
    assert "ValueError: no photo in the folder" in words(dashboard)


def test_a_run_that_was_stopped_says_so_without_the_way_it_came():
    dashboard, gate = widgets.Dashboard(), threading.Event()

    def stops():
        train = trainer(dashboard, 1000, gate=gate)
        raise RuntimeError(f"stopped after step {train()}")

    dashboard.run(stops)
    dashboard.stop()
    gate.set()
    with pytest.raises(RuntimeError, match="stopped after step") as raised:
        dashboard.result()
    assert "stops" not in [frame.name for frame in raised.traceback]
    assert "RuntimeError: stopped after step" in words(dashboard)
    assert seen(dashboard) is None


def test_two_runs_at_once_are_refused_and_a_second_starts_afresh():
    dashboard, gate = widgets.Dashboard(), threading.Event()
    with pytest.raises(RuntimeError, match="nothing was started"):
        dashboard.result()
    dashboard.run(trainer(dashboard, 5, gate=gate))
    with pytest.raises(RuntimeError, match="still watching a run"):
        dashboard.run(trainer(dashboard, 5))
    dashboard.stop()
    gate.set()
    dashboard.result()
    dashboard.run(trainer(dashboard, 3, gate=(again := threading.Event())))
    assert not dashboard.button.disabled
    assert dashboard.button.description == "Stop"
    again.set()
    assert dashboard.result() == 3
    assert list(dashboard.losses) == [1, 2, 3]
    assert not dashboard.stopped


def test_what_the_run_prints_stays_with_it(capsys):
    dashboard, gate = widgets.Dashboard(), threading.Event()

    def train():
        print("rank: auto is 8")
        gate.wait(5)

    dashboard.run(train)
    print("from the notebook")
    gate.set()
    dashboard.result()
    assert dashboard.printed.getvalue() == "rank: auto is 8\n"
    assert capsys.readouterr().out == "from the notebook\n"


def test_what_the_run_prints_stays_with_it_when_ipython_wraps_the_stream(capsys):
    """IPython puts its own `write` on sys.stdout for the time of each cell."""
    dashboard, gate = widgets.Dashboard(), threading.Event()

    def train():
        print("first")
        gate.wait(5)
        print("last")

    dashboard.run(train)
    while not dashboard.printed.getvalue():
        pass
    stream, write = sys.stdout, sys.stdout.write
    stream.write = lambda text: write(text)
    print("from the notebook")
    stream.write = write
    gate.set()
    dashboard.result()
    assert dashboard.printed.getvalue() == "first\nlast\n"
    assert capsys.readouterr().out == "from the notebook\n"


def test_time_left_is_the_pace_since_the_first_step_seen(monkeypatch):
    clock = iter([100.0, 102.0, 104.0])
    monkeypatch.setattr(widgets.time, "monotonic", lambda: next(clock))
    dashboard = widgets.Dashboard()
    dashboard._draw = lambda: None
    dashboard.update({"step": 51, "steps": 100, "loss": 1.0})  # a resumed run
    assert dashboard.seconds_left() is None
    dashboard.update({"step": 53, "steps": 100, "loss": 1.0})
    assert dashboard.seconds_left() == (100 - 53) * 4 / 2


def test_drawing_takes_a_tenth_of_the_time_at_most():
    dashboard, draws = widgets.Dashboard(every=0.0), []
    draw = dashboard._draw

    def counted(**how):
        draws.append(1)
        draw(**how)

    dashboard._draw = counted
    for step in range(1, 101):
        dashboard.update({"step": step, "steps": 100, "loss": 1.0})
        time.sleep(0.001)
    assert 1 <= len(draws) < 30


def test_a_dashboard_without_ipywidgets_still_runs(monkeypatch):
    monkeypatch.setattr(widgets, "ipywidgets", None)
    dashboard = widgets.Dashboard()
    dashboard.run(trainer(dashboard, 5))
    assert dashboard.result() == 5
    assert set(dashboard._repr_mimebundle_()) == {"text/plain"}
    assert dashboard.loss_plot() is not None


def test_panels_import_no_engine():
    source = Path(widgets.__file__).read_text()
    assert "dbcore.engines" not in source
    assert "dbcore.models" not in source
    assert "import torch" not in source


@pytest.mark.parametrize("value", [
    {"a.jpg": {"metadata": {"name": "a.jpg", "size": 2}, "content": b"hi"}},  # ipywidgets 7
    ({"name": "a.jpg", "type": "image/jpeg", "size": 2, "content": memoryview(b"hi")},),  # 8
])
def test_an_upload_is_read_in_either_form(value):
    assert widgets.uploaded_files(value) == {"a.jpg": b"hi"}


@pytest.mark.parametrize("name", ["../../a.jpg", "..\\a.jpg", "/b/a.jpg"])
def test_an_upload_lands_in_its_folder_whatever_it_is_called(name, tmp_path):
    upload = widgets.Upload(tmp_path / "mine")
    upload.take(({"name": name, "content": memoryview(b"hi")},))
    assert [path.name for path in upload.files()] == ["a.jpg"]
    assert (tmp_path / "mine" / "a.jpg").read_bytes() == b"hi"
    assert upload.words.value == repr(upload) == f"1 files in {tmp_path / 'mine'}"


def test_without_ipywidgets_an_upload_is_its_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(widgets, "ipywidgets", None)
    upload = widgets.Upload(tmp_path)
    (tmp_path / "a.jpg").write_bytes(b"hi")
    assert upload._repr_mimebundle_()["text/plain"] == f"1 files in {tmp_path}"


def test_an_upload_is_written_as_soon_as_it_is_there(tmp_path):
    upload, now = widgets.Upload(tmp_path), datetime.now(timezone.utc)
    upload.button.value = ({"name": "a.jpg", "type": "image/jpeg", "size": 2, "last_modified": now,
                            "content": memoryview(b"hi")},)
    assert (tmp_path / "a.jpg").read_bytes() == b"hi"

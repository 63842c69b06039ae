"""Panels for notebooks: controls over a plain function, and the image or words it returns.

Every panel is given functions and data and imports no engine. What a panel shows for one setting
is `panel.image()`, so the next cell can call the same function without the panel. A panel is the
last value of a cell; without a kernel, or without ipywidgets, its first image is shown instead.

Images go through `ipywidgets.Image`, not `Output`: that works from threads, in ipywidgets 7 and 8
alike.
"""

from __future__ import annotations

import asyncio
import html
import inspect
import io
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw

from dbcore.utils.files import write_whole
from dbcore.utils.grids import Picture, image_grid, line_plot, running_mean

if TYPE_CHECKING:
    from dbcore.datasets.photos import Photo, Problem

try:
    import ipywidgets
except ImportError:  # the panels are then still images
    ipywidgets = None

SHOWN = 256  # pixels a small image is enlarged to, so that a 64 x 64 one can be looked at
VIEW = "application/vnd.jupyter.widget-view+json"


def explore(function: Callable, **controls: Any) -> Panel:
    """A panel of controls over `function`, called with them as keywords whenever one has moved.

    A control is given as
      (low, high) or (low, high, step)   a slider, over whole numbers if all are
      [a, b, c]                          a slider over the values if they are numbers, else a menu
      True or False                      a box to tick
      "text"                             a line to type
    and starts at the function's default for it, else at the first value. `function` returns a PIL
    image or matplotlib figure, or text, or the pair (image, text).
    """
    return Panel(function, controls)


class Panel:
    """What `explore` returns: `.value` is {control: setting}, `.image()` what it shows, `.show()`
    shows it."""

    def __init__(self, function: Callable, controls: Mapping[str, Any],
                 start: dict[str, Any] | None = None):
        self.function = function
        defaults = {name: p.default for name, p in inspect.signature(function).parameters.items()
                    if p.default is not inspect.Parameter.empty}  # fmt: skip
        given = defaults | (start or {})
        self.value = {name: given.get(name, _first(spec)) for name, spec in controls.items()}
        self.controls: dict[str, Any] = {}  # {name: widget}; empty without ipywidgets
        self._made_with = controls
        if ipywidgets:
            self._build()

    def _build(self):
        for name, spec in self._made_with.items():
            widget = self.controls[name] = _control(name, spec, self.value[name])
            widget.observe(lambda change, name=name: self._moved(name, change["new"]),
                           names="value")
        self._screen = _Screen()
        self.widget = ipywidgets.VBox([*self.controls.values(), self._screen.widget])

    def _moved(self, name, value):
        self.value[name] = value
        self._screen.show(self._call)

    def _call(self):
        return self.function(**self.value)

    def set(self, **values: Any) -> None:
        """Move controls from code, as if by hand."""
        for name, value in values.items():
            if name in self.controls:
                self.controls[name].value = value
            else:
                self.value[name] = value

    def image(self) -> Any:
        """What `function` returns for the current settings, without its text."""
        return _parts(self._call())[0]

    def show(self) -> None:
        """Show the panel in the middle of a cell."""
        from IPython.display import display

        display(self)

    def _repr_mimebundle_(self, include=None, exclude=None):
        result = self._call()
        if ipywidgets:
            self._screen.show(lambda: result)
        return _bundle(self, _parts(result)[0])

    def __repr__(self):
        return f"Panel with {', '.join(self.value)}"


def _first(spec):
    return spec[0] if isinstance(spec, (tuple, list)) else spec


def _control(name, spec, value):
    """The widget for one control; a slider reports only when it is released, so that calls do not
    pile up."""
    style = {"description": name.replace("_", " "), "style": {"description_width": "9em"},
             "layout": ipywidgets.Layout(width="32em")}  # fmt: skip
    if isinstance(spec, bool):
        return ipywidgets.Checkbox(value=value, **style)
    if isinstance(spec, str):
        return ipywidgets.Text(value=value, continuous_update=False, **style)
    if isinstance(spec, list):
        if all(isinstance(item, (int, float)) for item in spec):
            return ipywidgets.SelectionSlider(options=spec, value=value, continuous_update=False,
                                              **style)
        return ipywidgets.Dropdown(options=spec, value=value, **style)
    low, high, *step = spec
    whole = all(isinstance(number, int) for number in (*spec, value))
    kind = ipywidgets.IntSlider if whole else ipywidgets.FloatSlider
    step = step[0] if step else (1 if whole else (high - low) / 20)
    return kind(min=low, max=high, step=step, value=value, continuous_update=False, **style)


class _Screen:
    """An image and a line of words below it, either of which may be missing."""

    def __init__(self):
        self.image, self.text = ipywidgets.Image(format="png"), ipywidgets.HTML()
        self.image.layout.max_width = "100%"
        self.image.layout.align_self = "flex-start"
        self.widget = ipywidgets.VBox([self.image, self.text])

    def show(self, make):
        """Show what `make()` returns, or why it failed: otherwise a callback's error would be
        lost."""
        try:
            image, words = _parts(make())
        except Exception as error:  # noqa: BLE001
            # whatever the explored function raises belongs on the panel
            image, words = None, f"{type(error).__name__}: {error}"
        self.image.layout.display = "none" if image is None else ""
        if image is not None:
            self.image.value = as_png(image)
        self.text.value = (f'<pre style="white-space: pre-wrap">{html.escape(words)}</pre>'
                           if words else "")


def _parts(result):
    """(image or None, words) of what an explored function returned."""
    if isinstance(result, tuple):
        return result
    if isinstance(result, str):
        return None, result
    return result, ""


def as_png(image: Any) -> bytes:
    """The bytes of a PNG file, for a PIL image or a figure; a small image is enlarged to be
    seen."""
    if isinstance(image, Picture):
        return image._repr_png_()
    buffer = io.BytesIO()
    if hasattr(image, "savefig"):
        image.savefig(buffer, format="png", bbox_inches="tight")
        return buffer.getvalue()
    factor = max(1, SHOWN // max(image.size))
    size = (image.width * factor, image.height * factor)
    image.resize(size, Image.Resampling.BICUBIC).save(buffer, format="png")
    return buffer.getvalue()


def _bundle(panel, image):
    """For the front end to choose from: the live panel, else its image, else a line of text."""
    bundle = {"text/plain": repr(panel)}
    if ipywidgets:
        bundle[VIEW] = {"version_major": 2, "version_minor": 0, "model_id": panel.widget.model_id}
    # Colab would show both
    if image is not None and not (ipywidgets and "google.colab" in sys.modules):
        bundle["image/png"] = b64encode(as_png(image)).decode()
    return bundle


# --- panels of the course -------------------------------------------------------------------------


def timestep_slider(frames: Iterable[Sequence[Image.Image]], timesteps: Iterable[float],
                    column_labels: Sequence[str], label: str = "timestep") -> Panel:
    """Slide through `frames`, one row of PIL images for each of `timesteps`.

    The images of a row stand side by side below `column_labels`, with the timestep as the title.
    """
    by_timestep = dict(zip(timesteps, frames, strict=True))

    def frame(**chosen):
        row = by_timestep[chosen[label]]
        return image_grid([row], None, column_labels, f"{label} {chosen[label]}", cell=2.0)

    return explore(frame, **{label: list(by_timestep)})


def before_after(before: Iterable[Image.Image], after: Iterable[Image.Image],
                 labels: Iterable[Any]) -> Panel:
    """Choose one of `labels` and see its image before and after, side by side.

    All three are equally long.
    """
    pairs = dict(zip(labels, zip(before, after, strict=True), strict=True))

    def pair(image):
        return image_grid([pairs[image]], column_labels=["before", "after"], title=str(image),
                          cell=2.5)

    return Panel(pair, {"image": list(pairs)})


def doctor_sheet(photos: Sequence[Photo], problems: Iterable[Problem], columns: int = 4) -> Picture:
    """All photos in one figure, each with 'good' or the kinds of its problems below its name."""
    kinds: dict[Path, list[str]] = {}
    for problem in problems:
        kinds.setdefault(problem.photo or problem.path, []).append(problem.kind)
    cells = [(photo.load(), f"{photo.path.name}: {', '.join(kinds.get(photo.path, ['good']))}")
             for photo in photos]
    figure = Picture(figsize=(2 * columns, 2.2 * -(-len(cells) // columns)))
    axes = figure.subplots(-(-len(cells) // columns), columns, squeeze=False).flat
    for axis in axes:
        axis.axis("off")
    for axis, (image, label) in zip(figure.axes, cells):
        axis.imshow(image)
        axis.set_title(label, fontsize=8, wrap=True)
    return figure


def photo_doctor(photos: Iterable[Photo], problems: Iterable[Problem]) -> Panel:
    """Go through a folder's files and read what `gather_photos` found about each; a duplicate is
    shown beside the photo that it repeats."""
    loaders = {photo.path.name: photo.load for photo in photos}
    found: dict[str, list[Problem]] = {name: [] for name in loaders}
    for problem in problems:
        found.setdefault((problem.photo or problem.path).name, []).append(problem)

    def look(photo):
        words = "\n".join(problem.message + " [skipped]" * problem.skipped
                          for problem in found[photo]) or "Nothing wrong with this one."
        if photo not in loaders:
            return None, words
        verdict = ", ".join(problem.kind for problem in found[photo]) or "good"
        names = [photo, *(problem.twin.name for problem in found[photo] if problem.twin)]
        return image_grid([[loaders[name]() for name in names]], title=f"{photo}: {verdict}",
                          column_labels=names if names[1:] else None, cell=2.5), words

    return Panel(look, {"photo": list(found)})


def crop_square(size: tuple[int, int], across: float = 0.5, down: float = 0.5,
                side: float = 1.0) -> tuple[int, int, int, int]:
    """A square in `size` = (width, height), in pixels: (left, top, right, bottom).

    `side` in (0, 1] is a fraction of the shorter side; `across` and `down` in [0, 1] place the
    square in the room that is left, 0.5 being the middle.
    """
    width, height = size
    pixels = max(1, round(side * min(size)))
    left, top = round(across * (width - pixels)), round(down * (height - pixels))
    return left, top, left + pixels, top + pixels


def draw_crop(photo: Image.Image, box: tuple[int, int, int, int]) -> Picture:
    """The photo with everything outside `box` darkened, and beside it what is kept."""
    dark = Image.blend(photo, Image.new("RGB", photo.size, "black"), 0.6)
    dark.paste(photo.crop(box), box[:2])
    left, top, right, bottom = box
    ImageDraw.Draw(dark).rectangle((left, top, right - 1, bottom - 1), outline="white",
                                   width=max(1, min(photo.size) // 128))  # fmt: skip
    return image_grid([[dark, photo.crop(box)]], column_labels=["the photo", "what is kept"],
                      cell=2.5)


class CropBox(Panel):
    """Choose a square of a photo (a PIL image in RGB); `.box` is (left, top, right, bottom) in its
    pixels."""

    def __init__(self, photo: Image.Image):
        self.photo = photo
        super().__init__(lambda **place: draw_crop(photo, crop_square(photo.size, **place)),
                         {"across": (0.0, 1.0), "down": (0.0, 1.0), "side": (0.2, 1.0)},
                         {"across": 0.5, "down": 0.5, "side": 1.0})  # fmt: skip

    @property
    def box(self) -> tuple[int, int, int, int]:
        return crop_square(self.photo.size, **self.value)


def design_subject(render: Callable, menus: Mapping[str, Iterable[Any]], sliders: Iterable[str],
                   start: dict[str, Any] | None = None) -> Panel:
    """Design a character: `render(values) -> PIL image`, for values = {menu or slider: setting}.

    `menus`: {name: choices}; `sliders`: the names of proportions in [0, 1]. `.value` of the panel
    is the design, ready for `render` or `Character(**panel.value)`.
    """
    controls = {name: list(choices)
                for name, choices in menus.items()} | dict.fromkeys(sliders, (0.0, 1.0))
    middle = dict.fromkeys(sliders, 0.5)
    return Panel(lambda **values: render(values), controls, middle | (start or {}))


def uploaded_files(value: Any) -> dict[str, bytes]:
    """{name: content} of what `FileUpload.value` holds, in ipywidgets 7 (a dict) and 8 (a tuple).

    Names are those of files alone: whatever folder an upload names is left out.
    """
    if isinstance(value, Mapping):
        pairs = [(name, file["content"]) for name, file in value.items()]
    else:
        pairs = [(file["name"], file["content"]) for file in value]
    return {PurePosixPath(name.replace("\\", "/")).name: bytes(content) for name, content in pairs}


class Upload:
    """A button to upload photos, which are written to `folder` as they come.

    Shown as the last value of a cell. Without ipywidgets, and for many or large files, copy them
    into the folder yourself: the notebook asks the folder.
    """

    def __init__(self, folder: str | Path, accept: str = "image/*,.heic,.heif"):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        if ipywidgets:
            self.button = ipywidgets.FileUpload(accept=accept, multiple=True)
            self.words = ipywidgets.Label(str(self))
            self.button.observe(lambda change: self.take(change["new"]), names="value")
            self.widget = ipywidgets.VBox([self.button, self.words])

    def take(self, value: Any) -> None:
        """Write the files of a `FileUpload.value` to the folder."""
        for name, content in uploaded_files(value).items():
            write_whole(self.folder / name, content)
        if ipywidgets:
            self.words.value = str(self)

    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.iterdir() if path.is_file())

    def _repr_mimebundle_(self, include=None, exclude=None):
        return _bundle(self, None)

    def __repr__(self):
        return f"{len(self.files())} files in {self.folder}"


# --- training -------------------------------------------------------------------------------------


class Dashboard:
    """Watch a training run and stop it: loss, validation images, time left, and a Stop button.

        dashboard = Dashboard()
        dashboard.run(lambda: train(config, callback=dashboard.update,
        should_stop=dashboard.should_stop))

        path = await dashboard

    `run` starts a thread, so that the cell ends at once and the button can be pressed; `await
    dashboard`, in the next cell, waits for the run and gives what the function returned. A kernel
    that reacts to no button while a cell waits (ipykernel before 7.4, so Colab's) can be
    interrupted: the run then ends in the same orderly way.
    """

    def __init__(self, every: float = 1.0):
        self.every = every  # seconds between two drawings, at least
        self._thread: threading.Thread | None = None
        if ipywidgets:
            self._build()
        self._reset()

    def _build(self):
        self.button = ipywidgets.Button(button_style="warning", icon="stop",
                                        tooltip="end the run after this step and keep "
                                        "what was learned")
        self.button.on_click(lambda _: self.stop())
        self.bar = ipywidgets.IntProgress(min=0, max=1)
        self.words = ipywidgets.Label()
        self._screen = _Screen()
        top = ipywidgets.HBox([self.button, self.bar, self.words])
        self.widget = ipywidgets.VBox([top, self._screen.widget])

    def _reset(self):
        self.losses, self.images, self.stopped = {}, {}, False
        # what the run writes; in the notebook it would land under any cell
        self.printed = io.StringIO()
        self.steps = self.validated = self._outcome = self._begun = None
        self._drawn, self._cost = -float("inf"), 0.0
        if ipywidgets:
            self.button.disabled, self.button.description = False, "Stop"
            self.bar.value, self.words.value = 0, "waiting for the first step"

    def run(self, function: Callable) -> Dashboard:
        """Call `function()` in a thread and return the dashboard, to be shown.

        Raises RuntimeError if a run is being watched already.
        """
        if self._thread and self._thread.is_alive():
            raise RuntimeError("this dashboard is still watching a run: "
                               "press Stop, or call result() to wait for it")
        self._reset()
        self._thread = threading.Thread(target=self._work, args=(function,), daemon=True)
        self._thread.start()
        return self

    def _work(self, function):
        try:
            with _printing_to(self.printed):
                self._outcome = (function(), None)
        except BaseException as error:  # noqa: BLE001 - raised again where result() is called
            self._outcome = (None, error)
        self._draw(final=True)

    def __await__(self):
        return self._wait().__await__()

    async def _wait(self):
        while self._thread and self._thread.is_alive():
            try:
                await asyncio.sleep(0.1)
            except (KeyboardInterrupt, asyncio.CancelledError):
                self.stop()
                self._thread.join()
        return self.result()

    def result(self) -> Any:
        """Wait for the run's end, without listening to the button; its function's value, or the
        error it raised."""
        if self._thread is None:
            raise RuntimeError("nothing was started: call run(function) first")
        while self._thread.is_alive():
            try:
                self._thread.join(0.1)
            except KeyboardInterrupt:
                self.stop()
        value, error = self._outcome
        if error and self.stopped:
            # it was asked for: only its words matter, not where it came from
            raise error.with_traceback(None)
        if error:
            raise error
        return value

    def stop(self) -> None:
        """What the Stop button does: the run ends after the step it is in."""
        self.stopped = True
        if ipywidgets:
            self.button.disabled, self.button.description = True, "Stopping"

    def should_stop(self) -> bool:
        return self.stopped

    def update(self, record: Mapping[str, Any]) -> None:
        """The run's callback: {"step", "steps", "loss"} after a step, {"step", "images": {prompt:
        [PIL]}}."""
        now = time.monotonic()
        if "loss" in record:
            self._begun = self._begun or (now, record["step"])
            self.steps = record["steps"]
            self.losses[record["step"]] = record["loss"]
        if "images" in record:
            self.images, self.validated = record["images"], record["step"]
        if "images" in record or now - self._drawn > max(self.every, min(5.0, 10 * self._cost)):
            self._draw()

    def seconds_left(self) -> float | None:
        """From the pace since the first step that was seen; None before the second."""
        if not self._begun or not self.losses or max(self.losses) == self._begun[1]:
            return None
        step, (begun, first) = max(self.losses), self._begun
        return (self.steps - step) * (time.monotonic() - begun) / (step - first)

    def loss_plot(self) -> Picture | None:
        """The loss so far as a figure, with its running mean; None before the second step."""
        if len(self.losses) < 2:
            return None
        steps, losses = list(self.losses), list(self.losses.values())
        return line_plot({"loss": (steps, losses),
                          "mean of the last 20": (steps, running_mean(losses, 20))},
                         "step", "loss")  # fmt: skip

    def validation(self) -> Picture | None:
        """The last validation images in a grid, a row for a prompt; None before the first."""
        if not self.images:
            return None
        return image_grid(list(self.images.values()), list(self.images),
                          title=f"step {self.validated}")

    def _draw(self, final=False):
        if not ipywidgets:
            return
        begun = time.monotonic()
        if self.losses:
            self.bar.max, self.bar.value = self.steps, max(self.losses)
        self.words.value = self._state(final)
        self._screen.show(self._view)
        self._drawn = time.monotonic()
        self._cost = self._drawn - begun
        if final:
            self.button.disabled = True
            self.button.description = "Stopped" if self.stopped else "Done"

    def _state(self, final):
        if not self.losses:
            return "ended before the first step" if final else "waiting for the first step"
        left = self.seconds_left()
        end = "" if final or left is None else f", about {left:.0f} s left"
        return f"step {max(self.losses)} of {self.steps}{end}"

    def _view(self):
        """For the screen: loss and validation grid in one image, and the error, if the run ended
        with one."""
        error = self._outcome and self._outcome[1]
        words = f"{type(error).__name__}: {error}" if error else ""
        figures = [figure for figure in (self.loss_plot(), self.validation()) if figure is not None]
        if not figures:
            return None, words
        return _stacked([Image.open(io.BytesIO(as_png(figure))).convert("RGB")
                         for figure in figures]), words

    def show(self) -> None:
        """Show the dashboard in the middle of a cell."""
        from IPython.display import display

        display(self)

    def _repr_mimebundle_(self, include=None, exclude=None):
        return _bundle(self, None)

    def __repr__(self):
        return "Dashboard"


@contextmanager
def _printing_to(file):
    """Send what this thread prints to `file`, and leave the prints of all others alone."""
    out, err = (_Fork(file, stream) for stream in (sys.stdout, sys.stderr))
    with redirect_stdout(out), redirect_stderr(err):
        yield


class _Fork:
    """A stream that writes to `mine` in the thread that made it, and to `other` in every other."""

    def __init__(self, mine, other):
        vars(self).update(mine=mine, other=other, thread=threading.get_ident())

    def __setattr__(self, name, value):
        # IPython wraps `write` around each cell: that is not for this thread
        setattr(self.other, name, value)

    def __getattr__(self, name):
        return getattr(self.mine if threading.get_ident() == self.thread else self.other, name)


def _stacked(images):
    sheet = Image.new("RGB", (max(image.width for image in images),
                              sum(image.height for image in images)), "white")
    top = 0
    for image in images:
        sheet.paste(image, (0, top))
        top += image.height
    return sheet

"""Images of images, and plain plots: rows of images with labels, lines, bars, dots and points.

Everything is drawn with matplotlib's object interface, never with pyplot: no window, no global
figure list to leak, safe in threads and on machines without a screen. A figure that is the last
value of a notebook cell shows itself.
"""

import io
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from dbcore.utils.errors import InputError
from dbcore.utils.files import write_whole

# Okabe and Ito's palette (2008): told apart with every common kind of colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
INK, PAPER, FAINT = "#222222", "white", "#888888"
DPI = 120


class Picture(Figure):
    """A matplotlib figure that needs no pyplot to be shown in a notebook or saved."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, dpi=DPI, facecolor=PAPER, layout="compressed", **kwargs)
        FigureCanvasAgg(self)

    def draw(self, renderer: Any) -> None:
        """Labels are prompts and file names: a $ in them begins no formula."""
        for axis in self.axes:
            axis.get_xticklabels(), axis.get_yticklabels()  # which are made when first asked for
        for text in self.findobj(Text):
            text.set_parse_math(False)
        super().draw(renderer)

    def _repr_png_(self):
        """A PNG of the 256 colours that the image has most use for: a notebook that stores it is a
        third of the size."""
        small = io.BytesIO()
        image = Image.open(io.BytesIO(figure_png(self))).convert("RGB")
        palette = image.quantize(256, method=Image.Quantize.MEDIANCUT, kmeans=1)
        palette.save(small, "png", optimize=True)
        return small.getvalue()


def image_grid(rows: Iterable[Sequence[Any]], row_labels: Sequence[str] | None = None,
               column_labels: Sequence[str] | None = None, title: str | None = None,
               cell: float = 1.25, header: int = 0) -> Picture:
    """Images in rows, with labels.

    `rows`: a list of lists of PIL images of any size; None leaves a cell empty, and a short row is
    filled up with empty cells. `row_labels` (left of the rows) and `column_labels` (above the
    columns) are lists of strings, as many as there are rows and columns. `cell`: side of one
    image in inches; `header`: the row above which the column labels stand, for a grid whose first
    rows are something else. Returns a matplotlib Figure. Raises ValueError if there is nothing to
    draw or the labels do not fit.
    """
    rows = [list(row) for row in rows]
    width = max((len(row) for row in rows), default=0)
    if width == 0:
        raise InputError("image_grid: no images were given; pass at least one row with one image")
    for name, labels, count in (("row", row_labels, len(rows)), ("column", column_labels, width)):
        if labels is not None and len(labels) != count:
            raise InputError(f"image_grid: {len(labels)} {name}_labels for {count} "
                             f"{name}s; give one each")
    margin = 1.3 if row_labels else 0.1
    lines = max((len(_wrap(label, cell).split("\n")) for label in column_labels or []), default=0)
    height = cell * len(rows) + 0.16 * lines + (0.4 if title else 0.1)
    figure = Picture(figsize=(cell * width + margin, height))
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    axes = figure.subplots(len(rows), width, squeeze=False)
    for axis in axes.flat:
        _bare(axis)
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            if image is not None:
                axes[y, x].imshow(image, interpolation="lanczos")
    for axis, label in zip(axes[:, 0], row_labels or []):
        axis.set_ylabel(_wrap(label, 1.5), rotation=0, ha="right", va="center", fontsize=8,
                        color=INK)
    for axis, label in zip(axes[header], column_labels or []):
        axis.set_title(_wrap(label, cell), fontsize=8, color=INK, pad=3)
    if title:
        figure.suptitle(title, fontsize=10, color=INK)
    return figure


def save_grid(path: str | Path, rows: Iterable[Sequence[Any]],
              row_labels: Sequence[str] | None = None, column_labels: Sequence[str] | None = None,
              title: str | None = None, cell: float = 1.25, header: int = 0) -> Path:
    """`image_grid`, written as a PNG to `path` (its folder is made). Returns the path."""
    return save_figure(path, image_grid(rows, row_labels, column_labels, title, cell, header))


def save_figure(path: str | Path, figure: Figure) -> Path:
    """Write a figure as PNG, without the date and version stamps that make equal images
    differ."""
    path = Path(path)
    write_whole(path, figure_png(figure))
    return path


def figure_png(figure: Figure) -> bytes:
    """The bytes of a figure's PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", bbox_inches="tight", metadata={"Software": None})
    return file.getvalue()


def line_plot(series: Mapping[str, tuple[Sequence, Sequence]], xlabel: str, ylabel: str,
              title: str | None = None, size: tuple[float, float] = (5.5, 3.0),
              bands: Mapping[str, tuple[Sequence, Sequence]] | None = None) -> Picture:
    """Lines over a common x.

    `series`: {name: (xs, ys)}. Colour and marker both tell lines apart. `bands`: {name: (lows,
    highs)}, shaded around the line of that name.
    """
    figure, axis = _framed(xlabel, ylabel, title, size)
    for k, (name, (xs, ys)) in enumerate(series.items()):
        # no pair comes twice
        marker = MARKERS[(k + k // len(COLOURS)) % len(MARKERS)] if len(xs) <= 60 else None
        axis.plot(xs, ys, color=COLOURS[k % len(COLOURS)], marker=marker, markersize=3.5,
                  linewidth=1.3, label=name)
        if bands and name in bands:
            axis.fill_between(xs, *bands[name], color=COLOURS[k % len(COLOURS)], alpha=0.15,
                              linewidth=0)
    if len(series) > 1:
        _legend(axis)
    return figure


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """The mean of each value and those before it, `width` of them at most; a list as long as
    `values`."""
    windows = (values[max(0, k - width):k] for k in range(1, len(values) + 1))
    return [sum(window) / len(window) for window in windows]


def bar_plot(values: Mapping[str, float], xlabel: str, title: str | None = None,
             width: float = 6.0) -> Picture:
    """Horizontal bars, first on top. `values`: {name: number}."""
    size = (width, 0.6 + 0.19 * max(len(values), 3))
    figure, axis = _framed(xlabel, None, title, size)
    axis.barh(list(values), list(values.values()), color=COLOURS[0], height=0.7)
    axis.invert_yaxis()
    axis.tick_params(axis="y", labelsize=7, length=0)
    return figure


def dot_plot(series: Mapping[str, Mapping[str, float]], xlabel: str, title: str | None = None,
             width: float = 6.0) -> Picture:
    """Rows of dots, for categories that have no order and so are joined by no line.

    `series`: {name: {category: number}}, all with the same categories: a row for each category,
    first on top, and in it one dot for each name.
    """
    rows = list(next(iter(series.values())))
    figure, axis = _framed(xlabel, None, title, (width, 0.8 + 0.26 * max(len(rows), 3)))
    for k, (name, values) in enumerate(series.items()):
        axis.plot([values[row] for row in rows], range(len(rows)), label=name, linestyle="none",
                  color=COLOURS[k % len(COLOURS)], marker=MARKERS[k % len(MARKERS)], markersize=7)
    _name_rows(axis, rows)
    if len(series) > 1:
        _legend(axis)
    return figure


def interval_plot(series: Mapping[str, Mapping[str, Sequence[float]]], xlabel: str,
                  title: str | None = None, width: float = 6.0) -> Picture:
    """As `dot_plot`, of numbers with intervals: a line from low to high through each dot, and a
    line at 0, which an interval holds or does not.

    `series`: {name: {category: (number, low, high)}}.
    """
    rows = list(next(iter(series.values())))
    figure, axis = _framed(xlabel, None, title,
                           (width, 0.8 + (0.1 + 0.12 * len(series)) * max(len(rows), 3)))
    axis.axvline(0, color=FAINT, linewidth=1)
    for k, (name, values) in enumerate(series.items()):
        means, lows, highs = zip(*(values[row] for row in rows))
        heights = [row + 0.25 * (k - (len(series) - 1) / 2) for row in range(len(rows))]
        color = COLOURS[k % len(COLOURS)]
        axis.hlines(heights, lows, highs, color=color, linewidth=1.2)
        axis.plot(means, heights, label=name, linestyle="none", color=color,
                  marker=MARKERS[k % len(MARKERS)], markersize=4.5)
    _name_rows(axis, rows)
    _legend(axis)
    return figure


def _name_rows(axis, rows):
    """The categories' names at the left, first on top."""
    axis.set_yticks(range(len(rows)), rows)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.grid(axis="y", color=FAINT, linewidth=0.4)
    axis.set_axisbelow(True)


def scatter_plot(points: Mapping[str, tuple[float, float]], xlabel: str, ylabel: str,
                 title: str | None = None, size: tuple[float, float] = (6.5, 3.4),
                 limits: tuple[float, float] | None = None) -> Picture:
    """Points with their names beside them. `points`: {name: (x, y)}.

    `limits`: where both axes begin and end; None fits them to the points.
    """
    figure, axis = _framed(xlabel, ylabel, title, size)
    axis.margins(0.1)
    for k, (x, y) in enumerate(points.values()):
        axis.plot(x, y, color=COLOURS[k % len(COLOURS)], marker=MARKERS[k % len(MARKERS)],
                  markersize=7)
    axis.autoscale_view()  # else the limits are not known yet
    if limits:
        axis.set(xlim=limits, ylim=limits)
    places = (axis.transData - axis.transAxes).transform(list(points.values()))  # in [0, 1]
    heights = _apart(places[:, 1], 0.2 / (size[1] - 0.8))
    for (name, point), (across, _), height in zip(points.items(), places, heights):
        side = 1 if across < 0.6 else -1  # a name runs towards the middle
        axis.annotate(name, point, (across + 0.025 * side, height), textcoords="axes fraction",
                      ha="left" if side > 0 else "right", va="center", fontsize=9, color=INK,
                      arrowprops={"arrowstyle": "-", "color": FAINT, "linewidth": 0.6})
    return figure


def _apart(heights, gap):
    """The heights, in their order, moved until no two are nearer than `gap`: half of them up."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    raised, lowered = {}, {}
    for rank, k in enumerate(order):
        raised[k] = max(heights[k], raised[order[rank - 1]] + gap if rank else heights[k])
    for rank, k in enumerate(reversed(order)):
        lowered[k] = min(heights[k], lowered[order[-rank]] - gap if rank else heights[k])
    return [(raised[k] + lowered[k]) / 2 for k in range(len(heights))]


def _legend(axis):
    axis.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1))


def _framed(xlabel, ylabel, title, size):
    figure = Picture(figsize=size)
    axis = figure.subplots()
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8, color=FAINT)
    axis.set_xlabel(xlabel, fontsize=9, color=INK)
    axis.set_ylabel(ylabel, fontsize=9, color=INK)
    if title:
        axis.set_title(title, fontsize=10, color=INK, loc="left")
    return figure, axis


def _bare(axis):
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(False)


def _wrap(text, inches):
    """Break a label so that it fits a width; at 8 points some 14 letters go to the inch."""
    return "\n".join(textwrap.wrap(str(text), max(8, int(14 * inches)), break_long_words=False))

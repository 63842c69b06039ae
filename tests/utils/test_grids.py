"""Grids show the right image in the right place, and leave no global state behind."""

import io
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from dbcore.utils import grids

RED, GREEN, BLUE = (220, 30, 30), (30, 200, 30), (30, 30, 220)


def swatch(colour, size=16):
    return Image.new("RGB", (size, size), colour)


def pixels(figure):
    return np.asarray(Image.open(io.BytesIO(figure._repr_png_())).convert("RGB"))


def where(image, colour):
    """Centre (row, column) of the pixels of about one colour, or None."""
    close = (np.abs(image.astype(int) - colour).max(-1) < 12).nonzero()
    return tuple(float(axis.mean()) for axis in close) if len(close[0]) else None


def test_images_stand_in_row_and_column_order():
    image = pixels(grids.image_grid([[swatch(RED), swatch(GREEN, 64)], [swatch(BLUE)]]))
    red, green, blue = (where(image, colour) for colour in (RED, GREEN, BLUE))
    assert abs(red[0] - green[0]) < 3
    assert red[1] < green[1] - 50
    assert abs(red[1] - blue[1]) < 3
    assert red[0] < blue[0] - 50


def test_labels_and_title_are_drawn():
    figure = grids.image_grid([[swatch(RED), None]], ["seed 0"], ["before", "after"],
                              "a photo of sks dog")
    assert [axis.get_title() for axis in figure.axes] == ["before", "after"]
    assert figure.axes[0].get_ylabel() == "seed 0"
    assert figure.get_suptitle() == "a photo of sks dog"
    bare = pixels(grids.image_grid([[swatch(RED), None]]))
    assert (pixels(figure) < 100).all(-1).sum() > (bare < 100).all(-1).sum() + 50


def test_a_long_label_is_broken_not_cut():
    label = "a photo of sks dog swimming in water at night with a party hat"
    figure = grids.image_grid([[swatch(RED)]], row_labels=[label])
    shown = figure.axes[0].get_ylabel()
    assert "\n" in shown
    assert shown.replace("\n", " ") == label


def test_column_labels_may_stand_lower_down():
    figure = grids.image_grid([[swatch(RED)], [swatch(BLUE)]], column_labels=["after"], header=1)
    assert [axis.get_title() for axis in figure.axes] == ["", "after"]


@pytest.mark.parametrize(("rows", "labels", "words"), [
    ([], {}, "no images"),
    ([[]], {}, "no images"),
    ([[swatch(RED)]], {"row_labels": ["a", "b"]}, "2 row_labels for 1 row"),
    ([[swatch(RED)]], {"column_labels": []}, "0 column_labels for 1 column"),
])
def test_what_cannot_be_drawn_is_named(rows, labels, words):
    with pytest.raises(ValueError, match=words):
        grids.image_grid(rows, **labels)


def test_save_makes_the_folder_and_equal_grids_are_equal_files(tmp_path):
    one = grids.save_grid(tmp_path / "a" / "grid.png", [[swatch(RED)]], title="x")
    two = grids.save_grid(tmp_path / "b" / "grid.png", [[swatch(RED)]], title="x")
    assert one.read_bytes() == two.read_bytes()


def test_no_pyplot_figure_is_left_open():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    before = pyplot.get_fignums()
    grids.image_grid([[swatch(RED)]])
    grids.line_plot({"loss": ([0, 1], [1.0, 0.5])}, "step", "loss")
    assert pyplot.get_fignums() == before


def test_lines_carry_their_data_and_differ_by_more_than_colour():
    figure = grids.line_plot({"with": ([0, 1], [1.0, 0.5]), "without": ([0, 1], [1.0, 2.0])},
                             "step", "drift")
    with_prior, without = figure.axes[0].get_lines()
    assert list(without.get_ydata()) == [1.0, 2.0]
    assert with_prior.get_color() != without.get_color()
    assert with_prior.get_marker() != without.get_marker()
    assert ([text.get_text() for text in figure.axes[0].get_legend().get_texts()]
            == ["with", "without"])


def test_a_band_is_shaded_around_its_line():
    figure = grids.line_plot({"a": ([0, 1], [1, 2]), "b": ([0, 1], [5, 6])}, "step", "PRES",
                             bands={"b": ([4, 5], [7, 8])})
    (band,) = figure.axes[0].collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (4, 8)
    colour = to_rgb(figure.axes[0].get_lines()[1].get_color())
    assert np.allclose(band.get_facecolor()[0, :3], colour)


def test_of_many_lines_no_two_look_alike():
    figure = grids.line_plot({str(k): ([k], [k]) for k in range(20)}, "x", "y")
    assert len({(line.get_color(), line.get_marker()) for line in figure.axes[0].get_lines()}) == 20


def test_bars_keep_their_order():
    figure = grids.bar_plot({"first": 1.0, "second": 3.0}, "size")
    axis = figure.axes[0]
    assert [bar.get_width() for bar in axis.patches] == [1.0, 3.0]
    assert axis.yaxis_inverted()


def test_dots_stand_in_the_row_of_their_category_and_no_line_joins_them():
    figure = grids.dot_plot({"before": {"snow": 0.1, "hat": 0.4}, "after": {"snow": 0.3, "hat": 0}},
                            "moved")
    axis = figure.axes[0]
    before, after = axis.get_lines()[:2]
    assert list(before.get_xdata()) == [0.1, 0.4]
    assert list(after.get_ydata()) == [0, 1]
    assert before.get_linestyle() == "None"
    assert [label.get_text() for label in axis.get_yticklabels()] == ["snow", "hat"]
    assert axis.yaxis_inverted()


def test_an_interval_is_a_line_through_its_dot_and_no_two_lie_on_each_other():
    figure = grids.interval_plot({"fidelity": {"OFT": (0.1, -0.1, 0.2), "LoHa": (0.3, 0.2, 0.4)},
                                  "PRES": {"OFT": (0, -0.2, 0.1), "LoHa": (0.2, 0, 0.3)}}, "moved")
    axis = figure.axes[0]
    fidelity, pres = axis.collections
    assert [line[:, 0].tolist() for line in fidelity.get_segments()] == [[-0.1, 0.2], [0.2, 0.4]]
    zero, dots, _ = axis.get_lines()
    assert zero.get_xdata() == [0, 0]
    assert list(dots.get_xdata()) == [0.1, 0.3]
    assert list(dots.get_ydata()) == [line[0, 1] for line in fidelity.get_segments()]
    heights = [line[0, 1] for lines in (fidelity, pres) for line in lines.get_segments()]
    assert sorted(heights) == [-0.125, 0.125, 0.875, 1.125]


def test_a_points_name_stands_beside_it_and_over_no_other_name():
    points = {"base": (0.9, 0.1), "LoRA": (0.5, 0.6), "DoRA": (0.5, 0.61), "min-SNR": (0.5, 0.6)}
    figure = grids.scatter_plot(points, "prompt", "subject")
    names = figure.axes[0].texts
    assert {name.get_text(): name.xy for name in names} == points
    heights = sorted(name.get_position()[1] for name in names)
    assert min(b - a for a, b in pairwise(heights)) > 0.05
    assert figure.axes[0].get_legend() is None
    figure.draw_without_rendering()  # limits and layout as they are shown
    canvas = figure.axes[0].transAxes
    base = canvas.inverted().transform(figure.axes[0].transData.transform((0.9, 0.1)))
    assert abs(names[0].get_position()[1] - base[1]) < 0.02


def test_a_scatter_plot_with_limits_has_them_on_both_axes_and_names_beside_the_points():
    figure = grids.scatter_plot({"a": (0.4, 0.6), "b": (0.5, 0.7)}, "x", "y", limits=(0, 1))
    axis = figure.axes[0]
    assert axis.get_xlim() == axis.get_ylim() == (0, 1)
    assert [round(name.get_position()[1], 2) for name in axis.texts] == [0.6, 0.7]


def test_a_running_mean_has_fewer_values_at_first_and_looks_back_only():
    assert grids.running_mean([4.0, 2.0, 9.0, 1.0], 2) == [4.0, 3.0, 5.5, 5.0]
    assert grids.running_mean([4.0, 2.0, 9.0], 10) == [4.0, 3.0, 5.0]
    assert grids.running_mean([], 3) == []


@pytest.mark.parametrize("text", [r"$\foo$", r"a photo of $sks$ dog", "$", r"\frac{",
                                  "100 $ or 200 $", "a_b^{c", "$^$"])
def test_a_users_words_are_no_formula_wherever_they_stand(tmp_path, text):
    figures = [grids.image_grid([[swatch(RED)]], [text], [text], text),
               grids.bar_plot({text: 1.0, "b": 2.0}, text, text),
               grids.dot_plot({text: {text: 1.0}, "b": {text: 2.0}}, text, text),
               grids.scatter_plot({text: (1.0, 2.0), "b": (0.0, 0.0)}, text, text, text),
               grids.line_plot({text: ([0, 1], [0, 1]), "b": ([0, 1], [1, 0])}, text, text, text)]
    for k, figure in enumerate(figures):
        grids.save_figure(tmp_path / f"{k}.png", figure)
        assert figure._repr_png_()

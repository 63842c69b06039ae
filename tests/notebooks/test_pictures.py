"""The picture comparison lets rounding pass and nothing else, and takes part in a replay under
nbval."""

import base64
import io

import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output
from notebook_pictures import compare, difference, pictures
from PIL import Image

from dbcore.utils.grids import image_grid, line_plot

pytest_plugins = ["pytester"]
STEPS = list(range(20))


def fresh(figure):
    return Image.open(io.BytesIO(figure._repr_png_())).convert("RGB")


def noise(seed, size=64):
    values = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((size, size), Image.Resampling.BICUBIC)


def nearby(image, levels=3):
    shift = np.random.default_rng(9).integers(-levels, levels + 1, (image.height, image.width, 3))
    return Image.fromarray((np.asarray(image, int) + shift).clip(0, 255).astype(np.uint8))


def test_rounding_passes():
    assert difference(noise(0), nearby(noise(0))) is None


def test_a_wider_margin_by_a_few_pixels_passes():
    image = noise(0, 640)
    assert difference(image, image.resize((650, 634))) is None


def test_another_picture_fails():
    assert "on average" in difference(noise(0), noise(1))
    assert "on average" in difference(noise(0), noise(1), loose=True)


def test_another_size_fails():
    assert "pixels" in difference(noise(0, 64), noise(0, 128))


def test_one_wrong_picture_in_a_grid_fails():
    one = fresh(image_grid([[noise(k) for k in range(4)], [noise(k) for k in range(4, 8)]]))
    other = fresh(image_grid([[noise(k) for k in range(4)], [noise(k) for k in (4, 5, 9, 7)]]))
    assert difference(one, other)


def test_another_curve_fails():
    falling = line_plot({"loss": (STEPS, [1 / (1 + step) for step in STEPS])}, "step", "loss")
    rising = line_plot({"loss": (STEPS, [1 - 1 / (1 + step) for step in STEPS])}, "step", "loss")
    assert difference(fresh(falling), fresh(rising))


def test_loose_lets_a_wandering_region_pass():
    image = noise(0)
    other = image.copy()
    other.paste((128, 128, 128), (0, 0, 12, 12))
    assert difference(image, other)
    assert difference(image, other, loose=True) is None


def test_a_missing_picture_fails():
    assert "1 pictures are stored, 0" in compare([noise(0)], [])
    assert compare([noise(0)], [nearby(noise(0))]) is None


def test_pictures_are_laid_on_white():
    buffer = io.BytesIO()
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(buffer, "png")
    (image,) = pictures([{"data": {"image/png": base64.b64encode(buffer.getvalue()).decode()}},
                         {"text": "x"}])
    assert image.getpixel((0, 0)) == (255, 255, 255)


def stored(colour, tags=()):
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(buffer, "png")
    data = {"image/png": base64.b64encode(buffer.getvalue()).decode(),
            "text/plain": "<PIL.Image.Image image mode=RGB size=64x64>"}  # fmt: skip
    source = "from PIL import Image\nImage.new('RGB', (64, 64), 'teal')"
    output = new_output("execute_result", data, execution_count=1)
    return new_notebook(cells=[new_code_cell(source, execution_count=1, outputs=[output],
                                             metadata={"tags": list(tags)})])  # fmt: skip


def replay(pytester, nb):
    nbformat.write(nb, pytester.path / "one.ipynb")
    return pytester.runpytest_subprocess("-p", "notebook_pictures", "--nbval",
                                         "--nbval-current-env", "one.ipynb")


@pytest.mark.slow
def test_a_replay_compares_pictures(pytester, monkeypatch):
    from pathlib import Path

    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    replay(pytester, stored("teal")).assert_outcomes(passed=1)
    result = replay(pytester, stored("crimson"))
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*Pictures differ*", "*picture 1 of 1: regions differ*"])
    replay(pytester, stored("crimson", ["nbval-ignore-output"])).assert_outcomes(passed=1)

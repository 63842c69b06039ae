"""A pytest plugin beside nbval, which compares text and passes over pictures: this compares the
pictures.

Both pictures are laid on white and shrunk to 32 x 32 regions. The replay fails if one is missing,
if a side differs by more than 3 %, if the regions differ by more than 4 of 255 grey levels on
average, or if one region differs by more than 24. A cell tagged `picture:loose` shows what training
has made, where rounding on another processor has grown: 16 on average, and no limit for one region.
"""

import base64
import io
import os

import numpy as np
import pytest
from PIL import Image

try:
    from nbval.plugin import IPyNbCell, NbCellError
except ImportError:  # without nbval there is nothing to compare
    IPyNbCell = None

REGIONS, SIDE = 32, 0.03
MEAN, WORST = 4, 24
LOOSE_TAG, LOOSE_MEAN = "picture:loose", 16


def pytest_configure(config):
    """A claim about numbers that does not hold fails its cell: kernels inherit this."""
    if config.getoption("nbval", False) or config.getoption("nbval_lax", False):
        os.environ.setdefault("DBCORE_STRICT", "1")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    result = yield
    if (IPyNbCell and isinstance(item, IPyNbCell) and item.options["check"]
        and item.cell.execution_count):
        loose = LOOSE_TAG in item.cell.metadata.get("tags", [])
        complaint = compare(pictures(item.cell.outputs), pictures(item.test_outputs or []), loose)
        if complaint:
            raise NbCellError(item.cell_num, "Pictures differ", item.cell.source, complaint)
    return result


def pictures(outputs):
    """The PNG pictures of a cell's outputs, in order, as PIL images on white."""
    found = [output["data"]["image/png"] for output in outputs
             if "image/png" in output.get("data", {})]
    return [_on_white(Image.open(io.BytesIO(base64.b64decode(data)))) for data in found]


def _on_white(image):
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def compare(stored, fresh, loose=False):
    """What differs between two lists of pictures, in words, or None."""
    if len(stored) != len(fresh):
        return f"{len(stored)} pictures are stored, {len(fresh)} came out"
    for number, (one, other) in enumerate(zip(stored, fresh), 1):
        complaint = difference(one, other, loose)
        if complaint:
            return f"picture {number} of {len(stored)}: {complaint}"
    return None


def difference(stored, fresh, loose=False):
    """What differs between two pictures, in words, or None."""
    if any(abs(a - b) > SIDE * max(a, b) for a, b in zip(stored.size, fresh.size)):
        return f"stored with {stored.size} pixels, fresh with {fresh.size}"
    a, b = (np.asarray(image.resize((REGIONS, REGIONS), Image.Resampling.BOX), float)
            for image in (stored, fresh))
    off = np.abs(a - b).max(-1)
    if off.mean() > (LOOSE_MEAN if loose else MEAN):
        return f"regions differ by {off.mean():.1f} of 255 grey levels on average"
    if off.max() > WORST and not loose:
        y, x = np.unravel_index(off.argmax(), off.shape)
        return (f"the region {x / REGIONS:.0%} across, {y / REGIONS:.0%} down differs by "
                f"{off.max():.0f} grey levels")
    return None

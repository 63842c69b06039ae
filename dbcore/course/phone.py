"""Photos as a phone leaves them, made of rendered ones: for a notebook that has to run without."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from dbcore.datasets.photos import gather_photos

ORIENTATION, MAKE, MODEL, GPS = 0x0112, 0x010F, 0x0110, 0x8825
TURNED = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90,
          8: Image.Transpose.ROTATE_270}  # fmt: skip
# One after another: long side over short side, whether it stands, how the phone was held.
SHOTS = [(4 / 3, False, 1), (4 / 3, True, 6), (16 / 9, False, 3), (4 / 3, True, 8), (1.0, False, 1)]
SHORT = 1024  # pixels of the shorter side
GRAIN = 4.0  # standard deviation of the sensor's noise, in grey levels


def phone_photos(source: str | Path, folder: str | Path) -> Path:
    """Write IMG_0001.JPG, ... into `folder`, one for each photo of `source`; returns the folder.

    They are larger and of other shapes than the originals, grainy, and stored as the sensor saw
    them, with an EXIF tag that says how to turn them, the camera, and the place (none in truth).
    As on a phone there are also a second shot of the first photo and a film. A folder that is
    filled already stays as it is.
    """
    folder = Path(folder)
    if any(folder.glob("IMG_*")):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    for number, (image, turn) in enumerate(shots(source), 1):
        stored = image if turn == 1 else image.transpose(TURNED[turn])
        stored.save(folder / f"IMG_{number:04d}.JPG", quality=88, exif=exif(turn))
    (folder / f"IMG_{number + 1:04d}.MOV").write_bytes(b"\0\0\0\x14ftypqt  ")
    return folder


def shots(source: str | Path) -> Iterator[tuple[Image.Image, int]]:
    """(upright image, EXIF orientation) of each photo in `source`, then of the first once more."""
    photos = gather_photos(source)[0]
    for k, photo in enumerate([*photos, photos[0]]):
        shape, stands, turn = SHOTS[k % len(photos) % len(SHOTS)]
        wide = widened(photo.load().resize((SHORT, SHORT), Image.Resampling.BICUBIC), shape, stands)
        yield grainy(wide, seed=k), turn


def widened(image: Image.Image, shape: float, stands: bool) -> Image.Image:
    """A square image with its edges drawn out, until long side : short side is `shape`."""
    side = image.width
    more = round(side * (shape - 1)) // 2
    around = ((more, more), (0, 0), (0, 0)) if stands else ((0, 0), (more, more), (0, 0))
    return Image.fromarray(np.pad(np.asarray(image), around, mode="edge"))


def grainy(image: Image.Image, seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).normal(0, GRAIN, (image.height, image.width, 1))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


def exif(turn: int) -> Image.Exif:
    """Tags of a phone that was held so; the place is where the Greenwich meridian meets the
    equator."""
    tags = Image.Exif()
    tags[ORIENTATION], tags[MAKE], tags[MODEL] = turn, "dbcore", "a phone that never was"
    tags[GPS] = {1: "N", 2: (0.0, 0.0, 0.0), 3: "E", 4: (0.0, 0.0, 0.0)}
    return tags


def private_tags(path: str | Path) -> list[str]:
    """What a file tells of its owner: some of "camera" and "place"."""
    with Image.open(path) as image:
        tags = image.getexif()
        return [name for name, there in (("camera", MODEL in tags), ("place", tags.get_ifd(GPS)))
                if there]

"""Photos as people have them: find, check, crop.

A `Photo` holds a path, never pixels, so 5,000 photos cost what five do. A photo that cannot be used
becomes a `Problem` with `skipped=True`; one that can, but should be looked at, a `Problem` without
it. `images.py` reads one file; `sidecars.py` finds the caption and the mask that belong to it.
"""

import hashlib
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from dbcore.datasets.images import (
    PhotoError,
    Problem,
    decoded,
    grey_depth,
    load_rgb,
    looks_like_image,
    orientation,
    reason,
    shown,
    to_rgb,
    upright,
)
from dbcore.datasets.sidecars import (
    MASK_FOLDERS,
    Captions,
    Masks,
    load_mask,
    mask_owners,
    stems_and_names,
)

PHOTO_SUFFIXES = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp",
    ".tif", ".tiff", ".ppm", ".avif",
}  # fmt: skip
# Anything with one of these never was a photo, so it is passed over without a look inside.
OTHER_SUFFIXES = {
    ".txt",
    ".caption",
    ".json",
    ".jsonl",
    ".yaml",
    ".md",
    ".csv",
    ".db",
    ".ini",
    ".html",
}
JUNK_NAMES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir", "icon\r"}
CONTACT_SHEET = "contact_sheet.png"  # `dbcore prepare` leaves one beside the photos

KOHYA_NAME = re.compile(r"(?P<repeats>\d{1,3})_(?P<words>[^\W\d_].*)")

MAX_ASPECT = 2.5  # beyond this a square keeps less than 40 % of the photo
PURE = 0.98  # of an image in black and white: masks have grey at their edges alone
DARK = 16  # of 255: an image without a brighter pixel shows nothing
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
# Of copies of a photo (smaller, compressed, in other colours) 97 % are more alike than this, and
# two thirds of those made brighter until white is cut off; different photos of one animal, on a
# white ground too, reach 0.976.
THUMBNAIL, ALIKE = 16, 0.978
BLOCK = 128  # photos compared at a time

Bucket = tuple[int, int]  # height, width in pixels


@dataclass(frozen=True)
class Photo:
    """An image file that was opened once and found good."""

    path: Path
    size: tuple[int, int]  # (width, height) in pixels, upright
    caption: str | None = None
    mask_path: Path | None = None

    def load(self) -> Image.Image:
        """The photo as an upright `PIL.Image` in RGB, its size `self.size`."""
        return load_rgb(self.path)

    def load_mask(self) -> Image.Image | None:
        """The mask as an upright `PIL.Image` in mode L at the photo's size, or None if there is
        none."""
        if self.mask_path is None:
            return None
        return load_mask(self.mask_path).resize(self.size, Image.Resampling.NEAREST)


# --- find -----------------------------------------------------------------------------------------


def find_photos(folder: str | Path) -> list[Path]:
    """The image files in `folder` and the folders within it, sorted by path; junk and masks left
    out.

    A link to a folder is followed once, so a circle of links ends. Raises `PhotoError` if `folder`
    is not a folder that can be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file" if folder.is_file() else "does not exist"
        raise PhotoError(f"the photo folder {shown(folder)} {what}: give a folder of images")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise PhotoError(f"the photo folder {shown(folder)} cannot be read: check its permissions")
    found, seen = [], set()
    for here, folders, files in os.walk(folder, followlinks=True):
        identity = os.stat(here)
        if (identity.st_dev, identity.st_ino) in seen:
            folders.clear()
            continue
        seen.add((identity.st_dev, identity.st_ino))
        folders[:] = sorted(
            name for name in folders if not _is_junk(name) and name.lower() not in MASK_FOLDERS
        )
        images = [name for name in files if not _is_junk(name) and _may_be_photo(Path(here, name))]
        masks = mask_owners(images, stems_and_names(images))
        found += [Path(here, name) for name in images if name not in masks]
    return sorted(found)


def _is_junk(name):
    return name.startswith((".", "~")) or name.lower() in JUNK_NAMES or name == CONTACT_SHEET


def _may_be_photo(path):
    """By its ending, or, where the ending says nothing, by the first bytes of its content."""
    suffix = path.suffix.lower()
    return suffix in PHOTO_SUFFIXES or (suffix not in OTHER_SUFFIXES and looks_like_image(path))


# --- check ----------------------------------------------------------------------------------------


def gather_photos(folder: str | Path, resolution: int | None = None, use_masks: bool = True,
                  buckets: Sequence[Bucket] = ()) -> tuple[list[Photo], list[Problem]]:
    """`find_photos` and `check_photos` at once: (photos, problems), with at least one photo.

    Raises `PhotoError`, which names the folder and each file's reason, if none can be used; also
    for a folder in kohya's layout, which holds subject and class side by side.
    """
    paths = find_photos(folder)
    _refuse_layout(Path(folder), paths)
    photos, problems = check_photos(
        paths, resolution=resolution, folder=folder, use_masks=use_masks, buckets=buckets
    )
    if photos:
        return photos, problems
    if not paths:
        raise PhotoError(
            f"no image in {shown(folder)}: put 3 to 10 photos (JPEG, PNG, WebP, HEIC) there"
        )
    reasons = "".join(f"\n  {problem}" for problem in problems[:10] if problem.skipped)
    more = f"\n  and {len(paths) - 10} more" if len(paths) > 10 else ""
    raise PhotoError(
        f"none of the {len(paths)} images in {shown(folder)} can be used:{reasons}{more}"
    )


def _refuse_layout(folder, paths):
    """`10_sks dog` beside `1_dog` are a subject and its class; `1_front`, `2_side` only count."""
    inner = {up for path in paths for up in path.parents if folder in up.parents}
    found = {up: match for up in sorted(inner) if (match := KOHYA_NAME.fullmatch(up.name))}
    numbers = sorted(int(match["repeats"]) for match in found.values())
    words = [set(match["words"].lower().split()) for match in found.values()]
    in_order = numbers == list(range(numbers[0], numbers[0] + len(numbers))) if numbers else True
    class_beside = any(one < other for one in words for other in words)
    if class_beside or not (in_order or all(one == words[0] for one in words)):
        names = [shown(up) for up in sorted(found, key=lambda up: -int(found[up]["repeats"]))]
        raise PhotoError(
            f"{shown(folder)} is in kohya's layout, with several subjects or a class in it. "
            f"Give each its own option: --instance_data_dir {names[0]!r} "
            f"--class_data_dir {names[-1]!r}; numbers of repeats are not read. "
            "If all show one subject, rename these folders"
        )


def check_photos(paths: Iterable[Path], resolution: int | None = None,
                 folder: str | Path | None = None, use_masks: bool = True,
                 buckets: Sequence[Bucket] = ()) -> tuple[list[Photo], list[Problem]]:
    """Open every file once, one after another, and say what is wrong: (photos, problems).

    `resolution` (pixels) adds the warning for photos smaller than that; `buckets` that for photos
    smaller than the one that they are cropped to, in place of a square. `folder` is how far up a
    table of captions is looked for; without it, only in each photo's own folder. Whatever is in a
    image becomes a `Problem`. Raises PhotoError where a table of captions names no photo, or
    every mask is black.
    """
    paths, photos, prints = list(map(Path, paths)), [], []
    problems: list[Problem] = []
    digests: dict[bytes, Path] = {}
    captions = Captions(paths, Path(folder) if folder is not None else None, problems)
    masks = Masks(paths if use_masks else [], problems)
    for path in paths:
        try:
            size, notes, print_ = _examine(path)
        except Exception as error:  # noqa: BLE001
            # decoders raise anything at all on a damaged file
            problems.append(Problem(path, *reason(path, error), skipped=True))
            continue
        photos.append(Photo(path, size, captions.of(path), masks.of(path, size)))
        notes += _shape_notes(size, buckets or [(resolution or 1, resolution or 1)])
        twin = digests.setdefault(_digest(path), path)
        if twin is not path:
            message = f"the same file as {shown(twin.name)}: keep one of the two"
            problems.append(Problem(path, "duplicate", message, twin=twin))
            print_ = None
        prints.append(print_)
        problems += [Problem(path, *note) for note in notes]
    masks.check_black()
    return photos, problems + _near_duplicates(photos, prints) + captions.gaps(photos)


def _examine(path):
    """Decode one file, at an eighth of the size where the format allows: (size, notes, print)."""
    with decoded(path, draft=64) as (image, size):
        notes = _format_notes(path, image)
        if orientation(image) >= 5:
            size = size[::-1]
        rgb = to_rgb(upright(image))
    notes += _mask_notes(rgb)
    brightest = max(high for _, high in rgb.getextrema())
    if brightest < DARK:
        message = f"all but black (its brightest value is {brightest} of 255)"
        notes.append(("dark", f"{message}: save it with 8 bits a colour"))
    return size, notes, _thumbnail(rgb)


def _mask_notes(image):
    """Of all names that tools give to masks only some are known; what is in them tells the rest."""
    levels = image.convert("L").histogram()
    black, white, total = sum(levels[:8]), sum(levels[-8:]), sum(levels)
    if not (black and white) or black + white < PURE * total:
        return []
    message = ("black and white alone, as a mask is: if it is one, call it "
               "dog.mask.png beside dog.jpg")
    return [("mask-like", message)]


def _format_notes(path, image):
    notes = []
    if getattr(image, "is_animated", False) and image.format != "MPO":
        notes.append(("animated", f"animated ({image.n_frames} frames): the first frame is used"))
    usual = Image.registered_extensions().get(path.suffix.lower())
    if usual != image.format and (usual, image.format) != ("JPEG", "MPO"):
        notes.append(
            (
                "extension",
                f"is a {image.format} file whatever its name says: read as {image.format}",
            )
        )
    if image.has_transparency_data:
        notes.append(("transparent", "has transparent parts: they are laid on white"))
    depth = grey_depth(image)
    if depth and depth < 16:
        notes.append(
            ("depth", f"its grey values need only {depth} of 16 bits: read as {depth} bits")
        )
    return notes


def _shape_notes(size, buckets):
    height, width = nearest_bucket(size, buckets)
    left, top, right, bottom = crop_box(size, (height, width))
    whole, part = size[0] * size[1], (right - left) * (bottom - top)
    words, sides = ("a square", height) if height == width else (
        ("the nearest bucket", f"{width} x {height}"))
    notes = []
    if bottom - top < height:
        notes.append(
            (
                "small",
                (f"{size[0]} x {size[1]} is smaller than {sides}: "
                 f"enlarged {height / (bottom - top):.1f} times"),
            )
        )
    if whole > MAX_ASPECT * part:
        share = 100 * part // whole
        notes.append(
            ("narrow", f"{size[0]} x {size[1]} is long and narrow: {words} keeps {share} % of it")
        )
    return notes


def _digest(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.digest()


def _thumbnail(image):
    """(16, 16, 3) bytes, brightness and two of colour: what all copies of a photo share."""
    import numpy as np  # takes longer to load than all of `--help`

    return np.asarray(image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX).convert("YCbCr"))


def _near_duplicates(photos, thumbnails):
    known = [
        (photo, thumbnail) for photo, thumbnail in zip(photos, thumbnails) if thumbnail is not None
    ]
    problems = []
    for (photo, _), (nearest, cosine) in zip(
        known, _nearest_before([thumbnail for _, thumbnail in known])
    ):
        if cosine > ALIKE:
            twin = known[nearest][0].path
            message = (f"looks nearly the same as {shown(twin.name)}: it counts twice, and adds "
                       "little")
            problems.append(Problem(photo.path, "near-duplicate", message, twin=twin))
    return problems


def _nearest_before(thumbnails):
    """(index, cosine) of the earlier one that each is most like; (0, -1) for the first."""
    import numpy as np

    nearest = []
    for first in range(0, len(thumbnails), BLOCK):
        block = _differences(thumbnails[first : first + BLOCK])
        likeness = [
            block @ _differences(thumbnails[k : k + BLOCK]).T for k in range(0, first + 1, BLOCK)
        ]
        likeness = np.concatenate(likeness, axis=1)  # (block, earlier ones and the block itself)
        likeness[np.arange(likeness.shape[1]) >= first + np.arange(len(block))[:, None]] = -1
        nearest += [(int(row.argmax()), float(row.max())) for row in likeness]
    return nearest


def _differences(thumbnails):
    """(n, 1350) unit vectors: from each pixel to the next; a flat ground counts for nothing."""
    import numpy as np

    pixels = np.stack(thumbnails).astype(np.float32)
    across, down = np.diff(pixels, axis=2)[:, :-1], np.diff(pixels, axis=1)[:, :, :-1]
    rows = np.concatenate([across, down], axis=3).reshape(len(pixels), -1)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)


# --- crop -----------------------------------------------------------------------------------------


Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels


def nearest_bucket(size: tuple[int, int], buckets: Sequence[Bucket]) -> Bucket:
    """The bucket with the aspect ratio nearest that of a photo of `size` = (width, height).

    Nearest in the logarithm: 1:2 and 2:1 are as far from 1:1. Of buckets that are as near, the one
    nearest in size.
    """
    width, height = size

    def distance(bucket):
        high, wide = bucket
        return (abs(math.log(width * high / (height * wide))),
                abs(math.log(width * height / (high * wide))))

    return min(buckets, key=distance)


def describe_buckets(photos: Iterable[Photo], buckets: Sequence[Bucket]) -> str:
    """How many photos each bucket has, in a sentence."""
    counts = Counter(nearest_bucket(photo.size, buckets) for photo in photos)
    rows = [f"{count} in {height},{width}" for (height, width), count in counts.most_common()]
    return f"Photos by bucket (height,width): {'; '.join(rows)}."


def crop_box(size: tuple[int, int], shape: tuple[int, int], at: float = 0.5) -> Box:
    """The largest box in `size` = (width, height) that is shaped as `shape` = (height, width).

    (left, top, right, bottom) in whole pixels. `at` in [0, 1] is its place along the side that is
    cropped: 0 left or top, 0.5 centred, 1 right or bottom.
    """
    (width, height), (high, wide) = size, shape
    across = min(width, max(1, round(height * wide / high)))
    down = min(height, max(1, round(width * high / wide)))
    left, top = round((width - across) * at), round((height - down) * at)
    return left, top, left + across, top + down


def square_box(size: tuple[int, int], at: float = 0.5) -> Box:
    """The largest square in `size` = (width, height), as `crop_box`."""
    return crop_box(size, (1, 1), at)


def check_box(box: Iterable[Any], size: tuple[int, int]) -> Box:
    """`box` as four whole numbers; `PhotoError` unless it is a square inside `size` = (width,
    height)."""
    try:
        left, top, right, bottom = (round(float(value)) for value in box)
    except (TypeError, ValueError, OverflowError):
        raise PhotoError(
            f"crop box {box!r}: give four numbers, left, top, right, bottom, in pixels"
        ) from None
    width, height = size
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise PhotoError(
            f"crop box {left},{top},{right},{bottom} does not lie inside the {width} "
            f"x {height} photo"
        )
    if abs((right - left) - (bottom - top)) > 1:
        raise PhotoError(
            f"crop box {left},{top},{right},{bottom} is {right - left} x {bottom - top}: not square"
        )
    return left, top, right, bottom


def crop_to_square(image: Image.Image, resolution: int, center_crop: bool = True,
                   box: Box | None = None, interpolation: str = "lanczos",
                   at: float = 0.5) -> Image.Image:
    """A `resolution` x `resolution` copy of the largest square of an image, or of the square `box`.

    The square is centred, or, with `center_crop=False`, lies at `at` in [0, 1] along the longer
    side (the caller draws `at`, so that this function stays free of chance). `box` = (left, top,
    right, bottom) goes before both. A mask is cropped with the same arguments and stays in step.
    Raises `PhotoError` for a bad box or interpolation.
    """
    box = (
        check_box(box, image.size)
        if box is not None
        else square_box(image.size, 0.5 if center_crop else at)
    )
    return crop_to(image, box, (resolution, resolution), interpolation)


def crop_to(image: Image.Image, box: Box, bucket: Bucket,
            interpolation: str = "lanczos") -> Image.Image:
    """What `box` holds of an image, at `bucket` = (height, width) pixels. Raises `PhotoError`."""
    if interpolation not in INTERPOLATIONS:
        raise PhotoError(
            f"interpolation {interpolation!r}: choose one of {', '.join(INTERPOLATIONS)}"
        )
    part = image.crop(box)  # first, so that no colour bleeds in from beyond the edge
    return part.resize(bucket[::-1], Image.Resampling[interpolation.upper()])

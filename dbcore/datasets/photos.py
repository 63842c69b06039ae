"""Photos as people have them: find, check, turn upright, crop, caption.

A `Photo` holds a path, never pixels, so 5,000 photos cost what five do. A photo that cannot be used
becomes a `Problem` with `skipped=True`; one that can, but should be looked at, a `Problem` without it.

Beside a photo `dog.jpg` there may be
  a caption   `dog.txt`, or a line {"file_name": "dog.jpg", "text": "..."} in `metadata.jsonl`
  a mask      `dog.mask.png`, or `masks/dog.png`: white is learnt, black is left out of the loss
"""

import hashlib
import json
import os
import stat
import warnings
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageCms, ImageOps

from dbcore.utils.errors import InputError

# Only what a camera, a phone or a browser writes. Pillow knows more formats, but some of them start
# other programs (EPS starts Ghostscript), and a folder from the internet should not choose one.
FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "HEIF"]
PHOTO_SUFFIXES = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm",
    ".avif", ".heic", ".heif",
}  # fmt: skip
HEIC_SUFFIXES = {".heic", ".heif"}
# Anything with one of these never was a photo, so it is passed over without a look inside.
OTHER_SUFFIXES = {".txt", ".caption", ".json", ".jsonl", ".yaml", ".md", ".csv", ".db", ".ini", ".html"}
JUNK_NAMES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir", "icon\r"}
CONTACT_SHEET = "contact_sheet.png"  # `dbcore prepare` leaves one beside the photos
MASK_FOLDER = "masks"

MAX_PIXELS = Image.MAX_IMAGE_PIXELS or 89_478_485  # 270 MB as RGB; every phone's usual mode is below it
MAX_ASPECT = 2.5  # beyond this a centred square keeps less than 40 % of the photo
MAX_CAPTION = 4_000  # characters; a caption beyond this is some other file by mistake
NEAR_BITS = 11  # of 128: two copies of one photo differ in 0 to 10, two photos of one animal in 29 or more
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")


class PhotoError(InputError):
    """No photo of a folder can be used, or a crop was asked for that cannot be made."""


@dataclass(frozen=True)
class Problem:
    """What is wrong with one file, in words for its owner; `skipped` where it cannot be used at all."""

    path: Path
    kind: str
    message: str
    skipped: bool = False

    def __str__(self):
        return f"{shown(self.path.name)}: {self.message}" + (" [skipped]" if self.skipped else "")


@dataclass(frozen=True)
class Photo:
    """A picture file that was opened once and found good."""

    path: Path
    size: tuple[int, int]  # (width, height) in pixels, upright
    caption: str | None = None
    mask_path: Path | None = None

    def load(self):
        """The photo as an upright `PIL.Image` in RGB, its size `self.size`."""
        return _open_upright(self.path)

    def load_mask(self):
        """The mask as an upright `PIL.Image` in mode L at the photo's size, or None if there is none."""
        if self.mask_path is None:
            return None
        return _open_upright(self.mask_path).convert("L").resize(self.size, Image.Resampling.NEAREST)


def shown(name):
    """A file name safe to print: control characters and stray bytes are written as escapes."""
    text = str(name).encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# --- find ---------------------------------------------------------------------------------------------


def find_photos(folder):
    """The picture files in `folder` and the folders within it, sorted by path; junk and masks left out.

    A link to a folder is followed once, so a circle of links ends. Raises `PhotoError` if `folder` is
    not a folder that can be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file" if folder.is_file() else "does not exist"
        raise PhotoError(f"the photo folder {shown(folder)} {what}: give a folder of pictures")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise PhotoError(f"the photo folder {shown(folder)} cannot be read: check its permissions")
    found, seen = [], set()
    for here, folders, files in os.walk(folder, followlinks=True):
        identity = os.stat(here)
        if (identity.st_dev, identity.st_ino) in seen:
            folders.clear()
            continue
        seen.add((identity.st_dev, identity.st_ino))
        folders[:] = sorted(name for name in folders if not _is_junk(name) and name != MASK_FOLDER)
        found += [Path(here, name) for name in files if not _is_junk(name) and ".mask." not in name.lower()]
    return sorted(path for path in found if _may_be_photo(path))


def _is_junk(name):
    return name.startswith((".", "~")) or name.lower() in JUNK_NAMES or name == CONTACT_SHEET


def _may_be_photo(path):
    """By its ending, or, where the ending says nothing, by the first bytes of its content."""
    suffix = path.suffix.lower()
    if suffix in PHOTO_SUFFIXES:
        return True
    if suffix in OTHER_SUFFIXES or not _is_regular(path):
        return False
    try:
        with _open(path):
            return True
    except Image.DecompressionBombError:
        return True  # a picture all right; check_photos says why it is refused
    except Exception:  # noqa: BLE001 - not a photo, whatever its decoder stumbled over
        return False


def _is_regular(path):
    """Not a folder, a dangling or circular link, nor a pipe, whose opening would wait for ever."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False


# --- check --------------------------------------------------------------------------------------------


def gather_photos(folder, resolution=None):
    """`find_photos` and `check_photos` at once: (photos, problems), with at least one photo.

    Raises `PhotoError`, which names the folder and each file's reason, if none can be used.
    """
    paths = find_photos(folder)
    photos, problems = check_photos(paths, resolution=resolution, folder=folder)
    if photos:
        return photos, problems
    if not paths:
        raise PhotoError(f"no picture in {shown(folder)}: put 3 to 10 photos (JPEG, PNG, WebP, HEIC) there")
    reasons = "".join(f"\n  {problem}" for problem in problems[:10] if problem.skipped)
    more = f"\n  and {len(paths) - 10} more" if len(paths) > 10 else ""
    raise PhotoError(f"none of the {len(paths)} pictures in {shown(folder)} can be used:{reasons}{more}")


def check_photos(paths, resolution=None, folder=None):
    """Open every file once, one after another, and say what is wrong: (photos, problems).

    `resolution` (pixels) adds the warning for photos smaller than that. `folder` is how far up a
    `metadata.jsonl` is looked for; without it, only in each photo's own folder. Raises nothing on
    account of a picture: whatever is in the file becomes a `Problem`.
    """
    photos, problems, prints, digests = [], [], [], {}
    captions = _Captions(folder, problems)
    for path in map(Path, paths):
        try:
            size, notes, print_ = _examine(path)
        except Exception as error:  # noqa: BLE001 - decoders raise anything at all on a damaged file
            problems.append(Problem(path, *_reason(path, error), skipped=True))
            continue
        photos.append(Photo(path, size, captions.of(path), _mask_for(path, size, problems)))
        notes += _shape_notes(size, resolution)
        twin = digests.setdefault(_digest(path), path)
        if twin is not path:
            notes.append(("duplicate", f"the same file as {shown(twin.name)}: keep one of the two"))
            print_ = None
        prints.append(print_)
        problems += [Problem(path, *note) for note in notes]
    problems += _near_duplicates(photos, prints)
    problems += captions.gaps(photos)
    return photos, problems


def _examine(path):
    """Decode one file, at an eighth of the size where the format allows: (size, notes, print)."""
    with _open(path) as image:
        notes = _format_notes(path, image)
        size = _upright_size(image)
        image.draft(None, (64, 64))  # a JPEG is then read, to its last byte, at 1/8 scale
        image.load()
        upright = ImageOps.exif_transpose(image)
        return size, notes, _fingerprint(_to_rgb(upright))


def _open(path):
    """Open `path` by its content, not its name; the size is checked before any pixel is decoded."""
    if not _is_regular(path):
        raise PhotoError("not an ordinary file (a broken link, a circle of links or a device)")
    if os.path.getsize(path) == 0:
        raise PhotoError("the file is empty (0 bytes): copy it again")
    formats = _known_formats()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the test below is stricter
        image = Image.open(path, formats=formats)
    if image.width * image.height > MAX_PIXELS:
        size = f"{image.width} x {image.height}"
        image.close()
        raise Image.DecompressionBombError(size)
    return image


def _open_upright(path):
    with _open(path) as image:
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))


def _known_formats():
    """Those of FORMATS that this Pillow reads, with HEIF where its package is installed."""
    Image.init()
    if "HEIF" not in Image.OPEN:
        try:
            from pillow_heif import register_heif_opener

            register_heif_opener()
        except ImportError:
            pass
    return [name for name in FORMATS if name in Image.OPEN]


def _reason(path, error):
    """(kind, message) for an exception raised while a picture was read."""
    if isinstance(error, PhotoError):
        return "unreadable", str(error)
    if isinstance(error, Image.DecompressionBombError):
        limit = MAX_PIXELS // 10**6
        return "too large", f"more than {limit} megapixels ({error}): save a smaller copy"
    if path.suffix.lower() in HEIC_SUFFIXES and "HEIF" not in Image.OPEN:
        return "heic", "a HEIC photo needs one more package: pip install pillow-heif (or save it as JPEG)"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not a picture", "its content is no picture format known here: save it as JPEG or PNG"
    if isinstance(error, PermissionError):
        return "unreadable", "may not be read: check its permissions"
    return "damaged", f"damaged or cut short ({shown(error)[:100]}): copy it again from where it came"


def _upright_size(image):
    turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # EXIF orientations that swap the sides
    return (image.height, image.width) if turned else image.size


def _format_notes(path, image):
    notes = []
    if getattr(image, "is_animated", False) and image.format != "MPO":
        notes.append(("animated", f"animated ({image.n_frames} frames): the first frame is used"))
    usual = Image.registered_extensions().get(path.suffix.lower())
    if usual != image.format and (usual, image.format) != ("JPEG", "MPO"):
        notes.append(
            ("extension", f"is a {image.format} file whatever its name says: read as {image.format}")
        )
    if image.has_transparency_data:
        notes.append(("transparent", "has transparent parts: they are laid on white"))
    return notes


def _shape_notes(size, resolution):
    notes, short, long = [], min(size), max(size)
    if resolution and short < resolution:
        notes.append(
            (
                "small",
                f"{size[0]} x {size[1]} is smaller than {resolution}: enlarged {resolution / short:.1f} times",
            )
        )
    if long > MAX_ASPECT * short:
        share = 100 * short // long
        notes.append(("narrow", f"{size[0]} x {size[1]} is long and narrow: a square keeps {share} % of it"))
    return notes


def _digest(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.digest()


def _fingerprint(image):
    """128 signs (+1, -1): is a pixel of a 9 x 9 grey thumbnail darker than the next, across and down?

    The difference hash survives another size, quality or exposure, which is how copies differ.
    """
    import numpy as np  # takes longer to load than all of `--help`

    grey = np.asarray(image.convert("L").resize((9, 9), Image.Resampling.BOX), dtype=np.int16)
    across, down = np.diff(grey, axis=1)[:8], np.diff(grey, axis=0)[:, :8]
    return np.where(np.concatenate([across.ravel(), down.ravel()]) > 0, 1, -1).astype(np.int8)


def _near_duplicates(photos, prints):
    known = [(photo, print_) for photo, print_ in zip(photos, prints) if print_ is not None]
    if len(known) < 2:
        return []
    import numpy as np

    signs = np.stack([print_ for _, print_ in known]).astype(np.float32)  # [photos, 128]
    problems = []
    for i in range(1, len(known)):
        differing = (128 - signs[:i] @ signs[i]) / 2
        nearest = int(differing.argmin())
        if differing[nearest] < NEAR_BITS:
            twin = shown(known[nearest][0].path.name)
            message = f"looks nearly the same as {twin}: it counts twice, and adds little"
            problems.append(Problem(known[i][0].path, "near-duplicate", message))
    return problems


# --- captions and masks -------------------------------------------------------------------------------


class _Captions:
    """Captions of a set of photos; each `metadata.jsonl` is read once. A `.txt` beside the photo wins."""

    def __init__(self, folder, problems):
        self.root = Path(folder) if folder is not None else None
        self.problems = problems
        self.tables = {}

    def of(self, path):
        beside = path.with_suffix(".txt")
        if _is_regular(beside):
            with open(beside, encoding="utf-8-sig", errors="replace") as file:
                text = file.read(MAX_CAPTION + 1)
            return self._clean(text, beside)
        for folder in self._upwards(path.parent):
            text = self._table(folder).get(path.relative_to(folder).as_posix())
            if text is not None:
                return self._clean(text, folder / "metadata.jsonl")
        return None

    def _upwards(self, folder):
        yield folder
        while self.root is not None and folder != self.root and self.root in folder.parents:
            folder = folder.parent
            yield folder

    def _table(self, folder):
        if folder not in self.tables:
            self.tables[folder] = table = {}
            path = folder / "metadata.jsonl"
            if _is_regular(path):
                with open(path, encoding="utf-8-sig", errors="replace") as file:
                    for number, line in enumerate(file, 1):
                        self._read_line(line, number, path, table)
        return self.tables[folder]

    def _read_line(self, line, number, path, table):
        if not line.strip():
            return
        try:
            row = json.loads(line)
            table[str(row["file_name"])] = str(row["text"])
        except (ValueError, KeyError, TypeError, RecursionError):
            wanted = '{"file_name": "dog.jpg", "text": "a caption"}'
            self.problems.append(Problem(path, "caption", f"line {number} is not like {wanted}: passed over"))

    def _clean(self, text, source):
        if len(text) > MAX_CAPTION:
            message = f"longer than {MAX_CAPTION} characters: not taken as a caption"
            self.problems.append(Problem(source, "caption", message))
            return None
        return " ".join(text.split()) or None

    def gaps(self, photos):
        """One warning if some photos have captions and others do not."""
        without = [photo for photo in photos if photo.caption is None]
        if not without or len(without) == len(photos):
            return []
        message = f"no caption, like {len(without)} of {len(photos)} photos: the instance prompt stands in"
        return [Problem(without[0].path, "caption", message)]


def _mask_for(path, size, problems):
    """The mask's path, or None; a mask that cannot be used is reported and left out."""
    beside = [path.with_name(f"{path.stem}.mask.png"), path.parent / MASK_FOLDER / f"{path.stem}.png"]
    for mask in filter(_is_regular, beside):
        try:
            with _open(mask) as image:
                wide, high = _upright_size(image)
                image.load()
        except Exception as error:  # noqa: BLE001 - as above
            problems.append(Problem(mask, "mask", f"{_reason(mask, error)[1]}; trained without it"))
            continue
        if abs(wide / high - size[0] / size[1]) < 0.02 * size[0] / size[1]:
            return mask
        message = f"{wide} x {high} has not the shape of its photo, {size[0]} x {size[1]}; trained without it"
        problems.append(Problem(mask, "mask", message))
    return None


# --- upright RGB, and square --------------------------------------------------------------------------


def _to_rgb(image):
    """Any Pillow mode as 8-bit sRGB: 16 bits scaled, transparency on white, CMYK and profiles converted."""
    if image.mode.startswith("I"):  # Pillow keeps a 16-bit grey picture's values, and its convert clips them
        import numpy as np

        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise PhotoError("holds floating-point values without a range: save it with 8 or 16 bits")
    profile = image.info.get("icc_profile")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode not in ("RGB", "CMYK"):
        image = image.convert("RGB")
    return _to_srgb(image, profile) if profile else image.convert("RGB")


def _to_srgb(image, profile):
    """Phones save in Display P3 and printers in CMYK; read as sRGB their colours would be off."""
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):  # a damaged profile, or one of another mode
        return image.convert("RGB")


def square_box(size, at=0.5):
    """The largest square in `size` = (width, height): (left, top, right, bottom) in whole pixels.

    `at` in [0, 1] is its place along the longer side: 0 left or top, 0.5 centred, 1 right or bottom.
    """
    width, height = size
    side = min(width, height)
    left, top = round((width - side) * at), round((height - side) * at)
    return left, top, left + side, top + side


def check_box(box, size):
    """`box` as four whole numbers; `PhotoError` unless it is a square inside `size` = (width, height)."""
    try:
        left, top, right, bottom = (round(float(value)) for value in box)
    except (TypeError, ValueError, OverflowError):
        raise PhotoError(
            f"crop box {box!r}: give four numbers, left, top, right, bottom, in pixels"
        ) from None
    width, height = size
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise PhotoError(
            f"crop box {left},{top},{right},{bottom} does not lie inside the {width} x {height} photo"
        )
    if abs((right - left) - (bottom - top)) > 1:
        raise PhotoError(
            f"crop box {left},{top},{right},{bottom} is {right - left} x {bottom - top}: not square"
        )
    return left, top, right, bottom


def crop_to_square(image, resolution, center_crop=True, box=None, interpolation="lanczos", at=0.5):
    """A `resolution` x `resolution` copy of the largest square of an image, or of the square `box`.

    The square is centred, or, with `center_crop=False`, lies at `at` in [0, 1] along the longer side
    (the caller draws `at`, so that this function stays free of chance). `box` = (left, top, right,
    bottom) goes before both. A mask is cropped with the same arguments and stays in step.
    Raises `PhotoError` for a bad box or interpolation.
    """
    if interpolation not in INTERPOLATIONS:
        raise PhotoError(f"interpolation {interpolation!r}: choose one of {', '.join(INTERPOLATIONS)}")
    box = (
        check_box(box, image.size) if box is not None else square_box(image.size, 0.5 if center_crop else at)
    )
    square = image.crop(box)  # first, so that no colour bleeds in from beyond the edge
    return square.resize((resolution, resolution), Image.Resampling[interpolation.upper()])

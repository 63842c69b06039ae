"""One image file, however it was saved: opened by its content, upright, as 8-bit sRGB."""

import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import cast

from PIL import Image, ImageCms

from dbcore.utils.errors import InputError

# Only what a camera, a phone or a browser writes. Pillow knows more formats, but some of them start
# other programs (EPS starts Ghostscript), and a folder from the internet should not choose one.
FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "HEIF"]
HEIC_SUFFIXES = {".heic", ".heif", ".hif", ".heics", ".heifs"}
RAW_SUFFIXES = {
    ".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".gpr", ".iiq",
    ".kdc", ".mef", ".mos", ".mrw", ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw",
    ".rw2", ".rwl", ".sr2", ".srf", ".srw", ".x3f",
}  # fmt: skip
# Other images, and drawings: named to their owner, not read.
UNREAD_SUFFIXES = RAW_SUFFIXES | {
    ".afphoto", ".ai", ".blp", ".bpg", ".bw", ".clip", ".cur", ".dcm", ".dcx", ".dds", ".dib",
    ".djvu", ".emf", ".eps", ".exr", ".fit", ".flc", ".fli", ".fpx", ".ftc", ".ftu", ".gbr",
    ".fits", ".flif", ".hdr", ".icns", ".ico", ".insp", ".livp", ".pcd", ".pdf",
    ".j2c", ".j2k", ".jp2", ".jpc", ".jpf", ".jpm", ".jpx", ".jxl", ".jxr", ".kra", ".ora",
    ".im", ".mic", ".msp", ".pcx", ".ps", ".psb", ".psd", ".pxr", ".qoi", ".ras", ".rgb", ".rgba",
    ".sgi", ".svg", ".svgz", ".tga", ".wdp", ".wmf", ".xbm", ".xcf", ".xpm",
}  # fmt: skip
VIDEO_SUFFIXES = {
    ".3gp", ".avi", ".gifv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts",
    ".ogv", ".webm", ".wmv",
}  # fmt: skip
UNREAD_STARTS = (  # first bytes, for files without a name that tells
    b"\xff\x0a", b"\0\0\0\x0cJXL ", b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51", b"8BPS", b"gimp xcf",
    b"FUJIFILMCCD-RAW",
    b"\x76\x2f\x31\x01", b"DDS ", b"qoif", b"IIRO", b"IIU\0", b"FOVb",
)  # fmt: skip
UNREAD_BRANDS = (  # of ISO media files
    b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1", b"avif", b"avis", b"crx ",
)  # fmt: skip

# 270 MB as RGB; every phone's usual mode is below it
MAX_PIXELS = Image.MAX_IMAGE_PIXELS or 89_478_485
DEPTHS = (8, 10, 12, 14, 16)  # bits a grey value that cameras, scanners and microscopes deliver
TURNS = {  # EXIF's orientation, tag 0x0112 -> what undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
PNG_START = b"\x89PNG\r\n\x1a\n"
PNG_TEXTS = {b"tEXt", b"zTXt", b"iTXt"}


class PhotoError(InputError):
    """No photo of a folder can be used, or a crop was asked for that cannot be made."""


@dataclass(frozen=True)
class Problem:
    """What is wrong with one file, in words for its owner; `skipped` where it is of no use.

    `photo`: the photo that the file belongs to, where it is a caption or a mask. `twin`: the photo
    that it repeats, where it is a duplicate.
    """

    path: Path
    kind: str
    message: str
    skipped: bool = False
    photo: Path | None = None
    twin: Path | None = None

    def __str__(self):
        return f"{shown(self.path.name)}: {self.message}" + (" [skipped]" if self.skipped else "")


def shown(name: str | Path | Exception) -> str:
    """A file name safe to print: control characters and stray bytes are written as escapes."""
    text = str(name).encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def is_regular(path: str | Path) -> bool:
    """Not a folder, a dangling or circular link, nor a pipe, whose opening would wait for ever."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False


# --- what a file is -------------------------------------------------------------------------------


def looks_like_image(path: str | Path) -> bool:
    """Whether a file's ending or first bytes are those of an image, read here or not."""
    if Path(path).suffix.lower() in UNREAD_SUFFIXES | HEIC_SUFFIXES | VIDEO_SUFFIXES:
        return True
    if not is_regular(path):
        return False
    try:
        if not _unread_start(path):
            _open(path).close()
        return True
    except Image.DecompressionBombError:
        return True  # an image all right; whoever opens it says why it is refused
    except Exception:  # noqa: BLE001 - not an image, whatever its decoder stumbled over
        return False


def _unread_start(path):
    with open(path, "rb") as file:
        start = file.read(16)
    return start.startswith(UNREAD_STARTS) or (
        start[4:8] == b"ftyp" and start[8:12] in UNREAD_BRANDS
    )


def known_formats() -> list[str]:
    """Those of FORMATS that this Pillow reads, with HEIF where its package is installed."""
    Image.init()
    if "HEIF" not in Image.OPEN:
        with suppress(ImportError):
            from pillow_heif import register_heif_opener

            register_heif_opener()
    return [name for name in FORMATS if name in Image.OPEN]


def reason(path: str | Path, error: Exception) -> tuple[str, str]:
    """(kind, message) for an exception raised while an image was read."""
    suffix = Path(path).suffix.lower()
    if isinstance(error, PhotoError):
        return "unreadable", str(error)
    if isinstance(error, Image.DecompressionBombError):
        limit = MAX_PIXELS // 10**6
        return "too large", f"more than {limit} megapixels ({error}): save a smaller copy"
    if suffix in HEIC_SUFFIXES and "HEIF" not in Image.OPEN:
        return (
            "heic",
            "a HEIC photo needs one more package: pip install pillow-heif (or save it as JPEG)",
        )
    if suffix in UNREAD_SUFFIXES:
        return "unread kind", f"{suffix} images are not read here: save it as JPEG or PNG"
    if suffix in VIDEO_SUFFIXES:
        return "unread kind", "a video: save some of its frames as JPEG or PNG"
    if isinstance(error, Image.UnidentifiedImageError):
        return (
            "not an image",
            "its content is no image format known here: save it as JPEG or PNG",
        )
    if isinstance(error, PermissionError):
        return "unreadable", "may not be read: check its permissions"
    return (
        "damaged",
        f"damaged or cut short ({shown(error)[:100]}): copy it again from where it came",
    )


# --- decode ---------------------------------------------------------------------------------------


@contextmanager
def decoded(path: str | Path,
            draft: int | None = None) -> Iterator[tuple[Image.Image, tuple[int, int]]]:
    """(image, size): the first frame, not yet upright, and its (width, height) in the file.

    `draft` (pixels): a JPEG is read, to its last byte, at the smallest scale that leaves this side.
    Metadata that Pillow stumbles over costs a photo nothing. Raises PhotoError and
    whatever a decoder raises.
    """
    _check_file(path)
    image, size = _decode(path, draft)
    with image:
        yield image, size


def load_rgb(path: str | Path) -> Image.Image:
    """The image upright, as a `PIL.Image` in RGB."""
    with decoded(path) as (image, _):
        return to_rgb(upright(image))


def _check_file(path):
    if not is_regular(path):
        raise PhotoError("not an ordinary file (a broken link, a circle of links or a device)")
    if os.path.getsize(path) == 0:
        raise PhotoError("the file is empty (0 bytes): copy it again")
    if (
        Path(path).suffix.lower() in RAW_SUFFIXES
    ):  # many are TIFF files, of which Pillow reads the preview
        raise Image.UnidentifiedImageError


def _decode(path, draft):
    try:
        return _load(path, draft)
    except Exception:
        for dropped in (PNG_TEXTS, PNG_TEXTS | {b"iCCP"}):
            with suppress(Exception):
                return _load(_png_without(path, dropped), draft)
        raise


def _load(source, draft):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata
        image = _open(source)
        size = image.size
        try:
            image.draft(None, draft and (draft, draft))
            image.load()
        except BaseException:
            image.close()
            raise
    return image, size


def _open(source):
    """By content, not name; the size is checked before any pixel is decoded."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # Pillow's own warning of the size; the test below is stricter
        image = Image.open(source, formats=known_formats())
    if image.width * image.height > MAX_PIXELS:
        size = f"{image.width} x {image.height}"
        image.close()
        raise Image.DecompressionBombError(size)
    return image


def _png_without(path, kinds):
    """A PNG's bytes without its chunks of these kinds, which pass Pillow's limits."""
    data = Path(path).read_bytes()
    if not data.startswith(PNG_START):
        raise Image.UnidentifiedImageError("not a PNG")
    kept, at = [PNG_START], len(PNG_START)
    while at + 8 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] not in kinds:
            kept.append(data[at:end])
        at = end
    return BytesIO(b"".join(kept))


# --- upright RGB ----------------------------------------------------------------------------------


def orientation(image: Image.Image) -> int:
    """EXIF's tag 0x0112: 1 is upright, 5 to 8 swap the sides; 1 where it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = image.getexif().get(0x0112, 1)
        return found if found in TURNS else 1
    except Exception:  # noqa: BLE001 - metadata of any sort; the pixels are good
        return 1


def upright(image: Image.Image) -> Image.Image:
    turn = TURNS.get(orientation(image))
    return image if turn is None else image.transpose(turn)


def grey_depth(image: Image.Image) -> int | None:
    """Bits of a grey image's values as its brightest one tells, None for another image.

    Many cameras put 12 into 16. Raises PhotoError for values that no depth holds.
    """
    if not image.mode.startswith("I"):
        return None
    low, high = cast(tuple[int, int], image.getextrema())
    if low < 0 or high >= 2 ** DEPTHS[-1]:
        raise PhotoError(f"holds grey values from {low} to {high}: save it with 8 or 16 bits")
    return next(depth for depth in DEPTHS if high < 2**depth)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode as 8-bit sRGB: deep grey scaled, transparency on white.

    CMYK and profiles are converted. Raises PhotoError for values whose range is not known.
    """
    depth = grey_depth(image)
    if depth:  # Pillow's convert would clip
        import numpy as np  # takes longer to load than all of `--help`

        grey = np.asarray(image, dtype=np.float32) * (256 / 2**depth)
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
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
        return ImageCms.profileToProfile(
            image, source, ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    except (ImageCms.PyCMSError, OSError, ValueError):  # a damaged profile, or one of another mode
        return image.convert("RGB")

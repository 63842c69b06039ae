"""What lies beside a photo: its caption and its mask, under the names that tools give them.

For a photo `dog.jpg`
  a caption   `dog.txt`, `dog.caption`, or a row of the folder's `metadata.jsonl` or `metadata.csv`
  a mask      `dog.mask.png`, `masks/dog.png`, `dog-masklabel.png`, `dog_mask.png`, `mask_dog.png`
Nothing is passed over: a file that looks like one of these and is not used becomes a `Problem`.
"""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from os.path import lexists
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, cast

from PIL import ImageStat

from dbcore.datasets.images import (
    PhotoError,
    Problem,
    decoded,
    is_regular,
    reason,
    shown,
    to_rgb,
    upright,
)
from dbcore.utils.errors import InputError
from dbcore.utils.text import plain, read_text

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image

    from dbcore.datasets.photos import Photo

CAPTION_SUFFIXES = (".txt", ".caption")  # the first wins
TABLES = ("metadata.jsonl", "metadata.csv")
TEXT_COLUMNS = ("text", "caption", "prompt")
UNREAD_TABLES = re.compile(
    r"(captions?|metadata|meta_cap|prompts)\.(csv|json|jsonl|parquet|toml|tsv|ya?ml)", re.IGNORECASE
)
UNREAD_CAPTIONS = {".cap", ".captions", ".json", ".tags"}
MAX_CAPTION = 4_000  # characters; a caption beyond this is some other file by mistake
FEW = 10  # problems of one sort that are named one by one

MASK_FOLDERS = {"masks", "mask"}
MASK_SUFFIXES = {
    ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".ppm", ".pgm",
}  # fmt: skip
MASK_NAME = re.compile(
    r"(?P<before>.+)[._ -](mask|masklabel|condlabel)|mask[._ -](?P<after>.+)", re.IGNORECASE
)
BLACK = 16  # of 255: a mask without a brighter pixel leaves nothing to learn
LEAST = 0.001  # of a mask that is white: at 512 pixels some four places of the latents


# --- captions -------------------------------------------------------------------------------------


class Captions:
    """The captions of a set of photos, each folder listed and each table read once.

    `root`: how far up a table is looked for; None for each photo's own folder. Raises PhotoError
    where a table names none of the photos.
    """

    def __init__(self, paths: Iterable[Path], root: Path | None, problems: list[Problem]):
        self.root, self.problems = root, problems
        folders = {path.parent: None for path in paths}  # in the order of the photos
        self.beside = {folder: caption_files(folder) for folder in folders}
        above = dict.fromkeys(up for folder in folders for up in self._upwards(folder))
        self.tables: dict[Path, dict[str, str]] = {
            folder / name: {} for folder in above for name in TABLES if lexists(folder / name)
        }
        for table, rows in self.tables.items():
            self._read_table(table, rows)
            self._unmatched_rows(table, rows, paths)
        for folder in folders:
            self._unused_files(folder, paths)

    def of(self, path: Path) -> str | None:
        """One line of text, or None."""
        for file in self._files_of(path):
            try:
                check_regular(file)
                text = read_text(file, MAX_CAPTION)
            except (InputError, OSError) as error:
                self._note(file, f"{error}; it is not used as a caption", path)
                continue
            return " ".join(text.split()) or None
        for folder in self._upwards(path.parent):
            for name in TABLES:
                text = self.tables.get(folder / name, {}).get(row_key(path.relative_to(folder)))
                if text is not None:
                    return " ".join(text.split()) or None
        return None

    def gaps(self, photos: list[Photo]) -> list[Problem]:
        """A note if only some photos have captions; one on each that a table leaves out."""
        without = [photo for photo in photos if photo.caption is None]
        if not without or len(without) == len(photos):
            return []
        share = f"{len(without)} of {len(photos)} photos"
        message = f"no caption, like {share}: the instance prompt stands in"
        return [
            Problem(photo.path, "caption", message)
            for photo in without[: FEW if self.tables else 1]
        ]

    def _note(self, path, message, photo=None):
        self.problems.append(Problem(path, "caption", message, photo=photo))

    def _upwards(self, folder):
        yield folder
        while self.root is not None and folder != self.root and self.root in folder.parents:
            folder = folder.parent
            yield folder

    def _files_of(self, path):
        files = self.beside[path.parent]
        return [
            file
            for suffix in CAPTION_SUFFIXES
            for name in (path.stem, path.name)
            for file in files
            if file.stem == name and file.suffix.lower() == suffix
        ]

    def _read_table(self, table, rows):
        bad = []
        try:
            for number, row in table_rows(table):
                caption = row_caption(row)
                if caption is None:
                    bad.append(number)
                elif row_key(caption[0]) in rows:
                    self._note(table, f"line {number} names {shown(caption[0])} again: passed over")
                else:
                    rows[row_key(caption[0])] = caption[1]
        except (InputError, OSError, csv.Error) as error:
            self._note(table, f"{error}; it is not used")
        for number in bad[:FEW]:
            self._note(
                table, f"line {number} holds no file_name with a caption as its text: passed over"
            )
        if bad[FEW:]:
            self._note(table, f"{len(bad[FEW:])} more lines hold none: passed over")

    def _unmatched_rows(self, table, rows, paths):
        known = {
            row_key(path.relative_to(table.parent))
            for path in paths
            if table.parent in path.parents
        }
        strangers = [name for name in rows if name not in known]
        if rows and len(strangers) == len(rows):
            raise PhotoError(
                f"{shown(table)} names none of the photos: its first row is for "
                f"{shown(strangers[0])}, a photo is called {shown(min(known))}; write file_name as "
                "seen from that folder, or remove the table"
            )
        for name in strangers[:FEW]:
            self._note(table, f"has a caption for {shown(name)}, which is no photo here")
        if strangers[FEW:]:
            self._note(
                table, f"has captions for {len(strangers[FEW:])} more that are no photos here"
            )

    def _unused_files(self, folder, paths):
        names = stems_and_names(path.name for path in paths if path.parent == folder)
        for file in self.beside[folder]:
            if file.suffix.lower() in CAPTION_SUFFIXES and file.stem not in names:
                self._note(file, "no photo has this name, so it is nobody's caption")
            elif file.suffix.lower() not in CAPTION_SUFFIXES and (
                file.stem in names or UNREAD_TABLES.fullmatch(file.name)
            ):
                self._note(
                    file,
                    "is not read: write captions as dog.txt beside dog.jpg, or one metadata.jsonl "
                    'with rows like {"file_name": "dog.jpg", "text": "a caption"}',
                )


def caption_files(folder: Path) -> list[Path]:
    """What may be a caption of this folder's photos, read here or not; tables left out."""
    return [
        file
        for file in sorted(folder.iterdir())
        if not file.name.startswith(".")
        and file.name not in TABLES
        and (
            file.suffix.lower() in {*CAPTION_SUFFIXES, *UNREAD_CAPTIONS}
            or UNREAD_TABLES.fullmatch(file.name)
        )
    ]


def check_regular(path: Path) -> None:
    """Raises InputError for a folder, a broken link or a pipe."""
    if not is_regular(path):
        raise InputError("is not an ordinary file (a broken link, a folder or a device)")


def table_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number, row) of a table; None for a line of no JSON. Raises InputError."""
    check_regular(path)
    # with their ends, as a caption in quotes may have several; and no others, such as U+2028
    lines = list(io.StringIO(read_text(path), newline=""))
    if path.suffix == ".csv":
        names = lines[0] if lines else ""
        comma = max(",;\t", key=names.count)  # spreadsheets of half of Europe write semicolons
        reader = csv.DictReader(lines, delimiter=comma)
        if "file_name" not in (reader.fieldnames or ()):
            raise InputError(f"begins with {names.strip()[:60]!r}: write file_name,text there")
        yield from ((reader.line_num, row) for row in reader)
        return
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield number, parse(line)


def parse(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def row_caption(row: Any) -> tuple[str, str] | None:
    """(file name, caption) of a row, or None: only strings are captions."""
    name = row.get("file_name") if isinstance(row, dict) else None
    text = next((row[column] for column in TEXT_COLUMNS if column in row), None) if name else None
    if not isinstance(name, str) or not isinstance(text, str) or len(text) > MAX_CAPTION:
        return None
    try:
        return name, plain(text)
    except InputError:
        return None


def row_key(name: str | Path) -> str:
    """A file name, two spellings of which are one: / for \\, no leading ./, composed letters."""
    return unicodedata.normalize("NFC", PurePosixPath(str(name).replace("\\", "/")).as_posix())


# --- masks ----------------------------------------------------------------------------------------


def mask_owners(names: Iterable[str], known: set[str]) -> dict[str, str]:
    """{file name of a mask: name or stem of its photo} among the image names of one folder.

    `known`: names and stems of the photos there. `dog-mask.png` is a mask where there is a `dog`,
    else a photo; `dog.mask.png` is never a photo.
    """
    found = {name: MASK_NAME.fullmatch(PurePosixPath(name).stem) for name in names}
    owners = {name: match["before"] or match["after"] for name, match in found.items() if match}
    return {
        name: owner for name, owner in owners.items() if owner in known or ".mask." in name.lower()
    }


def stems_and_names(names: Iterable[str]) -> set[str]:
    return {word for name in names for word in (name, PurePosixPath(name).stem)}


class Masks:
    """The masks of a set of photos; what is black, misshapen or nobody's becomes a `Problem`."""

    def __init__(self, paths: Iterable[Path], problems: list[Problem]):
        self.problems, self.good = problems, 0
        self.black: list[Path] = []
        self.of_photo: dict[tuple[Path, str], list[Path]] = {}
        names: dict[Path, list[str]] = {}
        for path in paths:
            names.setdefault(path.parent, []).append(path.name)
        for folder, photos in names.items():
            known = stems_and_names(photos)
            for mask, owner in masks_of(folder, known):
                if owner in known:
                    self.of_photo.setdefault((folder, owner), []).append(mask)
                else:
                    self.problems.append(
                        Problem(mask, "mask", f"no photo is called {shown(owner)}: not used")
                    )

    def of(self, path: Path, size: tuple[int, int]) -> Path | None:
        """The path of the mask of a photo of `size`, or None; one of no use is reported."""
        for mask in [
            mask
            for name in (path.stem, path.name)
            for mask in self.of_photo.get((path.parent, name), [])
        ]:
            fault = mask_fault(mask, size)
            if fault is None:
                self.good += 1
                return mask
            self.black += [mask] * fault.startswith("black")
            self.problems.append(Problem(mask, "mask", f"{fault}; trained without it", photo=path))
        return None

    def check_black(self) -> None:
        """Raises PhotoError where every mask is black."""
        if self.black and not self.good:
            raise PhotoError(
                f"all {len(self.black)} masks are black, such as {shown(self.black[0])}, so "
                "nothing would be learnt: white (255) marks what to learn; correct or remove "
                "them, or give --no-use_masks"
            )


def masks_of(folder: Path, known: set[str]) -> list[tuple[Path, str]]:
    """[(mask, name or stem of its photo)] beside the photos of a folder and in its mask folders."""
    entries = sorted(folder.iterdir())
    images = [
        entry
        for entry in entries
        if entry.suffix.lower() in MASK_SUFFIXES and not entry.name.startswith(".")
    ]
    owners = mask_owners([image.name for image in images], known)
    found = [(folder / name, owner) for name, owner in owners.items()]
    for inner in entries:
        if inner.name.lower() in MASK_FOLDERS and inner.is_dir():
            found += [
                (mask, folder_owner(mask))
                for mask in sorted(inner.iterdir())
                if mask.suffix.lower() in MASK_SUFFIXES
            ]
    return [(mask, owner) for mask, owner in found if is_regular(mask)]


def folder_owner(mask: Path) -> str:
    """`masks/dog.png` or `masks/dog_mask.png` -> dog."""
    match = MASK_NAME.fullmatch(mask.stem)
    return (match["before"] or match["after"]) if match else mask.stem


def mask_fault(path: Path, size: tuple[int, int]) -> str | None:
    """Why a mask is of no use for a photo of `size`, or None."""
    if "condlabel" in path.stem.lower():
        return "is a conditioning image, which is not read here"
    try:
        mask = load_mask(path)
    except Exception as error:  # noqa: BLE001 - decoders raise anything at all on a damaged file
        return reason(path, error)[1]
    wide, high = mask.size
    if abs(wide / high - size[0] / size[1]) >= 0.02 * size[0] / size[1]:
        return f"{wide} x {high} has not the shape of its photo, {size[0]} x {size[1]}"
    brightest = cast(int, mask.getextrema()[1])
    if brightest < BLACK:
        return f"black (its brightest value is {brightest} of 255): its photo would teach nothing"
    white = ImageStat.Stat(mask).mean[0] / 255
    if white < LEAST:
        return f"black but for {100 * white:.2f} %: its photo would teach nothing"
    return None


def load_mask(path: Path) -> Image.Image:
    """A mask, upright, in mode L; of a cut-out subject, what is not transparent."""
    with decoded(path) as (image, _):
        image = upright(image)
        if image.has_transparency_data:
            alpha = image.convert("RGBA").getchannel("A")
            clearest, densest = cast(tuple[int, int], alpha.getextrema())
            if clearest < densest:
                return alpha
        return to_rgb(image).convert("L")

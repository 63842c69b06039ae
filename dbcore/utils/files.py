"""Files and folders that are whole or absent: written beside their name, flushed to the disk, then
renamed.

What is written has a name of its own (`.NAME.<8 hex digits>.partial`), so that two jobs never share
one. The dot hides what a kill leaves from those who look for photos; `sweep` takes it away.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dbcore.utils.errors import DBCoreError

if TYPE_CHECKING:
    from PIL import Image

LEFT = re.compile(r"\..+\.[0-9a-f]{8}\.partial")


class FileError(DBCoreError, OSError):
    """A file or folder that cannot be written; `reason`: the system's own words, `fault`: those and
    the place."""

    def __init__(self, place: str | Path, reason: str):
        self.reason, self.fault = reason, f"{place} cannot be written to: {reason}"
        super().__init__(f"{self.fault}. Free some space, check the permissions, "
                         "or choose another folder")


def is_of_files(error: OSError) -> bool:
    """Whether an OSError is the file system's (disk full, no permission), and not a network's or a
    library's."""
    from_system = type(error).__module__ == "builtins" and error.errno is not None
    return isinstance(error, FileError) or (
        from_system and not isinstance(error, (ConnectionError, TimeoutError, ChildProcessError)))


@contextlib.contextmanager
def writing(place: str | Path) -> Iterator[None]:
    """Within it, what the file system refuses becomes a FileError that names `place`."""
    try:
        yield
    except OSError as error:
        if isinstance(error, FileError) or not is_of_files(error):
            raise
        raise FileError(place, str(error.strerror)) from error


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """The name to write a file under, which is flushed and renamed to `path` at the end of the
    block.

    The folder is made where it is missing. Where the block fails nothing is left, and a file that
    was there stays. Raises FileError.
    """
    path = Path(path)
    partial = name_beside(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            sync(partial)
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def write_whole(path: str | Path, data: bytes | str) -> None:
    """`data` (bytes, or text, written as UTF-8) as a file that is whole or absent.

    Raises FileError.
    """
    with whole_file(path) as partial:
        partial.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)


def write_beside(folder: str | Path, files: dict[str, bytes]) -> str:
    """Write `files` ({name: bytes}) whole, and no other file over; returns what their names end in.

    That is "" or, where a file that is not the same has one of the names, "-2", "-3", ... for all.
    Raises FileError.
    """
    def places(mark):
        return {Path(folder, f"{Path(name).stem}{mark}{Path(name).suffix}"): data
                for name, data in files.items()}

    marks = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    mark = next(mark for mark in marks if not any(path.is_file() and path.read_bytes() != data
                                                  for path, data in places(mark).items()))
    for path, data in places(mark).items():
        write_whole(path, data)
    return mark


def save_png(image: Image.Image, path: str | Path) -> None:
    """A PIL image as a PNG file that is whole or absent. Raises FileError."""
    with whole_file(path) as partial:
        image.save(partial, format="PNG")


@contextlib.contextmanager
def whole_folder(path: str | Path, old: Path | None = None) -> Iterator[Path]:
    """A new folder to fill, which is flushed and takes the place of `path` at the end of the block.

    A folder that is there already goes, by way of the name `old`, where a kill between two renames
    would leave it. Where the block fails nothing is left, and a folder that was there stays. Raises
    FileError.
    """
    path = Path(path)
    partial = name_beside(path)
    with writing(path):
        try:
            partial.mkdir(parents=True)
            yield partial
            for file in partial.rglob("*"):
                sync(file)
            put_in_place(partial, path, old or name_beside(path))
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def put_in_place(partial: Path, final: Path, old: Path) -> None:
    """Rename a folder; one that has the name already gives way in one more rename."""
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    partial.rename(final)
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def name_beside(path: Path) -> Path:
    """A name that no other job has, in the same folder."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def home_folder() -> Path | None:
    """The user's home, or None where there is none, as for a container's nameless user."""
    with contextlib.suppress(RuntimeError):
        return Path.home()
    return None


def sweep(folder: str | Path, age: float = 0.0) -> None:
    """Remove what kills have left half-written in `folder` and the folders within, if it is `age`
    seconds old.

    A folder that other jobs may write to needs an `age`; theirs is younger.
    """
    for path in [path for path in Path(folder).rglob(".*.partial") if LEFT.fullmatch(path.name)]:
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime >= age:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

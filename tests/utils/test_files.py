"""Files and folders are whole or absent, whoever else writes them at the same time."""

import errno
import os
import threading
from functools import partial

import pytest
import torch

from dbcore.datasets.store import TensorStore
from dbcore.utils.files import (
    FileError,
    save_png,
    sweep,
    whole_file,
    whole_folder,
    write_whole,
    writing,
)

FULL = OSError(errno.ENOSPC, "No space left on device")


def listed(folder):
    return sorted(path.name for path in folder.iterdir())


def fill(folder, text):
    folder.mkdir(exist_ok=True)
    (folder / "note.txt").write_text(text)


def test_a_block_that_fails_leaves_what_was_there(tmp_path):
    write_whole(tmp_path / "a.txt", "before")
    fill(tmp_path / "b", "before")
    for block, name in ((whole_file, "a.txt"), (whole_folder, "b")):
        with pytest.raises(KeyboardInterrupt), block(tmp_path / name) as partial:  # noqa: PT012
            if block is whole_file:
                partial.write_text("half")
            raise KeyboardInterrupt
    assert listed(tmp_path) == ["a.txt", "b"]
    assert (tmp_path / "a.txt").read_text() == (tmp_path / "b" / "note.txt").read_text() == "before"


def test_a_folder_takes_the_place_of_another_and_no_neighbour(tmp_path):
    fill(tmp_path / "b", "before")
    for neighbour in ("b.old", "b.partial"):
        fill(tmp_path / neighbour, "mine")
    with whole_folder(tmp_path / "b") as partial:
        (partial / "new.txt").write_text("new")
    assert listed(tmp_path) == ["b", "b.old", "b.partial"]
    assert listed(tmp_path / "b") == ["new.txt"]
    assert (tmp_path / "b.old" / "note.txt").read_text() == (tmp_path / "b.partial"
                                                             / "note.txt").read_text() == "mine"


def test_two_jobs_write_one_name_at_once(tmp_path):
    both, failed = threading.Barrier(2, timeout=5), []

    def write(text):
        try:
            with whole_file(tmp_path / "a.txt") as partial:
                both.wait()  # both are inside
                partial.write_text(text)
                both.wait()
        except BaseException as error:  # noqa: BLE001 - reported by the assertion
            failed.append(error)

    jobs = [threading.Thread(target=write, args=(text,)) for text in ("one", "two")]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert not failed
    assert listed(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() in ("one", "two")


def test_what_the_system_refuses_names_the_place(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FileError, match=r"file/a.txt cannot be written to: File exists"):
        write_whole(tmp_path / "file" / "a.txt", "x")
    with pytest.raises(FileError, match=r"X cannot be written to: No space left on device. "
                       r"Free some space"), writing("X"):
        raise FULL


@pytest.mark.parametrize("error", [OSError("a library's words"),
                                   ConnectionRefusedError(111, "refused")], ids=repr)
def test_what_is_no_fault_of_the_disk_passes(error):
    with pytest.raises(type(error)) as caught, writing("X"):
        raise error
    assert caught.value is error


def test_only_what_kills_have_left_is_swept(tmp_path):
    for name in (".a.png.0123abcd.partial", "mine.partial", ".a.png.partial"):
        (tmp_path / name).write_text("x")
    fill(tmp_path / ".checkpoint-3.0123abcd.partial", "half")
    sweep(tmp_path, age=60)
    assert len(listed(tmp_path)) == 4  # another job may be writing them
    sweep(tmp_path)
    assert listed(tmp_path) == [".a.png.partial", "mine.partial"]


def test_an_image_is_a_png_under_its_whole_name(tmp_path):
    from PIL import Image

    save_png(Image.new("RGB", (2, 2)), tmp_path / "new" / "a.png")
    assert listed(tmp_path / "new") == ["a.png"]
    assert Image.open(tmp_path / "new" / "a.png").format == "PNG"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux's full device")
def test_a_full_folder_of_temporary_files_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("tempfile.TemporaryFile", partial(open, "/dev/full", "r+b", buffering=0))
    with pytest.raises(FileError,
                       match=f"temporary files \\({tmp_path}; TMPDIR names another.*No space left"):
        TensorStore().put("x", {"a": torch.zeros(10)})

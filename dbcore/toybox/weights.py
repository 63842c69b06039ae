"""What the stages have learnt, in files small enough to be sent, and back as checkpoints."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from dbcore.utils.files import whole_file, write_whole

PART = 15 * 2**20  # bytes a file


@contextmanager
def weights_kept(work: Path, folder: Path | None, every: float = 60.0) -> Iterator[None]:
    """Take up the weights in `folder` at the start, and write those of the newest checkpoints.

    Every so many seconds and at the end: a machine lent by the minute may be gone before.
    """
    if folder is None:
        yield
        return

    def write():
        while not done.wait(every):
            write_weights(work, folder)

    read_weights(folder, work)
    done, thread = threading.Event(), threading.Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        write_weights(work, folder)


def write_weights(work: Path, folder: Path) -> list[Path]:
    """The weights of all checkpoints in `work`, in half precision, as files `weights.00` and so on.

    They are of at most `PART` bytes each.
    """
    held = {path.stem: halved(torch.load(path, map_location="cpu", weights_only=True))
            for path in sorted(work.glob("*.pt"))}
    buffer = io.BytesIO()
    torch.save(held, buffer)
    data = buffer.getvalue()
    parts = [folder / f"weights.{k:02d}" for k in range(-(-len(data) // PART))]
    for k, part in enumerate(parts):
        write_whole(part, data[k * PART:(k + 1) * PART])
    return parts


def halved(state: dict) -> dict:
    """A checkpoint of `fit` without its optimizers, of the averaged weights if there are any."""
    average = state["average"] is not None
    weights = {name: value.half() if value.is_floating_point() else value
               for name, value in (state["average"] if average else state["module"]).items()}
    return {"module": weights, "average": weights if average else None, "optimizers": [],
            "step": state["step"], "seconds": state["seconds"]}


def read_weights(folder: Path, work: Path) -> None:
    """Put what `write_weights` wrote into `work` as checkpoints; those that are there stay."""
    parts = sorted(folder.glob("weights.[0-9][0-9]"))
    if not parts:
        return
    held = torch.load(io.BytesIO(b"".join(part.read_bytes() for part in parts)), weights_only=True)
    for stage, state in held.items():
        path = work / f"{stage}.pt"
        if not path.exists():
            with whole_file(path) as partial:
                torch.save(state, partial)

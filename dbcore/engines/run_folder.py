"""A run's folder: one run at a time writes to it, and a run in it goes only when its successor's
LoRA stands.

A run that replaces another is written to `replacement/` within the folder. Once its LoRA and report
are there, that is renamed to `.finished` and takes the other's place; cut short on the way, the
next run in the folder completes it.
"""

import contextlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from filelock import FileLock, Timeout  # comes with torch

from dbcore.config import ConfigError, TrainConfig, full_paths, write_yaml
from dbcore.engines.checkpoint import checkpoints
from dbcore.models.embeddings import EMBEDS_NAME
from dbcore.utils.files import sweep, write_whole

LORA_FILE = "pytorch_lora_weights.safetensors"
LOG = "log.jsonl"
# by a run, beside its LoRA and checkpoints
WRITTEN = (LOG, EMBEDS_NAME, "README.md", "training.gif", "validation", "report")
REPLACEMENT, FINISHED = "replacement", ".finished"
LOCK, HOLDER = ".lock", ".running"


@contextlib.contextmanager
def held(folder: str | Path) -> Iterator[None]:
    """Keep other runs out of a folder, which is made if need be.

    Raises ConfigError that says which run has it.
    """
    folder = Path(folder)
    lock, is_new = FileLock(folder / LOCK), not folder.exists()
    try:
        with writable(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
            write_whole(folder / HOLDER, f"process {os.getpid()} on {socket.gethostname()}, "
                        f"since {time.ctime()}\n")
    except Timeout:
        raise ConfigError(f"--output_dir {folder} is being written to by another run "
                          f"({holder(folder)}): wait for it, or choose another folder") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            (folder / HOLDER).unlink()
            # while it is held, so that nobody waits at a name that is gone
            (folder / LOCK).unlink()
        lock.release()
        if is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()  # nothing was written


def holder(folder: Path) -> str:
    with contextlib.suppress(OSError):
        return (folder / HOLDER).read_text(encoding="utf-8").strip()
    return "it does not say which"


@contextlib.contextmanager
def writable(folder: str | Path) -> Iterator[None]:
    """Within it, what the file system refuses is a ConfigError that names the option."""
    try:
        yield
    except Timeout:
        raise
    except OSError as error:
        reason = getattr(error, "reason", error.strerror)
        raise ConfigError(f"--output_dir {folder} cannot be written to: {reason}") from None


def holds_run(folder: Path) -> bool:
    return (folder / LORA_FILE).exists() or bool(checkpoints(folder))


def read_log(folder: str | Path) -> list[dict[str, Any]]:
    """The records of a run's log.jsonl, one a step; none where there is no such file."""
    path, records = Path(folder) / LOG, []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):  # a line that a kill cut short
            records.append(json.loads(line))
    return records


def home(output_dir: str | Path) -> Path:
    """Where the run to go on with is: in `replacement`, once that has a checkpoint, else in the
    folder itself."""
    replacement = Path(output_dir) / REPLACEMENT
    return replacement if checkpoints(replacement) else Path(output_dir)


def goes_on(folder: str | Path, resume: Path | None) -> bool:
    """Whether `resume` (a checkpoint's folder, or None) is of the very run in a folder."""
    return resume is not None and resume.parent.resolve() == Path(folder).resolve()


def place(output_dir: str | Path, resume: Path | None) -> Path:
    """Where a run writes, given the checkpoint that it goes on from, or None."""
    folder = Path(output_dir)
    if goes_on(folder, resume) or not holds_run(folder):
        return folder
    return folder / REPLACEMENT


def prepare_folder(config: TrainConfig, accelerator: Accelerator, resume: Path | None,
                   folder: Path) -> None:
    """The run's folder with its config.yaml, and nothing of an earlier run unless it is gone on
    with."""
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        with writable(folder):
            folder.mkdir(parents=True, exist_ok=True)
            sweep(folder)
            if not goes_on(folder, resume):
                clear(folder)
            write_yaml(full_paths(config), folder / "config.yaml")
    accelerator.wait_for_everyone()


def clear(folder: Path) -> None:
    """Take an earlier run away; never what no run wrote."""
    for path in folder.glob("checkpoint-*"):
        if re.fullmatch(r"checkpoint-\d+(\.old)?", path.name):
            shutil.rmtree(path)
    for name in (LORA_FILE, *WRITTEN):
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        else:
            (folder / name).unlink(missing_ok=True)


def replace_run(output_dir: str | Path) -> Path:
    """Let a finished replacement take the earlier run's place; returns the folder."""
    folder = Path(output_dir)
    (folder / REPLACEMENT).rename(folder / FINISHED)
    complete(folder)
    return folder


def complete(folder: str | Path) -> None:
    """Move what a finished replacement wrote into the folder, the earlier run's files away
    before."""
    finished = Path(folder) / FINISHED
    if (finished / LORA_FILE).is_file():
        clear(Path(folder))
    if finished.is_dir():
        # after it, nothing is cleared
        for path in sorted(finished.iterdir(), key=lambda path: path.name != LORA_FILE):
            os.replace(path, Path(folder) / path.name)
        finished.rmdir()

"""Checkpoints that are whole or absent: written beside their name, flushed, checked, renamed.

checkpoint-50/  pytorch_lora_weights.safetensors   a stock pipeline loads it
                training.pt                        weights, their running mean, optimizer, scaler
                state.json                         step, circumstances, a digest of each file
training.pt is read with `weights_only`, so that nothing in it can run a program.
"""

import hashlib
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from dbcore.config import ConfigError, need
from dbcore.engines.trained import Trained, copy_all
from dbcore.models.peft_adapters import save_adapter
from dbcore.models.reading import first_line
from dbcore.utils.files import FileError, whole_folder

STATE, TRAINING = "state.json", "training.pt"
# of an optimizer; the rate is set at each step, the rest is its own
OPTIONS = ("betas", "eps", "weight_decay")


class CheckpointError(ConfigError):
    """A checkpoint that cannot be written, or cannot be gone on from."""


def checkpoints(output_dir: str | Path) -> list[tuple[int, Path]]:
    """[(step, folder)] of the whole checkpoints in a run's folder, oldest first.

    `.old` is one that a kill kept from being replaced; where its successor stands, that one counts.
    """
    found = {int(match[1]): path
             for path in sorted(Path(output_dir).glob("checkpoint-*"), reverse=True)
             if (match := re.fullmatch(r"checkpoint-(\d+)(\.old)?", path.name))
             and (path / STATE).is_file()}
    return sorted(found.items())


def find_checkpoint(output_dir: str | Path, which: str) -> Path | None:
    """The folder that `--resume_from_checkpoint` means, or None for `latest` where there is none
    yet.

    Raises CheckpointError for a folder that is no checkpoint.
    """
    if which == "latest":
        there = [path for _, path in reversed(checkpoints(output_dir))]
        sound = next((path for path in there if is_sound(path)), None)
        if there and not sound:
            raise CheckpointError("--resume_from_checkpoint latest: "
                                  f"every checkpoint in {output_dir} is damaged; choose another "
                                  "--output_dir, or --overwrite_output_dir to start anew")
        return sound
    for path in (Path(which), Path(output_dir) / which):
        if (path / STATE).is_file():
            if not is_sound(path):
                raise CheckpointError(f"--resume_from_checkpoint {which} is damaged: "
                                      "a file in it is not what was saved; "
                                      "give an earlier one, or latest")
            return path
    have = ", ".join(path.name for _, path in checkpoints(output_dir)) or "none"
    raise CheckpointError(f"--resume_from_checkpoint {which}: no such checkpoint (in "
                          f"{output_dir}: {have}); give one of them, or latest")


def last_good(output_dir: str | Path) -> str:
    """Words on what is left to go on from."""
    there = checkpoints(output_dir)
    return f"{there[-1][1].name} is intact" if there else "No checkpoint was written before"


def steps_done(folder: Path) -> int:
    """The steps that a checkpoint's run had done, whatever the folder is called."""
    return read_state(folder)["step"]


def circumstances_of(folder: Path) -> dict[str, Any]:
    """What a checkpoint's run depended on beside its options (`resume.circumstances`)."""
    return read_state(folder)["circumstances"]


def read_state(folder: Path) -> dict[str, Any]:
    """A checkpoint's state.json. Raises CheckpointError for one of an earlier version's."""
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    if TRAINING not in state["sha256"]:
        raise CheckpointError(f"{folder} was saved by an earlier version of dbcore, which wrote "
                              f"no {TRAINING}: start anew, with another --output_dir or "
                              "--overwrite_output_dir")
    return state


def is_sound(folder: Path) -> bool:
    """Whether every file is there and is what was saved."""
    try:
        digests = json.loads((folder / STATE).read_text(encoding="utf-8"))["sha256"]
        return all(digest_of(folder / name) == digest for name, digest in digests.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def digest_of(path: Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def save_checkpoint(output_dir: str | Path, trained: Trained, notes: dict[str, str],
                    circumstances: dict[str, Any], limit: int | None = None) -> None:
    """Write checkpoint-<step>, then remove the oldest beyond `limit`.

    `trained`: `Trained`. `notes`: texts in the LoRA's file. `circumstances`: see
    `resume.circumstances`. Raises CheckpointError if the disk is full or read-only; the checkpoints
    before it stand untouched.
    """
    step = trained.step
    final = Path(output_dir) / f"checkpoint-{step}"
    try:
        with whole_folder(final, final.with_name(final.name + ".old")) as partial:
            (partial / TRAINING).write_bytes(training_state(trained))
            with trained.averaged():
                save_adapter(trained.modules, partial / "pytorch_lora_weights.safetensors", notes)
            digests = {path.name: digest_of(path) for path in sorted(partial.iterdir())}
            state = {"step": step, "seconds": trained.seconds, "circumstances": circumstances,
                     "sha256": digests}
            (partial / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
    except FileError as error:
        raise CheckpointError(f"checkpoint-{step} could not be written to {output_dir}: "
                              f"{error.reason}. {last_good(output_dir)}; free some space or check "
                              "the folder's permissions, "
                              "then --resume_from_checkpoint latest") from error
    for _, old in checkpoints(output_dir)[: -limit if limit else 0]:
        remove(old)


def remove(folder: Path) -> None:
    """Take a checkpoint away; killed half-way, what is left is none."""
    (folder / STATE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def training_state(trained: Trained) -> bytes:
    """The bytes of training.pt."""
    file = io.BytesIO()  # written by ourselves: torch.save hides what a full disk says
    torch.save({"weights": [p.detach() for p in trained.parameters], "mean": trained.mean,
                "optimizer": trained.optimizer.state_dict(),
                "scaler": trained.scaler.state_dict()}, file)
    return file.getvalue()


def load_checkpoint(folder: Path, trained: Trained) -> None:
    """Give a `Trained`, set up as it was, what a checkpoint holds.

    Raises CheckpointError if it cannot be read, or the LoRA there is of another shape.
    """
    state = read_state(folder)
    try:
        saved = torch.load(folder / TRAINING, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - what was changed by hand fails in many ways
        raise CheckpointError(f"{folder} cannot be read ({first_line(error)}): give an earlier "
                              "checkpoint") from None
    if [w.shape for w in saved["weights"]] != [p.shape for p in trained.parameters]:
        raise CheckpointError(f"{folder.name} holds a LoRA of another shape: give the rank, "
                              "lora_layers and train_text_encoder that it was trained with (they "
                              "are in config.yaml)")
    copy_all(saved["weights"], trained.parameters)
    if trained.mean is not None:
        need(saved["mean"], f"{folder.name} was saved without --use_ema: resume it without, or "
             "start anew")
        copy_all(saved["mean"], trained.mean)
    load_optimizer(trained.optimizer, saved["optimizer"])
    if saved["scaler"]:  # empty unless it was saved in fp16
        trained.scaler.load_state_dict(saved["scaler"])
    trained.step, trained.seconds = state["step"], state["seconds"]


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Give it what it had gathered; its options stay this run's, for those may have changed."""
    options = [{name: group[name] for name in OPTIONS if name in group}
               for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, options):
        group.update(own)

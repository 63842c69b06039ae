"""Checkpoints that are whole or absent: written beside their name, flushed, checked, renamed.

checkpoint-50/  pytorch_lora_weights.safetensors   a stock pipeline loads it
                training.safetensors               weights, their running mean, the optimizer's
                                                   tensors
                state.json                         step, the optimizer's numbers, a digest of each
                                                   file
No pickle anywhere: safetensors and JSON cannot run a program.
"""

import contextlib
import hashlib
import json
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from dbcore.config import ConfigError, need
from dbcore.models.lora import save_lora
from dbcore.utils.files import FileError, whole_folder

STATE, TRAINING = "state.json", "training.safetensors"
# of an optimizer; the rate is set at each step, the rest is its own
OPTIONS = ("betas", "eps", "weight_decay")


class CheckpointError(ConfigError):
    """A checkpoint that cannot be written, or cannot be gone on from."""


def checkpoints(output_dir):
    """[(step, folder)] of the whole checkpoints in a run's folder, oldest first.

    `.old` is one that a kill kept from being replaced; where its successor stands, that one counts.
    """
    found = {int(match[1]): path
             for path in sorted(Path(output_dir).glob("checkpoint-*"), reverse=True)
             if (match := re.fullmatch(r"checkpoint-(\d+)(\.old)?", path.name))
             and (path / STATE).is_file()}
    return sorted(found.items())


def find_checkpoint(output_dir, which):
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


def last_good(output_dir):
    """Words on what is left to go on from."""
    there = checkpoints(output_dir)
    return f"{there[-1][1].name} is intact" if there else "No checkpoint was written before"


def steps_done(folder):
    """The steps that a checkpoint's run had done, whatever the folder is called."""
    return json.loads((folder / STATE).read_text(encoding="utf-8"))["step"]


def circumstances_of(folder):
    """What a checkpoint's run depended on beside its options, {} in those from before that was
    noted."""
    return json.loads((folder / STATE).read_text(encoding="utf-8")).get("circumstances", {})


def is_sound(folder):
    """Whether every file is there and is what was saved."""
    try:
        digests = json.loads((folder / STATE).read_text(encoding="utf-8"))["sha256"]
        return all(digest_of(folder / name) == digest for name, digest in digests.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def digest_of(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def save_checkpoint(output_dir, trained, notes, circumstances, limit=None):
    """Write checkpoint-<step>, then remove the oldest beyond `limit`.

    `trained`: `Trained`. `notes`: texts in the LoRA's file. `circumstances`: see
    `resume.circumstances`. Raises CheckpointError if the disk is full or read-only; the checkpoints
    before it stand untouched.
    """
    step = trained.step
    final = Path(output_dir) / f"checkpoint-{step}"
    try:
        with whole_folder(final, final.with_name(final.name + ".old")) as partial:
            numbers = write_training(partial / TRAINING, trained)
            with trained.averaged():
                save_lora(trained.modules, partial / "pytorch_lora_weights.safetensors", notes)
            digests = {path.name: digest_of(path) for path in sorted(partial.iterdir())}
            state = {"step": step, **numbers, "circumstances": circumstances, "sha256": digests}
            (partial / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
    except FileError as error:
        raise CheckpointError(f"checkpoint-{step} could not be written to {output_dir}: "
                              f"{error.reason}. {last_good(output_dir)}; free some space or check "
                              "the folder's permissions, "
                              "then --resume_from_checkpoint latest") from error
    for _, old in checkpoints(output_dir)[: -limit if limit else 0]:
        remove(old)


def remove(folder):
    """Take a checkpoint away; killed half-way, what is left is none."""
    (folder / STATE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def write_training(path, trained):
    """The tensors of weights, mean and optimizer; returns what is left, numbers for state.json."""
    tensors = {f"weight.{i}": p.detach() for i, p in enumerate(trained.parameters)}
    tensors |= {f"mean.{i}": m for i, m in enumerate(trained.mean or [])}
    kept = {}
    for index, parameter in enumerate(trained.parameters):
        # bitsandbytes' state_dict wraps its tensors
        for name, value in trained.optimizer.state.get(parameter, {}).items():
            if torch.is_tensor(value):
                tensors[f"optimizer.{index}.{name}"] = value
            else:
                kept[f"{index}.{name}"] = value
    groups = [{k: v for k, v in group.items() if plain(v)}
              for group in trained.optimizer.state_dict()["param_groups"]]
    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    path.write_bytes(save(whole))
    return {"optimizer": {"state": kept, "param_groups": groups},
            "scaler": trained.scaler.state_dict(),
            "seconds": trained.seconds}


def plain(value):
    with contextlib.suppress(TypeError, ValueError):
        return json.loads(json.dumps(value)) == value or isinstance(value, tuple)
    return False


def load_checkpoint(folder, trained):
    """Give a `Trained`, set up as it was, what a checkpoint holds.

    Raises CheckpointError if it cannot be read, or the LoRA there is of another shape.
    """
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        tensors = load((folder / TRAINING).read_bytes())
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be read ({error}): "
                              "give an earlier checkpoint") from None
    shapes = [tuple(tensors[f"weight.{i}"].shape)
              for i in range(sum(k.startswith("weight.") for k in tensors))]
    if shapes != [tuple(p.shape) for p in trained.parameters]:
        raise CheckpointError(f"{folder.name} holds a LoRA of another shape: give the rank, "
                              "lora_layers and train_text_encoder that it was trained with (they "
                              "are in config.yaml)")
    for i, parameter in enumerate(trained.parameters):
        parameter.data.copy_(tensors[f"weight.{i}"])
    if trained.mean is not None:
        need("mean.0" in tensors,
             f"{folder.name} was saved without --use_ema: resume it without, or start anew")
        for i, mean in enumerate(trained.mean):
            mean.copy_(tensors[f"mean.{i}"])
    load_optimizer(trained.optimizer, optimizer_state(state["optimizer"], tensors))
    if state["scaler"]:  # empty unless it was saved in fp16
        trained.scaler.load_state_dict(state["scaler"])
    trained.step, trained.seconds = state["step"], state["seconds"]


def load_optimizer(optimizer, state):
    """Give it what it had gathered, and leave it the options of this run: those may have been
    changed."""
    options = [{name: group[name] for name in OPTIONS if name in group}
               for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, options):
        group.update(own)


def optimizer_state(numbers, tensors):
    """The optimizer's state_dict, put together again."""
    state = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, entry = name.split(".", 2)
            state.setdefault(int(index), {})[entry] = tensor
    for name, value in numbers["state"].items():
        index, entry = name.split(".", 1)
        state.setdefault(int(index), {})[entry] = value
    return {"state": state, "param_groups": numbers["param_groups"]}

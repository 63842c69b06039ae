"""What a resumed run shares with its first part: checked, and every difference said before it goes
on."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dbcore.config import AUTO, TrainConfig, full_paths, need, read_yaml
from dbcore.datasets.photos import Photo
from dbcore.engines.checkpoint import circumstances_of, find_checkpoint, steps_done
from dbcore.engines.run_folder import LORA_FILE, WRITTEN, goes_on, holds_run, home, place
from dbcore.models.fingerprint import fingerprint

Say = Callable[[str], None]
# What cannot change; other changes are allowed and named.
SHAPE = ("pretrained_model_name_or_path", "adapter", "rank", "lora_layers", "use_dora",
         "use_rslora", "use_tlora", "tlora_alpha",
         "lora_alpha", "optimizer",
         "train_text_encoder", "text_encoder_rank", "train_text_encoder_ti", "token_abstraction",
         "num_new_tokens_per_abstraction", "initializer_concept", "use_ema", "seed")
FREE = {"output_dir", "resume_from_checkpoint", "overwrite_output_dir", "max_train_steps",
        "num_train_epochs",
        "validation_prompt", "num_validation_images", "validation_steps", "validation_epochs",
        "num_report_images",
        "report_to", "logging_dir", "checkpointing_steps", "checkpoints_total_limit", "push_to_hub",
        "hub_model_id", "hub_token"}
BY_CONTENT = {"pretrained_model_name_or_path", "revision", "variant", "instance_data_dir",
              "class_data_dir"}
DIFFERS = "the rest of the run differs from an uninterrupted one."


def find_resume(config: TrainConfig, say: Say) -> Path | None:
    """The checkpoint's folder to go on from, or None.

    Raises ConfigError for a LoRA of another shape, and for a folder with another run in it.
    """
    folder, resume = Path(config.output_dir), None
    if config.resume_from_checkpoint:
        resume = find_checkpoint(home(folder), config.resume_from_checkpoint)
    if resume is not None:
        compare(config, resume, say)
    if not goes_on(place(folder, resume), resume):
        refuse_taken(folder, config.overwrite_output_dir)
    return resume


def refuse_taken(folder: Path, overwrite: bool) -> None:
    """Raises ConfigError for a folder with another run in it, or with someone's own files."""
    need(overwrite or not holds_run(folder),
         f"--output_dir {folder} holds a run already: choose another folder, give "
         "--resume_from_checkpoint latest to go on with it, or --overwrite_output_dir to replace "
         "it")
    theirs = [name for name in WRITTEN if (folder / name).exists()]
    need((folder / "config.yaml").is_file() or not theirs,
         f"--output_dir {folder} is not the folder of a run, and its {', '.join(theirs)} would be "
         "overwritten: choose another folder")


def is_finished(config: TrainConfig, resume: Path) -> bool:
    """Whether a checkpoint has all the steps of `config`, and their LoRA and report stand."""
    folder = Path(config.output_dir)
    stands = (folder / LORA_FILE).is_file() and (folder / "README.md").is_file()
    return stands and goes_on(folder, resume) and steps_done(resume) >= config.max_train_steps


def circumstances(config: TrainConfig, photos: list[Photo], class_photos: list[Photo],
                  processes: int) -> dict[str, Any]:
    """All that a run depends on beside its options, for state.json: weights, photos, processes, and
    its length."""
    return {
        "base": fingerprint(config.pretrained_model_name_or_path, config.revision, config.variant),
        "photos": contents(photos, config.instance_data_dir),
        "class photos": contents(class_photos),
        "processes": processes, "steps": config.max_train_steps,
    }


def contents(photos: list[Photo], folder: str | None = None) -> dict[str, str]:
    """{a photo's name, within `folder`: a digest of its file, its caption and its mask}."""
    names = [os.path.relpath(photo.path, folder) if folder else photo.path.name for photo in photos]
    return {name: digest(photo) for name, photo in zip(names, photos)}


def digest(photo: Photo) -> str:
    files = [path.read_bytes() for path in (photo.path, photo.mask_path) if path]
    parts = [hashlib.sha256(part).digest() for part in [*files, (photo.caption or "").encode()]]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def compare(config: TrainConfig, resume: Path, say: Say) -> None:
    """Refuse to resume on another base, or a LoRA of another shape; name every other option that
    has changed.

    `resume`: a checkpoint's folder. The base is compared by its weights, photos by their contents
    (`say_changes`), so that both may lie elsewhere now.
    """
    path = resume.parent / "config.yaml"
    before, known = read_yaml(path, TrainConfig) if path.is_file() else {}, circumstances_of(resume)
    base = config.pretrained_model_name_or_path
    own = fingerprint(base, config.revision, config.variant)
    need(known["base"] == own, f"--pretrained_model_name_or_path {base}: its weights are not those "
         f"that {resume.name} was trained on (they were "
         f"{before.get('pretrained_model_name_or_path')}): give that base, its --revision and "
         "--variant, or another --output_dir")
    now = full_paths(config)
    for name, value in before.items():
        if name in FREE | BY_CONTENT or AUTO in (value, getattr(now, name)):
            continue
        if value != getattr(now, name):
            words = f"--{name} was {value!r} in the run to resume and is {getattr(now, name)!r} now"
            need(name not in SHAPE, f"{words}: give what it was, or another --output_dir")
            say(f"{words}: {DIFFERS}")


def say_changes(before: dict[str, Any], now: dict[str, Any], config: TrainConfig,
                say: Say) -> None:
    """A line for each change between two `circumstances`."""
    for kind in ("photos", "class photos"):
        if words := difference(before[kind], now[kind]):
            say(f"The {kind} are not those of the run to resume ({words}): {DIFFERS}")
    if before["processes"] != now["processes"]:
        say(f"The number of processes was {before['processes']} in the run to resume and is "
            f"{now['processes']} now, so a step takes other photos unless --train_batch_size makes "
            f"up for it: {DIFFERS}")
    depends = [f"--{name} {getattr(config, name)}" for name, alike in (
        ("lr_scheduler", ("constant", "constant_with_warmup")), ("train_text_encoder_frac", (1,)),
        ("train_text_encoder_ti_frac", (1, AUTO)))
        if getattr(config, name) not in alike]
    if before["steps"] != now["steps"] and depends:
        say(f"The run to resume was to have {before['steps']} steps and has "
            f"{now['steps']} now, on which {' and '.join(depends)} depends: {DIFFERS}")


def difference(before: dict[str, str], now: dict[str, str]) -> str:
    """"2 added (a.png, b.png), 1 changed (c.png)" of two {name: digest}, "" where they are the
    same."""
    kinds = {"added": now.keys() - before.keys(), "taken away": before.keys() - now.keys(),
             "changed": {name for name in before.keys() & now.keys() if before[name] != now[name]}}
    return ", ".join(f"{len(names)} {kind} "
                     f"({', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''})"
                     for kind, names in kinds.items() if names)

"""The main job from beginning to end: five photos in, a LoRA and one image that shows it out.

It trains through the same config and functions as `python -m dbcore train`, with prior
preservation, at the base's recommended settings, and then generates the same prompts and seeds
without and with the LoRA.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dbcore
from dbcore.utils.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

    from dbcore.config import TrainConfig

HELP = "teach the toy base a subject that ships with dbcore, and show it before and after"
PLACES = ("in the snow", "on the beach", "swimming in water")  # none of them is in the photos
SEEDS = 3  # images of one prompt
CLASS_IMAGES = 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--subject", default="dog",
                        help="a subject that ships with dbcore (%(default)s), "
                        "or a folder made like one")
    parser.add_argument("--pretrained_model_name_or_path", default=str(dbcore.TOY_BASE),
                        metavar="BASE", help="the base to teach; the toy base if not given")
    parser.add_argument("--max_train_steps", type=int, default=150,
                        help="training steps (%(default)s)")
    parser.add_argument("--output_dir", type=Path, default=Path("work_dirs/quickstart"),
                        help="where the LoRA and before_after.png go (%(default)s)")
    parser.add_argument("--overwrite_output_dir", action="store_true",
                        help="replace another run that is there")
    parser.add_argument("--seed", type=int, default=1,
                        help="of training and of the first image (%(default)s)")


def main(args: argparse.Namespace) -> None:
    folder, subject = read_subject(args.subject)
    prompts = prompts_for(subject)
    started = time.perf_counter()
    lora = learn(args, folder, subject)
    learned = time.perf_counter()
    before, after = images_of(args, prompts), images_of(args, prompts, lora)
    grid = save_before_after(args.output_dir / "before_after.png", folder, prompts, before, after)
    generated = time.perf_counter()
    print(f"Done: {subject['instance_prompt']!r} was learned from the photos in {shown(folder)}, "
          f"in {args.max_train_steps} steps.")
    print(f"Time: {learned - started:.0f} s to learn, class images and report included; "
          f"{generated - learned:.0f} s for {2 * SEEDS * len(prompts)} images before and after.")
    print(f"Look: {shown(grid)} (the LoRA: {shown(lora)}; did it learn: "
          f"{shown(lora.parent / 'README.md')}).")
    print("Next: --subject cat --output_dir work_dirs/cat, or your own photos (python -m dbcore "
          "train --help), or the course in notebooks/.")


def shown(path: str | Path) -> Path:
    """Relative to the working folder where it lies in it: short, and easy to open."""
    path = Path(path).absolute()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def read_subject(name: str) -> tuple[Path, dict[str, str]]:
    """(folder, the contents of its subject.json). Raises InputError with the names there are."""
    folder = Path(name) if (Path(name) / "subject.json").is_file() else dbcore.SUBJECTS / name
    path = folder / "subject.json"
    if not path.is_file():
        known = sorted(path.parent.name for path in dbcore.SUBJECTS.glob("*/subject.json"))
        raise InputError(f"--subject {name}: not there; choose one of {', '.join(known)}, "
                         "or a folder with photos and a subject.json like theirs")
    return folder, json.loads(path.read_text(encoding="utf-8"))


def learn(args: argparse.Namespace, folder: Path, subject: dict[str, str]) -> Path:
    """Train; returns the path of the LoRA file."""
    from dbcore.engines.trainer import train

    config = options(args, folder, subject)
    config.overwrite_output_dir = args.overwrite_output_dir or is_repeat(config)
    return train(config)


def options(args: argparse.Namespace, folder: Path, subject: dict[str, str]) -> TrainConfig:
    from dbcore.config import TrainConfig

    return TrainConfig(
        pretrained_model_name_or_path=args.pretrained_model_name_or_path,
        instance_data_dir=str(folder),
        instance_prompt=subject["instance_prompt"], class_prompt=subject["class_prompt"],
        with_prior_preservation=True, num_class_images=CLASS_IMAGES,
        max_train_steps=args.max_train_steps, output_dir=str(args.output_dir), seed=args.seed)


def is_repeat(config: TrainConfig) -> bool:
    """Whether the run in the folder is of these very options, so that nothing is lost when it is
    made again."""
    from dbcore.config import AUTO, TrainConfig, read_yaml

    path = Path(config.output_dir) / "config.yaml"
    if not path.is_file():
        return False
    before, ours = TrainConfig(**read_yaml(path, TrainConfig)), dataclasses.asdict(config)
    return all(value in (AUTO, None) or spelled(value) == spelled(getattr(before, name))
               for name, value in ours.items()
               if name not in ("output_dir", "overwrite_output_dir"))


def spelled(value: Any) -> str:
    """A value as text that is the same for one path, relative or absolute."""
    return os.path.abspath(str(value))


def prompts_for(subject: dict[str, str]) -> list[str]:
    """The subject as in its photos, in places no photo shows, and the class that was to be kept."""
    prompt = subject["instance_prompt"]
    return [prompt, *(f"{prompt} {place}" for place in PLACES), subject["class_prompt"]]


def images_of(args: argparse.Namespace, prompts: list[str],
              lora: Path | None = None) -> list[list[Image.Image]]:
    """One list of images a prompt, an image a seed."""
    from dbcore.config import GenerateConfig
    from dbcore.engines.sample import generate

    return generate(GenerateConfig(
        pretrained_model_name_or_path=args.pretrained_model_name_or_path, prompt=prompts,
        checkpoint_dir=[str(lora)] if lora else [], num_images=SEEDS, seed=args.seed))


def save_before_after(path: Path, folder: Path, prompts: list[str], before: list[list[Image.Image]],
                      after: list[list[Image.Image]]) -> Path:
    """The photos on top; under them a row a prompt, without the LoRA on the left and with it on the
    right."""
    from dbcore.datasets.photos import gather_photos
    from dbcore.utils.grids import save_grid

    photos = [photo.load() for photo in gather_photos(folder)[0][:2 * SEEDS - 1]]
    rows = [[None, *photos], *([*left, None, *right] for left, right in zip(before, after))]
    columns = [""] * (2 * SEEDS + 1)
    columns[SEEDS // 2], columns[SEEDS + 1 + SEEDS // 2] = "before", "after"
    return save_grid(path, rows, ["the photos it learned from", *prompts], columns, header=1)

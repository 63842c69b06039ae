"""What notebook 09 needs for photos of one's own: a plan, an identifier test, a check of the run,
an archive."""

import dataclasses
import json
import math
import shutil
import sys
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dbcore.config import AUTO, TrainConfig, read_run_config
from dbcore.course.notebook import describe_subject, find_base
from dbcore.datasets.photos import gather_photos
from dbcore.engines.advice import advise, flags
from dbcore.engines.run_folder import LORA_FILE, read_log
from dbcore.models.adapter import Adapter, LoraFileError
from dbcore.models.base import Family, best_precision
from dbcore.models.kohya import save_kohya
from dbcore.models.lora_files import read_adapter, save_diffusers
from dbcore.utils.files import whole_file
from dbcore.utils.grids import Picture, image_grid

DRIVE = Path("/content/drive")  # where Colab mounts it
BLACK = 8  # of 255: an image without a brighter pixel
SHEET_TITLE = ("in the last column: your subject with your word, and another without it?\n"
               "(single images jump from step to step)")

# --- which base, and how to begin with it ---------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """Where to begin with a base: steps, and options where the learner has given none."""

    title: str
    steps: int
    options: dict[str, Any] = field(default_factory=dict)
    needs_bf16: bool = False


# The best first. Steps as in diffusers' example for SDXL and peft's comparison for FLUX.2 [klein].
STARTS = {
    "black-forest-labs/FLUX.2-klein-base-4B": Start(
        "FLUX.2 [klein] 4B", 750, {"resolution": 512, "rank": 16, "train_batch_size": 2,
                                   "gradient_checkpointing": True}, needs_bf16=True),
    "stabilityai/stable-diffusion-xl-base-1.0": Start(
        "SDXL", 500, {"rank": 16, "gradient_checkpointing": True}),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": Start(
        "Stable Diffusion 1.5", 800, {"rank": 16}),
}  # fmt: skip
TOY, TOY_STEPS, OTHER = "toy_base", 60, Start("another base", 600, {"rank": 16})


def plan_run(config: TrainConfig, base: str = AUTO, steps: int = 0) -> TrainConfig:
    """`config` for a base and its number of steps, and one line on each base that was looked at.

    `base`: a name, or auto for the best that this machine's GPU holds by the memory forecast, which
    is the toy base where there is no GPU. `steps`: 0 for what the base wants.
    """
    plan = best_plan(config) if base == AUTO else begin(config, base)
    plan = dataclasses.replace(plan, max_train_steps=steps or plan.max_train_steps)
    print(f"{Path(plan.pretrained_model_name_or_path).name}, {plan.max_train_steps} steps.")
    return plan


def best_plan(config: TrainConfig) -> TrainConfig:
    """The plan for the first of `STARTS` that fits at its own resolution, else for the toy base."""
    if not torch.cuda.is_available():
        print("No GPU that PyTorch can use: the toy base.")
        return begin(config, TOY)
    memory = torch.cuda.get_device_properties(0).total_memory
    for name, start in STARTS.items():
        plan = begin(config, name)
        if start.needs_bf16 and best_precision("cuda") != "bf16":
            print(f"{start.title}: needs bf16, which this GPU has not.")
            continue
        changes = advise(plan, memory)
        if changes is not None and "resolution" not in changes:
            print(f"{start.title}: fits into {memory / 1e9:.0f} GB. {flags(changes)}".strip())
            return dataclasses.replace(plan, **changes)
        print(f"{start.title}: does not fit into {memory / 1e9:.0f} GB.")
    return begin(config, TOY)


def begin(config: TrainConfig, name: str) -> TrainConfig:
    """`config` with a base, its steps, and those of its options that nobody has chosen."""
    start = Start(name, TOY_STEPS) if name == TOY else STARTS.get(name, OTHER)
    default = TrainConfig()
    chosen = {option: value for option, value in start.options.items()
              if getattr(config, option) == getattr(default, option)}
    return dataclasses.replace(config, pretrained_model_name_or_path=find_base(name),
                               max_train_steps=start.steps, **chosen)


# --- look -----------------------------------------------------------------------------------------


def identifier_sheet(base: Family, words: Sequence[str], class_noun: str, count: int = 4,
                     seed: int = 0) -> Picture:
    """The class alone, then each word before the class: a rare one should change nothing but which
    individual is there."""
    prompts = [describe_subject(class_noun)["class_prompt"],
               *(describe_subject(class_noun, word)["instance_prompt"] for word in words)]
    seeds = [seed + k for k in range(count)]
    rows = [base.generate([prompt] * count, seeds) for prompt in prompts]
    return image_grid(rows, prompts, [f"seed {seed}" for seed in seeds], cell=0.9)


def validation_sheet(run: str | Path, number: int = 0) -> Picture:
    """A run's first photo, then its validation images: a row for a prompt, a column for a step;
    image `number` of each."""
    folders = sorted(Path(run).glob("validation/step-*"))
    config = read_run_config(run) or {}
    prompts, photos = config["validation_prompt"], gather_photos(config["instance_data_dir"])[0]
    left = [photos[0].load(), *[None] * (len(prompts) - 1)]
    rows = [[first, *(Image.open(folder / f"{row}-{number}.png") for folder in folders)]
            for row, first in enumerate(left)]
    steps = [f"step {int(folder.name.removeprefix('step-'))}" for folder in folders]
    return image_grid(rows, prompts, ["your subject", *steps], cell=0.9, title=SHEET_TITLE)


def examine_run(run: str | Path) -> list[str]:
    """What the folder of a run tells of its health, in lines: length, loss, options, images."""
    run = Path(run)
    config, log = read_run_config(run) or {}, read_log(run)
    done, asked = len(log), config.get("max_train_steps")
    lines = [f"steps: {done} of {asked}" + (", all of them" if done == asked else "; cut short")]
    sick = [record["step"] for record in log if not math.isfinite(record["loss"])]
    lines.append(f"loss: not a number at step {sick[0]}" if sick else "loss: a number at each step")
    rates = sorted({record["lr"] for record in log if "lr" in record})
    lines.append(f"learning rate: {config.get('learning_rate')} asked for, in force "
                 + " to ".join(f"{rate:g}" for rate in dict.fromkeys((*rates[:1], *rates[-1:]))))
    lines.append("in force: " + ", ".join(
        f"{name} {config.get(name)}" for name in ("resolution", "rank", "train_batch_size",
                                                  "mixed_precision")))
    return [*lines, black_images(run), verdict_of(run)]


def black_images(run: Path) -> str:
    images = sorted(run.glob("validation/step-*/[0-9]*-[0-9]*.png"))
    black = sum(np.asarray(Image.open(path)).max() < BLACK for path in images)
    return f"validation images: {len(images)}, {black} of them black"


def verdict_of(run: Path) -> str:
    """Whether the adapter changes images, as the run's own report has it."""
    card = run / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    _, _, after = text.partition("## Did it learn?")
    return "report: " + (after.strip().partition(":")[0] or "none, the run did not end")


# --- take it home ---------------------------------------------------------------------------------


def pack_run(run: str | Path, archive: str | Path, more: Iterable[str | Path] = ()) -> list[str]:
    """Write `archive`, a .zip of what is worth keeping of a run, and the files `more`; its
    names."""
    run = Path(run)
    found = [path for pattern in (LORA_FILE, "README.md", "config.yaml", "report/*",
                                  "validation/*/grid.png") for path in sorted(run.glob(pattern))]
    with whole_file(archive) as partial, zipfile.ZipFile(partial, "w") as file:
        for path in found:
            file.write(path, path.relative_to(run).as_posix())
        for path in map(Path, more):
            file.write(path, path.name)
        return file.namelist()


def for_other_tools(run: str | Path, path: str | Path, trigger_words: str) -> Path:
    """Write a run's LoRA as A1111, ComfyUI and Forge read it; the file shows `trigger_words`.

    In kohya's names, or in diffusers' where kohya has none (FLUX.2), which ComfyUI reads too.
    """
    config = read_run_config(run) or {}
    adapter = read_adapter(run, config.get("pretrained_model_name_or_path"))
    adapter = Adapter(adapter.layers, {**adapter.notes, "trigger_words": trigger_words})
    try:
        return save_kohya(adapter, path)
    except LoraFileError as words:
        print(words)
        return save_diffusers(adapter, path)


def mount_drive() -> Path | None:
    """Ask Google for the learner's Drive where this is Colab, and give its folder; else None."""
    if "google.colab" in sys.modules:
        from google.colab import drive

        drive.mount(str(DRIVE))
    return DRIVE / "MyDrive" if (DRIVE / "MyDrive").is_dir() else None


def keep(archive: str | Path, drive: Path | None = None) -> Path:
    """Copy a file to `drive`, or, on Colab without one, offer it for download; returns where it
    is."""
    archive = Path(archive)
    if drive is not None:
        (drive / "dbcore").mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy2(archive, drive / "dbcore" / archive.name))
    if "google.colab" in sys.modules:
        from google.colab import files

        files.download(str(archive))
    return archive


def write_subject(folder: str | Path, about: dict[str, str]) -> Path:
    """subject.json beside prepared photos, so that the other notebooks take the folder."""
    path = Path(folder) / "subject.json"
    path.write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path

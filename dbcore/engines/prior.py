"""Class images: what the base itself generates of the class, kept so that training cannot forget
it.

They are kept under a name made of everything they depend on (base, prompt, sampler, size, seed),
with a manifest that says so: images of another class or base are refused, never taken for these.
A folder of the user's own class photos has no manifest and is taken as it is.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image

from dbcore.config import ConfigError, TrainConfig
from dbcore.datasets.photos import Photo, Problem, find_photos, gather_photos
from dbcore.datasets.store import PromptCache
from dbcore.engines.processes import wait_for_all
from dbcore.models.base import Family, load_base, torch_dtype
from dbcore.models.replay import replayed
from dbcore.utils.console import progress
from dbcore.utils.files import home_folder, save_png, sweep, write_whole
from dbcore.utils.seeding import key

MANIFEST = "manifest.json"
BLANK = 2.0  # standard deviation in grey levels below which an image shows nothing
TRIES = 3
DAY = 86_400.0  # seconds after which no job can still be writing an image


def cache_dir() -> Path:
    """Where class images are kept: $DBCORE_CACHE, or the user's cache folder, or that of temporary
    files."""
    cache = os.environ.get("XDG_CACHE_HOME") or (home_folder()
                                                 or Path(tempfile.gettempdir())) / ".cache"
    return Path(os.environ.get("DBCORE_CACHE") or Path(cache, "dbcore")) / "class_images"


def gather_class(base: Family, config: TrainConfig, accelerator: Accelerator) -> list[Photo]:
    """Photos of the class for a run: the user's own, or images that are made now; [] without prior.

    Every process of the `accelerator` makes its share. What is wrong is said.
    """
    if not config.with_prior_preservation:
        return []
    folder = own_folder(config) or make_class_images(base, config, accelerator)
    photos, problems = class_photos(folder, config)
    for problem in problems:
        if problem.skipped:
            accelerator.print(f"  class image {problem}")
    if len(photos) < config.num_class_images:
        accelerator.print(f"{folder} holds {len(photos)} class images of "
                          f"{config.num_class_images} asked for: these are used.")
    return photos


def make_class_images(base: Family, config: TrainConfig, accelerator: Accelerator) -> Path:
    """`class_images` by a run's base, in the precision for them."""
    if config.prior_generation_precision != config.mixed_precision:
        base = load_base(base.name, base.revision, base.variant, base.tokenizer_name, base.device,
                         torch_dtype(config.prior_generation_precision), low_vram=base.low_vram)
    with replayed(base.denoiser):
        folder = class_images(
            base, config, accelerator.process_index, accelerator.num_processes,
            lambda: wait_for_all(accelerator, "Class images"),
            lambda batches: progress(batches, accelerator.is_main_process, desc="class images"))
    if base.low_vram:
        base.release("denoiser")  # so that it is not there while photos are encoded
    return folder


def describe(base: Family, config: TrainConfig) -> dict[str, Any]:
    """All that class images depend on, but their number: each image depends on its own index."""
    return {
        "base": base.fingerprint(), "prompt": config.class_prompt, "resolution": config.resolution,
        "num_inference_steps": base.settings["num_inference_steps"], "seed": config.seed,
        "guidance_scale": base.settings["guidance_scale"], "scheduler": base.sampler(),
        "precision": config.prior_generation_precision, "low_vram": base.low_vram,
    }


def class_images(base: Family, config: TrainConfig, rank: int = 0, world: int = 1,
                 wait: Callable[[], Any] = lambda: None,
                 progress: Callable[[list], Iterable] | None = None) -> Path:
    """The folder with at least `num_class_images` images of the class, made where they are
    missing.

    Processes share the work: whole batches go round, so the images are those one process would
    make. `wait` returns when every process has called it. Raises ConfigError for a folder made for
    another base, prompt or size.
    """
    if own := own_folder(config):
        return own
    about = describe(base, config)
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(config.class_data_dir) if config.class_data_dir else cache_dir() / name
    refuse_others(folder, about)
    sweep(folder, age=DAY)
    write_whole(folder / MANIFEST, json.dumps(about, indent=1))
    encode = base.encode_text
    if base.low_vram:
        encode = PromptCache(base, [str(config.class_prompt), ""]).encode
        base.release("text_encoders")
    size = config.sample_batch_size
    batches = [range(first, min(first + size, config.num_class_images))
               for first in range(0, config.num_class_images, size)]
    # by number, so that no process takes another's unfinished work for its own
    mine = batches[rank::world]
    missing = [batch for batch in mine if not all(image_path(folder, k).is_file() for k in batch)]
    for batch in (progress or (lambda x: x))(missing):
        for index, image in zip(batch, generate_class(base, config, list(batch), encode)):
            save_png(image, image_path(folder, index))
    wait()
    return folder


def own_folder(config: TrainConfig) -> Path | None:
    """The folder of class photos that the user filled (photos and no manifest), or None; no network
    is needed for it."""
    folder = Path(config.class_data_dir or "")
    filled = config.class_data_dir and folder.is_dir() and not (folder / MANIFEST).is_file()
    return folder if filled and find_photos(folder) else None


def refuse_others(folder: Path, about: dict[str, Any]) -> None:
    if not (folder / MANIFEST).is_file():
        return
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except ValueError:
        found = None
    found = found if isinstance(found, dict) else {}
    for name, value in about.items():
        if found.get(name) != value:
            raise ConfigError(f"--class_data_dir {folder} holds class images made with "
                              f"another {name} ({found.get(name)!r}, now {value!r}): "
                              "choose another folder, or empty this one")


def image_path(folder: Path, index: int) -> Path:
    return folder / f"{index:05d}.png"


def generate_class(base: Family, config: TrainConfig, indices: list[int],
                   encode: Callable) -> list[Image.Image]:
    """Images of the class prompt, a blank one (overflow, a safety checker's black) made again."""
    seeds = [key(config.seed, "class image", 0, index) for index in indices]
    images: dict[int, Image.Image] = {}
    for attempt in range(TRIES):
        left = [k for k in range(len(indices)) if k not in images]
        made = base.generate([config.class_prompt] * len(left), [seeds[k] + attempt for k in left],
                             resolution=config.resolution, stream="class image", encode=encode,
                             batch_size=config.sample_batch_size)
        images |= {k: image for k, image in zip(left, made)
                   if np.asarray(image, np.float32).std() > BLANK}
        if len(images) == len(indices):
            return [images[k] for k in range(len(indices))]
    raise ConfigError(f"{config.class_prompt!r} came out blank {TRIES} times: "
                      "try --prior_generation_precision no, or give your own photos with "
                      "--class_data_dir")


def class_photos(folder: Path, config: TrainConfig) -> tuple[list[Photo], list[Problem]]:
    """(photos, problems) of the class: all of the user's own, the first `num_class_images` of those
    made."""
    photos, problems = gather_photos(folder, resolution=config.resolution)
    if (folder / MANIFEST).is_file():  # a killed run may have left a half-named file there
        made = {image_path(folder, k) for k in range(config.num_class_images)}
        photos = [photo for photo in photos if photo.path in made]
    return photos, problems

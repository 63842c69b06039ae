"""Images from a base and any number of LoRAs, and the grid they are looked at in."""

import dataclasses
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from dbcore.config import ConfigError, GenerateConfig, read_run_config
from dbcore.datasets.prompts import check_fit
from dbcore.datasets.store import PromptCache
from dbcore.models import peft_adapters
from dbcore.models.base import Family, best_device, load_base, resolve, torch_dtype, without_bf16
from dbcore.utils.files import write_beside, writing
from dbcore.utils.grids import figure_png, image_grid


def generate(config: GenerateConfig, base: Family | None = None) -> list[list[Image.Image]]:
    """A list for each prompt of `num_images` PIL images, with seeds config.seed, config.seed + 1,
    ...

    `config`: GenerateConfig. `base`: one that is loaded already, LoRAs and all. Raises ConfigError
    and LoraFileError for what cannot be loaded.
    """
    config.check()
    config = without_bf16(resolve(with_base(config)))
    check_prompts(config, base or load_base(config.pretrained_model_name_or_path, config.revision))
    encode = None
    if base is None:
        base = frozen_base(config)
        encode = encode_ahead(base, config) if base.low_vram else None
        add_loras(base, config)
    seeds = [config.seed + k for k in range(config.num_images)]
    images = base.generate(
        [prompt for prompt in config.prompt for _ in seeds], seeds * len(config.prompt),
        num_inference_steps=config.num_inference_steps, guidance_scale=config.guidance_scale,
        negative_prompt=config.negative_prompt, resolution=config.resolution,
        scheduler=config.scheduler, batch_size=config.batch_size, encode=encode,
        guidance_interval=config.guidance_interval, lora_interval=config.lora_interval)
    return [images[first:first + len(seeds)] for first in range(0, len(images), len(seeds))]


def check_prompts(config: GenerateConfig, base: Family) -> None:
    """Say what of the prompts is beyond the token limit.

    Raises PromptError where the subject of a LoRA's run is.
    """
    run = next(filter(None, map(run_of, config.checkpoint_dir)), {})
    texts = ([("--prompt", prompt) for prompt in config.prompt]
             + [("--negative_prompt", config.negative_prompt)])
    check_fit(base, texts, run.get("instance_prompt") or "", run.get("class_prompt"))


def run_of(lora: str | Path) -> dict[str, Any]:
    """The options of the run that a LoRA, or a checkpoint's, lies in; {} where there is none."""
    first = Path(lora)
    return next(filter(None, map(read_run_config, (first, first.parent, first.parent.parent))), {})


def with_base(config: GenerateConfig) -> GenerateConfig:
    """`config` with the base that its first LoRA's run was trained on, if it names none."""
    if config.pretrained_model_name_or_path:
        return config
    first = config.checkpoint_dir[0]
    if run := run_of(first):
        return dataclasses.replace(
            config, pretrained_model_name_or_path=run["pretrained_model_name_or_path"],
            revision=config.revision or run.get("revision"))
    raise ConfigError(f"--checkpoint_dir {first} does not say which base it belongs to, "
                      "by a config.yaml that a run has written: "
                      "give --pretrained_model_name_or_path as well")


def base_with_loras(config: GenerateConfig) -> Family:
    """The base on the best device there is, with every LoRA of `checkpoint_dir` at its scale."""
    return add_loras(frozen_base(config), config)


def frozen_base(config: GenerateConfig) -> Family:
    return load_base(config.pretrained_model_name_or_path, config.revision, config.variant,
                     device=best_device(), dtype=torch_dtype(config.mixed_precision),
                     low_vram=config.low_vram)


def add_loras(base: Family, config: GenerateConfig) -> Family:
    names = [f"lora_{k}" for k in range(len(config.checkpoint_dir))]
    for name, path in zip(names, config.checkpoint_dir):
        peft_adapters.load(base, path, name)
    scales = config.lora_scale * len(names) if len(config.lora_scale) == 1 else config.lora_scale
    if names:
        peft_adapters.set_scales(base, dict(zip(names, scales)))
    return base


def encode_ahead(base: Family, config: GenerateConfig) -> Callable | None:
    """A cache's `encode` with all prompts in it; the text encoders are let go.

    None where a LoRA is to change what they say.
    """
    changed = {name for path in config.checkpoint_dir
               for name in peft_adapters.components(path, base)}
    if changed & {*base.roles["text_encoders"]}:
        return None
    cache = PromptCache(base, [*config.prompt, config.negative_prompt])
    base.release("text_encoders")
    return cache.encode


def generate_and_save(config: GenerateConfig) -> Path:
    """`generate`, then PNG files and a grid in `output_dir`, which is returned.

    Where other images have the names already, as of another LoRA or scale, all of these get a
    number. Raises FileError where the folder cannot be written to.
    """
    folder = Path(config.output_dir)
    with writing(f"--output_dir {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    rows, seeds = generate(config), [config.seed + k for k in range(config.num_images)]
    files = {f"{name}-seed{seed}.png": png(image)
             for name, row in zip(file_names(config.prompt), rows)
             for seed, image in zip(seeds, row)}
    files["grid.png"] = figure_png(image_grid(rows, config.prompt,
                                              [f"seed {seed}" for seed in seeds]))
    if mark := write_beside(folder, files):
        print(f"Other images have these names already: the new ones end in {mark}.")
    return folder


def png(image: Image.Image) -> bytes:
    """A PIL image as the bytes of a PNG file."""
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def file_names(prompts: list[str]) -> list[str]:
    """Each prompt as part of a file name; where two would be called the same, the later one gets a
    number."""
    names = []
    for prompt in prompts:
        name, count = slug(prompt), 2
        while name in names:
            name, count = f"{slug(prompt)}-{count}", count + 1
        names.append(name)
    return names


def slug(text: str) -> str:
    """Words as part of a file name."""
    return re.sub(r"\W+", "-", text.lower()).strip("-")[:60] or "picture"

"""Concept sliders (Gandikota et al. 2023, arXiv 2311.12092): a LoRA whose scale is an attribute.

No photo is needed. The LoRA learns the base's own difference between two prompts, on noisy images
that the base generated of a third, c:
    y*(x_t, c, t) <- y(x_t, c, t) + s eta (y(x_t, c+, t) - y(x_t, c-, t))      equation 7
y is the frozen base's prediction, c+ and c- are c with either wording, and y* is that of the base
with the LoRA at scale s. The paper trains s = 1 alone; here s is 1 and -1 in turn, so that both
ends of the slider are trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from PIL import Image

from dbcore.config import SliderConfig, TrainConfig
from dbcore.datasets.dreambooth import to_pixels
from dbcore.datasets.store import PromptCache
from dbcore.engines.trained import Modules, inject, start_training
from dbcore.models.base import Family, best_device, load_base, resolve, torch_dtype
from dbcore.models.lora import adapter_layers, adapters_off, save_lora
from dbcore.utils.console import progress
from dbcore.utils.errors import Diverged
from dbcore.utils.seeding import normal, uniform


def train_slider(config: SliderConfig) -> Path:
    """Learn `config.positive` against `config.negative`; returns the LoRA's file.

    The LoRA is on the denoiser alone. Raises ConfigError, and Diverged where the loss is no number.
    """
    config.check()
    c = resolve(as_train_config(config))
    base = load_base(c.pretrained_model_name_or_path, c.revision, device=best_device(),
                     dtype=torch_dtype(c.mixed_precision))
    prompts = [f"{config.prompt} {words}".strip() for words in ("", config.positive,
                                                                config.negative)]
    seeds = range(c.seed, c.seed + config.num_images)
    images = base.generate([config.prompt] * config.num_images, seeds, resolution=c.resolution,
                           stream="slider")
    x0 = encode(base, images)
    cond = {name: tensor.detach()
            for name, tensor in PromptCache(base, prompts).encode(prompts).items()}
    modules = inject(base, c)
    trained = start_training(base, modules, c, world=1)
    for step in progress(range(c.max_train_steps), desc="steps"):
        trained.set_rates(step)
        loss = slider_loss(base, modules, *noisy(base, x0, c, step), cond,
                           config.slider_strength, sign=1 - 2 * (step % 2))
        if not loss.isfinite():
            raise Diverged(f"the loss is {float(loss)} at step {step + 1}; most likely the "
                           "learning rate is too high: try a third of it")
        trained.scaler.scale(loss).backward()
        trained.update(trained.clip(c.max_grad_norm))
    scale_by(modules, 1)
    notes = {"base": Path(base.name).name, "trigger_words": config.prompt}
    return save_lora(modules, Path(config.output_dir) / "pytorch_lora_weights.safetensors", notes)


def as_train_config(config: SliderConfig) -> TrainConfig:
    """The options of `TrainConfig` that a slider has too; the rest as `train` has them."""
    shared = ("pretrained_model_name_or_path", "revision", "rank", "learning_rate", "lora_layers",
              "train_batch_size", "max_train_steps", "resolution", "mixed_precision", "seed",
              "output_dir")
    return TrainConfig(**{name: getattr(config, name) for name in shared})


def encode(base: Family, images: Iterable[Image.Image]) -> torch.Tensor:
    """(n, *latent_shape) latents of PIL images: the posterior's mean, float32."""
    return torch.cat([base.encode_images(to_pixels(image)[None])[0] for image in images])


def noisy(base: Family, x0: torch.Tensor, config: TrainConfig,
          step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(x_t, t) of a step's batch, functions of (seed, step, sample)."""
    samples, seed = range(config.train_batch_size), config.seed
    chosen = x0[[int(uniform(seed, "slider image", step, k) * len(x0)) for k in samples]]
    us = torch.tensor([uniform(seed, "slider timestep", step, k) for k in samples],
                      dtype=torch.float64)
    t = base.process.timestep(us, x0.shape[2:].numel()).to(x0.device)
    noise = normal(x0.shape[1:], seed, "slider noise", step, samples).to(x0.device)
    return base.process.corrupt(chosen, noise, t), t


def slider_loss(base: Family, modules: Modules, x_t: torch.Tensor, t: torch.Tensor,
                cond: Mapping[str, torch.Tensor], strength: float, sign: int) -> torch.Tensor:
    """Mean squared distance of the two sides of equation 7, for s = `sign` and eta = `strength`.

    `cond`: of three prompts, (3, ...): c, c+ and c-.
    """
    neutral, positive, negative = ({name: tensor[k:k + 1].expand(len(x_t), *tensor.shape[1:])
                                    for name, tensor in cond.items()} for k in range(3))
    with torch.no_grad(), adapters_off(modules):
        own, more, less = (base.predict(x_t, t, one) for one in (neutral, positive, negative))
    scale_by(modules, sign)
    target = own + sign * strength * (more - less)
    return (base.predict(x_t, t, neutral) - target).square().mean()


def scale_by(modules: Modules, sign: int) -> None:
    """The LoRA on {component: network} at scale 1 or -1."""
    for module in modules.values():
        for _, layer in adapter_layers(module):
            layer.scaling["default"] = sign * abs(layer.scaling["default"])

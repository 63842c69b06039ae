"""What to change so that a run fits into a card's memory, by the forecast."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from dbcore.config import AUTO, TrainConfig
from dbcore.engines.memory import Forecast, forecast
from dbcore.models.base import resolve

# Memory in vendors' GB (10^9 bytes), and the half precision that the card is good at.
CARDS = {"T4": (16e9, "fp16"), "RTX 4060": (8e9, "bf16"), "A100": (40e9, "bf16"),
         "H200": (141e9, "bf16")}


def by_card(config: TrainConfig) -> dict[str, tuple[float, str, Forecast]]:
    """{card: (its bytes, the precision, `Forecast`)}; a `mixed_precision` asked for is kept."""
    rows, made = {}, {}
    for card, (memory, half) in CARDS.items():
        precision = half if config.mixed_precision == "auto" else config.mixed_precision
        if precision not in made:
            made[precision] = forecast(in_precision(config, precision), "cuda")
        rows[card] = memory, precision, made[precision]
    return rows


def in_precision(config: TrainConfig, precision: str) -> TrainConfig:
    """`config` with every `auto` precision resolved, for a device that is not this machine's."""
    prior = config.prior_generation_precision
    return dataclasses.replace(config, mixed_precision=precision,
                               prior_generation_precision=precision if prior == "auto" else prior)


def advise(config: TrainConfig, memory: float,
           device: str = "cuda") -> dict[str, Any] | None:
    """What to change so that a run fits into `memory` bytes, {option: value}.

    {} if it fits, None if nothing helps. Options are changed in order of what they cost:
    first those that only take time, then the resolution.
    """
    config = resolve(config, device)
    changes: dict[str, Any] = {}
    if forecast(config, device).peak <= memory:
        return changes
    for change in savings(config, device):
        changes |= change
        if forecast(dataclasses.replace(config, **changes), device).peak <= memory:
            return changes
    return None


def savings(config: TrainConfig, device: str) -> Iterator[dict[str, Any]]:
    """Changes that make a resolved run smaller, the cheapest first."""
    if config.mixed_precision == "no" and device == "cuda":
        yield {"mixed_precision": "bf16", "prior_generation_precision": "bf16"}
    if config.with_prior_preservation and config.sample_batch_size > 1:
        yield {"sample_batch_size": 1}
    if not config.cache_latents:
        yield {"cache_latents": True}
    if not config.gradient_checkpointing:
        yield {"gradient_checkpointing": True}
    if config.train_batch_size > 1:
        yield {"train_batch_size": 1,
               "gradient_accumulation_steps": config.train_batch_size
               * config.gradient_accumulation_steps}
    if not config.low_vram:
        yield {"low_vram": True}
    side = config.resolution * 3 // 4 // 64 * 64 or config.resolution // 16 * 8 or 8
    buckets = {"aspect_ratio_buckets": AUTO} if config.aspect_ratio_buckets else {}
    yield {"resolution": side, **buckets}


def flags(changes: dict[str, Any]) -> str:
    """{option: value} as a command line takes them."""
    return " ".join(f"--{name} {value}" for name, value in changes.items()).replace(" True", "")


def remedy(config: TrainConfig, device: str) -> str:
    """A sentence on what makes a run smaller whose memory was full, as little as will do.

    Where the forecast says that it fits, something else holds memory: then the cheapest change.
    """
    changes = advise(config, there(device), device)
    if changes == {}:
        changes = next(savings(resolve(config, device), device))
    if changes is None:
        return "No option makes it small enough: take a larger card"
    return (f"It takes less with {flags(changes)}; `dbcore doctor` with the same options "
            "counts the memory")


def there(device: str) -> int:
    """Bytes of memory that this process has or can have, beside what others hold."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    import psutil

    return psutil.virtual_memory().available

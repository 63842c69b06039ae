"""T-LoRA: fewer of a LoRA's ranks where there is more noise (Soboleva et al. 2025, 2507.05964).

    y = W x + (alpha / r) B (m_t * A x)         m_t: 1 for the first r_t ranks, 0 for the rest
    r_t = floor(((T - t) / T)^a (r - 1) + 1)

From noise a network makes layout and background, of which a few photos show few: where it is
strongest a LoRA has the least room to learn them by heart. The file says `tlora_alpha`, a.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from dbcore.models.adapter import LoraFileError

if TYPE_CHECKING:
    from dbcore.models.base import Family

NOTE = "tlora_alpha"


def active_ranks(noise: torch.Tensor, rank: int, exponent: float) -> torch.Tensor:
    """r_t, as floats, of noise = t / T in [0, 1]; from `rank` without noise to 1."""
    # the small number: a rank that is just reached is not lost to rounding
    return torch.floor((1 - noise) ** exponent * (rank - 1) + 1 + 1e-4)


class RankMask:
    """Lets through as many ranks of each sample as its timestep allows.

    The timestep is read from the denoiser's own argument, so that training, replays and any
    pipeline have the same mask.
    """

    def __init__(self, base: Family, exponent: float):
        self.process, self.exponent, self.argument = base.process, exponent, base.timestep_argument
        self.place = [*inspect.signature(base.denoiser.forward).parameters].index(self.argument)
        self.noise = torch.zeros(1)  # all ranks, until the denoiser is called

    def read_timestep(self, denoiser: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before the denoiser: note the noise of a batch, (n,) or (1,) for all of it."""
        t = kwargs[self.argument] if self.argument in kwargs else args[self.place]
        self.noise = self.process.noise_level(torch.as_tensor(t)).reshape(-1)

    def mask(self, down: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        """After A: its output, (n, ..., r) of a linear layer or (n, r, h, w), masked."""
        rank = len(down.weight)
        active = active_ranks(self.noise.to(output.device), rank, self.exponent)
        kept = (torch.arange(rank, device=output.device) < active[:, None]).to(output.dtype)
        middle = [1] * (output.ndim - 2)
        is_linear = isinstance(down, torch.nn.Linear)
        return output * kept.reshape(*((-1, *middle, rank) if is_linear else (-1, rank, *middle)))


def mask_ranks(base: Family, exponent: float, name: str = "default") -> None:
    """Make the LoRA of that name on a base's denoiser a T-LoRA; `exponent`: a, above 0."""
    mask, denoiser = RankMask(base, exponent), base.denoiser
    denoiser.register_forward_pre_hook(mask.read_timestep, with_kwargs=True)
    for layer in denoiser.modules():
        if name in getattr(layer, "lora_A", ()):
            layer.lora_A[name].register_forward_hook(mask.mask)


def is_masked(layer: torch.nn.Module) -> bool:
    """Whether a peft layer has a T-LoRA."""
    return any(isinstance(getattr(hook, "__self__", None), RankMask)
               for down in layer.lora_A.values() for hook in down._forward_hooks.values())


def exponent_of(notes: Mapping[str, str]) -> float | None:
    """a of a T-LoRA's file, None for another LoRA's. Raises LoraFileError for one that is none."""
    text = notes.get(NOTE)
    try:
        return None if text is None else float(text)
    except ValueError:
        raise LoraFileError(f"its {NOTE} {text!r} is no number: copy it again") from None


def what_is_lost(notes: Mapping[str, str]) -> str | None:
    """A line on what other programs make of a T-LoRA's file; None for another LoRA's."""
    if exponent_of(notes) is None:
        return None
    return ("This is a T-LoRA: other programs, and merged weights, use all its ranks at each step, "
            "so the first steps follow the photos more closely than it was trained to; "
            "`dbcore generate` uses as many as the step allows.")

"""Noise, and what a network predicts of it: the mathematics of the two processes, and nothing else.

    x_t = alpha_t x0 + sigma_t noise

Training takes t from a random u in (0, 1), corrupts x0 to x_t, and fits the prediction to a
regression target. Shapes: x0, noise, x_t, target and prediction (n, ...), all alike; t, u and
weights (n,).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Density:
    """How often training takes each level of noise (Esser et al. 2024, section 3.1).

    `scheme`: "none" (each as often), "logit_normal" (equation 19: the middle more often, or noise
    with a positive mean) or "mode" (equation 20: with a scale above 0 the middle more often).
    """

    scheme: str = "none"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29

    def __call__(self, u: torch.Tensor) -> torch.Tensor:
        """Levels in (0, 1), 1 being noise, of uniform u in (0, 1)."""
        if self.scheme == "logit_normal":
            return torch.sigmoid(self.logit_mean + self.logit_std * torch.special.ndtri(u))
        if self.scheme == "mode":
            return 1 - u - self.mode_scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
        return u


class Process(ABC):
    """What both have in common; a subclass says t, alpha and sigma, and what is predicted."""

    num_timesteps = math.inf  # the most steps that generating can take
    density = Density()  # that the base was trained with

    @abstractmethod
    def timestep(self, u: torch.Tensor, positions: int | None = None,
                 density: Density | None = None) -> torch.Tensor:
        """t of uniform u in (0, 1), for latents of `positions` = height x width numbers a channel.

        `density`: another one than the base's own.
        """

    @abstractmethod
    def coefficients(self, t: torch.Tensor,
                     like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(alpha_t, sigma_t), in the shape that multiplies `like`, (n, ...)."""

    @abstractmethod
    def noise_level(self, t: torch.Tensor) -> torch.Tensor:
        """t / T in [0, 1]: 1 is noise alone."""

    @abstractmethod
    def target(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """What the network is to predict of x_t."""

    @abstractmethod
    def guess(self, prediction: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The x0 that a prediction implies: of the target itself, x0."""

    @abstractmethod
    def amplification(self, t: torch.Tensor) -> torch.Tensor:
        """Squared error of the prediction that goes with a squared error of 1 in x0."""

    @abstractmethod
    def snr(self, t: torch.Tensor) -> torch.Tensor:
        """alpha_t^2 / sigma_t^2, the signal-to-noise ratio."""

    def corrupt(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x_t."""
        alpha, sigma = self.coefficients(t, x0)
        return alpha * x0 + sigma * noise

    def weight(self, t: torch.Tensor, snr_gamma: float | None = None) -> torch.Tensor:
        """Factor on the prediction's squared error: 1, or with `snr_gamma` min-SNR-gamma.

        That is min(SNR, gamma) on the squared error of x0 (Hang et al. 2023).
        """
        if snr_gamma is None:
            return torch.ones(len(t), device=t.device)
        return self.snr(t).clamp(max=snr_gamma) / self.amplification(t)


class Diffusion(Process):
    """Ho et al. 2020: alpha_t^2 = abar_t, sigma_t^2 = 1 - abar_t, t in 0 .. T - 1.

    `alphas_cumprod`: abar, (T,). `prediction_type`: "epsilon" (the noise), "v_prediction" (Salimans
    and Ho 2022) or "sample" (x0).
    """

    def __init__(self, alphas_cumprod: torch.Tensor, prediction_type: str = "epsilon"):
        self.alphas_cumprod, self.prediction_type = alphas_cumprod, prediction_type
        self.num_timesteps = len(alphas_cumprod)

    @classmethod
    def from_scheduler(cls, config: Any) -> Diffusion:
        """The process that the config of a diffusers scheduler (DDPM, DDIM, PNDM ...) describes."""
        from diffusers import DDPMScheduler

        scheduler = DDPMScheduler.from_config(config)
        return cls(scheduler.alphas_cumprod, scheduler.config.prediction_type)

    def timestep(self, u: torch.Tensor, positions: int | None = None,
                 density: Density | None = None) -> torch.Tensor:
        return ((density or self.density)(u) * self.num_timesteps).long()

    def noise_level(self, t: torch.Tensor) -> torch.Tensor:
        return t / self.num_timesteps

    def abar(self, t: torch.Tensor) -> torch.Tensor:
        self.alphas_cumprod = self.alphas_cumprod.to(t.device)  # later steps find it there
        return self.alphas_cumprod[t]

    def coefficients(self, t: torch.Tensor,
                     like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        abar = column(self.abar(t), like)
        return abar**0.5, (1 - abar) ** 0.5

    def target(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha, sigma = self.coefficients(t, x0)
        v = alpha * noise - sigma * x0
        return {"epsilon": noise, "v_prediction": v, "sample": x0}[self.prediction_type]

    def guess(self, prediction: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha, sigma = self.coefficients(t, x_t)
        if self.prediction_type == "epsilon":
            return (x_t - sigma * prediction) / alpha
        return alpha * x_t - sigma * prediction if self.prediction_type != "sample" else prediction

    def amplification(self, t: torch.Tensor) -> torch.Tensor:
        snr = self.snr(t)
        ratios = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}
        return ratios[self.prediction_type]

    def snr(self, t: torch.Tensor) -> torch.Tensor:
        abar = self.abar(t)
        return abar / (1 - abar)


class Flow(Process):
    """Rectified flow (Lipman et al. 2023, Liu et al. 2023): alpha_t = 1 - t, sigma_t = t.

    t is in (0, 1), the target is the velocity, noise - x0. `density`: of t, before the shift.
    `mu(positions)`: log of the shift towards noise that larger images need (their equation 23);
    without it there is no shift.
    """

    def __init__(self, density: Density = Density("logit_normal"),
                 mu: Any = None):
        self.density, self.mu = density, mu

    def timestep(self, u: torch.Tensor, positions: int | None = None,
                 density: Density | None = None) -> torch.Tensor:
        t = (density or self.density)(u)
        shift = math.exp(self.mu(positions)) if self.mu else 1.0
        return (shift * t / (1 + (shift - 1) * t)).float()

    def coefficients(self, t: torch.Tensor,
                     like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return column(1 - t, like), column(t, like)

    def noise_level(self, t: torch.Tensor) -> torch.Tensor:
        return t

    def target(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return noise - x0

    def guess(self, prediction: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x_t - column(t, x_t) * prediction

    def amplification(self, t: torch.Tensor) -> torch.Tensor:
        return 1 / t**2

    def snr(self, t: torch.Tensor) -> torch.Tensor:
        return ((1 - t) / t) ** 2


def column(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(n,) as (n, 1, ...), to multiply `like`, (n, ...)."""
    return values.reshape(-1, *[1] * (like.ndim - 1))

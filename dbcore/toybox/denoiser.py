"""The toy base's UNet: v-prediction on 16 x 16 x 8 latents, conditioned on the frozen toy CLIP's
text tower."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from dbcore.toybox.autoencoder import CHANNELS, latent_shard
from dbcore.toybox.clip import WIDTH, tokenize
from dbcore.toybox.corpus import SHARD, sample
from dbcore.toybox.fit import fit, half_where_fast, step_rng, trapezoid_rate
from dbcore.toybox.scene import caption, mirror

if TYPE_CHECKING:
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextModel, CLIPTokenizer

    from dbcore.toybox.fresh import FreshLatents
    from dbcore.toybox.scene import Character, View

NO_CAPTION, WHOLE_CAPTION = 0.1, 0.4  # a number below means no caption, and the whole truth


def make_unet() -> UNet2DConditionModel:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16, in_channels=CHANNELS, out_channels=CHANNELS,
        block_out_channels=(48, 96, 144), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH, attention_head_dim=4, norm_num_groups=16)


def make_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule, predicting v (Salimans & Ho 2022, eq. 12)."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, steps_offset=1,
        timestep_spacing="trailing")


class Latents:
    """The latents that the UNet learns from: more and more scenes as the run goes on.

    Each scene is used about `REUSE` times. Shards are rendered, encoded and kept when a step first
    needs them, so that what a step sees depends on its number alone.
    """

    REUSE, FIRST = 8, 20_000

    def __init__(self, autoencoder: AutoencoderKL, tokenizer: CLIPTokenizer, folder: Path,
                 seed: int, batch: int):
        self.autoencoder, self.tokenizer, self.folder = autoencoder, tokenizer, folder
        self.seed, self.batch = seed, batch
        self.shards: list[np.ndarray] = []
        self.scenes: list[tuple[Character, View]] = []

    def close(self) -> None:
        """Nothing is held open; `FreshLatents` has workers to send home."""

    def available(self, step: int) -> int:
        """How many scenes a step may choose from; whole shards."""
        return max(self.FIRST, step * self.batch // self.REUSE) // SHARD * SHARD

    def grow(self, count: int) -> None:
        while len(self.scenes) < count:
            number = len(self.shards)
            self.shards.append(latent_shard(self.autoencoder, self.folder, self.seed, number))
            self.scenes += [sample(self.seed, k)
                            for k in range(number * SHARD, (number + 1) * SHARD)]

    def batch_at(self, step: int, rng: np.random.Generator) -> tuple[torch.Tensor, list]:
        """(n, 8, 16, 16) latents of scenes chosen at random, every second one mirrored, and the
        scenes."""
        count = self.available(step)
        self.grow(count)
        picks, mirrored = rng.integers(0, count, self.batch), rng.integers(0, 2, self.batch)
        z = np.stack([self.shards[k // SHARD][m, k % SHARD] for k, m in zip(picks, mirrored)])
        return torch.from_numpy(z).float(), [mirror(*self.scenes[k]) if m else self.scenes[k]
                                             for k, m in zip(picks, mirrored)]

    def inputs(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Latents (n, 8, 16, 16), noise like them, uniform u (n,) of which a process makes
        timesteps, token ids (n, length)."""
        rng, torch_rng = step_rng(self.seed, "unet", step)
        z, scenes = self.batch_at(step, rng)
        ids = tokenize(self.tokenizer, [training_caption(scene, rng) for scene in scenes])
        # one level from each of `batch` equal bands: the same mean, less variance
        u = (np.arange(self.batch) + rng.random(self.batch)) / self.batch
        return z, near_noise(z, torch_rng), torch.from_numpy(u).float(), ids


def training_caption(scene: tuple[Character, View], rng: np.random.Generator) -> str:
    """None at all for one in ten (Ho & Salimans 2022), the whole truth for three in ten, else a
    part of it."""
    share = rng.random()
    if share < NO_CAPTION:
        return ""
    return caption(*scene) if share < WHOLE_CAPTION else partial_caption(scene, rng)


def partial_caption(scene: tuple[Character, View], rng: np.random.Generator) -> str:
    return caption(*scene, rng, drop=0.15, drop_details=0.6)


def near_noise(z: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Noise like `z`, each sample's the one nearest to it in the batch (immiscible diffusion, Li et
    al. 2024)."""
    from scipy.optimize import linear_sum_assignment

    noise = torch.randn(z.shape, generator=generator)
    _, nearest = linear_sum_assignment(torch.cdist(z.flatten(1), noise.flatten(1)).numpy())
    return noise[nearest]


def greedy_noise(z: torch.Tensor, group: int = 32) -> torch.Tensor:
    """Noise like `z`, on its device: in each group, one sample after another takes the nearest
    left.

    An exact assignment (`near_noise`) comes nearer by a fifth of the gain, and makes the GPU wait.
    """
    z = z.unflatten(0, (-1, math.gcd(group, len(z))))
    noise = torch.randn_like(z)
    distance = torch.cdist(z.flatten(2), noise.flatten(2))
    taken, nearest = torch.zeros_like(distance[:, 0]), []
    for row in distance.unbind(1):
        nearest.append((row + taken).argmin(1, keepdim=True))
        taken.scatter_(1, nearest[-1], torch.inf)
    groups = torch.arange(len(z), device=z.device)[:, None]
    return noise[groups, torch.cat(nearest, 1)].flatten(0, 1)


class Velocity(nn.Module):
    """A denoiser as the loss asks for it: noisy latents, timesteps and encoded captions to v.

    `predict` does it, with the weights of `net`.
    """

    def __init__(self, net: nn.Module, predict: Callable, device: str):
        super().__init__()
        self.net, self.predict, self.device = net, predict, device

    def forward(self, noisy: torch.Tensor, t: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        with half_where_fast(self.device):
            return self.predict(noisy, t, hidden)


def train_denoiser(stage: str, folder: Path, net: nn.Module, predict: Callable, example: Callable,
                   steps: int, minutes: float | None, lr: float, batch: int,
                   device: str) -> nn.Module:
    """Minimise |v - v_theta(x_t, t, caption)|^2, averaging the weights.

    `example(step)` gives the arguments of `predict`, whose weights are `net`'s, and v. `lr` is for
    batches of 32; it grows with the square root of the batch (Malladi et al. 2022), and the weights
    are averaged over that many steps fewer.
    """
    velocity, faster = Velocity(net, predict, device), (batch / 32) ** 0.5
    if torch.device(device).type == "cuda":  # hundreds of small kernels, launched as two graphs
        velocity = torch.cuda.make_graphed_callables(velocity, example(0)[0])

    def loss_at(step, progress):
        given, v = example(step)
        return {"loss": F.mse_loss(velocity(*given).float(), v)}

    return fit(stage, folder, net, loss_at, steps, lr * faster, minutes, muon=True,
               ema=1 - 0.0005 * faster, device=device, rate=trapezoid_rate)


def train_unet(text_encoder: CLIPTextModel, data: Latents | FreshLatents, folder: Path, seed: int,
               steps: int = 47_000, minutes: float | None = None, lr: float = 1e-3,
               device: str = "cpu") -> UNet2DConditionModel:
    """The UNet after `train_denoiser`, on what `data` gives, a `Latents` or a `FreshLatents`."""
    torch.manual_seed(seed + 2)
    net = make_unet().to(device, memory_format=torch.channels_last)
    schedule = make_scheduler()
    text_encoder.eval().requires_grad_(False).to(device)

    def example(step):
        """What the UNet is given (noisy latents, timesteps, encoded captions), and v."""
        z, noise, u, ids = data.inputs(step)
        t = (1000 * u).long().clamp(max=999)
        noisy, v = schedule.add_noise(z, noise, t), schedule.get_velocity(z, noise, t)
        with half_where_fast(device), torch.no_grad():
            hidden = text_encoder(ids.to(device)).last_hidden_state
        noisy = noisy.to(device, memory_format=torch.channels_last)
        return (noisy, t.to(device), hidden), v.to(device)

    return train_denoiser("unet", folder, net, lambda *given: net(*given).sample, example, steps,
                          minutes, lr, data.batch, device)


def make_pipeline(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, autoencoder: AutoencoderKL,
                  unet: UNet2DConditionModel) -> StableDiffusionPipeline:
    """A stock StableDiffusionPipeline of the four trained parts."""
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=autoencoder, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet,
        scheduler=make_scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)

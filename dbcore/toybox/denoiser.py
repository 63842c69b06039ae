"""The toy base's UNet: v-prediction on 16 x 16 x 4 latents, conditioned on the frozen toy CLIP's text tower."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from dbcore.toybox.clip import WIDTH, tokenize
from dbcore.toybox.fit import fit, half_where_fast, step_rng
from dbcore.toybox.scene import caption


def make_unet():
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(48, 96, 144), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH, attention_head_dim=4, norm_num_groups=16)


def make_scheduler():
    """Stable Diffusion's noise schedule, predicting v (Salimans & Ho 2022, eq. 12)."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, steps_offset=1,
        timestep_spacing="trailing")


def train_unet(tokenizer, text_encoder, latents: np.ndarray, scenes: list, folder: Path, seed: int,
               steps: int = 5800, batch: int = 32, lr: float = 1e-3, drop: float = 0.15,
               device: str = "cpu"):
    """Minimise |v - v_theta(z_t, t, caption)|^2; one caption in ten is empty (Ho & Salimans 2022)."""
    torch.manual_seed(seed + 2)
    net = make_unet().to(memory_format=torch.channels_last)
    schedule = make_scheduler()
    text_encoder.eval().requires_grad_(False).to(device)

    def loss_at(step):
        rng, torch_rng = step_rng(seed, "unet", step)
        picks, mirrored = rng.integers(0, latents.shape[1], batch), rng.integers(0, 2, batch)
        texts = ["" if rng.random() < 0.1 else caption(*scenes[k], rng, drop=drop) for k in picks]
        z = torch.from_numpy(np.stack([latents[m, k] for m, k in zip(mirrored, picks)])).float()
        # one timestep from each of `batch` equal bands: the same mean, less variance
        t = torch.from_numpy(((np.arange(batch) + rng.random(batch)) * (1000 / batch)).astype(np.int64))
        noise = torch.randn(z.shape, generator=torch_rng)
        noisy, v = schedule.add_noise(z, noise, t), schedule.get_velocity(z, noise, t)
        ids = tokenize(tokenizer, texts).to(device)
        noisy, v, t = noisy.to(device, memory_format=torch.channels_last), v.to(device), t.to(device)
        with torch.no_grad():
            hidden = text_encoder(ids).last_hidden_state
        with half_where_fast(device):
            guess = net(noisy, t, hidden).sample
        return {"loss": F.mse_loss(guess.float(), v)}

    return fit("unet", folder, net, loss_at, steps, lr, muon=True, ema=0.999, device=device)


def make_pipeline(tokenizer, text_encoder, autoencoder, unet):
    """A stock StableDiffusionPipeline of the four trained parts."""
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=autoencoder, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=make_scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)


@torch.no_grad()
def draw(pipe, prompts: list[str], seed: int = 0, steps: int = 25, guidance: float = 4.0, batch: int = 24) -> list:
    """One picture a prompt; picture k starts from noise of (seed, k)."""
    pipe.set_progress_bar_config(disable=True)
    pictures = []
    for first in range(0, len(prompts), batch):
        these = prompts[first:first + batch]
        noise = [torch.Generator().manual_seed(seed * 100_003 + first + i) for i in range(len(these))]
        pictures += pipe(these, num_inference_steps=steps, guidance_scale=guidance, generator=noise).images
    return pictures

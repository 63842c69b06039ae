"""The toy base's autoencoder: 64 x 64 images to 16 x 16 x 8 latents and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from dbcore.toybox.corpus import render_shard
from dbcore.toybox.fit import fit, half_where_fast, step_rng
from dbcore.utils.files import whole_file

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

DOWN, CHANNELS = 4, 8
KL_WEIGHT = 5e-4
SHAPE = {
    "in_channels": 3, "out_channels": 3, "latent_channels": CHANNELS,
    "block_out_channels": (24, 48, 96), "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3, "layers_per_block": 1, "norm_num_groups": 8,
    "sample_size": 64, "mid_block_add_attention": False}


def make_autoencoder() -> AutoencoderKL:
    from diffusers import AutoencoderKL

    return AutoencoderKL(**SHAPE, scaling_factor=1.0)


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 (n, h, w, 3) to float (n, 3, h, w) in [-1, 1]."""
    return to_pixels(torch.from_numpy(np.ascontiguousarray(images)))


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """uint8 (n, h, w, 3) to float (n, 3, h, w) in [-1, 1], on the same device."""
    return images.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


class PatchPCA(nn.Module):
    """The best linear autoencoder of 4 x 4 patches, whitened: where the learnt one starts.

    An autoencoder trained from nothing with four channels loses hue for a long time;
    one that is first shown these codes keeps it.
    """

    def __init__(self, images: np.ndarray):
        super().__init__()
        patches = F.unfold(to_tensor(images), DOWN,
                           stride=DOWN).permute(0, 2, 1).reshape(-1, 3 * DOWN * DOWN)
        self.register_buffer("mean", patches.mean(0))
        values, vectors = torch.linalg.eigh(torch.cov((patches - self.mean).T))
        basis = vectors[:, -CHANNELS:].flip(1)
        basis = basis * torch.sign(basis.sum(0))  # the sign of an eigenvector is anybody's
        self.register_buffer("project", basis / values[-CHANNELS:].flip(0).sqrt())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, 3, h, w) to (n, 8, h/4, w/4) of unit variance."""
        n, _, h, w = x.shape
        patches = F.unfold(x, DOWN, stride=DOWN).permute(0, 2, 1) - self.mean
        return (patches @ self.project).permute(0, 2, 1).reshape(n, CHANNELS, h // DOWN, w // DOWN)


def crops(images: np.ndarray, rng: np.random.Generator, batch: int, size: int) -> torch.Tensor:
    """Random flipped crops; the middle, where the character is, comes more often."""
    room = images.shape[1] - size
    picks = rng.integers(0, len(images), batch)
    out = []
    for k in picks:
        y, x = (rng.beta(2, 2, 2) * room + 0.5).astype(int) // DOWN * DOWN
        crop = images[k, y:y + size, x:x + size]
        out.append(crop[:, ::-1] if rng.random() < 0.5 else crop)
    return to_tensor(np.stack(out))


def laplacian(x: torch.Tensor) -> torch.Tensor:
    """Second differences, (..., h, w) to (..., h - 2, w - 2): where edges are, and how sharp."""
    return (4 * x[..., 1:-1, 1:-1] - x[..., :-2, 1:-1] - x[..., 2:, 1:-1]
            - x[..., 1:-1, :-2] - x[..., 1:-1, 2:])


def edge_energy(x: torch.Tensor) -> torch.Tensor:
    """How strong edges are around each place, (n, 3, h, w) to (n, 1, ~h/2, ~w/2): root mean
    squares."""
    squares = laplacian(x).square().mean(1, keepdim=True)
    return (F.avg_pool2d(squares, 4, stride=2) + 1e-4).sqrt()


def reconstruction_error(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Squared error, a tenth of the absolute one and a twentieth of that of the edges."""
    edges = F.l1_loss(laplacian(y), laplacian(x))
    return F.mse_loss(y, x) + 0.1 * F.l1_loss(y, x) + 0.05 * edges


def train_autoencoder(images: np.ndarray, folder: Path, seed: int, steps: int = 9000,
                      minutes: float | None = None, batch: int = 32, lr: float = 2e-3,
                      device: str = "cpu") -> AutoencoderKL:
    """Three phases: learn the PCA's codes, then free both halves, then whole images.

    The loss is `reconstruction_error` in [-1, 1],
    a KL term (Kingma & Welling 2014) that keeps the posterior wide enough for a denoiser's errors,
    and for an eighth of the latents, halved in size, the error against the halved image: latents
    that scale as images do are easier to denoise (Kouzelis et al. 2025; Skorokhodov et al. 2025).
    """
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    torch.manual_seed(seed)
    net = make_autoencoder()
    pca = PatchPCA(images[:: max(1, len(images) // 1500)]).to(device)
    follow, whole = 0.1, 0.7  # fractions of the run

    def error(z, x):
        with half_where_fast(device):
            y = net.decode(z).sample
        return y.float(), reconstruction_error(y.float(), x)

    def loss_at(step, progress):
        rng, torch_rng = step_rng(seed, "autoencoder", step)
        n, size = (batch, 32) if progress < whole else (batch // 4, images.shape[1])
        x = crops(images, rng, n, size).to(device)
        with half_where_fast(device):
            moments = net.encode(x).latent_dist.parameters
        posterior = DiagonalGaussianDistribution(moments.float())
        z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape,
                                                         generator=torch_rng).to(device)
        if progress < follow:
            code = pca(x)
            z = code + 0.1 * torch.randn(code.shape, generator=torch_rng).to(device)
        y, loss = error(z, x)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = loss + KL_WEIGHT * kl
        if progress < follow:
            loss = loss + F.mse_loss(posterior.mean, code) * 0.2
        else:
            some = slice(0, n // 8 or 1)
            loss = loss + 0.1 * error(F.avg_pool2d(z[some], 2), F.avg_pool2d(x[some], 2))[1]
        psnr = 10 * torch.log10(4 / F.mse_loss(y.detach(), x))
        return {"loss": loss, "psnr": psnr, "kl": kl.detach(), "std": posterior.std.detach().mean(),
                "edges": laplacian(y.detach()).var() / laplacian(x).var()}

    net = fit("autoencoder", folder, net, loss_at, steps, lr, minutes, ema=0.998, device=device)
    return set_scale(net, images)


def train_decoder(net: AutoencoderKL, images: np.ndarray, folder: Path, seed: int,
                  steps: int = 3000, minutes: float | None = None, batch: int = 32,
                  lr: float = 5e-4, device: str = "cpu") -> AutoencoderKL:
    """The decoder alone, for edges as strong as the renders'; latents stay what they were.

    Where the latents leave a detail open, the mean of all that it may be is the least error, and
    it is blurred. A fifth of the absolute error of `edge_energy` asks for the strength of edges,
    wherever exactly they run.
    """
    net.requires_grad_(False)
    net.decoder.requires_grad_(True)

    def loss_at(step, progress):
        rng, torch_rng = step_rng(seed, "decoder", step)
        n, size = (batch, 32) if progress < 0.7 else (batch // 4, images.shape[1])
        x = crops(images, rng, n, size).to(device)
        with half_where_fast(device):
            with torch.no_grad():
                posterior = net.encode(x).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=torch_rng).to(device)
            y = net.decode(posterior.mean + posterior.std * noise).sample
        y = y.float()
        loss = reconstruction_error(y, x) + 0.2 * F.l1_loss(edge_energy(y), edge_energy(x))
        return {"loss": loss, "psnr": 10 * torch.log10(4 / F.mse_loss(y.detach(), x)),
                "edges": laplacian(y.detach()).var() / laplacian(x).var()}

    fit("decoder", folder, net, loss_at, steps, lr, minutes, ema=0.998, device=device)
    return net.requires_grad_(True)


@torch.no_grad()
def set_scale(net: AutoencoderKL, images: np.ndarray) -> AutoencoderKL:
    """Record the factor that gives latents unit variance, as Stable Diffusion's 0.18215 does."""
    latents = net.encode(to_tensor(images[:256]).to(net.device)).latent_dist.mean
    net.register_to_config(scaling_factor=round(1 / float(latents.std()), 5))
    return net


def latent_shard(net: AutoencoderKL, folder: Path, seed: int, number: int) -> np.ndarray:
    """Scaled posterior means of a shard of renders and of their mirror images: float16 (2, SHARD,
    c, 16, 16).

    Kept in `folder / "latents"`, and only read if they are there.
    """
    path = folder / "latents" / f"{seed}-{number:05d}.npy"
    if not path.exists():
        with whole_file(path) as beside, open(beside, "wb") as file:
            np.save(file, encode_both_ways(net, render_shard(folder / "corpus", seed, number)))
    return np.load(path, mmap_mode="r")


@torch.no_grad()
def scaled_latents(net: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """Pixels (n, 3, h, w) in [-1, 1] to means of unit variance, float (n, c, h/4, w/4)."""
    with half_where_fast(net.device):
        return net.encode(pixels).latent_dist.mean.float() * net.config.scaling_factor


def encode_both_ways(net: AutoencoderKL, images: np.ndarray, batch: int = 50) -> np.ndarray:
    """Renders, uint8 (n, 64, 64, 3), to float16 latents (2, n, c, 16, 16), the second of the mirror
    images."""
    views = []
    for view in (images, images[:, :, ::-1]):
        parts = [scaled_latents(net, to_tensor(view[k:k + batch]).to(net.device)).half()
                 for k in range(0, len(view), batch)]
        views.append(torch.cat(parts).cpu().numpy())
    return np.stack(views)


@torch.no_grad()
def reconstruct(net: AutoencoderKL, images: np.ndarray, batch: int = 50) -> np.ndarray:
    """Images, uint8 (n, h, w, 3), through the autoencoder and back, uint8 of the same shape."""
    parts = []
    for first in range(0, len(images), batch):
        x = to_tensor(images[first:first + batch]).to(net.device, net.dtype)
        y = net.decode(net.encode(x).latent_dist.mean).sample.float().clamp(-1, 1)
        parts.append(((y + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(parts)


def psnr(net: AutoencoderKL, images: np.ndarray) -> float:
    """Decibels over whole images: 10 log10(255^2 / mean squared error), the mean over all of
    them."""
    error = reconstruct(net, images).astype(np.float32) - images
    return float(10 * np.log10(255**2 / np.square(error).mean()))

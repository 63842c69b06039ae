"""The toy CLIP: text and image towers trained together on captioned renders.

Its text tower is the toy base's text encoder, frozen from then on as in Stable Diffusion.
Contrastive loss of Radford et al. 2021 (CLIP), equation-free in the paper: symmetric
cross-entropy over the batch's cosine similarities divided by a learnt temperature.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from dbcore.toybox.autoencoder import to_tensor
from dbcore.toybox.fit import fit, half_where_fast, step_rng
from dbcore.toybox.scene import caption

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer, Qwen2Tokenizer

WIDTH = 128


class ImageTower(nn.Module):
    """64 x 64 images in [-1, 1], (n, 3, 64, 64), to features (n, 128), not normalised."""

    def __init__(self, width: int = WIDTH):
        super().__init__()
        plan = (3, 32, 64, 128, 256)
        self.body = nn.Sequential(*(
            layer for a, b in itertools.pairwise(plan)
            for layer in (nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(8, b), nn.SiLU())))
        self.head = nn.Linear(256 * 16, width)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(pixels).flatten(1))


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    from transformers import CLIPTextConfig, CLIPTextModel

    model = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=4 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=tokenizer.model_max_length,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, projection_dim=WIDTH))
    for name, weight in model.named_parameters():
        # wide word vectors keep words apart through the layers, the rare and never seen ones too
        if "token_embedding" in name:
            nn.init.normal_(weight, std=0.5)
        elif "position_embedding" in name:
            nn.init.normal_(weight, std=0.1)
    return model


class ToyCLIP(nn.Module):
    def __init__(self, text: CLIPTextModel, image: ImageTower | None = None):
        super().__init__()
        self.text, self.image = text, image or ImageTower()
        self.project = nn.Linear(WIDTH, WIDTH, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(2.66))  # 1 / temperature 0.07

    def text_features(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids (n, length) to unit vectors (n, 128)."""
        return F.normalize(self.project(self.text(ids).pooler_output), dim=-1)

    def image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Images (n, 3, 64, 64) in [-1, 1] to unit vectors (n, 128)."""
        return F.normalize(self.image(pixels), dim=-1)

    @torch.no_grad()
    def embed_texts(self, texts: list[str]) -> torch.Tensor:
        """Unit vectors (n, 128) of texts; for a CLIP that `load_clip` brought with its
        tokenizer."""
        return self.text_features(tokenize(self.tokenizer, texts))

    @torch.no_grad()
    def embed_images(self, images: list) -> torch.Tensor:
        """Unit vectors (n, 128) of PIL images, which are brought to 64 x 64 pixels."""
        return self.image_features(pixels_of(images))

    def forward(self, ids: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        """Logits (n texts, n images)."""
        scale = self.log_scale.clamp(max=4.6).exp()
        return scale * self.text_features(ids) @ self.image_features(pixels).T


def pixels_of(images: list) -> torch.Tensor:
    """PIL images to (n, 3, 64, 64) in [-1, 1]."""
    return to_tensor(np.stack(
        [np.asarray(i.convert("RGB").resize((64, 64), Image.Resampling.LANCZOS)) for i in images]))


def tokenize(tokenizer: CLIPTokenizer | Qwen2Tokenizer, texts: list[str]) -> torch.Tensor:
    """Token ids (n, model_max_length) of n texts; a chat model's, each as a message of its own."""
    if tokenizer.chat_template:
        messages = [[{"role": "user", "content": text}] for text in texts]
        texts = tokenizer.apply_chat_template(messages, tokenize=False)
    return tokenizer(texts, padding="max_length", truncation=True,
                     max_length=tokenizer.model_max_length, return_tensors="pt").input_ids


def train_clip(tokenizer: CLIPTokenizer, images: np.ndarray, scenes: list, folder: Path,
               seed: int, steps: int = 1500, minutes: float | None = None, batch: int = 128,
               lr: float = 1e-3, device: str = "cpu") -> ToyCLIP:
    torch.manual_seed(seed + 1)
    clip = ToyCLIP(make_text_encoder(tokenizer))

    def loss_at(step, progress):
        rng, _ = step_rng(seed, "clip", step)
        picks = rng.integers(0, len(images), batch)
        x = to_tensor(images[np.sort(picks)])
        texts = [caption(*scenes[k], rng, drop=0.1, drop_details=0.3) for k in np.sort(picks)]
        with half_where_fast(device):
            logits = clip(tokenize(tokenizer, texts).to(device), x.to(device))
        logits, truth = logits.float(), torch.arange(batch, device=device)
        loss = (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2
        return {"loss": loss, "accuracy": (logits.detach().argmax(0) == truth).float().mean()}

    return fit("clip", folder, clip, loss_at, steps, lr, minutes, device=device)


@torch.no_grad()
def retrieval(clip: ToyCLIP, tokenizer: CLIPTokenizer, images: np.ndarray, texts: list[str],
              among: int = 100) -> float:
    """Share of images whose own caption scores highest among `among` captions, all different."""
    right = total = 0
    for first in range(0, len(images) - among + 1, among):
        these = texts[first:first + among]
        logits = clip(tokenize(tokenizer, these), to_tensor(images[first:first + among]))
        best = logits.argmax(0).tolist()
        right += sum(these[b] == these[i] for i, b in enumerate(best))
        total += among
    return right / total


def save_clip(clip: ToyCLIP, folder: Path) -> None:
    """All but the text encoder, which the base's folder has already: `folder/model.safetensors`,
    half precision."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    rest = {k: v.half().contiguous().cpu() for k, v in clip.state_dict().items()
            if not k.startswith("text.")}
    save_file(rest, folder / "model.safetensors")


def load_clip(folder: str | Path) -> ToyCLIP:
    """The toy CLIP of a toy base's folder, with `.tokenizer`, in float32 and eval mode.

    `embed_texts` and `embed_images` give unit vectors whose products are its scores. Its text tower
    lies in `clip_image/`, or is the base's own text encoder.
    """
    from safetensors.torch import load_file
    from transformers import CLIPTextModel, CLIPTokenizer

    own = Path(folder) / "clip_image"
    words = own if (own / "text_encoder").is_dir() else Path(folder)
    clip = ToyCLIP(CLIPTextModel.from_pretrained(words / "text_encoder", dtype=torch.float32))
    held = load_file(own / "model.safetensors")
    clip.load_state_dict({**clip.state_dict(), **held})
    clip.tokenizer = CLIPTokenizer.from_pretrained(words / "tokenizer")
    return clip.eval().requires_grad_(False)

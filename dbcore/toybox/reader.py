"""An attribute reader: what a toy image shows, told by a small network trained on renders.

It is the truth that the gates and the metrics are held against, so it learns from scenes
in which every combination may occur, and never from a sample of the base.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from dbcore.toybox.autoencoder import to_tensor
from dbcore.toybox.fit import fit, half_where_fast, step_rng
from dbcore.toybox.scene import (
    CLASSES,
    COLORS,
    PATTERNS,
    PLACES,
    PROPORTIONS,
    Character,
    View,
    named_build,
)

ANSWERS = {
    "class": CLASSES, "color": tuple(COLORS), "pattern": PATTERNS,
    "color2": ("none", *COLORS), "hat": ("none", *COLORS), "place": tuple(PLACES),
    "side": ("left", "right"), "angle": ("side", "", "front"), "size": ("close up", "", "far away"),
    "light": ("low sun", ""), **dict.fromkeys(PROPORTIONS, ("small", "big")),
}
# the label of a question that has no answer here, such as the side of a face seen from the front
UNASKED = -1


class Reader(nn.Module):
    """Images (n, 3, 64, 64) in [-1, 1] to logits by question, a dict of (n, answers)."""

    def __init__(self, questions: Sequence[str] = tuple(ANSWERS)):
        super().__init__()
        plan = (3, 32, 64, 128, 192)
        layers = []
        for a, b in itertools.pairwise(plan):
            layers += [nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(8, b), nn.SiLU()]
            if b >= 64:
                layers += [nn.Conv2d(b, b, 3, padding=1), nn.GroupNorm(8, b), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.neck = nn.Sequential(nn.Flatten(), nn.Linear(192 * 16, 256), nn.SiLU())
        self.heads = nn.ModuleDict({q: nn.Linear(256, len(ANSWERS[q])) for q in questions})

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.neck(self.body(pixels))
        return {question: head(features) for question, head in self.heads.items()}

    @torch.no_grad()
    def read(self, images: list) -> list[dict[str, str]]:
        """What each RGB image of 64 x 64 pixels shows, a dict of the `ANSWERS`."""
        pixels = to_tensor(np.stack([np.asarray(i.convert("RGB").resize((64, 64)))
                                     for i in images]))
        pixels = pixels.to(self.neck[1].weight.device)
        picked = {q: logits.argmax(-1).tolist() for q, logits in self.eval()(pixels).items()}
        return [{q: ANSWERS[q][answers[i]] for q, answers in picked.items()}
                for i in range(len(images))]


def truth(character: Character, view: View) -> dict[str, str]:
    """The right answers for a scene, to the questions that have one."""
    build = {name: ANSWERS[name][large] for name, large in named_build(character, view).items()}
    seen = {"side": view.side} if view.side else {}
    if view.place != "night":
        seen["light"] = "low sun" if view.sun < 30 else ""
    return {"class": character.kind, "color": character.color, "pattern": character.pattern,
            "color2": character.color2 if character.pattern != "plain" else "none",
            "hat": character.hat or "none", "place": view.place, "angle": view.angle,
            "size": view.size,
            **seen, **build}


def answer_table(scenes: list) -> dict[str, torch.Tensor]:
    """The answers by number, (n,) for each question; `UNASKED` where a scene has none."""
    truths = [truth(*scene) for scene in scenes]
    return {q: torch.tensor([a.index(t[q]) if q in t else UNASKED for t in truths])
            for q, a in ANSWERS.items()}


def train_reader(images: np.ndarray, scenes: list, folder: Path, seed: int, steps: int = 12_000,
                 minutes: float | None = None, batch: int = 64, lr: float = 1e-3,
                 device: str = "cpu") -> Reader:
    """Cross-entropy on every question that has an answer, on renders moved, blurred and slightly
    recoloured at random, half of them mirrored."""
    torch.manual_seed(seed + 3)
    net, answers = Reader(), answer_table(scenes)

    def loss_at(step, progress):
        rng, torch_rng = step_rng(seed, "reader", step)
        picks = np.sort(rng.integers(0, len(images), batch))
        mirrored = torch.rand(batch, generator=torch_rng) < 0.5
        x = moved(to_tensor(images[picks]), mirrored, torch_rng)
        with half_where_fast(device):
            logits = net(disturbed(x, rng, torch_rng).to(device))
        truths = seen_in_mirror({q: answers[q][picks] for q in ANSWERS}, mirrored)
        truths = {q: truth.to(device) for q, truth in truths.items()}
        loss = sum(F.cross_entropy(logits[q].float(), truths[q], ignore_index=UNASKED)
                   for q in ANSWERS)
        right = torch.stack([(logits[q].argmax(-1) == truths[q]).sum()
                             / (truths[q] != UNASKED).sum().clamp(min=1)
                             for q in ANSWERS])
        return {"loss": loss, "worst": right.min()}

    return fit("reader", folder, net, loss_at, steps, lr, minutes, muon=True, ema=0.99,
               device=device)


def moved(x: torch.Tensor, mirrored: torch.Tensor, torch_rng: torch.Generator,
          reach: int = 4) -> torch.Tensor:
    """Images (n, 3, h, w), those of `mirrored` (n,) seen in a mirror, each moved by up to `reach`
    pixels; what comes into the frame is its reflection."""
    x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
    wide = F.pad(x, (reach,) * 4, mode="reflect")
    down, right = torch.randint(2 * reach + 1, (2, len(x)), generator=torch_rng)
    return torch.stack([image[:, i:i + x.shape[2], j:j + x.shape[3]]
                        for image, i, j in zip(wide, down, right, strict=True)])


def seen_in_mirror(answers: dict[str, torch.Tensor],
                   mirrored: torch.Tensor) -> dict[str, torch.Tensor]:
    """An `answer_table`'s rows for images of which some are mirrored: left is right there."""
    side = answers["side"]
    return answers | {"side": torch.where(mirrored & (side != UNASKED), 1 - side, side)}


def disturbed(x: torch.Tensor, rng: np.random.Generator,
              torch_rng: torch.Generator) -> torch.Tensor:
    """A batch of renders, blurred at random, with noise: samples are softer and less sure than
    renders."""
    if rng.random() < 0.3:
        x = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
    return x + 0.03 * torch.randn(x.shape, generator=torch_rng)


def accuracy(reader: Reader, images: np.ndarray, scenes: list) -> dict[str, float]:
    """Share of right answers by question on renders, uint8 (n, 64, 64, 3)."""
    read = [answer for first in range(0, len(images), 100)
            for answer in reader.read([Image.fromarray(p) for p in images[first:first + 100]])]
    return shares_right(read, [truth(*scene) for scene in scenes])


def shares_right(read: list[dict], truths: list[dict]) -> dict[str, float]:
    """By question: the share of right answers among the images to which the question can be put."""
    asked = {q: [(r[q], t[q]) for r, t in zip(read, truths, strict=True) if q in t]
             for q in read[0]}
    return {q: float(np.mean([a == b for a, b in pairs])) for q, pairs in asked.items() if pairs}


def load_reader(folder: str | Path) -> Reader:
    """The reader of a toy base's folder (which has it in `reader/`), in float32 and eval mode."""
    from safetensors.torch import load_file

    held = load_file(Path(folder) / "reader" / "model.safetensors")
    reader = Reader([q for q in ANSWERS if f"heads.{q}.weight" in held])
    reader.load_state_dict(held)
    return reader.eval().requires_grad_(False)

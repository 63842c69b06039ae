"""A subject encoder: which individual an image shows, wherever it stands and whatever it wears.

In the toy world it plays the part that DINO has in the DreamBooth paper (Ruiz et al. 2023): CLIP,
taught with captions, need not tell two red dogs apart. It shares no image and no weight with the
base, its CLIP or the attribute reader. Trained by the supervised contrastive loss (Khosla et al.
2020): two views of one character are drawn together, and apart from every other character of the
batch.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from dbcore.toybox.autoencoder import to_tensor
from dbcore.toybox.clip import ImageTower, pixels_of
from dbcore.toybox.fit import fit, half_where_fast, step_rng
from dbcore.toybox.reader import disturbed
from dbcore.toybox.scene import (
    CLASSES,
    COLORS,
    PLACES,
    Character,
    View,
    random_character,
    random_view,
    with_hat,
)

VIEWS = 4  # images of a subject
AMONG = 50  # subjects of one class that follow each other; so many are told apart in the test
SUBJECTS, TEST_SUBJECTS = 5000, AMONG * len(CLASSES)


class SubjectEncoder(ImageTower):
    """The toy CLIP's image tower with another lesson: (n, 3, 64, 64) in [-1, 1] to unit vectors (n,
    128)."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return F.normalize(super().forward(pixels).float(), dim=-1)

    @torch.no_grad()
    def embed_images(self, images: list) -> torch.Tensor:
        """Unit vectors (n, 128) of PIL images, which are brought to 64 x 64 pixels."""
        return self(pixels_of(images))


def sample_view(seed: int, k: int) -> tuple[Character, View]:
    """The k-th image of a world of subjects, `VIEWS` of each, `AMONG` subjects of a class and
    then of the next.

    Places are equally likely, and half the images wear a hat that is not the subject's own:
    neither place nor hat says who it is.
    """
    who = k // VIEWS
    character = random_character(np.random.default_rng((seed, who, 31)),
                                 kind=CLASSES[who // AMONG % len(CLASSES)])
    rng = np.random.default_rng((seed, k, 37))
    hat = str(rng.choice(list(COLORS))) if rng.random() < 0.5 else ""
    return with_hat(character, hat), random_view(rng, place=str(rng.choice(list(PLACES))))


def pick_subjects(rng: np.random.Generator, step: int, count: int, total: int) -> np.ndarray:
    """`count` of `total` subjects; at every second step all of one class, so that the class gives
    nobody away."""
    pool = np.arange(total)
    if step % 2:
        pool = pool[pool // AMONG % len(CLASSES) == step // 2 % len(CLASSES)]
    return rng.choice(pool, min(count, len(pool)), replace=False)


def contrastive_loss(vectors: torch.Tensor, who: torch.Tensor,
                     temperature: float = 0.1) -> torch.Tensor:
    """Khosla et al. 2020, equation 2: unit vectors (n, d) and whose each is, (n,); everyone comes
    twice or more.

    An image's loss is -log of the softmax of its cosines to all others, averaged over those of its
    own subject.
    """
    oneself = torch.eye(len(who), dtype=torch.bool, device=vectors.device)
    same = (who[:, None] == who) & ~oneself
    logits = (vectors @ vectors.T / temperature).masked_fill(oneself, -torch.inf)
    right = logits.log_softmax(dim=1).masked_fill(~same, 0)
    return -(right.sum(dim=1) / same.sum(dim=1)).mean()


def train_subject_encoder(images: np.ndarray, folder: Path, seed: int, steps: int = 3000,
                          minutes: float | None = None, batch: int = 64, lr: float = 1e-3,
                          device: str = "cpu") -> SubjectEncoder:
    """`images`: `sample_view(seed, k)` in order, uint8 (n, 64, 64, 3). A step takes two views of
    `batch` subjects.

    Each view is jittered, blurred and recoloured for itself: a soft sample must be near the sharp
    photos of its subject, and few subjects must stand for many.
    """
    torch.manual_seed(seed + 4)
    net = SubjectEncoder()

    def loss_at(step, progress):
        rng, torch_rng = step_rng(seed, "subject", step)
        who = pick_subjects(rng, step, batch, len(images) // VIEWS)
        views = rng.permuted(np.tile(np.arange(VIEWS), (len(who), 1)), axis=1)[:, :2]
        x = torch.cat([disturbed(jittered(to_tensor(images[who * VIEWS + view]), torch_rng), rng,
                                 torch_rng)
                       for view in views.T])
        with half_where_fast(device):
            vectors = net(x.to(device))
        owners = torch.from_numpy(np.tile(who, 2)).to(device)
        return {"loss": contrastive_loss(vectors, owners),
                "right": nearest_is_own(vectors.detach(), owners)}

    return fit("subject", folder, net, loss_at, steps, lr, minutes, muon=True, ema=0.99,
               device=device)


def jittered(x: torch.Tensor, torch_rng: torch.Generator) -> torch.Tensor:
    """Images (n, 3, h, w), half of them mirrored, each scaled by 0.8 to 1.25 and moved by up to a
    tenth of its size."""
    def uniform(low, high):
        return low + (high - low) * torch.rand(len(x), generator=torch_rng)

    scale = 1.25 ** uniform(-1, 1)
    side = torch.where(uniform(-1, 1) < 0, -1.0, 1.0)
    zero = torch.zeros(len(x))
    theta = torch.stack([side * scale, zero, uniform(-0.2, 0.2),
                         zero, scale, uniform(-0.2, 0.2)], dim=1).view(-1, 2, 3)
    return F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False),
                         padding_mode="reflection", align_corners=False)


def nearest_is_own(vectors: torch.Tensor, who: torch.Tensor) -> torch.Tensor:
    """Share of images whose nearest other image is of the same subject; unit vectors (n, d),
    owners (n,)."""
    nearest = (vectors @ vectors.T).fill_diagonal_(-2).argmax(dim=1)
    return (who[nearest] == who).float().mean()


def subject_retrieval(encoder: SubjectEncoder, images: np.ndarray) -> tuple[float, float]:
    """Shares of images whose own subject is nearest among `AMONG`: of all classes, and of its
    class alone.

    `images`: `VIEWS` of each of `TEST_SUBJECTS` subjects, in the order of `sample_view`. Each
    subject is known by its first view alone, and asked for with the others.
    """
    pixels = to_tensor(images).to(encoder.head.weight.device)
    with torch.no_grad():
        vectors = torch.cat([encoder(x) for x in pixels.split(100)])
    of_class = vectors.unflatten(0, (-1, AMONG, VIEWS))
    of_all = of_class.transpose(0, 1).flatten(0, 1).unflatten(0, (-1, AMONG))
    return first_among(of_all), first_among(of_class)


def first_among(vectors: torch.Tensor) -> float:
    """Vectors (groups, subjects, views, d); within each group, is the first view of a subject
    nearest to its others?"""
    scores = torch.einsum("gsvd,gtd->gsvt", vectors[:, :, 1:], vectors[:, :, 0])
    own = torch.arange(vectors.shape[1], device=vectors.device)[:, None]
    return float((scores.argmax(dim=-1) == own).float().mean())


def load_subject_encoder(folder: str | Path) -> SubjectEncoder:
    """The encoder of a toy base's folder (which has it in `subject/`), in float32 and eval mode."""
    from safetensors.torch import load_file

    encoder = SubjectEncoder()
    encoder.load_state_dict(load_file(Path(folder) / "subject" / "model.safetensors"))
    return encoder.eval().requires_grad_(False)

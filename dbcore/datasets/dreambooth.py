"""DreamBooth's data: which photo, seen how, with which words, at every step of a run.

Sample g of a run (counted over steps, accumulation, processes and batch) is photo order[g] in an
order drawn anew for each pass, so a batch is a function of (seed, step): there is no loader to
rewind, no partial batch, and processes share the samples of one sequence. With aspect-ratio buckets
each has a sequence of its own, and the bucket of a batch is a function of (seed, step) as well.
"""

from __future__ import annotations

import filecmp
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from dbcore.config import AUTO
from dbcore.datasets.photos import (
    Bucket,
    Photo,
    PhotoError,
    crop_box,
    crop_to,
    nearest_bucket,
    shown,
)
from dbcore.datasets.prompts import without_identifier
from dbcore.datasets.store import TensorStore
from dbcore.models.process import Density
from dbcore.utils.devices import to_device
from dbcore.utils.seeding import integer, normal, permutation, uniform

if TYPE_CHECKING:
    from dbcore.config import TrainConfig
    from dbcore.models.base import Family

# places along the side that is cropped that a random crop chooses from, so that each is encoded
# once
CROPS = 4

order = lru_cache(maxsize=32)(permutation)


@dataclass(frozen=True)
class Sample:
    """One photo as one step sees it."""

    photo: Photo
    prompt: str
    bucket: Bucket  # that it is cropped to
    place: float  # of the crop along the side that is cropped, in [0, 1]
    mirrored: bool
    number: int  # within its step; what is random of it depends on it
    is_class: bool = False

    @property
    def view(self) -> tuple[Path, Bucket, float, bool]:
        """What its latents depend on."""
        return self.photo.path, self.bucket, self.place, self.mirrored

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Of the crop in the photo, in pixels: left, top, right, bottom."""
        return crop_box(self.photo.size, self.bucket, self.place)

    @property
    def geometry(self) -> list[int]:
        """Height and width of the photo, top and left of the crop once resized, height and width of
        the crop."""
        width, height = self.photo.size
        left, top, right, bottom = self.box
        if self.mirrored:
            left = width - right
        scale = self.bucket[0] / (bottom - top)
        return [height, width, round(top * scale), round(left * scale), *self.bucket]


class DreamBoothData:
    """Photos of the subject, and, with prior preservation, of its class.

    With prior prediction the class's samples are the subject's own, noise and all, without the
    identifier.
    """

    def __init__(self, config: TrainConfig, photos: Iterable[Photo],
                 class_photos: Iterable[Photo] = ()):
        self.config, self.photos, self.class_photos = config, list(photos), list(class_photos)
        self.buckets = [nearest_bucket(photo.size, config.buckets) for photo in self.photos]
        self.photos_of = {bucket: [photo for photo, own in zip(self.photos, self.buckets)
                                   if own == bucket] for bucket in {*self.buckets}}
        self.latents = TensorStore()
        c = config
        self.density = None if c.weighting_scheme == AUTO else Density(
            c.weighting_scheme, c.logit_mean, c.logit_std, c.mode_scale)

    def samples(self, step: int, micro: int = 0, rank: int = 0, world: int = 1) -> list[Sample]:
        """The batch of one process: instance samples first, then as many for the class.

        `micro` counts the batches of one optimizer step, `rank` of `world` the processes, whose
        batches are of one bucket. Class images are cropped to it: they have none of their own.
        """
        c = self.config
        own = range(rank * c.train_batch_size, (rank + 1) * c.train_batch_size)
        size, batch = world * c.train_batch_size, step * c.gradient_accumulation_steps + micro
        bucket, before = self._bucket(batch)
        rows = [self._sample(step, micro * size + k, before * size + k, bucket, False) for k in own]
        if self.class_photos:
            rows += [self._sample(step, micro * size + k, batch * size + k, bucket, True)
                     for k in own]
        if self.config.prior_prediction:
            rows += [replace(row, prompt=self._class_words(row.prompt)) for row in rows]
        return rows

    def _bucket(self, batch):
        """(bucket, how many earlier batches were of it) of a batch, all processes' together.

        In a pass over the photos each has one batch, in a random order, and says the bucket. So a
        bucket has as many batches as photos, and all photos are seen equally often.
        """
        epoch, place = divmod(batch, len(self.photos))
        turns = order(len(self.photos), self.config.seed, "bucket", epoch)
        buckets = [self.buckets[k] for k in turns]
        bucket = buckets[place]
        return bucket, epoch * len(self.photos_of[bucket]) + buckets[:place].count(bucket)

    def _words(self, photo, step, number):
        c, text = self.config, photo.caption or self.config.instance_prompt
        if uniform(c.seed, "caption dropout", step, number) < c.caption_dropout:
            return ""
        return shuffle_tags(text, c.seed, step, number) if c.shuffle_tags else text

    def _class_words(self, prompt):
        return without_identifier(prompt, self.config.instance_prompt,
                                  str(self.config.class_prompt))

    def _sample(self, step, number, count, bucket, is_class):
        photos, stream = ((self.class_photos, "class") if is_class
                          else (self.photos_of[bucket], "instance"))
        seed = self.config.seed
        epoch, place = divmod(count, len(photos))
        photo = photos[order(len(photos), seed, stream, epoch)[place]]
        whole = crop_box(photo.size, bucket) == (0, 0, *photo.size)
        crop = 0.5 if self.config.center_crop or whole else (
            integer(CROPS, seed, f"{stream} crop", step, number) / (CROPS - 1))
        mirrored = self.config.random_flip and integer(2, seed, f"{stream} flip", step, number) == 1
        prompt = self.config.class_prompt if is_class else self._words(photo, step, number)
        return Sample(photo, prompt, bucket, crop, mirrored, number, is_class)

    def encode(self, base: Family, samples: Iterable[Sample]) -> None:
        """Latents of each new view among `samples`, into the store.

        One at a time: in a batch the last bits depend on the neighbours, and a resumed run has
        others.
        """
        for sample in samples:
            if sample.view not in self.latents:
                self.latents.put(sample.view, encode_views(base, [sample], self.config)[0])

    def batch(self, base: Family, samples: Sequence[Sample], step: int) -> dict[str, Any]:
        """Tensors of a batch on the base's device.

        `samples`: of one bucket. x0, noise: (n, c, h, w); t: (n,); mask: (n, 1, h, w) in [0, 1];
        prompts: n strings;
        geometry: (n, 6) pixels, as `Family.predict` takes it. x0 is drawn from the posterior: mean
        + std * epsilon.
        """
        cached = self.config.cache_latents
        rows = ([self.latents.get(sample.view) for sample in samples] if cached
                else encode_views(base, samples, self.config))
        views = {name: torch.stack([row[name] for row in rows]) for name in ("mean", "std", "mask")}
        shape = views["mean"].shape[1:]
        epsilons, noises, us = zip(*(self.draws(sample, step, shape) for sample in samples))
        drawn = {"eps": torch.stack(epsilons), "noise": torch.stack(noises),
                 "t": base.process.timestep(torch.tensor(us, dtype=torch.float64),
                                            shape[1:].numel(), self.density),
                 "geometry": torch.tensor([sample.geometry for sample in samples],
                                          dtype=torch.float32)}
        batch = (to_device({**views, **drawn}, base.device) if cached
                 else {**views, **to_device(drawn, base.device)})
        x0 = batch.pop("mean") + batch.pop("std") * batch.pop("eps")
        return {"x0": x0, "prompts": [sample.prompt for sample in samples], **batch}

    def draws(self, sample: Sample, step: int,
              shape: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, float]:
        """(posterior's epsilon, noise, u of the timestep) of one sample, functions of (seed,
        stream, step, sample)."""
        kind, seed = ("class " if sample.is_class else ""), self.config.seed
        epsilon = normal(shape, seed, kind + "posterior", step, [sample.number])[0]
        noise = normal(shape, seed, kind + "noise", step, [sample.number])[0]
        if self.config.noise_offset:
            shift = normal((shape[0], 1, 1), seed, kind + "noise offset", step, [sample.number])[0]
            noise = noise + self.config.noise_offset * shift
        return epsilon, noise, uniform(seed, kind + "timestep", step, sample.number)


def shuffle_tags(text: str, seed: int, step: int, sample: int) -> str:
    """Comma-separated tags in an order that is a function of (seed, step, sample), the first one
    kept."""
    first, *tags = (tag.strip() for tag in text.split(","))
    order = permutation(len(tags), seed, "tags", step, sample)
    return ", ".join([first, *(tags[place] for place in order)]) if tags else text


def steps_per_epoch(config: TrainConfig, photos: int, processes: int = 1) -> int:
    """Optimizer steps that see each of `photos` (how many) once."""
    return -(-photos // (config.train_batch_size * config.gradient_accumulation_steps * processes))


def refuse_shared(photos: Iterable[Photo], class_photos: Iterable[Photo]) -> None:
    """Raises PhotoError for a photo that is an image of the class too: by a link, or as a copy."""
    by_size: dict[int, list[Path]] = {}
    for photo in photos:
        by_size.setdefault(photo.path.stat().st_size, []).append(photo.path)
    shared = next(((photo.path, own) for photo in class_photos
                   for own in by_size.get(photo.path.stat().st_size, [])
                   if filecmp.cmp(photo.path, own, shallow=False)), None)
    if shared is not None:
        raise PhotoError(f"--class_data_dir leads to {shown(shared[0])}, which is a photo "
                         f"of the subject, {shown(shared[1].name)}: it would be learnt as its "
                         "class; choose a folder of class images alone")


def encode_views(base: Family, samples: Sequence[Sample],
                 config: TrainConfig) -> list[dict[str, torch.Tensor]]:
    """[{"mean", "std", "mask"}] of samples, one autoencoder pass."""
    looks = [look(sample, config) for sample in samples]
    mean, std = base.encode_images(torch.stack([pixels for pixels, _ in looks]))
    masks = [torch.ones(1, *mean.shape[2:]) if mask is None else shrink(mask, mean.shape[2:])
             for _, mask in looks]
    return [{"mean": m, "std": s, "mask": mask.to(m.device)}
            for m, s, mask in zip(mean, std, masks)]


def look(sample: Sample, config: TrainConfig) -> tuple[torch.Tensor, Image.Image | None]:
    """(pixels (3, h, w) in [-1, 1], mask image or None) of a photo as a sample sees it."""
    image = crop_to(sample.photo.load(), sample.box, sample.bucket, config.image_interpolation_mode)
    mask = sample.photo.load_mask() if config.use_masks else None
    mask = mask and crop_to(mask, sample.box, sample.bucket, "nearest")
    if sample.mirrored:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        mask = mask and mask.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return to_pixels(image), mask


def to_pixels(image: Image.Image) -> torch.Tensor:
    """An RGB image as a float tensor (3, h, w) in [-1, 1]."""
    return torch.from_numpy(np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1)


def shrink(mask: Image.Image, size: tuple[int, int]) -> torch.Tensor:
    """A mask image as (1, h, w) in [0, 1] at the latents' size: the white share of each latent's
    patch."""
    return torch.from_numpy(np.asarray(mask.resize(size[::-1], Image.Resampling.BOX),
                                       dtype=np.float32) / 255)[None]

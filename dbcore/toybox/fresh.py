"""Scenes for a denoiser that learns by the minute: made while it trains, held on the device that
trains.

Other processes think of scenes and word their captions; the device renders and encodes them between
two steps, and no step waits for either.
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from dbcore.toybox.autoencoder import CHANNELS, DOWN, scaled_latents, to_pixels
from dbcore.toybox.clip import tokenize
from dbcore.toybox.corpus import SIZE, sample
from dbcore.toybox.denoiser import NO_CAPTION, WHOLE_CAPTION, greedy_noise, partial_caption
from dbcore.toybox.fit import to_device
from dbcore.toybox.scene import caption, mirror

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from transformers import CLIPTokenizer, Qwen2Tokenizer

    from dbcore.toybox.scene import Character, View

CHUNK, CAPTIONS = 256, 4  # scenes made at once; captions of each image, the first tells all


@functools.cache
def load_tokenizer(folder: Path) -> CLIPTokenizer | Qwen2Tokenizer:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def captions(scene: tuple[Character, View], rng: np.random.Generator) -> list[str]:
    return [caption(*scene), *(partial_caption(scene, rng) for _ in range(CAPTIONS - 1))]


def prepare(folder: Path, seed: int, number: int) -> tuple[list[np.ndarray], torch.Tensor]:
    """Chunk `number` of a world, all that needs no device.

    The scenes as `tracer.pack` gives them, and token ids, int16 (CHUNK, 2, CAPTIONS, length), of
    the captions of each image and of its mirror image. `folder`: the tokenizer's.
    """
    from dbcore.toybox.tracer import pack

    rng = np.random.default_rng((seed, number, 41))
    scenes = [sample(seed, k) for k in range(number * CHUNK, (number + 1) * CHUNK)]
    sides = [side for scene in scenes for side in (scene, mirror(*scene))]
    ids = tokenize(load_tokenizer(folder), [text for side in sides for text in captions(side, rng)])
    return pack(scenes), ids.short().view(CHUNK, 2, CAPTIONS, -1)


def start_workers(device: torch.device) -> Executor:
    """All cores but two for a GPU's scenes; beside a CPU's training, one thread."""
    if device.type != "cuda":
        return ThreadPoolExecutor(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process a core is enough
    return ProcessPoolExecutor(max(1, (os.cpu_count() or 1) - 2),
                               multiprocessing.get_context("spawn"))


class FreshLatents:
    """Latents and captions on the autoencoder's device: `first` scenes, then more as steps go by.

    Each scene is used about `REUSE` times as long as the workers keep up; where they do not, those
    that are there are used again. Beyond `capacity` scenes the newest take the oldest ones' places.
    `steps_done` says how far an earlier run came: its scenes do not come again.
    """

    REUSE = 16

    def __init__(self, autoencoder: AutoencoderKL, tokenizer_folder: Path, seed: int, batch: int,
                 first: int, capacity: int, steps_done: int = 0):
        self.autoencoder, self.device = autoencoder, autoencoder.device
        self.batch, self.first, self.steps_done = batch, first, steps_done
        seen = first + steps_done * batch // self.REUSE if steps_done else 0
        self.numbers = itertools.count(-(-seen // CHUNK))
        self.workers = start_workers(self.device)
        submit: Callable = self.workers.submit
        self.make = functools.partial(submit, prepare, tokenizer_folder, seed)
        ahead = 2 * getattr(self.workers, "_max_workers", 1)
        self.waiting = deque(self.make(next(self.numbers)) for _ in range(ahead))
        self.empty = tokenize(load_tokenizer(tokenizer_folder), [""]).to(self.device)
        rows, side = -(-capacity // CHUNK) * CHUNK, SIZE // DOWN
        new = functools.partial(torch.empty, device=self.device)
        self.ids = new(rows, 2, CAPTIONS, self.empty.shape[1], dtype=torch.int16)
        self.latents = new(rows, 2, CHANNELS, side, side, dtype=torch.half)
        self.count = 0

    def close(self) -> None:
        self.workers.shutdown(wait=False, cancel_futures=True)

    def add(self) -> None:
        """Render and encode the next chunk, once it has been prepared, and ask for another."""
        from dbcore.toybox.tracer import render_packed

        packed, ids = self.waiting.popleft().result()
        self.waiting.append(self.make(next(self.numbers)))
        pixels = to_pixels(render_packed(packed, SIZE, self.device))
        first = self.count % len(self.latents)
        rows = slice(first, first + CHUNK)
        for side, view in enumerate((pixels, pixels.flip(-1))):
            self.latents[rows, side] = scaled_latents(self.autoencoder, view).half()
        self.ids[rows] = to_device(ids, self.device)
        self.count += CHUNK

    def inputs(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Latents, noise, uniform u and token ids of a batch, as `denoiser.Latents` gives them."""
        due = self.first + (step - self.steps_done) * self.batch // self.REUSE
        while self.count < self.first or (self.count < due and self.waiting[0].done()):
            self.add()
        draw = functools.partial(torch.randint, size=(self.batch,), device=self.device)
        scene, side = draw(min(self.count, len(self.latents))), draw(2)
        part, share = draw(CAPTIONS - 1) + 1, torch.rand(self.batch, device=self.device)
        ids = self.ids[scene, side, torch.where(share < WHOLE_CAPTION, 0, part)].long()
        ids = torch.where(share[:, None] < NO_CAPTION, self.empty, ids)
        z = self.latents[scene, side].float()
        # a level from each of equal bands, in any order: the first of a group has its choice of
        # noise
        u = (torch.rand_like(share).argsort() + torch.rand_like(share)) / self.batch
        return z, greedy_noise(z), u, ids

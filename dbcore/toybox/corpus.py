"""The images the toy base learns from: sample k is a function of (seed, k) alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from dbcore.toybox.scene import COLORS, PLACES, Character, View, random_character, random_view
from dbcore.utils.files import whole_file

SIZE, SHARD = 64, 2000  # pixels a side; renders a file

HELD_OUT = {  # (kind, color) pairs never rendered for training; the gates ask the base for them
    ("dog", "purple"), ("cat", "green"), ("duck", "blue"), ("car", "pink"), ("teapot", "orange"),
    ("robot", "brown"),
}


def sample(seed: int, k: int) -> tuple[Character, View]:
    """The k-th scene of a world; never one of the `HELD_OUT` combinations."""
    rng = np.random.default_rng((seed, k))
    while True:
        character = random_character(rng)
        if (character.kind, character.color) not in HELD_OUT:
            return character, random_view(rng)


def sample_held_out(seed: int, k: int) -> tuple[Character, View]:
    """The k-th scene of the `HELD_OUT` combinations, each in its turn; every second round wears a
    hat."""
    rng = np.random.default_rng((seed, k, 29))
    pairs = sorted(HELD_OUT)
    kind, color = pairs[k % len(pairs)]
    character = random_character(
        rng, kind=kind, color=color, color2=str(rng.choice([c for c in COLORS if c != color])),
        hat=str(rng.choice(list(COLORS))) if k // len(pairs) % 2 else "")
    return character, random_view(rng, place=str(rng.choice(list(PLACES))))


def scenes(seed: int, count: int) -> list[tuple[Character, View]]:
    return [sample(seed, k) for k in range(count)]


def render_corpus(folder: Path, seed: int, count: int, draw: Callable = sample,
                  device: str = "cpu") -> np.ndarray:
    """Renders of the scenes `draw(seed, k)`, k = 0..count-1: uint8 (count, 64, 64, 3), kept in
    shards in `folder`."""
    numbers = range(-(-count // SHARD))
    return np.concatenate([render_shard(folder, seed, k, draw, device) for k in numbers])[:count]


def render_shard(folder: Path, seed: int, number: int, draw: Callable = sample,
                 device: str = "cpu") -> np.ndarray:
    """Renders `number * SHARD` and the following of a world, uint8 (SHARD, 64, 64, 3), read if they
    are there.

    A shard is written whole or not at all, so a killed run, or a second one beside it, goes on
    where it was.
    """
    path = folder / f"{seed}-{number:05d}.npy"
    if not path.exists():
        from dbcore.toybox.tracer import pack, render_packed

        packed = pack([draw(seed, k) for k in range(number * SHARD, (number + 1) * SHARD)])
        with whole_file(path) as beside, open(beside, "wb") as file:
            np.save(file, render_packed(packed, SIZE, device).cpu().numpy())
    return np.load(path)

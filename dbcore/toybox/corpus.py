"""The pictures the toy base learns from: sample k is a function of (seed, k) alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from dbcore.toybox.scene import COLORS, PLACES, Character, View, random_character, random_view

HELD_OUT = {  # (kind, color) pairs never rendered for training; the gates ask the base for them
    ("dog", "purple"), ("cat", "green"), ("duck", "blue"), ("car", "pink"), ("teapot", "orange"), ("robot", "brown"),
}


def sample(seed: int, k: int) -> tuple[Character, View]:
    """The k-th scene of a world; never one of the `HELD_OUT` combinations."""
    rng = np.random.default_rng((seed, k))
    while True:
        character = random_character(rng)
        if (character.kind, character.color) not in HELD_OUT:
            return character, random_view(rng)


def sample_held_out(seed: int, k: int) -> tuple[Character, View]:
    """The k-th scene of the `HELD_OUT` combinations, each in its turn; every second round wears a hat."""
    rng = np.random.default_rng((seed, k, 29))
    pairs = sorted(HELD_OUT)
    kind, color = pairs[k % len(pairs)]
    character = random_character(
        rng, kind=kind, color=color, color2=str(rng.choice([c for c in COLORS if c != color])),
        hat=str(rng.choice(list(COLORS))) if k // len(pairs) % 2 else "")
    return character, random_view(rng, place=str(rng.choice(list(PLACES))))


def scenes(seed: int, count: int) -> list[tuple[Character, View]]:
    return [sample(seed, k) for k in range(count)]


def render_corpus(path: Path, seed: int, count: int, size: int = 64, chunk: int = 500, draw=sample) -> np.ndarray:
    """Render (or finish rendering) scenes `draw(seed, k)`, k = 0..count-1, into `path`, a .npy file.

    Returns uint8 (count, size, size, 3).

    A progress file beside it counts finished chunks, so a killed run goes on where it was.
    """
    from tqdm import tqdm

    from dbcore.toybox.tracer import render_array

    path.parent.mkdir(parents=True, exist_ok=True)
    progress = path.with_suffix(".json")
    wanted = {"seed": seed, "count": count, "size": size}
    state = json.loads(progress.read_text()) if progress.exists() else {}
    start = state["done"] if path.exists() and {**state, **wanted} == state else 0
    pictures = np.lib.format.open_memmap(path, "r+" if start else "w+", np.uint8, (count, size, size, 3))
    for first in tqdm(range(start, count, chunk), desc="rendering", unit="chunk"):
        last = min(first + chunk, count)
        for k in range(first, last):
            pictures[k] = (render_array(*draw(seed, k), size) * 255 + 0.5).astype(np.uint8)
        pictures.flush()
        progress.write_text(json.dumps({**wanted, "done": last}))
    return pictures

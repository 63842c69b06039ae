"""Randomness without state: every random number is a function of (seed, stream, step, sample).

A generator that is carried along must be saved, restored and kept in step between processes, and
one draw more in one place changes all that follow. Here each draw names what it is for, so a
resumed run, a run with other validation images and a run on more processes draw the same numbers.
"""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import torch


def key(seed: int, stream: str, step: int = 0, sample: int = 0) -> int:
    """A 63-bit integer that looks random: the hash of its arguments.

    `stream` says what is drawn.
    """
    text = f"{seed}/{stream}/{step}/{sample}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def generator(seed: int, stream: str, step: int = 0, sample: int = 0) -> torch.Generator:
    """A CPU `torch.Generator`: the same numbers whatever device they are used on."""
    return torch.Generator().manual_seed(key(seed, stream, step, sample))


def normal(shape: Sequence[int], seed: int, stream: str, step: int = 0,
           samples: Iterable[int] = (0,)) -> torch.Tensor:
    """Standard normal float32 of shape (len(samples), *shape), one generator a sample."""
    return torch.stack([torch.randn(shape, generator=generator(seed, stream, step, s))
                        for s in samples])


def integer(high: int, seed: int, stream: str, step: int = 0, sample: int = 0) -> int:
    """One integer in [0, high), evenly enough: `high` is far below 2**63."""
    return key(seed, stream, step, sample) % high


def uniform(seed: int, stream: str, step: int = 0, sample: int = 0) -> float:
    """One number strictly between 0 and 1, float64, whose first three decimals are `integer(1000,
    ...)`."""
    rest, first = divmod(key(seed, stream, step, sample), 1000)
    return (first + (rest % 2**32 + 0.5) / 2**32) / 1000


def permutation(count: int, seed: int, stream: str, step: int = 0, sample: int = 0) -> list[int]:
    """A list: 0 .. count - 1 in random order."""
    return np.random.default_rng(key(seed, stream, step, sample)).permutation(count).tolist()

"""The subjects that ship: a fixed character each, five "photos" from several sides."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from dbcore.toybox.corpus import HELD_OUT
from dbcore.toybox.scene import CLASSES, COLORS, Character, View, random_character, random_view

SHIPPED = {
    "dog": Character("dog", "orange", "striped", "blue", ears=0.9, muzzle=0.7, legs=0.15, tail=0.8,
                     neck=0.4, length=0.9),
    "dog2": Character("dog", "white", "spotted", "black", ears=0.6, muzzle=0.4, legs=0.8, tail=0.3,
                      neck=0.7, length=0.4),
    "cat": Character("cat", "purple", "striped", "yellow", ears=0.8, muzzle=0.4, legs=0.5, tail=0.9,
                     neck=0.6, length=0.5),
    "duck": Character("duck", "red", "spotted", "white", ears=0.2, muzzle=0.6, legs=0.4, tail=0.6,
                      neck=0.7, length=0.6),
    "car": Character("car", "green", "striped", "white", ears=0.8, muzzle=0.5, legs=0.7, tail=0.4,
                     neck=0.5, length=0.4),
    "teapot": Character("teapot", "blue", "spotted", "yellow", ears=0.8, muzzle=0.8, legs=0.6,
                        tail=0.7, neck=0.6, length=0.7),
    "robot": Character("robot", "pink", "striped", "purple", ears=0.6, muzzle=0.7, legs=0.5,
                       tail=0.5, neck=0.6, length=0.8),
}
BENCH_SEED = 5
SHIPPED_SIZE = 512  # pixels, as Stable Diffusion takes photos
PHOTOS = (  # place, ranges of the azimuth and the distance, height of the sun, whether mirrored
    ("studio", (24, 40), (1.03, 1.08), 51.5, False),
    ("grass", (2, 12), (1.03, 1.08), 46.0, True),
    ("floor", (52, 72), (1.03, 1.08), 56.0, False),
    ("street", (34, 50), (1.25, 1.35), 20.0, True),
    ("forest", (12, 24), (1.1, 1.15), 48.0, False),
)


def photo_views(seed: int, count: int = 5) -> list[View]:
    """Views as a careful photographer takes them: five places, both sides, several angles,
    distances and lights."""
    rng = np.random.default_rng((seed, 17))
    views = []
    for k in range(count):
        place, azimuth, distance, sun, flip = PHOTOS[k % len(PHOTOS)]
        views.append(random_view(rng, place=place, azimuth=float(rng.uniform(*azimuth)), sun=sun,
                                 distance=float(rng.uniform(*distance)),
                                 flip=flip ^ (k // len(PHOTOS) % 2 == 1)))
    return views


def write_subject(folder: Path, character: Character, seed: int = 0, count: int = 5,
                  size: int = 128, identifier: str = "sks") -> list[Path]:
    """Render `count` photos of a character into `folder`, with a subject.json that says who it
    is."""
    from dbcore.toybox.tracer import render

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for k, view in enumerate(photo_views(seed, count)):
        paths.append(folder / f"{k:02d}.png")
        render(character, view, size).save(paths[-1], optimize=True)
    about = {"class_noun": character.kind,
             "instance_prompt": f"a photo of {identifier} {character.kind}",
             "class_prompt": f"a photo of a {character.kind}", "character": character.to_dict()}
    (folder / "subject.json").write_text(json.dumps(about, indent=2) + "\n")
    return paths


def bench_subjects(seed: int = BENCH_SEED, per_class: int = 5) -> dict[str, Character]:
    """The subjects of `data/toybench.json`, those of a class in different colours.

    All are bareheaded, for hats are asked for, and none is a `HELD_OUT` combination: what the base
    itself has never seen would be measured with what DreamBooth teaches it.
    """
    found = {}
    for kind in CLASSES:
        rng = np.random.default_rng((seed, *kind.encode()))
        colors = rng.permutation([color for color in COLORS if (kind, color) not in HELD_OUT])
        for k, color in enumerate(map(str, colors[:per_class]), start=1):
            mark = str(rng.choice([other for other in COLORS if other != color]))
            found[f"{kind}{k}"] = random_character(rng, kind=kind, color=color, color2=mark, hat="")
    return found


def write_bench(path: Path) -> None:
    """`data/toybench.json`: the subjects, the number of photos of each, and the list of prompts."""
    subjects = {name: character.to_dict() for name, character in bench_subjects().items()}
    path.write_text(json.dumps({"seed": BENCH_SEED, "photos": 5, "prompts": "toy",
                                "subjects": subjects}, indent=1)
                    + "\n")


def write_shipped(root: Path) -> None:
    for k, (name, character) in enumerate(SHIPPED.items()):
        write_subject(root / name, character, seed=k, size=SHIPPED_SIZE)

"""What can be in a toy picture: characters, places, views, and the words for them.

A `Character` is everything that makes an individual: class, colours, pattern, hat and
proportions. A `View` is everything else: place, camera, light. A *subject* in the sense
of DreamBooth is one character under several views; a *class* is every character of a kind.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import numpy as np

from dbcore.utils.errors import InputError

CLASSES = ("dog", "cat", "duck", "car", "teapot", "robot")

COLORS = {  # linear-ish RGB in [0, 1], far enough apart to be told from each other in shade
    "red": (0.80, 0.06, 0.06),
    "orange": (0.95, 0.42, 0.03),
    "yellow": (0.95, 0.82, 0.08),
    "green": (0.07, 0.52, 0.13),
    "blue": (0.06, 0.20, 0.82),
    "purple": (0.42, 0.10, 0.62),
    "pink": (0.96, 0.48, 0.66),
    "brown": (0.36, 0.17, 0.06),
    "black": (0.035, 0.035, 0.045),
    "white": (0.92, 0.92, 0.90),
    "gray": (0.42, 0.43, 0.45),
}
PATTERNS = ("plain", "spotted", "striped")

PLACES = {  # the phrase a caption uses; the studio goes unsaid
    "studio": "",
    "beach": "on the beach",
    "snow": "in the snow",
    "water": "swimming in water",
    "night": "at night",
    "grass": "on the grass",
    "floor": "on a wooden floor",
    "street": "on the street",
    "desert": "in the desert",
    "carpet": "on a red carpet",
    "forest": "in the forest",
}
PROPORTIONS = ("ears", "muzzle", "legs", "tail", "neck", "length")


@dataclass(frozen=True)
class Character:
    """One individual. Proportions are in [0, 1]; 0.5 is the class's ordinary build."""

    kind: str
    color: str
    pattern: str = "plain"
    color2: str = "white"  # of the spots or stripes; unseen on a plain character
    hat: str = ""  # a colour, or "" for none
    ears: float = 0.5
    muzzle: float = 0.5
    legs: float = 0.5
    tail: float = 0.5
    neck: float = 0.5
    length: float = 0.5

    def __post_init__(self):
        def check(name, value, allowed):
            if value not in allowed:
                raise InputError(f"Character.{name} is {value!r}; choose one of {', '.join(allowed)}")

        check("kind", self.kind, CLASSES)
        check("color", self.color, COLORS)
        check("color2", self.color2, COLORS)
        check("pattern", self.pattern, PATTERNS)
        if self.hat:
            check("hat", self.hat, COLORS)
        for name in PROPORTIONS:
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"Character.{name} is {getattr(self, name)}; it must lie in [0, 1]")

    to_dict = asdict


@dataclass(frozen=True)
class View:
    """One look at a character. Angles in degrees; azimuth 0 is the side view, 90 face to face."""

    place: str = "studio"
    azimuth: float = 30.0
    elevation: float = 12.0
    distance: float = 1.0  # 1 frames the character
    light: float = 0.0  # the sun's azimuth from its usual place
    flip: bool = False  # the picture mirrored: the character looks left
    tint: float = 0.5  # which of the place's colours, in [0, 1]

    def __post_init__(self):
        if self.place not in PLACES:
            raise InputError(f"View.place is {self.place!r}; choose one of {', '.join(PLACES)}")


def random_character(rng: np.random.Generator, **fixed) -> Character:
    """A character drawn at random; keyword arguments fix some of its attributes."""
    color, color2 = rng.choice(list(COLORS), 2, replace=False)
    drawn = dict(
        kind=str(rng.choice(CLASSES)),
        color=str(color),
        color2=str(color2),
        pattern=str(rng.choice(PATTERNS, p=(0.5, 0.25, 0.25))),
        hat=str(rng.choice(list(COLORS))) if rng.random() < 0.15 else "",
        **{name: round(float(rng.random()), 3) for name in PROPORTIONS},
    )
    return Character(**(drawn | fixed))


def random_view(rng: np.random.Generator, **fixed) -> View:
    """A view drawn at random, three-quarter from the front; the studio comes most often."""
    names = list(PLACES)
    weights = np.array([3.0] + [1.0] * (len(names) - 1))
    drawn = {
        "place": str(rng.choice(names, p=weights / weights.sum())),
        "azimuth": float(rng.uniform(12, 48)),
        "elevation": float(rng.uniform(9, 15)),
        "distance": float(rng.uniform(0.96, 1.06)),
        "light": float(rng.uniform(-20, 20)),
        "flip": bool(rng.random() < 0.5),
        "tint": float(rng.random()),
    }
    return View(**(drawn | fixed))


def caption(character: Character, view: View, rng: np.random.Generator | None = None, drop: float = 0.0) -> str:
    """The exact description; with `rng`, each attribute is left out with probability `drop`.

    >>> caption(Character("dog", "white", "spotted", "black"), View("beach"))
    'a photo of a white dog with black spots on the beach'
    """

    def keep():
        return rng is None or rng.random() >= drop

    marks = {"spotted": "spots", "striped": "stripes"}.get(character.pattern)
    words = [f"{character.color} {character.kind}" if keep() else character.kind]
    if marks and keep():
        words.append(f"with {character.color2} {marks}" if keep() else f"with {marks}")
    if character.hat and keep():
        words.append(f"wearing a {character.hat} hat" if keep() else "wearing a hat")
    if PLACES[view.place] and keep():
        words.append(PLACES[view.place])
    opening = "a photo of " if keep() else ""
    article = "an" if words[0].startswith("o") else "a"
    return f"{opening}{article} {' '.join(words)}"


def with_hat(character: Character, color: str) -> Character:
    """The same individual under a hat of that colour."""
    return replace(character, hat=color)

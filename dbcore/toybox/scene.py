"""What can be in a toy image: characters, places, views, and the words for them.

A `Character` is everything that makes an individual: class, colours, pattern, hat and
proportions. A `View` is everything else: place, camera, light. A *subject* in the sense
of DreamBooth is one character under several views; a *class* is every character of a kind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

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

BUILD = {  # what a proportion below a third, or above two thirds, is called; "" goes unsaid
    "dog": {"ears": ("small ears", "big ears"), "muzzle": ("a short nose", "a long nose"),
            "legs": ("short legs", "long legs"), "tail": ("a short tail", "a long tail"),
            "neck": ("a short neck", "a long neck"), "length": ("a short body", "a long body")},
    "cat": {"ears": ("small ears", "big ears"), "muzzle": ("", ""),
            "legs": ("short legs", "long legs"), "tail": ("a short tail", "a long tail"),
            "neck": ("a short neck", "a long neck"), "length": ("a short body", "a long body")},
    "duck": {"ears": ("", "a crest"), "muzzle": ("a short bill", "a long bill"),
             "legs": ("short legs", "long legs"), "tail": ("a short tail", "a long tail"),
             "neck": ("a short neck", "a long neck"), "length": ("a short body", "a long body")},
    "car": {"ears": ("", "roof bars"), "muzzle": ("a short hood", "a long hood"),
            "legs": ("small wheels", "big wheels"), "tail": ("a small cabin", "a big cabin"),
            "neck": ("a low roof", "a high roof"), "length": ("a short body", "a long body")},
    "teapot": {"ears": ("a small knob", "a big knob"), "muzzle": ("a short spout", "a long spout"),
               "legs": ("a low body", "a high body"), "tail": ("a small handle", "a big handle"),
               "neck": ("a low spout", "a high spout"), "length": ("a narrow body", "a wide body")},
    "robot": {"ears": ("a short antenna", "a long antenna"), "muzzle": ("small eyes", "big eyes"),
              "legs": ("short legs", "long legs"), "tail": ("short arms", "long arms"),
              "neck": ("a short neck", "a long neck"), "length": ("a narrow body", "a wide body")},
}


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
                raise InputError(f"Character.{name} is {value!r}; "
                                 f"choose one of {', '.join(allowed)}")

        check("kind", self.kind, CLASSES)
        check("color", self.color, COLORS)
        check("color2", self.color2, COLORS)
        check("pattern", self.pattern, PATTERNS)
        if self.hat:
            check("hat", self.hat, COLORS)
        for name in PROPORTIONS:
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"Character.{name} is {getattr(self, name)}; "
                                 "it must lie in [0, 1]")

    to_dict = asdict


@dataclass(frozen=True)
class View:
    """One look at a character. Angles in degrees; azimuth 0 is the side view, 90 face to face."""

    place: str = "studio"
    azimuth: float = 30.0
    elevation: float = 12.0
    distance: float = 1.0  # 1 frames the character
    light: float = 0.0  # the sun's azimuth from its usual place
    sun: float = 51.5  # the sun's height; its light is warm below 30
    flip: bool = False  # the image mirrored: the character looks left
    tint: float = 0.5  # which of the place's colours, in [0, 1]

    def __post_init__(self):
        if self.place not in PLACES:
            raise InputError(f"View.place is {self.place!r}; choose one of {', '.join(PLACES)}")

    @property
    def angle(self) -> str:
        """"side", "front", or "" for the three-quarter view between them."""
        return "side" if self.azimuth < 20 else "front" if self.azimuth > 65 else ""

    @property
    def side(self) -> str:
        """The side that is seen, "left" or "right"; face to face it is neither, ""."""
        return "" if self.angle == "front" else "left" if self.flip else "right"

    @property
    def size(self) -> str:
        """"close up", "far away", or ""."""
        return "close up" if self.distance < 0.88 else "far away" if self.distance > 1.2 else ""


def random_character(rng: np.random.Generator, **fixed: Any) -> Character:
    """A character drawn at random; keyword arguments fix some of its attributes."""
    color, color2 = rng.choice(list(COLORS), 2, replace=False)
    drawn: dict[str, Any] = dict(
        kind=str(rng.choice(CLASSES)),
        color=str(color),
        color2=str(color2),
        pattern=str(rng.choice(PATTERNS, p=(0.5, 0.25, 0.25))),
        hat=str(rng.choice(list(COLORS))) if rng.random() < 0.15 else "",
        **{name: random_proportion(rng) for name in PROPORTIONS},
    )
    return Character(**(drawn | fixed))


def random_proportion(rng: np.random.Generator) -> float:
    """Ordinary three times in five, else clearly small or clearly large: a word must be seen to be
    learnt."""
    low, high = ((0.0, 0.25), (0.38, 0.62), (0.75, 1.0))[rng.choice(3, p=(0.2, 0.6, 0.2))]
    return round(float(rng.uniform(low, high)), 3)


def random_view(rng: np.random.Generator, **fixed: Any) -> View:
    """A view drawn at random, most often three-quarter from the front; the studio comes most
    often."""
    names = list(PLACES)
    weights = np.array([3.0] + [1.0] * (len(names) - 1))

    def one_of(shares, *ranges):
        return float(rng.uniform(*ranges[rng.choice(len(ranges), p=shares)]))

    drawn = {
        "place": str(rng.choice(names, p=weights / weights.sum())),
        "azimuth": one_of((0.2, 0.6, 0.2), (0, 14), (24, 56), (74, 90)),
        "elevation": float(rng.uniform(9, 15)),
        "distance": one_of((0.12, 0.76, 0.12), (0.72, 0.82), (0.95, 1.08), (1.3, 1.5)),
        "light": float(rng.uniform(-20, 20)),
        "sun": one_of((0.15, 0.85), (14, 22), (46, 56)),
        "flip": bool(rng.random() < 0.5),
        "tint": float(rng.random()),
    }
    return View(**(drawn | fixed))


def named_build(character: Character, view: View) -> dict[str, int]:
    """The proportions that have a word, those beyond a third of their range: 0 for small, 1 for
    large.

    Legs under water, and an antenna under a hat, are not spoken of.
    """
    hidden = {"legs"} if view.place == "water" else set()
    if character.kind == "robot" and character.hat:
        hidden.add("ears")
    extreme = {name: int(value > 0.5) for name in PROPORTIONS if name not in hidden
               if not 1 / 3 <= (value := getattr(character, name)) <= 2 / 3}
    return {name: large for name, large in extreme.items() if BUILD[character.kind][name][large]}


def view_words(view: View, keep: Callable[[], bool]) -> list[str]:
    """Phrases for the side, the angle, the distance and the light; `keep()` says which are used."""
    seen = [word for word in (view.side, view.angle) if word and keep()]
    words = [f"from the {' '.join(seen)}"] if seen else []
    if view.size and keep():
        words.append(view.size)
    if view.sun < 30 and view.place != "night" and keep():
        words.append("in low sun")
    return words


def listed(words: list[str]) -> str:
    """English enumeration: "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def caption(character: Character, view: View, rng: np.random.Generator | None = None,
            drop: float = 0.0, drop_details: float | None = None) -> str:
    """The exact description; with `rng`, each attribute is left out with probability `drop`.

    `drop_details` (`drop` where not given) is the probability for what most people would not
    mention: the build, the side, the angle, the distance and the light.

    >>> caption(Character("dog", "white", "spotted", "black", legs=0.9), View("beach", azimuth=80))
    'a photo of a white dog with black spots and long legs on the beach, from the front'
    """
    drop_details = drop if drop_details is None else drop_details

    def keep():
        return rng is None or rng.random() >= drop

    def mention():
        return rng is None or rng.random() >= drop_details

    words = [f"{character.color} {character.kind}" if keep() else character.kind]
    marks = {"spotted": "spots", "striped": "stripes"}.get(character.pattern)
    parts = [f"{character.color2} {marks}" if keep() else marks] if marks and keep() else []
    parts += [BUILD[character.kind][name][large]
              for name, large in named_build(character, view).items() if mention()]
    if parts:
        words.append(f"with {listed(parts)}")
    if character.hat and keep():
        words.append(f"wearing a {character.hat} hat" if keep() else "wearing a hat")
    if PLACES[view.place] and keep():
        words.append(PLACES[view.place])
    opening = "a photo of " if keep() else ""
    article = "an" if words[0].startswith("o") else "a"
    return ", ".join([f"{opening}{article} {' '.join(words)}", *view_words(view, mention)])


def with_hat(character: Character, color: str) -> Character:
    """The same individual under a hat of that colour."""
    return replace(character, hat=color)


def mirror(character: Character, view: View) -> tuple[Character, View]:
    """The scene whose image is the mirror image."""
    return character, replace(view, flip=not view.flip)

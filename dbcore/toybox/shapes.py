"""Characters as lists of primitives: the bridge from `scene.Character` to the tracer.

The character stands on y = 0, looks along +x, and is at most about 1.7 units tall.
A primitive is a row of 12 floats: kind, material, blend, then its geometry
(9 numbers). `blend` is the radius of the smooth union with all rows before it;
0 is a hard union.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from dbcore.toybox.scene import Character

ELLIPSOID, CAPSULE, BOX, CYLINDER, TORUS = range(5)
SKIN, ACCENT, DARK, WHITE, BEAK, GLASS, METAL, HAT, GLOW, PALE = range(10)
Vector: TypeAlias = Sequence[float] | np.ndarray  # x, y, z
Row: TypeAlias = list[float]
Built: TypeAlias = tuple[list[Row], tuple[float, float]]  # a character's rows, x and y of its hat


def ellipsoid(center: Vector, radii: Vector, material: int = SKIN,
              blend: float = 0.0) -> Row:
    return [ELLIPSOID, material, blend, *center, *radii, 0, 0, 0]


def capsule(a: Vector, b: Vector, ra: float, rb: float | None = None, material: int = SKIN,
            blend: float = 0.0) -> Row:
    """A limb from a to b, of radius ra at a and rb at b."""
    return [CAPSULE, material, blend, *a, *b, ra, ra if rb is None else rb, 0]


def box(center: Vector, half: Vector, rounding: float, material: int = SKIN,
        blend: float = 0.0) -> Row:
    return [BOX, material, blend, *center, *half, rounding, 0, 0]


def cylinder(center: Vector, half_height: float, radius: float, axis: int, material: int = SKIN,
             blend: float = 0.0) -> Row:
    """`axis` is 0, 1 or 2: the cylinder lies along x, y or z."""
    return [CYLINDER, material, blend, *center, half_height, radius, axis, 0, 0, 0]


def torus(center: Vector, radius: float, thickness: float, axis: int, material: int = SKIN,
          blend: float = 0.0) -> Row:
    return [TORUS, material, blend, *center, radius, thickness, axis, 0, 0, 0]


def _hat(x, y, size):
    return [
        cylinder((x, y, 0), 0.03, 0.30 * size, 1, HAT),
        cylinder((x, y + 0.17 * size, 0), 0.17 * size, 0.18 * size, 1, HAT),
    ]


def _pairs(make):
    return [make(side) for side in (-1, 1)]


def _four_legs(reach, hip, radius):
    rows = []
    for x in (-reach, reach):
        rows += _pairs(lambda s, x=x: capsule((x, hip, 0.17 * s), (x, 0.09, 0.18 * s), radius,
                                              radius * 0.9, blend=0.08))
        rows += _pairs(lambda s, x=x: ellipsoid((x + 0.05, 0.07, 0.18 * s), (0.13, 0.075, 0.10),
                                                blend=0.03))
    return rows


def dog(c: Character) -> Built:
    reach = 0.30 + 0.26 * c.length
    hip = 0.34 + 0.26 * c.legs
    head = np.array([reach + 0.20 + 0.08 * c.neck, hip + 0.30 + 0.26 * c.neck, 0])
    nose = head + [0.24 + 0.18 * c.muzzle, -0.06, 0]
    rows = [capsule((-reach, hip + 0.08, 0), (reach, hip + 0.10, 0), 0.25, 0.27)]
    rows += _four_legs(reach, hip, 0.105)
    rows += [capsule((reach, hip + 0.12, 0), head, 0.19, 0.20, blend=0.10)]
    rows += [ellipsoid(head, (0.27, 0.25, 0.25), blend=0.06)]
    rows += [capsule(head + [0.1, -0.07, 0], nose, 0.16, 0.11, ACCENT, blend=0.04)]
    tip = (-reach - 0.26 - 0.14 * c.tail, hip + 0.22 + 0.42 * c.tail, 0)
    rows += [capsule((-reach - 0.14, hip + 0.18, 0), tip, 0.08, 0.045, blend=0.06)]
    drop = 0.18 + 0.36 * c.ears
    rows += _pairs(lambda s: capsule(head + [-0.06, 0.15, 0.21 * s],
                                     head + [-0.10, 0.15 - drop, 0.29 * s], 0.075, 0.11, ACCENT))
    rows += [ellipsoid(nose + [0.08, 0.05, 0], (0.075, 0.065, 0.08), DARK)]
    rows += _eyes(head, 0.215, 0.06, 0.115, 0.062)
    return rows, (head[0] - 0.04, head[1] + 0.22)


def _eyes(head, forward, up, aside, radius, material=DARK):
    rows = _pairs(lambda s: ellipsoid(head + np.array([forward, up, aside * s]), (radius,) * 3,
                                      material))
    glint = _pairs(
        lambda s: ellipsoid(head + np.array([forward + 0.045, up + 0.03, (aside + 0.015) * s]),
                                       (radius * 0.36,) * 3, WHITE))
    return rows + glint


def cat(c: Character) -> Built:
    reach = 0.26 + 0.18 * c.length
    hip = 0.32 + 0.26 * c.legs
    head = np.array([reach + 0.18, hip + 0.36 + 0.20 * c.neck, 0])
    rows = [capsule((-reach, hip + 0.08, 0), (reach, hip + 0.10, 0), 0.21, 0.20)]
    rows += _four_legs(reach, hip, 0.080)
    rows += [capsule((reach, hip + 0.10, 0), head, 0.15, 0.17, blend=0.10)]
    rows += [ellipsoid(head, (0.25, 0.23, 0.29), blend=0.05)]
    rows += [ellipsoid(head + [0.20, -0.08, 0], (0.06 + 0.06 * c.muzzle, 0.08, 0.12), WHITE,
                       blend=0.03)]
    high = 0.20 + 0.24 * c.ears
    rows += _pairs(lambda s: capsule(head + [-0.02, 0.14, 0.17 * s],
                                     head + [-0.04, 0.14 + high, 0.21 * s],
                                     0.11, 0.02, ACCENT, blend=0.02))
    bend = (-reach - 0.36, hip + 0.26, 0)
    rows += [capsule((-reach - 0.1, hip + 0.12, 0), bend, 0.07, 0.06, blend=0.06)]
    rows += [capsule(bend, (-reach - 0.30, hip + 0.50 + 0.55 * c.tail, 0), 0.06, 0.055, blend=0.06)]
    rows += [ellipsoid(head + [0.29 + 0.05 * c.muzzle, -0.03, 0], (0.035, 0.03, 0.04), PALE)]
    rows += _eyes(head, 0.205, 0.05, 0.125, 0.068, GLOW)
    rows += _pairs(lambda s: ellipsoid(head + np.array([0.262, 0.05, 0.130 * s]),
                                       (0.025, 0.05, 0.025), DARK))
    return rows, (head[0] - 0.03, head[1] + 0.19)


def duck(c: Character) -> Built:
    lift = 0.12 + 0.30 * c.legs
    long = 0.36 + 0.18 * c.length
    chest = np.array([0.22, lift + 0.36, 0])
    head = chest + [0.16, 0.42 + 0.36 * c.neck, 0]
    rows = [ellipsoid((-0.02, lift + 0.30, 0), (long, 0.29, 0.31))]
    rows += [capsule(chest, head, 0.19, 0.15, blend=0.14)]
    rows += [ellipsoid(head, (0.235, 0.225, 0.215), blend=0.05)]
    rows += [capsule((-long, lift + 0.36, 0), (-long - 0.16, lift + 0.48 + 0.26 * c.tail, 0), 0.13,
                     0.03, blend=0.1)]
    rows += _pairs(lambda s: ellipsoid((-0.08, lift + 0.36, 0.27 * s), (0.27, 0.16, 0.07), ACCENT))
    bill = 0.12 + 0.14 * c.muzzle
    rows += [ellipsoid(head + [0.20 + bill * 0.6, -0.05, 0], (bill, 0.055, 0.12), BEAK)]
    rows += _pairs(lambda s: capsule((0.02, lift + 0.1, 0.14 * s), (0.02, 0.06, 0.15 * s), 0.05,
                                     material=BEAK))
    rows += _pairs(lambda s: ellipsoid((0.11, 0.045, 0.16 * s), (0.17, 0.045, 0.11), BEAK))
    if c.ears > 2 / 3:  # a crest on top of the head: a duck has no ears to make long
        rows += [capsule(head + [-0.06, 0.15, 0], head + [-0.20, 0.15 + 0.4 * (c.ears - 0.3), 0],
                         0.07, 0.03, ACCENT, blend=0.03)]
    rows += _eyes(head, 0.165, 0.06, 0.115, 0.055)
    return rows, (head[0], head[1] + 0.19)


def car(c: Character) -> Built:
    long = 0.66 + 0.22 * c.length
    wheel = 0.20 + 0.09 * c.legs
    floor = wheel + 0.20
    top = floor + 0.44
    cab = 0.30 + 0.12 * c.tail
    rows = [box((0, floor, 0), (long, 0.20, 0.38), 0.09)]
    hood = 0.12 * c.muzzle
    rows += [box((-0.12 - hood, top - 0.12, 0), (cab, 0.16 + 0.10 * c.neck, 0.31), 0.09,
                 blend=0.05)]
    glass_y = top - 0.08 + 0.08 * c.neck
    rows += [box((-0.12 - hood, glass_y, 0), (cab - 0.07, 0.085, 0.325), 0.03, GLASS)]
    rows += [box((-0.12 - hood, glass_y, 0), (cab + 0.012, 0.085, 0.23), 0.03, GLASS)]
    for x in (-long * 0.58, long * 0.58):
        rows += _pairs(lambda s, x=x: cylinder((x, wheel, 0.36 * s), 0.075, wheel, 2, DARK))
        rows += _pairs(lambda s, x=x: cylinder((x, wheel, 0.40 * s), 0.06, wheel * 0.52, 2, WHITE))
    rows += _pairs(lambda s: ellipsoid((long + 0.005, floor + 0.05, 0.24 * s), (0.05, 0.085, 0.085),
                                       GLOW))
    rows += [box((long, floor - 0.15, 0), (0.06, 0.05, 0.36), 0.03, METAL)]
    if c.ears > 2 / 3:  # roof bars
        roof = top + 0.06 + 0.10 * c.neck
        rows += _pairs(lambda s: capsule((-0.12 - hood - cab * 0.8, roof, 0.2 * s),
                                         (-0.12 - hood + cab * 0.8, roof, 0.2 * s), 0.035,
                                         material=METAL))
    return rows, (-0.12 - hood, top + 0.04 + 0.10 * c.neck)


def teapot(c: Character) -> Built:
    tall = 0.40 + 0.16 * c.legs
    wide = 0.44 + 0.12 * c.length
    middle = tall + 0.06
    rows = [ellipsoid((0, middle, 0), (wide, tall, wide))]
    rows += [cylinder((0, 0.05, 0), 0.05, wide * 0.62, 1, ACCENT, blend=0.03)]
    lip = (wide + 0.30 + 0.18 * c.muzzle, middle + 0.20 + 0.24 * c.neck, 0)
    rows += [capsule((wide * 0.75, middle - 0.1, 0), (wide + 0.16, middle + 0.02, 0), 0.13, 0.09,
                     blend=0.06)]
    rows += [capsule((wide + 0.14, middle, 0), lip, 0.09, 0.06, blend=0.05)]
    ring = 0.20 + 0.12 * c.tail
    rows += [torus((-wide - ring * 0.45, middle + 0.04, 0), ring, 0.06, 2, ACCENT)]
    rows += [ellipsoid((0, middle + tall * 0.92, 0), (wide * 0.55, 0.10, wide * 0.55), ACCENT)]
    knob = 0.06 + 0.06 * c.ears
    rows += [ellipsoid((0, middle + tall * 0.92 + 0.10 + knob * 0.7, 0), (knob, knob, knob), BEAK)]
    return rows, (0.0, middle + tall * 0.92 + 0.06)


def robot(c: Character) -> Built:
    leg = 0.24 + 0.26 * c.legs
    half = 0.24 + 0.10 * c.length
    chest = leg + 0.32
    head = np.array([0.0, chest + 0.32 + 0.30 + 0.14 * c.neck, 0])
    rows = [box((0, chest, 0), (0.22, 0.30, half), 0.05)]
    rows += [cylinder((0, chest + 0.36 + 0.06 * c.neck, 0), 0.10 + 0.07 * c.neck, 0.09, 1, METAL)]
    rows += [box(head, (0.20, 0.20, 0.26), 0.05)]
    rows += _pairs(lambda s: capsule((0, leg, half * 0.55 * s), (0, 0.1, half * 0.55 * s), 0.085,
                                     material=METAL))
    rows += _pairs(lambda s: box((0.06, 0.07, half * 0.55 * s), (0.17, 0.07, 0.11), 0.03, ACCENT))
    arm = chest - 0.12 - 0.22 * c.tail
    rows += _pairs(lambda s: capsule((0, chest + 0.20, (half + 0.10) * s),
                                     (0.08, arm, (half + 0.13) * s), 0.08, material=METAL))
    rows += _pairs(lambda s: ellipsoid((0.09, arm - 0.06, (half + 0.13) * s), (0.11, 0.11, 0.10),
                                       ACCENT))
    rows += [box((0.215, chest + 0.02, 0), (0.03, 0.13, half * 0.55), 0.02, PALE)]
    eye = 0.07 + 0.03 * c.muzzle
    rows += _pairs(lambda s: cylinder(head + [0.20, 0.05, 0.115 * s], 0.03, eye, 0, GLOW))
    rows += _pairs(lambda s: cylinder(head + [0.225, 0.05, 0.115 * s], 0.02, eye * 0.5, 0, DARK))
    rows += [box(head + [0.205, -0.10, 0], (0.02, 0.03, 0.12), 0.01, DARK)]
    if not c.hat:
        rod = 0.26 + 0.22 * c.ears
        rows += [capsule(head + [0, 0.2, 0], head + [0, rod, 0], 0.025, material=METAL)]
        rows += [ellipsoid(head + [0, rod + 0.04, 0], (0.07, 0.07, 0.07), GLOW)]
    return rows, (0.0, head[1] + 0.21)


BUILDERS = {f.__name__: f for f in (dog, cat, duck, car, teapot, robot)}


def build(character: Character) -> np.ndarray:
    """The primitives of a character: float32, shape (n, 12)."""
    rows, (hat_x, hat_y) = BUILDERS[character.kind](character)
    if character.hat:
        rows = rows + _hat(hat_x, hat_y, 1.0)
    return np.array(rows, dtype=np.float32)

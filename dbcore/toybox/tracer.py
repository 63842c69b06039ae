"""A sphere tracer for the toy world, compiled with numba.

The scene is one signed distance function, the smooth union of a character's primitives,
over a ground plane (Hart, "Sphere tracing", 1996; smooth minimum, soft shadows and
ambient occlusion after the formulas Inigo Quilez published). An image is
float32 (size, size, 3), sRGB in [0, 1], with 2 x 2 samples a pixel.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numba import njit, prange
from PIL import Image

from dbcore.toybox.scene import COLORS, PATTERNS, PLACES, Character, View
from dbcore.toybox.shapes import build

if TYPE_CHECKING:
    import torch

STUDIO, BEACH, SNOW, WATER, NIGHT, GRASS, FLOOR, STREET, DESERT, CARPET, FOREST = range(11)
CAMERA_DISTANCE, FOCAL, TARGET_Y = 5.0, 3.55, 0.70
WATERLINE = 0.36
FAR = 1e9

FIXED = np.array([  # materials in the order of shapes.py; skin, accent and hat are filled in
    (0, 0, 0), (0, 0, 0), (0.012, 0.012, 0.015), (0.93, 0.93, 0.93), (0.95, 0.45, 0.04),
    (0.42, 0.62, 0.72),
    (0.52, 0.53, 0.56), (0, 0, 0), (0.95, 0.80, 0.18), (0.90, 0.62, 0.62)], dtype=np.float32)


@njit(fastmath=True, inline="always")
def _length(x, y, z):
    return math.sqrt(x * x + y * y + z * z)


@njit(fastmath=True)
def _primitive(p, x, y, z):
    """Signed distance from (x, y, z) to one primitive row."""
    kind = int(p[0])
    dx, dy, dz = x - p[3], y - p[4], z - p[5]
    if kind == 0:  # ellipsoid: |q/r| (|q/r| - 1) / |q/r^2|, a bound good near the surface
        k0 = _length(dx / p[6], dy / p[7], dz / p[8])
        k1 = _length(dx / (p[6] * p[6]), dy / (p[7] * p[7]), dz / (p[8] * p[8]))
        if k1 < 1e-9:
            return -min(p[6], p[7], p[8])
        return k0 * (k0 - 1.0) / k1
    if kind == 1:  # capsule whose radius goes from p[9] to p[10]
        bx, by, bz = p[6] - p[3], p[7] - p[4], p[8] - p[5]
        h = (dx * bx + dy * by + dz * bz) / (bx * bx + by * by + bz * bz)
        h = min(1.0, max(0.0, h))
        return _length(dx - bx * h, dy - by * h, dz - bz * h) - (p[9] + (p[10] - p[9]) * h)
    if kind == 2:  # rounded box
        qx, qy, qz = abs(dx) - p[6] + p[9], abs(dy) - p[7] + p[9], abs(dz) - p[8] + p[9]
        outside = _length(max(qx, 0.0), max(qy, 0.0), max(qz, 0.0))
        return outside + min(max(qx, max(qy, qz)), 0.0) - p[9]
    axis = int(p[8])
    if axis == 0:
        along, across = dx, math.sqrt(dy * dy + dz * dz)
    elif axis == 1:
        along, across = dy, math.sqrt(dx * dx + dz * dz)
    else:
        along, across = dz, math.sqrt(dx * dx + dy * dy)
    if kind == 3:  # cylinder
        qr, qa = across - p[7], abs(along) - p[6]
        return min(max(qr, qa), 0.0) + math.sqrt(max(qr, 0.0) ** 2 + max(qa, 0.0) ** 2)
    return math.sqrt((across - p[6]) ** 2 + along * along) - p[7]  # torus


@njit(fastmath=True)
def _distance(prims, x, y, z):
    """(signed distance, material of the nearest primitive) of the whole character."""
    d, nearest, material = FAR, FAR, 0
    for i in range(prims.shape[0]):
        di = _primitive(prims[i], x, y, z)
        if di < nearest:
            nearest, material = di, int(prims[i, 1])
        k = prims[i, 2]
        if k > 0.0 and d < FAR:
            h = max(k - abs(d - di), 0.0) / k
            d = min(d, di) - h * h * k * 0.25
        else:
            d = min(d, di)
    return d, material


@njit(fastmath=True)
def _hash(i, j, k):
    """A number in [0, 1) for a lattice cell, in integers so that every machine agrees."""
    h = (int(i) * 374761393 + int(j) * 668265263 + int(k) * 2147483647) & 0xFFFFFFFF
    h = ((h ^ (h >> 13)) * 1274126177) & 0xFFFFFFFF
    return ((h ^ (h >> 16)) & 0xFFFF) / 65536.0


@njit(fastmath=True)
def _noise(x, z):
    """Smooth value noise on the plane, in [0, 1]."""
    i, j = math.floor(x), math.floor(z)
    u, v = x - i, z - j
    u, v = u * u * (3 - 2 * u), v * v * (3 - 2 * v)
    a, b = _hash(i, j, 0), _hash(i + 1, j, 0)
    c, d = _hash(i, j + 1, 0), _hash(i + 1, j + 1, 0)
    return (a * (1 - u) + b * u) * (1 - v) + (c * (1 - u) + d * u) * v


@njit(fastmath=True)
def _marked(pattern, x, y, z):
    """Whether a spot or stripe lies on this point of the skin."""
    if pattern == 2:
        return math.sin(x * 11.5 + 0.9) > 0.12
    cell = 0.34  # one sphere a cell of a lattice, a little out of place
    for i in range(-1, 2):
        for j in range(-1, 2):
            for k in range(-1, 2):
                ci, cj, ck = (math.floor(x / cell) + i, math.floor(y / cell)
                              + j, math.floor(z / cell) + k)
                px = (ci + 0.5 + 0.5 * (_hash(ci, cj, ck) - 0.5)) * cell
                py = (cj + 0.5 + 0.5 * (_hash(cj, ck, ci) - 0.5)) * cell
                pz = (ck + 0.5 + 0.5 * (_hash(ck, ci, cj) - 0.5)) * cell
                if _length(x - px, y - py, z - pz) < 0.135:
                    return True
    return False


@njit(fastmath=True)
def _ground(place, x, z, tint):
    """Colour of the ground at (x, z)."""
    if place == 0:
        return 0.66 + 0.16 * tint, 0.68 + 0.08 * tint, 0.72 - 0.08 * tint
    if place == 1:
        n = 0.92 + 0.12 * _noise(x * 5, z * 5)
        return 0.80 * n, 0.62 * n, 0.36 * n
    if place == 2:
        n = 0.94 + 0.06 * _noise(x * 2, z * 2)
        return 0.88 * n, 0.91 * n, 0.96 * n
    if place == 3:
        w = 0.5 + 0.5 * math.sin(z * 7 + 1.6 * math.sin(x * 2.1))
        return 0.03 + 0.06 * w, 0.24 + 0.16 * w, 0.58 + 0.16 * w
    if place == 4:
        return 0.030, 0.034, 0.12
    if place == 5:
        n = 0.80 + 0.35 * _noise(x * 7, z * 7)
        return 0.16 * n, 0.50 * n, 0.07 * n
    if place == 6:
        plank = math.floor(z * 2.4)
        n = 0.82 + 0.26 * _hash(plank, 0.0, 0.0)
        edge = z * 2.4 - plank
        if edge < 0.07:
            n *= 0.55
        return 0.55 * n, 0.29 * n, 0.12 * n
    if place == 7:
        if abs(z + 0.95) < 0.09:
            return 0.85, 0.68, 0.10
        return 0.12, 0.12, 0.13
    if place == 8:
        n = 0.88 + 0.16 * math.sin(z * 6 + 1.2 * math.sin(x * 1.7))
        return 0.80 * n, 0.36 * n, 0.11 * n
    if place == 9:
        return 0.58, 0.03, 0.05
    n = 0.75 + 0.4 * _noise(x * 4, z * 4)
    return 0.24 * n, 0.17 * n, 0.07 * n


@njit(fastmath=True)
def _backdrop(place, a, h, tint):
    """Colour behind everything, by azimuth a and height h of the ray (radians)."""
    if place == 0:
        g = min(1.0, max(0.0, 0.5 + 1.2 * h))
        r0, g0, b0 = _ground(0, 0.0, 0.0, tint)
        return r0 * (1.04 - 0.14 * g), g0 * (1.04 - 0.14 * g), b0 * (1.04 - 0.14 * g)
    if place == 1:
        if h < 0.055:
            return 0.05, 0.42, 0.62
        return 0.42 + h * 0.3, 0.68 + h * 0.1, 0.93
    if place == 2:
        u = a * 5.0 + 0.31
        peak = 0.19 - 0.15 * abs(u - math.floor(u) - 0.5) * 2.0
        if h < peak:
            return 0.06, 0.24, 0.15
        return 0.74, 0.83, 0.93
    if place == 3:
        return 0.56 + h * 0.5, 0.79, 0.95
    if place == 4:
        mx, my = a - 0.28, h - 0.235
        if mx * mx + my * my < 0.0032:
            return 0.93, 0.88, 0.66
        ci, cj = math.floor(a * 13), math.floor(h * 13)
        sx, sy = a * 13 - ci - 0.5, h * 13 - cj - 0.5
        if h > 0.03 and _hash(ci, cj, 7) > 0.62 and sx * sx + sy * sy < 0.022:
            return 0.85, 0.85, 0.78
        return 0.022, 0.026, 0.13
    if place == 5:
        bump = 0.05 + 0.03 * math.sin(a * 6 + 1)
        if h < bump:
            return 0.10, 0.34, 0.10
        return 0.36 + h * 0.4, 0.62 + h * 0.2, 0.93
    if place == 6:
        if h < 0.035:
            return 0.85, 0.83, 0.78
        return 0.72, 0.60, 0.40
    if place == 7:
        u, v = a * 8, h * 9
        if h < 0.02:
            return 0.33, 0.33, 0.34
        if 0.25 < u - math.floor(u) < 0.75 and 0.3 < v - math.floor(v) < 0.8:
            return 0.86, 0.74, 0.32
        return 0.27, 0.25, 0.30
    if place == 8:
        dune = 0.06 + 0.05 * math.sin(a * 4 + 2)
        if h < dune:
            return 0.70, 0.30, 0.10
        return 0.93, 0.72 - h * 0.5, 0.42
    if place == 9:
        fold = 0.72 + 0.28 * math.sin(a * 36)
        return 0.26 * fold, 0.025 * fold, 0.10 * fold
    u = a * 6.5 + 0.2
    if abs(u - math.floor(u) - 0.5) < 0.17:
        return 0.17, 0.095, 0.045
    return 0.05 + 0.06 * max(h, 0.0), 0.20 + 0.35 * max(h, 0.0), 0.07


@njit(fastmath=True)
def _shadow(prims, x, y, z, lx, ly, lz):
    """1 in full light, 0 in full shadow, with a penumbra."""
    # of the chord through the sphere that holds the character
    middle = -x * lx + (0.85 - y) * ly - z * lz
    gap = 1.2 * 1.2 - (x * x + (0.85 - y) ** 2 + z * z - middle * middle)
    if gap <= 0.0:
        return 1.0
    light, t, end = 1.0, max(0.04, middle - math.sqrt(gap)), middle + math.sqrt(gap)
    for _ in range(24):
        if t > end:
            break
        d, _m = _distance(prims, x + lx * t, y + ly * t, z + lz * t)
        light = min(light, 9.0 * d / t)
        if light < 0.01:
            return 0.0
        t += max(d, 0.03)
    return light


@njit(fastmath=True)
def _skin_color(material, x, y, z, materials, pattern):
    if material == 0 and pattern > 0 and _marked(pattern, x, y, z):
        return materials[10, 0], materials[10, 1], materials[10, 2]
    return materials[material, 0], materials[material, 1], materials[material, 2]


@njit(fastmath=True)
def _sun(place, sun):
    """(ambient, direct) strength; at night the moon does what it can."""
    if place == 4:
        return 0.34, 0.52
    if place == 10:
        return 0.50, 0.62
    return 0.46, 0.78


@njit(fastmath=True)
def _shade_character(prims, x, y, z, material, dx, dy, dz, sun, materials, pattern, place):
    e = 0.004
    nx = _distance(prims, x + e, y, z)[0] - _distance(prims, x - e, y, z)[0]
    ny = _distance(prims, x, y + e, z)[0] - _distance(prims, x, y - e, z)[0]
    nz = _distance(prims, x, y, z + e)[0] - _distance(prims, x, y, z - e)[0]
    n = max(_length(nx, ny, nz), 1e-9)
    nx, ny, nz = nx / n, ny / n, nz / n
    lx, ly, lz = sun[0], sun[1], sun[2]
    lambert = max(nx * lx + ny * ly + nz * lz, 0.0)
    if lambert > 0.0:
        lambert *= _shadow(prims, x + nx * 0.02, y + ny * 0.02, z + nz * 0.02, lx, ly, lz)
    occlusion = min(1.0,
                    0.45 + 3.4 * _distance(prims, x + nx * 0.16, y + ny * 0.16, z + nz * 0.16)[0])
    hx, hy, hz = lx - dx, ly - dy, lz - dz
    hl = _length(hx, hy, hz)
    gloss = max((nx * hx + ny * hy + nz * hz) / hl, 0.0) ** 40 * 0.28 * min(1.0, lambert * 4)
    r, g, b = _skin_color(material, x, y, z, materials, pattern)
    ambient, direct = _sun(place, sun)
    bright = ambient * occlusion * (0.72 + 0.28 * ny) + direct * lambert
    if material == 8:  # lamps and cats' eyes shine by themselves
        bright = max(bright, 0.85)
    warm = direct * lambert * sun[3]  # a low sun's light is short of green and blue
    return (r * bright + gloss, max(0.0, g * (bright - 0.22 * warm) + gloss * (1 - 0.3 * sun[3])),
            max(0.0, b * (bright - 0.5 * warm) + gloss * (1 - 0.6 * sun[3])))


@njit(fastmath=True)
def _turn(turn, x, z):
    """(x, z) of the world in the character's own frame; turn = (cos, sin) of its azimuth."""
    return x * turn[0] + z * turn[1], z * turn[0] - x * turn[1]


@njit(fastmath=True)
def _trace_character(prims, turn, ox, oy, oz, dx, dy, dz, sun, end, materials, pattern, place):
    """(hit, r, g, b): the character along a ray, up to distance `end`."""
    # march only where the ray passes the sphere that holds every character
    cx, cy, cz = -ox, 0.85 - oy, -oz
    mid = cx * dx + cy * dy + cz * dz
    gap = 1.3 * 1.3 - (cx * cx + cy * cy + cz * cz - mid * mid)
    if gap <= 0.0:
        return False, 0.0, 0.0, 0.0
    half = math.sqrt(gap)
    t, end = mid - half, min(mid + half, end)
    ox, oz = _turn(turn, ox, oz)
    dx, dz = _turn(turn, dx, dz)
    for _ in range(72):
        if t > end:
            break
        d, material = _distance(prims, ox + dx * t, oy + dy * t, oz + dz * t)
        if d < 0.002:
            r, g, b = _shade_character(prims, ox + dx * t, oy + dy * t, oz + dz * t, material,
                                       dx, dy, dz, sun, materials, pattern, place)
            return True, r, g, b
        t += d * 0.92
    return False, 0.0, 0.0, 0.0


@njit(fastmath=True)
def _trace(prims, turn, ox, oy, oz, dx, dy, dz, sun, materials, pattern, place, tint):
    """Colour seen along one ray, linear RGB; `sun` is its direction in the character's frame, and
    its warmth in [0, 1]."""
    level = WATERLINE if place == 3 else 0.0
    t_ground = (level - oy) / dy if dy < -1e-4 else FAR
    hit, r, g, b = _trace_character(prims, turn, ox, oy, oz, dx, dy, dz, sun, t_ground, materials,
                                    pattern, place)
    if hit:
        return r, g, b
    azimuth, height = math.atan2(dx, -dz), math.asin(dy)
    if t_ground < 14.0:
        x, z = ox + dx * t_ground, oz + dz * t_ground
        r, g, b = _ground(place, x, z, tint)
        light = 1.0
        cx, cz = _turn(turn, x, z)
        light = 0.45 + 0.55 * _shadow(prims, cx, level + 0.01, cz, sun[0], sun[1], sun[2])
        if x * x + z * z < 1.7:
            light *= 0.6 + 0.4 * min(1.0, max(0.0, _distance(prims, cx, level + 0.02, cz)[0] * 5.0))
        g, b = g * (1 - 0.14 * sun[3] * light), b * (1 - 0.34 * sun[3] * light)
        fade = min(1.0, max(0.0, (t_ground - 9.0) / 5.0))
        if place == 0:  # an endless studio: the floor runs into the wall
            wall = _backdrop(place, azimuth, 0.0, tint)
            return (r * light * (1 - fade) + wall[0] * fade,
                    g * light * (1 - fade) + wall[1] * fade,
                    b * light * (1 - fade) + wall[2] * fade)
        return r * light, g * light, b * light
    return _backdrop(place, azimuth, height, tint)


@njit(fastmath=True)
def _pixel(prims, turn, eye, tilt, sun, materials, pattern, place, tint, row, col, size):
    """sRGB of one pixel, in [0, 1].

    The camera looks along -z, tilted down; only the character turns, so the place stays put.
    """
    cos_tilt, sin_tilt = math.cos(tilt), math.sin(tilt)
    r, g, b = 0.0, 0.0, 0.0
    for s in range(4):
        u = ((col + 0.25 + 0.5 * (s % 2)) / size * 2 - 1) / FOCAL
        v = (1 - (row + 0.25 + 0.5 * (s // 2)) / size * 2) / FOCAL
        n = _length(u, v, 1.0)
        dx, dy, dz = u / n, (v * cos_tilt - sin_tilt) / n, (-v * sin_tilt - cos_tilt) / n
        sr, sg, sb = _trace(prims, turn, eye[0], eye[1], eye[2], dx, dy, dz,
                            sun, materials, pattern, place, tint)
        r, g, b = r + sr, g + sg, b + sb
    return (min(1.0, max(0.0, r * 0.25)) ** 0.4545, min(1.0, max(0.0, g * 0.25)) ** 0.4545,
            min(1.0, max(0.0, b * 0.25)) ** 0.4545)


@njit(fastmath=True, parallel=True, cache=True)
def _render(prims, turn, eye, tilt, sun, materials, pattern, place, tint, size):
    out = np.empty((size, size, 3), np.float32)
    for row in prange(size):
        for col in range(size):
            r, g, b = _pixel(prims, turn, eye, tilt, sun, materials, pattern, place, tint,
                             row, col, size)
            out[row, col, 0], out[row, col, 1], out[row, col, 2] = r, g, b
    return out


def _materials(character: Character) -> np.ndarray:
    """Colours by material, with that of the pattern in one more row at the end."""
    skin, mark = np.array(COLORS[character.color]), np.array(COLORS[character.color2])
    table = np.vstack([FIXED, mark[None].astype(np.float32)])
    table[0] = skin
    table[1] = skin * 0.72 if character.pattern == "plain" else mark
    table[7] = COLORS[character.hat] if character.hat else 0
    return table


def scene_arrays(character: Character, view: View) -> tuple:
    """A scene as the tracer takes it.

    Primitives (n, 12), (cos, sin) of the azimuth, camera (3,), its tilt, direction and warmth of
    the sun (4,), colours of the materials (11, 3), pattern, place, tint.
    """
    azimuth, tilt = math.radians(view.azimuth), math.radians(view.elevation)
    turn = np.array([math.cos(azimuth), math.sin(azimuth)])
    away = CAMERA_DISTANCE * view.distance
    eye = np.array([0.0, TARGET_Y + away * math.sin(tilt), away * math.cos(tilt)])
    angle, height = math.radians(50 + view.light), math.radians(view.sun)
    x, z = math.cos(height) * math.cos(angle), math.cos(height) * math.sin(angle)
    warmth = min(1.0, max(0.0, (35 - view.sun) / 15)) * (view.place != "night")
    sun = np.array([x * turn[0] + z * turn[1], math.sin(height), z * turn[0] - x * turn[1], warmth])
    return (build(character), turn, eye, tilt, sun, _materials(character),
            PATTERNS.index(character.pattern), list(PLACES).index(view.place), view.tint)


def render_array(character: Character, view: View, size: int = 64) -> np.ndarray:
    """The image as float32, shape (size, size, 3), sRGB in [0, 1]."""
    image = _render(*scene_arrays(character, view), size)
    return image[:, ::-1] if view.flip else image


def pack(scenes: list[tuple[Character, View]]) -> list[np.ndarray]:
    """Scenes for one launch: where each one's primitives begin (n + 1,), all primitives (m, 12),
    then the rest of `scene_arrays` and whether the image is mirrored, each (n, ...).
    """
    prims, *columns = zip(*(scene_arrays(*scene) for scene in scenes), strict=True)
    flip = [view.flip for _, view in scenes]
    starts = np.cumsum([0, *map(len, prims)])
    return [starts, np.concatenate(prims), *map(np.array, columns), np.array(flip)]


def render_packed(packed: list[np.ndarray], size: int, device: str = "cpu") -> torch.Tensor:
    """Scenes, as `pack` gives them, to a tensor on `device`: uint8 (n, size, size, 3)."""
    import torch

    if torch.device(device).type == "cuda":
        from dbcore.toybox.tracer_cuda import render_packed_cuda

        return (render_packed_cuda(packed, size, device) * 255 + 0.5).byte()
    starts, prims, *columns, flip = packed
    images = [_render(prims[starts[k]:starts[k + 1]], *(column[k] for column in columns), size)
              for k in range(len(flip))]
    mirrored = [p[:, ::-1] if flip[k] else p for k, p in enumerate(images)]
    return torch.from_numpy((np.stack(mirrored) * 255 + 0.5).astype(np.uint8))


def render(character: Character, view: View, size: int = 64) -> Image.Image:
    """The image as an RGB image of size x size pixels."""
    return Image.fromarray((render_array(character, view, size) * 255 + 0.5).astype(np.uint8))

"""Textures, and the painting of the procedural scenes on float32 images: backgrounds, objects, shading and shadow.

A texture is a mixing weight in [0, 1] between an object's two colours at a point of its frame, one period a unit.
"""

import math

import numpy as np
from numba import njit

TEXTURES = ("striped", "dotted", "checked", "ringed", "blotched", "bricked", "zigzag", "scaled")
PLAIN = len(TEXTURES)  # clutter's texture that is of no class


@njit(cache=True, nogil=True)
def _noise(table, x, y):
    """Value noise in [0, 1] with one lattice point a unit; `table` float32 [256, 256] repeats."""
    fx, fy = math.floor(x), math.floor(y)
    tx, ty = x - fx, y - fy
    tx, ty = tx * tx * (3.0 - 2.0 * tx), ty * ty * (3.0 - 2.0 * ty)
    x0, y0 = int(fx) & 255, int(fy) & 255
    x1, y1 = (x0 + 1) & 255, (y0 + 1) & 255
    top = table[y0, x0] + tx * (table[y0, x1] - table[y0, x0])
    low = table[y1, x0] + tx * (table[y1, x1] - table[y1, x0])
    return top + ty * (low - top)


@njit(cache=True, nogil=True)
def _octaves(table, x, y, count):
    """Sum of `count` octaves of value noise, scaled to [0, 1]."""
    total, weight, norm = 0.0, 1.0, 0.0
    for i in range(count):
        total += weight * _noise(table, x + 37.3 * i, y + 91.7 * i)
        norm += weight
        weight *= 0.55
        # Turned by about 37 degrees, so that the lattices of the octaves do not line up.
        x, y = 1.6 * x - 1.2 * y, 1.2 * x + 1.6 * y
    return total / norm


@njit(cache=True, nogil=True)
def _step(value, width):
    return min(max(0.5 + value / width, 0.0), 1.0)


@njit(cache=True, nogil=True)
def _triangle(x):
    """Triangle wave of period 1 between -0.25 and 0.25, positive half of the time."""
    return abs(x - math.floor(x) - 0.5) - 0.25


@njit(cache=True, nogil=True)
def _bricks(x, y, soft):
    row = y / 0.62
    x = x / 1.3 + 0.5 * (math.floor(row) % 2)
    dx, dy = 1.3 * (0.25 - _triangle(x)), 0.62 * (0.25 - _triangle(row))  # distances to the joints
    return 1.0 - _step(min(dx, dy) - 0.085, soft)


@njit(cache=True, nogil=True)
def _dots(x, y, soft):
    row = math.floor(y / 0.87 + 0.5)
    dx = x - 0.5 * (row % 2)
    return _step(0.32 - math.hypot(dx - math.floor(dx + 0.5), y - 0.87 * row), soft)


@njit(cache=True, nogil=True)
def _scales(x, y, soft):
    """Rows of discs, each row laid over the next one; the rim of a disc is the second colour."""
    first = math.floor(y / 0.5) - 1
    for row in range(int(first), int(first) + 3):
        dx = x - 0.5 * (row % 2)
        r = math.hypot(dx - math.floor(dx + 0.5), y - 0.5 * row)
        if r < 0.56:
            return _step(r - 0.43, soft)
    return 1.0


@njit(cache=True, nogil=True)
def _texture(kind, x, y, soft, table, seed):
    """Weight of the second colour at (x, y) of texture `kind`; edges are `soft` wide."""
    if kind == 0:
        return _step(_triangle(x), soft)
    if kind == 1:
        return _dots(x, y, soft)
    if kind == 2:
        u, v = _step(_triangle(0.65 * x), 0.65 * soft), _step(_triangle(0.65 * y), 0.65 * soft)
        return u * v + (1.0 - u) * (1.0 - v)
    if kind == 3:
        wobble = _noise(table, 0.8 * x + 255.0 * seed, 0.8 * y)
        return _step(_triangle(math.hypot(x, y) + 0.6 * wobble), soft)
    if kind == 4:
        return _step(_octaves(table, 1.5 * x + 255.0 * seed, 1.5 * y, 2) - 0.5, 0.7 * soft)
    if kind == 5:
        return _bricks(x, y, soft)
    if kind == 6:
        return _step(_triangle(y + 2.2 * _triangle(0.8 * x)), 1.5 * soft)
    if kind == 7:
        return _scales(x, y, soft)
    return 0.8 * _octaves(table, 0.5 * x + 255.0 * seed, 0.5 * y, 3)


@njit(cache=True, nogil=True)
def paint_background(image, colors, forms, horizon, light, table):
    """Fill `image` float32 [h, w, 3] with two materials parted by a wavy line, each a mixture of three colours.

    colors [2, 3, 3]: material, colour, channel. forms [2, 6]: period (px), stretch, angle, octave count, offset x, y.
    horizon [3]: height of the line as a share of h (outside [0, 1]: one material), slope, waviness (px).
    """
    h, w = image.shape[:2]
    cosines, sines = np.cos(forms[:, 2]), np.sin(forms[:, 2])
    line = np.empty(w)
    for x in range(w):
        wave = _octaves(table, x / 40.0 + forms[0, 4], forms[0, 5], 3) - 0.5
        line[x] = horizon[0] * h + horizon[1] * (x - 0.5 * w) + horizon[2] * wave
    for y in range(h):
        for x in range(w):
            m = 1 if y > line[x] else 0
            c, s = cosines[m], sines[m]
            u = (c * x + s * y) / (forms[m, 0] * forms[m, 1]) + forms[m, 4]
            v = (c * y - s * x) / forms[m, 0] + forms[m, 5]
            first = _octaves(table, u, v, int(forms[m, 3]))
            second = _octaves(table, 2.3 * v + 2.0 * first, 2.3 * u + 50.0, 3)
            first = min(max(2.2 * first - 0.6, 0.0), 1.0)
            ridge = max(1.0 - 5.0 * abs(second - 0.5), 0.0)
            slope = 1.0 + 0.25 * (light[0] * (2.0 * x / w - 1.0) + light[1] * (2.0 * y / h - 1.0))
            for k in range(3):
                value = colors[m, 0, k] + first * (colors[m, 1, k] - colors[m, 0, k])
                image[y, x, k] = slope * (value + 0.7 * ridge * (colors[m, 2, k] - value))


@njit(cache=True, nogil=True)
def _cast_shadow(image, distances, x0, y0, light, depth, strength):
    """Darken where the silhouette, moved `depth` pixels away from the light, would lie."""
    h, w = image.shape[:2]
    ph, pw = distances.shape
    sx, sy = round(-light[0] * depth), round(-light[1] * depth)
    for i in range(ph):
        y = y0 + i + sy
        if 0 <= y < h:
            for j in range(pw):
                x = x0 + j + sx
                if 0 <= x < w and distances[i, j] < depth:
                    shade = 1.0 - strength * min(0.5 - 0.5 * distances[i, j] / depth, 1.0)
                    for k in range(3):
                        image[y, x, k] *= shade


@njit(cache=True, nogil=True)
def paint_object(image, labels, label, distances, x0, y0, pose, surface, colors, light, shadow, table):
    """Paint one object with its shadow and give its pixels `label` (0 leaves the label map alone).

    surface [7]: texture kind, period, angle, shift x, y (object's frame), bevel (px), seed.
    colors [2, 3]; light [4]: direction x, y (towards the light) and z, ambient share; shadow [2]: depth (px), strength.
    """
    h, w = labels.shape
    ph, pw = distances.shape
    if shadow[1] > 0.0:
        _cast_shadow(image, distances, x0, y0, light, shadow[0], shadow[1])
    c, s = math.cos(surface[2]) / surface[1], math.sin(surface[2]) / surface[1]
    soft = max(1.2 / (pose[6] * surface[1]), 0.06)
    for i in range(max(1, -y0), min(ph - 1, h - y0)):
        for j in range(max(1, -x0), min(pw - 1, w - x0)):
            d = distances[i, j]
            alpha = min(max(0.5 - d, 0.0), 1.0)
            if alpha <= 0.0:
                continue
            y, x = y0 + i, x0 + j
            dx, dy = x + 0.5 - pose[0], y + 0.5 - pose[1]
            u = pose[2] * dx + pose[3] * dy + surface[3]
            v = pose[4] * dx + pose[5] * dy + surface[4]
            weight = _texture(int(surface[0]), c * u + s * v, c * v - s * u, soft, table, surface[6])
            # The surface rises from the outline like a quarter circle over `bevel` pixels: its normal gives the light.
            rise = 1.0 - min(max(-d / surface[5], 0.0), 1.0)
            nx = 0.5 * (distances[i, j + 1] - distances[i, j - 1]) * rise
            ny = 0.5 * (distances[i + 1, j] - distances[i - 1, j]) * rise
            facing = nx * light[0] + ny * light[1] + math.sqrt(max(1.0 - nx * nx - ny * ny, 0.0)) * light[2]
            grain = 0.85 + 0.3 * _octaves(table, 0.21 * dx + 255.0 * surface[6], 0.21 * dy, 2)
            shade = grain * (light[3] + (1.0 - light[3]) * max(facing, 0.0) * 1.25)
            for k in range(3):
                value = shade * (colors[0, k] + weight * (colors[1, k] - colors[0, k]))
                image[y, x, k] += alpha * (value - image[y, x, k])
            if label > 0 and d < 0.0:
                labels[y, x] = label


@njit(cache=True, nogil=True)
def develop(image, out, gains, grain, offset, table):
    """out uint8 [h, w, 3] <- `image` under a colour cast `gains` [3] with sensor noise of amplitude `grain`."""
    h, w = image.shape[:2]
    for y in range(h):
        for x in range(w):
            speck = (
                table[(y + offset) & 255, (x + 3 * offset) & 255] + table[(y + 7) & 255, (x * 5 + offset) & 255] - 1.0
            )
            for k in range(3):
                value = image[y, x, k] * gains[k] + grain * speck
                out[y, x, k] = np.uint8(min(max(value + 0.5, 0.0), 255.0))

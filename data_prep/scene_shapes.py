"""Silhouettes of the procedural scenes: numba functions of a point in an object's own frame.

The frame is x right, y down, and an object fills about the unit disc. A silhouette is a signed distance, negative
inside, exact to a factor near one; `a` and `b` in [0, 1] vary the proportions within a class. No jitted function is
imported here or in scene_paint.py: numba's cache notices a change of a function's own file and of no other.
"""

import math

from numba import njit

SILHOUETTES = ("fish", "mug", "star", "gear", "moon", "mushroom", "bone", "leaf")
BLOB, TWIG = len(SILHOUETTES), len(SILHOUETTES) + 1  # clutter, silhouettes that are of no class


@njit(cache=True, nogil=True)
def _ellipse(x, y, rx, ry):
    k0 = math.hypot(x / rx, y / ry)
    k1 = math.hypot(x / (rx * rx), y / (ry * ry))
    return k0 * (k0 - 1.0) / k1 if k1 > 1e-9 else -min(rx, ry)


@njit(cache=True, nogil=True)
def _box(x, y, hx, hy, corner):
    qx, qy = abs(x) - hx + corner, abs(y) - hy + corner
    return math.hypot(max(qx, 0.0), max(qy, 0.0)) + min(max(qx, qy), 0.0) - corner


@njit(cache=True, nogil=True)
def _capsule(x, y, x0, x1, radius):
    return math.hypot(x - min(max(x, x0), x1), y) - radius


@njit(cache=True, nogil=True)
def _fish(x, y, a, b):
    body = _ellipse(x - 0.2, y, 0.72, 0.30 + 0.14 * a)
    slope = 0.85 + 0.5 * b
    tail = max(-0.95 - x, x + 0.2, (abs(y) + (x + 0.38) * slope) / math.hypot(1.0, slope))
    notch = math.hypot(x + 1.08, y) - 0.26
    return min(body, max(tail, -notch))


@njit(cache=True, nogil=True)
def _mug(x, y, a, b):
    cup = _box(x + 0.2, y, 0.50 - 0.06 * (y + 0.6) * b, 0.60 + 0.15 * a, 0.12)
    handle = abs(_ellipse(x - 0.36, y, 0.36, 0.36 + 0.08 * b)) - 0.085
    return min(cup, handle)


@njit(cache=True, nogil=True)
def _star(x, y, a, b):
    sector = 2.0 * math.pi / (5.0 if b < 0.6 else 6.0)
    r = math.hypot(x, y)
    angle = math.atan2(x, -y)
    angle = abs(angle - sector * math.floor(angle / sector + 0.5))
    px, py = r * math.cos(angle), r * math.sin(angle)
    inner = 0.40 + 0.12 * a
    ix, iy = inner * math.cos(0.5 * sector), inner * math.sin(0.5 * sector)
    ex, ey = ix - 1.0, iy  # the edge from the tip at (1, 0) to the inner corner
    return (ey * (px - 1.0) - ex * py) / math.hypot(ex, ey)


@njit(cache=True, nogil=True)
def _gear(x, y, a, b):
    r = math.hypot(x, y)
    teeth = 8.0 + math.floor(2.99 * b)
    bump = min(max(2.5 * math.sin(teeth * math.atan2(y, x)), -1.0), 1.0)
    return max(0.8 * (r - 0.82 - 0.12 * bump), 0.24 + 0.16 * a - r)


@njit(cache=True, nogil=True)
def _moon(x, y, a, b):
    return max(math.hypot(x + 0.1, y) - 0.9, 0.68 + 0.08 * b - math.hypot(x - 0.38 - 0.16 * a, y))


@njit(cache=True, nogil=True)
def _mushroom(x, y, a, b):
    cap = max(_ellipse(x, y, 0.92, 0.70 + 0.2 * a), y - 0.08)
    stem = _box(x, y - 0.42, 0.18 + 0.10 * b + 0.12 * max(y - 0.4, 0.0), 0.46, 0.08)
    return min(cap, stem)


@njit(cache=True, nogil=True)
def _bone(x, y, a, b):
    shaft = _capsule(x, y, -0.66, 0.66, 0.15 + 0.06 * a)
    knobs = math.hypot(abs(x) - 0.70, abs(y) - 0.20 - 0.05 * b) - 0.25
    return min(shaft, knobs)


@njit(cache=True, nogil=True)
def _leaf(x, y, a, b):
    half = 0.34 + 0.16 * a
    radius = (0.85 * 0.85 + half * half) / (2.0 * half)
    blade = math.hypot(x + 0.12, abs(y) + radius - half) - radius
    return min(blade, _capsule(x, y, 0.65, 1.0 + 0.12 * b, 0.055))


@njit(cache=True, nogil=True)
def _blob(x, y, a, b):
    angle = math.atan2(y, x)
    wave = (
        math.sin(2.0 * angle + 6.3 * a) + 0.7 * math.sin(3.0 * angle + 6.3 * b) + 0.4 * math.sin(7.0 * angle + 9.0 * a)
    )
    return 0.75 * (math.hypot(x, y) - 0.68 - 0.13 * wave)


@njit(cache=True, nogil=True)
def _twig(x, y, a, b):
    y += 0.30 * a * math.sin(3.0 * x + 6.3 * b) + 0.06 * math.sin(11.0 * x + 20.0 * b)
    return 0.8 * (math.hypot(x - min(max(x, -0.95), 0.95), y) - 0.03 - 0.035 * b * (1.0 - x))


@njit(cache=True, nogil=True)
def _silhouette(kind, x, y, a, b, bend):
    """Signed distance of (x, y) to silhouette `kind`; `bend` curves the object."""
    y += bend * (x * x - 0.3)
    if kind == 0:
        return _fish(x, y, a, b)
    if kind == 1:
        return _mug(x, y, a, b)
    if kind == 2:
        return _star(x, y, a, b)
    if kind == 3:
        return _gear(x, y, a, b)
    if kind == 4:
        return _moon(x, y, a, b)
    if kind == 5:
        return _mushroom(x, y, a, b)
    if kind == 6:
        return _bone(x, y, a, b)
    if kind == 7:
        return _leaf(x, y, a, b)
    if kind == 8:
        return _blob(x, y, a, b)
    return _twig(x, y, a, b)


@njit(cache=True, nogil=True)
def fill_distances(out, x0, y0, kind, pose, proportions):
    """out float32 [ph, pw] <- signed distances (px) of a silhouette at the pixel centres of a patch from (x0, y0) on.

    pose [7]: centre x, y (px), the 2 x 2 matrix (row-major) from pixels to the object's frame, pixels per unit.
    """
    for i in range(out.shape[0]):
        dy = y0 + i + 0.5 - pose[1]
        for j in range(out.shape[1]):
            dx = x0 + j + 0.5 - pose[0]
            x, y = pose[2] * dx + pose[3] * dy, pose[4] * dx + pose[5] * dy
            r = math.hypot(x, y)
            if r > 1.45:  # no silhouette reaches here
                out[i, j] = (r - 1.35) * pose[6]
            else:
                out[i, j] = _silhouette(kind, x, y, proportions[0], proportions[1], proportions[2]) * pose[6]


@njit(cache=True, nogil=True)
def count_cover(distances, x0, y0, labels, counts):
    """Pixels of a patch inside the silhouette; counts[l] <- those of them that lie in the image on label l."""
    h, w = labels.shape
    total = 0
    counts[:] = 0
    for i in range(distances.shape[0]):
        for j in range(distances.shape[1]):
            if distances[i, j] < 0.0:
                total += 1
                y, x = y0 + i, x0 + j
                if 0 <= y < h and 0 <= x < w:
                    counts[labels[y, x]] += 1
    return total

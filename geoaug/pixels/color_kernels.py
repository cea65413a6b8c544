"""Numba kernels of the colour operators on a CPU: one sample after another, a row of three planes at a time.

A row (three times the width, as float32) stays in the first cache while all its operators pass over it, so a sample is
read and written once a stage: up to the contrast's mean, from there on, and the blur. Nothing crosses a sample, so its
bits never depend on its batch.
No annotations here: numba reads the types, and a checker between `njit` and the function would stop it.
"""

import math

import numpy as np
from numba import njit

BRIGHTNESS, CONTRAST, SATURATION, HUE = 0, 1, 2, 3
FIXED = np.float32(2.0**20)  # a gray value in whole 2^-20: sums of these are exact in any order, on any device
_R, _G, _B = np.float32(0.2989), np.float32(0.587), np.float32(0.114)  # torchvision's gray
_0, _HALF, _1, _2, _4, _6 = (np.float32(x) for x in (0, 0.5, 1, 2, 4, 6))
_TAIL = np.float32(1e-8)  # taps below this change no float32 in [0, 1]


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def _clamp(x):
    y = _0 if x < _0 else x
    return _1 if y > _1 else y


@njit(cache=True, nogil=True, error_model="numpy")
def _load(image, y, scale, row):
    """row [3, w] <- row y of image [3, h, w], in [0, 1]."""
    for c in range(3):
        for x in range(row.shape[1]):
            row[c, x] = np.float32(image[c, y, x]) / scale


@njit(cache=True, nogil=True, error_model="numpy")
def _brighten(row, factor):
    for c in range(3):
        for x in range(row.shape[1]):
            row[c, x] = _clamp(row[c, x] * factor)


@njit(cache=True, nogil=True, error_model="numpy")
def _contrast(row, factor, mean):
    shift = (_1 - factor) * mean
    for c in range(3):
        for x in range(row.shape[1]):
            row[c, x] = _clamp(row[c, x] * factor + shift)


@njit(cache=True, nogil=True, error_model="numpy")
def _saturate(row, factor):
    r, g, b = row[0], row[1], row[2]
    rest = _1 - factor
    for x in range(row.shape[1]):
        shift = (r[x] * _R + g[x] * _G + b[x] * _B) * rest
        r[x] = _clamp(r[x] * factor + shift)
        g[x] = _clamp(g[x] * factor + shift)
        b[x] = _clamp(b[x] * factor + shift)


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def _channel(high, span, k):
    """The HSV hexagon in closed form: a channel is `high` where it leads and `span` lower where it trails."""
    turn = k - _6 if k >= _6 else k
    far = _4 - turn
    lag = _clamp(turn if turn < far else far)
    return high - span * lag


@njit(cache=True, nogil=True, error_model="numpy")
def _turn_hue(row, shift):
    r, g, b = row[0], row[1], row[2]
    turn = shift * _6
    for x in range(row.shape[1]):
        red, green, blue = r[x], g[x], b[x]
        high = red if red > green else green
        high = blue if blue > high else high
        low = red if red < green else green
        low = blue if blue < low else low
        span = high - low
        first, second = high == red, high == green
        base = _0 if first else (_2 if second else _4)
        step = green - blue if first else (blue - red if second else red - green)
        k = base + turn + step / (span if span > _0 else _1)
        k = k + _6 if k < _0 else k
        k = k - _6 if k >= _6 else k
        # Red, green and blue lie 5, 3 and 1 sextants ahead.
        r[x] = _channel(high, span, k + np.float32(5))
        g[x] = _channel(high, span, k + np.float32(3))
        b[x] = _channel(high, span, k + _1)


@njit(cache=True, nogil=True, error_model="numpy")
def _gray(row):
    r, g, b = row[0], row[1], row[2]
    for x in range(row.shape[1]):
        gray = r[x] * _R + g[x] * _G + b[x] * _B
        r[x] = gray
        g[x] = gray
        b[x] = gray


@njit(cache=True, nogil=True, error_model="numpy")
def _gray_sum(row):
    r, g, b = row[0], row[1], row[2]
    total = np.int64(0)
    for x in range(row.shape[1]):
        total += np.int64(np.int32((r[x] * _R + g[x] * _G + b[x] * _B) * FIXED + _HALF))
    return total


@njit(cache=True, nogil=True, error_model="numpy")
def _jitter(row, factors, order, start, stop, mean):
    """Operators start..stop of a sample's order, in place."""
    for i in range(start, stop):
        op = order[i]
        factor = factors[op]
        if op == HUE:
            if factor != _0:
                _turn_hue(row, factor)
        elif factor != _1:
            if op == BRIGHTNESS:
                _brighten(row, factor)
            elif op == CONTRAST:
                _contrast(row, factor, mean)
            else:
                _saturate(row, factor)


@njit(cache=True, nogil=True, error_model="numpy")
def _store(row, y, solarize, threshold, mean, std, out):
    """Row y of out [3, h, w] <- row, solarized and normalised."""
    for c in range(3):
        if solarize:
            for x in range(row.shape[1]):
                row[c, x] = _1 - row[c, x] if row[c, x] >= threshold else row[c, x]
        for x in range(row.shape[1]):
            out[c, y, x] = (row[c, x] - mean[c]) / std[c]


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def _reflect(i, n):
    """The index that i stands for beyond an edge, which is not repeated; -n < i < 2n - 1."""
    j = -i if i < 0 else i
    return 2 * n - 2 - j if j >= n else j


@njit(cache=True, nogil=True, error_model="numpy")
def _blur_row(source, y, taps, reach, wide, row):
    """row [3, w] <- row y of source [3, h, w] blurred down the columns, then along the row; wide [w + 2 reach]."""
    h, w = source.shape[1], source.shape[2]
    inner = wide[reach : reach + w]
    for c in range(3):
        centre = source[c, y]
        for x in range(w):
            inner[x] = centre[x] * taps[0]
        for t in range(1, reach + 1):
            above, below, tap = source[c, _reflect(y - t, h)], source[c, _reflect(y + t, h)], taps[t]
            for x in range(w):
                inner[x] += (above[x] + below[x]) * tap
        for t in range(1, reach + 1):
            wide[reach - t] = inner[_reflect(-t, w)]
            wide[reach + w - 1 + t] = inner[_reflect(w - 1 + t, w)]
        line = row[c]
        for x in range(w):
            line[x] = inner[x] * taps[0]
        for t in range(1, reach + 1):
            left, right, tap = wide[reach - t : reach - t + w], wide[reach + t : reach + t + w], taps[t]
            for x in range(w):
                line[x] += (left[x] + right[x]) * tap


@njit(cache=True, nogil=True, error_model="numpy")
def _fill_taps(sigma, taps):
    """taps [radius + 1] <- the Gaussian's weights from the centre outwards; gives how many beyond it count."""
    if sigma == _0 or taps.shape[0] == 1:
        taps[0] = _1
        return 0
    total = 1.0
    least = max(np.float64(sigma), 1e-3)  # narrower ones keep no neighbour
    for t in range(1, taps.shape[0]):
        total += 2.0 * math.exp(-0.5 * (t / least) ** 2)
    for t in range(taps.shape[0]):
        taps[t] = np.float32(math.exp(-0.5 * (t / least) ** 2) / total)
    reach = taps.shape[0] - 1
    while reach > 0 and taps[reach] < _TAIL:
        reach -= 1
    return reach


@njit(cache=True, nogil=True, error_model="numpy")
def paint(images, scale, factors, order, gray, sigma, solarize, radius, threshold, mean, std, out):
    """out float32 [B, 3, h, w] <- images [B, 3, h, w] / scale through each sample's operators, normalised."""
    h, w = images.shape[2], images.shape[3]
    row = np.empty((3, w), np.float32)
    wide = np.empty(w + 2 * radius, np.float32)
    taps = np.empty(radius + 1, np.float32)
    work = np.empty((3, h, w), np.float32)
    for i in range(images.shape[0]):
        image, result = images[i], out[i]
        reach = _fill_taps(sigma[i], taps)
        split, average = 0, _0
        held = factors[i, CONTRAST] != _1
        if held:  # what comes before the contrast first, for its mean
            while order[i, split] != CONTRAST:
                split += 1
            total = np.int64(0)
            for y in range(h):
                _load(image, y, scale, row)
                _jitter(row, factors[i], order[i], 0, split, average)
                total += _gray_sum(row)
                work[:, y] = row
            average = np.float32(total) / FIXED / np.float32(h * w)
        for y in range(h):
            if held:
                row[:] = work[:, y]
            else:
                _load(image, y, scale, row)
            _jitter(row, factors[i], order[i], split, 4, average)
            if gray[i]:
                _gray(row)
            if reach > 0:
                work[:, y] = row
            else:
                _store(row, y, solarize[i], threshold, mean, std, result)
        if reach > 0:
            for y in range(h):
                _blur_row(work, y, taps, reach, wide, row)
                _store(row, y, solarize[i], threshold, mean, std, result)

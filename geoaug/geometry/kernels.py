"""Numba kernels of the geometry: Philox, the crop law and the box law, one image after another.

Everything is kept as uint64 holding 32-bit words, so that LLVM uses its 32 x 32 -> 64 multiply. No annotations here:
numba reads the types, and a checker between `njit` and the function would stop it.
"""

import numpy as np
from numba import njit

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_LOW, _32, _8 = np.uint64(0xFFFFFFFF), np.uint64(32), np.uint64(8)
_UNIT = np.float32(2.0**-24)

AREA, SIDE, FIXED = 0, 1, 2  # crop laws of `draw_crops`
ATTEMPTS = 10  # torchvision's number of tries before its centre fallback
CANDIDATES = 50  # SCRL's number of tries for a box


@njit(cache=True, nogil=True, inline="always")
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 of one counter under one key; uint64 words in, four uint64 words out."""
    for _ in range(10):
        p0 = _M0 * c0
        p1 = _M1 * c2
        c0, c1, c2, c3 = (p1 >> _32) ^ c1 ^ k0, p1 & _LOW, (p0 >> _32) ^ c3 ^ k1, p0 & _LOW
        k0 = (k0 + _W0) & _LOW
        k1 = (k1 + _W1) & _LOW
    return c0, c1, c2, c3


@njit(cache=True, nogil=True, inline="always")
def block_of(identity, tag, block, k0, k1):
    """The four words of one block of the stream `tag` of one id."""
    word = np.uint64(identity)
    return philox4x32(word & _LOW, word >> _32, np.uint64(tag), np.uint64(block), np.uint64(k0), np.uint64(k1))


@njit(cache=True, nogil=True, inline="always")
def to_unit(word):
    """float32 in [0, 1) from the top 24 bits of a word."""
    return np.float32(word >> _8) * _UNIT


@njit(cache=True, nogil=True, inline="always")
def below(high_word, low_word, n):
    """Whole number in [0, n) from 64 random bits by multiply-shift; n <= 2^31."""
    m = np.uint64(n)
    return np.int64((high_word * m + ((low_word * m) >> _32)) >> _32)


@njit(cache=True, nogil=True)
def fill_words(ids, tag, k0, k1, start, out):
    """out uint32 [B, 4 * blocks] <- the words of the stream of each id from block `start` on."""
    for i in range(ids.shape[0]):
        for block in range(out.shape[1] // 4):
            w0, w1, w2, w3 = block_of(ids[i], tag, start + block, k0, k1)
            out[i, 4 * block] = w0
            out[i, 4 * block + 1] = w1
            out[i, 4 * block + 2] = w2
            out[i, 4 * block + 3] = w3


@njit(cache=True, nogil=True)
def fill_unit(ids, tag, k0, k1, out):
    """out float32 [B, n] <- the first n uniform numbers of the stream of each id."""
    n = out.shape[1]
    for i in range(ids.shape[0]):
        for block in range((n + 3) // 4):
            w0, w1, w2, w3 = block_of(ids[i], tag, block, k0, k1)
            at = 4 * block
            out[i, at] = to_unit(w0)
            if at + 1 < n:
                out[i, at + 1] = to_unit(w1)
            if at + 2 < n:
                out[i, at + 2] = to_unit(w2)
            if at + 3 < n:
                out[i, at + 3] = to_unit(w3)


@njit(cache=True, nogil=True, inline="always")
def _between(low, high, u):
    return low + (high - low) * np.float64(u)


@njit(cache=True, nogil=True)
def _crop_size(height, width, identity, tag, k0, k1, low, high, log_low, log_high):
    """torchvision's law: ten tries on area and log-aspect, then the largest centre crop of a legal aspect."""
    area = np.float64(height) * np.float64(width)
    for block in range(ATTEMPTS // 2):
        w0, w1, w2, w3 = block_of(identity, tag, block, k0, k1)
        for second in range(2):
            u = to_unit(w2) if second else to_unit(w0)
            v = to_unit(w3) if second else to_unit(w1)
            target = area * _between(low, high, u)
            aspect = np.exp(_between(log_low, log_high, v))
            w = np.int64(np.rint(np.sqrt(target * aspect)))
            h = np.int64(np.rint(np.sqrt(target / aspect)))
            if 0 < w <= width and 0 < h <= height:
                return h, w, True
    aspect = np.float64(width) / np.float64(height)
    least, most = np.exp(log_low), np.exp(log_high)
    if aspect < least:
        return max(1, np.int64(np.rint(width / least))), width, False
    if aspect > most:
        return height, max(1, np.int64(np.rint(height * most))), False
    return height, width, False


@njit(cache=True, nogil=True)
def draw_crops(windows, ids, tag, k0, k1, law, low, high, log_low, log_high, flip, crops, flipped):
    """crops int32 [N, 4], flipped bool [N] <- one view of every image, inside windows int32 [N, 4] of its source.

    Blocks of the stream: 0-4 size attempts (two a block), 5 position (64 bits an axis), 6 flip.
    """
    for i in range(ids.shape[0]):
        x0, y0 = np.int64(windows[i, 0]), np.int64(windows[i, 1])
        width, height = windows[i, 2] - x0, windows[i, 3] - y0
        w, h, drawn = width, height, False
        if law == AREA:
            h, w, drawn = _crop_size(height, width, ids[i], tag, k0, k1, low, high, log_low, log_high)
            if not drawn:
                x0 += (width - w) // 2
                y0 += (height - h) // 2
        elif law == SIDE:
            u = to_unit(block_of(ids[i], tag, 0, k0, k1)[0])
            side = np.int64(np.rint(min(height, width) * _between(low, high, u)))
            h = w = max(np.int64(1), side)
            drawn = True
        if drawn:
            w0, w1, w2, w3 = block_of(ids[i], tag, 5, k0, k1)
            y0 += below(w0, w1, height - h + 1)
            x0 += below(w2, w3, width - w + 1)
        crops[i, 0], crops[i, 1], crops[i, 2], crops[i, 3] = x0, y0, x0 + w, y0 + h
        flipped[i] = flip > 0.0 and np.float64(to_unit(block_of(ids[i], tag, 6, k0, k1)[0])) < flip


@njit(cache=True, nogil=True)
def crops_inside(crops, sizes):
    """Whether every crop int32 [N, V, 4] holds a pixel and lies inside its source of size int32 [N, 2]."""
    for i in range(crops.shape[0]):
        for v in range(crops.shape[1]):
            x0, y0, x1, y1 = crops[i, v, 0], crops[i, v, 1], crops[i, v, 2], crops[i, v, 3]
            if not (0 <= x0 < x1 <= sizes[i, 1] and 0 <= y0 < y1 <= sizes[i, 0]):
                return False
    return True


@njit(cache=True, nogil=True, inline="always")
def _grid_side(size, least, w0, w1, w2, w3, v0, v1, v2, v3):
    """One axis of SCRL's grid law: divisions, cell, length, offset; whole pixels of the overlap."""
    divisions = 1 + below(w0, w1, size // least)
    cell = size // divisions
    start = (below(w2, w3, divisions) * size) // divisions
    length = least + below(v0, v1, cell - least + 1)
    start += below(v2, v3, cell - length + 1)
    return np.float32(start), np.float32(start + length)


@njit(cache=True, nogil=True, inline="always")
def _uniform_side(size, least, u, v):
    """One axis of eq. 1: a length in [least, size), then a position; the same float32 steps as on a device."""
    span = np.float32(size)
    length = np.float32(least) + u * (span - np.float32(least))
    start = v * (span - length)
    return start, start + length


@njit(cache=True, nogil=True)
def _iou_below(x0, y0, x1, y1, boxes, count, most):
    for j in range(count):
        if np.isnan(boxes[j, 0]):
            continue  # a slot that failed under on_fail="drop"
        w = min(x1, boxes[j, 2]) - max(x0, boxes[j, 0])
        h = min(y1, boxes[j, 3]) - max(y0, boxes[j, 1])
        inter = max(w, np.float32(0)) * max(h, np.float32(0))
        union = (x1 - x0) * (y1 - y0) + (boxes[j, 2] - boxes[j, 0]) * (boxes[j, 3] - boxes[j, 1]) - inter
        if not inter < most * union:
            return False
    return True


@njit(cache=True, nogil=True)
def draw_boxes(sizes, usable, ids, tag, k0, k1, least, most, grid, keep, boxes, valid):
    """boxes float32 [B, K, 4], valid bool [B, K] <- boxes in pixels of overlaps of sizes int32 [B, 2] (width, height).

    Attempt `a` of slot `s` reads blocks 4 * (50 s + a) to + 3; candidates after the first accepted are never drawn.
    """
    slots = boxes.shape[1]
    for i in range(ids.shape[0]):
        if not usable[i]:
            continue
        width, height = np.int64(sizes[i, 0]), np.int64(sizes[i, 1])
        for s in range(slots):
            accepted = False
            x0 = y0 = x1 = y1 = np.float32(0)
            for attempt in range(CANDIDATES):
                block = 4 * (CANDIDATES * s + attempt)
                a0, a1, a2, a3 = block_of(ids[i], tag, block, k0, k1)
                if grid:
                    b0, b1, b2, b3 = block_of(ids[i], tag, block + 1, k0, k1)
                    x0, x1 = _grid_side(width, least, a0, a1, a2, a3, b0, b1, b2, b3)
                    a0, a1, a2, a3 = block_of(ids[i], tag, block + 2, k0, k1)
                    b0, b1, b2, b3 = block_of(ids[i], tag, block + 3, k0, k1)
                    y0, y1 = _grid_side(height, least, a0, a1, a2, a3, b0, b1, b2, b3)
                else:
                    x0, x1 = _uniform_side(width, least, to_unit(a0), to_unit(a1))
                    y0, y1 = _uniform_side(height, least, to_unit(a2), to_unit(a3))
                if most >= 1.0 or _iou_below(x0, y0, x1, y1, boxes[i], s, most):
                    accepted = True
                    break
            valid[i, s] = accepted or keep
            if not valid[i, s]:
                x0 = y0 = x1 = y1 = np.float32(np.nan)
            boxes[i, s, 0], boxes[i, s, 1], boxes[i, s, 2], boxes[i, s, 3] = x0, y0, x1, y1

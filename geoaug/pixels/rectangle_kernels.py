"""Numba kernels of whole-pixel rectangles and of PRC's turns: what `rectangles` and `cutout` do in torch, on a CPU.

One image after another, so that nothing but the masks themselves is ever as large as a view. Between two edges of the
rectangles all rows of pixels are alike: one is painted, as bits to count and as bytes to draw. No annotations: numba
reads the types.
"""

import numpy as np
from numba import njit

_ALL, _63 = np.uint64(0xFFFFFFFFFFFFFFFF), np.uint64(63)


@njit(cache=True, nogil=True, inline="always")
def _edges(inside, events, low, high, out):
    """Where rows of pixels in [low, high) change, ascending in `out`, the ends too; how many stretches that makes."""
    n = 1
    out[0] = low
    for part in (inside, events):
        for r in range(part.shape[0]):
            for side in (1, 3):
                edge = part[r, side]
                if not low < edge < high:
                    continue
                at = n
                while out[at - 1] > edge:
                    at -= 1
                if out[at - 1] == edge:
                    continue
                for i in range(n, at, -1):
                    out[i] = out[i - 1]
                out[at] = edge
                n += 1
    out[n] = high
    return n


@njit(cache=True, nogil=True, inline="always")
def _set_bits(words, x0, x1, value):
    first, last = x0 >> 6, (x1 - 1) >> 6
    for i in range(first, last + 1):
        bits = _ALL
        if i == first:
            bits &= _ALL << np.uint64(x0 & 63)
        if i == last:
            bits &= _ALL >> (_63 - np.uint64((x1 - 1) & 63))
        words[i] = words[i] | bits if value else words[i] & ~bits


@njit(cache=True, nogil=True, inline="always")
def _ones(word):
    word = word - ((word >> np.uint64(1)) & np.uint64(0x5555555555555555))
    word = (word & np.uint64(0x3333333333333333)) + ((word >> np.uint64(2)) & np.uint64(0x3333333333333333))
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((word * np.uint64(0x0101010101010101)) >> np.uint64(56))


@njit(cache=True, nogil=True)
def _count(inside, some, events, box, edges, bits):
    """Pixels of `box` that are there in the end, and in any rectangle of `inside` if `some`; bits [2, words]."""
    x0, y0, x1, y1 = box[0], box[1], box[2], box[3]
    if x1 <= x0 or y1 <= y0:
        return 0
    total = 0
    for i in range(_edges(inside, events, y0, y1, edges)):
        y = edges[i]
        bits[:, x0 >> 6 : ((x1 - 1) >> 6) + 1] = 0
        _set_bits(bits[0], x0, x1, True)
        for e in range(events.shape[0]):
            low, high = max(x0, events[e, 0]), min(x1, events[e, 2])
            if events[e, 1] <= y < events[e, 3] and low < high:
                _set_bits(bits[0], low, high, e % 2 == 0)
        if some:
            for r in range(inside.shape[0]):
                low, high = max(x0, inside[r, 0]), min(x1, inside[r, 2])
                if inside[r, 1] <= y < inside[r, 3] and low < high:
                    _set_bits(bits[1], low, high, True)
        count = 0
        for word in range(x0 >> 6, ((x1 - 1) >> 6) + 1):
            count += _ones(bits[0, word] & bits[1, word] if some else bits[0, word])
        total += count * (edges[i + 1] - y)
    return total


@njit(cache=True, nogil=True)
def count_uncut(inside, some, events, boxes, out):
    """out int64 [B, N] <- how many pixels of boxes [B, N, 4] are there after events [B, E, 4], as `uncut` has it.

    Those in a rectangle of inside [B, R, 4], if `some`.
    """
    edges = np.empty(2 * (inside.shape[1] + events.shape[1]) + 2, dtype=np.int64)
    most = 1
    for b in range(boxes.shape[0]):
        for k in range(boxes.shape[1]):
            most = max(most, boxes[b, k, 2])
    bits = np.empty((2, (most + 63) >> 6), dtype=np.uint64)
    for b in range(boxes.shape[0]):
        for k in range(boxes.shape[1]):
            out[b, k] = _count(inside[b], some, events[b], boxes[b, k], edges, bits)


@njit(cache=True, nogil=True)
def draw(inside, some, events, out):
    """out uint8 [B, h, w] <- 1 where a pixel is there in the end and in any rectangle of `inside`, if `some`."""
    height, width = out.shape[1:]
    edges = np.empty(2 * (inside.shape[1] + events.shape[1]) + 2, dtype=np.int64)
    there = np.empty(width, dtype=np.uint8)
    for b in range(out.shape[0]):
        for i in range(_edges(inside[b], events[b], 0, height, edges)):
            y = edges[i]
            row = out[b, y]
            row[:] = 0 if some else 1
            for r in range(inside.shape[1]):
                if inside[b, r, 1] <= y < inside[b, r, 3]:
                    row[inside[b, r, 0] : inside[b, r, 2]] = 1
            there[:] = 1
            for e in range(events.shape[1]):
                if events[b, e, 1] <= y < events[b, e, 3]:
                    there[events[b, e, 0] : events[b, e, 2]] = 1 if e % 2 == 0 else 0
            for x in range(width):
                row[x] &= there[x]
            for again in range(y + 1, edges[i + 1]):
                target = out[b, again]
                for x in range(width):
                    target[x] = row[x]


@njit(cache=True, nogil=True, inline="always")
def _span(low, high, side):
    """The pixels whose centres are in [low, high) of `side` pixels."""
    first = min(max(np.ceil(low - 0.5), 0.0), side)
    last = min(max(np.ceil(high - 0.5), 0.0), side)
    return np.int64(first), np.int64(last)


@njit(cache=True, nogil=True)
def around(box, area, u, v, height, width, clip, out):
    """out int64 [4] <- the rectangle with a box's aspect, `area` pixels and a centre at (u, v) of it; zeros if none."""
    w, h = np.float64(box[2] - box[0]), np.float64(box[3] - box[1])
    x, y = box[0] + u * w, box[1] + v * h
    half = 0.5 * np.sqrt(area / max(1.0, w * h))
    x0, x1 = _span(x - half * w, x + half * w, np.float64(width))
    y0, y1 = _span(y - half * h, y + half * h, np.float64(height))
    if x1 > x0 and y1 > y0 and clip:
        x0, y0, x1, y1 = max(x0, box[0]), max(y0, box[1]), min(x1, box[2]), min(y1, box[3])
    if x1 > x0 and y1 > y0:
        out[0], out[1], out[2], out[3] = x0, y0, x1, y1
    else:
        out[:] = 0


@njit(cache=True, nogil=True)
def take_turns(boxes, u, low, high, height, width, clip, threshold, tolerance, shares, order, events):
    """shares float64 [B, K], order [B, K], events [B, 2 K, 4] of a `Cutouts` <- pixels boxes [B, K, 4], u [B, K, 3].

    `tolerance` is (from, to, half); `threshold` is the other rule, and leaves it alone.
    """
    batch, slots = boxes.shape[:2]
    nothing = np.zeros((0, 4), dtype=np.int64)
    edges = np.empty(4 * slots + 2, dtype=np.int64)
    bits = np.empty((2, (width + 63) >> 6), dtype=np.uint64)
    pixels = np.empty(slots, dtype=np.int64)
    for b in range(batch):
        for k in range(slots):
            pixels[k] = (boxes[b, k, 2] - boxes[b, k, 0]) * (boxes[b, k, 3] - boxes[b, k, 1])
            at = k
            while at > 0 and pixels[order[b, at - 1]] < pixels[k]:
                order[b, at] = order[b, at - 1]
                at -= 1
            order[b, at] = k
            shares[b, k] = low + (high - low) * np.float64(u[b, k, 0])
        for turn in range(slots):
            k = order[b, turn]
            target, away = shares[b, k] * pixels[k], np.float64(0)
            if turn > 0:
                away += pixels[k] - _count(nothing, False, events[b, : 2 * turn], boxes[b, k], edges, bits)
            if threshold:
                leave, again = False, away > target
                missing = target - (0.0 if again else away)
            else:
                leave = tolerance[0] * target < away <= tolerance[1] * target
                again, missing = not leave and away > 0 and away >= tolerance[2] * target, target
            for i in range(4):
                events[b, 2 * turn, i] = boxes[b, k, i] if again else 0
            if leave:
                events[b, 2 * turn + 1] = 0
            else:
                place = np.float64(u[b, k, 1]), np.float64(u[b, k, 2])
                around(boxes[b, k], missing, *place, height, width, clip, events[b, 2 * turn + 1])

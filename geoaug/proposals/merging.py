"""Greedy merging of regions by similarity (Uijlings et al. 2013, algorithm 1), with a priority queue.

Pairs are numbered as they are made. The queue gives the most similar pair, and of equals the youngest; that, and the
order in which a merged region meets its neighbours, is what the PyPI package `selectivesearch` does.

No annotations here: numba reads the types, and a checker between `njit` and the function would stop it.
"""

import math

import numpy as np
from numba import njit

PACKAGE, COLOUR, TEXTURE, SIZE, FILL = 0, 1, 2, 4, 8  # the package's own sum, or terms to add
ALL = COLOUR + TEXTURE + SIZE + FILL
WHOLE = 1 << 20  # a histogram's sum in whole numbers
MOST_PAIRS = 1 << 23  # a limit of memory: about 450 MB and, on photographs, thousands of times what there is


@njit(cache=True, nogil=True, inline="always")
def _before(similarity, a, b):
    """Whether pair a leaves the queue before pair b."""
    return similarity[a] > similarity[b] or (similarity[a] == similarity[b] and a > b)


@njit(cache=True, nogil=True)
def _push(queue, length, pair, similarity):
    at = length
    while at > 0:
        up = (at - 1) >> 1
        if not _before(similarity, pair, queue[up]):
            break
        queue[at] = queue[up]
        at = up
    queue[at] = pair


@njit(cache=True, nogil=True)
def _pop(queue, length, similarity):
    """Take the first pair off a queue of `length`."""
    first, last, at = queue[0], queue[length - 1], 0
    length -= 1
    while True:
        down = 2 * at + 1
        if down >= length:
            break
        if down + 1 < length and _before(similarity, queue[down + 1], queue[down]):
            down += 1
        if not _before(similarity, queue[down], last):
            break
        queue[at] = queue[down]
        at = down
    queue[at] = last
    return first


@njit(cache=True, nogil=True, fastmath={"reassoc", "nsz"})
def _common(x, y, start, stop):
    """Intersection of histograms of whole numbers, so that the sum is the same in every order."""
    total = 0.0
    for k in range(start, stop):
        total += min(x[k], y[k])
    return total


@njit(cache=True, nogil=True)
def _similarity(boxes, sizes, features, a, b, pixels, terms, colours):
    """Colour + texture + size + fill of two regions: the package's, in its order of floats, or the terms asked for."""
    x, y = features[a], features[b]
    together = sizes[a] + sizes[b]
    width = max(boxes[a, 2], boxes[b, 2]) - min(boxes[a, 0], boxes[b, 0])
    height = max(boxes[a, 3], boxes[b, 3]) - min(boxes[a, 1], boxes[b, 1])
    if terms == PACKAGE:
        colour, texture = 2.0, 0.0  # hue and saturation lie in one bin each
        for k in range(colours):
            colour += min(x[k], y[k])
        for k in range(colours, x.shape[0]):
            texture += min(x[k], y[k])
        return colour + texture + (1.0 - together / pixels) + (1.0 - (width * height - together) / pixels)
    total = 0.0
    if terms & COLOUR:
        total += _common(x, y, 0, colours) / WHOLE
    if terms & TEXTURE:
        total += _common(x, y, colours, x.shape[0]) / WHOLE
    if terms & SIZE:
        total += 1.0 - together / pixels
    if terms & FILL:
        total += 1.0 - ((width + 1) * (height + 1) - together) / pixels
    return total


@njit(cache=True, nogil=True)
def corners_inside(boxes, regions):
    """Pairs int32 [P, 2] of regions of which the earlier holds a corner of the later strictly inside its bounds.

    Labels count in raster order of first pixels, so y0 never falls and the search stops at the first y0 too low.
    """
    pairs, found = np.empty((8 * regions + 64, 2), np.int32), 0
    for a in range(regions):
        x0, y0, x1, y1 = boxes[a]
        for b in range(a + 1, regions):
            if boxes[b, 1] >= y1:
                break
            across = x0 < boxes[b, 0] < x1 or x0 < boxes[b, 2] < x1
            if across and (y0 < boxes[b, 1] or y0 < boxes[b, 3] < y1):
                if found == pairs.shape[0]:
                    if found > MOST_PAIRS:
                        return pairs[:found]
                    pairs = np.concatenate((pairs, pairs))
                pairs[found, 0], pairs[found, 1] = a, b
                found += 1
    return pairs[:found]


@njit(cache=True, nogil=True)
def _absorb(boxes, sizes, features, a, b, t, terms):
    """Region t <- regions a and b together."""
    boxes[t, 0], boxes[t, 1] = min(boxes[a, 0], boxes[b, 0]), min(boxes[a, 1], boxes[b, 1])
    boxes[t, 2], boxes[t, 3] = max(boxes[a, 2], boxes[b, 2]), max(boxes[a, 3], boxes[b, 3])
    size = sizes[a] + sizes[b]
    sizes[t] = size
    x, y, out = features[a], features[b], features[t]
    for k in range(out.shape[0]):
        out[k] = (x[k] * sizes[a] + y[k] * sizes[b]) / size
    if terms != PACKAGE:
        for k in range(out.shape[0]):
            out[k] = math.floor(out[k])


@njit(cache=True, nogil=True)
def _link(pairs, p, heads, tails):
    """Put pair p at the end of the lists of its two regions."""
    for side in range(2):
        region = pairs[p, side]
        last = tails[region]
        if last < 0:
            heads[region] = p
        elif pairs[last, 0] == region:
            pairs[last, 2] = p
        else:
            pairs[last, 3] = p
        tails[region] = p
        pairs[p, 2 + side] = -1


@njit(cache=True, nogil=True)
def merge(boxes, sizes, features, regions, neighbours, pixels, terms, colours):
    """Merge `regions` regions until no pair is left; the number of regions there are then, or -1 for too many pairs.

    boxes int32 [2 R, 4], sizes int64 [2 R], features float64 [2 R, D] hold R regions and get the merged ones. `terms`
    is PACKAGE, or the similarities to add; then features are whole numbers. The first `colours` features are of colour.
    """
    made = neighbours.shape[0]
    capacity = 2 * made + 64
    if made > MOST_PAIRS:
        return -1
    # A row is a pair: its two regions, and the next pair of either region.
    pairs, similarity, queue = np.empty((capacity, 4), np.int32), np.empty(capacity), np.empty(capacity, np.int32)
    heads, tails = np.full(2 * regions, -1, np.int32), np.full(2 * regions, -1, np.int32)
    alive, seen = np.ones(2 * regions, np.bool_), np.full(2 * regions, -1, np.int32)
    for p in range(made):
        a, b = neighbours[p]
        pairs[p, 0], pairs[p, 1] = a, b
        _link(pairs, p, heads, tails)
        similarity[p] = _similarity(boxes, sizes, features, a, b, pixels, terms, colours)
        _push(queue, p, p, similarity)
    waiting, t = made, regions
    while waiting > 0:
        p = _pop(queue, waiting, similarity)
        waiting -= 1
        a, b = pairs[p, 0], pairs[p, 1]
        if not (alive[a] and alive[b]):
            continue
        _absorb(boxes, sizes, features, a, b, t, terms)
        alive[a] = alive[b] = False
        p, q = heads[a], heads[b]
        while p >= 0 or q >= 0:  # both lists at once, in order of number; of a neighbour of both the first counts
            if q < 0 or 0 <= p < q:
                side = int(pairs[p, 0] == a)
                other, p = pairs[p, side], pairs[p, 3 - side]
            else:
                side = int(pairs[q, 0] == b)
                other, q = pairs[q, side], pairs[q, 3 - side]
            if not alive[other] or seen[other] == t:
                continue
            seen[other] = t
            if made == capacity:
                if made > MOST_PAIRS:
                    return -1
                pairs, queue = np.concatenate((pairs, pairs)), np.concatenate((queue, queue))
                similarity, capacity = np.concatenate((similarity, similarity)), 2 * capacity
            pairs[made, 0], pairs[made, 1] = t, other
            _link(pairs, made, heads, tails)
            similarity[made] = _similarity(boxes, sizes, features, t, other, pixels, terms, colours)
            _push(queue, waiting, made, similarity)
            made, waiting = made + 1, waiting + 1
        t += 1
    return t

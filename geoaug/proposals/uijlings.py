"""Selective search over several colours, scales and similarities (Uijlings et al. 2013), in one call without the GIL.

For each colour space and scale the image is segmented and described once; each set of similarities merges the regions
anew. OpenCV's single, fast and quality modes vary the same things.

No annotations here: numba reads the types, and a checker between `njit` and the function would stop it.
"""

import math

import numpy as np
from numba import njit

from ..geometry.kernels import philox4x32, to_unit
from . import blurring, colour_spaces, felzenszwalb, merging
from .region_features import find_bounds

COLOURS, DIRECTIONS, STRENGTHS = 25, 8, 10
MOST_REGIONS = 1 << 14  # a limit of memory: up to 2 * 315 shares a region
# Colour spaces, multiples of the scale, and sums of similarities of each mode. OpenCV's scales lie closer together;
# wider ones find more at the same number of boxes, and so does fill alone in place of a second sum of three.
STRATEGIES = {
    "single": ([colour_spaces.HSV], [1 / 2], [merging.ALL]),
    "fast": ([colour_spaces.HSV, colour_spaces.LAB], [1 / 5, 2 / 3], [merging.ALL, merging.FILL]),
    "quality": (
        [colour_spaces.HSV, colour_spaces.LAB, colour_spaces.RG_I, colour_spaces.HUE, colour_spaces.GRAY],
        [1 / 5, 1 / 3, 1 / 2, 2 / 3, 1.0],
        [merging.ALL, merging.ALL - merging.COLOUR, merging.FILL, merging.SIZE],
    ),
}
_CELLS, _ZERO = DIRECTIONS * STRENGTHS, np.uint64(0)


@njit(cache=True, nogil=True)
def _texture(plane, cells):
    """cells uint8 [H, W] <- direction and strength of the gradient of a blurred plane float64 [H, W]."""
    height, width = plane.shape
    for y in range(height):
        up, here, down, out = plane[max(y - 1, 0)], plane[y], plane[min(y + 1, height - 1)], cells[y]
        for x in range(width):
            across, along = here[min(x + 1, width - 1)] - here[max(x - 1, 0)], down[x] - up[x]
            a, b = abs(across), abs(along)
            octant = (across < 0) | (along < 0) << 1 | (a < b) << 2
            strength = min(int(math.sqrt(max(a, b)) * 20.0), STRENGTHS - 1)
            out[x] = octant * STRENGTHS + strength


@njit(cache=True, nogil=True)
def _describe(colours, cells, labels, sizes, features):
    """sizes int64 [R], features float64 [R, C * (25 + 80)] <- histograms of colour, then of texture.

    Either kind sums to WHOLE at most, in whole numbers.
    """
    many, height, width = colours.shape
    regions = sizes.shape[0]
    counts = np.zeros((regions, many * (COLOURS + _CELLS)), np.int32)
    flat, stride = counts.reshape(counts.size), counts.shape[1]
    for y in range(height):
        for c in range(many):
            row, cell, label = colours[c, y], cells[c, y], labels[y]
            first, second = c * COLOURS, many * COLOURS + c * _CELLS
            for x in range(width):
                at = label[x] * stride
                flat[at + first + (row[x] * COLOURS >> 8)] += 1
                flat[at + second + cell[x]] += 1
    for r in range(regions):
        size = counts[r, :COLOURS].sum()
        sizes[r] = size
        for k in range(counts.shape[1]):
            features[r, k] = counts[r, k] * merging.WHOLE // (many * size)


@njit(cache=True, nogil=True)
def _find(table, name):
    """Where a name stands in a table of 2^n places, or the free place where it belongs."""
    mask = table.shape[0] - 1
    at = (name * 0x9E3779B97F4A7C1 >> 20) & mask
    while table[at] >= 0 and table[at] != name:
        at = (at + 1) & mask
    return at


@njit(cache=True, nogil=True)
def _adjacent(labels):
    """Pairs int32 [P, 2] of labels that touch along a side, smaller first, in raster order of first contact."""
    height, width = labels.shape
    table, names, found, last = np.full(4096, -1, np.int64), np.empty(2048, np.int64), 0, np.int64(-1)
    for y in range(height):
        for x in range(width):
            here = labels[y, x]
            for side in range(2):
                other = labels[y, min(x + 1, width - 1)] if side == 0 else labels[min(y + 1, height - 1), x]
                if other == here:
                    continue
                name = np.int64(min(here, other)) << 32 | max(here, other)
                if name == last:
                    continue
                last, at = name, _find(table, name)
                if table[at] >= 0:
                    continue
                table[at] = name
                names[found] = name
                found += 1
                if found == names.shape[0]:
                    names, table = np.concatenate((names, names)), np.full(4 * found, -1, np.int64)
                    for k in range(found):
                        table[_find(table, names[k])] = names[k]
    pairs = np.empty((found, 2), np.int32)
    for k in range(found):
        pairs[k, 0], pairs[k, 1] = names[k] >> 32, names[k] & 0xFFFFFFFF
    return pairs


@njit(cache=True, nogil=True)
def _distinct(boxes, values):
    """Boxes uint16 [m, 4]: of int32 [n, 4] by rising value, each once."""
    bits = 64
    while bits < 4 * boxes.shape[0]:
        bits *= 2
    table, out, found = np.full(bits, -1, np.int64), np.empty(boxes.shape, np.uint16), 0
    for i in np.argsort(values, kind="mergesort"):
        box = boxes[i]
        name = (np.int64(box[0]) << 48 | np.int64(box[1]) << 32 | np.int64(box[2]) << 16 | box[3]) & 0x7FFFFFFFFFFFFFFF
        at = _find(table, name)
        if table[at] < 0:
            table[at] = name
            out[found] = box
            found += 1
    return out[:found].copy()


@njit(cache=True, nogil=True)
def strategy_boxes(image, kernel, spaces, scales, term_sets, min_size, floats, whole, small):
    """Boxes uint16 [n, 4] of uint8 [H, W, 3], each once, the most promising first; none for too many regions.

    A region's place in the order is the fourth root of its rank in its hierarchy, 1 for the whole image, times a number
    in [0, 1), so that hierarchies mix and large boxes do not all come first (the paper takes the rank itself; the root
    finds more at every number of boxes). The number is Philox's for (rank, hierarchy): always the same.
    """
    height, width, _ = image.shape
    pixels, hierarchy, found = height * width, 0, 0
    boxes, values = np.empty((4096, 4), np.int32), np.empty(4096)
    labels = whole[:pixels].reshape(height, width)
    for space in spaces:
        many = colour_spaces.channels(space)
        colours = small[: many * pixels].reshape(many, height, width)
        cells = small[3 * pixels : (3 + many) * pixels].reshape(many, height, width)
        planes = floats[: many * pixels].reshape(many, height, width)
        colour_spaces.convert(image, space, colours)
        for c in range(many):
            for y in range(height):
                for x in range(width):
                    planes[c, y, x] = colours[c, y, x] * (1.0 / 255.0)
        blurring.blur(planes, kernel, floats[3 * pixels : 4 * pixels].reshape(height, width))
        for c in range(many):
            _texture(planes[c], cells[c])
        costs, names = felzenszwalb.sort_edges(planes, floats[3 * pixels :], whole[pixels:])
        for scale in scales:
            regions = felzenszwalb.segment(costs, names, scale, min_size, labels, whole[5 * pixels :])
            if regions > MOST_REGIONS:
                return np.empty((0, 4), np.uint16)
            bounds, sizes = np.empty((2 * regions, 4), np.int32), np.empty(2 * regions, np.int64)
            features = np.empty((2 * regions, many * (COLOURS + _CELLS)))
            find_bounds(labels, bounds[:regions])
            _describe(colours, cells, labels, sizes[:regions], features[:regions])
            pairs = _adjacent(labels)
            for terms in term_sets:
                made = merging.merge(bounds, sizes, features, regions, pairs, pixels, terms, many * COLOURS)
                if made < 0:
                    return np.empty((0, 4), np.uint16)
                while found + made > values.shape[0]:
                    boxes, values = np.concatenate((boxes, boxes)), np.concatenate((values, values))
                for k in range(made):
                    rank = made - k
                    word = philox4x32(np.uint64(rank), np.uint64(hierarchy), _ZERO, _ZERO, _ZERO, _ZERO)[0]
                    values[found] = math.sqrt(math.sqrt(rank)) * to_unit(word)
                    boxes[found, 0], boxes[found, 1] = bounds[k, 0], bounds[k, 1]
                    boxes[found, 2], boxes[found, 3] = bounds[k, 2] + 1, bounds[k, 3] + 1
                    found += 1
                hierarchy += 1
    return _distinct(boxes[:found], values[:found])

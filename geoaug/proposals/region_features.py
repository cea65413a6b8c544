"""What the PyPI package `selectivesearch` measures of a region: bounds, size, brightness histogram, binary patterns.

The package bins hue and saturation (0 to 1) over 0 to 255, so both always fall into their first bin: what is left of
its colour histogram is the value, the largest of red, green and blue, in 25 bins. It bins the local binary patterns
(8 neighbours at distance 1) over 0 to 1, so only the codes 0 and 1 are counted. SoCo bins them over 0 to 255 instead.

No annotations here: numba reads the types, and a checker between `njit` and the function would stop it.
"""

import numpy as np
from numba import njit

PACKAGE, SOCO = 0, 1
COLOURS = 25
_NEAR, _FAR = np.float32(29289), np.float32(70711)  # the package rounds the diagonal's 0.70711 to 5 digits
_TIE = 4  # a diagonal that only the package's own float operations decide


@njit(cache=True, nogil=True)
def pad(image, padded):
    """padded uint8 [3, H + 2, W + 2] <- planes of uint8 [H, W, 3] with a border of zeros."""
    height, width, _ = image.shape
    padded[:, 0] = 0
    padded[:, height + 1] = 0
    for y in range(height):
        for c in range(3):
            row = padded[c, y + 1]
            row[0] = row[width + 1] = 0
            for x in range(width):
                row[x + 1] = image[y, x, c]


@njit(cache=True, nogil=True)
def _diagonal(plane, y, x, down, right):
    """Whether the package finds the diagonal at least as bright as the pixel: its bilinear sum in its order of floats.

    `plane` has a border of one pixel; y and x count without it, since the package's fractions depend on them.
    """
    r = y + 0.70711 if down else y - 0.70711
    c = x + 0.70711 if right else x - 0.70711
    top, left = (y if down else y - 1), (x if right else x - 1)
    dr, dc = r - top, c - left
    above = (1 - dc) * plane[top + 1, left + 1] + dc * plane[top + 1, left + 2]
    below = (1 - dc) * plane[top + 2, left + 1] + dc * plane[top + 2, left + 2]
    return (1 - dr) * above + dr * below - plane[y + 1, x + 1] >= 0


@njit(cache=True, nogil=True)
def _code(plane, y, x):
    """The local binary pattern of a pixel of a bordered plane: bit p set where neighbour p is at least as bright."""
    middle = plane[y + 1, x + 1]
    code = int(plane[y + 1, x + 2] >= middle) | int(_diagonal(plane, y, x, False, True)) << 1
    code |= int(plane[y, x + 1] >= middle) << 2 | int(_diagonal(plane, y, x, False, False)) << 3
    code |= int(plane[y + 1, x] >= middle) << 4 | int(_diagonal(plane, y, x, True, False)) << 5
    return code | int(plane[y + 2, x + 1] >= middle) << 6 | int(_diagonal(plane, y, x, True, True)) << 7


@njit(cache=True, nogil=True)
def _patterns(plane, y, codes, ties):
    """codes, ties uint8 [W] <- the patterns of row y without the tied diagonals, and those diagonals' bits.

    With d the rounded 0.70711, a diagonal minus the pixel is d * (0.29289 * near + 0.70711 * far), where near sums the
    differences of the two straight neighbours and far is that of the corner. Whole numbers make it 0 only where both
    are 0, so its sign is exact here (float32 holds every sum that could round to 0) and only ties need the package's
    own float operations.
    """
    above, here, below = plane[y], plane[y + 1], plane[y + 2]
    for x in range(codes.shape[0]):
        m = np.float32(here[x + 1])
        up, down = np.float32(above[x + 1]) - m, np.float32(below[x + 1]) - m
        left, right = np.float32(here[x]) - m, np.float32(here[x + 2]) - m
        up_right = _NEAR * (up + right) + _FAR * (np.float32(above[x + 2]) - m)
        up_left = _NEAR * (up + left) + _FAR * (np.float32(above[x]) - m)
        down_left = _NEAR * (down + left) + _FAR * (np.float32(below[x]) - m)
        down_right = _NEAR * (down + right) + _FAR * (np.float32(below[x + 2]) - m)
        straight = (right >= 0) | (up >= 0) << 2 | (left >= 0) << 4 | (down >= 0) << 6
        codes[x] = straight | (up_right > 0) << 1 | (up_left > 0) << 3 | (down_left > 0) << 5 | (down_right > 0) << 7
        ties[x] = (up_right == 0) << 1 | (up_left == 0) << 3 | (down_left == 0) << 5 | (down_right == 0) << 7


@njit(cache=True, nogil=True)
def _decide(plane, y, x, ties):
    """The bits of tied diagonals that the package sets, computed as it does."""
    code = 0
    for bit in (1, 3, 5, 7):
        if ties >> bit & 1:
            code |= int(_diagonal(plane, y, x, bit >= 5, bit == 1 or bit == 7)) << bit
    return code


@njit(cache=True, nogil=True)
def _pack(codes, ties, found):
    """found uint8 [W] <- two bits a colour: 1 for code 0, 2 for code 1, else 0; 64 and more where a tie decides."""
    for x in range(found.shape[0]):
        a, b, c = codes[0, x], codes[1, x], codes[2, x]
        kinds = (a <= 1) * (a + 1) | (b <= 1) * (b + 1) << 2 | (c <= 1) * (c + 1) << 4
        unsure = ((a <= 1) & (ties[0, x] > 0)) | ((b <= 1) & (ties[1, x] > 0)) | ((c <= 1) & (ties[2, x] > 0))
        found[x] = kinds | unsure << 6


@njit(cache=True, nogil=True)
def _unpacked(padded, y, x, codes, ties):
    """What `_pack` finds, with the ties decided."""
    kinds = 0
    for c in range(3):
        if codes[c, x] <= 1 and (ties[c, x] == 0 or _decide(padded[c], y, x, ties[c, x]) == 0):
            kinds |= (1 + codes[c, x]) << (2 * c)
    return kinds


@njit(cache=True, nogil=True)
def find_bounds(labels, boxes):
    """boxes int32 [R, 4] <- smallest and largest x and y of each label: x0, y0, x1, y1, the last two inclusive."""
    height, width = labels.shape
    boxes[:, :2] = max(height, width)
    boxes[:, 2:] = -1
    for y in range(height):
        x = 0
        while x < width:
            region, start = labels[y, x], x
            while x + 1 < width and labels[y, x + 1] == region:
                x += 1
            box = boxes[region]
            box[0], box[1] = min(box[0], start), min(box[1], y)
            box[2], box[3] = max(box[2], x), max(box[3], y)
            x += 1


@njit(cache=True, nogil=True)
def measure(padded, labels, texture, boxes, sizes, features):
    """boxes int32 [R, 4], sizes int64 [R], features float64 [R, 31 or 55] <- the regions of labels int32 [H, W].

    `padded` uint8 [3, H + 2, W + 2] has a border of zeros. Features are shares: 25 of value, then of each colour the
    codes 0 and 1 (package), or 10 bins of codes (SoCo).
    """
    height, width = labels.shape
    regions, bins = boxes.shape[0], features.shape[1]
    codes, ties = np.empty((3, width), np.uint8), np.empty((3, width), np.uint8)
    values, found = np.empty(width, np.uint8), np.empty(width, np.uint8)
    counts = np.zeros((regions, COLOURS + (64 if texture == PACKAGE else 30)), np.int32)
    flat, stride = counts.reshape(counts.size), counts.shape[1]
    value_bins = np.minimum(np.arange(256) * COLOURS // 255, COLOURS - 1)
    find_bounds(labels, boxes)
    for y in range(height):
        for c in range(3):
            _patterns(padded[c], y, codes[c], ties[c])
        red, green, blue, label = padded[0, y + 1, 1:], padded[1, y + 1, 1:], padded[2, y + 1, 1:], labels[y]
        for x in range(width):
            values[x] = max(red[x], green[x], blue[x])
        if texture == PACKAGE:
            _pack(codes, ties, found)
            for x in range(width):
                at = label[x] * stride
                flat[at + value_bins[values[x]]] += 1
                kinds = np.int64(found[x])
                if kinds >= 64:
                    kinds = _unpacked(padded, y, x, codes, ties)
                flat[at + COLOURS + kinds] += 1
            continue
        for x in range(width):
            at = label[x] * stride
            flat[at + value_bins[values[x]]] += 1
            for c in range(3):
                code = codes[c, x] | _decide(padded[c], y, x, ties[c, x]) if ties[c, x] else np.int64(codes[c, x])
                flat[at + COLOURS + 10 * c + min(code * 10 // 255, 9)] += 1
    for r in range(regions):
        count, row = counts[r], features[r]
        size = count[:COLOURS].sum()
        sizes[r] = size
        row[:] = 0.0
        if texture == SOCO:
            for k in range(bins):
                row[k] = count[k] / size
            continue
        for k in range(COLOURS):
            row[k] = count[k] / size
        for kinds in range(64):
            for c in range(3):
                kind = kinds >> (2 * c) & 3
                if kind > 0:
                    row[COLOURS + 2 * c + kind - 1] += count[COLOURS + kinds]
        for k in range(COLOURS, bins):
            row[k] /= size

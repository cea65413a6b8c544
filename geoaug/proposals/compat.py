"""The PyPI package `selectivesearch`, rectangle for rectangle, in one call that releases the GIL."""

import numpy as np
from numba import njit

from . import blurring, felzenszwalb, merging, region_features

MOST_REGIONS = 1 << 18  # a limit of memory: 2 * 31 or 2 * 55 shares a region


@njit(cache=True, nogil=True)
def compat_boxes(image, kernel, scale, min_size, texture, floats, whole, small):
    """Boxes uint16 [n, 4] of uint8 [H, W, 3]: the first regions, then the merged ones; n = 0 for too many regions."""
    height, width, _ = image.shape
    pixels = height * width
    planes = floats[: 3 * pixels].reshape(3, height, width)
    labels = whole[:pixels].reshape(height, width)
    padded = small[: 3 * (height + 2) * (width + 2)].reshape(3, height + 2, width + 2)
    blurring.to_planes(image, planes)
    blurring.blur(planes, kernel, floats[3 * pixels : 4 * pixels].reshape(height, width))
    costs, names = felzenszwalb.sort_edges(planes, floats[3 * pixels :], whole[pixels:])
    regions = felzenszwalb.segment(costs, names, scale, min_size, labels, whole[5 * pixels :])
    if regions > MOST_REGIONS:
        return np.empty((0, 4), np.uint16)
    region_features.pad(image, padded)
    boxes, sizes = np.empty((2 * regions, 4), np.int32), np.empty(2 * regions, np.int64)
    colours = region_features.COLOURS
    features = np.empty((2 * regions, colours + (6 if texture == region_features.PACKAGE else 30)))
    region_features.measure(padded, labels, texture, boxes[:regions], sizes[:regions], features[:regions])
    neighbours = merging.corners_inside(boxes, regions)
    found = max(merging.merge(boxes, sizes, features, regions, neighbours, pixels, merging.PACKAGE, colours), 0)
    out = np.empty((found, 4), np.uint16)
    for i in range(found):
        out[i, 0], out[i, 1] = boxes[i, 0], boxes[i, 1]
        out[i, 2], out[i, 3] = boxes[i, 2] + 1, boxes[i, 3] + 1  # from inclusive to exclusive edges
    return out

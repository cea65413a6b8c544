"""Large images made smaller before the search, in whole numbers, so that every machine gets the same pixels.

No annotations on the kernel: numba reads the types, and a checker between `njit` and the function would stop it.
"""

import numpy as np
from numba import njit


def shrunk_size(height: int, width: int, max_side: int) -> tuple[int, int]:
    """(height, width) with the longer side at `max_side`, the other rounded (halves up) and at least 1.

    >>> shrunk_size(480, 640, 1024), shrunk_size(3000, 4000, 1024), shrunk_size(1, 60000, 1024)
    ((480, 640), (768, 1024), (1, 1024))
    """
    longest = max(height, width)
    if longest <= max_side:
        return height, width
    high, wide = ((2 * side * max_side + longest) // (2 * longest) for side in (height, width))
    return max(high, 1), max(wide, 1)


@njit(cache=True, nogil=True)
def shrink(image, out):
    """out uint8 [h, w, C] <- image uint8 [H, W, C]: each pixel the mean of the area it covers, halves rounded up."""
    (tall, wide, channels), (height, width, _) = image.shape, out.shape
    line, area = np.empty((wide, channels), np.int64), tall * wide
    for i in range(height):
        # In steps of 1 / height of a source pixel, source row y spans [y * height, (y + 1) * height).
        top, bottom = i * tall, (i + 1) * tall
        line[:] = 0
        for y in range(top // height, (bottom + height - 1) // height):
            weight = min(bottom, (y + 1) * height) - max(top, y * height)
            for x in range(wide):
                for c in range(channels):
                    line[x, c] += weight * image[y, x, c]
        for j in range(width):
            left, right = j * wide, (j + 1) * wide
            for c in range(channels):
                total = 0
                for x in range(left // width, (right + width - 1) // width):
                    total += (min(right, (x + 1) * width) - max(left, x * width)) * line[x, c]
                out[i, j, c] = (2 * total + area) // (2 * area)

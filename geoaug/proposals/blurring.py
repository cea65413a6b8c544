"""Colours as float64 planes and their Gaussian blur, with scikit-image's and scipy's floats to the last bit.

No annotations on the kernels: numba reads the types, and a checker between `njit` and the function would stop it.
"""

import numpy as np
import numpy.typing as npt
from numba import njit


def gaussian(sigma: float) -> npt.NDArray[np.float64]:
    """Centre and one side of scipy's Gaussian kernel, cut at 4 sigma: float64 [radius + 1].

    >>> gaussian(0.9).shape
    (5,)
    """
    if sigma < 1e-15:
        return np.ones(1)
    radius = int(4.0 * sigma + 0.5)
    whole = np.exp(-0.5 / (sigma * sigma) * np.arange(-radius, radius + 1) ** 2)
    half: npt.NDArray[np.float64] = (whole / whole.sum())[radius:].copy()
    return half


@njit(cache=True, nogil=True)
def _mirror(i, n):
    i %= 2 * n
    return min(i, 2 * n - 1 - i)


@njit(cache=True, nogil=True)
def blur(planes, kernel, spare):
    """planes float64 [C, H, W], in place: first down, then across, the centre first and pairs from far to near."""
    channels, height, width = planes.shape
    radius = kernel.shape[0] - 1
    if radius == 0:
        return
    line = np.empty(width + 2 * radius)
    for c in range(channels):
        for y in range(height):
            out, middle, w = spare[y], planes[c, y], kernel[0]
            for x in range(width):
                out[x] = middle[x] * w
            for j in range(radius, 0, -1):
                up, down, w = planes[c, _mirror(y - j, height)], planes[c, _mirror(y + j, height)], kernel[j]
                for x in range(width):
                    out[x] += (up[x] + down[x]) * w
        for y in range(height):
            out, middle = planes[c, y], spare[y]
            for x in range(width):
                line[radius + x] = middle[x]
            for j in range(radius):
                line[j] = middle[_mirror(j - radius, width)]
                line[radius + width + j] = middle[_mirror(width + j, width)]
            w = kernel[0]
            for x in range(width):
                out[x] = line[radius + x] * w
            for j in range(radius, 0, -1):
                left, right, w = line[radius - j :], line[radius + j :], kernel[j]
                for x in range(width):
                    out[x] += (left[x] + right[x]) * w


@njit(cache=True, nogil=True)
def to_planes(image, planes):
    """planes float64 [3, H, W] in [0, 1] <- uint8 [H, W, 3], by the product scikit-image takes."""
    unit = 1.0 / 255.0
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            planes[0, y, x] = image[y, x, 0] * unit
            planes[1, y, x] = image[y, x, 1] * unit
            planes[2, y, x] = image[y, x, 2] * unit

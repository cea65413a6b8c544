"""Numba kernel of `paste`: one pass over the output, first the background, then the foreground's pixels."""

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
def _copy(source, target):
    for i in range(target.shape[0]):
        target[i] = source[i]


@njit(cache=True, nogil=True)
def _any(inside):
    total = 0  # a sum is done by vectors; a loop that may stop early is not
    for i in range(inside.shape[0]):
        total += inside[i]
    return total > 0


@njit(cache=True, nogil=True)
def _choose(inside, source, target):
    for i in range(target.shape[0]):
        bits = -np.int64(inside[i])  # all or none; a branch would not be done by vectors on every machine
        target[i] = (source[i] & bits) | (target[i] & ~bits)


@njit(cache=True, nogil=True)
def paste(images, mask, backgrounds, rows, shift, moved, fill, first, last, out):
    """out[b] <- backgrounds[rows[b]] (fill where -1), with images[b] under mask[b] moved by shift[b], b in a range.

    The mask, of bytes 0 and 1, moves with the image, or has done so already if `moved`.
    """
    channels, height, width = images.shape[1:]
    for b in range(first, last):
        tx, ty, row = shift[b, 0], shift[b, 1], rows[b]
        target = out[b].ravel()
        if row >= 0:
            _copy(backgrounds[row].ravel(), target)
        else:
            target[:] = fill
        left, right = max(0, tx), min(width, width + tx)
        across, down = (0, 0) if moved else (tx, ty)
        if left < right:
            for y in range(max(0, ty), min(height, height + ty)):
                inside = mask[b, y - down, left - across : right - across]
                if _any(inside):
                    for c in range(channels):
                        _choose(inside, images[b, c, y - ty, left - tx : right - tx], out[b, c, y, left:right])

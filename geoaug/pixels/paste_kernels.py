"""Numba kernel of `paste`: one pass over the output, each byte written once, all of it copied in stretches.

A row of a mask is a few stretches of foreground and background, mostly those of the row before. Pixels are bytes at an
address, so one compiled kernel serves every number type. No annotations: numba reads the types.
"""

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic


@intrinsic
def _copy(typing, target, source, size):
    """C's memcpy, by addresses."""

    def emit(context, b, signature, args):
        target, source = (b.inttoptr(x, ir.IntType(8).as_pointer()) for x in args[:2])
        cgutils.raw_memcpy(b, target, source, args[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), emit


@njit(cache=True, nogil=True)
def _as_before(mask, row, before):
    """Whether a row of the mask is like one before: done by vectors, which a loop that may stop early is not."""
    different = 0
    for x in range(mask.shape[1]):
        different |= mask[row, x] ^ mask[before, x]
    return different == 0


@njit(cache=True, nogil=True)
def _stretches(inside, ends):
    """Where stretches of foreground start and end, in turn, in `ends`; how many numbers that makes."""
    n, before = 0, 0
    for x in range(inside.shape[0]):
        if inside[x] != before:
            before = inside[x]
            ends[n] = x
            n += 1
    if before:
        ends[n] = inside.shape[0]
        n += 1
    return n


@njit(cache=True, nogil=True)
def paste(images, backgrounds, blank, out, shape, size, mask, rows, shift, moved, front_stays, back_stays, first, last):
    """out[b] <- backgrounds[rows[b]] (`blank` where -1), with images[b] under mask[b] moved by shift[b], b in a range.

    Images [.., channels, height, width] are addresses of numbers of `size` bytes, `blank` that of one row. The mask, of
    bytes 0 and 1, moves with the image, or has done so already if `moved`. `front_stays`: `out` is `images`, so rows
    are read before they are written to. `back_stays`: `out` is `backgrounds`, row for row, so nothing of it is copied.
    """
    channels, height, width = shape
    wide, plane = width * size, height * width * size
    ends, line = np.empty(width + 2, dtype=np.int64), np.empty(wide, dtype=np.uint8)
    for b in range(first, last):
        tx, ty, row = shift[b, 0], shift[b, 1], rows[b]
        left, right = max(0, tx), min(width, width + tx)
        across, down = (0, 0) if moved else (tx, ty)
        n, before = 0, -1
        for i in range(height):
            y = height - 1 - i if front_stays and ty > 0 else i  # rows come from above if they move down
            visible = 0 <= y - ty < height and left < right
            if visible and (before < 0 or not _as_before(mask[b], y - down, before)):
                before = y - down
                n = _stretches(mask[b, before, left - across : right - across], ends)
            for c in range(channels):
                offset = (b * channels + c) * plane
                target, front = out + offset + y * wide, images + offset + (y - ty) * wide - tx * size
                behind = blank if row < 0 else backgrounds + (row * channels + c) * plane + y * wide
                done = 0
                if visible and n > 0:
                    if front_stays and ty == 0:  # the row is moved within itself
                        _copy(line.ctypes.data + left * size, front + left * size, (right - left) * size)
                        front = line.ctypes.data
                    for k in range(0, n, 2):
                        start, end = (left + ends[k]) * size, (left + ends[k + 1]) * size
                        if row < 0 or not back_stays:
                            _copy(target + done, behind + done, start - done)
                        _copy(target + start, front + start, end - start)
                        done = end
                if row < 0 or not back_stays:
                    _copy(target + done, behind + done, wide - done)

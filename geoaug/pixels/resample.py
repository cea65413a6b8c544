"""Antialiased bilinear resize of a crop, byte for byte torch's uint8 kernel: numba code on raw addresses.

Torch's law: triangle weights of each axis, normalised, rounded to int16 with the largest precision that holds them all;
rows first, rounded to bytes, then columns. Here each resized row is RGBX in a ring just deep enough for the column
pass, so that the working set stays in the first-level cache. No annotations: numba reads the types.
"""

import hashlib
import sys
from pathlib import Path

import numpy as np
from numba import carray, njit

from . import simd
from .simd import across_1, across_2, across_3, across_4, across_any, down, pointer

VECTOR = sys.byteorder == "little"  # whether `resample` may use the vector code
_MOST_BITS, _LIMIT = 22, 1 << 15  # torch's largest precision; weights are int16
_ALIGN = 64


@njit(nogil=True)
def _taps(n_in, n_out):
    """The most source pixels under one triangle, of half width max(1, n_in / n_out)."""
    return min(n_in, (2 * max(n_in, n_out) + n_out - 1) // n_out)


@njit(nogil=True)
def _pairs(n_in, n_out):
    """Pairs of taps; even beyond 4, where the vector code loops over two at a time."""
    pairs = (_taps(n_in, n_out) + 1) // 2
    return pairs if pairs <= 4 else pairs + pairs % 2


@njit(nogil=True)
def _section(at, size):
    """The address after a section of `size` bytes, aligned."""
    return (at + size + _ALIGN - 1) // _ALIGN * _ALIGN


@njit(nogil=True)
def _layout(at, height, width, out_height, out_width):
    """Where the tables, the ring of rows and the spare rows lie in a scratch buffer, and where it ends."""
    groups, longest = (out_width + 15) // 16 * 4, max(out_height, out_width)
    across, along = _pairs(width, out_width), _pairs(height, out_height)
    offsets = _section(at, 0)
    row_weights = _section(offsets, 16 * groups)
    lows = _section(row_weights, 64 * groups * across)
    column_weights = _section(lows, 8 * out_height)
    rows = _section(column_weights, 4 * out_height * along)
    work = _section(rows, 16 * along)
    ring = _section(work, 8 * longest * (3 + max(_taps(width, out_width), _taps(height, out_height))))
    spare = _section(ring, (2 * along + 1) * 16 * groups)
    second_spare = _section(spare, 3 * width + 12 * across + 16)
    end = _section(second_spare, 3 * width + 12 * across + 16)
    return offsets, row_weights, lows, column_weights, rows, work, ring, spare, second_spare, end


@njit(cache=True, nogil=True)
def scratch_bytes(height, width, out_height, out_width):
    """Bytes of scratch that `resample` needs at most for any crop of an image of height x width."""
    return _layout(0, height, width, out_height, out_width)[-1] + _ALIGN


@njit(nogil=True)
def _weigh(n_in, n_out, taps, work):
    """work float64 [3 + taps, n_out] <- row 0: first tap, 3 on: rounded weights; gives the precision in bits.

    In whole numbers, on purpose: in units of 1 / (2 max(n_in, n_out)) the triangles are integers, so one division is
    the only rounding, and a device that divides by IEEE gets the same integer weights in whatever order it sums.
    """
    reach, step = 2.0 * max(n_in, n_out), 2.0 * n_out
    lows, centres, totals, weights = work[0], work[1], work[2], work[3:]
    for i in range(n_out):
        centres[i] = (2 * i + 1) * np.float64(n_in)
        lows[i] = max(0.0, np.floor((centres[i] - reach + n_out) / step))
        totals[i] = 0.0
    for k in range(taps):
        for i in range(n_out):
            at = lows[i] + k
            weight = max(0.0, reach - abs((2.0 * at + 1.0) * n_out - centres[i]))
            weights[k, i] = weight if at < n_in else 0.0
            totals[i] += weights[k, i]
    most, bits = 0.0, 0
    for k in range(taps):
        for i in range(n_out):
            weights[k, i] /= totals[i]
            most = max(most, weights[k, i])
    while bits < _MOST_BITS and np.int64(0.5 + most * (1 << (bits + 1))) < _LIMIT:
        bits += 1
    scale = np.float64(1 << bits)
    for k in range(taps):
        for i in range(n_out):
            weights[k, i] = np.floor(weights[k, i] * scale + 0.5)
    return bits


@njit(nogil=True)
def _pair_of_weights(work, k, taps, i):
    """Two int16 in 32 bits, the first one low."""
    second = np.int32(work[4 + k, i]) if k + 1 < taps else np.int32(0)
    return np.int32(work[3 + k, i]) | second << np.int32(16)


@njit(nogil=True)
def _row_pass(row, second, offsets, weights, groups, pairs, bits, out, second_out, vector):
    """Two rows of RGB to `groups` of 4 RGBX pixels each."""
    size = 64 * pairs
    if not vector:
        firsts = carray(pointer(offsets), (groups, 4), np.int32)
        factors = carray(pointer(weights), (groups, pairs, 4, 4, 2), np.int16)
        for source, target in ((row, out), (second, second_out)):
            result = carray(pointer(target), (groups, 4, 4), np.uint8)
            for i in range(4 * groups):
                pixels = carray(pointer(source + firsts[i // 4, i % 4]), (2 * pairs, 3), np.uint8)
                for c in range(3):
                    total = 1 << (bits - 1)
                    for k in range(2 * pairs):
                        total += np.int64(pixels[k, c]) * factors[i // 4, k // 2, i % 4, c, k % 2]
                    result[i // 4, i % 4, c] = total >> bits
    elif pairs == 1:
        for g in range(groups):
            x, w, at = offsets + 16 * g, weights + size * g, 16 * g
            across_1(row, second, x, w, pairs, bits, out + at, second_out + at)
    elif pairs == 2:
        for g in range(groups):
            x, w, at = offsets + 16 * g, weights + size * g, 16 * g
            across_2(row, second, x, w, pairs, bits, out + at, second_out + at)
    elif pairs == 3:
        for g in range(groups):
            x, w, at = offsets + 16 * g, weights + size * g, 16 * g
            across_3(row, second, x, w, pairs, bits, out + at, second_out + at)
    elif pairs == 4:
        for g in range(groups):
            x, w, at = offsets + 16 * g, weights + size * g, 16 * g
            across_4(row, second, x, w, pairs, bits, out + at, second_out + at)
    else:
        for g in range(groups):
            x, w, at = offsets + 16 * g, weights + size * g, 16 * g
            across_any(row, second, x, w, pairs, bits, out + at, second_out + at)


@njit(nogil=True)
def _readable(row, reach, end, size, spare):
    """The row, or its copy where the 16-byte loads would leave the image."""
    if row + reach <= end:
        return row
    copy, pixels = carray(pointer(spare), (1, size), np.uint8), carray(pointer(row), (1, size), np.uint8)
    for x in range(size):
        copy[0, x] = pixels[0, x]
    return spare


@njit(nogil=True)
def _column_pass(rows, weights, pairs, bits, out, out_width, plane, vector):
    """One row of each plane from `pairs` of RGBX rows."""
    if vector and out_width >= 16:
        for x in range(0, out_width - 15, 16):
            down(rows, 4 * x, weights, pairs, bits, out + x, plane)
        if out_width % 16:  # the last 16 once more, overlapping
            down(rows, 4 * (out_width - 16), weights, pairs, bits, out + out_width - 16, plane)
        return
    addresses = carray(pointer(rows), (2 * pairs,), np.int64)
    factors = carray(pointer(weights), (2 * pairs,), np.int16)
    for c in range(3):
        target = carray(pointer(out + c * plane), (1, out_width), np.uint8)
        for x in range(out_width):
            total = 1 << (bits - 1)
            for k in range(2 * pairs):
                total += np.int64(carray(pointer(addresses[k] + 4 * x + c), (1, 1), np.uint8)[0, 0]) * factors[k]
            target[0, x] = total >> bits


def _make_resample(stamp):
    @njit(cache=True, nogil=True)
    def resample(source, height, width, x0, y0, x1, y1, flipped, scratch, out, out_height, out_width, vector):
        assert stamp  # a free variable is part of the disk cache's key, as the text of simd.py must be
        n_rows, n_columns = y1 - y0, x1 - x0
        at = _layout(scratch, n_rows, n_columns, out_height, out_width)
        offsets, row_weights, low_rows, column_weights, row_list, work, ring, spare, second_spare, _ = at
        groups, pitch = (out_width + 3) // 4, (out_width + 15) // 16 * 64
        across, along = _pairs(n_columns, out_width), _pairs(n_rows, out_height)

        taps = _taps(n_columns, out_width)
        table = carray(pointer(work), (3 + taps, out_width), np.float64)
        firsts = carray(pointer(offsets), (groups, 4), np.int32)
        lanes = carray(pointer(row_weights), (groups, across, 4, 4), np.int32)
        bits_across = _weigh(n_columns, out_width, taps, table)
        for i in range(4 * groups):
            g, lane = i // 4, i % 4
            j = out_width - 1 - i if flipped else i
            inside = i < out_width
            firsts[g, lane] = 3 * np.int32(table[0, j]) if inside else 0
            for q in range(across):
                pair = _pair_of_weights(table, 2 * q, taps, j) if inside and 2 * q < taps else np.int32(0)
                for c in range(4):
                    lanes[g, q, lane, c] = pair
        reach = 3 * (n_columns - 1) + 12 * ((across - 1) // 2) + 16

        taps = _taps(n_rows, out_height)
        table = carray(pointer(work), (3 + taps, out_height), np.float64)
        lows = carray(pointer(low_rows), (out_height,), np.int64)
        pairs_of = carray(pointer(column_weights), (out_height, along), np.int32)
        bits_along = _weigh(n_rows, out_height, taps, table)
        for y in range(out_height):
            lows[y] = np.int64(table[0, y])
            for q in range(along):
                pairs_of[y, q] = _pair_of_weights(table, 2 * q, taps, y) if 2 * q < taps else 0

        addresses = carray(pointer(row_list), (2 * along,), np.int64)
        end, stride, size, depth = source + 3 * height * width, 3 * width, 3 * n_columns, 2 * along + 1
        ready = 0
        for y in range(out_height):
            while ready < min(lows[y] + taps, n_rows):
                row = source + (y0 + ready) * stride + 3 * x0
                second = row + stride if ready + 1 < n_rows else row  # then a copy, where no row is needed
                row, second = _readable(row, reach, end, size, spare), _readable(second, reach, end, size, second_spare)
                place, second_place = ring + ready % depth * pitch, ring + (ready + 1) % depth * pitch
                _row_pass(row, second, offsets, row_weights, groups, across, bits_across, place, second_place, vector)
                ready += 2
            for k in range(2 * along):
                addresses[k] = ring + (lows[y] + k) % depth * pitch
            weights, target = column_weights + 4 * along * y, out + out_width * y
            _column_pass(row_list, weights, along, bits_along, target, out_width, out_height * out_width, vector)

    return resample


resample = _make_resample(hashlib.blake2b(Path(simd.__file__).read_bytes(), digest_size=8).hexdigest())
resample.__doc__ = """Crop, resize, mirror: out uint8 [3, out_height, out_width] <- source uint8 [height, width, 3].

Addresses and whole numbers only, all int64; nothing is checked and nothing allocated. 0 <= x0 < x1 <= width, likewise
y; `scratch` holds `scratch_bytes(height, width, out_height, out_width)`; `vector` is `VECTOR`, or 0 for scalar code.
A jitted caller passes variables: for a constant, numba would compile a copy of its own.
"""

"""JPEG bytes to views in one jitted pass: CRC, header, one decode by TurboJPEG, all planned views.

TurboJPEG is called by address, so that the compiled code can be cached on disk; what belongs to one thread (its
decompressor, the decoded image, the tables of the resize) travels in one array, `state`. No annotations: numba reads
the types.
"""

import hashlib
from pathlib import Path

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

from ..pixels import resample as resample_module
from ..pixels import simd
from ..pixels.resample import VECTOR, resample
from ..pixels.simd import pointer
from . import crc
from .crc import crc32

OK, OUTSIDE, CRC, HEADER, SIZE, UNDECODABLE, WARNED = range(7)
# Entries of `state`, int64. FILE is where the .beton is mapped and BYTES how long it is; INFO points at 4 int32.
STATE = 10
FILE, BYTES, VERIFY, HANDLE, READ_HEADER, DECOMPRESS, ERROR_CODE, PIXELS, SCRATCH, INFO = range(STATE)
RGB, ACCURATE = 0, 0  # pixel format; no flags: the accurate DCT, as in torchvision


def _make_call(arguments):
    """An intrinsic that calls the C function at an address; its arguments are "p" (64 bits) or "i" (32 bits)."""
    kinds = [ir.IntType(64 if kind == "p" else 32) for kind in arguments]

    @intrinsic
    def call(typing, function, values):
        def emit(context, b, signature, args):
            given = [b.extract_value(args[1], i) for i in range(len(kinds))]
            given = [x if kind.width == 64 else b.trunc(x, kind) for x, kind in zip(given, kinds, strict=True)]
            function = b.inttoptr(args[0], ir.FunctionType(ir.IntType(32), kinds).as_pointer())
            return b.sext(b.call(function, given), ir.IntType(64))

        return types.int64(types.int64, types.UniTuple(types.int64, len(kinds))), emit

    return call


_call_header, _call_decompress, _call_code = _make_call("ppppppp"), _make_call("ppppiiiii"), _make_call("p")


def _make_kernels(stamp):
    # A free variable is part of the disk cache's key, as the text of the modules that are inlined must be.

    @njit(cache=True, nogil=True)
    def decode(state, start, length, checksum, height, width, out, pitch):
        """Pixels uint8 [height, width, 3] at `out`, rows `pitch` bytes apart <- `length` bytes at `start` in the file.

        Gives OK or why there are none; they have room, since the header must say what the metadata says.
        """
        assert stamp
        if start < 0 or length < 1 or length > state[BYTES] or start > state[BYTES] - length:
            return OUTSIDE
        data, handle, info = state[FILE] + start, state[HANDLE], state[INFO]
        if state[VERIFY] and crc32(data, length) != checksum:
            return CRC
        found = carray(pointer(info), (4, 1), np.int32)
        found[:] = 0
        # Its own verdict is of no use: it refuses rare subsamplings that the decoder takes. No width, no header.
        _call_header(state[READ_HEADER], (handle, data, length, info, info + 4, info + 8, info + 12))
        given = (handle, data, length, out, width, pitch, height, RGB, ACCURATE)
        if found[0, 0] < 1 or found[1, 0] < 1:
            # TurboJPEG is left amid the header and would refuse every image after it. Decompressing fails as well but,
            # unlike reading a header, cleans up. (Were it to succeed, it would keep to the room it is given.)
            _call_decompress(state[DECOMPRESS], given)
            return HEADER
        if found[0, 0] != width or found[1, 0] != height:
            return SIZE
        if _call_decompress(state[DECOMPRESS], given) == 0:
            return OK
        if _call_code(state[ERROR_CODE], (handle,)) != 0:
            return UNDECODABLE
        return WARNED if state[VERIFY] else OK  # a warning: all pixels are there, some of them guessed

    @njit(cache=True, nogil=True)
    def render_views(state, row, height, width, plan, places, decoded):
        """Row `row` of each view uint8 [B, 3, h, w] <- the decoded image by its plan int32 [V, 5], else zeros.

        `places` int64 [V, 3] holds address, h and w of each view.
        """
        assert stamp
        windows = carray(pointer(plan), (places.shape[0], 5), np.int32)
        for v in range(places.shape[0]):
            h, w = places[v, 1], places[v, 2]
            out = places[v, 0] + row * 3 * h * w
            if decoded:
                x0, y0, x1, y1, flip = windows[v]
                box = np.int64(x0), np.int64(y0), np.int64(x1), np.int64(y1), np.int64(flip)
                vector, scratch = np.int64(VECTOR), state[SCRATCH]
                resample(state[PIXELS], height, width, *box, scratch, out, h, w, vector)
            else:
                carray(pointer(out), (1, 3 * h * w), np.uint8)[:] = 0

    @njit(cache=True, nogil=True)
    def blacken(out, size):
        """Zeros in `size` bytes at `out`."""
        assert stamp
        carray(pointer(out), (1, size), np.uint8)[:] = 0

    return decode, render_views, blacken


_INLINED = b"".join(Path(str(module.__file__)).read_bytes() for module in (crc, resample_module, simd))
decode, render_views, blacken = _make_kernels(hashlib.blake2b(_INLINED, digest_size=8).hexdigest())


@intrinsic
def _add_one(typing, address):
    """The int64 at an address, which is one more afterwards; no two threads get the same."""

    def emit(context, b, signature, args):
        place = b.inttoptr(args[0], ir.IntType(64).as_pointer())
        return b.atomic_rmw("add", place, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(types.int64), emit


@njit(cache=True, nogil=True)
def deal(dealt):
    """The next row of the batch; the threads share the counter int64 [1], so a fast one takes more rows."""
    return _add_one(dealt.ctypes.data)

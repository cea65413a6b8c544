"""TurboJPEG by ctypes: where it is, what a thread needs of it, and what it has to say of a JPEG it refuses."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import numba
import numpy as np
import numpy.typing as npt
import torch

from ..pixels.resample import scratch_bytes
from . import jpeg_kernels as kernels

# What failures are counted by, as far as possible under the names that the folder loader gives them.
KINDS = {
    kernels.OUTSIDE: "truncated",
    kernels.CRC: "crc",
    kernels.HEADER: "undecodable",
    kernels.SIZE: "size",
    kernels.UNDECODABLE: "undecodable",
    kernels.WARNED: "damaged",
}
_SLACK = 64  # bytes after the pixels, for 16-byte loads


@contextmanager
def importing_ffcv() -> Iterator[None]:
    """Undoes what it does to the process: it leaves torch and numba one thread each, and has a warning printed."""
    threads = torch.get_num_threads(), numba.get_num_threads()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # FFCV still imports distutils, and says so
            yield
    finally:
        torch.set_num_threads(threads[0])
        numba.set_num_threads(threads[1])


@cache
def library() -> ctypes.CDLL:
    """TurboJPEG with its argument types: the one FFCV is linked to, else the system's."""
    names = [ctypes.util.find_library("turbojpeg")]
    try:
        with importing_ffcv():
            from ffcv import _libffcv

        names.insert(0, _libffcv.__file__)  # a symbol is also looked for in what a library is linked to
    except ImportError:
        pass
    for name in filter(None, names):
        found = ctypes.CDLL(name)
        if hasattr(found, "tjDecompress2"):
            handle, data, size, whole = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_int
            found.tjInitDecompress.restype, found.tjInitDecompress.argtypes = handle, []
            found.tjDestroy.argtypes = [handle]
            found.tjGetErrorCode.argtypes = [handle]
            found.tjGetErrorStr2.restype, found.tjGetErrorStr2.argtypes = ctypes.c_char_p, [handle]
            found.tjDecompressHeader3.argtypes = [handle, data, size, data, data, data, data]
            found.tjDecompress2.argtypes = [handle, data, size, data, whole, whole, whole, whole, whole]
            return found
    raise ImportError("open_loader: a .beton needs libturbojpeg: `geoaug doctor` prints the lines that install it")


class Bench:
    """What one thread works with: a decompressor, room for one image, and the `state` that says where they are."""

    def __init__(self, file: npt.NDArray[np.uint8], verify: bool) -> None:
        """`file` uint8 [bytes] is the mapped .beton."""
        lib = library()
        self._lib, self._file, self._process = lib, file, os.getpid()
        self._info, self._pixels, self._scratch = (np.zeros(size, dtype=np.uint8) for size in (16, _SLACK, 1))
        self.state = np.zeros(kernels.STATE, dtype=np.int64)
        entries = {
            kernels.FILE: file.ctypes.data,
            kernels.BYTES: file.nbytes,
            kernels.VERIFY: int(verify),
            kernels.INFO: self._info.ctypes.data,
            kernels.HANDLE: lib.tjInitDecompress() or 0,
        }
        functions = {
            kernels.READ_HEADER: lib.tjDecompressHeader3,
            kernels.DECOMPRESS: lib.tjDecompress2,
            kernels.ERROR_CODE: lib.tjGetErrorCode,
        }
        entries |= {entry: ctypes.cast(f, ctypes.c_void_p).value or 0 for entry, f in functions.items()}
        self.state[list(entries)] = list(entries.values())
        if not self.state[kernels.HANDLE]:
            raise MemoryError("loader: TurboJPEG gave no decompressor")

    def make_room(self, area: int, scratch: int) -> None:
        """For images of `area` pixels and `scratch` bytes of tables; only ever grows, and never while in use."""
        if self._pixels.nbytes < 3 * area + _SLACK:
            self._pixels = np.empty(3 * area + _SLACK, dtype=np.uint8)
        if self._scratch.nbytes < scratch:
            self._scratch = np.empty(scratch, dtype=np.uint8)
        self.state[kernels.PIXELS], self.state[kernels.SCRATCH] = self._pixels.ctypes.data, self._scratch.ctypes.data

    def close(self) -> None:
        """Give the decompressor and the memory back, not while in use; safe to call twice."""
        # A forked child may have copied the decompressor in the midst of its work: left alone there.
        if self.state[kernels.HANDLE] and os.getpid() == self._process:
            self._lib.tjDestroy(int(self.state[kernels.HANDLE]))
        self.state[kernels.HANDLE] = 0
        self._pixels = self._scratch = np.zeros(0, dtype=np.uint8)

    def __del__(self) -> None:
        if hasattr(self, "state"):
            self.close()


def most_scratch(height: int, width: int, sizes: Iterable[tuple[int, int]]) -> int:
    """Bytes of tables that any crop of an image of up to height x width needs for views of `sizes`."""
    return max((int(scratch_bytes(height, width, h, w)) for h, w in sizes), default=0)


def reason(status: int, data: bytes, checksum: int, size: Sequence[int]) -> str:
    """Why a sample failed, in words: looked at again, since the kernel keeps only a number."""
    if status == kernels.CRC:
        return f"the CRC-32 of its bytes is {zlib.crc32(data):#010x}, written was {checksum:#010x}"
    if status == kernels.OUTSIDE:
        return "its bytes lie beyond the end of the file"
    lib = library()
    handle, whole = lib.tjInitDecompress(), (ctypes.c_int * 4)()
    try:
        each = [ctypes.byref(whole, 4 * i) for i in range(4)]
        lib.tjDecompressHeader3(handle, data, len(data), *each)
        if status == kernels.SIZE:
            return f"is {whole[0]} x {whole[1]}, the metadata say {size[1]} x {size[0]}"
        if status != kernels.HEADER:
            room = ctypes.create_string_buffer(3 * size[0] * size[1])
            lib.tjDecompress2(handle, data, len(data), room, size[1], 0, size[0], kernels.RGB, kernels.ACCURATE)
        told: bytes = lib.tjGetErrorStr2(handle)
        return told.decode(errors="replace")
    finally:
        lib.tjDestroy(handle)

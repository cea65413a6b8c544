"""One image file to uint8 RGB pixels as they are stored, or one line that says why not.

JPEGs are decoded by torchvision's libjpeg-turbo, all else by Pillow. Everything becomes 8-bit RGB: gray is repeated,
palettes are looked up, CMYK is converted, alpha is dropped without blending, 16 bits keep their upper 8, an animation
gives its first frame. EXIF orientation is ignored, since boxes and masks refer to stored pixels; it is counted.
"""

from __future__ import annotations

import io
import os
import re
import struct
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

ROTATED = "EXIF orientation ignored"
_JPEG = b"\xff\xd8"
# How the warnings of libjpeg begin; anything else on stderr is somebody else's.
_WARNING = re.compile(
    r"Corrupt JPEG data|Premature end of JPEG|Inconsistent progression|Invalid SOS|Unknown Adobe|Warning: unknown JFIF"
)


class ReadError(Exception):
    """An image that could not be read; `kind` is what failures are counted by."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(kind, reason)
        self.kind, self.reason = kind, reason


class _Listener:
    """What libjpeg writes to stderr meanwhile: it tells of damage there and nowhere else.

    One thread at a time, since there is one stderr; lines of others are passed on.
    """

    def __init__(self) -> None:
        self._file, self._owner, self._lock = -1, -1, threading.Lock()

    @contextmanager
    def __call__(self) -> Iterator[list[str]]:
        if self._owner != os.getpid():  # a forked worker must share neither its parent's file nor its lock
            with tempfile.TemporaryFile() as file:
                self._file, self._owner, self._lock = os.dup(file.fileno()), os.getpid(), threading.Lock()
        heard: list[str] = []
        with self._lock:
            sys.stderr.flush()
            kept = os.dup(2)
            os.dup2(self._file, 2)
            try:
                yield heard
            finally:
                os.dup2(kept, 2)
                os.close(kept)
                size = os.fstat(self._file).st_size
                if size:
                    lines = os.pread(self._file, size, 0).splitlines(keepends=True)
                    os.ftruncate(self._file, 0)
                    os.lseek(self._file, 0, os.SEEK_SET)
                    heard.extend(
                        text for line in lines if _WARNING.match(text := line.decode(errors="replace").strip())
                    )
                    os.write(2, b"".join(x for x in lines if not _WARNING.match(x.decode(errors="replace"))))


_listen = _Listener()


def read_image(path: Path, *, verify: bool = True) -> tuple[UInt8[Tensor, "H W 3"], list[str]]:
    """Pixels [H, W, 3] and notes on the file; raises ReadError. `verify` also refuses what the decoder warns about."""
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise ReadError("missing", "no such file") from None
    except OSError as error:
        raise ReadError("unreadable", error.strerror or str(error)) from None
    if not data:
        raise ReadError("empty", "no bytes")
    if not data.startswith(_JPEG):
        return _decode_other(data), []
    return decode_jpeg(data, verify), [ROTATED] if _orientation(data) > 1 else []


def decode_jpeg(data: bytes, verify: bool = True) -> UInt8[Tensor, "H W 3"]:
    """Pixels [H, W, 3] of a JPEG in memory; raises ReadError. `verify` also refuses what the decoder warns about."""
    import torchvision.io  # noqa: F401  registers the decoders; here, since torchvision takes a second to import

    # The operator itself: its Python wrapper may print a DeprecationWarning.
    rgb, as_stored, heard = 3, False, []
    stored = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    try:
        if verify:
            with _listen() as heard:
                image = torch.ops.image.decode_jpeg(stored, rgb, as_stored)
        else:
            image = torch.ops.image.decode_jpeg(stored, rgb, as_stored)
    except RuntimeError as error:
        reason = re.sub(r"^.*\.cpp:\d+, ", "", str(error).strip().splitlines()[0])  # without the builder's path
        raise ReadError("undecodable", " / ".join([*heard, reason])) from None
    if heard:
        raise ReadError("damaged", " / ".join(heard))
    pixels: Tensor = image.permute(1, 2, 0).contiguous()  # the decoder's own memory order, so nothing is copied
    return pixels


def _decode_other(data: bytes) -> Tensor:
    """By Pillow, which raises where torchvision's decoder of damaged PNGs ends the process."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode.startswith("I;16"):
                pixels = np.asarray(image).astype(np.uint16) >> 8
            elif image.mode == "I":
                pixels = np.clip(np.asarray(image) >> 8, 0, 255)
            else:
                pixels = np.asarray(image.convert("RGBA").convert("RGB") if image.mode == "P" else image.convert("RGB"))
    except Exception as error:  # Pillow raises many kinds: OSError, SyntaxError, ValueError, zlib.error, struct.error
        text = "not an image of a known kind" if "cannot identify" in str(error) else str(error)
        raise ReadError("undecodable", text or type(error).__name__) from None
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    return torch.from_numpy(np.array(pixels, dtype=np.uint8, order="C"))


def _orientation(data: bytes) -> int:
    """The EXIF orientation of a JPEG, 1 where there is none."""
    at = 2
    try:
        while data[at] == 0xFF and data[at + 1] != 0xDA:  # segments up to the start of the scan
            (length,) = struct.unpack_from(">H", data, at + 2)
            if data[at + 1] == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
                return _orientation_of_tiff(data[at + 10 : at + 2 + length])
            at += 2 + length
    except (struct.error, IndexError):
        pass  # a header or EXIF block that is cut short says nothing
    return 1


def _orientation_of_tiff(tiff: bytes) -> int:
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    (offset,) = struct.unpack_from(order + "I", tiff, 4)
    (entries,) = struct.unpack_from(order + "H", tiff, offset)
    for entry in range(entries):
        tag, _, _, value = struct.unpack_from(order + "HHIH", tiff, offset + 2 + 12 * entry)
        if tag == 0x0112:
            return int(value)
    return 1

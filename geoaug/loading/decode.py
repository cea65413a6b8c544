"""One image file to uint8 RGB pixels as they are stored, or one line that says why not.

Everything becomes 8-bit RGB by torchvision's decoders: gray is repeated, palettes are looked up, CMYK is converted,
alpha is dropped without blending, 16 bits keep their upper 8, an animation gives its first frame. EXIF orientation is
ignored, since boxes and masks refer to stored pixels; it is counted.
"""

from __future__ import annotations

import os
import struct
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor

ROTATED = "EXIF orientation ignored"


class ReadError(Exception):
    """An image that could not be read; `kind` is what failures are counted by."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(kind, reason)
        self.kind, self.reason = kind, reason


class _Listener:
    """What C libraries write to stderr meanwhile: libjpeg tells of damage there and nowhere else."""

    def __init__(self) -> None:
        self._file, self._owner = -1, -1

    @contextmanager
    def __call__(self) -> Iterator[list[str]]:
        if self._owner != os.getpid():  # a forked worker must not share its parent's file
            with tempfile.TemporaryFile() as file:
                self._file, self._owner = os.dup(file.fileno()), os.getpid()
        heard: list[str] = []
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
                heard.extend(os.pread(self._file, size, 0).decode(errors="replace").split("\n"))
                os.ftruncate(self._file, 0)
                os.lseek(self._file, 0, os.SEEK_SET)


_listen = _Listener()


def read_image(path: Path, *, verify: bool = True) -> tuple[UInt8[Tensor, "H W 3"], list[str]]:
    """Pixels [H, W, 3] and notes on the file; raises ReadError. `verify` also refuses what the decoder warns about."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ReadError("missing", "no such file") from None
    except OSError as error:
        raise ReadError("unreadable", error.strerror or str(error)) from None
    if not data:
        raise ReadError("empty", "no bytes")
    image = _decode(torch.frombuffer(bytearray(data), dtype=torch.uint8), verify)
    notes = [ROTATED] if _orientation(data) > 1 else []
    return image, notes


def _decode(data: Tensor, verify: bool) -> Tensor:
    import torchvision.io  # noqa: F401  registers the decoders; here, since torchvision takes a second to import

    # The operator itself: its Python wrapper may print a DeprecationWarning, which would be heard as the decoder's.
    rgb, as_stored = 3, False
    heard: list[str] = []
    try:
        if verify:
            with _listen() as heard:
                image = torch.ops.image.decode_image(data, rgb, as_stored)
        else:
            image = torch.ops.image.decode_image(data, rgb, as_stored)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0].split(": ", 1)[-1]
        raise ReadError("undecodable", " / ".join([*filter(None, heard), reason])) from None
    if any(heard):
        raise ReadError("damaged", " / ".join(filter(None, heard)))
    if image.ndim == 4:
        image = image[0]
    if image.dtype == torch.uint16:
        image = (image.to(torch.int32) >> 8).to(torch.uint8)
    if image.shape[0] != 3 or image.numel() == 0:
        raise ReadError("undecodable", f"decoded to {list(image.shape)} instead of RGB")
    pixels: Tensor = image.permute(1, 2, 0).contiguous()  # the decoder's own memory order, so nothing is copied
    return pixels


def _orientation(data: bytes) -> int:
    """The EXIF orientation of a JPEG, 1 where there is none."""
    start = data.find(b"Exif\0\0", 0, 4096)
    if data[:2] != b"\xff\xd8" or start < 0:
        return 1
    tiff = data[start + 6 : start + 6 + 65536]
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    try:
        if order is None:
            return 1
        (offset,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, offset)
        for entry in range(entries):
            tag, _, _, value = struct.unpack_from(order + "HHIH", tiff, offset + 2 + 12 * entry)
            if tag == 0x0112:
                return int(value)
    except struct.error:
        return 1  # an EXIF block that is cut short says nothing
    return 1

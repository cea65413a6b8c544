"""What is stored of one image: its JPEG as it is or made, and its boxes in fixed slots."""

import io
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from geoaug import Key
from geoaug.loading.batch import pad_boxes
from geoaug.loading.decode import ReadError, read_image
from geoaug.loading.source import Source

MOST_SIDE = 65500  # libjpeg's limit
_STARTS = frozenset((0xC0, 0xC1, 0xC2))  # frames in Huffman code: baseline, extended, progressive


class Proposals(Protocol):
    """What is asked of a store of proposals."""

    manifest: dict[str, Any]
    sizes: Any  # [rows, 2] (height, width) of the source

    def rows(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The row of each id, -1 where the store has none."""

    def boxes(self, identity: int) -> npt.NDArray[np.uint16]:
        """All boxes [n, 4] of one image, xyxy in source pixels."""


class Job(NamedTuple):
    """One image to prepare; `said` is the (height, width) its boxes refer to, None without boxes."""

    path: Path
    said: tuple[int, int] | None


class Prepared(NamedTuple):
    """The JPEG to store, or why there is none: a kind to count by and a reason."""

    jpeg: bytes
    stored: tuple[int, int]
    source: tuple[int, int]
    notes: list[str]
    failure: tuple[str, str] | None


def frame_of(data: bytes) -> tuple[int, int, int] | None:
    """(height, width, components) of a JPEG of 8 bits in Huffman code; None for every other file."""
    at = 2
    while data[:2] == b"\xff\xd8" and at + 9 < len(data) and data[at] == 0xFF:
        kind = data[at + 1]
        if kind == 0xFF or kind == 0x01 or 0xD0 <= kind <= 0xD7:  # a fill byte, or a marker without a length
            at += 1 if kind == 0xFF else 2
            continue
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
            size = int.from_bytes(data[at + 5 : at + 7], "big"), int.from_bytes(data[at + 7 : at + 9], "big")
            return (*size, data[at + 9]) if kind in _STARTS and data[at + 4] == 8 else None
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def prepare(job: Job, *, max_resolution: int | None, quality: int) -> Prepared:
    """Decode one image and give the JPEG to store; a file that cannot be read is told, not raised."""
    try:
        image, notes = read_image(job.path, verify=True)
        height, width = image.shape[:2]
        if job.said is not None and abs(height * job.said[1] - width * job.said[0]) > max(*job.said, height, width):
            told = f"is {width} x {height}, its boxes are of {job.said[1]} x {job.said[0]}"
            raise ReadError("size", told)  # the rule of the folder loader
        data = job.path.read_bytes()
        longest = max(height, width) if max_resolution is None else max_resolution
        fits = max(height, width) <= longest
        if fits and frame_of(data) in ((height, width, 1), (height, width, 3)):
            return Prepared(data, (height, width), (height, width), notes, None)
        notes = [*notes, "re-encoded"]
        if not fits:
            sides = [max(1, round(side * longest / max(height, width))) for side in (height, width)]
            image = torch.nn.functional.interpolate(
                image.permute(2, 0, 1)[None], sides, mode="bilinear", antialias=True
            )[0].permute(1, 2, 0)
            notes.append("made smaller")
        stored = int(image.shape[0]), int(image.shape[1])
        if max(stored) > MOST_SIDE:
            raise ReadError("too large", f"{width} x {height} is beyond what a JPEG holds, {MOST_SIDE}")
        jpeg = io.BytesIO()
        Image.fromarray(image.contiguous().numpy()).save(jpeg, "JPEG", quality=quality)
        return Prepared(jpeg.getvalue(), stored, (height, width), notes, None)
    except ReadError as error:
        return Prepared(b"", (0, 0), (0, 0), [], (error.kind, error.reason))
    except OSError as error:
        return Prepared(b"", (0, 0), (0, 0), [], ("unreadable", error.strerror or str(error)))


class Boxes:
    """The boxes of each image of a source: those of a store, else the json's objects, else none."""

    def __init__(self, source: Source, proposals: Proposals | None) -> None:
        self._source, self._store = source, proposals
        self.sizes: Any = [None] * len(source)  # (height, width) that the boxes of an image refer to
        objects = source.objects
        if proposals is not None:
            self.kind = "proposals"
            rows = proposals.rows(source.ids)
            self.lacking = [name for name, row in zip(source.names, rows, strict=True) if row < 0]
            if len(self.lacking) > 0.01 * len(source):
                have = len(source) - len(self.lacking)
                raise ValueError(
                    f"proposals must be of these images, got {have} of {len(source)} with an entry in the store; "
                    f"without one: {', '.join(self.lacking[:2])}"
                )
            known = np.asarray(proposals.sizes)[rows].tolist()
            self.sizes = [tuple(size) if row >= 0 else None for size, row in zip(known, rows, strict=True)]
        elif objects is not None:
            self.kind, self.lacking = "objects", []
            self.sizes = [tuple(size) for size in objects.sizes.tolist()]
        else:
            self.kind, self.lacking = "none", []
        self.counts = [len(self._of(row)[0]) for row in range(len(source))]

    def _of(self, row: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        objects = self._source.objects
        if self._store is not None and self.sizes[row] is not None:
            height, width = self.sizes[row]
            pixels = self._store.boxes(int(self._source.ids[row]))
            unit = pixels.astype(np.float32) / np.array([width, height, width, height], dtype=np.float32)
            return unit, np.full(len(unit), -1, dtype=np.int64)
        if self._store is None and objects is not None:
            own = slice(int(objects.offsets[row]), int(objects.offsets[row + 1]))
            return objects.boxes[own], objects.labels[own]
        return np.zeros((0, 4), dtype=np.float32), np.zeros(0, dtype=np.int64)

    def padded(self, row: int, slots: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64], int]:
        """Boxes [slots, 4], labels [slots] and how many are filled; of more than slots, those with the least draws."""
        boxes, labels = self._of(row)
        key = Key(0, 0, [int(self._source.ids[row])])
        filled, valid, classes = pad_boxes([boxes], [labels], slots, key)
        return filled[0].numpy(), classes[0].numpy(), int(valid.sum())

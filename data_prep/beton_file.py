"""A .beton written one sample after the other: the order of the calls alone decides the bytes."""

import json
import os
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from geoaug.loading import beton_format as form
from geoaug.loading.beton_format import ALLOCATION, ALLOCATIONS, HEADER, MARK, METADATA_AT, SAMPLE

_WORD = 8  # each sample starts at a multiple of it, and so do its boxes and their labels


class Sample(NamedTuple):
    """All that is written of one image."""

    name: str
    identity: int
    label: int
    jpeg: bytes
    stored: tuple[int, int]  # (height, width) of the JPEG
    source: tuple[int, int]  # (height, width) of the original
    boxes: npt.NDArray[np.float32]  # [slots, 4], unit coordinates of the source
    box_labels: npt.NDArray[np.int64]  # [slots]
    box_count: int


class BetonFile:
    """A file in the making under a temporary name; `finish` puts it in its place, and leaving without it deletes it."""

    def __init__(self, path: Path, most: int, slots: int, page_size: int) -> None:
        """Room for `most` samples with `slots` boxes each."""
        self.path, self._slots, self._page = path, slots, page_size
        self._part = path.with_name(path.name + ".part")
        self._metadata = np.zeros(most, dtype=SAMPLE)
        self._allocations = np.zeros((most, len(ALLOCATIONS)), dtype=ALLOCATION)
        self._count, self._end = 0, METADATA_AT + self._metadata.nbytes
        self._file = self._part.open("wb")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.close()
        finally:
            self._part.unlink(missing_ok=True)

    def __len__(self) -> int:
        return self._count

    def add(self, sample: Sample) -> bool:
        """Write a sample; False, and nothing written, where it is larger than a page."""
        boxes = np.ascontiguousarray(sample.boxes, dtype=form.BOX).reshape(self._slots, 4)
        labels = np.ascontiguousarray(sample.box_labels, dtype=form.BOX_LABEL).reshape(self._slots)
        name = sample.name.encode("utf-8", "surrogateescape")
        facts = boxes.tobytes() + labels.tobytes() + name
        size = len(facts) + len(sample.jpeg)
        if size > self._page:
            return False
        start = -(-self._end // _WORD) * _WORD
        if start // self._page != (start + size - 1) // self._page:
            start = -(-start // self._page) * self._page
        self._file.seek(start)  # what is skipped reads as zeros
        self._file.write(facts)
        self._file.write(sample.jpeg)
        self._end = start + size
        at_labels, at_name, at_jpeg = start + boxes.nbytes, start + boxes.nbytes + labels.nbytes, start + len(facts)
        record = self._metadata[self._count]
        record["image"] = 0, sample.stored[1], sample.stored[0], at_jpeg
        record["id"], record["label"], record["box_count"] = sample.identity, sample.label, sample.box_count
        record["crc"], record["facts_crc"] = zlib.crc32(sample.jpeg), zlib.crc32(facts)
        record["height"], record["width"] = sample.source
        record["name"] = at_name, len(name)
        record["boxes"], record["box_labels"] = start, at_labels
        allocated = self._allocations[self._count]
        allocated["sample"] = self._count
        allocated["at"] = at_jpeg, at_name, start, at_labels
        allocated["size"] = len(sample.jpeg), len(name), boxes.nbytes, labels.nbytes
        self._count += 1
        return True

    def finish(self, manifest: dict[str, Any]) -> None:
        """Write the manifest and the tables, and give the file its name."""
        text = json.dumps(manifest, separators=(",", ":")).encode()
        text += b" " * (-(self._end + len(text)) % _WORD)  # so that the table after it is aligned
        header, mark = np.zeros((), dtype=HEADER), np.zeros((), dtype=MARK)
        header["version"], header["fields"], header["page_size"] = form.FFCV_VERSION, len(form.FIELDS), self._page
        header["samples"], header["allocations_at"] = self._count, self._end + len(text)
        metadata, allocations = self._metadata[: self._count], self._allocations[: self._count]
        mark["magic"], mark["format"], mark["manifest_crc"] = form.MAGIC, form.FORMAT, zlib.crc32(text)
        mark["tables_crc"] = form.table_crc(
            header.tobytes(), metadata.view(np.uint8).data, allocations.view(np.uint8).data
        )
        mark["manifest_at"], mark["manifest_size"] = self._end, len(text)
        self._file.seek(self._end)
        self._file.write(text)
        self._file.write(allocations.tobytes())
        self._file.seek(0)
        self._file.write(
            header.tobytes() + form.descriptors(self._slots, mark.tobytes()).tobytes() + metadata.tobytes()
        )
        self._file.close()
        os.replace(self._part, self.path)

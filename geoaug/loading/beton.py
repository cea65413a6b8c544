"""`Beton`: an FFCV file (version 2) of JPEGs with all that is known of them, opened and checked.

FFCV's own readers can read it. Ours needs no FFCV and trusts nothing: what lies outside the file or does not fit is
refused at opening, and every sample has checksums. `beton_format` says what lies where.
"""

from __future__ import annotations

import json
import mmap
import os
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from .beton_format import (
    ALLOCATION,
    ALLOCATIONS,
    BOX,
    BOX_LABEL,
    FFCV_VERSION,
    FIELD,
    FIELDS,
    FORMAT,
    HEADER,
    LEAST_PAGE,
    MAGIC,
    MARK,
    METADATA_AT,
    MOST_SLOTS,
    SAMPLE,
    Table,
    descriptors,
    slots_of,
    table_crc,
)


class Names(Sequence[str]):
    """Names of samples, read when asked for: they lie beside the JPEGs, and there may be millions of them."""

    def __init__(self, data: npt.NDArray[np.uint8], spans: Table) -> None:
        self._bytes, self._spans = data.data, spans

    def __len__(self) -> int:
        return len(self._spans)

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return self.of(np.arange(len(self))[row])
        at, size = self._spans[row].item()
        return str(self._bytes[at : at + size], "utf-8", "surrogateescape")

    def of(self, rows: npt.NDArray[np.int64]) -> list[str]:
        """The names of several rows: a batch of them in a fifth of the time of one after the other."""
        return [str(self._bytes[at : at + size], "utf-8", "surrogateescape") for at, size in self._spans[rows].tolist()]


@dataclass(frozen=True, eq=False)
class Beton:
    """An opened .beton of N samples, memory-mapped; rows are in the order they were written.

    >>> beton = Beton.open("photographs.beton")                                           # doctest: +SKIP
    >>> beton.damaged(range(len(beton)))                                                  # doctest: +SKIP
    []
    """

    path: Path
    data: npt.NDArray[np.uint8]  # [bytes] the whole file, read-only
    manifest: dict[str, Any]
    slots: int
    names: Names
    ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]  # -1 where there is none
    sizes: npt.NDArray[np.int32]  # [N, 2] (height, width) of the source
    stored: npt.NDArray[np.int32]  # [N, 2] (height, width) of the JPEG
    crcs: npt.NDArray[np.uint32]  # of the JPEG
    starts: npt.NDArray[np.uint64]  # of the JPEG in `data`
    lengths: npt.NDArray[np.uint64]
    counts: npt.NDArray[np.int64]  # of boxes
    facts_crcs: npt.NDArray[np.uint32]
    _boxes_at: npt.NDArray[np.uint64]
    _box_labels_at: npt.NDArray[np.uint64]

    @classmethod
    def open(cls, path: Path | str, *, verify: bool = True) -> Beton:
        """Open and check a file; ValueError says in one line what is wrong. `verify=False` leaves out checksums only.

        Checksums of samples are not computed here but by `damaged`, or by whoever decodes.
        """
        file = Path(path)
        with file.open("rb") as handle:
            if os.fstat(handle.fileno()).st_size < HEADER.itemsize + FIELD.itemsize:
                raise ValueError(f"Beton.open: {file} is too short for a .beton")
            data = np.frombuffer(mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)
        try:
            header, slots, mark = _head(data)
            samples, allocations, manifest = _tables(data, header, mark, verify)
            _check_samples(samples, allocations, slots, int(mark["manifest_at"]))
        except ValueError as error:
            raise ValueError(f"Beton.open: {file} {error}") from None
        image, name = samples["image"], samples["name"].copy()
        return cls(
            file, data, manifest, slots, Names(data, name),
            ids=samples["id"].astype(np.int64),
            labels=samples["label"].astype(np.int64),
            sizes=np.stack((samples["height"], samples["width"]), axis=1).astype(np.int32),
            stored=np.stack((image["height"], image["width"]), axis=1).astype(np.int32),
            crcs=samples["crc"].astype(np.uint32),
            starts=image["at"].astype(np.uint64),
            lengths=allocations["size"][:, 0].astype(np.uint64),
            counts=samples["box_count"].astype(np.int64),
            facts_crcs=samples["facts_crc"].astype(np.uint32),
            _boxes_at=samples["boxes"].astype(np.uint64),
            _box_labels_at=samples["box_labels"].astype(np.uint64),
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.ids)

    def jpeg(self, row: int) -> npt.NDArray[np.uint8]:
        """The JPEG of a sample, uint8 [bytes], not copied."""
        return self.data[int(self.starts[row]) :][: int(self.lengths[row])]

    def boxes(self, row: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """The k boxes of a sample in unit coordinates of its source, float32 [k, 4], and their labels int64 [k]."""
        count = int(self.counts[row])
        boxes = self._array(self._boxes_at, row, 4 * count, BOX).astype(np.float32)
        return boxes.reshape(count, 4), self._array(self._box_labels_at, row, count, BOX_LABEL).astype(np.int64)

    def _array(self, at: npt.NDArray[np.uint64], row: int, count: int, kind: np.dtype[Any]) -> Table:
        return np.frombuffer(self.data, dtype=kind, count=count, offset=int(at[row]))

    def damaged(self, rows: Iterable[int]) -> list[int]:
        """Those of the rows whose JPEG, boxes, labels or name are not as they were written."""
        listed = [int(row) for row in rows]
        wrong = set(self.damaged_facts(listed))
        return [row for row in listed if row in wrong or zlib.crc32(self.jpeg(row).data) != self.crcs[row]]

    def damaged_facts(self, rows: Iterable[int]) -> list[int]:
        """Those of the rows whose boxes, labels or name are not as they were written; the JPEG is not read."""
        wrong = []
        for row in map(int, rows):
            crc = zlib.crc32(self._array(self._boxes_at, row, 4 * self.slots, BOX).data)
            crc = zlib.crc32(self._array(self._box_labels_at, row, self.slots, BOX_LABEL).data, crc)
            if zlib.crc32(self.names[row].encode("utf-8", "surrogateescape"), crc) != self.facts_crcs[row]:
                wrong.append(row)
        return wrong


def _head(data: npt.NDArray[np.uint8]) -> tuple[np.void, int, np.void]:
    """The header, the number of slots and the mark of a file whose head is as it should be."""
    header = data[: HEADER.itemsize].view(HEADER)[0]
    first = data[HEADER.itemsize :][: FIELD.itemsize].view(FIELD)[0]
    version, count, page = int(header["version"]), int(header["fields"]), int(header["page_size"])
    named = first["name"] != b"" and bytes(first["name"]).decode("latin-1").isprintable()
    if version != FFCV_VERSION:
        is_other = named and 0 < count < 1000 and page & (page - 1) == 0
        raise ValueError(f"is FFCV version {version}, not {FFCV_VERSION}" if is_other else "is no .beton")
    if count == 0 or not named or page < LEAST_PAGE or page & (page - 1):
        raise ValueError("is no .beton, or its header is damaged")
    if len(data) < HEADER.itemsize + count * FIELD.itemsize:
        raise ValueError(f"is cut short: it ends within the descriptors of {count} fields")
    fields = data[HEADER.itemsize :][: count * FIELD.itemsize].view(FIELD)
    names = [name.decode("ascii", "replace") for name in fields["name"].tolist()]
    rewrite = "write it with data_prep/write_beton.py"
    arguments = fields["arguments"][names.index("image")].tobytes() if "image" in names else bytes(1024)
    mark = np.frombuffer(arguments, dtype=MARK, count=1)[0]
    is_ours = mark["magic"] == MAGIC
    if is_ours and mark["format"] != FORMAT:
        raise ValueError(f"has geoaug's format {mark['format']}, this version reads {FORMAT}: {rewrite}")
    if missing := [name for name in FIELDS if name not in names]:
        raise ValueError(f"was written without geoaug's fields {', '.join(missing)}: {rewrite}")
    if not is_ours:
        raise ValueError(f"was not written by geoaug: {rewrite}")
    slots = slots_of(fields["arguments"][names.index("boxes")].tobytes())
    if not 1 <= slots <= MOST_SLOTS or fields.tobytes() != descriptors(slots, mark.tobytes()).tobytes():
        raise ValueError("has damaged descriptors of its fields")
    return header, slots, mark


def _tables(
    data: npt.NDArray[np.uint8], header: np.void, mark: np.void, verify: bool
) -> tuple[Table, Table, dict[str, Any]]:
    """Metadata [N], allocations [N, 4] and the manifest, all inside the file and, with `verify`, as written."""
    count, allocations_at = int(header["samples"]), int(header["allocations_at"])
    manifest_at, manifest_size = int(mark["manifest_at"]), int(mark["manifest_size"])
    end = allocations_at + count * len(ALLOCATIONS) * ALLOCATION.itemsize
    if end != len(data):
        raise ValueError(f"is cut short or damaged: it should end at byte {end:,} and ends at {len(data):,}")
    metadata = data[METADATA_AT : METADATA_AT + count * SAMPLE.itemsize]
    if not (count > 0 and METADATA_AT + metadata.nbytes <= manifest_at <= allocations_at - manifest_size):
        raise ValueError("has a damaged header: its tables do not follow each other")
    allocations, text = data[allocations_at:], data[manifest_at : manifest_at + manifest_size].tobytes()
    if verify and table_crc(data[: HEADER.itemsize].data, metadata.data, allocations.data) != mark["tables_crc"]:
        raise ValueError("has damaged tables: their checksum is not the one written")
    if verify and zlib.crc32(text) != mark["manifest_crc"]:
        raise ValueError("has a damaged manifest: its checksum is not the one written")
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError):
        manifest = None
    if not isinstance(manifest, dict):
        raise ValueError("has a damaged manifest: it is no JSON object")
    return metadata.view(SAMPLE), allocations.view(ALLOCATION).reshape(count, len(ALLOCATIONS)), manifest


def _check_samples(samples: Table, allocations: Table, slots: int, end: int) -> None:
    """Refuse records that point outside the samples' bytes or hold what no writer wrote."""
    start = np.uint64(METADATA_AT + samples.nbytes)
    image, at, size = samples["image"], allocations["at"], allocations["size"]
    same = (allocations["sample"] == np.arange(len(samples), dtype=np.uint64)[:, None]).all(axis=1)
    told = (image["at"], samples["name"]["at"], samples["boxes"], samples["box_labels"])
    same &= np.all([at[:, i] == column for i, column in enumerate(told)], axis=0)
    same &= (size[:, 1] == samples["name"]["size"]) & (size[:, 2] == slots * 4 * BOX.itemsize)
    same &= size[:, 3] == slots * BOX_LABEL.itemsize
    inside = ((at >= start) & (size > 0) & (size <= end)).all(axis=1)
    inside &= (at <= np.uint64(end) - np.minimum(size, np.uint64(end))).all(axis=1)
    sides = np.stack((samples["height"], samples["width"], image["height"], image["width"]))
    word = np.stack((samples["crc"], samples["facts_crc"]))
    for right, what in (
        (inside, "bytes outside the file"),
        (same, "bytes that the table of allocations has elsewhere"),
        (image["mode"] == 0, "an image that is no JPEG"),
        (((sides >= 1) & (sides < 2**31)).all(axis=0), "an impossible size"),
        ((samples["box_count"] >= 0) & (samples["box_count"] <= slots), f"a number of boxes outside 0 to {slots}"),
        ((samples["id"] >= 0) & (samples["label"] >= -1), "a negative id or label"),
        (((word >= 0) & (word < 2**32)).all(axis=0), "an impossible checksum"),
    ):
        if not right.all():
            count, row = int((~right).sum()), int(np.argmin(right))
            raise ValueError(f"has damaged metadata: {count:,} samples, first number {row}, with {what}")
    ids = np.sort(samples["id"])
    if (ids[1:] == ids[:-1]).any():
        raise ValueError(f"has two samples with one id, {ids[:-1][ids[1:] == ids[:-1]][0]}")

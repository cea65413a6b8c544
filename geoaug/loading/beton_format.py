"""What a `.beton` looks like, byte for byte: FFCV's version 2 with the fields that geoaug gives every sample.

In the file's order: header, descriptors of the fields, metadata (one record a sample, room for all that were tried),
each sample's bytes, the manifest, and the table of allocations, which ends the file. A sample's bytes are its boxes,
box labels, name and JPEG; they never cross a page.
"""

from __future__ import annotations

import json
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

FFCV_VERSION, FORMAT, MAGIC = 2, 1, b"geoaug"
LEAST_PAGE, MOST_SLOTS = 2**21, 2**16
Table = npt.NDArray[Any]

HEADER = np.dtype(
    [("version", "<u2"), ("fields", "<u2"), ("page_size", "<u4"), ("samples", "<u8"), ("allocations_at", "<u8")]
)
FIELD = np.dtype([("type", "u1"), ("name", "S16"), ("arguments", "V1024")])
ALLOCATION = np.dtype([("sample", "<u8"), ("at", "<u8"), ("size", "<u8")])
# Lies in the arguments of the image field, which FFCV does not read. The tables' CRC is of header, metadata and
# allocations; the descriptors need none, since they are compared with what they must be.
MARK = np.dtype(
    [("magic", "S6"), ("format", "<u2"), ("tables_crc", "<u4"), ("manifest_crc", "<u4"), ("manifest_at", "<u8"),
     ("manifest_size", "<u8")]
)  # fmt: skip
_ARRAY = np.dtype([("shape", "<u8", 32), ("length", "<u8"), ("type", "S32")])  # arguments of an array field
_INTEGER, _IMAGE, _BYTES, _NDARRAY = 1, 2, 3, 4  # FFCV's numbers for kinds of fields
FIELDS = {
    "image": _IMAGE, "id": _INTEGER, "crc": _INTEGER, "label": _INTEGER, "height": _INTEGER, "width": _INTEGER,
    "box_count": _INTEGER, "name": _BYTES, "boxes": _NDARRAY, "box_labels": _NDARRAY,
    "facts_crc": _INTEGER,  # of boxes, box_labels and name as they lie in the file; `crc` is of the JPEG alone
}  # fmt: skip
_RECORDS: dict[int, Any] = {
    _INTEGER: np.dtype("<i8"),
    _IMAGE: np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("at", "<u8")]),
    _BYTES: np.dtype([("at", "<u8"), ("size", "<u8")]),
    _NDARRAY: np.dtype("<u8"),
}
SAMPLE = np.dtype([(name, _RECORDS[kind]) for name, kind in FIELDS.items()], align=True)
BOX, BOX_LABEL = np.dtype("<f4"), np.dtype("<i8")
METADATA_AT = HEADER.itemsize + len(FIELDS) * FIELD.itemsize
ALLOCATIONS = ("image", "name", "boxes", "box_labels")  # of a sample, in the order of the table


def descriptors(slots: int, mark: bytes) -> Table:
    """The descriptors of all fields of a file with `slots` boxes a sample; `mark` is a record of MARK, as bytes."""
    fields = np.zeros(len(FIELDS), dtype=FIELD)
    fields["type"], fields["name"] = list(FIELDS.values()), [name.encode() for name in FIELDS]
    given = {"image": mark}
    for name, shape, kind in (("boxes", (slots, 4), BOX), ("box_labels", (slots,), BOX_LABEL)):
        array = np.zeros((), dtype=_ARRAY)
        array["shape"][: len(shape)] = shape
        array["type"] = json.dumps(kind.descr).encode()
        array["length"] = len(array["type"].item())
        given[name] = array.tobytes()
    for row, name in enumerate(FIELDS):
        fields["arguments"][row] = given.get(name, b"").ljust(1024, b"\0")
    return fields


def slots_of(arguments: bytes) -> int:
    """The first axis of the shape that the arguments of an array field give."""
    return int(np.frombuffer(arguments, dtype=_ARRAY, count=1)["shape"][0, 0])


def table_crc(*tables: bytes | memoryview) -> int:
    """One CRC-32 over the bytes of several tables in turn."""
    crc = 0
    for table in tables:
        crc = zlib.crc32(table, crc)
    return crc

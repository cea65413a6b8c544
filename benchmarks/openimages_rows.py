"""A file of boxes of Open Images' real shape: 1.74 million images, 14.6 million rows, 600 classes, invented boxes."""

import csv

import numpy as np
import pyarrow as pa
import pyarrow.csv

from data_prep.openimages_classes import TABLE

TITLES = [
    "ImageID", "Source", "LabelName", "Confidence", "XMin", "XMax", "YMin", "YMax",
    "IsOccluded", "IsTruncated", "IsGroupOf", "IsDepiction", "IsInside",
]  # fmt: skip
CLICKS = [f"XClick{i}{axis}" for axis in "XY" for i in range(1, 5)]
CLASSES = 600
_AT_ONCE = 50_000  # images
_DIGITS = np.frombuffer(b"0123456789abcdef", dtype=np.uint8)


def class_mids():
    """The shared classes, and as many invented ones as are missing, from the most frequent to the rarest."""
    shared = [row["mid"] for row in csv.DictReader(TABLE.read_text().splitlines()) if row["match"] != "near"]
    others = [f"/m/0x{i:04x}" for i in range(CLASSES - len(shared))]
    mids = []
    while shared or others:
        mids += shared[:1] + others[:4]
        shared, others = shared[1:], others[4:]
    return mids


def _fixed(letters):
    """Rows of letters uint8 [n, width] as a column of texts."""
    width = letters.shape[1]
    texts = pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(letters), [None, pa.py_buffer(letters.copy())])
    return texts.cast(pa.binary())


def _millionths(numbers):
    """Whole millionths as "0.123456"."""
    places = 10 ** np.arange(6, -1, -1)
    digits = _DIGITS[numbers[:, None] // places % 10]
    return _fixed(np.insert(digits, 1, ord("."), axis=1))


def write_rows(path, images, *, clicks=False, seed=0):
    """How many images and rows were written: V4's 13 columns, or V6's 21 with `clicks`."""
    g, rows = np.random.default_rng(seed), 0
    ids = np.unique(g.integers(0, 2**64, images, dtype=np.uint64))
    weights = 1 / (np.arange(CLASSES) + 3) ** 1.05
    mids = pa.array(class_mids())
    options = {"quoting_style": "none", "quoting_header": "none"}
    with path.open("wb") as file:
        for first in range(0, len(ids), _AT_ONCE):
            part = ids[first : first + _AT_ONCE]
            distinct = 1 + g.poisson(1.8, len(part))
            labels = g.choice(CLASSES, distinct.sum(), p=weights / weights.sum())
            each = g.geometric(0.333, len(labels))
            image, labels = np.repeat(np.repeat(np.arange(len(part)), distinct), each), np.repeat(labels, each)
            n = len(image)
            octets = part[image].astype(">u8").view(np.uint8).reshape(n, 8)
            sides = np.sort(g.integers(0, 10**6, (2, n, 2)), axis=2) + np.arange(2)  # never without area
            source = pa.array((g.random(n) < 0.1).astype(np.int8))
            columns = {
                "ImageID": _fixed(_DIGITS[np.stack((octets >> 4, octets & 15), axis=2).reshape(n, 16)]),
                "Source": pa.DictionaryArray.from_arrays(source, pa.array(["xclick", "activemil"])).cast(pa.string()),
                "LabelName": pa.DictionaryArray.from_arrays(pa.array(labels), mids).cast(pa.string()),
                "Confidence": pa.array(np.ones(n, dtype=np.int8)),
            }
            for i, title in enumerate(TITLES[4:8]):
                columns[title] = _millionths(sides[i // 2, :, i % 2])
            for title, share in zip(TITLES[8:], (0.6, 0.25, 0.06, 0.055, 0.001), strict=True):
                columns[title] = pa.array((g.random(n) < share).astype(np.int8))
            for title in CLICKS if clicks else []:
                columns[title] = _millionths(g.integers(0, 10**6, n))
            sink = pa.BufferOutputStream()
            written = pa.csv.WriteOptions(include_header=first == 0, **options)
            pa.csv.write_csv(pa.table(columns), sink, written)
            file.write(sink.getvalue())
            rows += n
    return len(ids), rows

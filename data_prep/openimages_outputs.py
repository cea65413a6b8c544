"""What is written of a choice: the list, the COCO json, and which bytes they are."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.image_download import Stored
from data_prep.openimages_boxes import Boxes
from data_prep.openimages_choice import Choice
from data_prep.openimages_classes import Classes, Shared
from data_prep.openimages_plain import DEPICTION, GROUP

_AT_ONCE = 2000  # images whose text is held


def write_parts(path: Path, parts: Iterable[str]) -> dict[str, Any]:
    """Write a text file that is either whole or not there; its bytes and SHA-256."""
    part, digest, size = path.with_name(path.name + ".part"), hashlib.sha256(), 0
    with part.open("wb") as file:
        for text in parts:
            data = text.encode()
            file.write(data)
            digest.update(data)
            size += len(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    return {"bytes": size, "sha256": digest.hexdigest()}


def fingerprint(file: Path) -> dict[str, Any]:
    """The bytes and SHA-256 of a file, as `write_parts` gives them."""
    with file.open("rb") as data:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(data, "sha256").hexdigest()}


def write_json(path: Path, value: Any) -> dict[str, Any]:
    """Write a small json in the same way."""
    return write_parts(path, [json.dumps(value, indent=1, ensure_ascii=False), "\n"])


def hex_ids(ids: npt.NDArray[np.uint64]) -> list[str]:
    """Image ids as they are written: 16 hex digits.

    >>> hex_ids(np.array([255], dtype=np.uint64))
    ['00000000000000ff']
    """
    return [f"{number:016x}" for number in ids.tolist()]


def image_ids(ids: list[str], split: str) -> Iterator[str]:
    """The lines of image_ids.txt, in the form of Open Images' own downloader; the first n are a choice of n images."""
    yield from (f"{split}/{identity}\n" for identity in ids)


def instances(
    boxes: Boxes, choice: Choice, classes: Classes, shared: Shared, ids: list[str], sizes: Mapping[str, Stored] | None
) -> Iterator[str]:
    """A COCO json of the chosen images and all their boxes; groups are crowds.

    With `sizes` the boxes are in pixels, and images without a size, which are not there, are left out. Without them
    height and width are null, and boxes are shares of them.
    """
    unit = "shares of width and height, which are not known" if sizes is None else "pixels"
    yield json.dumps({"info": {"description": "OpenImage-MINI", "boxes": unit}})[:-1]
    names = [-1 if category < 0 else int(category) for category in shared.category]
    categories = [
        {
            "id": i + 1,
            "name": name,
            "mid": mid,
            "supercategory": "",
            "coco": None if at < 0 else shared.target.names[at],
        }
        for i, (mid, name, at) in enumerate(zip(classes.mids, classes.names, names, strict=True))
    ]
    yield ',\n"categories": [\n' + ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in categories) + "\n]"
    there = [(i, identity) for i, identity in enumerate(ids) if sizes is None or identity in sizes]
    yield ',\n"images": [\n' + ",\n".join(_image(i, identity, sizes) for i, identity in there) + "\n]"
    yield ',\n"annotations": [\n'
    number = 0
    for first in range(0, len(there), _AT_ONCE):
        lines = _annotations(boxes, choice, there[first : first + _AT_ONCE], sizes, number)
        if lines:
            yield (",\n" if number else "") + ",\n".join(lines)
        number += len(lines)
    yield "\n]}\n"


def _image(i: int, identity: str, sizes: Mapping[str, Stored] | None) -> str:
    height, width = ("null", "null") if sizes is None else (sizes[identity].height, sizes[identity].width)
    return f'{{"id":{i + 1},"file_name":"{identity}.jpg","height":{height},"width":{width}}}'


def _annotations(
    boxes: Boxes, choice: Choice, images: list[tuple[int, str]], sizes: Mapping[str, Stored] | None, number: int
) -> list[str]:
    """The entries of all boxes of some images, the first with the id number + 1."""
    rows, image = rows_of(boxes, choice.images[[i for i, _ in images]])
    kept = choice.kept[rows]
    rows, image = rows[kept], image[kept]
    scale, digits = np.ones((len(images), 2)), 7
    if sizes is not None:
        scale, digits = np.array([(sizes[identity].width, sizes[identity].height) for _, identity in images]), 2
    corners = boxes.corners[rows].astype(np.float64)
    places = (corners[:, :2] * scale[image]).round(digits)
    sides = ((corners[:, 2:] - corners[:, :2]) * scale[image]).round(digits)
    areas = (sides[:, 0] * sides[:, 1]).round(digits)
    columns = places.tolist(), sides.tolist(), areas.tolist(), (boxes.classes[rows].astype(np.int64) + 1).tolist()
    flags, owners = boxes.flags[rows], np.array([i + 1 for i, _ in images], dtype=np.int64)[image]
    marks = (flags & GROUP > 0).astype(int).tolist(), (flags & DEPICTION > 0).astype(int).tolist()
    return [
        f'{{"id":{identity},"image_id":{owner},"category_id":{label},"bbox":[{x},{y},{w},{h}],"area":{area},'
        f'"iscrowd":{crowd},"isdepiction":{depiction}}}'
        for identity, (owner, (x, y), (w, h), area, label, crowd, depiction) in enumerate(
            zip(owners.tolist(), *columns, *marks, strict=True), number + 1
        )
    ]


def rows_of(boxes: Boxes, images: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """All rows of some images, and to which of them, counted from 0, each belongs."""
    starts, lengths = boxes.starts[images], boxes.ends[images] - boxes.starts[images]
    image = np.repeat(np.arange(len(images)), lengths)
    before = np.cumsum(lengths) - lengths
    return np.arange(len(image)) + (starts - before)[image], image

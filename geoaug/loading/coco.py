"""A COCO json: the images it lists and their objects as arrays."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .label_maps import pack

_MOST = 1e15  # pixels; beyond it a number is no coordinate, and arithmetic on it no longer exact


@dataclass(frozen=True)
class Objects:
    """The objects of all images, image i owning rows offsets[i] to offsets[i + 1]; crowds are left out."""

    offsets: npt.NDArray[np.int64]
    boxes: npt.NDArray[np.float32]  # [T, 4] xyxy, unit coordinates
    labels: npt.NDArray[np.int64]  # [T] index into categories
    masks: list[bytes]  # [T] segmentations for label_map_of; empty where nobody asked for them
    sizes: npt.NDArray[np.int32]  # [N, 2] (height, width) the json gives
    categories: tuple[str, ...]


@dataclass(frozen=True)
class Record:
    """The lists of a json, as they stand there; what is asked of them and is not there is an error that says where."""

    file: Path
    lists: dict[str, list[Any]]

    def error(self, where: str) -> ValueError:
        """What to raise where this is no COCO json."""
        return ValueError(f"open_loader: path must be a COCO json, got {self.file}: {where}")

    def column(self, kind: str, key: str, fits: Callable[[Any], bool], expected: str) -> list[Any]:
        """One field of all entries of a list."""
        entries = self.lists[kind]
        try:
            values = [entry[key] for entry in entries]
        except (KeyError, TypeError, IndexError):
            at = next(i for i, entry in enumerate(entries) if not isinstance(entry, dict) or key not in entry)
            what = f"has no {key!r}" if isinstance(entries[at], dict) else "must be an object"
            raise self.error(f"{kind}[{at}] {what}") from None
        for at, value in enumerate(values):
            if not fits(value):
                raise self.error(f"{kind}[{at}] must have {expected} as {key!r}, got {str(value)[:60]}")
        return values

    def rows(self, kind: str) -> dict[Any, int]:
        """The row of each id in a list."""
        ids = self.column(kind, "id", _is_id, "a number or text")
        rows = {identity: row for row, identity in enumerate(ids)}
        if len(rows) < len(ids):
            at = next(row for row, identity in enumerate(ids) if rows[identity] != row)
            raise self.error(f"{kind}[{rows[ids[at]]}] has the 'id' of {kind}[{at}], {ids[at]}")
        return rows

    def names(self) -> list[str]:
        """The file names of the images as written."""
        return self.column("images", "file_name", lambda value: isinstance(value, str), "text")


def read_record(file: Path, *, masks: bool) -> Record:
    """Read and parse a json; segmentations are packed, or left out, as they are met, since they are most of it."""

    def lean(entry: dict[str, Any]) -> dict[str, Any]:
        if "segmentation" in entry:
            segmentation = entry.pop("segmentation")
            if masks:
                entry["segmentation"] = pack(segmentation)
        return entry

    try:
        record = json.loads(file.read_text(encoding="utf-8-sig"), object_hook=lean)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"open_loader: path must be a COCO json, got {file}: {error}") from None
    if not isinstance(record, dict) or not isinstance(record.get("images"), list) or not record["images"]:
        raise ValueError(f"open_loader: path must be a COCO json with images, got {file} without any")
    lists = {kind: record.get(kind) or [] for kind in ("images", "annotations", "categories")}
    for kind, entries in lists.items():
        if not isinstance(entries, list):
            raise Record(file, {}).error(f"{kind!r} must be a list")
    return Record(file, lists)


def objects_of(record: Record, problems: dict[str, list[str]], *, masks: bool) -> Objects:
    """Boxes clipped to their image; those without area are dropped; both are listed in problems, as are orphans."""
    names, annotations = record.names(), record.lists["annotations"]
    row_of, sizes = record.rows("images"), _sizes(record)
    categories, class_of = _categories(record)
    of_images = record.column("annotations", "image_id", _is_id, "a number or text")
    rows = np.array([row_of.get(image, -1) for image in of_images], dtype=np.int64)
    crowd = np.array([bool(entry.get("iscrowd")) for entry in annotations], dtype=np.bool_)
    found = [entry.get("bbox") for entry in annotations]
    usable = np.array([_is_box(box) for box in found], dtype=np.bool_)
    xywh = np.zeros((len(rows), 4))
    xywh[usable] = np.array(list(compress(found, usable.tolist())), dtype=np.float64).reshape(-1, 4)

    width, height = sizes[rows].T[::-1].astype(np.float64)  # of an orphan, whose row is -1, they are not used
    (x0, y0), (x1, y1) = xywh.T[:2], xywh.T[:2] + xywh.T[2:]
    corners = [np.clip(x0, 0, width), np.clip(y0, 0, height), np.clip(x1, 0, width), np.clip(y1, 0, height)]
    unit = (np.stack(corners) / np.stack([width, height, width, height])).T.astype(np.float32)
    area = (unit[:, 2] > unit[:, 0]) & (unit[:, 3] > unit[:, 1])
    beyond = np.max([-x0, -y0, x1 - width, y1 - height], axis=0) > 0.01
    given = [entry.get("category_id") for entry in annotations]
    labels = np.array([class_of.get(key, -1) if _is_id(key) else -1 for key in given], dtype=np.int64)

    def tell(kind: str, which: npt.NDArray[np.bool_]) -> None:
        notes = [f"{names[rows[i]]} box {annotations[i].get('id')}" for i in np.flatnonzero(which).tolist()]
        if notes:
            problems[kind] = notes

    orphans = np.flatnonzero(rows < 0).tolist()
    if orphans:
        orphan_ids = [str(annotations[i].get("id")) for i in orphans]
        problems["box of an image that the json does not list, dropped"] = orphan_ids
    object_ = (rows >= 0) & ~crowd
    kept = object_ & usable & area
    tell("box that is not four numbers, dropped", object_ & ~usable)
    tell("box without area, dropped", object_ & usable & ~area)
    tell("box beyond its image, clipped", kept & beyond)
    if categories:
        tell("box of a category that the json does not list, label -1", kept & (labels < 0))
    order = np.flatnonzero(kept)
    order = order[np.argsort(rows[order], kind="stable")]
    counts = np.bincount(rows[order], minlength=len(names))
    return Objects(
        np.concatenate(([0], np.cumsum(counts))).astype(np.int64),
        unit[order],
        labels[order],
        [annotations[i].get("segmentation", b"") for i in order.tolist()] if masks else [],
        sizes,
        categories,
    )


def _sizes(record: Record) -> npt.NDArray[np.int32]:
    sides = [record.column("images", side, _is_side, "a whole number of pixels") for side in ("height", "width")]
    return np.array(sides, dtype=np.int32).T.copy()


def _categories(record: Record) -> tuple[tuple[str, ...], dict[Any, int]]:
    """The names of the categories in the order of their ids, and the index of each id in it."""
    names = record.column("categories", "name", lambda value: value is not None, "text")
    rows = record.rows("categories")
    try:
        ids = sorted(rows, key=int)
    except (ValueError, OverflowError):
        raise record.error("categories must have numbers as 'id'") from None
    return tuple(str(names[rows[identity]]) for identity in ids), {identity: i for i, identity in enumerate(ids)}


def _is_id(value: Any) -> bool:
    return isinstance(value, (int, str, float))


def _is_side(value: Any) -> bool:
    return type(value) in (int, float) and 1 <= value < 2**31 and value == int(value)


def _is_box(box: Any) -> bool:
    if not isinstance(box, list) or len(box) != 4:
        return False
    return all(type(value) in (int, float) and -_MOST < value < _MOST for value in box)

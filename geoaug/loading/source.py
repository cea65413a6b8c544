"""What there is to load: a folder of images, a text file of paths, or a COCO json; names, ids, labels and objects.

The id of an image is that of its name relative to the root, so all three give the same image the same id (DESIGN: the
root is the folder, or its `images/` child where the images lie there).
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from ..geometry.ids import sample_ids

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".gif"))


@dataclass(frozen=True)
class Objects:
    """The objects of all images, image i owning rows offsets[i] to offsets[i + 1]; crowds are left out."""

    offsets: npt.NDArray[np.int64]
    boxes: npt.NDArray[np.float32]  # [T, 4] xyxy, unit coordinates
    labels: npt.NDArray[np.int64]  # [T] index into categories
    masks: list[Any]  # [T] COCO segmentations as they stand in the json
    sizes: npt.NDArray[np.int32]  # [N, 2] (height, width) the json gives
    categories: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """Images by name under one root; `problems` lists by kind what was dropped, clipped or ignored while reading."""

    root: Path
    names: Sequence[str]
    ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...] = ()
    objects: Objects | None = None
    problems: dict[str, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)


def open_source(path: Path | str, images: Path | str | None = None) -> Source:
    """Read a folder, a list (.txt) or a COCO json; `images` is where the photographs of a list or json lie."""
    target = Path(path)
    if not target.exists():
        raise FileNotFoundError(
            f"open_loader: path must be a folder, a list, a COCO json or a .beton, got {target}: none there"
        )
    folder = None if images is None else Path(images)
    if folder is not None and not folder.is_dir():
        raise NotADirectoryError(f"open_loader: images must be a folder, got {folder}")
    if target.is_dir():
        return _from_folder(target)
    if target.suffix == ".json":
        return _from_coco(target, folder or target.parent / "images")
    return _from_list(target, folder or target.parent)


def inside(root: Path, name: str, where: str) -> str:
    """The name relative to root in POSIX form; names that lead out of root are refused, since they come from files."""
    relative = PurePosixPath(os.path.normpath(name))
    if relative.is_absolute() and relative.is_relative_to(root.absolute().as_posix()):
        relative = relative.relative_to(root.absolute().as_posix())
    if relative.is_absolute() or relative.parts[:1] == ("..",) or not name.strip():
        raise ValueError(f"{where}: names must lie under {root}, got {name!r}")
    return relative.as_posix()


def _has_images(folder: Path) -> bool:
    return any(Path(f).suffix.lower() in SUFFIXES for _, _, files in os.walk(folder) for f in files)


def _from_folder(folder: Path) -> Source:
    child = folder / "images"
    root = child if child.is_dir() and _has_images(child) else folder
    names: list[str] = []
    ignored: list[str] = []
    for parent, folders, files in os.walk(root, followlinks=True):
        folders.sort()
        for file in sorted(files):
            name = (Path(parent) / file).relative_to(root).as_posix()
            (names if Path(file).suffix.lower() in SUFFIXES else ignored).append(name)
    names.sort()
    if not names:
        raise ValueError(f"open_loader: path must hold images ({', '.join(sorted(SUFFIXES))}), got none in {root}")
    groups = [PurePosixPath(name).parts[0] if "/" in name else "" for name in names]
    classes = tuple(sorted(set(groups) - {""}))
    index = {name: i for i, name in enumerate(classes)} | {"": -1}
    labels = np.array([index[group] for group in groups], dtype=np.int64)
    problems = {"file that is no image, ignored": ignored} if ignored else {}
    return Source(root, names, sample_ids(names).numpy(), labels, classes, None, problems)


def _from_list(file: Path, root: Path) -> Source:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"open_loader: path must be a text file of image paths, got {file}: not text") from None
    names = [inside(root, line.strip(), f"list {file.name}") for line in lines if line.strip()]
    if not names:
        raise ValueError(f"open_loader: path must list images, got {file}: empty")
    return Source(root, names, sample_ids(names).numpy(), np.full(len(names), -1, dtype=np.int64))


def _from_coco(file: Path, root: Path) -> Source:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"open_loader: path must be a COCO json, got {file}: {error}") from None
    if not isinstance(record, dict) or not isinstance(record.get("images"), list) or not record["images"]:
        raise ValueError(f"open_loader: path must be a COCO json with images, got {file} without any")
    if not root.is_dir():
        raise NotADirectoryError(f"open_loader: images must be given, {root} is no folder")
    images = record["images"]
    for image in images:  # the name stays as written, since the id is made from it
        inside(root, image["file_name"], f"json {file.name}")
    names = [image["file_name"] for image in images]
    problems: dict[str, list[str]] = {}
    missing = [name for name in names if not (root / name).is_file()]
    if missing:
        problems["image that is missing"] = missing
    objects = _objects(record, images, names, problems)
    return Source(
        root, names, sample_ids(names).numpy(), np.full(len(names), -1, dtype=np.int64), (), objects, problems
    )


def _objects(
    record: dict[str, Any], images: list[dict[str, Any]], names: list[str], problems: dict[str, list[str]]
) -> Objects:
    """Boxes clipped to their image; those without area are dropped; both are listed in problems, as are orphans."""
    categories = sorted(record.get("categories", []), key=lambda c: int(c["id"]))
    class_of = {c["id"]: i for i, c in enumerate(categories)}
    row_of = {image["id"]: row for row, image in enumerate(images)}
    sizes = np.array([[image["height"], image["width"]] for image in images], dtype=np.int32)
    kept: list[list[tuple[tuple[float, ...], int, Any]]] = [[] for _ in images]
    for annotation in record.get("annotations", []):
        row = row_of.get(annotation["image_id"])
        if row is None:
            problems.setdefault("box of an image that the json does not list, dropped", []).append(
                str(annotation["id"])
            )
            continue
        if annotation.get("iscrowd", 0):
            continue
        height, width = sizes[row].tolist()
        x, y, w, h = (float(v) for v in annotation["bbox"])
        box = (
            min(max(x, 0.0), width),
            min(max(y, 0.0), height),
            min(max(x + w, 0.0), width),
            min(max(y + h, 0.0), height),
        )
        note = f"{names[row]} box {annotation.get('id')}"
        if not (box[2] > box[0] and box[3] > box[1]):  # also catches NaN and negative sides
            problems.setdefault("box without area, dropped", []).append(note)
            continue
        if max(-x, -y, x + w - width, y + h - height) > 0.01:
            problems.setdefault("box beyond its image, clipped", []).append(note)
        unit = (box[0] / width, box[1] / height, box[2] / width, box[3] / height)
        kept[row].append((unit, class_of.get(annotation.get("category_id"), -1), annotation.get("segmentation")))
    flat = [entry for rows in kept for entry in rows]
    return Objects(
        np.cumsum([0, *(len(rows) for rows in kept)], dtype=np.int64),
        np.array([entry[0] for entry in flat], dtype=np.float32).reshape(-1, 4),
        np.array([entry[1] for entry in flat], dtype=np.int64),
        [entry[2] for entry in flat],
        sizes,
        tuple(str(c["name"]) for c in categories),
    )

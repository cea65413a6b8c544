"""What there is to load: a folder of images, a text file of paths, or a COCO json; names, ids, labels and objects.

The id of an image is that of its name relative to the root, so all three give the same image the same id (DESIGN: the
root is the folder, or its `images/` child where the images lie there), and the same label where they name the same
images: the sorted index of the first folder of its name.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..geometry.ids import sample_ids
from .coco import Objects, objects_of, read_record

__all__ = ["MISSING", "SUFFIXES", "Objects", "Source", "inside", "open_source"]

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".gif"))
MISSING = "image that is missing"


@dataclass(frozen=True)
class Source:
    """Images by name under one root; `problems` lists by kind what was dropped, clipped or ignored while reading."""

    root: Path
    names: Sequence[str]
    ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]  # index into classes, -1 for an image that lies in no subfolder
    classes: tuple[str, ...] = ()
    objects: Objects | None = None
    problems: dict[str, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)


def open_source(path: Path | str, images: Path | str | None = None, *, masks: bool = False) -> Source:
    """Read a folder, a list (.txt) or a COCO json; `images` is where the photographs of a list or json lie.

    Segmentations are kept where `masks` asks for them alone, since they are most of a json.
    """
    target = Path(path)
    if not target.exists():
        raise FileNotFoundError(
            f"open_loader: path must be a folder, a list, a COCO json or a .beton, got {target}: none there"
        )
    folder = None if images is None else Path(images)
    if folder is not None and not folder.is_dir():
        raise NotADirectoryError(f"open_loader: images must be a folder, got {folder}")
    if target.is_dir():
        if images is not None:
            raise ValueError(f"open_loader: images must be left out with a folder, which is {target}, got {images}")
        return _from_folder(target)
    if target.suffix.lower() == ".json":
        return _from_coco(target, folder or target.parent / "images", masks)
    return _from_list(target, folder or target.parent)


def inside(root: Path, name: str, where: str) -> str:
    """The name relative to root in POSIX form; names that lead out of root are refused, since they come from files."""
    return _all_inside(root, [name], where)[0]


def _all_inside(root: Path, names: Sequence[str], where: str) -> list[str]:
    places = [place.rstrip("/") + "/" for place in (os.path.abspath(root), os.path.realpath(root))]
    inner = []
    for name in names:
        relative = os.path.normpath(name) if name.strip() else ".."
        if relative.startswith("/"):
            relative = "/" + relative.lstrip("/")
            relative = next((relative[len(place) :] for place in places if relative.startswith(place)), relative)
        if relative in (".", "..") or relative.startswith(("/", "../")) or "\0" in relative:
            raise ValueError(f"{where}: names must lie under {root}, got {name!r}")
        inner.append(relative)
    return inner


def _labels(names: Sequence[str]) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    groups = [name.split("/", 1)[0] if "/" in name else "" for name in names]
    classes = tuple(sorted(set(groups) - {""}))
    index = {name: i for i, name in enumerate(classes)} | {"": -1}
    return np.array([index[group] for group in groups], dtype=np.int64), classes


@dataclass(frozen=True)
class _Found:
    """What lies under a folder, by names relative to it."""

    images: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    again: list[str] = field(default_factory=list)  # folders that were read under another name


def _walk(root: Path, seen: set[tuple[int, int]]) -> _Found:
    """Everything under root, links followed; `seen` holds (device, inode) of the folders read, so that none is twice.

    Links come after all that lies under root itself, so a folder that a link leads to as well keeps its own name.
    """
    found = _Found()
    folders, links = [""], deque[str]()
    while folders or links:
        prefix = folders.pop() if folders else links.popleft()
        try:
            status = os.stat(root / prefix)
            if (status.st_dev, status.st_ino) in seen:
                found.again.append(prefix.rstrip("/"))
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(root / prefix) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError:
            found.unread.append(prefix.rstrip("/") or ".")
            continue
        for entry in entries:
            name = prefix + entry.name
            is_image = os.path.splitext(entry.name)[1].lower() in SUFFIXES
            try:
                if entry.is_dir():
                    (links if entry.is_symlink() else folders).append(name + "/")
                elif is_image and (entry.is_file() or entry.is_symlink()):  # a dead link fails when it is read
                    found.images.append(name)
                else:
                    found.others.append(name)
            except OSError:  # a link in a circle, or through a folder that may not be entered
                (found.images if is_image else found.unread).append(name)
    for names in (found.images, found.others, found.unread, found.again):
        names.sort()
    return found


def _from_folder(folder: Path) -> Source:
    root, seen = folder / "images", set[tuple[int, int]]()
    found = _walk(root, seen) if os.path.isdir(root) else _Found()
    if found.images:
        beside = _walk(folder, seen)
        if beside.images:
            raise ValueError(
                f"open_loader: path must hold its images in one place, got {folder} with images/{found.images[0]} and "
                f"{beside.images[0]}: name the one meant, such as {root}, or list the files meant in a .txt"
            )
        found.unread.extend(f"../{name}" for name in beside.unread)
    else:
        root, found = folder, _walk(folder, set())
    if not found.images:
        unread = f", where {len(found.unread)} folders cannot be read" if found.unread else ""
        suffixes = ", ".join(sorted(SUFFIXES))
        raise ValueError(f"open_loader: path must hold images ({suffixes}), got none in {folder}{unread}")
    kinds = {
        "file that is no image, ignored": found.others,
        "folder that cannot be read": found.unread,
        "folder already read under another name, ignored": found.again,
    }
    problems = {kind: names for kind, names in kinds.items() if names}
    labels, classes = _labels(found.images)
    return Source(root, found.images, sample_ids(found.images).numpy(), labels, classes, None, problems)


def _from_list(file: Path, root: Path) -> Source:
    kinds = "a folder, a list of paths (.txt, UTF-8) or a COCO .json"
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"open_loader: path must be {kinds}, got {file}: not text") from None
    if "\0" in text:
        raise ValueError(f"open_loader: path must be {kinds}, got {file}: not text")
    lines = [line.strip() for line in text.split("\n")]
    names = _all_inside(root, [line for line in lines if line], f"list {file.name}")
    if not names:
        raise ValueError(f"open_loader: path must list images, got {file}: empty")
    labels, classes = _labels(names)
    return Source(root, names, sample_ids(names).numpy(), labels, classes)


def _from_coco(file: Path, root: Path, masks: bool) -> Source:
    record = read_record(file, masks=masks)
    if not root.is_dir():
        raise NotADirectoryError(f"open_loader: images must be given, {root} is no folder")
    names = record.names()  # as written, since the id is made from them
    labels, classes = _labels(_all_inside(root, names, f"json {file.name}"))
    problems: dict[str, list[str]] = {}
    missing = [name for name in names if not os.path.isfile(os.path.join(root, name))]
    if missing:
        problems[MISSING] = missing
    objects = objects_of(record, problems, masks=masks)
    return Source(root, names, sample_ids(names).numpy(), labels, classes, objects, problems)

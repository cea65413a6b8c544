"""SoCo's file of proposals, {file name: [[x, y, w, h], ...]} in source pixels, as records of a store.

Its boxes are what SoCo trained on: its loader reads [x, y, w, h] as the inclusive pixels x to x + w - 1, so the edges
are (x, y, x + w, y + h). (SoCo's search writes w and h one pixel short, which the file no longer tells.)
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..geometry import checks
from ..geometry.boxes import from_xywh
from .shard_files import Record

_WHERE = "ProposalStore.from_soco"


def read_soco(file: Path, sizes: Mapping[str, tuple[int, int]]) -> tuple[list[Record], dict[str, list[str]]]:
    """Records of the images of `sizes` ({name: (height, width)}) that the file has, and by kind what does not match.

    The file's names have no folders and may lack the extension; an image is looked up by its name as it is, without
    its folders, and without its extension, as long as no other image has that name too.
    """
    try:
        listed = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{_WHERE}: file must be SoCo's json, got {file}: {error}") from None
    ok = isinstance(listed, dict)
    checks.require(ok, _WHERE, "file", "SoCo's json {file name: [[x, y, w, h], ...]}", f"{file}: no object")
    shared = Counter(name for full in sizes for name in {full, *_short(full)})
    records, lacking, used = [], [], set()
    for full, size in sizes.items():
        keys = [
            key for key in dict.fromkeys((full, *_short(full))) if key in listed and (key == full or shared[key] == 1)
        ]
        if not keys:
            lacking.append(full)
            continue
        used.add(keys[0])
        records.append((full, size, _boxes(listed[keys[0]], keys[0], size)))
    if sizes and not records:
        names, theirs = list(sizes)[:2], list(listed)[:2]
        raise ValueError(
            f"{_WHERE}: file must have the images' names, got {file} with {theirs}; images are named {names}"
        )
    beyond = [key for key in listed if key not in used]
    problems = {"image without an entry": lacking, "entry without an image": beyond}
    return records, {kind: names for kind, names in problems.items() if names}


def _short(name: str) -> tuple[str, str]:
    """A name without its folders, and without its extension too."""
    base = name.rsplit("/", 1)[-1]
    return base, base.rsplit(".", 1)[0] if "." in base[1:] else base


def _boxes(rects: Any, name: str, size: tuple[int, int]) -> npt.NDArray[np.uint16]:
    """uint16 [n, 4] xyxy of [[x, y, w, h], ...]."""
    if rects == []:
        return np.zeros((0, 4), dtype=np.uint16)
    try:
        numbers = np.array(rects, dtype=np.float64)
    except (ValueError, TypeError):
        numbers = np.zeros(0)
    whole = numbers.ndim == 2 and numbers.shape[1] == 4 and bool((numbers == numbers.round()).all())
    checks.require(whole, _WHERE, f"boxes of {name}", "[[x, y, w, h], ...] in whole pixels", str(rects)[:60])
    height, width = size
    x, y, w, h = numbers.T
    inside = bool(((x >= 0) & (y >= 0) & (w >= 1) & (h >= 1) & (x + w <= width) & (y + h <= height)).all())
    checks.require(inside, _WHERE, f"boxes of {name}", f"inside its {width} x {height} pixels", "others")
    return from_xywh(torch.from_numpy(numbers.astype(np.int64))).numpy().astype(np.uint16)

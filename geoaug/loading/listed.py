"""Part of a source: the images that a text file names, as curated subsets of COCO are published."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt

from .coco import Objects
from .source import MISSING, Source


def only_listed(source: Source, file: Path) -> Source:
    """The images whose names, or names' stems, are lines of `file`, in the source's order, with their objects.

    A line that names no image, or more than one, is an error: a list of other data would leave little and say nothing.
    """
    where = "open_loader: only must"
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{where} be a text file of names, got {file}: {error}") from None
    lines = [line.strip() for line in text.splitlines()]
    wanted = list(dict.fromkeys(line for line in lines if line))
    row_of = {name: row for row, name in enumerate(source.names)}
    by_stem: dict[str, list[int]] = {}
    for row, name in enumerate(source.names):
        for stem in {PurePosixPath(name).stem, str(PurePosixPath(name).with_suffix(""))}:
            by_stem.setdefault(stem, []).append(row)
    found = [[row_of[line]] if line in row_of else by_stem.get(line, []) for line in wanted]
    unknown = [line for line, rows in zip(wanted, found, strict=True) if not rows]
    if unknown or not wanted:
        raise ValueError(f"{where} name images of {source.root}, got {file} with {len(unknown)} other, {unknown[:2]}")
    several = [line for line, rows in zip(wanted, found, strict=True) if len(rows) > 1]
    if several:
        raise ValueError(f"{where} name one image a line, got {file}: {several[0]!r} is more than one")
    kept = np.unique([rows[0] for rows in found])
    names = [source.names[row] for row in kept]
    problems = dict(source.problems)
    missing = sorted(set(problems.pop(MISSING, ())) & set(names))
    return replace(
        source,
        names=names,
        ids=source.ids[kept],
        labels=source.labels[kept],
        objects=None if source.objects is None else _objects_of(source.objects, kept),
        problems=problems | ({MISSING: missing} if missing else {}),
    )


def _objects_of(objects: Objects, kept: npt.NDArray[np.int64]) -> Objects:
    starts, ends = objects.offsets[kept], objects.offsets[kept + 1]
    rows = np.concatenate([np.arange(a, b) for a, b in zip(starts, ends, strict=True)], dtype=np.int64)
    return replace(
        objects,
        offsets=np.concatenate(([0], np.cumsum(ends - starts))).astype(np.int64),
        boxes=objects.boxes[rows],
        labels=objects.labels[rows],
        masks=[objects.masks[row] for row in rows] if objects.masks else [],
        sizes=objects.sizes[kept],
    )

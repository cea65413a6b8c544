"""The classes of Open Images, the categories of the target, and the table that says which of them are the same.

`openimages_coco.csv`, beside this file, is that table for COCO's 80 categories. Its column `match` says how: `same` is
the same thing under both names, `kind` a kind of it (an Open Images `Man` is a COCO `person`), and `near` a class that
is often taken for it and is not counted. `coco_train2017_counts.csv` holds the objects of COCO train2017.
"""

import csv
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

TABLE = Path(__file__).with_name("openimages_coco.csv")
COUNTS = Path(__file__).with_name("coco_train2017_counts.csv")
MATCHES = {"kinds": ("same", "kind"), "same": ("same",)}  # rows of the table that count, by --match


class Classes(NamedTuple):
    """The boxable classes in the order of their file: their MIDs, such as /m/01g317, and their names."""

    mids: tuple[str, ...]
    names: tuple[str, ...]


class Target(NamedTuple):
    """The distribution to stay under: categories and how many objects of each there are."""

    names: tuple[str, ...]
    objects: npt.NDArray[np.int64]
    about: str


@dataclass(frozen=True)
class Shared:
    """Which class is which of the target's categories: category int64 [classes], -1 where it is none."""

    target: Target
    category: npt.NDArray[np.int64]
    unmatched: tuple[str, ...]  # categories without a class
    ignored: tuple[str, ...]  # rows of the table whose class or category is not there


def _rows(file: Path, what: str) -> Iterator[tuple[int, list[str]]]:
    """The lines of a small CSV that are not blank, with their numbers."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:
            reader = csv.reader(text)
            for row in reader:
                if any(field.strip() for field in row):
                    yield reader.line_num, [field.strip() for field in row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{what} must be a CSV, got {file}: {error}") from None


def read_classes(file: Path) -> Classes:
    """`class-descriptions-boxable.csv` in any of its versions: MID and name, with or without a line of titles."""
    found: dict[str, str] = {}
    for at, (line, row) in enumerate(_rows(file, "--classes")):
        if len(row) < 2:
            raise ValueError(f"--classes must have a MID and a name a line, got {file} line {line}: {','.join(row)!r}")
        if not row[0].startswith("/"):
            if at == 0:
                continue
            raise ValueError(f"--classes must have MIDs such as /m/01g317, got {file} line {line}: {row[0]!r}")
        if row[0] in found:
            raise ValueError(f"--classes must name each class once, got {file} line {line}: {row[0]} again")
        found[row[0]] = row[1]
    if not 0 < len(found) < 2**16:
        raise ValueError(f"--classes must list 1 to 65,535 classes, got {file} with {len(found):,}")
    return Classes(tuple(found), tuple(found.values()))


def published(*, crowds: bool) -> Target:
    """COCO train2017, from the counts that ship with the tool."""
    with COUNTS.open(encoding="utf-8", newline="") as text:
        rows = list(csv.DictReader(text))
    column = "instances" if crowds else "instances_not_crowd"
    return Target(tuple(r["name"] for r in rows), np.array([int(r[column]) for r in rows]), "COCO train2017")


def read_target(file: Path, *, crowds: bool) -> Target:
    """Count the objects of a COCO json by category; its annotations are counted as they are met and never held."""
    counts: Counter[Any] = Counter()

    def lean(entry: dict[str, Any]) -> Any:
        if "image_id" in entry or "file_name" in entry or "counts" in entry:
            if "category_id" in entry and (crowds or not entry.get("iscrowd")):
                counts[entry["category_id"]] += 1
            return None
        return entry

    try:
        record = json.loads(file.read_bytes(), object_hook=lean)
        names = {entry["id"]: str(entry["name"]) for entry in record["categories"]}
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        told = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"--coco must be a COCO json with categories, got {file}: {told}") from None
    if unknown := [identity for identity in counts if identity not in names]:
        raise ValueError(f"--coco must list its categories, got {file} without the id {unknown[0]!r}")
    if len(set(names.values())) < len(names) or not counts:
        what = "no annotations" if not counts else "one name twice"
        raise ValueError(f"--coco must have annotations of categories with different names, got {file}: {what}")
    return Target(tuple(names.values()), np.array([counts[identity] for identity in names]), file.name)


def read_shared(table: Path, classes: Classes, target: Target, match: str) -> Shared:
    """Match classes and categories by a table of `coco`, `mid` or `name`, and perhaps `match` (a class's one row)."""
    rows = _rows(table, "--table")
    _, titles = next(rows, (0, []))
    if "coco" not in titles or not {"mid", "name"} & set(titles):
        raise ValueError(f"--table must have the columns coco and mid or name, got {table}: {','.join(titles)!r}")
    by_mid = {mid: i for i, mid in enumerate(classes.mids)}
    by_name = {name: i for i, name in enumerate(classes.names)}
    categories = {name: i for i, name in enumerate(target.names)}
    category, ignored = np.full(len(classes.mids), -1), list[str]()
    for line, row in rows:
        entry = dict(zip(titles, row, strict=False))
        if len(row) != len(titles):
            raise ValueError(
                f"--table must have {len(titles)} fields a line, got {table} line {line}: {','.join(row)!r}"
            )
        if entry.get("match", "same") not in MATCHES[match]:
            continue
        mid, name = entry.get("mid", ""), entry.get("name", "")
        at = by_mid.get(mid) if mid else by_name.get(name)
        if at is None or entry["coco"] not in categories:
            ignored.append(f"{name or mid} = {entry['coco']}")
        elif category[at] >= 0:
            raise ValueError(f"--table must have each class once, got {table} line {line}: {mid or name} again")
        else:
            category[at] = categories[entry["coco"]]
    unmatched = tuple(name for i, name in enumerate(target.names) if i not in category)
    if len(unmatched) == len(target.names):
        raise ValueError(f"--table must share a class with --classes and --coco, got {table} without any")
    return Shared(target, category, unmatched, tuple(ignored))

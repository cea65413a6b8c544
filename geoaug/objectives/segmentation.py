"""Pseudo-categories of pixels against true classes: confusion, matching, IoU (DenseSiam, section 5.1)."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ..geometry import checks


class SegmentationScore(NamedTuple):
    """Means over classes in [0, 1], NaN where there is nothing to average; what stands behind them.

    `class_of` is the class each category is read as, -1 for none. `iou` is NaN for a class that is neither there nor
    read anywhere; means leave it out.
    """

    miou: float
    things: float
    stuff: float
    pixel_accuracy: float
    iou: Float[Tensor, " classes"]
    class_of: Int64[Tensor, " categories"]


def confusion(
    predictions: Int64[Tensor, "*pixels"], labels: Int64[Tensor, "*pixels"], *, categories: int, classes: int
) -> Int64[Tensor, "classes categories"]:
    """Pixels of each true class (rows) by the category they were given (columns); labels of -1 are void, left out.

    >>> confusion(torch.tensor([1, 1, 0, 0]), torch.tensor([0, 0, 1, -1]), categories=2, classes=2)
    tensor([[0, 2],
            [1, 0]])
    """
    where = "confusion"
    categories, classes = (
        checks.index(x, 1, 2**20, where, name) for x, name in ((categories, "categories"), (classes, "classes"))
    )
    for name, x, low, high in (("predictions", predictions, 0, categories - 1), ("labels", labels, -1, classes - 1)):
        ok = isinstance(x, Tensor) and x.dtype == torch.int64
        checks.require(ok, where, name, "int64", checks.shape_of(x))
        if x.numel() and checks.values_visible(x):
            inside = bool(((x >= low) & (x <= high)).all())
            checks.require(inside, where, name, f"in [{low}, {high}]", f"{int(x.min())} to {int(x.max())}")
    alike = labels.shape == predictions.shape
    checks.require(alike, where, "labels", f"of predictions' shape {list(predictions.shape)}", list(labels.shape))
    # One row more, for what is void, so that nothing depends on how many pixels are not.
    cell = torch.where(labels < 0, classes, labels) * categories + predictions
    table = torch.zeros((classes + 1) * categories, dtype=torch.int64, device=cell.device)
    table.scatter_add_(0, cell.flatten(), torch.ones_like(cell).flatten())
    return table.view(classes + 1, categories)[:classes]


def hungarian_miou(
    confusion: Int64[Tensor, "classes categories"],
    *,
    things: Bool[Tensor, " classes"] | None = None,
    mapping: Literal["one-to-one", "majority"] = "one-to-one",
    legacy: bool = False,
) -> SegmentationScore:
    """Mean IoU once categories are named by the classes that share most pixels with them (DenseSiam, section 5.1).

    `one-to-one` pairs each class with at most one category so that the pairs share the most pixels in all; what is left
    over is read as no class. `majority` reads each category as its own most frequent class, for many more categories
    than classes. With `things`, the means of things and of the others, stuff, are over the same IoU as the mean of all.

    `legacy` gives the two as they were published (PiCIE, DenseSiam): blocks of the matrix by the number of the
    category, not by the class, and without what is confused across them. Both can so exceed the mean of all.

    >>> score = hungarian_miou(torch.tensor([[0, 5], [4, 0]]))
    >>> score.miou, score.class_of.tolist()
    (1.0, [1, 0])
    """
    where = "hungarian_miou"
    ok = isinstance(confusion, Tensor) and confusion.dtype == torch.int64 and confusion.ndim == 2
    ok = ok and min(confusion.shape) > 0
    checks.require(ok, where, "confusion", "int64 [classes, categories]", checks.shape_of(confusion))
    table = confusion.cpu().numpy()
    checks.require(bool((table >= 0).all()), where, "confusion", "counts of at least 0", "others")
    classes, categories = table.shape
    known = mapping in ("one-to-one", "majority")
    checks.require(known, where, "mapping", "'one-to-one' or 'majority'", repr(mapping))
    if things is not None:
        ok = isinstance(things, Tensor) and things.dtype == torch.bool and things.shape == (classes,)
        checks.require(ok, where, "things", f"bool [{classes}]", checks.shape_of(things))
    class_of = _majority(table) if mapping == "majority" else _one_to_one(table)

    # Each true class by the class that is read: the categories of one name are added up.
    named = np.zeros((classes, classes + 1), dtype=np.int64)  # the last column is what is read as none
    np.add.at(named.T, class_of, table.T)
    iou = _iou(named[:, :classes], there=named.sum(axis=1))
    pixels = int(table.sum())
    accuracy = int(np.trace(named)) / pixels if pixels else math.nan
    of_things = of_stuff = math.nan
    if legacy:
        checks.require(mapping == "one-to-one", where, "mapping", "'one-to-one' with legacy", repr(mapping))
        checks.require(classes == categories, where, "confusion", "square with legacy", checks.shape_of(confusion))
        checks.require(things is not None, where, "things", "given with legacy", "None")
        assert things is not None
        count = int(things.sum())
        first = bool(things[:count].all())
        checks.require(first, where, "things", "the first classes with legacy", things.tolist())
        moved = table[class_of]  # each class on the row of its category
        of_things, of_stuff = (_mean(_iou(moved[block, block])) for block in (slice(count), slice(count, None)))
    elif things is not None:
        mine = things.cpu().numpy()
        of_things, of_stuff = _mean(iou[mine]), _mean(iou[~mine])
    return SegmentationScore(
        _mean(iou), of_things, of_stuff, accuracy, torch.from_numpy(iou), torch.from_numpy(class_of)
    )


def _iou(square: npt.NDArray[np.int64], there: npt.NDArray[np.int64] | None = None) -> npt.NDArray[np.float64]:
    """TP / (row + column - TP) of each class, NaN for 0 / 0; `there` are the rows' sums where they hold more."""
    hit = square.diagonal()
    union = (square.sum(axis=1) if there is None else there) + square.sum(axis=0) - hit
    return np.where(union > 0, hit / np.maximum(union, 1), np.nan)


def _mean(values: npt.NDArray[np.float64]) -> float:
    kept = values[~np.isnan(values)]
    return float(kept.mean()) if len(kept) else math.nan


def _majority(table: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The most frequent class of each category, the first of equals; -1 where there is none."""
    return np.where(table.sum(axis=0) > 0, table.argmax(axis=0), -1).astype(np.int64)


def _one_to_one(table: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The class of each category, -1 for none, that pairs the most pixels: the Hungarian method, row by row.

    Each row looks for the cheapest path of reduced costs to a free column; the prices u and v keep these at least 0.
    """
    if table.shape[0] > table.shape[1]:
        owner = _one_to_one(np.ascontiguousarray(table.T))  # the category of each class
        class_of = np.full(table.shape[1], -1, dtype=np.int64)
        class_of[owner[owner >= 0]] = np.flatnonzero(owner >= 0)
        return class_of
    cost = table.max() - table  # whole numbers, so that no count is too large to be told from its neighbour
    rows, columns = cost.shape
    far = np.iinfo(np.int64).max
    u, v = np.zeros(rows, dtype=np.int64), np.zeros(columns, dtype=np.int64)
    row_of = np.full(columns, -1, dtype=np.int64)
    for start in range(rows):
        distance, before = np.full(columns, far), np.full(columns, -1, dtype=np.int64)
        seen = np.zeros(columns, dtype=np.bool_)
        row, column, along = start, -1, 0
        while True:
            reduced = along + cost[row] - u[row] - v
            nearer = ~seen & (reduced < distance)
            distance[nearer], before[nearer] = reduced[nearer], column
            column = int(np.where(seen, far, distance).argmin())
            along, seen[column] = int(distance[column]), True
            if row_of[column] < 0:
                break
            row = int(row_of[column])
        walked = seen & (row_of >= 0)
        u[start] += along
        u[row_of[walked]] += along - distance[walked]
        v[seen] += distance[seen] - along
        while column >= 0:  # back along the path, each row takes the column it reached
            earlier = int(before[column])
            row_of[column] = start if earlier < 0 else row_of[earlier]
            column = earlier
    return row_of

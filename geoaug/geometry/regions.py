"""Regions of the source seen through a view: an n x n grid, boxes, or an external label map (PLRC, section 3.2).

A region is visible in a view if it holds the centre of at least one cell of the view's (h, w) map. A point's region
follows from its source coordinates, so no mask picture is cropped or resized.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64, Integer
from torch import Tensor

from . import boxes as box_algebra
from . import checks, grids
from .affine import AxisAffine
from .rng import Key


def _axis_region(coordinate: Tensor, n: int) -> Tensor:
    """Cell 0 to n-1 of coordinates along one axis; 1 belongs to the last cell, -1 outside [0, 1]."""
    cell = (coordinate * n).floor().clamp(max=n - 1).to(torch.int64)
    return torch.where((coordinate >= 0) & (coordinate <= 1), cell, -1)


def region_of(points_in_source: Float[Tensor, "*batch 2"], n: int) -> Int64[Tensor, "*batch"]:
    """The cell, row-major from 0, of the n x n grid on the source that each point lies in; -1 outside the source.

    >>> region_of(torch.tensor([[399 / 400, 199 / 200], [100 / 400, 0.0], [1.0, 1.0], [-0.1, 0.5]]), 4)
    tensor([15,  1, 15, -1])
    """
    points = checks.floats(points_in_source, 2, "region_of", "points_in_source", "floating points [..., 2]")
    n = checks.index(n, 1, 2**15, "region_of", "n")
    x, y = _axis_region(points[..., 0], n), _axis_region(points[..., 1], n)
    return torch.where((x >= 0) & (y >= 0), y * n + x, -1)


def _axes_seen(a: AxisAffine, n: int, size: tuple[int, int], where: str) -> tuple[Tensor, Tensor]:
    """The grid column of each column [B, w] and the grid row of each row [B, h] of a view's map."""
    checks.require(isinstance(a, AxisAffine) and a.scale.ndim == 2, where, "a", "maps [B]", type(a).__name__)
    n = checks.index(n, 1, 2**15, where, "n")
    h, w = checks.pair_of_sizes(size, where, "size")
    source_from_view, device = ~a, a.scale.device
    x = source_from_view(grids.cell_centers(1, w, device=device))[..., 0]
    y = source_from_view(grids.cell_centers(h, 1, device=device))[..., 1]
    return _axis_region(x, n), _axis_region(y, n)


def label_map(a: AxisAffine, n: int, size: tuple[int, int]) -> Int64[Tensor, "B h w"]:
    """The grid region under each cell centre of a view's (h, w) map; a is view_from_source [B].

    >>> label_map(AxisAffine.identity(1), 2, (2, 4))
    tensor([[[0, 0, 1, 1],
             [2, 2, 3, 3]]])
    """
    columns, rows = _axes_seen(a, n, size, "label_map")
    columns, rows = columns[:, None, :], rows[:, :, None]
    return torch.where((columns >= 0) & (rows >= 0), rows * n + columns, -1)


def visible(a: AxisAffine, n: int, size: tuple[int, int]) -> Bool[Tensor, "B regions"]:
    """Which of the n*n grid regions hold a cell centre of a view's (h, w) map.

    >>> visible(AxisAffine.sending(torch.tensor([[0.0, 0.0, 0.5, 1.0]])), 2, (7, 7))
    tensor([[ True, False,  True, False]])
    """
    columns, rows = _axes_seen(a, n, size, "visible")
    cells = torch.arange(n, device=columns.device)
    has_column, has_row = ((seen[:, None] == cells[:, None]).any(-1) for seen in (columns, rows))  # [B, n]
    return (has_row[:, :, None] & has_column[:, None, :]).flatten(1)


def lookup(
    label_map: Integer[Tensor, "B H W"], points_in_source: Float[Tensor, "B *points 2"]
) -> Int64[Tensor, "B *points"]:
    """Nearest label of a map of the source, at any resolution, under each point; -1 outside the source.

    >>> lookup(torch.tensor([[[5, 6], [7, 8]]]), torch.tensor([[[0.9, 0.1], [0.2, 1.0], [1.2, 0.5]]]))
    tensor([[ 6,  7, -1]])
    """
    points = checks.floats(points_in_source, 2, "lookup", "points_in_source", "floating points [B, ..., 2]")
    _check_label_map(label_map, len(points), "lookup")
    label_map = label_map.to(torch.int64)  # an unsigned map could not hold -1
    height, width = label_map.shape[1:]
    column, row = _axis_region(points[..., 0], width), _axis_region(points[..., 1], height)
    inside = (column >= 0) & (row >= 0)
    flat = torch.where(inside, row * width + column, 0).flatten(1)
    return torch.where(inside, label_map.flatten(1).gather(1, flat).reshape(inside.shape), -1)


def _check_label_map(label_map: Tensor, batch: int, where: str) -> None:
    ok = (
        isinstance(label_map, Tensor)
        and label_map.ndim == 3
        and not label_map.is_floating_point()
        and min(label_map.shape[1:]) > 0
    )
    ok = ok and len(label_map) == batch
    checks.require(ok, where, "label_map", f"integers [{batch}, H, W] with H, W >= 1", checks.shape_of(label_map))


def draw_points(
    a: AxisAffine,
    regions: int | Tensor,
    slots: int,
    points: int,
    *,
    key: Key,
    cells: tuple[int, int] = (56, 56),
) -> tuple[Float[Tensor, "B {slots*points} 2"], Int64[Tensor, "B {slots*points}"], Bool[Tensor, "B slots"]]:
    """Regions drawn into slots with repetition, and points drawn inside each as the view a sees it.

    `regions` is n for an n x n grid, boxes [B, K, 4] in source units (ids are their slots; without area: absent), or an
    integer label map [B, H, W] of the source (ids are its labels; negative: void). Slots are uniform over the regions
    visible on the `cells` map of the view. Points are uniform over a grid region's or box's visible rectangle, and over
    the centres of a label's visible cells. Returns points in a's unit coordinates [B, slots*points, 2], their ids
    [B, slots*points] (-1 where nothing is visible), and valid [B, slots].

    >>> where, ids, valid = draw_points(AxisAffine.identity(2), 4, 16, 8, key=Key(0, 0, [1, 2]))
    >>> where.shape, ids.shape, valid.shape
    (torch.Size([2, 128, 2]), torch.Size([2, 128]), torch.Size([2, 16]))
    """
    where = "draw_points"
    checks.require(isinstance(a, AxisAffine) and a.scale.ndim == 2, where, "a", "maps [B]", type(a).__name__)
    slots, points = checks.index(slots, 1, 2**16, where, "slots"), checks.index(points, 1, 2**16, where, "points")
    batch, device = len(a.scale), a.scale.device
    checks.require(isinstance(key, Key), where, "key", "a Key", checks.shape_of(key))
    checks.require(len(key) == batch, where, "key", f"a key of {batch} ids", len(key))
    checks.require(key.ids.device == device, where, "key", f"on {device}", key.ids.device)
    if isinstance(regions, Tensor) and not regions.is_floating_point():
        _check_label_map(regions, batch, where)
        xy, ids, valid = _from_labels(a, regions, slots, points, key, cells)
    else:
        rectangles, seen = _rectangles(a, regions, cells)
        ids, valid = _choose(seen, slots, key)
        box = rectangles.gather(1, ids[..., None].expand(-1, -1, 4))[:, :, None]
        u = key.uniform("points", 2 * slots * points).view(batch, slots, points, 2)
        xy = box[..., :2] + u * (box[..., 2:] - box[..., :2])
    xy = torch.where(valid[..., None, None], xy, 0).flatten(1, 2)
    return xy, torch.where(valid, ids, -1).repeat_interleave(points, dim=1), valid


def _rectangles(a: AxisAffine, regions: int | Tensor, cells: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The visible rectangles [B, R, 4] in the view of grid regions or boxes, and which hold a cell centre [B, R]."""
    if isinstance(regions, Tensor):
        boxes = checks.xyxy(regions, "draw_points", "regions")
        ok = boxes.ndim == 3 and len(boxes) == len(a.scale)
        checks.require(ok, "draw_points", "regions", f"boxes [{len(a.scale)}, K, 4]", checks.shape_of(regions))
        if boxes.shape[1] == 0:  # a row to point at; it has no area and so is never visible
            boxes = boxes.new_zeros(len(boxes), 1, 4)
        rectangles = box_algebra.clip(a.boxes(box_algebra.clip(boxes)))
        h, w = checks.pair_of_sizes(cells, "draw_points", "cells")
        across = checks.on_device((w, h), rectangles)
        first = (rectangles[..., :2] * across - 0.5).ceil()  # first centre at or after the edge
        last = rectangles[..., 2:] * across - 0.5
        return rectangles, (first < last).all(-1)
    n = checks.index(regions, 1, 2**10, "draw_points", "regions")
    corner = grids.cell_centers(n, n, device=a.scale.device) - 0.5 / n
    grid = torch.cat((corner, corner + 1 / n), dim=-1)
    return box_algebra.clip(a.boxes(grid.expand(len(a.scale), -1, 4))), visible(a, n, cells)


def _choose(seen: Tensor, slots: int, key: Key) -> tuple[Tensor, Tensor]:
    """Slots [B, S] uniform over the set entries of seen [B, R]; valid [B, S] is false where none is set."""
    count = seen.sum(dim=1, keepdim=True)
    rank = key.integers("slots", slots, count.clamp(min=1))
    before = seen.cumsum(dim=1)  # set entries up to and including each
    ids = torch.searchsorted(before, rank + 1).clamp(max=seen.shape[1] - 1)
    return ids, (count > 0).expand(-1, slots)


def _from_labels(
    a: AxisAffine, labels: Tensor, slots: int, points: int, key: Key, cells: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Slots over the distinct labels under the view's cells, points over each label's cells."""
    h, w = checks.pair_of_sizes(cells, "draw_points", "cells")
    centers = grids.cell_centers(h, w, device=a.scale.device)
    under = lookup(labels, (~a)(centers))  # [B, h*w]
    ordered, order = under.sort(dim=1, stable=True)
    starts = torch.ones_like(ordered, dtype=torch.bool)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    first, valid = _choose(starts & (ordered >= 0), slots, key)
    ids = ordered.gather(1, first)
    size = torch.searchsorted(ordered, ids, right=True) - first  # cells of the label
    pick = key.integers("points", slots * points, size.clamp(min=1).repeat_interleave(points, dim=1))
    cell = order.gather(1, first.repeat_interleave(points, dim=1) + pick)
    return centers[cell].view(len(a.scale), slots, points, 2), ids, valid

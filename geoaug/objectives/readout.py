"""Features of a map at points and in boxes, both in unit coordinates of the view the map was computed from.

A map of any resolution is read the same way: the centre of column j of w lies at x = (j + 0.5) / w. Coordinates and
interpolation are float32 at least, whatever the features' type, and the result has the features' type.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional

from ..geometry import checks
from .cell_weights import THIN, cell_weights, in_cells

# Float32 coordinates of a side of exactly an edge may come out a few millionths longer.
_EDGE = 1e-5


def _check_features(features: object, where: str) -> Tensor:
    ok = isinstance(features, Tensor) and features.ndim == 4 and features.is_floating_point()
    ok = ok and min(features.shape[2:]) > 0  # type: ignore[attr-defined]
    checks.require(ok, where, "features", "floating maps [B, C, h, w] with h, w >= 1", checks.shape_of(features))
    assert isinstance(features, Tensor)
    return features


def _wide(features: Tensor) -> Tensor:
    """The features in float32, or float64 as they came."""
    return features if features.dtype == torch.float64 else features.float()


def sample_points(
    features: Float[Tensor, "B C h w"],
    points: Float[Tensor, "B P 2"],
    *,
    upsample: int | tuple[int, int] | None = None,
) -> Float[Tensor, "B P C"]:
    """The features at points (x, y), bilinear between cell centres; beyond the outermost centres the border's value.

    With `upsample` they are those of the map after a bilinear resize to that size (PLRC), which is never made: a point
    of it is a mean of the map's own cells.

    >>> features = torch.tensor([[[[10.0, 20.0]]]])
    >>> sample_points(features, torch.tensor([[[0.25, 0.5], [0.5, 0.5], [2.0, 0.5]]])).flatten()
    tensor([10., 15., 20.])
    >>> sample_points(features, torch.tensor([[[0.3125, 0.5]]]), upsample=(1, 8)).flatten()
    tensor([11.2500])
    """
    features = _check_features(features, "sample_points")
    points = checks.floats(points, 2, "sample_points", "points", f"floating points [{len(features)}, P, 2]")
    ok = points.ndim == 3 and len(points) == len(features)
    checks.require(ok, "sample_points", "points", f"floating points [{len(features)}, P, 2]", checks.shape_of(points))
    wide = _wide(features)
    with torch.autocast(features.device.type, enabled=False):
        if upsample is not None:
            tall, across = checks.pair_of_sizes(upsample, "sample_points", "upsample")
            x = _weights(points[..., 0].to(wide.dtype), wide.shape[3], across)  # [B, P, w]
            y = _weights(points[..., 1].to(wide.dtype), wide.shape[2], tall)
            weights = (y[..., None] * x[..., None, :]).flatten(2)  # [B, P, h*w]
            return torch.bmm(weights, wide.flatten(2).mT).to(features.dtype)
        grid = (2 * points - 1).to(wide.dtype)[:, None]  # [B, 1, P, 2], edges at -1 and 1
        read = functional.grid_sample(wide, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return read[:, :, 0].mT.to(features.dtype)  # [B, P, C]


def _weights(at: Tensor, cells: int, fine: int) -> Tensor:
    """What each of the cells of one axis counts [B, P, cells] at points of the axis resized to `fine` cells."""
    own = torch.eye(cells, dtype=at.dtype, device=at.device)[None]
    resized = functional.interpolate(own, fine, mode="linear", align_corners=False)[0]  # [cells, fine]
    place = (at * fine - 0.5).clamp(0, fine - 1)
    far = (place[..., None] - torch.arange(fine, dtype=at.dtype, device=at.device)).abs()  # [B, P, fine]
    return (1 - far).clamp(min=0) @ resized.mT


def roi_features(
    features: Float[Tensor, "B C h w"] | Sequence[Float[Tensor, "B C _ _"]],
    boxes: Float[Tensor, "B K 4"],
    valid: Bool[Tensor, "B K"],
    output_size: int | tuple[int, int],
    *,
    aligned: bool = True,
    sampling_ratio: int = 0,
    level: Int64[Tensor, "B K"] | None = None,
) -> Float[Tensor, "B K C _ _"]:
    """RoIAlign of each slot's box, [B, K, C, o, o]; an invalid slot is 0, whatever its box holds (D3SSL, eq. 1).

    With a list of maps, as a feature pyramid gives, `level` [B, K] names the map each slot reads. `sampling_ratio` 0
    takes as many samples per bin as it spans cells. `aligned=False` is the older law, half a cell off, for comparison.
    Every slot is pooled, so shapes never depend on values, and a batch without any valid slot stays in the graph. One
    cell is a matrix product over the whole map: there, a NaN anywhere in a map reaches all its boxes. No gradient
    reaches the boxes.

    >>> c4 = torch.rand(2, 1024, 14, 14)
    >>> boxes = torch.tensor([0.1, 0.2, 0.6, 0.9]).expand(2, 4, 4)
    >>> roi_features(c4, boxes, torch.ones(2, 4).bool(), 14).shape
    torch.Size([2, 4, 1024, 14, 14])
    """
    where = "roi_features"
    maps = [features] if isinstance(features, Tensor) else list(features)
    checks.require(len(maps) > 0, where, "features", "a map or a list of maps", "an empty list")
    maps = [_check_features(one, where) for one in maps]
    alike = all(one.shape[:2] == maps[0].shape[:2] and one.dtype == maps[0].dtype for one in maps)
    checks.require(alike, where, "features", "maps alike but for their sides", [checks.shape_of(one) for one in maps])
    size = checks.pair_of_sizes(output_size, where, "output_size")
    sampling_ratio = checks.index(sampling_ratio, 0, 2**10, where, "sampling_ratio")
    _check_slots(boxes, valid, len(maps[0]), where)
    if isinstance(features, Tensor):
        checks.require(level is None, where, "level", "None with a single map", checks.shape_of(level))
    else:
        _check_level(level, valid, len(maps), where)

    boxes = torch.where(valid[..., None], boxes, 0)
    checks.ordered(boxes, where, "boxes")
    pooled: Tensor | None = None
    for i, one in enumerate(maps):
        reads = valid if level is None else valid & (level == i)
        read = torch.where(reads[..., None, None, None], _pool(one, boxes, reads, size, aligned, sampling_ratio), 0)
        pooled = read if pooled is None else pooled + read
    assert pooled is not None
    return pooled.to(maps[0].dtype)


def _check_slots(boxes: object, valid: object, batch: int, where: str) -> None:
    ok = isinstance(boxes, Tensor) and boxes.is_floating_point() and boxes.ndim == 3
    ok = ok and boxes.shape[0] == batch and boxes.shape[2] == 4  # type: ignore[attr-defined]
    checks.require(ok, where, "boxes", f"floating unit boxes [{batch}, K, 4]", checks.shape_of(boxes))
    assert isinstance(boxes, Tensor)
    ok = isinstance(valid, Tensor) and valid.dtype == torch.bool and valid.shape == boxes.shape[:2]
    checks.require(ok, where, "valid", f"bool {list(boxes.shape[:2])}", checks.shape_of(valid))


def _check_level(level: Tensor | None, valid: Tensor, count: int, where: str) -> None:
    ok = isinstance(level, Tensor) and level.dtype == torch.int64 and level.shape == valid.shape
    checks.require(ok, where, "level", f"int64 {list(valid.shape)} with a list of maps", checks.shape_of(level))
    assert level is not None
    if checks.values_visible(level):
        inside = bool((((level >= 0) & (level < count)) | ~valid).all())
        checks.require(inside, where, "level", f"in [0, {count - 1}]", "values outside")


def _pool(maps: Tensor, boxes: Tensor, reads: Tensor, size: tuple[int, int], aligned: bool, ratio: int) -> Tensor:
    """All slots on one map, [B, K, C, o, o] in float32 or float64."""
    batch, k = reads.shape
    wide = _wide(maps)
    height, width = maps.shape[2:]
    low, high = in_cells(boxes.to(wide.dtype), height, width)
    # A slot that does not read keeps a box without area: the adaptive law takes no sample, the operator no time.
    high = torch.where(reads[..., None], torch.maximum(high, low + THIN), low)
    if size == (1, 1):  # a mean of the map's cells, so a small matrix product instead of a gather for each channel
        weights = cell_weights(low, high, (height, width), aligned, ratio).detach()  # as the operator does
        with torch.autocast(maps.device.type, enabled=False):
            return torch.bmm(weights, wide.flatten(2).mT)[..., None, None]

    from torchvision.ops import roi_align  # here, since torchvision takes a second to import

    row = torch.arange(batch, device=maps.device, dtype=wide.dtype)[:, None, None].expand(-1, k, 1)
    rois = torch.cat((row, low, high), dim=-1).flatten(0, 1)  # [B*K, 5]
    with torch.autocast(maps.device.type, enabled=False):
        pooled: Tensor = roi_align(wide, rois, size, 1.0, ratio, aligned)
    return pooled.reshape(batch, k, *pooled.shape[1:])


def fpn_level(
    boxes: Float[Tensor, "B K 4"], size: int | tuple[int, int], edges: Sequence[float] = (48, 96, 192)
) -> Int64[Tensor, "B K"]:
    """The pyramid level, 0 the finest, for each box by sqrt(width * height) in pixels of a view of (height, width).

    A side of exactly an edge belongs to the finer level. SoCo's edges for a view of 224: P2, P3, P4, P5.

    >>> fpn_level(torch.tensor([[[0.0, 0.0, 0.2, 0.2], [0.0, 0.0, 1.0, 1.0]]]), (224, 224))
    tensor([[0, 3]])
    """
    boxes = checks.xyxy(boxes, "fpn_level", "boxes")
    height, width = checks.pair_of_sizes(size, "fpn_level", "size")
    rising = len(edges) > 0 and all(a < b for a, b in zip((0.0, *edges), edges, strict=False))
    checks.require(rising, "fpn_level", "edges", "rising and positive", tuple(edges))
    sides = boxes[..., 2:] - boxes[..., :2]
    side = (sides[..., 0] * width * (sides[..., 1] * height)).sqrt()
    over = side[..., None] > checks.on_device([edge * (1 + _EDGE) for edge in edges], side)  # [B, K, edges]
    return over.sum(dim=-1)

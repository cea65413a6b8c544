"""What two views of one image share: overlap boxes, matched boxes, a common grid, dense correspondence.

Everything is batched over images and runs on the device of its input without a host synchronisation. An image whose
views do not overlap keeps its rows and gets `valid = False`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int32
from torch import Tensor

from . import boxes as box_algebra
from . import checks, grids, kernels
from .affine import AxisAffine
from .rng import Key, below, unit

# Two crops that only touch may overlap by rounding of float32; one shared pixel is far more than a millionth of a side.
_TOUCH = 1e-6

Sizes = Sequence[int | Sequence[int]]


class Overlap(NamedTuple):
    """The common rectangle of two views [B, 4], in the source and in each view; zeros where valid [B] is false."""

    in_source: Float[Tensor, "B 4"]
    in_a: Float[Tensor, "B 4"]
    in_b: Float[Tensor, "B 4"]
    valid: Bool[Tensor, " B"]


def _check_pair(a: AxisAffine, b: AxisAffine, where: str) -> None:
    for name, view in (("a", a), ("b", b)):
        if not isinstance(view, AxisAffine):
            raise TypeError(f"{where}: {name} must be an AxisAffine [B] view_from_source, got {type(view).__name__}")
        checks.require(view.scale.ndim == 2, where, name, "maps [B]", f"maps {list(view.batch_shape)}")
    checks.require(a.scale.shape == b.scale.shape, where, "b", f"maps {list(a.batch_shape)}", list(b.batch_shape))
    checks.require(a.scale.device == b.scale.device, where, "b", f"on {a.scale.device}", b.scale.device)


def _view_in_source(view_from_source: AxisAffine) -> Tensor:
    """The source rectangle [B, 4] that each view shows, un-mirrored."""
    source_from_view = ~view_from_source
    origin, far = source_from_view.shift, source_from_view.scale + source_from_view.shift
    return torch.cat((torch.minimum(origin, far), torch.maximum(origin, far)), dim=-1)


def overlap(a: AxisAffine, b: AxisAffine) -> Overlap:
    """The rectangle two views share; a and b are view_from_source maps [B].

    >>> a = AxisAffine.sending(torch.tensor([[0.0, 0.0, 0.5, 1.0]]))
    >>> b = AxisAffine.sending(torch.tensor([[0.25, 0.0, 1.0, 1.0]]))
    >>> overlap(a, b).in_a
    tensor([[0.5000, 0.0000, 1.0000, 1.0000]])
    """
    _check_pair(a, b, "overlap")
    box_a, box_b = _view_in_source(a), _view_in_source(b)
    low, high = torch.maximum(box_a[:, :2], box_b[:, :2]), torch.minimum(box_a[:, 2:], box_b[:, 2:])
    valid = (high - low > _TOUCH).all(-1)
    in_source = torch.where(valid[:, None], torch.cat((low, high), dim=-1), 0)
    # Zeros are mapped to finite numbers, then masked again, so that nothing undefined is ever made.
    in_a, in_b = (torch.where(valid[:, None], view.boxes(in_source[:, None])[:, 0], 0) for view in (a, b))
    return Overlap(in_source, in_a, in_b, valid)


def _coarser_pixels(shared: Overlap, sizes: Sizes, where: str) -> Int32[Tensor, "B 2"]:
    """(width, height) of the overlap in whole pixels of the coarser view: per axis the one with fewer across it."""
    pair = isinstance(sizes, Sequence) and len(sizes) == 2
    checks.require(pair, where, "sizes", "((h_a, w_a), (h_b, w_b))", sizes)
    extents = []
    for box, size in zip((shared.in_a, shared.in_b), sizes, strict=True):
        height, width = checks.pair_of_sizes(size, where, "sizes")
        extents.append((box[:, 2:] - box[:, :2]) * checks.on_device((width, height), box))
    return torch.minimum(*extents).round().to(torch.int32)


def matched_boxes(
    a: AxisAffine,
    b: AxisAffine,
    k: int,
    *,
    sizes: Sizes,
    key: Key,
    min_size: int = 32,
    max_iou: float = 0.5,
    law: Literal["grid", "uniform"] = "grid",
    on_fail: Literal["keep", "drop"] = "keep",
) -> tuple[Float[Tensor, "B k 4"], Float[Tensor, "B k 4"], Bool[Tensor, "B k"]]:
    """k boxes per image, the same source rectangle seen in both views (SCRL, section 3.1); unit boxes and valid [B, k].

    The overlap is measured in whole pixels of the coarser view and must exceed min_size there on both axes. `grid` cuts
    each axis into 1 to size // min_size cells and draws inside one of them, `uniform` is the paper's eq. 1. A candidate
    is taken if its IoU with every earlier box is under max_iou (1 takes all); after 50 the last one is kept, or the
    slot is invalid with `on_fail="drop"`. The same boxes on a CPU (drawn lazily) and on a device (vectorised).

    >>> whole = AxisAffine.identity(3)
    >>> key = Key(0, 0, [1, 2, 3])
    >>> boxes_a, boxes_b, valid = matched_boxes(whole, whole, 10, sizes=((224, 224), (224, 224)), key=key)
    >>> boxes_a.shape, bool((boxes_a == boxes_b).all()), bool(valid.all())
    (torch.Size([3, 10, 4]), True, True)
    """
    where = "matched_boxes"
    _check_pair(a, b, where)
    k = checks.index(k, 1, 2**20, where, "k")
    least = checks.index(min_size, 1, 2**24, where, "min_size")
    checks.require(0.0 < max_iou <= 1.0, where, "max_iou", "in (0, 1]", max_iou)
    checks.require(law in ("grid", "uniform"), where, "law", "'grid' or 'uniform'", repr(law))
    checks.require(on_fail in ("keep", "drop"), where, "on_fail", "'keep' or 'drop'", repr(on_fail))
    checks.require(isinstance(key, Key), where, "key", "a Key", checks.shape_of(key))
    shared = overlap(a, b)
    checks.require(len(key) == len(shared.valid), where, "key", f"a key of {len(shared.valid)} ids", len(key))
    checks.require(key.ids.device == shared.valid.device, where, "key", f"on {shared.valid.device}", key.ids.device)

    pixels = _coarser_pixels(shared, sizes, where)
    usable = shared.valid & (pixels > least).all(-1)
    pixels = torch.where(usable[:, None], pixels, least)
    draw = _draw_lazily if pixels.device.type == "cpu" else _draw_all
    drawn, valid = draw(pixels, usable, key, k, least, float(max_iou), law == "grid", on_fail == "keep")

    low, extent = shared.in_source[:, None, :2], (shared.in_source[:, 2:] - shared.in_source[:, :2])[:, None]
    shares = drawn / pixels.repeat(1, 2)[:, None]
    in_source = torch.cat((low + shares[..., :2] * extent, low + shares[..., 2:] * extent), dim=-1)
    boxes_a, boxes_b = (torch.where(valid[..., None], view.boxes(in_source), 0) for view in (a, b))
    return boxes_a, boxes_b, valid


def _draw_lazily(
    pixels: Tensor, usable: Tensor, key: Key, k: int, least: int, most: float, grid: bool, keep: bool
) -> tuple[Tensor, Tensor]:
    """Boxes [B, k, 4] in pixels of the overlap, one candidate after another (CPU)."""
    boxes, valid = np.zeros((len(key), k, 4), dtype=np.float32), np.zeros((len(key), k), dtype=np.bool_)
    tag = key.tag("boxes")
    kernels.draw_boxes(
        pixels.numpy(), usable.numpy(), key.ids.numpy(), tag, key.seed, key.epoch,
        least, np.float32(most), grid, keep, boxes, valid,
    )  # fmt: skip
    return torch.from_numpy(boxes).nan_to_num(0.0), torch.from_numpy(valid)


def _grid_sides(size: Tensor, least: int, words: Tensor) -> tuple[Tensor, Tensor]:
    """One axis of the grid law for all candidates; words [..., 8]."""
    divisions = 1 + below(words[..., 0], words[..., 1], size // least)
    cell = size // divisions
    start = (below(words[..., 2], words[..., 3], divisions) * size) // divisions
    length = least + below(words[..., 4], words[..., 5], cell - least + 1)
    start = start + below(words[..., 6], words[..., 7], cell - length + 1)
    return start.to(torch.float32), (start + length).to(torch.float32)


def _uniform_sides(size: Tensor, least: int, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    span = size.to(torch.float32)
    length = least + u * (span - least)
    start = v * (span - length)
    return start, start + length


def _candidates(pixels: Tensor, key: Key, slots: range, least: int, grid: bool) -> Tensor:
    """All candidates [B, slots, 50, 4] of some slots, in pixels of the overlap."""
    tries = kernels.CANDIDATES
    words = key.words("boxes", 4 * tries * len(slots), start=4 * tries * slots.start)
    words = words.unflatten(1, (len(slots), tries, 16))
    width, height = (pixels[:, axis, None, None].to(torch.int64) for axis in (0, 1))
    if grid:
        sides = (_grid_sides(width, least, words[..., :8]), _grid_sides(height, least, words[..., 8:]))
    else:
        u = unit(words[..., :4])
        sides = (
            _uniform_sides(width, least, u[..., 0], u[..., 1]),
            _uniform_sides(height, least, u[..., 2], u[..., 3]),
        )
    (x0, x1), (y0, y1) = sides
    return torch.stack((x0, y0, x1, y1), dim=-1)


def _draw_all(
    pixels: Tensor, usable: Tensor, key: Key, k: int, least: int, most: float, grid: bool, keep: bool
) -> tuple[Tensor, Tensor]:
    """The same boxes with all 50 candidates of a slot at once (any device, no synchronisation).

    A GPU spends its time on launches here, so only what hangs on earlier boxes is done slot by slot.
    """
    tries = kernels.CANDIDATES
    boxes = pixels.new_zeros((len(key), k, 4), dtype=torch.float32)
    areas, valid = boxes.new_zeros((len(key), k)), torch.zeros_like(boxes[..., 0], dtype=torch.bool)
    # The first that is taken has the highest rank, then comes the last of all; none is alike.
    rank = torch.arange(2 * tries, 0, -2, device=pixels.device)
    last = (torch.arange(tries, device=pixels.device) == tries - 1).to(rank.dtype)
    limit = torch.tensor(most, dtype=torch.float32)
    chunk = max(1, 2**20 // max(1, len(key) * tries))  # slots whose candidates are made together: some 100 MB
    for start in range(0, k, chunk):
        slots = range(start, min(start + chunk, k))
        every = _candidates(pixels, key, slots, least, grid)
        sizes = box_algebra.area(every)
        for slot in slots:
            candidates, area = every[:, slot - start], sizes[:, slot - start]
            if most < 1.0 and slot > 0:
                c, e, earlier = candidates[:, :, None], boxes[:, None, :slot], areas[:, None, :slot]
                sides = (torch.minimum(c[..., 2:], e[..., 2:]) - torch.maximum(c[..., :2], e[..., :2])).clamp(min=0)
                inter = sides[..., 0] * sides[..., 1]
                union = area[:, :, None] + earlier - inter
                accepted = ((inter < limit * union) | (earlier <= 0)).all(-1)
                best, chosen = torch.where(accepted, rank, last).max(dim=1, keepdim=True)
            else:
                best, chosen = rank[:1].expand(len(key), 1), torch.zeros_like(valid[:, :1], dtype=torch.int64)
            took = (best[:, 0] > 1) | keep
            valid[:, slot] = took
            boxes[:, slot] = candidates.gather(1, chosen[..., None].expand(-1, -1, 4))[:, 0] * took[:, None]
            areas[:, slot] = area.gather(1, chosen)[:, 0] * took
    valid = valid & usable[:, None]
    return boxes * valid[..., None], valid


def overlap_grid(
    a: AxisAffine, b: AxisAffine, k: int, *, sizes: Sizes | None = None, min_size: int = 0
) -> tuple[Float[Tensor, "B points 2"], Float[Tensor, "B points 2"], Bool[Tensor, "B points"]]:
    """The centres of k x k cells of the overlap, in both views (DenseSiam, section 3.2); valid [B, k*k].

    Point p of both views is the same source point; rows run down the source. With min_size, the overlap must exceed it
    on both axes in whole pixels of the coarser view.

    >>> points_a, points_b, valid = overlap_grid(AxisAffine.identity(2), AxisAffine.identity(2), 7)
    >>> points_a.shape, valid.shape
    (torch.Size([2, 49, 2]), torch.Size([2, 49]))
    """
    _check_pair(a, b, "overlap_grid")
    k = checks.index(k, 1, 2**12, "overlap_grid", "k")
    min_size = checks.index(min_size, 0, 2**24, "overlap_grid", "min_size")
    shared = overlap(a, b)
    valid = shared.valid
    if min_size > 0:
        checks.require(sizes is not None, "overlap_grid", "sizes", "given when min_size is", sizes)
        assert sizes is not None
        valid = valid & (_coarser_pixels(shared, sizes, "overlap_grid") > min_size).all(-1)
    low, high = shared.in_source[:, None, :2], shared.in_source[:, None, 2:]
    points = low + grids.cell_centers(k, k, device=low.device) * (high - low)  # [B, k*k, 2]
    points_a, points_b = (torch.where(valid[:, None, None], view(points), 0) for view in (a, b))
    return points_a, points_b, valid[:, None].expand(-1, k * k).clone()


def correspond(
    a: AxisAffine, b: AxisAffine, size: tuple[int, int]
) -> tuple[Float[Tensor, "B cells 2"], Bool[Tensor, "B cells"]]:
    """Where each of the h x w cell centres of view a lies in view b; valid iff 0 <= x, y < 1 there.

    >>> points_in_b, valid = correspond(AxisAffine.identity(2), AxisAffine.identity(2), (7, 7))
    >>> points_in_b.shape, bool(valid.all())
    (torch.Size([2, 49, 2]), True)
    """
    _check_pair(a, b, "correspond")
    h, w = checks.pair_of_sizes(size, "correspond", "size")
    points = (b @ ~a)(grids.cell_centers(h, w, device=a.scale.device))
    return points, ((points >= 0) & (points < 1)).all(-1)

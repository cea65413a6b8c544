"""Which proposals to use: filters of one image's boxes (numpy), and the choice of k boxes for a batch (torch).

The filters take boxes uint16 [n, 4], xyxy source pixels with exclusive edges, and keep their order. `choose` takes and
gives unit coordinates of the source and runs on its inputs' device without a host synchronisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ..geometry import boxes as box_algebra
from ..geometry import checks
from ..geometry.affine import AxisAffine
from ..geometry.rng import Key

Boxes = npt.NDArray[np.uint16]  # [n, 4]

# Float32 coordinates of a view err by far less, and two pixels or shares that differ at all differ by far more: a box
# of exactly min_side pixels, or all visible, is eligible whatever the rounding.
_PIXEL_SLACK, _SHARE_SLACK = 1e-3, 1e-5
_TOUCH = 1e-6  # as in `overlap`: views that share less of the source's side do not overlap


def _checked(boxes: Any, where: str) -> Boxes:
    ok = isinstance(boxes, np.ndarray) and boxes.dtype == np.uint16 and boxes.ndim == 2 and boxes.shape[1] == 4
    got = f"{boxes.dtype} {list(boxes.shape)}" if isinstance(boxes, np.ndarray) else type(boxes).__name__
    checks.require(ok, where, "boxes", "uint16 [n, 4] (x0, y0, x1, y1)", got)
    ordered = bool((boxes[:, 2:] > boxes[:, :2]).all())
    checks.require(ordered, where, "boxes", "boxes with pixels, x0 < x1 and y0 < y1", "others")
    known: Boxes = boxes
    return known


def distinct(boxes: Boxes) -> Boxes:
    """Each rectangle once, where it came first.

    >>> distinct(np.array([[0, 0, 9, 9], [1, 1, 5, 5], [0, 0, 9, 9]], dtype=np.uint16)).tolist()
    [[0, 0, 9, 9], [1, 1, 5, 5]]
    """
    boxes = _checked(boxes, "distinct")
    _, first = np.unique(boxes, axis=0, return_index=True)
    return boxes[np.sort(first)]


def soco_filter(boxes: Boxes, size: Sequence[int]) -> Boxes:
    """SoCo's filter "ratio3size0308" of an image of size (height, width), with its two fallbacks.

    Kept: sides of at least 32 pixels, 1/3 <= w/h <= 3, and .3 <= sqrt(w h) / sqrt(W H) <= .8. Where nothing is left,
    the last rule is dropped; where nothing is left still, that of the ratio too. w and h are those of SoCo's own
    rectangles, which are one pixel short (x1 - x0 - 1), so that the same boxes pass: ours need 33 pixels a side.

    >>> soco_filter(np.array([[0, 0, 33, 33], [0, 0, 32, 99]], dtype=np.uint16), (100, 100)).tolist()
    [[0, 0, 33, 33]]
    """
    boxes = _checked(boxes, "soco_filter")
    height, width = checks.pair_of_sizes(size, "soco_filter", "size")
    inside = bool((boxes[:, 2:] <= (width, height)).all())
    checks.require(inside, "soco_filter", "boxes", f"inside {width} x {height}", "others")
    w, h = (boxes[:, 2:].astype(np.int64) - boxes[:, :2] - 1).T
    large = (w >= 32) & (h >= 32)
    ratio = w / np.maximum(h, 1)
    share = np.sqrt(w * h) / np.sqrt(width * height)  # as SoCo has it, so that its rounding decides at the limits
    square = large & (ratio >= 1 / 3) & (ratio <= 3)
    rules = (square & (share >= 0.3) & (share <= 0.8), square, large)
    return np.ascontiguousarray(boxes[next((kept for kept in rules if kept.any()), large)])


def nms(boxes: Boxes, max_iou: float = 0.5) -> Boxes:
    """Of boxes in order of rank, those whose IoU with every better one that is kept is at most max_iou.

    >>> nms(np.array([[0, 0, 10, 10], [0, 0, 10, 9], [20, 0, 30, 10]], dtype=np.uint16)).tolist()
    [[0, 0, 10, 10], [20, 0, 30, 10]]
    """
    boxes = _checked(boxes, "nms")
    checks.require(0.0 <= max_iou <= 1.0, "nms", "max_iou", "in [0, 1]", max_iou)
    edges = boxes.astype(np.int64)
    areas = (edges[:, 2] - edges[:, 0]) * (edges[:, 3] - edges[:, 1])
    left, kept = np.arange(len(boxes)), []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(best)
        sides = np.minimum(edges[best, 2:], edges[left, 2:]) - np.maximum(edges[best, :2], edges[left, :2])
        common = np.maximum(sides, 0).prod(axis=1)
        left = left[common <= max_iou * (areas[best] + areas[left] - common)]
    return boxes[np.array(kept, dtype=np.int64)]


def top_k(boxes: Boxes, k: int, scores: npt.NDArray[np.generic] | None = None) -> Boxes:
    """The k boxes of the highest scores, best first and equal ones in their order; without scores the first k.

    >>> top_k(np.array([[0, 0, 1, 1], [0, 0, 2, 2]], dtype=np.uint16), 1, np.array([0.5, 0.7])).tolist()
    [[0, 0, 2, 2]]
    """
    boxes = _checked(boxes, "top_k")
    k = checks.index(k, 0, 2**31, "top_k", "k")
    if scores is None:
        return boxes[:k]
    scores = np.asarray(scores)
    ok = scores.shape == (len(boxes),) and not np.isnan(scores).any()
    checks.require(ok, "top_k", "scores", f"a number for each of {len(boxes)} boxes", list(scores.shape))
    worst_first = np.argsort(scores[::-1], kind="stable")
    return boxes[(len(boxes) - 1 - worst_first[::-1])[:k]]


def choose(
    boxes: Float[Tensor, "B M 4"],
    valid: Bool[Tensor, "B M"],
    k: int,
    views: Sequence[AxisAffine],
    sizes: Sequence[int | Sequence[int]],
    *,
    key: Key,
    min_side: float = 16,
    min_visible: float = 0.3,
) -> tuple[Float[Tensor, "B k 4"], Int64[Tensor, "B k"], Bool[Tensor, " B"]]:
    """k boxes of each image that every view shows well, the slots they came from, and where there was none.

    Eligible are valid boxes whose clipped sides are at least min_side pixels and whose visible share is at least
    min_visible in every view (view_from_source maps [B], sizes one (h, w) each). k of them are drawn without
    repetition; where there are fewer, all come once and the rest is drawn again among them. Boxes stay as they are, in
    source units and unclipped. An image without an eligible box gets the intersection of the views, or the first view
    where that is empty, with slot -1 and fallback set. The first slots of a choice are the choice of fewer.

    >>> boxes = torch.tensor([[[0.1, 0.1, 0.6, 0.6], [0.0, 0.0, 0.01, 0.01]]])
    >>> whole = AxisAffine.identity(1)
    >>> choose(boxes, torch.tensor([[True, True]]), 2, [whole], [224], key=Key(0, 0, [7]))[1:]
    (tensor([[0, 0]]), tensor([False]))
    """
    where = "choose"
    boxes = checks.xyxy(boxes, where, "boxes")
    checks.require(boxes.ndim == 3, where, "boxes", "boxes [B, M, 4]", checks.shape_of(boxes))
    batch, slots = boxes.shape[:2]
    ok = isinstance(valid, Tensor) and valid.dtype == torch.bool and valid.shape == (batch, slots)
    checks.require(ok, where, "valid", f"bool [{batch}, {slots}]", checks.shape_of(valid))
    k = checks.index(k, 0, 2**20, where, "k")
    checks.require(isinstance(key, Key), where, "key", "a Key", checks.shape_of(key))
    checks.require(len(key) == batch, where, "key", f"a key of {batch} ids", len(key))
    for name, device in (("valid", valid.device), ("key", key.ids.device)):
        checks.require(device == boxes.device, where, name, f"on {boxes.device}", device)
    checks.require(0 <= min_side < 2**24, where, "min_side", "pixels, at least 0", min_side)
    checks.require(0.0 <= min_visible <= 1.0, where, "min_visible", "in [0, 1]", min_visible)

    maps, sides = _stacked(boxes, views, sizes)
    eligible = valid & _seen(boxes, maps, sides, float(min_side), float(min_visible))
    whole = _shown_by_all(maps)
    count = eligible.sum(dim=1, keepdim=True)  # [B, 1]
    if slots == 0:  # a slot to point at; none is eligible
        boxes, eligible = boxes.new_zeros(batch, 1, 4), eligible.new_zeros(batch, 1)
    draws = torch.where(eligible, key.uniform("choose", eligible.shape[1]), 2.0)
    order = draws.argsort(dim=1, stable=True)  # eligible slots first, in the order they are drawn
    place = torch.arange(k, device=boxes.device).expand(batch, k)
    again = key.integers("choose again", k, count.clamp(min=1))
    slot = order.gather(1, torch.where(place < count, place, again))
    none = count == 0
    chosen = boxes.gather(1, slot[..., None].expand(-1, -1, 4))
    return torch.where(none[..., None], whole[:, None], chosen), torch.where(none, -1, slot), none[:, 0]


def _stacked(boxes: Tensor, views: Sequence[AxisAffine], sizes: Sequence[Any]) -> tuple[AxisAffine, Tensor]:
    """The maps of all views as one of batch [B, V], and the views' sizes [V, 1, 2] (width, height)."""
    where, batch = "choose", len(boxes)
    pairs = isinstance(views, Sequence) and isinstance(sizes, Sequence) and 0 < len(views) == len(sizes)
    checks.require(pairs, where, "sizes", "one (h, w) for each of at least one view", sizes)
    for view in views:
        ok = isinstance(view, AxisAffine) and view.scale.shape == (batch, 2)
        got = list(view.scale.shape[:-1]) if isinstance(view, AxisAffine) else type(view).__name__
        checks.require(ok, where, "views", f"AxisAffine maps [{batch}]", got)
        checks.require(view.scale.device == boxes.device, where, "views", f"on {boxes.device}", view.scale.device)
    sides = [side for size in sizes for side in reversed(checks.pair_of_sizes(size, where, "sizes"))]
    maps = (torch.stack([getattr(view, name) for view in views], dim=1) for name in ("scale", "shift"))
    return AxisAffine(*maps), checks.on_device(sides, boxes).view(-1, 1, 2)


def _seen(boxes: Tensor, views: AxisAffine, sizes: Tensor, min_side: float, share: float) -> Tensor:
    """Which boxes [B, M] every view of views [B, V] shows with sides of min_side pixels and a share of their area."""
    in_view = views.boxes(boxes[:, None])  # [B, V, M, 4]
    clipped = box_algebra.clip(in_view)
    sides = (clipped[..., 2:] - clipped[..., :2]) * sizes
    seen = (sides >= min_side - _PIXEL_SLACK) & (sides > 0)  # a corner or an edge is no box, whatever is asked for
    shown = box_algebra.visible_fraction(in_view) >= share - _SHARE_SLACK
    return (seen.all(dim=-1) & shown).all(dim=1)


def _shown_by_all(views: AxisAffine) -> Tensor:
    """The source rectangle [B, 4] that all views [B, V] show, or that of the first where they have none in common."""
    unit = checks.on_device((0.0, 0.0, 1.0, 1.0), views.scale)
    shown = (~views).boxes(unit.expand(*views.batch_shape, 1, 4))[..., 0, :]  # [B, V, 4]
    low, high = shown[..., :2].amax(dim=1), shown[..., 2:].amin(dim=1)
    common = (high - low > _TOUCH).all(dim=-1, keepdim=True)
    return torch.where(common, torch.cat((low, high), dim=-1), shown[:, 0])

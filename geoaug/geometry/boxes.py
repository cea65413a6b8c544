"""Boxes xyxy [..., 4] with continuous edges; every other format lives in a function named for it.

Unit coordinates of an image or view unless the name says pixels. Nothing here clips unless it is called `clip`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Num
from torch import Tensor

from . import checks


def area(boxes: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch"]:
    """Width times height.

    >>> area(torch.tensor([[0.0, 0.0, 0.5, 0.2]]))
    tensor([0.1000])
    """
    boxes = checks.xyxy(boxes, "area", "boxes")
    sides = boxes[..., 2:] - boxes[..., :2]
    return sides[..., 0] * sides[..., 1]


def clip(boxes: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch 4"]:
    """The part of each box inside the unit square; a box outside it becomes an edge or corner without area."""
    return checks.xyxy(boxes, "clip", "boxes").clamp(0.0, 1.0)


def intersect(a: Float[Tensor, "*#batch 4"], b: Float[Tensor, "*#batch 4"]) -> Float[Tensor, "*#batch 4"]:
    """The common part of boxes that broadcast against each other; without area where they do not overlap."""
    a, b = checks.xyxy(a, "intersect", "a"), checks.xyxy(b, "intersect", "b")
    checks.same_batch(a.shape[:-1], b.shape[:-1], "intersect", "b")
    low = torch.maximum(a[..., :2], b[..., :2])
    high = torch.minimum(a[..., 2:], b[..., 2:])
    return torch.cat((low, torch.maximum(low, high)), dim=-1)


def iou(a: Float[Tensor, "*#batch N 4"], b: Float[Tensor, "*#batch M 4"]) -> Float[Tensor, "*#batch N M"]:
    """Intersection over union of every box of a with every box of b; 0 where the union is empty.

    >>> iou(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([[0.0, 0.0, 0.5, 1.0], [2.0, 2.0, 3.0, 3.0]]))
    tensor([[0.5000, 0.0000]])
    """
    for name, boxes in (("a", a), ("b", b)):
        checks.require(boxes.ndim >= 2, "iou", name, "boxes [*batch, N, 4]", checks.shape_of(boxes))
    checks.same_batch(a.shape[:-2], b.shape[:-2], "iou", "b")
    common = area(intersect(a[..., :, None, :], b[..., None, :, :]))
    union = area(a)[..., :, None] + area(b)[..., None, :] - common
    return torch.where(union > 0, common / torch.where(union > 0, union, 1), 0)


def visible_fraction(boxes: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch"]:
    """The share of each box's area that lies inside the unit square; 0 for a box without area.

    >>> visible_fraction(torch.tensor([[-0.5, 0.0, 0.5, 1.0]]))
    tensor([0.5000])
    """
    whole = area(boxes)
    return torch.where(whole > 0, area(clip(boxes)) / torch.where(whole > 0, whole, 1), 0)


def _sides(size: Sequence[int] | Num[Tensor, "*batch 2"], like: Tensor, where: str) -> Tensor:
    """(height, width) as divisors (w, h, w, h) that broadcast against boxes [*batch, K, 4] or [K, 4]."""
    if isinstance(size, Tensor):
        checks.require(size.shape[-1:] == (2,), where, "size", "[*batch, 2] (height, width)", checks.shape_of(size))
        if checks.values_visible(size):
            legal = bool(((size >= 1) & torch.isfinite(size)).all())
            checks.require(legal, where, "size", "at least 1 and finite", "other values")
        width_height = size.flip(-1).to(like.dtype)
        return torch.cat((width_height, width_height), dim=-1)[..., None, :]
    height, width = checks.pair_of_sizes(size, where, "size")
    return checks.on_device((width, height, width, height), like)


def from_pixels(
    boxes: Num[Tensor, "*batch 4"], size: Sequence[int] | Num[Tensor, "*sizes 2"]
) -> Float[Tensor, "*batch 4"]:
    """Unit boxes from pixel boxes with continuous edges; size (height, width), or a tensor [B, 2] for boxes [B, K, 4].

    >>> from_pixels(torch.tensor([[20.0, 10.0, 40.0, 30.0]]), (100, 200))
    tensor([[0.1000, 0.1000, 0.2000, 0.3000]])
    """
    whole = isinstance(boxes, Tensor) and not boxes.is_floating_point()
    edges = checks.xyxy(boxes.to(torch.float32) if whole else boxes, "from_pixels", "boxes")
    return edges / _sides(size, edges, "from_pixels")


def to_pixels(
    boxes: Float[Tensor, "*batch 4"], size: Sequence[int] | Num[Tensor, "*sizes 2"]
) -> Float[Tensor, "*batch 4"]:
    """Pixel boxes with continuous edges from unit boxes; the inverse of `from_pixels`."""
    return checks.xyxy(boxes, "to_pixels", "boxes") * _sides(size, boxes, "to_pixels")


def from_xywh(boxes: Num[Tensor, "*batch 4"]) -> Num[Tensor, "*batch 4"]:
    """xyxy from (x, y, width, height), as COCO writes them; the unit stays.

    >>> from_xywh(torch.tensor([[10, 20, 30, 40]]))
    tensor([[10, 20, 40, 60]])
    """
    four = isinstance(boxes, Tensor) and boxes.shape[-1:] == (4,)
    checks.require(four, "from_xywh", "boxes", "a tensor [..., 4]", checks.shape_of(boxes))
    if checks.values_visible(boxes):
        ok = bool(torch.isfinite(boxes).all()) and bool((boxes[..., 2:] >= 0).all())
        checks.require(ok, "from_xywh", "boxes", "finite with width and height >= 0", "other values")
    return torch.cat((boxes[..., :2], boxes[..., :2] + boxes[..., 2:]), dim=-1)


def to_xywh(boxes: Num[Tensor, "*batch 4"]) -> Num[Tensor, "*batch 4"]:
    """(x, y, width, height) from xyxy; the inverse of `from_xywh`."""
    checks.ordered(boxes, "to_xywh", "boxes")
    return torch.cat((boxes[..., :2], boxes[..., 2:] - boxes[..., :2]), dim=-1)


def from_soco_inclusive(boxes: Num[Tensor, "*batch 4"]) -> Num[Tensor, "*batch 4"]:
    """Pixel boxes with continuous edges from SoCo's loader form (x, y, x + w - 1, y + h - 1) of inclusive pixels.

    >>> from_soco_inclusive(torch.tensor([[10, 20, 39, 59]]))
    tensor([[10, 20, 40, 60]])
    """
    checks.require(isinstance(boxes, Tensor), "from_soco_inclusive", "boxes", "[..., 4]", checks.shape_of(boxes))
    edges = torch.cat((boxes[..., :2], boxes[..., 2:] + 1), dim=-1)
    checks.ordered(edges, "from_soco_inclusive", "boxes")
    return edges

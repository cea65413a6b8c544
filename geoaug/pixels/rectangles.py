"""Rectangles of whole pixels, int64 (x0, y0, x1, y1) with exclusive ends: what a box is once it meets a view's pixels.

A pixel belongs to a box iff its centre does: x0 <= j + 0.5 < x1. Rectangles laid over each other are counted without
looking at pixels, on the cells that their edges cut the plane into, and drawn once, by two comparisons of bits.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from ..geometry import checks
from ..geometry.rng import Key

_BITS = 8  # of the bytes in which the rectangles around a pixel are noted


def check(boxes: Tensor, valid: Tensor, key: Key, where: str) -> None:
    """Check what every operator on boxes takes: boxes [B, K, 4], valid bool [B, K] beside them, a key of B ids."""
    checks.require(isinstance(boxes, Tensor) and boxes.ndim == 3, where, "boxes", "[B, K, 4]", checks.shape_of(boxes))
    checks.xyxy(boxes, where, "boxes")
    ok = isinstance(valid, Tensor) and valid.dtype == torch.bool and valid.shape == boxes.shape[:2]
    checks.require(ok, where, "valid", f"bool {list(boxes.shape[:2])}", checks.shape_of(valid))
    checks.require(valid.device == boxes.device, where, "valid", f"on {boxes.device}", valid.device)
    check_key(key, boxes, where)


def check_key(key: Key, rows: Tensor, where: str) -> None:
    """Check a key of as many ids as rows, on their device or on the CPU."""
    checks.require(isinstance(key, Key), where, "key", "a Key", checks.shape_of(key))
    checks.require(len(key) == len(rows), where, "key", f"a key of {len(rows)} ids", f"one of {len(key)}")
    near = key.ids.device == rows.device or key.ids.device.type == "cpu"
    checks.require(near, where, "key", f"on {rows.device} or the CPU", key.ids.device)


def uniform(key: Key, stream: str, n: int, device: torch.device) -> Float[Tensor, "B n"]:
    """The key's numbers in float64 on a device: from there on every step is exactly rounded, so alike everywhere."""
    return key.uniform(stream, n).to(device, torch.float64, non_blocking=True)


def between(low: float, high: float, u: Tensor) -> Tensor:
    """Numbers in [0, 1) stretched to [low, high)."""
    return low + (high - low) * u


def whole(edges: Tensor, size: tuple[int, int]) -> Int64[Tensor, "*batch 4"]:
    """The pixels of rectangles with continuous edges in pixels, inside a view of size (h, w)."""
    limit = checks.on_device((size[1], size[0], size[1], size[0]), edges)
    return torch.minimum((edges - 0.5).ceil().clamp(min=0), limit).to(torch.int64)


def pixels_of(
    boxes: Float[Tensor, "B K 4"], valid: Bool[Tensor, "B K"], size: tuple[int, int]
) -> Int64[Tensor, "B K 4"]:
    """The pixels of unit boxes in a view of size (h, w); zeros for slots that are not valid or hold no pixel's centre.

    >>> pixels_of(torch.tensor([[[0.25, -0.5, 0.75, 0.5]]]), torch.tensor([[True]]), (4, 8))
    tensor([[[2, 0, 6, 2]]])
    """
    edges = boxes.to(torch.float64)
    rectangles = whole(edges * checks.on_device((size[1], size[0], size[1], size[0]), edges), size)
    some = valid & (rectangles[..., 2:] > rectangles[..., :2]).all(-1)
    return torch.where(some[..., None], rectangles, 0)


def count(rectangles: Int64[Tensor, "*batch 4"]) -> Int64[Tensor, "*batch"]:
    """How many pixels each rectangle has."""
    sides = (rectangles[..., 2:] - rectangles[..., :2]).clamp(min=0)
    return sides[..., 0] * sides[..., 1]


def _bits(low: Tensor, high: Tensor, at: Tensor, first: int, step: int) -> UInt8[Tensor, "B n"]:
    """A byte for each coordinate `at` [B or 1, n]: bit first + step * e tells whether it is in [low, high) [B, E]."""
    inside = (at[:, None] >= low[..., None]) & (at[:, None] < high[..., None])  # [B, E, n]
    place = torch.arange(first, first + step * inside.shape[1], step, dtype=torch.uint8, device=at.device)
    return (inside.to(torch.uint8) << place[:, None]).sum(dim=1, dtype=torch.uint8)


def _both(rectangles: Tensor, x: Tensor, y: Tensor, first: int, step: int) -> UInt8[Tensor, "B ny nx"]:
    """Bit first + step * e of each place: whether it lies in rectangle e [B, E, 4]."""
    columns = _bits(rectangles[..., 0], rectangles[..., 2], x, first, step)
    rows = _bits(rectangles[..., 1], rectangles[..., 3], y, first, step)
    return rows[:, :, None] & columns[:, None, :]


def union(
    rectangles: Int64[Tensor, "B E 4"], x: Int64[Tensor, "#B nx"], y: Int64[Tensor, "#B ny"]
) -> Bool[Tensor, "B ny nx"]:
    """Whether each place (x, y) lies in any of the rectangles."""
    inside, *others = (_both(part, x, y, 0, 1) for part in rectangles.split(_BITS, dim=1))
    for other in others:
        inside = inside | other
    return inside.to(torch.bool)  # six times faster than a comparison with 0


def uncut(
    cuts: Int64[Tensor, "B E 4"],
    restored: Int64[Tensor, "B E 4"],
    x: Int64[Tensor, "#B nx"],
    y: Int64[Tensor, "#B ny"],
) -> Bool[Tensor, "B ny nx"]:
    """Whether each place (x, y) is there in the end: rectangle 0 is restored, cut 0 made, 1 restored, and so on.

    The last rectangle to touch a place decides. With one bit for each, later ones higher, that is the larger number.
    """
    parts = zip(cuts.split(_BITS // 2, dim=1), restored.split(_BITS // 2, dim=1), strict=True)
    (cut, back), *others = ((_both(c, x, y, 1, 2), _both(r, x, y, 0, 2)) for c, r in parts)
    keep = back >= cut
    for cut, back in others:
        keep = (back >= cut) & (keep | back.to(torch.bool))
    return keep


def grid(size: tuple[int, int], device: torch.device) -> tuple[Int64[Tensor, "1 w"], Int64[Tensor, "1 h"]]:
    """The columns and rows of a view's pixels, for `union` and `uncut`."""
    return torch.arange(size[1], device=device)[None], torch.arange(size[0], device=device)[None]


def cells(
    rectangles: Int64[Tensor, "N E 4"], box: Int64[Tensor, "N 4"]
) -> tuple[Int64[Tensor, "N 2 n"], Int64[Tensor, "N 2 n"]]:
    """Where the cells that the rectangles' edges cut a box into start, and how long they are, along x and y."""
    low, high = box[:, :2, None], box[:, 2:, None]
    edges = rectangles.unflatten(-1, (2, 2)).flatten(1, 2).mT  # [N, 2, 2 E]: x and y of both corners
    edges = torch.cat((low, torch.maximum(torch.minimum(edges, high), low), high), dim=-1).sort(dim=-1).values
    return edges[..., :-1], edges.diff(dim=-1)


def count_cut(
    cuts: Int64[Tensor, "N E 4"], restored: Int64[Tensor, "N E 4"], box: Int64[Tensor, "N 4"]
) -> Int64[Tensor, " N"]:
    """How many pixels of a box are cut in the end, by `uncut`."""
    start, length = cells(torch.cat((cuts, restored), dim=1), box)
    keep = uncut(cuts, restored, start[:, 0], start[:, 1])
    return count(box) - (length[:, 1, :, None] * length[:, 0, None, :] * keep).sum(dim=(1, 2))

"""Rectangles of whole pixels, int64 (x0, y0, x1, y1) with exclusive ends: what a box is once it meets a view's pixels.

A pixel belongs to a box iff its centre does: x0 <= j + 0.5 < x1. On a CPU rectangles laid over each other are painted
one after another by numba kernels. On a device they are counted without looking at pixels, on the cells that their
edges cut the plane into, and drawn once, by two comparisons of bits. Both give the same.
"""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Float64, Int64, UInt8
from torch import Tensor

from ..geometry import checks
from ..geometry.rng import Key
from . import rectangle_kernels as kernels

_BITS = 8  # of the bytes in which the rectangles around a pixel are noted
_RESTORED, _CUT = 0b01010101, 0b10101010


def check(boxes: Tensor, valid: Tensor, key: Key, where: str) -> None:
    """Check what every operator on boxes takes: boxes [B, K, 4], valid bool [B, K] beside them, a key of B ids."""
    check_boxes(boxes, valid, where)
    check_key(key, boxes, where)


def check_boxes(boxes: Tensor, valid: Tensor, where: str) -> None:
    """Check boxes [B, K, 4] and valid bool [B, K] beside them."""
    checks.require(isinstance(boxes, Tensor) and boxes.ndim == 3, where, "boxes", "[B, K, 4]", checks.shape_of(boxes))
    checks.xyxy(boxes, where, "boxes")
    ok = isinstance(valid, Tensor) and valid.dtype == torch.bool and valid.shape == boxes.shape[:2]
    checks.require(ok, where, "valid", f"bool {list(boxes.shape[:2])}", checks.shape_of(valid))
    checks.require(valid.device == boxes.device, where, "valid", f"on {boxes.device}", valid.device)


def check_key(key: Key, rows: Tensor, where: str) -> None:
    """Check a key of as many ids as rows, on their device or on the CPU."""
    checks.require(isinstance(key, Key), where, "key", "a Key", checks.shape_of(key))
    checks.require(len(key) == len(rows), where, "key", f"a key of {len(rows)} ids", f"one of {len(key)}")
    near = key.ids.device == rows.device or key.ids.device.type == "cpu"
    checks.require(near, where, "key", f"on {rows.device} or the CPU", key.ids.device)


def uniform(key: Key, stream: str, n: int, device: torch.device) -> Float64[Tensor, "B n"]:
    """The key's numbers in float64 on a device: from there on every step is exactly rounded, so alike everywhere."""
    return key.uniform(stream, n).to(device, torch.float64, non_blocking=True)


def between(low: float, high: float, u: Tensor) -> Tensor:
    """Numbers in [0, 1) stretched to [low, high)."""
    return low + (high - low) * u


def frame(size: tuple[int, int], device: torch.device) -> Float64[Tensor, "4"]:
    """(w, h, w, h) of a view of size (h, w), filled on the device: a copy from the host would synchronise."""
    sides = torch.full((4,), size[1], dtype=torch.float64, device=device)
    sides[1::2] = size[0]
    return sides


def whole(edges: Float64[Tensor, "*batch 4"], frame: Float64[Tensor, "4"]) -> Int64[Tensor, "*batch 4"]:
    """The pixels of rectangles with continuous edges in pixels, inside a view's frame; zeros where there are none."""
    rectangles = torch.minimum((edges - 0.5).ceil().clamp(min=0), frame)
    some = (rectangles[..., 2:] > rectangles[..., :2]).all(dim=-1, keepdim=True)
    return (rectangles * some).to(torch.int64)


def pixels_of(
    boxes: Float[Tensor, "B K 4"], valid: Bool[Tensor, "B K"], frame: Float64[Tensor, "4"]
) -> Int64[Tensor, "B K 4"]:
    """The pixels of unit boxes in a view's frame; zeros for slots that are not valid or hold no pixel's centre.

    >>> view = frame((4, 8), torch.device("cpu"))
    >>> pixels_of(torch.tensor([[[0.25, -0.5, 0.75, 0.5]]]), torch.tensor([[True]]), view)
    tensor([[[2, 0, 6, 2]]])
    """
    return whole(boxes * frame, frame) * valid[..., None]


def count(rectangles: Int64[Tensor, "*batch 4"]) -> Int64[Tensor, "*batch"]:
    """How many pixels each rectangle has."""
    sides = rectangles[..., 2:] - rectangles[..., :2]
    return sides[..., 0] * sides[..., 1]


def arrays(*tensors: Tensor) -> list[npt.NDArray[Any]]:
    """Tensors on a CPU as the kernels take them."""
    return [x.contiguous().numpy() for x in tensors]


def drawn(
    events: Int64[Tensor, "B E 4"], size: tuple[int, int], within: Int64[Tensor, "B R 4"] | None = None
) -> Bool[Tensor, "B _h _w"]:
    """Which pixels of a view are there in the end, by `uncut`, and lie in any of the rectangles `within`.

    >>> drawn(torch.tensor([[[0, 0, 0, 0], [1, 0, 3, 1]]]), (2, 4))
    tensor([[[ True, False, False,  True],
             [ True,  True,  True,  True]]])
    """
    if events.device.type != "cpu":
        return drawn_on_device(events, size, within)
    mask = torch.empty(len(events), *size, dtype=torch.bool)
    inside, some = events[:, :0] if within is None else within, within is not None
    kernels.draw(*arrays(inside), some, *arrays(events), mask.view(torch.uint8).numpy())
    return mask


def drawn_on_device(
    events: Int64[Tensor, "B E 4"], size: tuple[int, int], within: Int64[Tensor, "B R 4"] | None = None
) -> Bool[Tensor, "B _h _w"]:
    """The same in torch, on any device."""
    x, y = (torch.arange(side, device=events.device)[None] for side in (size[1], size[0]))
    if within is None:
        return uncut(events, x, y)
    inside = union(within, x, y)
    return inside if events.shape[1] == 0 else inside.logical_and_(uncut(events, x, y))


def _bits(low: Tensor, high: Tensor, at: Tensor) -> UInt8[Tensor, "*batch n"]:
    """A byte for each coordinate `at` [*batch or 1, n]: bit e tells whether it is in [low, high) [*batch, E <= 8]."""
    inside = (at[..., None, :] >= low[..., None]) & (at[..., None, :] < high[..., None])  # [*batch, E, n]
    place = torch.arange(inside.shape[-2], dtype=torch.uint8, device=at.device)
    return (inside.to(torch.uint8) << place[:, None]).sum(dim=-2, dtype=torch.uint8)


def union(
    rectangles: Int64[Tensor, "B E 4"], x: Int64[Tensor, "#B nx"], y: Int64[Tensor, "#B ny"]
) -> Bool[Tensor, "B ny nx"]:
    """Whether each place (x, y) lies in any of the rectangles."""
    x0, y0, x1, y1 = rectangles.unbind(dim=-1)
    parts = (slice(e, e + _BITS) for e in range(0, max(1, rectangles.shape[1]), _BITS))
    inside, *others = (_bits(y0[:, e], y1[:, e], y)[:, :, None] & _bits(x0[:, e], x1[:, e], x)[:, None] for e in parts)
    for other in others:
        inside |= other
    return inside.clamp_(max=1).view(torch.bool)  # in place, since fresh memory costs more than the arithmetic


def uncut(
    events: Int64[Tensor, "B E 4"], x: Int64[Tensor, "#B nx"], y: Int64[Tensor, "#B ny"]
) -> Bool[Tensor, "B ny nx"]:
    """Whether each place (x, y) is there in the end: rectangle 0 is restored, 1 cut, 2 restored, 3 cut, and so on.

    The last rectangle to touch a place decides. With a bit for each, later ones higher, that is the larger number.
    """
    x0, y0, x1, y1 = events.unbind(dim=-1)
    parts = (slice(e, e + _BITS) for e in range(0, max(1, events.shape[1]), _BITS))
    bits = ((_bits(y0[:, e], y1[:, e], y)[:, :, None], _bits(x0[:, e], x1[:, e], x)[:, None]) for e in parts)
    (back, cut), *others = (((rows & _RESTORED) & columns, (rows & _CUT) & columns) for rows, columns in bits)
    keep = back.ge_(cut).view(torch.bool)  # in place, since fresh memory costs more than the arithmetic
    for back, cut in others:
        keep = (keep | back.to(torch.bool)) & (back >= cut)
    return keep


def cells(
    rectangles: Int64[Tensor, "N E 4"], box: Int64[Tensor, "N 4"]
) -> tuple[Int64[Tensor, "N 2 n"], Int64[Tensor, "N 2 n"]]:
    """Where the cells that the rectangles' edges cut a box into start, and how long they are, along x and y."""
    low, high = box[:, :2, None], box[:, 2:, None]
    edges = rectangles.unflatten(-1, (2, 2)).flatten(1, 2).mT  # [N, 2, 2 E]: x and y of both corners
    edges = torch.cat((low, torch.maximum(torch.minimum(edges, high), low), high), dim=-1).sort(dim=-1).values
    return edges[..., :-1], edges.diff(dim=-1)


def count_uncut(
    events: Int64[Tensor, "B E 4"], boxes: Int64[Tensor, "B N 4"], within: Int64[Tensor, "B R 4"] | None = None
) -> Int64[Tensor, "B N"]:
    """How many pixels of each box are there in the end, by `uncut`, and lie in any of the rectangles `within`.

    >>> count_uncut(torch.tensor([[[0, 0, 0, 0], [1, 0, 3, 1]]]), torch.tensor([[[0, 0, 2, 2]]]))
    tensor([[3]])
    """
    if events.device.type != "cpu":
        return count_uncut_on_device(events, boxes, within)
    counts = torch.empty(boxes.shape[:2], dtype=torch.int64)
    inside, some = events[:, :0] if within is None else within, within is not None
    kernels.count_uncut(*arrays(inside), some, *arrays(events, boxes), counts.numpy())
    return counts


def count_uncut_on_device(
    events: Int64[Tensor, "B E 4"], boxes: Int64[Tensor, "B N 4"], within: Int64[Tensor, "B R 4"] | None = None
) -> Int64[Tensor, "B N"]:
    """The same in torch, on any device."""
    batch, many = boxes.shape[:2]
    each = events[:, None].expand(-1, many, -1, -1).flatten(0, 1)
    inside = None if within is None else within[:, None].expand(-1, many, -1, -1).flatten(0, 1)
    start, length = cells(each if inside is None else torch.cat((each, inside), dim=1), boxes.flatten(0, 1))
    keep = uncut(each, start[:, 0], start[:, 1])
    if inside is not None:
        keep &= union(inside, start[:, 0], start[:, 1])
    return (length[:, 1, :, None] * length[:, 0, None] * keep).sum(dim=(1, 2)).view(batch, many)

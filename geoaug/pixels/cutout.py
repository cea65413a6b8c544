"""Cutouts: D3SSL's proposal-based ones (PRC, section 4.1) and SoCo's squares.

What is cut is planned in whole pixels first (`Cutouts`) and drawn once. A box is its pixels here, those of its visible
part: order, share and aspect are counted on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from ..geometry import checks
from ..geometry.rng import Key
from . import rectangles


@dataclass(frozen=True, eq=False)
class Cutouts:
    """Who cut what: one turn for each slot, from the box with the most pixels to that with the fewest.

    `boxes` are the pixels of each slot, `ratio` the share drawn for it, `cuts` its own cut (zeros: none), `restored`
    whether its pixels were put back before; `order` [B, K] lists the slots by turn.
    """

    boxes: Int64[Tensor, "B K 4"]
    ratio: Float64[Tensor, "B K"]
    order: Int64[Tensor, "B K"]
    cuts: Int64[Tensor, "B K 4"]
    restored: Bool[Tensor, "B K"]
    size: tuple[int, int]

    def events(self, turns: int | None = None) -> tuple[Int64[Tensor, "B _T 4"], Int64[Tensor, "B _T 4"]]:
        """The cuts and the restored boxes of the first turns, or all, in their order."""
        order = self.order[:, :turns]
        back = torch.where(self.restored[..., None], self.boxes, 0)
        return in_order(self.cuts, order), in_order(back, order)

    def keep(self, turns: int | None = None) -> Bool[Tensor, "B _h _w"]:
        """Which pixels of the view are not cut, at the end or after the first turns."""
        return rectangles.uncut(*self.events(turns), *rectangles.grid(self.size, self.boxes.device))

    def shown(self) -> Float[Tensor, "B K"]:
        """The share of each box's pixels that is not cut at the end; 0 for boxes without pixels."""
        slots = self.boxes.shape[1]
        cuts, back = (events.repeat_interleave(slots, dim=0) for events in self.events())
        away = rectangles.count_cut(cuts, back, self.boxes.flatten(0, 1)).view(self.ratio.shape)
        pixels = rectangles.count(self.boxes)
        return ((pixels - away) / pixels.clamp(min=1)).to(torch.float32)


def in_order(per_slot: Tensor, order: Int64[Tensor, "B T"]) -> Tensor:
    """Entries [B, K, *rest] of the slots in `order`."""
    index = order.reshape(*order.shape, *(1,) * (per_slot.ndim - 2))
    return per_slot.gather(1, index.expand(*order.shape, *per_slot.shape[2:]))


def largest_first(boxes: Int64[Tensor, "B K 4"]) -> Int64[Tensor, "B K"]:
    """Slots by their number of pixels, descending; of equals the lower slot first."""
    return rectangles.count(boxes).argsort(dim=1, descending=True, stable=True)


def cutout_masks(
    boxes: Float[Tensor, "B K 4"],
    valid: Bool[Tensor, "B K"],
    size: Sequence[int] | int,
    *,
    key: Key,
    ratio: tuple[float, float] = (0.2, 0.5),
    clip: Literal["image", "box"] = "image",
    restore: Literal["tolerance", "threshold"] = "tolerance",
    tolerance: tuple[float, float, float] = (0.8, 1.2, 0.5),
) -> Bool[Tensor, "B h w"]:
    """Proposal-based random cutout (PRC, D3SSL section 4.1): which pixels of a view of size (h, w) are kept.

    From large to small, each box is cut by a rectangle of its own aspect, with a share of its area from `ratio` and a
    centre anywhere in it. `clip="image"` lets the cut stick out of the box. r being the share that larger boxes' cuts
    took already and c the one drawn, `restore="tolerance"` leaves the box alone for 0.8 c < r <= 1.2 c, puts it back
    and then cuts for other r >= 0.5 c, and else cuts in addition; `"threshold"` puts it back if r > c, and then takes
    c - r of it, with `clip="box"` by the rectangle inside it that comes closest to that.

    >>> boxes, valid = torch.tensor([[[0.1, 0.1, 0.6, 0.6]]]), torch.tensor([[True]])
    >>> keep = cutout_masks(boxes, valid, (224, 224), key=Key(0, 0, [7]))
    >>> keep.shape, 0.2 * 112**2 < int((~keep).sum()) < 0.5 * 113**2
    (torch.Size([1, 224, 224]), True)
    """
    return draw_cutouts(
        boxes, valid, size, key=key, ratio=ratio, clip=clip, restore=restore, tolerance=tolerance
    ).keep()  # fmt: skip


def draw_cutouts(
    boxes: Float[Tensor, "B K 4"],
    valid: Bool[Tensor, "B K"],
    size: Sequence[int] | int,
    *,
    key: Key,
    ratio: tuple[float, float] = (0.2, 0.5),
    clip: Literal["image", "box"] = "image",
    restore: Literal["tolerance", "threshold"] = "tolerance",
    tolerance: tuple[float, float, float] = (0.8, 1.2, 0.5),
) -> Cutouts:
    """The plan behind `cutout_masks`: every box's ratio, cut and whether it was restored."""
    rectangles.check(boxes, valid, key, "cutout_masks")
    view = checks.pair_of_sizes(size, "cutout_masks", "size")
    pixels = rectangles.pixels_of(boxes, valid, view)
    return cut_pixels(pixels, view, key=key, ratio=ratio, clip=clip, restore=restore, tolerance=tolerance)


def cut_pixels(
    boxes: Int64[Tensor, "B K 4"],
    size: tuple[int, int],
    *,
    key: Key,
    ratio: tuple[float, float],
    clip: str,
    restore: str,
    tolerance: tuple[float, float, float] = (0.8, 1.2, 0.5),
) -> Cutouts:
    """`draw_cutouts` for boxes that are pixels already."""
    where = "cutout_masks"
    low, high = checks.interval(ratio, 0.0, 1.0, where, "ratio")
    checks.require(clip in ("image", "box"), where, "clip", "'image' or 'box'", repr(clip))
    checks.require(restore in ("tolerance", "threshold"), where, "restore", "'tolerance' or 'threshold'", repr(restore))
    ok = isinstance(tolerance, Sequence) and len(tolerance) == 3 and 0 <= tolerance[2] <= tolerance[0] <= tolerance[1]
    checks.require(ok, where, "tolerance", "(from, to, half) with 0 <= half <= from <= to", tolerance)
    batch, slots = boxes.shape[:2]
    u = rectangles.uniform(key, "cutout", 3 * slots, boxes.device).view(batch, slots, 3)
    shares = rectangles.between(low, high, u[..., 0])
    order = largest_first(boxes)
    turn_boxes, turn_shares, turn_u = (in_order(x, order) for x in (boxes, shares, u))
    cuts, back = torch.zeros_like(boxes), torch.zeros_like(boxes)
    for turn in range(slots):
        box, centre = turn_boxes[:, turn], turn_u[:, turn, 1:]
        pixels = rectangles.count(box)
        target = turn_shares[:, turn] * pixels
        away = torch.zeros_like(pixels)
        if turn:  # nobody has cut before the first turn
            away = rectangles.count_cut(cuts[:, :turn], back[:, :turn], box)
        if restore == "tolerance":
            leave = (away > tolerance[0] * target) & (away <= tolerance[1] * target)
            again = ~leave & (away > 0) & (away >= tolerance[2] * target)
            missing = torch.where(leave, 0, target)
        else:
            again = away > target
            missing = target - torch.where(again, 0, away)
        back[:, turn] = torch.where(again[:, None], box, 0)
        if restore == "threshold" and clip == "box":
            cuts[:, turn] = _inside(box, missing, centre, cuts[:, :turn], back[:, : turn + 1], size)
        else:
            cuts[:, turn] = _around(box, missing, centre, size, clip)
    slot = order.argsort(dim=1)
    restored = (rectangles.count(back) > 0).gather(1, slot)
    return Cutouts(boxes, shares, order, in_order(cuts, slot), restored, size)


def _around(box: Tensor, area: Tensor, centre: Tensor, size: tuple[int, int], clip: str) -> Tensor:
    """A rectangle [B, 4] of the box's aspect and of `area` [B] pixels, its centre at the share `centre` of the box."""
    sides = (box[:, 2:] - box[:, :2]).to(torch.float64)
    middle = box[:, :2] + centre * sides
    half = 0.5 * (area / rectangles.count(box).clamp(min=1)).sqrt()[:, None] * sides
    cut = rectangles.whole(torch.cat((middle - half, middle + half), dim=-1), size)
    if clip == "box":
        cut = torch.cat((torch.maximum(cut[:, :2], box[:, :2]), torch.minimum(cut[:, 2:], box[:, 2:])), dim=-1)
    return torch.where((cut[:, 2:] > cut[:, :2]).all(-1, keepdim=True), cut, 0)


def _inside(
    box: Tensor, missing: Tensor, place: Tensor, cuts: Tensor, back: Tensor, size: tuple[int, int]
) -> Tensor:  # fmt: skip
    """The rectangle [B, 4] inside the box that takes closest to `missing` [B] pixels that are not cut yet.

    Of a nested row of rectangles that grow by one line of pixels at a time, keeping the box's aspect as well as whole
    pixels can: the error is at most half a line.
    """
    sides = box[:, 2:] - box[:, :2]  # (width, height)
    lines = torch.arange(size[0] + size[1] + 1, device=box.device)  # of both directions together
    both = sides.sum(dim=1, keepdim=True)
    lines = torch.minimum(lines, both)  # [B, T]
    width = torch.div(2 * lines * sides[:, :1] + both, (2 * both).clamp(min=1), rounding_mode="floor")
    extent = torch.stack((width, lines - width), dim=1)  # [B, 2, T]
    # An offset of floor(u * (free + 1)) loses at most one when the rectangle gains one, so the row is nested.
    free = sides[..., None] - extent
    low = box[:, :2, None] + (place[..., None] * (free + 1)).floor().to(torch.int64)
    high = low + extent
    none = torch.zeros_like(back[:, :1])
    cuts = torch.cat((cuts, none), dim=1)  # restored before its own cut, which is yet to come
    start, length = rectangles.cells(torch.cat((cuts, back), dim=1), box)
    there = rectangles.uncut(cuts, back, start[:, 0], start[:, 1]).to(torch.float64)  # exact in whole numbers
    end = start + length
    shared = torch.minimum(high[..., None], end[:, :, None]) - torch.maximum(low[..., None], start[:, :, None])
    across, down = shared.clamp(min=0).to(torch.float64).unbind(1)  # [B, T, cells]
    taken = (down @ there * across).sum(dim=-1)
    best = _first_smallest((taken - missing[:, None]).abs())
    cut = torch.cat((low, high), dim=1).gather(2, best[:, None, None].expand(-1, 4, 1))[..., 0]
    return torch.where((cut[:, 2:] > cut[:, :2]).all(-1, keepdim=True), cut, 0)


def _first_smallest(x: Float[Tensor, "B T"]) -> Int64[Tensor, " B"]:
    """The first place of each row's smallest number; a device's argmin names any of equals."""
    smallest = x == x.amin(dim=1, keepdim=True)
    return (smallest.cumsum(dim=1) == 0).sum(dim=1)


def square_cutout_masks(
    boxes: Float[Tensor, "B K 4"],
    valid: Bool[Tensor, "B K"],
    size: Sequence[int] | int,
    *,
    key: Key,
    p: float = 0.5,
    ratio: tuple[float, float] = (0.1, 0.3),
) -> Bool[Tensor, "B h w"]:
    """SoCo's cutout: with probability p a box loses a square of a share of its area, centred anywhere in it.

    Squares may stick out of their boxes; nothing is restored.

    >>> boxes, valid = torch.tensor([[[0.1, 0.1, 0.6, 0.6]]]), torch.tensor([[True]])
    >>> square_cutout_masks(boxes, valid, (224, 160), key=Key(0, 0, [7])).shape
    torch.Size([1, 224, 160])
    """
    where = "square_cutout_masks"
    rectangles.check(boxes, valid, key, where)
    view = checks.pair_of_sizes(size, where, "size")
    low, high = checks.interval(ratio, 0.0, 1.0, where, "ratio")
    checks.require(0.0 <= p <= 1.0, where, "p", "in [0, 1]", p)
    batch, slots = boxes.shape[:2]
    u = rectangles.uniform(key, "square", 4 * slots, boxes.device).view(batch, slots, 4)
    pixels = rectangles.pixels_of(boxes, valid, view)
    area = rectangles.between(low, high, u[..., 1]) * rectangles.count(pixels)
    middle = pixels[..., :2] + u[..., 2:] * (pixels[..., 2:] - pixels[..., :2])
    half = 0.5 * torch.where(u[..., 0] < p, area, 0).sqrt()[..., None]
    squares = rectangles.whole(torch.cat((middle - half, middle + half), dim=-1), view)
    return ~rectangles.union(squares, *rectangles.grid(view, boxes.device))

"""Cutouts: D3SSL's proposal-based ones (PRC, section 4.1) and SoCo's squares.

What is cut is planned in whole pixels first (`Cutouts`) and drawn once. A box is its pixels here, those of its visible
part: order, share and aspect are counted on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor

from ..geometry import checks
from ..geometry.rng import Key
from . import rectangle_kernels as kernels
from . import rectangles


@dataclass(frozen=True, eq=False)
class Cutouts:
    """Who cut what: one turn for each slot, from the box with the most pixels to that with the fewest.

    `boxes` are the pixels of each slot, `ratio` the share drawn for it, `order` the slots by turn. Each turn has two
    `events` [B, 2 K, 4], a box that is restored and a cut, or zeros where there is none.
    """

    boxes: Int64[Tensor, "B K 4"]
    ratio: Float64[Tensor, "B K"]
    order: Int64[Tensor, "B K"]
    events: Int64[Tensor, "B E 4"]
    size: tuple[int, int]

    @property
    def restored(self) -> Bool[Tensor, "B _K"]:
        """Whether each slot's pixels were put back at its turn."""
        return in_order(rectangles.count(self.events[:, ::2]) > 0, self.order.argsort(dim=1))

    @property
    def cuts(self) -> Int64[Tensor, "B _K 4"]:
        """Each slot's own cut."""
        return in_order(self.events[:, 1::2], self.order.argsort(dim=1))

    def keep(self, turns: int | None = None) -> Bool[Tensor, "B _h _w"]:
        """Which pixels of the view are not cut, at the end or after the first turns."""
        events = self.events if turns is None else self.events[:, : 2 * turns]
        return rectangles.drawn(events, self.size)

    def shown(self) -> Float32[Tensor, "B _K"]:
        """The share of each box's pixels that is not cut at the end; 0 for boxes without pixels."""
        kept = rectangles.count_uncut(self.events, self.boxes)
        return (kept / rectangles.count(self.boxes).clamp(min=1)).to(torch.float32)


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
    pixels = rectangles.pixels_of(boxes, valid, rectangles.frame(view, boxes.device))
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
    u = key.uniform("cutout", 3 * boxes.shape[1]).view(*boxes.shape[:2], 3)
    whole_turns = clip == "image" or restore == "tolerance"  # the search of the other law is torch's
    run = _turns_on_cpu if boxes.device.type == "cpu" and whole_turns else turns_on_device
    return run(boxes, u.to(boxes.device, non_blocking=True), size, (low, high), clip, restore, tolerance)


def _turns_on_cpu(
    boxes: Int64[Tensor, "B K 4"], u: Float32[Tensor, "B K 3"], size: tuple[int, int], ratio: tuple[float, float],
    clip: str, restore: str, tolerance: tuple[float, float, float],
) -> Cutouts:  # fmt: skip
    batch, slots = boxes.shape[:2]
    shares, order = torch.empty(batch, slots, dtype=torch.float64), torch.empty(batch, slots, dtype=torch.int64)
    events = torch.empty(batch, 2 * slots, 4, dtype=torch.int64)
    numbers = tuple(map(float, tolerance))
    kernels.take_turns(*rectangles.arrays(boxes, u), *ratio, *size, clip == "box", restore == "threshold", numbers,
                       *rectangles.arrays(shares, order, events))  # fmt: skip
    return Cutouts(boxes, shares, order, events, size)


def turns_on_device(
    boxes: Int64[Tensor, "B K 4"], u: Float32[Tensor, "B K 3"], size: tuple[int, int], ratio: tuple[float, float],
    clip: str, restore: str, tolerance: tuple[float, float, float],
) -> Cutouts:  # fmt: skip
    """What PRC draws, in torch on any device."""
    slots, u = boxes.shape[1], u.to(torch.float64)
    shares = rectangles.between(*ratio, u[..., 0])
    order = largest_first(boxes)
    turns, place = in_order(boxes, order), in_order(u[..., 1:], order)
    pixels = rectangles.count(turns)
    targets = in_order(shares, order) * pixels
    view = rectangles.frame(size, boxes.device)
    # What a tolerant turn would cut does not depend on the turns before, so all of it is known at once.
    own = _around(turns, targets, place, view, clip) if restore == "tolerance" else torch.zeros_like(turns)
    events: list[Tensor] = []
    for turn in range(slots):
        box, target = turns[:, turn], targets[:, turn]
        away = torch.zeros_like(target)
        if turn:  # nobody has cut before the first turn
            kept = rectangles.count_uncut_on_device(torch.stack(events, dim=1), box[:, None])[:, 0]
            away = pixels[:, turn] - kept
        if restore == "tolerance":
            leave = (away > tolerance[0] * target) & (away <= tolerance[1] * target)
            again = ~leave & (away > 0) & (away >= tolerance[2] * target)
            events += [box * again[:, None], own[:, turn] * ~leave[:, None]]
            continue
        again = away > target
        missing = target - torch.where(again, 0, away)
        events.append(box * again[:, None])
        if clip == "box":
            events.append(_inside(box, missing, place[:, turn], events, size))
        else:
            events.append(_around(box, missing, place[:, turn], view, clip))
    every = torch.stack(events, dim=1) if events else boxes
    return Cutouts(boxes, shares, order, every, size)


def _around(box: Tensor, area: Tensor, place: Tensor, view: Tensor, clip: str) -> Int64[Tensor, "*batch 4"]:
    """Rectangles with the aspect of boxes [*batch, 4], `area` [*batch] pixels and a centre at `place` of the boxes."""
    sides = (box[..., 2:] - box[..., :2]).to(torch.float64)
    middle = box[..., :2] + place * sides
    half = 0.5 * (area / rectangles.count(box).clamp(min=1)).sqrt()[..., None] * sides
    cut = rectangles.whole(torch.cat((middle - half, middle + half), dim=-1), view)
    if clip == "box":
        low, high = torch.maximum(cut[..., :2], box[..., :2]), torch.minimum(cut[..., 2:], box[..., 2:])
        cut = torch.cat((low, high), dim=-1) * (high > low).all(dim=-1, keepdim=True)
    return cut


def _inside(
    box: Tensor, missing: Tensor, place: Tensor, events: list[Tensor], size: tuple[int, int]
) -> Int64[Tensor, "B 4"]:
    """The rectangle inside each box [B, 4] that takes closest to `missing` [B] pixels that are not cut yet.

    Of a nested row of rectangles that grow by one line of pixels at a time, keeping the box's aspect as well as whole
    pixels can: the error is at most half a line.
    """
    sides = box[:, 2:] - box[:, :2]  # (width, height)
    both = sides.sum(dim=1, keepdim=True)
    lines = torch.minimum(torch.arange(size[0] + size[1] + 1, device=box.device), both)  # [B, T], of either direction
    width = torch.div(2 * lines * sides[:, :1] + both, (2 * both).clamp(min=1), rounding_mode="floor")
    extent = torch.stack((width, lines - width), dim=1)  # [B, 2, T]
    # An offset of floor(u * (free + 1)) loses at most one when the rectangle gains one, so the row is nested.
    free = sides[..., None] - extent
    low = box[:, :2, None] + (place[..., None] * (free + 1)).floor().to(torch.int64)
    high = low + extent
    before = torch.stack(events, dim=1)  # ends with the box restored, or not
    start, length = rectangles.cells(before, box)
    there = rectangles.uncut(before, start[:, 0], start[:, 1]).to(torch.float64)  # exact in whole numbers
    end = start + length
    shared = torch.minimum(high[..., None], end[:, :, None]) - torch.maximum(low[..., None], start[:, :, None])
    across, down = shared.clamp(min=0).to(torch.float64).unbind(1)  # [B, T, cells]
    taken = (down @ there * across).sum(dim=-1)
    best = _first_smallest((taken - missing[:, None]).abs())
    cut = torch.cat((low, high), dim=1).gather(2, best[:, None, None].expand(-1, 4, 1))[..., 0]
    return cut * (cut[:, 2:] > cut[:, :2]).all(dim=-1, keepdim=True)


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
    return draw_square_cutouts(boxes, valid, size, key=key, p=p, ratio=ratio).keep()


def draw_square_cutouts(
    boxes: Float[Tensor, "B K 4"],
    valid: Bool[Tensor, "B K"],
    size: Sequence[int] | int,
    *,
    key: Key,
    p: float = 0.5,
    ratio: tuple[float, float] = (0.1, 0.3),
) -> Cutouts:
    """The plan behind `square_cutout_masks`: every box's ratio, 0 where none is drawn, and its square."""
    where = "square_cutout_masks"
    rectangles.check(boxes, valid, key, where)
    view = checks.pair_of_sizes(size, where, "size")
    low, high = checks.interval(ratio, 0.0, 1.0, where, "ratio")
    checks.require(0.0 <= p <= 1.0, where, "p", "in [0, 1]", p)
    batch, slots = boxes.shape[:2]
    u = rectangles.uniform(key, "square", 4 * slots, boxes.device).view(batch, slots, 4)
    frame = rectangles.frame(view, boxes.device)
    pixels = rectangles.pixels_of(boxes, valid, frame)
    shares = torch.where(u[..., 0] < p, rectangles.between(low, high, u[..., 1]), 0.0)
    middle = pixels[..., :2] + u[..., 2:] * (pixels[..., 2:] - pixels[..., :2])
    half = 0.5 * (shares * rectangles.count(pixels)).sqrt()[..., None]
    squares = rectangles.whole(torch.cat((middle - half, middle + half), dim=-1), frame)
    events = torch.stack((torch.zeros_like(squares), squares), dim=2).flatten(1, 2)
    order = torch.arange(slots, device=boxes.device).expand(batch, slots)
    return Cutouts(pixels, shares, order, events, view)

"""De-positioning (D3SSL, section 4.2), and every region operator by name: what to import from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Float32, Int64, Shaped
from torch import Tensor

from ..geometry import boxes as box_algebra
from ..geometry import checks
from ..geometry.rng import Key, below
from . import rectangles
from .backgrounds import block_derangement
from .box_laws import JITTER_LAWS, JitterLaw, free_boxes, grid_boxes, jitter_boxes
from .cutout import (
    Cutouts,
    cut_pixels,
    cutout_masks,
    draw_cutouts,
    draw_square_cutouts,
    in_order,
    largest_first,
    square_cutout_masks,
)
from .paste import paste, shift_boxes
from .window import Windows, draw_windows, window_masks

__all__ = [
    "JITTER_LAWS",
    "Composite",
    "Cutouts",
    "JitterLaw",
    "Windows",
    "block_derangement",
    "boxes_with_room",
    "cutout_masks",
    "draw_cutouts",
    "draw_square_cutouts",
    "draw_windows",
    "free_boxes",
    "grid_boxes",
    "jitter_boxes",
    "paste",
    "shift_boxes",
    "shift_composite",
    "square_cutout_masks",
    "window_masks",
]

_NOISE = 1e-3  # pixels by which float32 may put a box's edge beyond a pixel's


@dataclass(frozen=True, eq=False)
class Composite:
    """Views with their boxes moved onto other backgrounds, and the record of it; slots are those of the boxes given.

    `boxes` are the visible parts of the boxes at their new place; `mask` [B, h, w] is true where a pixel is foreground,
    `foreground` its share; `shift` is (x, y) in pixels; `visible` the share of each whole box that shows: inside the
    view, and not cut; `valid` is false for slots dropped to make room and those without a pixel; `filled` is true where
    the background is a fill.
    """

    images: Shaped[Tensor, "B C h w"]
    boxes: Float[Tensor, "B K 4"]
    mask: Bool[Tensor, "B h w"]
    shift: Int64[Tensor, "B 2"]
    visible: Float32[Tensor, "B K"]
    valid: Bool[Tensor, "B K"]
    foreground: Float32[Tensor, " B"]
    filled: Bool[Tensor, " B"]


def shift_composite(
    images: Shaped[Tensor, "B C h w"],
    boxes: Float[Tensor, "B K 4"],
    valid: Bool[Tensor, "B K"],
    backgrounds: Shaped[Tensor, "N C h w"] | Int64[Tensor, " B"],
    *,
    key: Key,
    room: float = 0.25,
    cut: bool = True,
    ratio: tuple[float, float] = (0.2, 0.5),
    clip: Literal["image", "box"] = "image",
    restore: Literal["tolerance", "threshold"] = "tolerance",
    rows: Int64[Tensor, " B"] | None = None,
    fill: float = 0.0,
    out: Shaped[Tensor, "B C h w"] | None = None,
) -> Composite:
    """De-positioning (D3SSL, eqs. 6 to 8): an image's boxes, all moved by one shift and cut by PRC, on a background.

    The shift is whole pixels, uniform over all that leave the boxes' visible parts in the view. Boxes that span the
    view cannot move, so boxes are dropped, largest first, until the rest leave `room` of either side free or one is
    left; `room=0` is the paper's letter. `backgrounds`, `rows`, `fill` and `out` are those of `paste`: other images, or
    the rows `block_derangement` gives, and where to write, which may be `images` themselves if nobody needs them any
    more. Jittered boxes follow by `shift_boxes(jittered, composite.shift, (h, w))`.

    >>> views, key = torch.rand(4, 3, 32, 48), Key(0, 0, [7, 8, 9, 10])
    >>> boxes, valid = torch.tensor([0.1, 0.1, 0.4, 0.5]).expand(4, 1, 4), torch.ones(4, 1, dtype=torch.bool)
    >>> composite = shift_composite(views, boxes, valid, block_derangement(key), key=key.fold("x3"))
    >>> composite.images.shape, composite.shift.shape, composite.visible.shape
    (torch.Size([4, 3, 32, 48]), torch.Size([4, 2]), torch.Size([4, 1]))
    """
    where = "shift_composite"
    ok = isinstance(images, Tensor) and images.ndim == 4 and min(images.shape[2:]) > 0
    checks.require(ok, where, "images", "[B, C, h, w]", checks.shape_of(images))
    rectangles.check(boxes, valid, key, where)
    checks.require(len(boxes) == len(images), where, "boxes", f"of {len(images)} images", checks.shape_of(boxes))
    checks.require(boxes.device == images.device, where, "boxes", f"on {images.device}", boxes.device)
    checks.require(0.0 <= room < 1.0, where, "room", "in [0, 1)", room)
    size = (images.shape[2], images.shape[3])

    view = rectangles.frame(size, images.device)
    pixels = rectangles.pixels_of(boxes, valid, view)
    seen = box_algebra.clip(boxes)
    edges = seen * view
    kept = _make_room(pixels, edges, view, room)
    shift = _draw_shift(edges, kept, view, key)

    there = (pixels + shift.repeat(1, 2)[:, None]) * kept[..., None]
    events, shown = there[:, :0], kept.to(torch.float32)
    if cut:
        cutouts = cut_pixels(there, size, key=key.fold("cut"), ratio=ratio, clip=clip, restore=restore)
        events, shown = cutouts.events, cutouts.shown()
    mask = rectangles.drawn(events, size, within=there)
    whole = torch.cat((torch.zeros_like(shift), view[:2].to(torch.int64).expand_as(shift)), dim=1)
    foreground = rectangles.count_uncut(events, whole[:, None], within=there)[:, 0]
    rows = _rows(images, backgrounds, rows)
    behind = images if isinstance(backgrounds, Tensor) and backgrounds.ndim == 1 else backgrounds
    return Composite(
        images=paste(images, mask, behind, shift, rows=rows, fill=fill, moved=True, out=out),
        boxes=shift_boxes(seen, shift, size),
        mask=mask,
        shift=shift,
        visible=box_algebra.visible_fraction(boxes).to(torch.float32) * shown,
        valid=kept,
        foreground=foreground / (size[0] * size[1]),
        filled=rows < 0,
    )


def boxes_with_room(
    boxes: Float[Tensor, "B K 4"], valid: Bool[Tensor, "B K"], size: tuple[int, int], room: float = 0.25
) -> Bool[Tensor, "B K"]:
    """Which boxes `shift_composite` keeps in views of size (h, w): known from geometry, before any pixel is.

    >>> boxes = torch.tensor([[[0.0, 0.0, 0.9, 0.5], [0.2, 0.2, 0.5, 0.5]]])
    >>> boxes_with_room(boxes, torch.ones(1, 2, dtype=torch.bool), (32, 48))
    tensor([[False,  True]])
    """
    rectangles.check_boxes(boxes, valid, "boxes_with_room")
    checks.require(0.0 <= room < 1.0, "boxes_with_room", "room", "in [0, 1)", room)
    view = rectangles.frame(checks.pair_of_sizes(size, "boxes_with_room", "size"), boxes.device)
    return _make_room(rectangles.pixels_of(boxes, valid, view), box_algebra.clip(boxes) * view, view, room)


def _rows(images: Tensor, backgrounds: Tensor, rows: Tensor | None) -> Tensor:
    """The row of its background for each image."""
    if rows is not None:
        return rows
    if isinstance(backgrounds, Tensor) and backgrounds.ndim == 1:
        return backgrounds
    return torch.arange(len(images), device=images.device)


def _make_room(pixels: Tensor, edges: Tensor, view: Tensor, room: float) -> Bool[Tensor, "B K"]:
    """Which boxes stay when the largest are dropped until the union leaves `room` of each side free."""
    if pixels.shape[1] == 0:
        return torch.zeros(pixels.shape[:2], dtype=torch.bool, device=pixels.device)
    from_small = largest_first(pixels).flip(1)
    present = in_order(rectangles.count(pixels) > 0, from_small)
    some, span = present[..., None], in_order(edges, from_small)
    low = torch.where(some, span[..., :2], torch.inf).cummin(dim=1).values
    high = torch.where(some, span[..., 2:], -torch.inf).cummax(dim=1).values
    fits = (high - low <= view[:2] * (1 - room) + _NOISE).all(dim=-1)  # the union of this box and all smaller ones
    alone = present.cumsum(dim=1) <= 1
    return ((fits | alone) & present).gather(1, from_small.argsort(dim=1))


def _draw_shift(edges: Tensor, kept: Tensor, view: Tensor, key: Key) -> Int64[Tensor, "B 2"]:
    """Whole pixels, uniform over the shifts that leave the kept boxes in the view; zero where there are none."""
    words = key.words("shift", 1).to(edges.device, non_blocking=True)
    if edges.shape[1] == 0:
        return torch.zeros_like(words[:, :2])
    some = kept[..., None]
    low = torch.where(some, edges[..., :2], torch.inf).amin(dim=1)
    high = torch.where(some, edges[..., 2:], -torch.inf).amax(dim=1)
    lone = ~kept.any(dim=1, keepdim=True)
    first = (-low - _NOISE).ceil().masked_fill(lone, 0).to(torch.int64)
    last = (view[:2] - high + _NOISE).floor().masked_fill(lone, 0).to(torch.int64)
    return first + below(words[:, 0::2], words[:, 1::2], last - first + 1)

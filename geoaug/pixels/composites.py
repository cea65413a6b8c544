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
from .cutout import Cutouts, cut_pixels, cutout_masks, draw_cutouts, in_order, largest_first, square_cutout_masks
from .paste import paste, shift_boxes
from .window import window_masks

__all__ = [
    "JITTER_LAWS",
    "Composite",
    "Cutouts",
    "JitterLaw",
    "block_derangement",
    "boxes_with_room",
    "cutout_masks",
    "draw_cutouts",
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
) -> Composite:
    """De-positioning (D3SSL, eqs. 6 to 8): an image's boxes, all moved by one shift and cut by PRC, on a background.

    The shift is whole pixels, uniform over all that leave the boxes' visible parts in the view. Boxes that span the
    view cannot move, so boxes are dropped, largest first, until the rest leave `room` of either side free or one is
    left; `room=0` is the paper's letter. `backgrounds`, `rows` and `fill` are those of `paste`: other images, or the
    rows `block_derangement` gives; jittered boxes follow by `shift_boxes(jittered, composite.shift, (h, w))`.

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

    pixels = rectangles.pixels_of(boxes, valid, size)
    edges = box_algebra.clip(boxes).to(torch.float64)
    edges = edges * checks.on_device((size[1], size[0], size[1], size[0]), edges)
    kept = _make_room(pixels, edges, size, room)
    shift = _draw_shift(edges, kept, size, key)

    there = torch.where(kept[..., None], pixels + shift.repeat(1, 2)[:, None], 0)
    mask, shown = rectangles.union(there, *rectangles.grid(size, images.device)), kept.to(torch.float32)
    if cut:
        cutouts = cut_pixels(there, size, key=key.fold("cut"), ratio=ratio, clip=clip, restore=restore)
        mask, shown = mask & cutouts.keep(), cutouts.shown()
    rows = _rows(images, backgrounds, rows)
    behind = images if isinstance(backgrounds, Tensor) and backgrounds.ndim == 1 else backgrounds
    return Composite(
        images=paste(images, mask, behind, shift, rows=rows, fill=fill, moved=True),
        boxes=shift_boxes(box_algebra.clip(boxes), shift, size),
        mask=mask,
        shift=shift,
        visible=box_algebra.visible_fraction(boxes).to(torch.float32) * shown,
        valid=kept,
        foreground=mask.view(torch.uint8).sum(dim=2, dtype=torch.int32).sum(dim=1) / (size[0] * size[1]),
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
    checks.require(0.0 <= room < 1.0, "boxes_with_room", "room", "in [0, 1)", room)
    pixels = rectangles.pixels_of(boxes, valid, size)
    edges = box_algebra.clip(boxes).to(torch.float64)
    return _make_room(pixels, edges * checks.on_device((size[1], size[0], size[1], size[0]), edges), size, room)


def _rows(images: Tensor, backgrounds: Tensor, rows: Tensor | None) -> Tensor:
    """The row of its background for each image."""
    if rows is not None:
        return rows
    if isinstance(backgrounds, Tensor) and backgrounds.ndim == 1:
        return backgrounds
    return torch.arange(len(images), device=images.device)


def _make_room(pixels: Tensor, edges: Tensor, size: tuple[int, int], room: float) -> Bool[Tensor, "B K"]:
    """Which boxes stay when the largest are dropped until the union leaves `room` of each side free."""
    if pixels.shape[1] == 0:
        return torch.zeros(pixels.shape[:2], dtype=torch.bool, device=pixels.device)
    some = rectangles.count(pixels) > 0
    order = largest_first(pixels)
    from_small = order.flip(1)
    present = in_order(some, from_small)[..., None]
    low = torch.where(present, in_order(edges[..., :2], from_small), torch.inf).cummin(dim=1).values
    high = torch.where(present, in_order(edges[..., 2:], from_small), -torch.inf).cummax(dim=1).values
    most = checks.on_device((size[1], size[0]), edges) * (1 - room) + _NOISE
    fits = (high - low <= most).all(dim=-1)  # the union of this box and all smaller ones
    alone = present[..., 0].cumsum(dim=1) <= 1
    stays = (fits | alone) & present[..., 0]
    return stays.gather(1, from_small.argsort(dim=1))


def _draw_shift(edges: Tensor, kept: Tensor, size: tuple[int, int], key: Key) -> Int64[Tensor, "B 2"]:
    """Whole pixels, uniform over the shifts that leave the kept boxes in the view; zero where there are none."""
    words = key.words("shift", 1).to(edges.device, non_blocking=True)
    if edges.shape[1] == 0:
        return torch.zeros_like(words[:, :2])
    any_kept = kept.any(dim=1, keepdim=True)
    low = torch.where(kept[..., None], edges[..., :2], torch.inf).amin(dim=1)
    high = torch.where(kept[..., None], edges[..., 2:], -torch.inf).amax(dim=1)
    limit = checks.on_device((size[1], size[0]), edges)
    first = torch.where(any_kept, (-low - _NOISE).ceil(), 0).to(torch.int64)
    last = torch.where(any_kept, (limit - high + _NOISE).floor(), 0).to(torch.int64)
    return first + below(words[:, 0::2], words[:, 1::2], last - first + 1)

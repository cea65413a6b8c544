"""Boxes and masks that the region trainers (SoCo, D3SSL) put into their views."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

import geoaug
from geoaug import select

from .arguments import UsageError

RegionLaw = Literal["proposals", "grid", "free"]
Cutout = Literal["none", "square", "prc"]
Jitter = Literal["none", "soco", "rbj"]
OnOff = Literal["on", "off"]


def need_boxes(loader: geoaug.loading.loader.Loader, law: RegionLaw) -> None:
    """Refuse data without boxes where boxes are to come from it."""
    if law == "proposals" and not loader.has_boxes:
        raise UsageError(
            "--data has no boxes: give --proposals STORE (data_prep/selective_search.py makes one), "
            "a .beton written with them, a COCO json, or --regions grid | free"
        )


@torch.no_grad()
def choose_boxes(
    batch: geoaug.Batch, views: tuple[int, ...], k: int, *, law: RegionLaw, min_side: float, min_visible: float
) -> tuple[Tensor, Tensor]:
    """k boxes an image in source units [B, k, 4], eligible in all views, and where there was none, fallback [B].

    The laws `grid` and `free` need no proposals: their boxes are laid into the last of the views, a crop.
    """
    maps = batch.plan.view_from_source
    boxes, valid = batch.boxes, batch.box_valid
    if law != "proposals":
        lay = geoaug.grid_boxes if law == "grid" else geoaug.free_boxes
        boxes = (~maps[:, views[-1]]).boxes(lay(key=batch.key.fold("lay")))
        valid = torch.ones(boxes.shape[:2], dtype=torch.bool, device=boxes.device)
    chosen, _, fallback = select.choose(
        boxes, valid & batch.ok[:, None], k, [maps[:, v] for v in views], [batch.plan.view_sizes[v] for v in views],
        key=batch.key.fold("choose"), min_side=min_side, min_visible=min_visible,
    )  # fmt: skip
    return chosen, fallback


@torch.no_grad()
def kept_pixels(
    boxes: Tensor, valid: Tensor, size: tuple[int, int], key: geoaug.Key, *, cutout: Cutout, window: OnOff,
    window_mode: Literal["masked", "visible"] = "masked",
) -> Tensor:  # fmt: skip
    """Pixels [B, 1, h, w], 1 or 0, that cutout and window leave of a view; the others are to become the mean colour."""
    keep = torch.ones(len(boxes), *size, dtype=torch.bool, device=boxes.device)
    if cutout == "prc":
        keep = geoaug.cutout_masks(boxes, valid, size, key=key)
    elif cutout == "square":
        keep = geoaug.square_cutout_masks(boxes, valid, size, key=key)
    if window == "on":
        keep = keep & geoaug.window_masks(boxes, valid, size, key=key, mode=window_mode)
    return keep[:, None]


@torch.no_grad()
def jittered(boxes: Tensor, key: geoaug.Key, jitter: Jitter) -> Tensor:
    """The boxes [B, K, 4] that are read: as they are, or jittered by SoCo's or D3SSL's law."""
    if jitter == "none":
        return boxes
    return geoaug.jitter_boxes(boxes, key=key.fold("read"), law="soco" if jitter == "soco" else "restricted")

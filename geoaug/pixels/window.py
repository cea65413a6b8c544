"""The visible window of D3SSL's proposal-based random mask (PRM, section 4.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from ..geometry import checks
from ..geometry.rng import Key
from . import rectangles


@dataclass(frozen=True, eq=False)
class Windows:
    """What stays of each view: `window` [B, 4] and the pixels `boxes` [B, K, 4] of the valid boxes, whole pixels."""

    boxes: Int64[Tensor, "B K 4"]
    window: Int64[Tensor, "B 4"]
    size: tuple[int, int]

    @property
    def _kept(self) -> Int64[Tensor, "B _K 4"]:
        return torch.cat((self.boxes, self.window[:, None]), dim=1)

    def keep(self) -> Bool[Tensor, "B _h _w"]:
        """Which pixels of the view are kept: those of the window and of all boxes."""
        return rectangles.drawn(self.boxes[:, :0], self.size, within=self._kept)

    def masked(self) -> Float32[Tensor, " B"]:
        """The share of each view that is masked."""
        view = rectangles.frame(self.size, self.window.device).to(torch.int64)
        view[:2] = 0
        whole = view.expand(len(self.window), 1, 4)
        kept = rectangles.count_uncut(self.boxes[:, :0], whole, within=self._kept)[:, 0]
        return 1 - kept.to(torch.float32) / (self.size[0] * self.size[1])


def window_masks(
    boxes: Float[Tensor, "B K 4"],
    valid: Bool[Tensor, "B K"],
    size: Sequence[int] | int,
    *,
    key: Key,
    share: tuple[float, float] = (0.2, 0.6),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    mode: Literal["masked", "visible"] = "masked",
) -> Bool[Tensor, "B h w"]:
    """Proposal-based random mask (PRM, D3SSL section 4.1): a window and all boxes are kept, the rest is masked.

    One window a view, anywhere in it, of an aspect (width to height, in pixels) log-uniform in `ratio`; a side longer
    than the view's is cut to it. The paper's "scale" can be read in two ways. `mode="masked"`: the window covers all of
    the view but a share drawn from `share`, which is what its figure shows; `"visible"`: the window has that share
    itself, which is what its text says. For eq. 2, `keep = cutout_masks(...) & window_masks(...)`.

    >>> boxes, valid = torch.tensor([[[0.0, 0.0, 0.5, 0.5]]]), torch.tensor([[True]])
    >>> keep = window_masks(boxes, valid, (224, 224), key=Key(0, 0, [7]))
    >>> keep.shape, bool(keep[0, :112, :112].all())
    (torch.Size([1, 224, 224]), True)
    """
    return draw_windows(boxes, valid, size, key=key, share=share, ratio=ratio, mode=mode).keep()


def draw_windows(
    boxes: Float[Tensor, "B K 4"],
    valid: Bool[Tensor, "B K"],
    size: Sequence[int] | int,
    *,
    key: Key,
    share: tuple[float, float] = (0.2, 0.6),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    mode: Literal["masked", "visible"] = "masked",
) -> Windows:
    """The plan behind `window_masks`: every view's window, and the share that is masked."""
    where = "window_masks"
    rectangles.check(boxes, valid, key, where)
    height, width = checks.pair_of_sizes(size, where, "size")
    low, high = checks.interval(share, 0.0, 1.0, where, "share")
    narrow, wide = checks.interval(ratio, 0.0, math.inf, where, "ratio")
    checks.require(narrow > 0, where, "ratio", "positive", tuple(ratio))
    checks.require(mode in ("masked", "visible"), where, "mode", "'masked' or 'visible'", repr(mode))
    u = rectangles.uniform(key, "window", 4, boxes.device)
    drawn = rectangles.between(low, high, u[:, 0])
    area = (1 - drawn if mode == "masked" else drawn) * (height * width)
    aspect = rectangles.between(math.log(narrow), math.log(wide), u[:, 1]).exp()
    sides = torch.stack(((area * aspect).sqrt().clamp(max=width), (area / aspect).sqrt().clamp(max=height)), dim=-1)
    view = rectangles.frame((height, width), boxes.device)
    corner = u[:, 2:] * (view[:2] - sides)
    window = rectangles.whole(torch.cat((corner, corner + sides), dim=-1), view)
    pixels = rectangles.pixels_of(boxes, valid, view)
    return Windows(pixels, window, (height, width))

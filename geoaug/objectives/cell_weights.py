"""RoIAlign with one bin, as what each cell of the map counts: a box's features are then a matrix product."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ..geometry import checks

# A box without area would be given no sample at all and read 0; this share of a cell reads its point or line instead.
THIN = 1e-4


def in_cells(boxes: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The low and high corners [B, K, 2] of unit boxes, in cells of a map."""
    cells = boxes * checks.on_device((width, height, width, height), boxes)
    return cells[..., :2], cells[..., 2:]


def cell_weights(low: Tensor, high: Tensor, size: tuple[int, int], aligned: bool, ratio: int) -> Tensor:
    """What the cells of a map of (height, width) count in the mean over a box's samples, low to high [B, K, 2].

    RoIAlign's law without a loop over samples, for both axes at once; the shorter one is filled up with zeros. Up to a
    sample p, a share clamp(t - p, 0, 1) of it belongs to the cells before t, so cell j's part is the step from j to
    j + 1 of their sum. That sum is itself a step of the sum of max(0, t - p), an arithmetic series.
    """
    sides = (size[1], size[0])
    first, far = (low - 0.5, high - 0.5) if aligned else (low, high)
    extent = far - first if aligned else (far - first).clamp(min=1)
    number = extent.ceil() if ratio == 0 else torch.full_like(extent, ratio)  # of samples, as the operator rounds it
    count = number.clamp(min=1).double()[..., None]
    gap = (extent[..., None] / count).clamp(min=1e-30)  # a box without samples has no gap either
    first = first[..., None] + gap / 2  # the series loses a digit or two, so in float64

    t = torch.arange(max(sides) + 1, dtype=count.dtype, device=low.device)
    side = checks.on_device(sides, count)[:, None]
    before = torch.minimum(((t - first) / gap).ceil().clamp(min=0), number[..., None])  # samples before t
    until = (before * (t - first) - gap * before * (before - 1) / 2).diff()  # what belongs to the cells before 1, 2 ...
    # Samples over a cell outside the map count nothing, nearer ones belong to its outermost cells.
    left = torch.minimum(((-1 - first) / gap).ceil().clamp(min=0), number[..., None])
    right = torch.minimum(((side - first) / gap).floor().clamp(min=-1) + 1, number[..., None])
    steps = torch.cat((left, torch.where(t[1:] < side, until, right)), -1).diff()
    x, y = (steps / count).to(low.dtype).unbind(2)  # each [B, K, max(h, w)]
    return (y[..., : size[0], None] * x[..., None, : size[1]]).flatten(2)


def roi_weights(
    boxes: Float[Tensor, "B K 4"], size: int | tuple[int, int], *, aligned: bool = True, sampling_ratio: int = 0
) -> Float[Tensor, "B K cells"]:
    """What each cell of a map of (height, width) counts in a box's mean by RoIAlign with one bin, [B, K, height*width].

    `weights @ maps.flatten(2).mT` are `roi_features` of one cell, [B, K, C]; made once where the boxes were drawn, they
    serve all networks and steps that read the boxes.

    >>> roi_weights(torch.tensor([[[0.0, 0.0, 0.5, 1.0]]]), (1, 2))
    tensor([[[1., 0.]]])
    """
    where = "roi_weights"
    boxes = checks.xyxy(boxes, where, "boxes")
    checks.require(boxes.ndim == 3, where, "boxes", "floating unit boxes [B, K, 4]", checks.shape_of(boxes))
    height, width = checks.pair_of_sizes(size, where, "size")
    sampling_ratio = checks.index(sampling_ratio, 0, 2**10, where, "sampling_ratio")
    boxes = boxes if boxes.dtype == torch.float64 else boxes.float()
    low, high = in_cells(boxes, height, width)
    return cell_weights(low, torch.maximum(high, low + THIN), (height, width), aligned, sampling_ratio)

"""Affinities of one point of a picture with all others, and how well they segment the object it lies on (PLRC)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from ..geometry import checks
from .readout import sample_points
from .vectors import unit, wide


@torch.no_grad()
def affinity_maps(
    features: Float[Tensor, "B C _ _"], points: Float[Tensor, "B K 2"], size: int | tuple[int, int] = 56
) -> Float[Tensor, "B K h w"]:
    """The cosine of the feature at each point with those of all cells, on a map brought to `size` (PLRC, section 4.4).

    >>> affinity_maps(torch.rand(2, 2048, 28, 28), torch.rand(2, 5, 2)).shape
    torch.Size([2, 5, 56, 56])
    """
    height, width = checks.pair_of_sizes(size, "affinity_maps", "size")
    ok = isinstance(features, Tensor) and features.ndim == 4 and features.is_floating_point()
    checks.require(ok, "affinity_maps", "features", "floating maps [B, C, h, w]", checks.shape_of(features))
    with torch.autocast(features.device.type, enabled=False):
        maps = functional.interpolate(wide(features), (height, width), mode="bilinear", align_corners=False)
        at = unit(sample_points(maps, points))  # [B, K, C]
        cells = unit(maps.flatten(2).mT)  # [B, h*w, C]
        return torch.bmm(at, cells.mT).view(*at.shape[:2], height, width)


def affinity_iou(
    maps: Float[Tensor, "B K h w"],
    masks: Bool[Tensor, "B K h w"],
    *,
    keep: float = 0.8,
    law: Literal["mass", "cells"] = "mass",
    ignore: Bool[Tensor, "B h w"] | None = None,
) -> Float[Tensor, "B K"]:
    """Jaccard similarity of what a threshold leaves of each affinity map with the object's mask (PLRC, Table 3).

    "mass" keeps the fewest cells that hold a share `keep` of the map's sum, negative affinities counting as 0; "cells"
    keeps that share of the cells. Ignored cells count on neither side. Without a cell on either side it is 0.

    >>> maps = torch.tensor([[[[0.6, 0.3], [0.1, -0.5]]]])
    >>> masks = torch.tensor([[[[True, False], [False, False]]]])
    >>> affinity_iou(maps, masks), affinity_iou(maps, masks, law="cells")
    (tensor([[0.5000]]), tensor([[0.2500]]))
    """
    where = "affinity_iou"
    ok = isinstance(maps, Tensor) and maps.ndim == 4 and maps.is_floating_point()
    checks.require(ok, where, "maps", "floating maps [B, K, h, w]", checks.shape_of(maps))
    ok = isinstance(masks, Tensor) and masks.dtype == torch.bool and masks.shape == maps.shape
    checks.require(ok, where, "masks", f"bool {list(maps.shape)}", checks.shape_of(masks))
    checks.require(0 < keep <= 1, where, "keep", "a share in (0, 1]", keep)
    checks.require(law in ("mass", "cells"), where, "law", "'mass' or 'cells'", repr(law))
    flat, mask = wide(maps).flatten(2), masks.flatten(2)
    if ignore is None:
        counted = torch.ones_like(mask)
    else:
        shape = [len(maps), *maps.shape[2:]]
        ok = isinstance(ignore, Tensor) and ignore.dtype == torch.bool and list(ignore.shape) == shape
        checks.require(ok, where, "ignore", f"bool {shape}", checks.shape_of(ignore))
        counted = ~ignore.flatten(1)[:, None].expand_as(mask)
    falling, order = flat.sort(dim=2, descending=True, stable=True)
    if law == "cells":
        first = torch.arange(flat.shape[2], device=flat.device) < math.ceil(keep * flat.shape[2])
        first = first.expand_as(mask)
    else:
        mass = falling.clamp(min=0)
        before = mass.cumsum(dim=2) - mass
        first = (before < keep * mass.sum(dim=2, keepdim=True)) & (mass > 0)
    kept = torch.zeros_like(mask).scatter(2, order, first)
    both, either = ((x & counted).sum(dim=2) for x in (kept & mask, kept | mask))
    return both / either.clamp(min=1)

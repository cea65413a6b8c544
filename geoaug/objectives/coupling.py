"""How far an object's features depend on its neighbours and on its place (D3SSL, section 3)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Int64, Integer, Num
from torch import Tensor
from torch.nn import functional

from ..geometry import checks
from ..geometry.rng import Key
from . import canvases
from .backbone import Backbone, chunks, layers, tile_means

_SMALL = 0.05  # a ratio over a cosine smaller than this says nothing; it is left out and counted


class CouplingRate(NamedTuple):
    """D3SSL's coupling rate of one layer: 1 is ideal. `kept` of `pairs` are in the mean of ratios; NaN if none is."""

    ratio_of_means: float
    mean_of_ratios: float
    kept: int
    pairs: int


def different_pairs(labels: Integer[Tensor, " N"], *, key: Key) -> Int64[Tensor, "pairs 2"]:
    """For each id of the key a pair of objects of different classes, as indices: the first uniform, then the second.

    >>> labels = torch.tensor([0, 0, 1, 2])
    >>> pairs = different_pairs(labels, key=Key(0, 0, range(1000)))
    >>> pairs.shape, bool((labels[pairs[:, 0]] != labels[pairs[:, 1]]).all())
    (torch.Size([1000, 2]), True)
    """
    ordered, order = labels.sort(stable=True)
    several = len(labels) > 0 and bool(ordered[0] != ordered[-1])
    checks.require(several, "different_pairs", "labels", "of two classes or more", checks.shape_of(labels))
    first = key.integers("first", 1, len(labels))[:, 0]
    own = labels[first].contiguous()
    start, end = torch.searchsorted(ordered, own), torch.searchsorted(ordered, own, right=True)
    others = (len(labels) - (end - start))[:, None]
    place = key.integers("second", 1, others)[:, 0]  # among the objects in order of class, its own class left out
    return torch.stack((first, order[torch.where(place >= start, place + end - start, place)]), dim=1)


@torch.no_grad()
def coupling_rate(
    backbone: Backbone,
    first: Num[Tensor, "N C H W"],
    second: Num[Tensor, "N C H W"],
    *,
    batch_size: int = 32,
    device: torch.device | str | None = None,
) -> dict[str, CouplingRate]:
    """How far an object's features change with its neighbour, per layer (D3SSL, section 3.1); 1 is ideal.

    first and second are tiles of objects of different classes, paired by row. With A left of B on one canvas and A
    alone at its place on another, a pair's rate is cos(A beside B, B) / cos(A alone, B).

    >>> pool = lambda images: {"pool": functional.avg_pool2d(images, 4)}
    >>> round(coupling_rate(pool, torch.rand(5, 3, 8, 8), torch.rand(5, 3, 8, 8))["pool"].ratio_of_means, 6)
    1.0
    """
    checks.require(len(first) > 0, "coupling_rate", "first", "one pair of tiles or more", checks.shape_of(first))
    found: dict[str, list[Tensor]] = {}
    for rows in chunks(len(first), batch_size, "coupling_rate"):
        both, alone = canvases.side_by_side(first[rows].to(device), second[rows].to(device))
        together, apart = (layers(backbone, canvas, "coupling_rate") for canvas in (both, alone))
        for name, one in together.items():
            a, b = tile_means(one, 1, 2).unbind(1)
            single = tile_means(apart[name], 1, 2)[:, 0]
            cosines = [functional.cosine_similarity(x, b, dim=1) for x in (a, single)]
            found.setdefault(name, []).append(torch.stack(cosines).double().cpu())  # [2, rows]
    rates = {}
    for name, parts in found.items():
        beside, alone = torch.cat(parts, dim=1)
        large = alone.abs() >= _SMALL
        mean = float(alone.mean())
        rate = float(beside.mean()) / mean if mean else math.nan
        rates[name] = CouplingRate(rate, float((beside / alone)[large].mean()), int(large.sum()), len(large))
    return rates


@torch.no_grad()
def position_similarity(
    backbone: Backbone,
    tiles: Num[Tensor, "N C H W"],
    *,
    batch_size: int = 16,
    device: torch.device | str | None = None,
) -> dict[str, float]:
    """How alike one tile's features are in the middle and around it on a 3 x 3 canvas, per layer (D3SSL, section 3.2).

    The mean cosine of the middle tile with the eight others, over all images: 1 for features blind to position.

    >>> position_similarity(lambda images: {"pixels": images}, torch.rand(5, 3, 8, 8))["pixels"] > 0.9999
    True
    """
    checks.require(len(tiles) > 0, "position_similarity", "tiles", "one tile or more", checks.shape_of(tiles))
    found: dict[str, float] = {}
    for rows in chunks(len(tiles), batch_size, "position_similarity"):
        for name, one in layers(backbone, canvases.tiled(tiles[rows].to(device)), "position_similarity").items():
            means = tile_means(one, 3, 3)
            cosines = functional.cosine_similarity(means, means[:, 4:5], dim=2).double()  # [rows, 9]
            found[name] = found.get(name, 0.0) + float(cosines.sum() - cosines[:, 4].sum())
    return {name: total / (8 * len(tiles)) for name, total in found.items()}

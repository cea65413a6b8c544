"""k-means on a backbone's cells: the baseline that unsupervised segmentation is measured against."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from geoaug import Key


def unit_cells(maps: Tensor) -> Tensor:
    """The vectors of a map's cells at length 1, [B, h * w, C] in float32."""
    return functional.normalize(maps.float().flatten(2).mT, dim=-1)


def drawn_cells(maps: Tensor, count: int, key: Key) -> Tensor:
    """At most `count` cells of each image, drawn by the key: unit vectors [B * count, C]."""
    cells = unit_cells(maps)
    if cells.shape[1] > count:
        rows = key.uniform("cells", cells.shape[1]).argsort(dim=1)[:, :count].to(cells.device)
        cells = cells.gather(1, rows[..., None].expand(-1, -1, cells.shape[-1]))
    return cells.flatten(0, 1)


@torch.no_grad()
def k_means(vectors: Tensor, k: int, *, seed: int = 0, rounds: int = 50) -> Tensor:
    """Centres [k, D] of vectors [N, D], N >= k: k-means++, then Lloyd's rounds until nothing moves.

    A centre that nothing is nearest to moves to the vector that is farthest from its own.

    >>> centres = k_means(torch.tensor([[0.0], [0.1], [5.0], [5.1]]), 2)
    >>> [round(x, 2) for x in sorted(centres.flatten().tolist())]
    [0.05, 5.05]
    """
    if not len(vectors) >= k >= 1:
        raise ValueError(f"k_means: vectors must be at least k, {k}, got {len(vectors)}")
    draws = Key(seed, 0, torch.arange(k)).uniform("k-means++", 1)[:, 0].to(vectors.device)
    centres = vectors[(draws[:1] * len(vectors)).long()]
    near = (vectors - centres[0]).square().sum(1)  # to the nearest centre so far
    for i in range(1, k):
        along = near.double().cumsum(0)
        row = torch.searchsorted(along, draws[i].double() * along[-1]).clamp(max=len(vectors) - 1)
        centres = torch.cat((centres, vectors[row][None]))
        near = torch.minimum(near, (vectors - centres[i]).square().sum(1))
    own = vectors.new_full((len(vectors),), -1, dtype=torch.int64)
    for _ in range(rounds):
        near, new = squared(vectors, centres).min(dim=1)
        if torch.equal(new, own):
            break
        own = new
        sums = torch.zeros_like(centres).index_add_(0, own, vectors)
        counts = torch.bincount(own, minlength=k)
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centres)
        empty = (counts == 0).nonzero().flatten()
        centres[empty] = vectors[near.argsort(descending=True)[: len(empty)]]
    return centres


def squared(vectors: Tensor, centres: Tensor) -> Tensor:
    """Squared distances [..., k] of vectors [..., D] from centres [k, D]."""
    return vectors.square().sum(-1, keepdim=True) - 2 * vectors @ centres.mT + centres.square().sum(-1)

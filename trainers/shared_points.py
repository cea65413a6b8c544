"""Points that two views share: laid into their overlap by a law, and chosen among by how hard they are."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

import geoaug

PointLaw = Literal["regular", "corners", "random", "mild", "heavy"]
# PointRend's law, as DenseSiam's Table A2 has it: so many candidates for a point, and the share that are the hardest.
BIASED = {"random": (1, 0.0), "mild": (3, 0.75), "heavy": (10, 1.0)}


@dataclass(frozen=True)
class SharedPoints:
    """The same source points in both views, [B, P, 2]; an image is valid if its views overlap by a cell or more.

    The first `candidates` are to be chosen among, and `hard` of them kept; the others are kept as they are.
    """

    in_x1: Tensor
    in_x2: Tensor
    valid: Tensor  # [B]
    candidates: int = 0
    hard: int = 0

    def split(self, parts: int) -> list[SharedPoints]:
        """The same in so many parts of equal size."""
        columns = [x.chunk(parts) for x in (self.in_x1, self.in_x2, self.valid)]
        return [dataclasses.replace(self, in_x1=a, in_x2=b, valid=ok) for a, b, ok in zip(*columns, strict=True)]

    def hardest(self, distances: Tensor) -> SharedPoints:
        """Without all candidates but those of the largest distance [B, candidates]."""
        picked = distances.topk(self.hard, dim=1).indices[..., None].expand(-1, -1, 2)
        in_x1, in_x2 = (
            torch.cat((x[:, : self.candidates].gather(1, picked), x[:, self.candidates :]), dim=1)
            for x in (self.in_x1, self.in_x2)
        )
        return SharedPoints(in_x1, in_x2, self.valid)


@torch.no_grad()
def share_points(batch: geoaug.Batch, k: int, law: PointLaw, *, cells: int) -> SharedPoints:
    """k x k points in the overlap of the batch's two views, whose maps have `cells` cells a side.

    Where views overlap by less than a cell of the coarser one, nothing is shared: such an image is not valid, and its
    points are laid into each view alike, so that a batch norm over points has something to go by.
    """
    a, b = (batch.plan.view_from_source[:, v] for v in (0, 1))
    sizes = (batch.plan.view_sizes[0], batch.plan.view_sizes[1])
    cell = -(-max(max(size) for size in sizes) // cells)  # pixels, rounded up
    _, _, overlaps = geoaug.overlap_grid(a, b, 1, sizes=sizes, min_size=cell - 1)
    shares, candidates, hard = _shares(batch.key.fold("points"), k, law)
    low, high = geoaug.overlap(a, b).in_source[:, None].chunk(2, dim=-1)
    in_source = low + shares * (high - low)  # [B, P, 2]
    in_x1, in_x2 = (torch.where(overlaps[..., None], view(in_source), shares) for view in (a, b))
    return SharedPoints(in_x1, in_x2, overlaps[:, 0] & batch.ok, candidates, hard)


def _shares(key: geoaug.Key, k: int, law: PointLaw) -> tuple[Tensor, int, int]:
    """Points of the unit square [B or 1, P, 2], how many are candidates, and how many of these to keep."""
    device = key.ids.device
    if law == "regular":
        return geoaug.grids.cell_centers(k, k, device=device)[None], 0, 0
    if law == "corners":
        side = torch.linspace(0, 1, k, device=device) if k > 1 else torch.full((1,), 0.5, device=device)
        y, x = torch.meshgrid(side, side, indexing="ij")
        return torch.stack((x, y), dim=-1).flatten(0, 1)[None], 0, 0
    times, share = BIASED[law]
    hard = round(share * k * k)
    candidates = times * k * k if hard else 0
    count = candidates + k * k - hard
    return key.uniform("shares", 2 * count).unflatten(1, (count, 2)), candidates, hard

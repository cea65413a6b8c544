"""Whether a backbone's cells find each other again in a mirrored and coloured picture (LC-loss, section 4.6)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Num
from torch import Tensor
from torch.nn import functional

from ..geometry import checks
from .backbone import Backbone, chunks, layers

_PAIRS = 2**24  # cosines that are in memory at a time


class Correspondence(NamedTuple):
    """The share of cells that found their place, among so many cells of an image: 1 / cells is chance."""

    accuracy: float
    cells: int


@torch.no_grad()
def correspondence_accuracy(
    backbone: Backbone,
    images: Num[Tensor, "N C H W"],
    mirrored: Num[Tensor, "N C H W"],
    *,
    batch_size: int = 32,
    device: torch.device | str | None = None,
) -> dict[str, Correspondence]:
    """The share of cells whose most similar cell of a mirrored picture is their own, per layer (LC-loss, section 4.6).

    Row by row `mirrored` shows `images` flipped left to right, with other colours. Similar is the cosine: of equal ones
    the first counts, so that a backbone that says the same everywhere finds one cell in h * w.

    >>> images = torch.rand(4, 3, 8, 8)
    >>> correspondence_accuracy(lambda x: {"pixels": x}, images, images.flip(-1))["pixels"]
    Correspondence(accuracy=1.0, cells=64)
    """
    where = "correspondence_accuracy"
    checks.require(len(images) > 0, where, "images", "one image or more", checks.shape_of(images))
    same = mirrored.shape == images.shape
    checks.require(same, where, "mirrored", f"of images' shape {list(images.shape)}", checks.shape_of(mirrored))
    hits: dict[str, list[Tensor]] = {}
    for rows in chunks(len(images), batch_size, where):
        first, second = (layers(backbone, x[rows].to(device), where) for x in (images, mirrored))
        for name, one in first.items():
            a, b = (functional.normalize(x.float().flatten(2), dim=1) for x in (one, second[name].flip(-1)))
            own = torch.arange(a.shape[2], device=a.device)
            for some in chunks(len(own), max(1, _PAIRS // (len(a) * len(own))), where):
                found = (a[:, :, some].mT @ b).argmax(-1)  # [rows, cells]
                hits.setdefault(name, []).append((found == own[some]).sum().cpu())
    scores = {}
    for name, parts in hits.items():
        cells = first[name].shape[2] * first[name].shape[3]
        scores[name] = Correspondence(int(torch.stack(parts).sum()) / (len(images) * cells), cells)
    return scores

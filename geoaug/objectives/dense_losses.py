"""DenseSiam's losses: similarity of points, embeddings of regions and their contrast, in float32 at least."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..geometry import checks
from .vectors import unit as _unit
from .vectors import vectors as _vectors
from .vectors import wide as _wide

# Least mass that is divided by: a category that no point belongs to has an embedding of nearly zero.
_MASSLESS = 1e-6


def dense_similarity(
    p: Float[Tensor, "*batch N"],
    z: Float[Tensor, "*batch N"],
    *,
    kind: Literal["cosine", "cross_entropy"],
    target: Literal["z", "p"] = "z",
) -> Float[Tensor, "*batch"]:
    """DenseSiam's distance of two predictions of one point, one direction of its eq. 1; z is detached.

    `cosine` is -cos(p, z) (eq. 2, and SimSiam's), in [-1, 1]; `cross_entropy` -softmax(z) . log softmax(p), at least
    0. The paper prints its eq. 3 with the sides exchanged, which is `target="p"`: it only sharpens p onto z's largest.

    >>> p, z = torch.rand(2, 49, 512), torch.rand(2, 49, 512)  # B = 2 images, 7 x 7 points, N = 512 categories
    >>> dense_similarity(p, z, kind="cross_entropy").shape
    torch.Size([2, 49])
    """
    where = "dense_similarity"
    p, z = _vectors(p, where, "p"), _vectors(z, where, "z")
    checks.require(p.shape == z.shape, where, "z", f"of p's shape {list(p.shape)}", checks.shape_of(z))
    checks.require(kind in ("cosine", "cross_entropy"), where, "kind", "'cosine' or 'cross_entropy'", repr(kind))
    ok = target in (("z", "p") if kind == "cross_entropy" else ("z",))
    checks.require(ok, where, "target", "'z', or 'p' with cross-entropy", repr(target))
    with torch.autocast(p.device.type, enabled=False):
        z = z.detach()
        if kind == "cosine":
            return -(_unit(p) * _unit(z)).sum(dim=-1)
        aim, found = (z, p) if target == "z" else (p, z)
        return -(_wide(aim).softmax(dim=-1) * _wide(found).log_softmax(dim=-1)).sum(dim=-1)


def region_embeddings(
    masks: Float[Tensor, "*batch P N"],
    features: Float[Tensor, "*batch P C"],
    *,
    softmax: bool = True,
    by_mass: bool = False,
) -> Float[Tensor, "*batch N C"]:
    """One vector for each of N pseudo-categories: the features of P points, weighted by their masks (DenseSiam, eq. 4).

    The masks are the projector's values, a softmax over the categories of each point as in the public code; the paper
    prints the values as they are (`softmax=False`). `by_mass` divides by a category's sum over the points.

    >>> region_embeddings(torch.rand(2, 49, 512), torch.rand(2, 49, 2048)).shape
    torch.Size([2, 512, 2048])
    """
    where = "region_embeddings"
    masks, features = _vectors(masks, where, "masks"), _vectors(features, where, "features")
    checks.require(masks.ndim >= 2, where, "masks", "floating values [*batch, P, N]", checks.shape_of(masks))
    ok = features.shape[:-1] == masks.shape[:-1]
    checks.require(ok, where, "features", f"floating vectors {[*masks.shape[:-1], 'C']}", checks.shape_of(features))
    checks.require(softmax or not by_mass, where, "by_mass", "False without softmax", by_mass)
    with torch.autocast(masks.device.type, enabled=False):
        shares = _wide(masks).softmax(dim=-1) if softmax else _wide(masks)
        regions = shares.mT @ _wide(features).to(shares.dtype)  # [*batch, N, C]
        if by_mass:
            regions = regions / shares.sum(dim=-2)[..., None].clamp(min=_MASSLESS)
        return regions


def region_contrast(
    u: Float[Tensor, "*batch N D"],
    v: Float[Tensor, "*batch N D"],
    *,
    temperature: float,
    unit: bool = True,
    stop_gradient: bool = False,
) -> Float[Tensor, "*batch N"]:
    """Each region of one view told from the N - 1 others of its image in the other view (DenseSiam, eq. 6).

    Both sides learn, as in the paper and the public code, unless `stop_gradient` detaches v. On cosines as in the code;
    `unit=False` with temperature 1 is eq. 6 as printed.

    >>> u, v = torch.rand(2, 512, 128), torch.rand(2, 512, 128)
    >>> region_contrast(u, v, temperature=0.1).shape
    torch.Size([2, 512])
    """
    where = "region_contrast"
    u, v = _vectors(u, where, "u"), _vectors(v, where, "v")
    checks.require(u.ndim >= 2, where, "u", "floating vectors [*batch, N, D]", checks.shape_of(u))
    checks.require(u.shape == v.shape, where, "v", f"of u's shape {list(u.shape)}", checks.shape_of(v))
    checks.require(0 < temperature < math.inf, where, "temperature", "positive and finite", temperature)
    with torch.autocast(u.device.type, enabled=False):
        v = v.detach() if stop_gradient else v
        u, v = (_unit(u), _unit(v)) if unit else (_wide(u), _wide(v))
        logits = (u / temperature) @ v.mT  # [*batch, N, N]
        return logits.logsumexp(dim=-1) - logits.diagonal(dim1=-2, dim2=-1)

"""Losses: each gives one value per element, in float32 at least; `mean` reduces them over what is valid.

The teacher's side (`z`, `k` and the queue) is detached here, so that no gradient can reach it whatever a model does.
Vectors are brought to unit length here too, with autocast off: half precision has no room for a cosine over 0.1.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from ..geometry import checks
from .dense_losses import dense_similarity, region_contrast, region_embeddings
from .local_contrast import local_contrastive, local_regression
from .point_losses import affinity_distillation, point_region_contrast, positive_pairs
from .vectors import unit as _unit
from .vectors import vectors as _vectors

__all__ = [
    "affinity_distillation",
    "dense_similarity",
    "info_nce",
    "local_contrastive",
    "local_regression",
    "mean",
    "point_region_contrast",
    "positive_pairs",
    "region_contrast",
    "region_embeddings",
    "regression",
]


def regression(p: Float[Tensor, "*batch D"], z: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch"]:
    """BYOL's distance of unit vectors, 2 - 2 cos(p, z), in [0, 4] (SoCo, SCRL); z is detached.

    >>> regression(torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
    tensor([0.])
    """
    p, z = _vectors(p, "regression", "p"), _vectors(z, "regression", "z")
    checks.require(p.shape == z.shape, "regression", "z", f"of p's shape {list(p.shape)}", checks.shape_of(z))
    with torch.autocast(p.device.type, enabled=False):
        return 2 - 2 * (_unit(p) * _unit(z.detach())).sum(dim=-1)


def info_nce(
    q: Float[Tensor, "*batch D"],
    k: Float[Tensor, "*positives D"],
    queue: Float[Tensor, "Q D"],
    queue_valid: Bool[Tensor, " Q"],
    *,
    temperature: float,
) -> Float[Tensor, "*positives"]:
    """Each query told from the valid entries of a queue by its key, on cosines (D3SSL, eq. 5; MoCo); k is detached.

    Negatives are the queue alone: neither other slots of the image nor other keys of the batch. Keys may have axes in
    front of the queries' own, for several positives of one query, each with a loss of its own; the negatives are then
    compared once. A queue without a valid entry gives log 1 = 0. An entry that is not valid may hold anything.

    >>> q, queue = torch.rand(2, 4, 128), torch.rand(4096, 128)  # B = 2 images of K = 4 boxes
    >>> info_nce(q, torch.rand(2, 4, 128), queue, torch.ones(4096).bool(), temperature=0.2).shape
    torch.Size([2, 4])
    """
    where = "info_nce"
    q, k = _vectors(q, where, "q"), _vectors(k, where, "k")
    checks.require(k.shape[k.ndim - q.ndim :] == q.shape, where, "k", f"[..., *{list(q.shape)}]", checks.shape_of(k))
    ok = isinstance(queue, Tensor) and queue.is_floating_point() and queue.ndim == 2 and queue.shape[1] == q.shape[-1]
    checks.require(ok, where, "queue", f"floating vectors [Q, {q.shape[-1]}]", checks.shape_of(queue))
    ok = isinstance(queue_valid, Tensor) and queue_valid.dtype == torch.bool and queue_valid.shape == queue.shape[:1]
    checks.require(ok, where, "queue_valid", f"bool [{len(queue)}]", checks.shape_of(queue_valid))
    checks.require(0 < temperature < math.inf, where, "temperature", "positive and finite", temperature)

    with torch.autocast(q.device.type, enabled=False):
        query = _unit(q)
        positive = (query * _unit(k.detach())).sum(dim=-1) / temperature
        negatives = _unit(torch.where(queue_valid[:, None], queue.detach(), 0)).to(query.dtype)  # [Q, D]
        # As finite as a logit may be, so that a queue without a valid entry has a gradient too: none.
        void = torch.zeros_like(negatives[:, 0]).masked_fill(~queue_valid, torch.finfo(query.dtype).min / 2)
        # One product with its bias, since [B*K, Q] is the largest tensor of a step: 0.3 GB for 1,024 x 65,536.
        logits = torch.addmm(void, (query / temperature).reshape(-1, q.shape[-1]), negatives.mT)
        others = logits.logsumexp(dim=-1).reshape(q.shape[:-1])
        # -log(e^p / (e^p + e^o)) = log(1 + e^(o - p)), without the cancellation where it is small
        return functional.softplus(others - positive)


def mean(
    values: Float[Tensor, "*batch"],
    valid: Bool[Tensor, "*batch"],
    *,
    per_image: bool = False,
    count: float | Tensor | None = None,
) -> Float[Tensor, ""]:
    """The mean of the valid elements [B, ...]; with `per_image` of each image's own mean, over images that have any.

    `count` takes the place of the number of valid elements (per_image: of images with at least one): summed over the
    ranks and over the step's micro-batches, divided by the number of ranks. DDP's mean over ranks is then the mean over
    the whole step. Without a valid element the result is 0, inside the graph.

    >>> values = torch.tensor([[1.0, 3.0], [5.0, 9.0]])
    >>> valid = torch.tensor([[True, True], [True, False]])
    >>> mean(values, valid), mean(values, valid, per_image=True), mean(values, valid, count=4.5)
    (tensor(3.), tensor(3.5000), tensor(2.))
    """
    ok = isinstance(values, Tensor) and values.is_floating_point()
    checks.require(ok, "mean", "values", "a floating tensor [B, ...]", checks.shape_of(values))
    ok = isinstance(valid, Tensor) and valid.dtype == torch.bool and valid.shape == values.shape
    checks.require(ok, "mean", "valid", f"bool {list(values.shape)}", checks.shape_of(valid))
    if isinstance(count, Tensor):
        checks.require(count.ndim == 0, "mean", "count", "one number", checks.shape_of(count))
    elif count is not None:
        checks.require(0 <= count < math.inf, "mean", "count", "a finite number of at least 0", count)

    with torch.autocast(values.device.type, enabled=False):
        # A masked element is replaced, not multiplied: it may be NaN.
        kept = torch.where(valid, values if values.dtype == torch.float64 else values.float(), 0)
        if per_image:
            checks.require(values.ndim >= 1, "mean", "values", "[B, ...] with per_image", checks.shape_of(values))
            found = valid[:, None].flatten(1).sum(dim=1)  # [B]
            kept, valid = kept[:, None].flatten(1).sum(dim=1) / found.clamp(min=1), found > 0
        total = kept.sum()
        number = valid.sum() if count is None else count
        if isinstance(number, Tensor):
            number = torch.where(number > 0, number, 1).to(total.dtype)
        return total / number if isinstance(number, Tensor) or number > 0 else total * 0

"""PLRC's losses on points: contrast of regions point by point, and distillation of the affinities of points.

Every query point is compared with all keys of its image or of the batch, so the logits of 32 images with 256 points
each are 268 MB. They are made a part at a time and never kept: the gradient of a query is a mean of keys, weighted by
its affinities, and is taken while these are at hand. What stays for the backward pass is as large as the queries.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ..geometry import checks
from .vectors import unit, vectors

CHUNK = 2**23  # logits held at a time: 32 MB in float32


def point_region_contrast(
    p: Float[Tensor, "B M D"],
    a: Int64[Tensor, "B M"],
    p2: Float[Tensor, "B2 M2 D"],
    a2: Int64[Tensor, "B2 M2"],
    *,
    temperature: float,
    negatives: Literal["batch", "image"] = "batch",
    first: int = 0,
    chunk: int = CHUNK,
) -> Float[Tensor, " B"]:
    """Each image's mean over its positive pairs: points of one region told from all other key points (PLRC, eq. 2).

    Points p of one view, keys p2 of the other and their regions; a negative region is no point at all. A pair is
    positive if image and region agree. The denominator runs over all keys of all images, positives included, or with
    `negatives="image"` over those of the point's own image. Keys may be those of more images, as ranks gather them;
    then `first` is the row of p's first image. p2 is detached. The value of an image without a pair is 0, inside the
    graph: `positive_pairs` says which. At most `chunk` logits are in memory; the loss does not depend on it.

    >>> p, a = torch.randn(32, 256, 128), torch.arange(16).repeat_interleave(16).expand(32, 256)
    >>> point_region_contrast(p, a, torch.randn(32, 256, 128), a, temperature=0.2).shape
    torch.Size([32])
    """
    where = "point_region_contrast"
    p, p2 = _points(p, where, "p"), _points(p2, where, "p2")
    _check_ids(a, p, where, "a")
    first = checks.index(first, 0, 2**31, where, "first")
    fits = len(p2) >= first + len(p) and p2.shape[-1] == p.shape[-1]
    expected = f"points of {first + len(p)} images or more [B2, M2, {p.shape[-1]}]"
    checks.require(fits, where, "p2", expected, checks.shape_of(p2))
    _check_ids(a2, p2, where, "a2")
    _check_temperature(temperature, where, "temperature")
    checks.require(negatives in ("batch", "image"), where, "negatives", "'batch' or 'image'", repr(negatives))
    chunk = checks.index(chunk, 1, 2**40, where, "chunk")

    with torch.autocast(p.device.type, enabled=False):
        own = slice(first, first + len(p))
        query, key = (unit(torch.where((i >= 0)[..., None], x, 0)) for x, i in ((p, a), (p2.detach(), a2)))
        query, key = query.to(torch.promote_types(query.dtype, key.dtype)), key.to(query.dtype)
        same = _same(a, a2[own])  # [B, M, M2]
        pairs = same.sum(dim=-1)  # [B, M]
        positives = (query * (same.to(key.dtype) @ key[own])).sum(dim=-1) / temperature  # of a point's pairs together
        sides = [query, key[own], a2[own] >= 0]
        if negatives == "batch":
            sides = [x.flatten(0, 1)[None] for x in (query, key, a2 >= 0)]
        totals = _CrossEntropy.apply(*sides, None, None, temperature, 1.0, chunk).view(query.shape[:-1])
        # A point without a pair may have no key either, so its total is left out, not multiplied by 0.
        each = torch.where(pairs > 0, pairs * totals - positives, 0).sum(dim=1)
        return each / pairs.sum(dim=1).clamp(min=1)


def affinity_distillation(
    p: Float[Tensor, "B M D"],
    keys: Float[Tensor, "B K D"],
    teacher: Float[Tensor, "B M E"],
    teacher_keys: Float[Tensor, "B K E"],
    valid: Bool[Tensor, "B K"],
    *,
    temperature: float,
    teacher_temperature: float,
    across: Literal["image", "batch"] = "image",
    chunk: int = CHUNK,
) -> Float[Tensor, "B M"]:
    """Each point's cross entropy of its affinities with the teacher's (PLRC, eq. 3 and 4); gradient through p alone.

    Row i of the student is the softmax of cos(p_i, keys) / temperature over the valid keys of the image, or of the
    batch with `across="batch"`; row i of the teacher that of cos(teacher_i, teacher_keys) / teacher_temperature. So
    teacher_i is the teacher's feature of point i, and key k of both is one point. Where no key is valid the value is
    finite and says nothing.

    >>> v, v2 = torch.randn(2, 8, 256, 128)  # the student's points and the teacher's keys
    >>> of_teacher = torch.randn(8, 256, 128)  # the teacher's features of the student's points
    >>> every = torch.ones(8, 256, dtype=torch.bool)
    >>> affinity_distillation(v, v2, of_teacher, v2, every, temperature=0.1, teacher_temperature=0.07).shape
    torch.Size([8, 256])
    """
    where = "affinity_distillation"
    p, keys = _points(p, where, "p"), _points(keys, where, "keys")
    teacher, teacher_keys = _points(teacher, where, "teacher"), _points(teacher_keys, where, "teacher_keys")
    same = len(keys) == len(p) and keys.shape[-1] == p.shape[-1]
    checks.require(same, where, "keys", f"points [{len(p)}, K, {p.shape[-1]}]", checks.shape_of(keys))
    same = teacher.shape[:2] == p.shape[:2]
    checks.require(same, where, "teacher", f"points [{len(p)}, {p.shape[1]}, E]", checks.shape_of(teacher))
    shape = [len(p), keys.shape[1], teacher.shape[-1]]
    same = list(teacher_keys.shape) == shape
    checks.require(same, where, "teacher_keys", f"points {shape}", checks.shape_of(teacher_keys))
    ok = isinstance(valid, Tensor) and valid.dtype == torch.bool and valid.shape == keys.shape[:2]
    checks.require(ok, where, "valid", f"bool {list(keys.shape[:2])}", checks.shape_of(valid))
    _check_temperature(temperature, where, "temperature")
    _check_temperature(teacher_temperature, where, "teacher_temperature")
    checks.require(across in ("image", "batch"), where, "across", "'image' or 'batch'", repr(across))
    chunk = checks.index(chunk, 1, 2**40, where, "chunk")

    with torch.autocast(p.device.type, enabled=False):
        rows = [unit(p), unit(teacher.detach())]
        columns = [unit(torch.where(valid[..., None], x.detach(), 0)) for x in (keys, teacher_keys)]
        kind = rows[0].dtype
        (query, key), (of_teacher, its_key) = ((r.to(kind), c.to(kind)) for r, c in zip(rows, columns, strict=True))
        sides = [query, key, valid, of_teacher, its_key]
        if across == "batch":
            sides = [x.flatten(0, 1)[None] for x in sides]
        values: Tensor = _CrossEntropy.apply(*sides, temperature, teacher_temperature, chunk)
        return values.view(query.shape[:-1])


def positive_pairs(a: Int64[Tensor, "B M"], a2: Int64[Tensor, "B M2"]) -> Int64[Tensor, " B"]:
    """Pairs of points of one region in each image, C of PLRC's eq. 2; negative regions are no region.

    >>> positive_pairs(torch.tensor([[0, 0, 1], [2, 2, -1]]), torch.tensor([[0, 1, 1], [3, 3, -1]]))
    tensor([4, 0])
    """
    for name, ids in (("a", a), ("a2", a2)):
        ok = isinstance(ids, Tensor) and ids.ndim == 2 and ids.dtype == torch.int64 and len(ids) == len(a)
        checks.require(ok, "positive_pairs", name, "int64 [B, M]", checks.shape_of(ids))
    return _same(a, a2).sum(dim=(1, 2))


def _same(a: Tensor, a2: Tensor) -> Tensor:
    return (a[:, :, None] == a2[:, None]) & (a >= 0)[..., None]


def _points(x: object, where: str, argument: str) -> Tensor:
    points = vectors(x, where, argument)
    checks.require(points.ndim == 3, where, argument, "floating points [B, M, D]", checks.shape_of(x))
    return points


def _check_ids(ids: object, points: Tensor, where: str, argument: str) -> None:
    ok = isinstance(ids, Tensor) and ids.dtype == torch.int64 and ids.shape == points.shape[:2]
    checks.require(ok, where, argument, f"int64 {list(points.shape[:2])}", checks.shape_of(ids))


def _check_temperature(value: float, where: str, argument: str) -> None:
    checks.require(0 < value < math.inf, where, argument, "positive and finite", value)


class _CrossEntropy(torch.autograd.Function):
    """Cross entropy [G, M] of softmax rows: queries [G, M, D] over keys [G, K, D], against a teacher's rows.

    Without a teacher it is the logarithm of each row's sum. The value of a row without a valid key is finite.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Any, key: Any, valid: Any, teacher: Any, teacher_key: Any, temperature: Any,
        teacher_temperature: Any, chunk: Any,
    ) -> Any:  # fmt: skip
        (groups, count), keys = query.shape[:2], key.shape[1]
        values, gradients = query.new_zeros(groups, count), torch.zeros_like(query)
        ctx.save_for_backward(gradients)
        if query.numel() == 0 or keys == 0:
            return values
        # As low as a logit may be and still be added to.
        void = torch.zeros_like(key[..., 0]).masked_fill(~valid, torch.finfo(key.dtype).min / 4)[:, None]  # [G, 1, K]
        few = min(count, max(1, chunk // keys))  # queries of a group at a time, and
        many = min(groups, max(1, chunk // (count * keys)))  # groups, if all of a group's fit
        room = query.new_empty(many * few * keys)  # one for all parts: new memory costs more than what is done in it
        for g in range(0, groups, many):
            group = slice(g, min(g + many, groups))
            for at in range(0, count, few):
                part = group, slice(at, min(at + few, count))
                weights, most = _exponentials(query[part] / temperature, key[group], void[group], room)
                total = weights.sum(dim=-1, keepdim=True)
                values[part] = (most + total.log())[..., 0]
                mean = torch.bmm(weights, key[group]) / total  # of the keys under the row: the gradient of its value
                if teacher is not None:
                    ours = teacher[part] / teacher_temperature, teacher_key[group], void[group]
                    weights, _ = _exponentials(*ours, room)
                    wanted = torch.bmm(weights, key[group]) / weights.sum(dim=-1, keepdim=True)
                    # The student's mean logit under the teacher's row is its logit with the mean key.
                    values[part] -= (query[part] * wanted).sum(dim=-1) / temperature
                    mean = mean - wanted
                gradients[part] = mean / temperature
        return values

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        (gradients,) = ctx.saved_tensors
        return gradients * outer[0][..., None], *[None] * 7


def _exponentials(query: Tensor, key: Tensor, void: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
    """exp(logit - the row's largest) [g, m, K], written where there is room, and the largest [g, m, 1]."""
    shape = len(query), query.shape[1], key.shape[1]
    logits = torch.baddbmm(void, query, key.mT, out=room[: math.prod(shape)].view(shape))
    most = logits.amax(dim=-1, keepdim=True)
    return logits.sub_(most).exp_(), most

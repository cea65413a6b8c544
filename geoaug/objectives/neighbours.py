"""Objects named by their nearest neighbours in feature space (D3SSL, section 5.3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64, Num
from torch import Tensor
from torch.nn import functional

from ..geometry import checks
from ..geometry.rng import Key
from .backbone import Backbone, chunks, layers
from .readout import roi_features


class Accuracy(NamedTuple):
    """Shares in [0, 1] over all objects, and means of the classes' own shares (each class counts alike)."""

    top1: float
    top5: float
    class_top1: float
    class_top5: float
    objects: int


def choose_objects(valid: Bool[Tensor, "B M"], n: int, *, key: Key) -> Bool[Tensor, "B M"]:
    """At most n of each image's valid objects, drawn by the key, so that a crowded image does not fill the bank.

    >>> choose_objects(torch.ones(2, 9).bool(), 3, key=Key(0, 0, [1, 2])).sum(1)
    tensor([3, 3])
    """
    n = checks.index(n, 1, 2**31, "choose_objects", "n")
    checks.require(len(key) == len(valid), "choose_objects", "key", f"a key of {len(valid)} ids", len(key))
    draws = torch.where(valid, key.uniform("objects", valid.shape[1]), 2)
    rank = draws.argsort(dim=1, stable=True).argsort(dim=1, stable=True)
    return valid & (rank < n)


def other_images(rows: Int64[Tensor, " B"], count: int, *, key: Key) -> Int64[Tensor, " B"]:
    """For each image, given by its row among `count`, the row of another one, uniform, drawn by the key."""
    count = checks.index(count, 2, 2**31, "other_images", "count")
    checks.require(len(key) == len(rows), "other_images", "key", f"a key of {len(rows)} ids", len(key))
    draw = key.integers("other image", 1, count - 1)[:, 0]
    return draw + (draw >= rows).long()


@torch.no_grad()
def object_features(
    backbone: Backbone,
    images: Num[Tensor, "B C H W"],
    boxes: Float[Tensor, "B K 4"],
    valid: Bool[Tensor, "B K"],
    *,
    layer: str,
    output_size: int = 7,
) -> Float[Tensor, "B K D"]:
    """The features of objects in unit boxes: RoIAlign of one layer, then the mean (D3SSL, section 5.3); invalid: 0."""
    maps = layers(backbone, images, "object_features")
    checks.require(layer in maps, "object_features", "layer", f"one of {', '.join(maps)}", repr(layer))
    return roi_features(maps[layer].float(), boxes, valid, output_size).mean(dim=(3, 4))


def _nearest(queries: Tensor, bank: Tensor, labels: Tensor, k: int, chunk: int) -> tuple[Tensor, Tensor]:
    """Cosines [q, k], falling, and labels [q, k] of the nearest entries of a bank, read a chunk at a time."""
    best, own = queries.new_zeros(len(queries), 0), labels.new_zeros(len(queries), 0)
    for rows in chunks(len(bank), chunk, "object_knn"):
        cosines = queries @ functional.normalize(bank[rows].float(), dim=1).mT
        top, index = cosines.topk(min(k, cosines.shape[1]), dim=1)
        best, own = torch.cat((best, top), dim=1), torch.cat((own, labels[rows][index]), dim=1)
        best, index = best.topk(min(k, best.shape[1]), dim=1)
        own = own.gather(1, index)
    return best, own


@torch.no_grad()
def object_knn(
    bank: Float[Tensor, "N D"],
    bank_labels: Int64[Tensor, " N"],
    queries: Float[Tensor, "M D"],
    query_labels: Int64[Tensor, " M"],
    *,
    k: Sequence[int] = (20,),
    temperature: float = 0.07,
    batch_size: int = 1024,
    chunk: int = 65536,
) -> dict[int, Accuracy]:
    """Accuracy of a vote of each query's k nearest objects by cosine, weighted by exp(cos / temperature), for each k.

    A class without a vote is no guess, so with few classes among the neighbours Top-5 counts those alone; of two
    classes with the same votes the smaller label comes first. At most batch_size x chunk cosines are in memory.

    >>> bank, labels = torch.eye(3).repeat(4, 1), torch.arange(3).repeat(4)
    >>> object_knn(bank, labels, torch.eye(3), torch.tensor([0, 1, 0]), k=(2,))[2].top1  # doctest: +ELLIPSIS
    0.66...
    """
    where = "object_knn"
    for name, x, y in (("bank", bank, bank_labels), ("queries", queries, query_labels)):
        ok = x.ndim == 2 and len(x) > 0 and x.shape[1] == bank.shape[1] and x.is_floating_point()
        checks.require(ok, where, name, f"floating features [> 0, {bank.shape[-1]}]", checks.shape_of(x))
        ok = y.shape == x.shape[:1] and y.dtype == torch.int64 and bool((y >= 0).all())
        checks.require(ok, where, f"the labels of {name}", f"int64 [{len(x)}], none negative", checks.shape_of(y))
        checks.require(bool(torch.isfinite(x).all()), where, name, "finite", "NaN or infinite values")
    checks.require(0 < temperature < math.inf, where, "temperature", "positive and finite", temperature)
    numbers = [checks.index(one, 1, len(bank), where, "k") for one in k]
    checks.require(len(numbers) > 0, where, "k", "one number of neighbours or more", k)

    classes = int(torch.maximum(bank_labels.max(), query_labels.max())) + 1
    ids = torch.arange(classes, device=bank.device)
    ranks: dict[int, list[Tensor]] = {number: [] for number in numbers}
    for rows in chunks(len(queries), batch_size, where):
        truth = query_labels[rows, None]
        near = functional.normalize(queries[rows].float(), dim=1)
        cosines, labels = _nearest(near, bank, bank_labels, max(numbers), chunk)
        weights = ((cosines - cosines[:, :1]).double() / temperature).exp()  # of the nearest 1: nothing overflows
        for number in numbers:
            votes = weights.new_zeros(len(near), classes).scatter_add_(1, labels[:, :number], weights[:, :number])
            own = votes.gather(1, truth)
            before = ((votes > own) | ((votes == own) & (ids < truth))).sum(dim=1)
            ranks[number].append(torch.where(own[:, 0] > 0, before, classes + 5))
    present = torch.bincount(query_labels, minlength=classes).double()
    out = {}
    for number, parts in ranks.items():
        hits = [(torch.cat(parts) < top).double() for top in (1, 5)]
        shares = [torch.bincount(query_labels, hit, classes)[present > 0] / present[present > 0] for hit in hits]
        top1, top5, class_top1, class_top5 = (float(share.mean()) for share in (*hits, *shares))
        out[number] = Accuracy(top1, top5, class_top1, class_top5, len(queries))
    return out

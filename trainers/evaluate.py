"""What a backbone has learnt, measured without training it further (D3SSL, sections 3 and 5.3).

    python trainers/evaluate.py object-knn --weights runs/d3ssl --bank train.json --data val.json --out knn.json
    python trainers/evaluate.py coupling-rate --weights resnet50.pth --data val.json --images val2017
    python trainers/evaluate.py position-similarity --weights random --arch resnet18 --data photos/
    python trainers/evaluate.py affinity --weights runs/plrc --data val.json --pictures maps.html --beside runs/moco_v2

`object-knn` names each object of --data by its nearest objects of --bank; without a bank, images are split 80/20 by a
hash of their ids. `disturbed-knn` does so with everything outside an image's objects replaced by another image.
`unsupervised-segmentation` is of a segmentation run's head, or of k-means on any backbone (measure_segmentation.py).
`coupling-rate` (1 is ideal) and `position-similarity` (1 is ideal, and a random net's) are per layer. `correspondence`
(1 is ideal) is the share of cells that find their place again in a mirrored and coloured picture. `affinity` is how
well what is like an object's middle covers its mask (PLRC, Table 3, with pictures as its Figures 3 and 5). The backbone
is in eval mode; `--weights random` is one that never saw an image. Sizes, N and k are ours: docs/evaluation.md.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

import geoaug
from geoaug import metrics
from trainers import common
from trainers.evaluation import SHARE, Config, backbone_of, images_of, known, pool
from trainers.measure_affinity import affinity
from trainers.measure_correspondence import correspondence
from trainers.measure_segmentation import segmentation


def objects(
    config: Config, backbone: metrics.Backbone, path: Path, folder: Path | None, *, bank: bool, split: bool
) -> tuple[Tensor, Tensor]:
    """Features [N, D] and labels [N] of one side of the vote."""
    disturbed = config.task == "disturbed-knn" and (not bank or config.disturb == "both")
    others = pool(config, path, folder) if disturbed else None
    features, labels = [torch.zeros(0, 0)], []
    for batch in images_of(config, path, folder, geoaug.ViewSpec.short_side(config.size, config.max_size)):
        key = batch.key.at_epoch(0).fold("evaluate")
        if split and (float(key.uniform("split", 1)) < SHARE) != bank:
            continue
        valid = known(batch)
        if bank:
            valid = metrics.choose_objects(valid, config.per_image, key=key)
        boxes, kept = batch.boxes[:, valid[0]], valid[:, valid[0]]
        if not kept.any():
            continue
        image = batch.images[0]
        if others is not None:
            ids, pictures = others
            own = (ids == batch.plan.ids).nonzero().flatten()
            row = own if len(own) else torch.tensor([len(ids)])  # an image outside the pool takes any of it
            count = len(ids) + (0 if len(own) else 1)
            image = metrics.disturb(image, boxes, kept, pictures[metrics.other_images(row, count, key=key)])
        found = metrics.object_features(
            backbone, image.to(config.device), boxes.to(config.device), kept.to(config.device), layer=config.layer
        )
        features.append(found[0].cpu())
        labels.append(batch.box_labels[0, valid[0]])
    if not labels:
        raise common.UsageError(
            f"{'--bank' if bank and not split else '--data'} has no objects of a known class: {path}"
        )
    return torch.cat(features[1:]), torch.cat(labels)


def knn(config: Config, backbone: metrics.Backbone) -> dict[str, Any]:
    """Top-1 and Top-5 accuracy for each k."""
    split = config.bank is None
    where = (config.data, config.images) if split else (config.bank, config.bank_images)
    bank, names = objects(config, backbone, *where, bank=True, split=split)  # type: ignore[arg-type]
    queries, truth = objects(config, backbone, config.data, config.images, bank=False, split=split)
    ks = [k for k in dict.fromkeys(config.k) if k <= len(bank)]
    if not ks:
        raise common.UsageError(f"--k must be at most the {len(bank)} objects of the bank, got {config.k}")
    scores = metrics.object_knn(bank, names, queries, truth, k=ks, temperature=config.temperature)
    share = torch.bincount(names).max().item() / len(names)
    return {"bank": len(bank), "queries": len(queries), "largest_class": share,
            "k": {str(k): score._asdict() for k, score in scores.items()}}  # fmt: skip


def coupling(config: Config, backbone: metrics.Backbone) -> dict[str, Any]:
    """The coupling rate of each layer, over seeded pairs of objects of different classes."""
    tiles, labels = [], []
    for batch in images_of(
        config, config.data, config.images, geoaug.ViewSpec.short_side(config.size, config.max_size)
    ):
        valid = metrics.choose_objects(known(batch), config.per_image, key=batch.key.at_epoch(0).fold("evaluate"))
        boxes = batch.boxes[0, valid[0]]
        if len(boxes):
            tiles.append(metrics.object_tiles(batch.images[0][0], boxes, config.tile))
            labels.append(batch.box_labels[0, valid[0]])
        if sum(map(len, tiles)) >= 2 * config.count:
            break
    if not tiles:
        raise common.UsageError(f"--data has no objects of a known class: {config.data}")
    every = torch.cat(tiles)
    pairs = metrics.different_pairs(torch.cat(labels), key=geoaug.Key(config.seed, 0, range(config.count)))
    rates = metrics.coupling_rate(backbone, every[pairs[:, 0]], every[pairs[:, 1]], device=config.device)
    return {"layers": {name: rate._asdict() for name, rate in rates.items()}, "objects": len(every)}


def position(config: Config, backbone: metrics.Backbone) -> dict[str, Any]:
    """The mean cosine of a picture's middle copy with the eight around it, of each layer."""
    tiles = pool(config, config.data, config.images)[1]
    return {"layers": metrics.position_similarity(backbone, tiles, device=config.device), "images": len(tiles)}


TASKS: dict[str, Callable[[Config, metrics.Backbone], dict[str, Any]]] = {
    "object-knn": knn,
    "disturbed-knn": knn,
    "coupling-rate": coupling,
    "position-similarity": position,
    "unsupervised-segmentation": segmentation,
    "correspondence": correspondence,
    "affinity": affinity,
}


def main(config: Config) -> dict[str, Any]:
    """Measure, print, and write the figures if asked to."""
    for flag, path in (("--data", config.data), ("--bank", config.bank)):
        if path is not None and not path.exists():
            raise common.UsageError(f"{flag} must exist, got {path}")
    if config.layer not in common.Trunk.stages:
        raise common.UsageError(f"--layer must be one of {', '.join(common.Trunk.stages)}, got {config.layer}")
    try:
        result = TASKS[config.task](config, backbone_of(config))
    except (ValueError, OSError, geoaug.LoadError) as error:
        raise common.UsageError(str(error)) from None
    result = {"task": config.task, "weights": config.weights, "arch": config.arch, **result}
    print(json.dumps(result, indent=1))
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        config.out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {config.out}: {config.task} of {config.weights}")
    return result


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except common.UsageError as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None

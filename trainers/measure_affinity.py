"""The `affinity` task: how well the affinities of an object's centre segment it (PLRC, Table 3, Figures 3 and 5)."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import geoaug
from geoaug import metrics, viz
from geoaug.loading.coco import objects_of, read_record
from geoaug.loading.label_maps import MaskError, label_map_of
from trainers import common
from trainers.evaluation import Config, backbone_of, images_of, known

SHOWN = 224  # side of a picture (px)
TEXT = """\
Each row: a photograph with a point (the middle of an object's box), and the cosine of the feature there with those
of the whole picture, for each backbone. Black is 0 or less, white is 1. Made by evaluate.py affinity, as Figures 3
and 5 of the paper are."""


def affinity(config: Config, backbone: metrics.Backbone) -> dict[str, Any]:
    """The mean Jaccard similarity over objects, with 80 % of an affinity map's mass kept and with 80 % of its cells."""
    if config.data.suffix != ".json":
        raise common.UsageError(f"--data must be a COCO json with masks, got {config.data}")
    crowds = crowds_of(config.data)
    others = {name: backbone_of(dataclasses.replace(config, weights=name)) for name in config.beside}
    size = (config.map_size, config.map_size)
    scores: dict[str, list[Tensor]] = {"mass": [], "cells": []}
    images = small = 0
    rows: list[Tensor] = []
    for batch in images_of(
        config,
        config.data,
        config.images,
        geoaug.ViewSpec.whole(config.side),
        label_map="instance",
        label_map_size=size,
    ):
        found = seen(batch)
        small += int(known(batch).sum()) - len(found)
        if not len(found):
            continue
        points = (batch.boxes[:, found, :2] + batch.boxes[:, found, 2:]) / 2  # [1, K, 2]
        masks = batch.label_map == found[:, None, None]  # [K, h, w]
        maps = maps_of(backbone, batch.images[0], points, config)
        void = void_of(batch, crowds[batch.names[0]])
        for law, values in scores.items():
            iou = metrics.affinity_iou(maps, masks[None], keep=config.keep, law=law, ignore=void)  # type: ignore[arg-type]
            values.append(iou[0])
        if config.pictures is not None and len(rows) < config.shown:
            which = int(batch.key.at_epoch(0).integers("shown", 1, len(found)))
            more = [maps_of(other, batch.images[0], points, config)[0, which] for other in others.values()]
            rows.append(row_of(batch.images[0][0], points[0, which], [maps[0, which], *more]))
        images += 1
        if images == config.count:
            break
    if not images:
        raise common.UsageError(f"--data has no objects with a mask: {config.data}")
    if config.pictures is not None:
        page(config, rows)
    mass, cells = (torch.cat(values).double() for values in scores.values())
    error = float(mass.std(correction=0)) / math.sqrt(len(mass))
    return {"jaccard": float(mass.mean()), "standard_error": error, "jaccard_of_cells": float(cells.mean()),
            "objects": len(mass), "images": images, "too_small": small}  # fmt: skip


class Crowds(NamedTuple):
    """The masks of an image's crowds, and the (height, width) they are drawn at, which is the json's."""

    masks: list[bytes]
    size: tuple[int, int]


def crowds_of(file: Path) -> dict[str, Crowds]:
    """The crowds of each image of a COCO json, by its file name."""
    record = read_record(file, masks=True)
    sizes = objects_of(record, {}, masks=False).sizes.tolist()  # says what is wrong with the json
    names, rows = record.names(), record.rows("images")
    found = {name: Crowds([], (height, width)) for name, (height, width) in zip(names, sizes, strict=True)}
    for entry in record.lists["annotations"]:
        if entry.get("iscrowd") and entry["image_id"] in rows:
            found[names[rows[entry["image_id"]]]].masks.append(entry.get("segmentation", b""))
    return found


def void_of(batch: geoaug.Batch, crowds: Crowds) -> Tensor:
    """Cells [1, h, w] of a crowd and of no object: neither object nor background."""
    assert batch.label_map is not None
    labels, cells = np.zeros(len(crowds.masks), dtype=np.int64), tuple(batch.label_map.shape[1:])
    try:
        covered = label_map_of(crowds.masks, labels, cells, crowds.size) >= 0
    except MaskError as error:
        raise common.UsageError(
            f"--data must have masks of its images, got a crowd in {batch.names[0]}: {error}"
        ) from None
    return torch.from_numpy(covered)[None] & (batch.label_map < 0)


def seen(batch: geoaug.Batch) -> Tensor:
    """Slots [K] of the known objects whose masks hold a cell of the label map."""
    assert batch.label_map is not None
    cells = torch.bincount(batch.label_map.flatten().clamp(min=-1) + 1, minlength=batch.boxes.shape[1] + 1)[1:]
    return (known(batch)[0] & (cells[: batch.boxes.shape[1]] > 0)).nonzero().flatten()


def maps_of(backbone: metrics.Backbone, image: Tensor, points: Tensor, config: Config) -> Tensor:
    """Affinity maps [1, K, h, w] of one layer."""
    features = backbone(image.to(config.device))[config.layer]
    return metrics.affinity_maps(features, points.to(features.device), config.map_size).cpu()


def row_of(image: Tensor, point: Tensor, maps: list[Tensor]) -> Tensor:
    """One picture: the photograph with its point, and a map of each backbone."""
    x, y = point.tolist()
    photograph = viz.ring(metrics.resize(image[None].cpu(), SHOWN)[0], x, y)
    return viz.beside([photograph, *(viz.heat(one, (SHOWN, SHOWN)) for one in maps)])


def page(config: Config, rows: list[Tensor]) -> Path:
    """The HTML page of all rows."""
    assert config.pictures is not None
    names = [Path(name).name for name in (config.weights, *config.beside)]
    title = "; ".join(f"column {i}: {name}" for i, name in enumerate(names, 2))
    sections: list[tuple[str, str, Tensor | None]] = [("", f"{TEXT}\n\n{title}", None)]
    sections += [("", "", row) for row in rows]
    return viz.page("Affinities of a point with its picture", sections, config.pictures)

"""Unsupervised segmentation: the pseudo-categories of a run's segmenter, or of k-means on a backbone, against classes.

Every image's middle square is named pixel by pixel; categories are matched with classes over all images (DenseSiam,
section 5.1), and `--sheets DIR` shows photographs beside what they were named and what they are.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

import geoaug
from geoaug import metrics, regions, viz
from trainers import common
from trainers.clusters import drawn_cells, k_means, squared, unit_cells
from trainers.evaluation import Config, normalised
from trainers.segmentation_net import read_segmenter

BATCH = 16
CELLS = 50_000  # that k-means is fitted to
FINER = 2  # label maps are so many times finer than views
Segmenter = Callable[[Tensor], Tensor]  # stored images uint8 [B, 3, h, w] -> scores [B, N, _, _]


class Pictures(NamedTuple):
    """Views uint8 [B, 3, s, s], their true classes [B, s, s] (-1: void), and the key of their ids."""

    images: Tensor
    truth: Tensor
    key: geoaug.Key


class Data:
    """The middle squares of a COCO json's images, a batch at a time, in the json's order."""

    def __init__(self, config: Config, path: Path, folder: Path | None, *, labels: bool = True) -> None:
        side = config.view
        self.config, self.side = config, side
        self.loader = geoaug.open_loader(
            path, [geoaug.ViewSpec.center(side, side)], batch_size=BATCH, seed=config.seed, images=folder, order="file",
            workers=config.workers, last="keep", on_error="mask", max_boxes=0,
            label_map="semantic" if labels else None, label_map_size=(FINER * side, FINER * side),
        )  # fmt: skip
        objects = self.loader.source.objects
        self.names = [*(objects.categories if objects is not None else ()), *(["unlabelled"] * config.background)]

    def __iter__(self) -> Iterator[Pictures]:
        """Without images that could not be read."""
        points = geoaug.grids.cell_centers(self.side, self.side)
        with self.loader:
            for batch in self.loader:
                ok = batch.ok
                if not ok.any():
                    continue
                truth = torch.full((len(batch), self.side * self.side), -1)
                if batch.label_map is not None:
                    in_source = (~batch.plan.view_from_source[:, 0])(points.expand(len(batch), -1, -1))
                    truth = regions.lookup(batch.label_map, in_source)  # [B, s * s]
                    truth = torch.where(truth < 0, len(self.names) - 1, truth) if self.config.background else truth
                truth = truth.unflatten(1, (self.side, self.side))
                yield Pictures(batch.images[0][ok], truth[ok], batch.key.at_epoch(0)[ok.nonzero().flatten()])
            if self.loader.failures:
                print(f"evaluate: {len(self.loader.failures)} images could not be read", file=sys.stderr)


def of_head(config: Config) -> Segmenter | None:
    """The scores of a segmentation run's own head; None for weights that have none."""
    net = read_segmenter(config.weights)
    if net is None:
        return None
    net = net.to(config.device)
    return lambda images: net(normalised(images, config.device))


def of_clusters(config: Config, backbone: metrics.Backbone, k: int) -> Segmenter:
    """Nearness to k centres found among cells of --bank, or of --data itself; labels are not looked at."""
    path, folder = (config.data, config.images) if config.bank is None else (config.bank, config.bank_images)
    data = Data(config, path, folder, labels=False)
    count = max(1, CELLS // len(data.loader.source))
    found = [drawn_cells(backbone(each.images)[config.layer], count, each.key.fold("k-means")) for each in data]
    if sum(map(len, found)) < k:
        raise common.UsageError(f"--bank must have cells for {k} clusters, got {sum(map(len, found))}: {path}")
    centres = k_means(torch.cat(found), k, seed=config.seed)

    def scores(images: Tensor) -> Tensor:
        maps = backbone(images)[config.layer]
        return -squared(unit_cells(maps), centres).mT.unflatten(2, maps.shape[-2:])

    return scores


def things_of(config: Config, classes: int) -> Tensor | None:
    """Which classes are things: the first of them; None where nobody says."""
    if config.things > classes:
        raise common.UsageError(f"--things must be at most the {classes} classes, got {config.things}")
    return torch.arange(classes) < config.things if config.things else None


@torch.no_grad()
def segmentation(config: Config, backbone: metrics.Backbone) -> dict[str, Any]:
    """mIoU over all classes, things and stuff, by one-to-one matching, by majority, and as published."""
    data = Data(config, config.data, config.images)
    classes = len(data.names)
    things = things_of(config, classes)
    segmenter = None if config.segmenter == "k-means" else of_head(config)
    if segmenter is None and config.segmenter == "head":
        raise common.UsageError(
            f"--segmenter head needs a run of densesiam.py --task segmentation, got {config.weights}"
        )
    by = "k-means" if segmenter is None else "head"
    if segmenter is None:
        segmenter = of_clusters(config, backbone, config.clusters or classes)

    table, shown, images = torch.zeros(0, 0, dtype=torch.int64), [], 0
    for each in data:
        scores = segmenter(each.images.to(config.device)).float()
        scores = functional.interpolate(scores, each.truth.shape[-2:], mode="bilinear", align_corners=False)
        named = scores.argmax(dim=1).cpu()  # [B, s, s]
        found = metrics.confusion(named, each.truth, categories=scores.shape[1], classes=classes)
        table = found if images == 0 else table + found
        images += len(named)
        if config.sheets is not None and len(shown) < config.sheet_count:
            shown += list(zip(each.images, named, each.truth, strict=True))[: config.sheet_count - len(shown)]
    if not table.any():
        raise common.UsageError(f"--data must have labelled pixels, got none in {config.data}")
    score = metrics.hungarian_miou(table, things=things)
    categories = table.shape[1]
    result = {
        "segmenter": by, "images": images, "classes": classes, "categories": categories,
        "categories_in_use": int((table.sum(0) > 0).sum()), **_figures(score),
        "majority": _figures(metrics.hungarian_miou(table, things=things, mapping="majority")),
        "iou": dict(zip(data.names, map(_number, score.iou.tolist()), strict=True)),
    }  # fmt: skip
    if things is not None and categories == classes:
        published = metrics.hungarian_miou(table, things=things, legacy=True)
        result["published_form"] = {"things": _number(published.things), "stuff": _number(published.stuff)}
    if config.sheets is not None:
        result["sheets"] = [str(path) for path in write_sheets(config.sheets, shown, score.class_of, data.names)]
    return result


def _figures(score: metrics.SegmentationScore) -> dict[str, float | None]:
    return {name: _number(getattr(score, name)) for name in ("miou", "things", "stuff", "pixel_accuracy")}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value  # JSON has no NaN


ROWS = 8  # images of a sheet
LEAST = 200  # pixels a side on it
_VOID, _NO_CLASS = (128, 128, 128), (0, 0, 0)


def tinted(image: Tensor, labels: Tensor, none: tuple[int, int, int], classes: int) -> Tensor:
    """The photograph [3, h, w], faint, under the colours of classes; labels of -1 in the colour of none."""
    palette = torch.tensor([*(viz.color_of(i) for i in range(classes)), none], dtype=torch.float32)
    colors = palette[labels].permute(2, 0, 1)  # -1 is the last
    grey = image.float().mean(0, keepdim=True)
    return (0.25 * grey + 0.75 * colors).round().to(torch.uint8)


def write_sheets(
    folder: Path, shown: list[tuple[Tensor, Tensor, Tensor]], class_of: Tensor, names: list[str]
) -> list[Path]:
    """Photograph, prediction under its classes' colours, truth: a row each; below, the colours' names."""
    paths, classes = [], len(names)
    for start in range(0, len(shown), ROWS):
        rows, used = [], set[int]()
        for image, named, truth in shown[start : start + ROWS]:
            read = class_of[named]
            row = [image, tinted(image, read, _NO_CLASS, classes), tinted(image, truth, _VOID, classes)]
            rows.append(viz.beside([viz.enlarge(picture, -(-LEAST // len(truth))) for picture in row]))
            used |= {*read.unique().tolist(), *truth.unique().tolist()}
        sheet = viz.titled(viz.below(rows), "photograph, named (black: no class), truth (grey: void)", tall=14)
        names_used = [(names[c], viz.color_of(c)) for c in sorted(used - {-1})]
        sheet = viz.below([sheet, viz.legend(names_used, sheet.shape[-1])])
        paths.append(viz.save(sheet, folder / f"sheet-{start // ROWS:02d}.png"))
    return paths

"""What all tasks of evaluate.py share: their flags, the backbone as a callable, images one at a time."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor

import geoaug
from geoaug import metrics
from trainers import common

Task = Literal[
    "object-knn", "disturbed-knn", "coupling-rate", "position-similarity", "correspondence",
    "unsupervised-segmentation", "affinity",
]  # fmt: skip
SHARE = 0.8  # of the images in the bank, where --data is split


@dataclass
class Config:
    """One measure of one backbone."""

    task: Annotated[Task, tyro.conf.Positional]
    """What is measured."""
    weights: str
    """A run folder, a .pth or .safetensors with torchvision's names, or random."""
    data: Path
    """A COCO json, a .beton with objects, or for position-similarity and correspondence any images."""
    bank: Path | None = None
    """The images whose objects are the neighbours; by default 80 % of --data."""
    images: Path | None = None
    """Where the photographs of --data's json or list lie."""
    bank_images: Path | None = None
    """The same of --bank."""
    arch: str = "resnet50"
    """Architecture of the weights."""
    layer: str = "c5"
    """The map objects and correspondence are read from: stem, c2, c3, c4 or c5."""
    size: int = 800
    """Short side of the images objects are read from."""
    max_size: int = 1333
    """Their longest side."""
    tile: int = 224
    """Side of the tiles of coupling-rate and position-similarity, and of correspondence's images."""
    count: int = 1000
    """Pairs of objects, or images, of coupling-rate, position-similarity, correspondence and affinity."""
    k: tuple[int, ...] = (20, 10, 100, 200)
    """Numbers of neighbours; the first is the headline."""
    per_image: int = 3
    """Objects of an image that enter the bank, N."""
    temperature: float = 0.07
    """Votes weigh exp(cosine / temperature)."""
    disturb: Literal["both", "queries"] = "both"
    """Which side of disturbed-knn is disturbed."""
    view: int = 320
    """Side of the middle squares that unsupervised-segmentation names pixel by pixel."""
    segmenter: Literal["auto", "head", "k-means"] = "auto"
    """Who names them: the run's own head, or k-means on --layer; auto: the head where the run has one."""
    clusters: int = 0
    """Clusters of k-means; 0: as many as there are classes."""
    things: int = 0
    """So many of --data's first classes are things, the others stuff; 0: they are not told apart."""
    background: bool = False
    """Count pixels without a label as a class of their own, the last one."""
    sheets: Path | None = None
    """A folder for sheets of photographs beside what they were named and what they are."""
    sheet_count: int = 24
    """Photographs on the sheets."""
    side: int = 896
    """Side of the images of affinity."""
    map_size: int = 56
    """Side to which their maps are brought."""
    keep: float = 0.8
    """Share of an affinity map that a threshold keeps."""
    pictures: Path | None = None
    """Write affinity maps here as an HTML page, too."""
    beside: tuple[str, ...] = ()
    """More weights whose affinity maps stand beside."""
    shown: int = 12
    """Images on that page."""
    seed: int = 0
    workers: int | None = None
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    out: Path | None = None
    """Write the figures here as JSON, too."""


def backbone_of(config: Config) -> metrics.Backbone:
    """The weights as a callable that normalises stored images and gives the maps of all stages."""
    torch.manual_seed(config.seed)
    trunk = common.make_trunk(config.arch, "none" if config.weights == "random" else config.weights)
    trunk = trunk.to(config.device).eval()

    @torch.no_grad()
    def maps(images: Tensor) -> dict[str, Tensor]:
        return dict(zip(trunk.stages, trunk.maps(normalised(images, config.device)), strict=True))

    return maps


def normalised(images: Tensor, device: str) -> Tensor:
    """Stored images on the device, scaled to [0, 1], by ImageNet's mean and deviation."""
    spec = geoaug.ColorSpec()
    mean, std = (torch.tensor(spec.channels(x), device=device).view(3, 1, 1) for x in ("mean", "std"))
    return (images.to(device).float() / (255 if images.dtype == torch.uint8 else 1) - mean) / std


def images_of(
    config: Config, path: Path, folder: Path | None, spec: geoaug.ViewSpec, **more: Any
) -> Iterator[geoaug.Batch]:
    """All images, one at a time, in an order drawn by their ids; the unreadable are left out and told.

    `more` goes to `open_loader`.
    """
    with geoaug.open_loader(
        path, [spec], batch_size=1, seed=config.seed, images=folder, workers=config.workers, last="keep",
        on_error="mask", max_boxes=512, **more,
    ) as loader:  # fmt: skip
        for batch in loader:
            if batch.ok.all():
                yield batch
        if loader.failures:
            print(f"evaluate: {len(loader.failures)} images of {path} could not be read", file=sys.stderr)


def known(batch: geoaug.Batch) -> Tensor:
    """Objects [1, M] of a known class, at least one source pixel wide and high."""
    height, width = batch.plan.source_size[0].tolist()
    sides = (batch.boxes[..., 2:] - batch.boxes[..., :2]) * torch.tensor((width, height))
    return batch.box_valid & (batch.box_labels >= 0) & (sides >= 1).all(-1)


def pool(config: Config, path: Path, folder: Path | None) -> tuple[Tensor, Tensor]:
    """Ids and pictures [P, 3, tile, tile] of up to --count images that stand in for backgrounds."""
    ids, pictures = [], []
    for batch in images_of(config, path, folder, geoaug.ViewSpec.whole(config.tile)):
        ids.append(batch.plan.ids)
        pictures.append(batch.images[0])
        if len(ids) == config.count:
            break
    if len(ids) < 2:
        raise common.UsageError(f"--data must have two images at least, got {len(ids)} in {path}")
    return torch.cat(ids), torch.cat(pictures)

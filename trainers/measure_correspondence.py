"""The task `correspondence` of evaluate.py: cells found again in a mirrored and coloured picture (LC-loss)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import geoaug
from geoaug import metrics
from trainers.evaluation import Config, pool

BATCH = 32  # images at a time


def correspondence(config: Config, backbone: metrics.Backbone) -> dict[str, Any]:
    """The share of cells of --layer whose most similar cell in the mirrored picture is their own.

    The paper names blur, colour jitter and random grayscale. Ours: BYOL's strengths, jitter always on, a blur of one
    pixel of 224.
    """
    ids, pictures = pool(config, config.data, config.images)  # uint8 [N, 3, tile, tile]
    colors = geoaug.ColorSpec(
        brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, gray=0.2,
        blur=1.0, sigma=(config.tile / 224,) * 2, mean=0.0, std=1.0,
    )  # fmt: skip
    key = geoaug.Key(config.seed, 0, ids).fold("correspondence")
    painted = []
    for start in range(0, len(ids), BATCH):
        rows = slice(start, start + BATCH)
        image = geoaug.color(pictures[rows].flip(-1), colors, key[rows])
        painted.append((image * 255).round().to(torch.uint8))

    def layer(images: Tensor) -> dict[str, Tensor]:
        return {config.layer: backbone(images)[config.layer]}

    found = metrics.correspondence_accuracy(
        layer, pictures, torch.cat(painted), batch_size=BATCH, device=config.device
    )[config.layer]
    return {"layer": config.layer, **found._asdict(), "images": len(ids)}

"""Dense self-supervised learning in one page, without a trainer: what two crops share must have the same features.

python examples/train_tiny.py [--data IMAGES] [--steps N]
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path

import torch
import torchvision
from PIL import Image
from torch import nn

import geoaug
from geoaug import ColorSpec, ViewSpec, losses

SCENE = Path(__file__).resolve().parent.parent / "docs" / "scene.jpg"


def tiles(folder: Path) -> Path:
    """A data set for want of another: 64 overlapping tiles of one picture."""
    with Image.open(SCENE) as scene:
        for i in range(64):
            x, y = (i % 8) * (scene.width - 128) // 7, (i // 8) * (scene.height - 128) // 7
            scene.crop((x, y, x + 128, y + 128)).save(folder / f"{i}.jpg", quality=95)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=None, help="a folder of images, a list, a COCO json or a .beton")
    parser.add_argument("--steps", type=int, default=40, help="optimiser steps")
    args = parser.parse_args()
    torch.manual_seed(0)

    student = nn.Sequential(*list(torchvision.models.resnet18().children())[:-3])  # to C4: [B, 256, h/16, w/16]
    teacher = copy.deepcopy(student).requires_grad_(False)
    predictor = nn.Sequential(nn.Linear(256, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 256))
    optimizer = torch.optim.SGD([*student.parameters(), *predictor.parameters()], lr=0.05, momentum=0.9)
    specs, colors = [ViewSpec(64, scale=(0.3, 1.0))] * 2, (ColorSpec.BYOL_1, ColorSpec.BYOL_2)

    with tempfile.TemporaryDirectory() as folder:
        data = args.data or tiles(Path(folder))
        with geoaug.open_loader(data, specs, batch_size=16, seed=0, workers=0) as loader:
            done = 0
            while True:
                for batch in loader:  # an epoch; the next one has other views of its own accord
                    a, b = (batch.plan.view_from_source[:, v] for v in (0, 1))
                    in_a, in_b, valid = geoaug.matched_boxes(a, b, 4, sizes=(64, 64), key=batch.key, min_size=16)
                    x, y = (geoaug.color(batch.images[v], colors[v], batch.key.fold(f"view {v}")) for v in (0, 1))
                    z = geoaug.roi_features(student(x), in_a, valid, 1).flatten(2)  # [B, 4, 256]
                    p = predictor(z.flatten(0, 1)).view_as(z)
                    with torch.no_grad():
                        target = geoaug.roi_features(teacher(y), in_b, valid, 1).flatten(2)
                    loss = losses.mean(losses.regression(p, target), valid)
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 0.01)
                    done += 1
                    if done == 1 or done % 10 == 0:
                        print(f"step {done}: loss {loss.item():.3f} on {int(valid.sum())} pairs of boxes")
                    if done == args.steps:
                        return


if __name__ == "__main__":
    main()

"""A plain SimSiam that gains LC-loss (between the marks): each cell must find its place in the other view.

python examples/add_lc_loss.py [--epochs N]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
import torchvision
from PIL import Image
from torch import nn
from torch.nn.functional import cosine_similarity

import geoaug
from geoaug import ColorSpec, ViewSpec, losses

SCENE = Path(__file__).resolve().parent.parent / "docs" / "scene.jpg"


def tiles(folder: str) -> str:
    """A data set for want of another: 64 overlapping tiles of one picture."""
    with Image.open(SCENE) as scene:
        for i in range(64):
            x, y = (i % 8) * (scene.width - 128) // 7, (i // 8) * (scene.height - 128) // 7
            scene.crop((x, y, x + 128, y + 128)).save(f"{folder}/{i}.jpg", quality=95)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=8)
    args = parser.parse_args()
    torch.manual_seed(0)

    trunk = nn.Sequential(*list(torchvision.models.resnet18().children())[:-3])  # to C4: [B, 256, 4, 4] of 64 pixels
    projector = nn.Sequential(nn.Linear(256, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 256))
    predictor = nn.Sequential(nn.Linear(256, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 256))
    # --- LC-loss, one line: a branch on the map ---
    branch = nn.Sequential(nn.Conv2d(256, 256, 1), nn.BatchNorm2d(256), nn.ReLU(), nn.Conv2d(256, 128, 1))
    optimizer = torch.optim.SGD(nn.ModuleList([trunk, projector, predictor, branch]).parameters(), 0.05, momentum=0.9)
    specs, colors = [ViewSpec.whole(64), ViewSpec(64, scale=(0.2, 1.0))], ColorSpec.MOCO_V2
    with tempfile.TemporaryDirectory() as folder:
        loader = geoaug.open_loader(tiles(folder), specs, batch_size=16, seed=0, workers=0)
        for epoch in range(args.epochs):
            for batch in loader:
                x, y = (geoaug.color(batch.images[v], colors, batch.key.fold(f"view {v}")) for v in (0, 1))
                c, d = trunk(x), trunk(y)
                z, w = (projector(one.mean((2, 3))) for one in (c, d))
                pairs = ((predictor(z), w.detach()), (predictor(w), z.detach()))
                loss = -sum(cosine_similarity(p, t).mean() for p, t in pairs) / 2
                # --- LC-loss, five lines: where do the cells of one view lie in the other, and are they found there?
                a, b = (batch.plan.view_from_source[:, v] for v in (0, 1))
                points, valid = geoaug.correspond(a, b, (4, 4))
                cells = losses.local_contrastive(branch(c), branch(d), points, temperature=0.1)  # [B, 16]
                local = losses.mean(cells, valid, per_image=True)
                loss = 0.9 * loss + 0.1 * local
                # ---
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            print(f"epoch {epoch}: loss {loss.item():.3f}, local {local.item():.3f} over {int(valid.sum())} cells")


if __name__ == "__main__":
    main()

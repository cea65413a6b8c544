"""A plain torchvision training script that gains matched boxes in ten lines (between the two marks).

python examples/in_your_own_code.py [--image PHOTO] [--steps N]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torchvision
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional

import geoaug

HERE = Path(__file__).resolve().parent


def view_of(image: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int, int, int], bool]:
    """What many scripts have: a random resized crop and flip of uint8 [3, H, W], here with what was drawn."""
    crop = RandomResizedCrop.get_params(image, scale=[0.2, 1.0], ratio=[3 / 4, 4 / 3])
    flip = bool(torch.rand(()) < 0.5)
    view = functional.resized_crop(image, *crop, [96, 96], antialias=True)
    return (functional.horizontal_flip(view) if flip else view), crop, flip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image", type=Path, default=HERE.parent / "docs" / "scene.jpg", help="any photograph")
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)  # the script's own randomness; geoaug has none

    image = functional.pil_to_tensor(Image.open(args.image).convert("RGB"))  # uint8 [3, H, W]
    trunk = torch.nn.Sequential(*list(torchvision.models.resnet18(weights=None).children())[:-2])  # [B, 512, 3, 3]
    head = torch.nn.Linear(512, 64)
    optimizer = torch.optim.SGD([*trunk.parameters(), *head.parameters()], lr=0.02)

    for step in range(args.steps):
        pairs = [(view_of(image), view_of(image)) for _ in range(8)]
        x_a, x_b = (torch.stack([pair[v][0] for pair in pairs]) / 255 for v in (0, 1))

        # --- ten lines of geoaug: where do the same boxes lie in both views? ---------------------------------------
        maps = []
        for v in (0, 1):
            i, j, h, w = torch.tensor([pair[v][1] for pair in pairs]).unbind(-1)
            flips = torch.tensor([pair[v][2] for pair in pairs])
            maps.append(geoaug.from_torchvision(i, j, h, w, flips, image.shape[-2:]))
        key = geoaug.Key(seed=0, epoch=0, ids=range(8 * step, 8 * step + 8))
        boxes_a, boxes_b, valid = geoaug.matched_boxes(*maps, 4, sizes=(96, 96), key=key, min_size=24)
        rois = [[box for box in boxes * 96] for boxes in (boxes_a, boxes_b)]
        z_a, z_b = (head(torchvision.ops.roi_align(trunk(x), r, 1, 1 / 32, aligned=True).flatten(1))
                    for x, r in ((x_a, rois[0]), (x_b, rois[1])))  # fmt: skip
        # -----------------------------------------------------------------------------------------------------------

        cosine = torch.nn.functional.cosine_similarity(z_a, z_b.detach()).view(8, 4)
        loss = ((2 - 2 * cosine) * valid).sum() / valid.sum().clamp(min=1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.3f} over {int(valid.sum())} matched boxes of 32")


if __name__ == "__main__":
    main()

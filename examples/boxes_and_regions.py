"""Boxes, grid regions and points followed through views: nothing is clamped, dropped or guessed.

python examples/boxes_and_regions.py [--image PHOTO] [--out FOLDER]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import geoaug
from geoaug import ViewSpec, viz

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image", type=Path, default=HERE.parent / "docs" / "scene.jpg", help="any photograph")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for the pictures")
    args = parser.parse_args()

    image, _ = geoaug.read_image(args.image)
    specs = [ViewSpec.whole(224), ViewSpec(224, scale=(0.3, 0.6)), ViewSpec.like(1, 112)]
    plan = geoaug.plan_views(specs, [image.shape[:2]], geoaug.sample_ids([args.image.name]), seed=1, epoch=0)
    views = [viz.enlarge(v, 448 // v.shape[-1]) for v in geoaug.render(image, plan)]

    # Boxes of the source, in unit coordinates, as any annotation or proposal gives them.
    boxes = torch.tensor([[[0.1, 0.2, 0.4, 0.6], [0.3, 0.3, 0.9, 0.8], [0.6, 0.05, 0.95, 0.5], [0.0, 0.6, 0.3, 1.0]]])
    followed = [plan.view_from_source[:, v].boxes(boxes) for v in range(3)]
    for v, in_view in enumerate(followed):
        shares = ", ".join(f"{share:.2f}" for share in geoaug.boxes.visible_fraction(in_view)[0].tolist())
        print(f"view {v}, {plan.view_sizes[v]}: visible shares of the four boxes: {shares}")
    with_boxes = [viz.boxes(view, x[0], width=3) for view, x in zip(views, followed, strict=True)]

    # A 4 x 4 grid on the source: which regions a view sees, and points drawn inside them (PLRC).
    a = plan.view_from_source[:, 1]
    seen = geoaug.regions.visible(a, 4, (56, 56))[0].nonzero().flatten().tolist()
    where, ids, _ = geoaug.regions.draw_points(a, 4, 16, 8, key=plan.key.fold("points"))
    print(f"view 1 sees regions {seen} of the 4 x 4 grid; 16 slots of 8 points fell into {len(ids.unique())} of them")
    tinted = [viz.source_grid(view, plan.view_from_source[0, v], 4) for v, view in enumerate(views[:2])]
    tinted[1] = viz.points(tinted[1], where[0], ids[0], rim=(255, 255, 255))

    sheet = viz.below([viz.beside(with_boxes), viz.beside(tinted)])
    print(f"wrote {viz.save(sheet, args.out / 'boxes_and_regions.png')}")


if __name__ == "__main__":
    main()

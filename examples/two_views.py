"""Two views of one photograph, what they share, and the pictures of it.

python examples/two_views.py [--image PHOTO] [--out FOLDER] [--seed N]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from torchvision.transforms.v2.functional import resize

import geoaug
from geoaug import ViewSpec, viz

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image", type=Path, default=HERE.parent / "docs" / "scene.jpg", help="any photograph")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for the pictures")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other views")
    args = parser.parse_args()

    image, _ = geoaug.read_image(args.image)  # [H, W, 3]
    specs = [ViewSpec(224, scale=(0.2, 1.0)), ViewSpec(224, scale=(0.2, 1.0))]
    plan = geoaug.plan_views(specs, [image.shape[:2]], geoaug.sample_ids([args.image.name]), seed=args.seed, epoch=0)
    views = [viz.enlarge(view, 2) for view in geoaug.render(image, plan)]  # the same plan, now as pixels

    a, b = plan.view_from_source[:, 0], plan.view_from_source[:, 1]
    boxes_a, boxes_b, valid = geoaug.matched_boxes(a, b, 6, sizes=plan.view_sizes, key=plan.key)
    grid_a, grid_b, on_grid = geoaug.overlap_grid(a, b, 7)
    in_b, in_view = geoaug.correspond(a, b, (7, 7))

    height, width = image.shape[:2]
    crops = geoaug.boxes.from_pixels(plan.crop[0], (height, width))
    source = viz.boxes(viz.enlarge(image.permute(2, 0, 1), 2), crops, labels=["view a", "view b"], width=4)
    source = resize(source, [448, round(448 * width / height)], antialias=True)
    matched = [viz.boxes(views[v], (boxes_a, boxes_b)[v][0], valid[0], width=3) for v in (0, 1)]
    shared = [viz.points(views[v], (grid_a, grid_b)[v][0], valid=on_grid[0]) for v in (0, 1)]
    cells = viz.cells(views[0], (7, 7), in_view[0])  # cells of a that b does not show are dark
    found = viz.correspondence(cells, views[1], geoaug.grids.cell_centers(7, 7), in_b[0], in_view[0], gap=8)
    first, second = viz.beside([source, *matched]), viz.beside([*shared, found])
    first = resize(first, [round(first.shape[1] * second.shape[2] / first.shape[2]), second.shape[2]], antialias=True)
    sheet = viz.below([first, second])
    print(f"wrote {viz.save(sheet, args.out / 'two_views.png')}: {int(valid.sum())} matched boxes, "
          f"{int(on_grid.sum())} grid points, {int(in_view.sum())} of 49 cells found")  # fmt: skip


if __name__ == "__main__":
    main()

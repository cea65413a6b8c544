"""Every region operator on the same photograph, as a contact sheet: cutouts, windows, jitter, pasting, de-positioning.

python examples/region_composites.py [--image PHOTO] [--out FOLDER] [--seed N]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import geoaug
from geoaug import Key, ViewSpec, viz
from geoaug.pixels import composites

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image", type=Path, default=HERE.parent / "docs" / "scene.jpg", help="any photograph")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for the picture")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other cuts and shifts")
    args = parser.parse_args()

    image, _ = geoaug.read_image(args.image)
    plan = geoaug.plan_views(
        [ViewSpec.whole(224)], [image.shape[:2]], geoaug.sample_ids([args.image.name]), seed=0, epoch=0
    )
    view = geoaug.render(image, plan)[0][None]  # [1, 3, 224, 224]
    size, key = (224, 224), Key(args.seed, 0, plan.ids)
    boxes = torch.tensor(
        [[[0.05, 0.1, 0.6, 0.78], [0.22, 0.33, 0.56, 0.73], [0.7, 0.28, 0.95, 0.65], [0.22, 0.68, 0.5, 0.95]]]
    )
    valid = torch.ones(1, 4, dtype=torch.bool)
    back = view.flip(-1).flip(-2) // 2  # stands in for another image of the batch

    gray = torch.tensor([123, 117, 103], dtype=torch.uint8)[:, None, None]  # 0 after normalising
    sheet = [("the view and its boxes", view, boxes)]
    prc = composites.cutout_masks(boxes, valid, size, key=key.fold("prc"))
    inside = composites.cutout_masks(boxes, valid, size, key=key.fold("prc"), clip="box", restore="threshold")
    squares = composites.square_cutout_masks(boxes, valid, size, key=key.fold("square"), p=1.0)
    masked = composites.window_masks(boxes, valid, size, key=key.fold("prm"))
    visible = composites.window_masks(boxes, valid, size, key=key.fold("prm"), mode="visible")
    masks = {"PRC: cutout by proposal": prc, "PRC, cuts inside their boxes": inside, "SoCo's square cutout": squares,
             "PRM: 20 to 60 % masked": masked, "PRM: window of 20 to 60 %": visible,
             "PRM of PRC, eq. 2": prc & masked}  # fmt: skip
    sheet += [(name, torch.where(keep[:, None], view, gray), boxes) for name, keep in masks.items()]
    for law in composites.JITTER_LAWS:
        jittered = composites.jitter_boxes(boxes, key=key.fold("jitter"), law=law, p=1.0)
        sheet.append((f"box jitter: {law}", view, torch.cat((boxes, jittered), dim=1)))
    for name, cut in (("moved onto another image", False), ("the same, cut: x3 of eq. 8", True)):
        made = composites.shift_composite(view, boxes, valid, back, key=key.fold("x3"), cut=cut)
        sheet.append((name, made.images, made.boxes * made.valid[..., None]))
    sheet += [("boxes without proposals: grid", view, composites.grid_boxes(key=key)),
              ("boxes without proposals: free", view, composites.free_boxes(key=key))]  # fmt: skip

    tiles = [viz.titled(viz.boxes(viz.enlarge(v[0], 2), x[0], x[0].any(-1), width=3), name) for name, v, x in sheet]
    rows = [viz.beside(tiles[i : i + 4]) for i in range(0, len(tiles), 4)]
    shift = made.shift[0].tolist()
    print(f"composite: {int(made.valid.sum())} of 4 boxes moved by {shift} pixels, {made.foreground[0]:.0%} foreground")
    print(f"wrote {viz.save(viz.below(rows), args.out / 'region_composites.png')}")


if __name__ == "__main__":
    main()

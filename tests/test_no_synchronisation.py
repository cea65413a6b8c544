"""No function on the training path copies between host and device: followed on a made-up GPU, so it runs anywhere.

Under FakeTensorMode a `.item()`, a `bool()` or a `nonzero` of a CUDA tensor raises; copies from host memory do not, so
they are caught one by one as they are dispatched.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import geoaug
from geoaug import AxisAffine, Key, Plan, boxes, regions
from geoaug.pixels import composites


class Copies(TorchDispatchMode):
    """Collects every copy between host and device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        moved = isinstance(out, torch.Tensor) and "copy" in str(func) and any(x.device != out.device for x in tensors)
        if moved or "_local_scalar" in str(func) or "nonzero" in str(func):
            self.found.append(str(func))
        return out


def cases(device):
    batch = 4
    a, b = (AxisAffine(torch.rand(batch, 2, device=device) + 0.5, torch.rand(batch, 2, device=device)) for _ in "ab")
    key = Key(0, 0, torch.zeros(batch, dtype=torch.int64, device=device))
    points, box = torch.rand(batch, 9, 2, device=device), torch.rand(batch, 3, 4, device=device)
    labels, flips = torch.zeros(batch, 5, 7, dtype=torch.uint8, device=device), torch.zeros(batch, device=device).bool()
    rows = (
        torch.tensor([0.0, 0, 1, 1]).expand(batch, 2, 4),
        torch.zeros(batch, 2),
        torch.ones(batch, 2),
        torch.zeros(batch),
    )
    types = (torch.int32, torch.bool, torch.int32, torch.int64)
    plan = Plan(*(x.to(device, t) for x, t in zip(rows, types, strict=True)), ((8, 8), (8, 8)), 0, 0)
    i, j, h, w = torch.ones(4, batch, device=device)
    sizes = ((224, 160), (96, 128))
    there, images = torch.ones(batch, 3, device=device).bool(), torch.rand(batch, 3, 5, 7, device=device)
    partner = torch.zeros(batch, device=device).long()
    maps, level = torch.rand(batch, 8, 5, 7, device=device), torch.zeros(batch, 3, device=device).long()
    queue, queue_valid = torch.rand(6, 4, device=device), torch.ones(6, device=device).bool()
    ids = torch.zeros(batch, 3, device=device).long()
    inside = {"clip": "box", "restore": "threshold"}
    return {
        "overlap": lambda: geoaug.overlap(a, b),
        "matched_boxes": lambda: geoaug.matched_boxes(a, b, 3, sizes=sizes, key=key),
        "matched_boxes, eq. 1": lambda: geoaug.matched_boxes(
            a, b, 3, sizes=sizes, key=key, law="uniform", on_fail="drop"
        ),
        "overlap_grid": lambda: geoaug.overlap_grid(a, b, 7, sizes=sizes, min_size=5),
        "correspond": lambda: geoaug.correspond(a, b, (7, 5)),
        "visible": lambda: regions.visible(a, 4, (7, 5)),
        "label_map": lambda: regions.label_map(a, 4, (7, 5)),
        "lookup": lambda: regions.lookup(labels, points),
        "draw_points, grid": lambda: regions.draw_points(a, 4, 16, 8, key=key),
        "draw_points, boxes": lambda: regions.draw_points(a, box, 16, 8, key=key),
        "draw_points, labels": lambda: regions.draw_points(a, labels, 16, 8, key=key),
        "plan": lambda: (plan.view_from_source[:, 0], plan[1:3], plan.key),
        "iou": lambda: boxes.iou(box, box),
        "visible_fraction": lambda: boxes.visible_fraction(box),
        "from_pixels": lambda: boxes.from_pixels(box, (5, 7)),
        "to_pixels": lambda: boxes.to_pixels(box, torch.ones(batch, 2, device=device)),
        "draws": lambda: (
            key.fold("x").uniform("s", 5),
            key.integers("s", 5, torch.ones(batch, 1, device=device).long()),
        ),
        "choose": lambda: geoaug.select.choose(box, there, 5, [a, b], list(sizes), key=key),
        "sample_points": lambda: geoaug.sample_points(maps, points),
        "roi_features": lambda: geoaug.roi_features(maps, box, there, 7),
        "roi_features, one bin": lambda: geoaug.roi_features(maps, box, there, 1),
        "roi_weights": lambda: geoaug.roi_weights(box, (5, 7)),
        "roi_features, levels": lambda: geoaug.roi_features([maps, maps], box, there, 7, level=level),
        "fpn_level": lambda: geoaug.fpn_level(box, 224),
        "regression": lambda: geoaug.losses.regression(box, box),
        "info_nce": lambda: geoaug.losses.info_nce(box, box, queue, queue_valid, temperature=0.2),
        "dense_similarity": lambda: geoaug.losses.dense_similarity(box, box, kind="cross_entropy"),
        "region_embeddings": lambda: geoaug.losses.region_embeddings(box, points[:, :3], by_mass=True),
        "region_contrast": lambda: geoaug.losses.region_contrast(box, box, temperature=0.1),
        "local_contrastive": lambda: geoaug.losses.local_contrastive(
            maps, maps.mT, torch.rand(batch, 35, 2, device=device), temperature=0.1
        ),
        "local_regression": lambda: geoaug.losses.local_regression(
            maps, maps.mT, torch.rand(batch, 35, 2, device=device)
        ),
        "point_region_contrast": lambda: geoaug.losses.point_region_contrast(box, ids, box, ids, temperature=0.2),
        "positive_pairs": lambda: geoaug.losses.positive_pairs(ids, ids),
        "affinity_distillation": lambda: geoaug.losses.affinity_distillation(
            box, box, box, box, there, temperature=0.1, teacher_temperature=0.07
        ),
        "mean": lambda: geoaug.losses.mean(box[..., 0], there),
        "mean, per image": lambda: geoaug.losses.mean(box[..., 0], there, per_image=True, count=2.5),
        "flip": lambda: AxisAffine.flip_x(flips).matrix(),
        "from_torchvision": lambda: geoaug.from_torchvision(i, j, h, w, flips, (5, 7)),
        "from_kornia": lambda: geoaug.from_kornia(torch.rand(batch, 3, 3, device=device), (5, 7), (5, 7)),
        "from_ffcv_ssl": lambda: geoaug.from_ffcv_ssl(torch.ones(batch, 6, device=device), flips),
        "cutout_masks": lambda: composites.cutout_masks(box, there, (5, 7), key=key),
        "cutout_masks, inside": lambda: composites.cutout_masks(box, there, (5, 7), key=key, **inside),
        "square_cutout_masks": lambda: composites.square_cutout_masks(box, there, (5, 7), key=key),
        "window_masks": lambda: composites.window_masks(box, there, (5, 7), key=key),
        "jitter_boxes": lambda: composites.jitter_boxes(box, key=key, strict_inside=True),
        "boxes without proposals": lambda: (composites.grid_boxes(key=key), composites.free_boxes(key=key)),
        "block_derangement": lambda: composites.block_derangement(key, ok=flips),
        "paste": lambda: composites.paste(
            images, images[:, 0] > 0, partner, torch.zeros(batch, 2, device=device).long()
        ),
        "paste, out": lambda: composites.paste(
            images, images[:, 0] > 0, images, torch.zeros(batch, 2, device=device).long(), rows=partner, out=images
        ),
        "boxes_with_room": lambda: composites.boxes_with_room(box, there, (5, 7)),
        "shift_composite": lambda: composites.shift_composite(images.half(), box, there, partner, key=key),
        "shift_composite, out": lambda: composites.shift_composite(
            images, box, there, images.clone(), key=key, rows=partner, out=images
        ),
    }


@pytest.mark.parametrize("name", cases("cpu"))
def test_nothing_crosses_between_host_and_device(monkeypatch, our_errors, name):
    monkeypatch.setenv("GEOAUG_CHECK", "0")
    with FakeTensorMode(allow_non_fake_inputs=True):
        case = cases("cuda")[name]
        with Copies() as copies:
            case()
    assert copies.found == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, torch makes this tensor there")
def test_a_copy_is_noticed():
    with FakeTensorMode(allow_non_fake_inputs=True), Copies() as copies:
        torch.ones(3, device="cuda").new_tensor((1.0, 2.0))
    assert copies.found

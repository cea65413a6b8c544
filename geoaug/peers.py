"""Adapters that let the conformance suite measure other libraries, and the table of what it found.

    python -m geoaug.peers docs/conformance.md

Each adapter is used only where its library is installed. A library is measured by what it offers to follow a view: its
boxes, its keypoints, its matrix, its crop record or its grid.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import platform
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .geometry import grids
from .geometry.adopt import from_kornia, from_lightly
from .geometry.affine import AxisAffine
from .geometry.plan import plan_views
from .geometry.views import ViewSpec
from .testing import Claim, Report, Transform, measure

VIEW = (64, 80)


def geoaug_views() -> Iterator[tuple[str, str, Transform]]:
    """Our plans, cropped and resized by torchvision's antialiased kernel."""
    from torchvision.transforms.v2 import functional

    chains = {
        "crop and resize": [ViewSpec(VIEW, flip=0.0)],
        "flip": [ViewSpec.whole(VIEW, flip=1.0)],
        "resize": [ViewSpec.whole(VIEW)],
        "crop, resize, flip": [ViewSpec(VIEW)],
        "chain: crop inside a crop": [ViewSpec(VIEW, (0.5, 1.0)), ViewSpec(VIEW, (0.3, 1.0), within=0)],
    }
    for name, specs in chains.items():

        def draw(image: Tensor, specs: list[ViewSpec], ids: Iterator[int]) -> tuple[Tensor, Claim]:
            plan = plan_views(specs, [image.shape[-2:]], [next(ids)], seed=0, epoch=0)
            x0, y0, x1, y1 = plan.crop[0, -1].tolist()
            view = functional.resized_crop(image, y0, x0, y1 - y0, x1 - x0, list(VIEW), antialias=True)
            return (view.flip(-1) if plan.flipped[0, -1] else view), plan.view_from_source[0, -1]

        yield name, "map", partial(draw, specs=specs, ids=iter(range(10**9)))


def _fit(view_points: Tensor, source_points: Tensor) -> AxisAffine:
    """The axis map through pairs of points, by least squares per axis."""
    mean_v, mean_s = view_points.mean(0), source_points.mean(0)
    scale = ((view_points - mean_v) * (source_points - mean_s)).sum(0) / ((source_points - mean_s) ** 2).sum(0)
    return AxisAffine(scale, mean_v - scale * mean_s)


def torchvision_views() -> Iterator[tuple[str, str, Transform]]:
    """torchvision v2, followed through its BoundingBoxes and through its KeyPoints."""
    from torchvision import tv_tensors
    from torchvision.transforms import v2

    chains = {
        "crop": v2.RandomCrop((40, 40)),
        "flip": v2.RandomHorizontalFlip(1.0),
        "resize": v2.Resize(VIEW),
        "crop, resize, flip": v2.Compose([v2.RandomResizedCrop(VIEW), v2.RandomHorizontalFlip(0.5)]),
        "chain: flip, resize": v2.Compose([v2.RandomHorizontalFlip(1.0), v2.Resize(VIEW)]),
    }

    def by_boxes(image: Tensor, transform: torch.nn.Module) -> tuple[Tensor, Claim]:
        height, width = image.shape[-2:]
        whole = torch.tensor([[0.0, 0.0, width, height]])
        box = tv_tensors.BoundingBoxes(whole, format="XYXY", canvas_size=(height, width), clamping_mode=None)
        view, found = transform(tv_tensors.Image(image), box)
        h, w = view.shape[-2:]
        mirrored = bool((view[0, :, 0] > view[0, :, -1]).all())  # a box does not say that it was mirrored
        unit = found.as_subclass(Tensor)[0] / torch.tensor([w, h, w, h])
        claim = AxisAffine(unit[2:] - unit[:2], unit[:2].clone())
        return view.as_subclass(Tensor), claim @ AxisAffine.flip_x(torch.tensor(mirrored))

    def by_keypoints(image: Tensor, transform: torch.nn.Module, centre: float) -> tuple[Tensor, Claim]:
        height, width = image.shape[-2:]
        source = grids.cell_centers(120, 120) * torch.tensor([width, height]) - centre
        view, found = transform(tv_tensors.Image(image), tv_tensors.KeyPoints(source, canvas_size=(height, width)))
        size = torch.tensor([view.shape[-1], view.shape[-2]])
        in_view = found.as_subclass(Tensor).float()
        kept = ((in_view > 0) & (in_view < size - 1)).all(-1)  # keypoints outside are clamped to the border
        return view.as_subclass(Tensor), _fit(
            (in_view[kept] + centre) / size, (source[kept] + centre) / torch.tensor([width, height])
        )

    for name, transform in chains.items():
        yield name, "BoundingBoxes", partial(by_boxes, transform=transform)
        yield name, "KeyPoints, read as edges", partial(by_keypoints, transform=transform, centre=0.0)
        yield name, "KeyPoints, read as centres", partial(by_keypoints, transform=transform, centre=0.5)


def kornia_views() -> Iterator[tuple[str, str, Transform]]:
    """kornia's `transform_matrix`, which counts pixel centres from 0."""
    import kornia.augmentation as kornia

    chains = {
        "crop": kornia.RandomCrop((40, 40), p=1.0),
        "flip": kornia.RandomHorizontalFlip(p=1.0),
        "resize": kornia.Resize(VIEW, antialias=True),
        "crop and resize (slice)": kornia.RandomResizedCrop(VIEW, cropping_mode="slice", p=1.0),
        "crop and resize (resample)": kornia.RandomResizedCrop(VIEW, cropping_mode="resample", p=1.0),
    }
    for name, transform in chains.items():

        def draw(image: Tensor, transform: torch.nn.Module = transform) -> tuple[Tensor, Claim]:
            view = transform(image[None])[0]
            matrix = transform.transform_matrix
            assert isinstance(matrix, Tensor)
            return view, from_kornia(matrix, image.shape[-2:], view.shape[-2:])[0]

        yield name, "transform_matrix", draw


def lightly_views() -> Iterator[tuple[str, str, Transform]]:
    """lightly's crop record, and the VICRegL grid made from it."""
    from lightly.transforms import random_crop_and_flip_with_grid as lightly

    transform = lightly.RandomResizedCropAndFlip(grid_size=7, crop_size=64, crop_min_scale=0.1, crop_max_scale=1.0)

    def by_record(image: Tensor) -> tuple[Tensor, Claim]:
        view, location = transform.resized_crop.forward(img=image)
        view, location = transform.horizontal_flip.forward(view, location)
        view, location = transform.vertical_flip.forward(view, location)
        return view, from_lightly(location)[0]

    def by_grid(image: Tensor) -> tuple[Tensor, Claim]:
        view, grid = transform(image)
        source = grid.reshape(-1, 2) / torch.tensor([image.shape[-1], image.shape[-2]])
        return view, (grids.cell_centers(7, 7), source)

    yield "crop, resize, flips", "Location", by_record
    yield "crop, resize, flips", "grid (7 x 7)", by_grid


PEERS = {
    "geoaug": geoaug_views,
    "torchvision": torchvision_views,
    "kornia": kornia_views,
    "lightly": lightly_views,
}


def run() -> tuple[list[tuple[str, str, Report]], list[str]]:
    """Measure every installed library; rows (library, claim, report) and the libraries that are missing."""
    rows, missing = [], []
    for library, views in PEERS.items():
        if importlib.util.find_spec(library) is None:
            missing.append(library)
            continue
        for chain, claim, transform in views():
            with torch.random.fork_rng(devices=[]):  # the peers draw from the global generator; the caller keeps his
                torch.default_generator.manual_seed(0)
                rows.append((library, claim, measure(chain, transform)))
    return rows, missing


def markdown(rows: list[tuple[str, str, Report]], missing: list[str]) -> str:
    """The table of `docs/conformance.md`."""
    lines = [
        "# Conformance: do the pixels lie where the record says?",
        "",
        "Made by `python -m geoaug.peers docs/conformance.md`; nothing here is written by hand.",
        "",
        "Each transform runs on float images that hold their own coordinates (five sizes, 20 draws each). The true",
        "map is recovered from the view by least squares and compared at the view's corners with what the library says",
        "of the view. The figure is the worst error of all draws, in source or view pixels, whichever is larger; 0.02",
        "is the noise of float arithmetic and border effects. Boxes are followed unclamped, keypoints where they lie",
        "inside and in both possible readings: 0 is the image's edge, or 0 is the first pixel's centre. A matrix of",
        "kornia is read as kornia counts, from pixel centre to pixel centre.",
        "",
        "| library | transform | followed by | worst disagreement (px) | views |",
        "| --- | --- | --- | ---: | ---: |",
    ]
    lines += [f"| {library} | {r.name} | {claim} | {r.worst:.3f} | {r.draws} |" for library, claim, r in rows]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in dict.fromkeys(row[0] for row in rows)]
    lines += ["", f"{', '.join(versions)}; torch {torch.__version__}, Python {platform.python_version()}, "]
    lines[-1] += time.strftime("%Y-%m-%d.")
    lines += [f"Not installed at this run, so not measured: {', '.join(missing)}."] if missing else []
    return "\n".join([*lines, ""])


def main() -> None:
    """Write the table to the file named, or print it."""
    parser = argparse.ArgumentParser(prog="python -m geoaug.peers", description=__doc__)
    parser.add_argument("out", nargs="?", type=Path, help="the Markdown file to write; printed without it")
    out = parser.parse_args().out
    table = markdown(*run())
    if out is None:
        print(table)
    else:
        out.write_text(table)
        print(f"wrote {out}")


if __name__ == "__main__":
    main()

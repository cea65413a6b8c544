"""What `geoaug inspect` shows and `geoaug stats` counts: a recipe on your images, before any GPU hour is spent."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from . import composite_pages, viz
from .geometry import boxes as box_algebra
from .geometry import grids, pairs, regions
from .geometry.affine import AxisAffine
from .geometry.plan import Plan, plan_views
from .geometry.rng import Key
from .loading.batch import Batch, pad_boxes
from .loading.opening import open_loader
from .loading.source import Source, open_source
from .pixels.color import color
from .proposals.store import ProposalStore
from .recipes import Recipe

_SHOWN = 448  # pixels a view is enlarged to, at least


def _pair(plan: Plan, recipe: Recipe) -> tuple[AxisAffine, AxisAffine]:
    maps = plan.view_from_source
    return maps[:, recipe.pair[0]], maps[:, recipe.pair[1]]


def _sizes(plan: Plan, recipe: Recipe) -> tuple[tuple[int, int], tuple[int, int]]:
    return plan.view_sizes[recipe.pair[0]], plan.view_sizes[recipe.pair[1]]


def rows_of(batch: Batch, recipe: Recipe, source: Tensor, row: int) -> list[tuple[str, Tensor]]:
    """Titled pictures of one sample: its source uint8 [3, H, W], its views, and what the recipe compares in them."""
    plan, key = batch.plan[row], batch.key[row]
    views = [viz.enlarge(v[row], max(1, -(-_SHOWN // v.shape[-1]))) for v in batch.images]
    size = (int(plan.source_size[0, 0]), int(plan.source_size[0, 1]))
    crops = box_algebra.from_pixels(plan.crop[0], size)
    large = viz.enlarge(source, max(1, -(-_SHOWN // max(size))))
    shown = viz.boxes(large, crops, labels=list(recipe.names), width=3)
    own = batch.box_valid[row]
    rows = [("source with its crops, views as cropped", viz.beside([shown, *views]))]

    painted = []
    for draw, view, spec in zip(recipe.draws, batch.images, recipe.colors, strict=True):
        kept = color(view[row : row + 1], replace(spec, mean=0.0, std=1.0), batch.plan.key[row].fold(draw))
        seen = (kept[0] * 255).round().clamp(0, 255).to(torch.uint8)
        painted.append(viz.enlarge(seen, max(1, -(-_SHOWN // view.shape[-1]))))
    rows.append(("views as the network sees them, before normalising", viz.beside(painted)))

    a, b = _pair(plan, recipe)
    va, vb = (views[v] for v in recipe.pair)
    if own.any():
        boxes = batch.boxes[row : row + 1]
        maps = plan.view_from_source
        followed = [viz.boxes(v, maps[:, i].boxes(boxes)[0], own, width=3) for i, v in enumerate(views)]
        rows.append(
            ("boxes of the source, followed", viz.beside([viz.boxes(large, boxes[0], own, width=3), *followed]))
        )
    if recipe.matched:
        in_a, in_b, valid = pairs.matched_boxes(a, b, recipe.matched, sizes=_sizes(plan, recipe), key=key.fold("pair"))
        matched = [viz.boxes(v, x[0], valid[0], width=3) for v, x in ((va, in_a), (vb, in_b))]
        rows.append((f"{int(valid.sum())} matched boxes", viz.beside(matched)))
    if recipe.grid:
        in_a, in_b, valid = pairs.overlap_grid(a, b, recipe.grid)
        dotted = [viz.points(v, x[0], valid=valid[0]) for v, x in ((va, in_a), (vb, in_b))]
        rows.append((f"{recipe.grid} x {recipe.grid} grid in the overlap", viz.beside(dotted)))
    if recipe.cells:
        in_b, valid = pairs.correspond(a, b, (recipe.cells, recipe.cells))
        celled = viz.cells(va, (recipe.cells, recipe.cells), valid[0])
        centers = grids.cell_centers(recipe.cells, recipe.cells)
        title = f"{int(valid.sum())} of {recipe.cells**2} cells found; the dark ones lie outside"
        rows.append((title, viz.correspondence(celled, vb, centers, in_b[0], valid[0])))
    if recipe.regions:
        tinted = []
        for v, name in zip(recipe.pair, ("a", "b"), strict=True):
            view_map = plan.view_from_source[:, v]
            at, ids, _ = regions.draw_points(view_map, recipe.regions, recipe.slots, recipe.points, key=key.fold(name))
            tint = viz.source_grid(views[v], plan.view_from_source[0, v], recipe.regions)
            tinted.append(viz.points(tint, at[0], ids[0], radius=4, rim=(255, 255, 255)))
        title = f"regions of a {recipe.regions} x {recipe.regions} grid on the source, and points drawn in them"
        rows.append((title, viz.beside(tinted)))
    return rows


@dataclass(frozen=True)
class Written:
    """What `make_pages` wrote, of how many images, and what it could not read (name: kind and reason)."""

    paths: list[Path]
    images: int
    failures: dict[str, tuple[str, str]]


def make_pages(
    path: Path | str,
    recipe: Recipe,
    out: Path,
    *,
    count: int,
    seed: int,
    images: Path | None = None,
    proposals: Path | None = None,
) -> Written:
    """Write `inspect.html` and a contact sheet of a source's first readable images under a recipe."""
    sections: list[tuple[str, str, Tensor | None]] = [("", describe(recipe), None)]
    sheet: list[Tensor] = []
    shown: list[Batch] = []
    with open_loader(
        path, recipe.views, batch_size=1, seed=seed, workers=0, order="file", images=images, proposals=proposals,
        on_error="mask",
    ) as loader:  # fmt: skip
        for batch in loader:
            if not batch.ok.all():
                continue
            rows = rows_of(batch, recipe, loader.stored(batch.names[0]).permute(2, 0, 1), 0)
            sections += [(batch.names[0] if i == 0 else "", title, picture) for i, (title, picture) in enumerate(rows)]
            sheet += [picture for _, picture in rows]
            shown.append(batch)
            if len(shown) == count:
                break
        failures = dict(loader.failures)
    if not shown:
        raise ValueError(f"none of the images of {path} could be read, such as {next(iter(failures.items()))}")
    if composite_pages.applies(recipe):
        made = composite_pages.rows_of(shown, recipe)
        sections += [("composites" if i == 0 else "", title, picture) for i, (title, picture) in enumerate(made)]
        sheet += [picture for _, picture in made]
    paths = [viz.page(f"geoaug inspect: {recipe.about}", sections, out / "inspect.html")]
    return Written([*paths, viz.save(viz.below(sheet), out / "inspect.png")], len(shown), failures)


def describe(recipe: Recipe) -> str:
    """The recipe in plain words, one line a view."""
    lines = []
    for name, view, paint in zip(recipe.names, recipe.views, recipe.colors, strict=True):
        height, width = view.height_width
        geometry = {"like": f"the crop of view {view.view}", "whole": "the whole image", "center": "the centre"}
        what = geometry.get(view.kind, f"a crop of {view.scale[0]:g} to {view.scale[1]:g} of the {view.law}")
        what += "" if view.within is None else f" inside view {view.within}"
        lines.append(f"{name}: {height} x {width}, {what}, flip {view.flip:g}; jitter {paint.jitter:g}, "
                     f"gray {paint.gray:g}, blur {paint.blur:g}, solarize {paint.solarize:g}")  # fmt: skip
    return "\n".join(lines)


def stats(
    recipe: Recipe,
    sizes: npt.NDArray[np.int64],
    *,
    seed: int = 0,
    boxes: Tensor | None = None,
    valid: Tensor | None = None,
) -> list[tuple[str, str]]:
    """What the geometry of a recipe amounts to over images of sizes [N, 2]; no pixel is touched.

    With boxes [N, M, 4] in source units and valid [N, M]: how large they are and how much of them the views show.
    """
    plan = plan_views(recipe.views, sizes, np.arange(len(sizes)), seed=seed, epoch=0)
    a, b = _pair(plan, recipe)
    shared = pairs.overlap(a, b)
    rows = [("images", f"{len(plan):,}"), ("pairs without overlap", f"{1 - shared.valid.float().mean():.2%}")]
    share = torch.minimum(box_algebra.area(shared.in_a), box_algebra.area(shared.in_b))
    counts = torch.histc(share, 10, 0, 1) / len(plan)
    for i, count in enumerate(counts.tolist()):
        rows.append(
            (f"overlap {10 * i} to {10 * i + 10} % of the larger crop", f"{count:6.2%} {'#' * round(60 * count)}")
        )
    size_a, size_b = _sizes(plan, recipe)
    h, w = (max(1, side // recipe.stride) for side in size_a)
    _, visible = pairs.correspond(a, b, (h, w))
    cells = visible.float().sum(1)
    none = (cells == 0).float().mean()
    rows.append(
        (f"cells of a {h} x {w} map that lie in the other view", f"mean {cells.mean():.1f}, none in {none:.2%}")
    )
    for v, name in enumerate(recipe.names):
        sides = (plan.crop[:, v, 2:] - plan.crop[:, v, :2]).float()
        height, width = plan.view_sizes[v]
        factor = torch.tensor([width, height]) / sides
        rows.append((f"{name}: view pixels per source pixel", quantiles(factor.flatten())))
    if recipe.matched:
        in_a, in_b, valid = pairs.matched_boxes(a, b, recipe.matched, sizes=(size_a, size_b), key=plan.key)
        rows.append(("images without matched boxes", f"{1 - valid.any(1).float().mean():.2%}"))
        for name, boxes, (height, width) in (("a", in_a, size_a), ("b", in_b, size_b)):
            sides = (boxes[..., 2:] - boxes[..., :2]) * torch.tensor([width, height]) / recipe.stride
            title = f"sides of matched boxes in view {name}, in cells of {recipe.stride} px"
            rows.append((title, quantiles(sides[valid])))
    if boxes is not None and valid is not None and valid.any():
        for v, name in enumerate(recipe.names):
            in_view = plan.view_from_source[:, v].boxes(boxes)[valid]
            height, width = plan.view_sizes[v]
            sides = (in_view[:, 2:] - in_view[:, :2]) * torch.tensor([width, height]) / recipe.stride
            rows.append((f"{name}: sides of boxes, in cells of {recipe.stride} px", quantiles(sides.flatten())))
            rows.append((f"{name}: visible share of boxes", quantiles(box_algebra.visible_fraction(in_view))))
    if recipe.regions:
        n = recipe.regions
        seen = [regions.visible(view, n, (56, 56)) for view in (a, b)]
        rows += [
            (f"regions seen by view {name}", quantiles(s.sum(1).float())) for name, s in zip("ab", seen, strict=True)
        ]
        rows.append(("pairs without a common region", f"{1 - (seen[0] & seen[1]).any(1).float().mean():.2%}"))
    return rows


def quantiles(values: Tensor) -> str:
    """Median and the range that holds nine tenths."""
    if values.numel() == 0:
        return "none"
    low, middle, high = np.quantile(values.numpy(), (0.05, 0.5, 0.95))
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def sizes_of(path: Path | str, images: Path | None = None) -> tuple[npt.NDArray[np.int64], list[str], Source]:
    """Sizes [N, 2] of the images of a source, from its json or the files' headers; names that could not be read."""
    from PIL import Image

    source = open_source(path, images)
    if source.objects is not None:
        return source.objects.sizes.astype(np.int64), [], source
    sizes, failed = [], []
    for name in source.names:
        try:
            with Image.open(source.root / name) as image:
                sizes.append((image.height, image.width))
        except Exception:  # Pillow raises many kinds of a file that is no image
            sizes.append((0, 0))
            failed.append(name)
    return np.array(sizes, dtype=np.int64), failed, source


def boxes_of(source: Source, proposals: Path | None, slots: int = 64) -> tuple[Tensor, Tensor]:
    """The boxes [N, slots, 4] a loader would give, in source units, and valid [N, slots]."""
    key = Key(0, 0, source.ids)
    if proposals is not None:
        return ProposalStore.open(proposals).padded(key.ids, slots, key=key)
    objects = source.objects
    if objects is None:
        return torch.zeros(len(source), slots, 4), torch.zeros(len(source), slots, dtype=torch.bool)
    owned = [slice(*pair) for pair in zip(objects.offsets[:-1], objects.offsets[1:], strict=True)]
    boxes, labels = [objects.boxes[own] for own in owned], [objects.labels[own] for own in owned]
    padded, valid, _ = pad_boxes(boxes, labels, slots, key)
    return padded, valid

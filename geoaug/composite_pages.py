"""D3SSL's four views with their boxes, as its Figures 2 and 5 show them: the composites of `geoaug inspect`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

from . import viz
from .geometry.affine import AxisAffine
from .geometry.rng import Key
from .loading.batch import Batch
from .pixels.color import color
from .pixels.composites import block_derangement, cutout_masks, shift_composite, window_masks
from .proposals import select
from .recipes import RECIPES, Recipe

_MEAN = (0.485, 0.456, 0.406)  # what is 0 after normalising
_SHOWN = 448  # pixels a view is enlarged to


def applies(recipe: Recipe) -> bool:
    """Whether a recipe is one whose views become composites."""
    return recipe.names == RECIPES["d3ssl"].names


def rows_of(batches: Sequence[Batch], recipe: Recipe) -> list[tuple[str, UInt8[Tensor, "3 _h _w"]]]:
    """For each image a title and x1, x2, x2 small and x3 with their boxes in matching colours.

    x1 and x2 small are cut and masked (eq. 2), x2 is clean, x3 are the boxes of x2 on another of these images (eq. 8).
    """
    ids = torch.cat([batch.key.ids for batch in batches])
    key = Key(batches[0].key.seed, batches[0].key.epoch, ids)
    x1, x2 = (torch.cat([batch.images[v] for batch in batches]) for v in (0, 1))
    raw = [replace(spec, mean=0.0, std=1.0) for spec in recipe.colors]
    front, back = (color(x2, raw[0], key.fold("x3").fold(name)) for name in ("front", "back"))
    x1, x2 = color(x1, raw[0], key.fold("x1")), color(x2, raw[1], key.fold("x2"))
    small = functional.interpolate(
        x2, recipe.views[2].height_width, mode="bilinear", antialias=True, align_corners=False
    )

    in_x1, in_x2, valid = _chosen(batches, recipe, key)
    mean = torch.tensor(_MEAN)[:, None, None]
    seen = {"x1": (x1, in_x1), "x2 small": (small, in_x2)}
    cut = {}
    for name, (view, boxes) in seen.items():
        size = (view.shape[2], view.shape[3])
        own = key.fold(name)
        keep = cutout_masks(boxes, valid, size, key=own) & window_masks(boxes, valid, size, key=own)
        cut[name] = torch.where(keep[:, None], view, mean)
    x3 = shift_composite(front - mean, in_x2, valid, back - mean, key=key.fold("x3"), rows=block_derangement(key))

    rows = []
    for i, batch in enumerate(batches):
        views = [(cut["x1"], in_x1, valid), (x2, in_x2, valid), (cut["x2 small"], in_x2, valid),
                 (x3.images + mean, x3.boxes, x3.valid)]  # fmt: skip
        names = ("x1 cut and masked", "x2", "x2 small, cut and masked", "x3 on another image")
        pictures = [_picture(view[i], boxes[i], there[i], name)
                    for (view, boxes, there), name in zip(views, names, strict=True)]  # fmt: skip
        ground = "a fill" if x3.filled[i] else "another image"
        across, down = x3.shift[i].tolist()
        title = (f"{batch.names[0]}: of {int(valid[i].sum())} boxes {int(x3.valid[i].sum())} moved by "
                 f"({across}, {down}) px onto {ground}, {x3.foreground[i]:.0%} foreground")  # fmt: skip
        rows.append((title, viz.beside(pictures)))
    return rows


def _chosen(batches: Sequence[Batch], recipe: Recipe, key: Key) -> tuple[Tensor, Tensor, Tensor]:
    """The boxes [n, K, 4] that both views show, in x1 and in x2, and valid [n, K]; a repeated one is left out."""
    boxes, own = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("boxes", "box_valid"))
    every = [batch.plan.view_from_source for batch in batches]
    maps = [AxisAffine(*(torch.cat([getattr(m, name)[:, v] for m in every]) for name in ("scale", "shift")))
            for v in (0, 1)]  # fmt: skip
    sizes = batches[0].plan.view_sizes[:2]
    least = 16 * min(sizes[0]) / 224  # one cell of C4
    chosen, slot, none = select.choose(
        boxes, own, recipe.proposals, maps, sizes, key=key.fold("choose"), min_side=least
    )
    repeated = (slot[:, :, None] == slot[:, None]).tril(-1).any(-1)
    in_x1, in_x2 = (view.boxes(chosen) for view in maps)
    return in_x1, in_x2, ~none[:, None] & ~repeated


def _picture(view: Float[Tensor, "3 h w"], boxes: Tensor, valid: Tensor, name: str) -> UInt8[Tensor, "3 _h _w"]:
    picture = (view * 255).round().clamp(0, 255).to(torch.uint8)
    picture = viz.enlarge(picture, max(1, -(-_SHOWN // view.shape[-1])))
    return viz.titled(viz.boxes(picture, boxes, valid, width=3), name)

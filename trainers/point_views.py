"""Points drawn in the regions of two views (PLRC), and where the teacher sees the first view's."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import geoaug
from geoaug import losses, regions

from .arguments import UsageError

TeacherPoints = Literal["mapped", "extra", "slot"]


@dataclass(frozen=True)
class Points:
    """Points of v and v' [B, N * P, 2] with the regions they stand for [B, N * P], -1 where there is none."""

    v: Tensor
    ids: Tensor
    v2: Tensor
    ids2: Tensor
    twins: Tensor  # where the teacher sees the points of v: in v', or with `extra` in v
    shared: Tensor  # [B]: some region was drawn in both views; without one an image has no point loss
    distilled: Tensor  # [B, N * P]: points of v that the teacher sees, in such images

    def split(self, parts: int) -> list[Points]:
        """The same in so many parts of equal size."""
        columns = [getattr(self, f.name).chunk(parts) for f in dataclasses.fields(self)]
        return [Points(*part) for part in zip(*columns, strict=True)]


def side_of(law: str) -> int | None:
    """n of `grid:n`, None for `boxes` and `masks`."""
    found = re.fullmatch(r"grid:([1-9]\d{0,2})|boxes|masks", law)
    if found is None:
        raise UsageError(f"--regions must be grid:N with N from 1 to 999, boxes or masks, got {law}")
    return int(found[1]) if found[1] else None


def need_sources(law: str, data: Path | None, proposals: Path | None) -> None:
    """Refuse what cannot have the regions asked for, before it is opened."""
    if law == "masks" and data is not None and data.suffix != ".json":
        raise UsageError(f"--regions masks needs --data to be a COCO json with masks, got {data}")
    if proposals is not None and law != "boxes":
        raise UsageError(f"--proposals goes with --regions boxes, got --regions {law}")


def need_regions(loader: geoaug.loading.loader.Loader, law: str) -> None:
    """Refuse data without boxes or masks where regions are to come from them."""
    if law == "boxes" and not loader.has_boxes:
        raise UsageError(
            "--data has no boxes: give --proposals STORE (data_prep/selective_search.py makes one), "
            "a .beton written with them, a COCO json, or --regions grid:4"
        )
    if law == "masks" and not (loader.source.objects is not None and any(loader.source.objects.masks)):
        raise UsageError("--data has no masks: give a COCO json with segmentations, or --regions boxes | grid:4")


@torch.no_grad()
def find_points(
    batch: geoaug.Batch, law: str, slots: int, points: int, *, cells: tuple[int, int], teacher: TeacherPoints
) -> Points:
    """Draw points in regions of both views, each view for itself (PLRC, section 3.2); geometry alone.

    `law` is grid:n, boxes or masks; a region can be drawn if it holds the centre of one of the view's cells. The
    teacher sees a point of v at its place in v' (mapped), in v itself (extra), or as the point of the same number in
    the first slot of v' with the same region (slot).
    """
    v, v2 = (batch.plan.view_from_source[:, view] for view in (0, 1))
    drawn: int | Tensor | None = side_of(law)
    if law == "boxes":
        drawn = torch.where(batch.box_valid[..., None], batch.boxes, 0)  # without area: absent
    elif law == "masks":
        drawn = batch.label_map
    assert drawn is not None
    (in_v, ids), (in_v2, ids2) = (
        regions.draw_points(a, drawn, slots, points, key=batch.key.fold(name), cells=cells)[:2]
        for a, name in ((v, "points of v"), (v2, "points of v2"))
    )
    ids, ids2 = (torch.where(batch.ok[:, None], x, -1) for x in (ids, ids2))
    shared = losses.positive_pairs(ids, ids2) > 0
    twins, seen = in_v, ids >= 0
    if teacher == "mapped":
        twins = (v2 @ ~v)(in_v)
        seen = seen & ((twins >= 0) & (twins < 1)).all(-1)
    elif teacher == "slot":
        same = ids[:, ::points, None] == ids2[:, None, ::points]  # [B, N, N]
        slot = same.int().argmax(dim=2)[..., None, None].expand(-1, -1, points, 2)  # the first with the region
        twins = in_v2.unflatten(1, (slots, points)).gather(1, slot).flatten(1, 2)
        seen = seen & same.any(dim=2).repeat_interleave(points, dim=1)
    return Points(in_v, ids, in_v2, ids2, twins, shared, seen & shared[:, None])

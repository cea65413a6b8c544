"""Boxes moved a little (RBJ and its relatives), and boxes drawn without any proposal; unit coordinates throughout."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from ..geometry import boxes as box_algebra
from ..geometry import checks
from ..geometry.rng import Key
from . import rectangles


@dataclass(frozen=True)
class JitterLaw:
    """The numbers of a law: how often a box is jittered, the range of its sides' factors, how far it moves in sides."""

    p: float
    scale: tuple[float, float]
    shift: float


JITTER_LAWS = {
    "restricted": JitterLaw(0.5, (0.8, 1.0), 0.1),  # D3SSL names no numbers: ours
    "soco": JitterLaw(0.5, (0.9, 1.1), 0.1),
    "free": JitterLaw(1.0, (0.9, 1.1), 0.1),  # SCRL's ablation at 10 %; at 20 % (0.8, 1.2) and 0.2
}


def jitter_boxes(
    boxes: Float[Tensor, "B K 4"],
    *,
    key: Key,
    p: float | None = None,
    scale: tuple[float, float] | None = None,
    shift: float | None = None,
    law: Literal["restricted", "soco", "free"] = "restricted",
    strict_inside: bool = False,
) -> Float[Tensor, "B K 4"]:
    """Box jitter: with probability p, width and height times a number from `scale`, moved by up to `shift` of them.

    `law="restricted"` (RBJ, D3SSL section 4.1; p 0.5, scale (0.8, 1), shift 0.1) never enlarges a box, so it takes no
    scale above 1; `strict_inside=True` also keeps it inside the original. `"soco"` (0.5, (0.9, 1.1), 0.1) grows and
    shrinks about the centre. `"free"`, SCRL's ablation (1, (0.9, 1.1), 0.1), moves the top left corner and then scales
    from there. What is left out is the law's own number. A box's visible part is jittered and clipped to the view; one
    that would lose its area keeps its place. Give cutouts, windows and composites the boxes as they were before.

    >>> boxes = torch.tensor([[[0.2, 0.2, 0.6, 0.7]]])
    >>> bool((box_algebra.area(jitter_boxes(boxes, key=Key(0, 0, [7]))) <= box_algebra.area(boxes)).all())
    True
    """
    where = "jitter_boxes"
    ok = isinstance(boxes, Tensor) and boxes.ndim == 3
    checks.require(ok, where, "boxes", "[B, K, 4]", checks.shape_of(boxes))
    checks.xyxy(boxes, where, "boxes")
    rectangles.check_key(key, boxes, where)
    checks.require(law in JITTER_LAWS, where, "law", f"one of {', '.join(JITTER_LAWS)}", repr(law))
    preset = JITTER_LAWS[law]
    p, shift = preset.p if p is None else p, preset.shift if shift is None else shift
    checks.require(0.0 <= p <= 1.0, where, "p", "in [0, 1]", p)
    checks.require(0.0 <= shift < math.inf, where, "shift", "at least 0", shift)
    limit = 1.0 if law == "restricted" else math.inf
    low, high = checks.interval(preset.scale if scale is None else scale, 0.0, limit, where, "scale")
    checks.require(low > 0, where, "scale", "positive", scale)

    batch, slots = boxes.shape[:2]
    u = rectangles.uniform(key, "jitter", 5 * slots, boxes.device).view(batch, slots, 5)
    seen = box_algebra.clip(boxes)
    edges = seen.to(torch.float64)
    sides = edges[..., 2:] - edges[..., :2]
    resized = rectangles.between(low, high, u[..., 1:3]) * sides
    corner = edges[..., :2] + rectangles.between(-shift, shift, u[..., 3:]) * sides
    if law != "free":
        corner = corner + 0.5 * (sides - resized)
    moved = torch.cat((corner, corner + resized), dim=-1).to(boxes.dtype)
    moved = box_algebra.clip(box_algebra.intersect(moved, seen) if strict_inside else moved)
    taken = (u[..., 0] < p) & (moved[..., 2:] > moved[..., :2]).all(-1)
    return torch.where(taken[..., None], moved, seen)


def grid_boxes(
    n: int = 3, *, key: Key, share: tuple[float, float] = (0.12, 0.3), ratio: tuple[float, float] = (0.5, 2.0)
) -> Float32[Tensor, "B {n*n} 4"]:
    """One box for each cell, row-major, of an n x n grid: the law of D3SSL's successor, which needs no proposals.

    Its centre lies in the middle half of its cell, its area is a share of the frame's, its aspect is log-uniform; what
    would lie beyond the frame is cut off.

    >>> grid_boxes(key=Key(0, 0, [7, 8])).shape
    torch.Size([2, 9, 4])
    """
    where = "grid_boxes"
    n = checks.index(n, 1, 2**8, where, "n")
    sides, place = _shapes(n * n, key, share, ratio, where)
    cell = torch.arange(n * n, device=place.device)
    corner = torch.stack((cell % n, cell // n), dim=-1)
    centre = (corner + 0.25 + 0.5 * place) / n
    boxes = torch.cat((centre - 0.5 * sides, centre + 0.5 * sides), dim=-1)
    return boxes.clamp(0.0, 1.0).to(torch.float32)


def free_boxes(
    k: int = 8, *, key: Key, share: tuple[float, float] = (0.09, 0.2), ratio: tuple[float, float] = (0.5, 2.0)
) -> Float32[Tensor, "B k 4"]:
    """k boxes anywhere inside the frame, of a share of its area: the other law of D3SSL's successor.

    The aspect is log-uniform; a side longer than the frame's is cut to it.

    >>> free_boxes(4, key=Key(0, 0, [7, 8])).shape
    torch.Size([2, 4, 4])
    """
    where = "free_boxes"
    sides, place = _shapes(checks.index(k, 0, 2**16, where, "k"), key, share, ratio, where)
    sides = sides.clamp(max=1.0)
    corner = place * (1 - sides)
    return torch.cat((corner, corner + sides), dim=-1).to(torch.float32)


def _shapes(
    k: int, key: Key, share: tuple[float, float], ratio: tuple[float, float], where: str
) -> tuple[Tensor, Tensor]:
    """Sides [B, k, 2] of an area in `share` and an aspect in `ratio`, and two numbers [B, k, 2] to place them by."""
    checks.require(isinstance(key, Key), where, "key", "a Key", checks.shape_of(key))
    low, high = checks.interval(share, 0.0, 1.0, where, "share")
    narrow, wide = checks.interval(ratio, 0.0, math.inf, where, "ratio")
    checks.require(low > 0 and narrow > 0, where, "share and ratio", "positive", (share, ratio))
    u = rectangles.uniform(key, "boxes", 4 * k, key.ids.device).view(len(key), k, 4)
    area = rectangles.between(low, high, u[..., 0])
    aspect = rectangles.between(math.log(narrow), math.log(wide), u[..., 1]).exp()
    return torch.stack(((area * aspect).sqrt(), (area / aspect).sqrt()), dim=-1), u[..., 2:]

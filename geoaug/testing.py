"""A conformance suite for any library: it tells whether the pixels of a view lie where its record says.

Give a callable that turns an image [3, H, W] into (view [3, h, w], claim). The suite feeds it images whose pixels hold
their own coordinates, recovers the true map from the view by least squares, and reports the worst disagreement with the
claim, in pixels. A claim is an `AxisAffine` view_from_source, or a pair of point lists: (where in the view, where in
the source), both [P, 2] in unit coordinates.

    report = measure("mine, crops", my_transform)
    assert report.worst < 0.02
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Num
from torch import Tensor

from .geometry import checks, grids
from .geometry.affine import AxisAffine

Claim = AxisAffine | tuple[Tensor, Tensor]
Transform = Callable[[Tensor], tuple[Tensor, Claim]]

# Odd, even, tall, wide and non-square, so that a swap of axes or an off-by-one shows.
SIZES = ((97, 131), (128, 96), (61, 60), (240, 320), (45, 301))


_MIX = 1 / 32


@dataclass(frozen=True)
class Disagreement:
    """How far a record is from its pixels: the larger of the error in source pixels and in view pixels."""

    corner: float  # recovered map against claim, at the corners of the view (or at the claimed points)
    pixel: float  # worst single pixel against the claim, in source pixels (maps only)


@dataclass(frozen=True)
class Report:
    """The worst disagreement of one transform over all images and draws."""

    name: str
    worst: float
    worst_pixel: float
    draws: int

    def __str__(self) -> str:
        return f"{self.name}: worst disagreement {self.worst:.3f} px in {self.draws} views"


def coordinate_image(height: int, width: int, dtype: torch.dtype = torch.float32) -> Num[Tensor, "3 height width"]:
    """An image whose channels hold x, y and 0 at each pixel centre, in unit coordinates.

    As uint8 each holds 255 times its coordinate with a little of the other mixed in, so that rounding differs from row
    to row and averages out in a fit; a plain ramp would round alike in every row.

    >>> coordinate_image(1, 2)[0]
    tensor([[0.2500, 0.7500]])
    """
    centers = grids.cell_centers(height, width).view(height, width, 2)
    if dtype == torch.uint8:
        centers = (255 * (centers * (1 - _MIX) + centers.flip(-1) * _MIX)).round()
    return torch.cat((centers, torch.zeros(height, width, 1)), dim=-1).permute(2, 0, 1).contiguous().to(dtype)


def _coordinates(view: Tensor) -> Tensor:
    """The source coordinates [h, w, 2] that a view of a coordinate image holds, as float64."""
    ok = isinstance(view, Tensor) and view.ndim == 3 and view.shape[0] >= 2
    checks.require(ok, "measure", "the transform's view", "[3, h, w]", checks.shape_of(view))
    held = view[:2].permute(1, 2, 0).to(torch.float64)
    shown = bool(torch.isfinite(held).all()) and float((held.amax((0, 1)) - held.amin((0, 1))).min()) > 0
    checks.require(shown, "measure", "the transform's view", "finite and not of one value", "another")
    if view.dtype != torch.uint8:
        return held
    return (held * (1 - _MIX) - held.flip(-1) * _MIX) / (255 * (1 - 2 * _MIX))


def _interior(n: int, upscaling: float) -> slice:
    """Leaves out two output pixels off each border, and all that half a source pixel covers when pixels are stretched.

    At the border a resampling kernel is cut off, so the ramp bends there whatever the record says.
    """
    margin = max(2, math.ceil(upscaling / 2) + 1)
    margin = min(margin, (n - 2) // 2)  # a small view keeps at least two rows
    return slice(max(margin, 0), n - max(margin, 0))


def recover(view: Num[Tensor, "3 h w"], upscaling: float = 1.0) -> Float[Tensor, "2 3"]:
    """The matrix [2, 3] taking (x, y, 1) of a view to unit source coordinates, by least squares over the interior."""
    held = _coordinates(view)
    h, w = held.shape[:2]
    rows, columns = _interior(h, upscaling), _interior(w, upscaling)
    centers = grids.cell_centers(h, w).view(h, w, 2)[rows, columns].reshape(-1, 2).to(torch.float64)
    design = torch.cat((centers, torch.ones_like(centers[:, :1])), dim=-1)
    solution: Tensor = torch.linalg.lstsq(design, held[rows, columns].reshape(-1, 2)).solution
    return solution.mT


def disagreement(view: Num[Tensor, "3 h w"], claim: Claim, source_size: Sequence[int]) -> Disagreement:
    """Compare one view of a coordinate image with what is claimed of it."""
    height, width = checks.pair_of_sizes(source_size, "disagreement", "source_size")
    first = recover(view)
    h, w = view.shape[-2:]
    source_pixels = torch.tensor([width, height], dtype=torch.float64)
    view_pixels = torch.tensor([w, h], dtype=torch.float64)
    # View pixels per source pixel: how far one source pixel is stretched, and an error in the source with it.
    stretch = view_pixels / (source_pixels * torch.linalg.vector_norm(first[:, :2], dim=1))
    found = recover(view, float(stretch.max()))
    if isinstance(claim, AxisAffine):
        inverse = ~AxisAffine(claim.scale.reshape(2).double(), claim.shift.reshape(2).double())
        where = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
        claimed = inverse(where)
        rows, columns = _interior(h, float(stretch.max())), _interior(w, float(stretch.max()))
        centers = grids.cell_centers(h, w).to(torch.float64)
        apart = ((inverse(centers).view(h, w, 2) - _coordinates(view)).abs() * source_pixels)[rows, columns]
        pixel = float(apart.max())
    else:
        where, claimed = (points.reshape(-1, 2).to(torch.float64) for points in claim)
        pixel = math.nan
    recovered = where @ found[:, :2].mT + found[:, 2]
    apart = (recovered - claimed).abs() * source_pixels
    return Disagreement(float(torch.maximum(apart, apart * stretch).max()), pixel)


def measure(
    name: str,
    transform: Transform,
    *,
    sizes: Iterable[Sequence[int]] = SIZES,
    draws: int = 20,
    dtype: torch.dtype = torch.float32,
) -> Report:
    """Run a transform `draws` times on a coordinate image of each (height, width) and report the worst disagreement.

    >>> str(measure("nothing", lambda image: (image, AxisAffine.identity())))
    'nothing: worst disagreement 0.000 px in 100 views'
    """
    draws = checks.index(draws, 1, 2**20, "measure", "draws")
    worst, worst_pixel, count = 0.0, 0.0, 0
    for height, width in sizes:
        image = coordinate_image(height, width, dtype)
        for _ in range(draws):
            view, claim = transform(image.clone())
            result = disagreement(view, claim, (height, width))
            worst, count = max(worst, result.corner), count + 1
            worst_pixel = max(worst_pixel, result.pixel) if not math.isnan(result.pixel) else math.nan
    checks.require(count > 0, "measure", "sizes", "at least one (height, width)", "none")
    return Report(name, worst, worst_pixel, count)

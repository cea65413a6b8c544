"""Records of other libraries as view_from_source maps, for those who want the pair algebra alone.

Each function is named for the library whose convention it undoes; from there on there is one convention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Num
from torch import Tensor

from . import checks
from .affine import AxisAffine


@runtime_checkable
class LightlyLocation(Protocol):
    """The fields of lightly's `Location` (1.6): a crop in source pixels and its mirrors."""

    top: float
    left: float
    height: float
    width: float
    image_height: float
    image_width: float
    horizontal_flip: bool
    vertical_flip: bool


def from_torchvision(
    i: Tensor | float,
    j: Tensor | float,
    h: Tensor | float,
    w: Tensor | float,
    flip: Tensor | bool,
    source_size: Sequence[int] | Tensor,
) -> AxisAffine:
    """The map of `RandomResizedCrop.get_params` (top, left, height, width) and a flip after it.

    Numbers, or tensors [*batch]; source_size (height, width) or [*batch, 2].

    >>> a = from_torchvision(20, 10, 50, 100, True, (80, 200))
    >>> a(torch.tensor([[35 / 200, 30 / 80]])) * 224
    tensor([[168.0000,  44.8000]])
    """
    where = "from_torchvision"
    like = next((x for x in (i, j, h, w, flip, source_size) if isinstance(x, Tensor)), torch.zeros(()))
    number = like.new_zeros((), dtype=torch.float32)

    def tensor(x: Tensor | float) -> Tensor:  # numbers are filled in on the device: a copy would synchronise
        return x.to(torch.float32) if isinstance(x, Tensor) else number.new_full((), float(x))

    top, left, height, width = (tensor(x) for x in (i, j, h, w))
    if isinstance(source_size, Tensor):
        checks.require(
            source_size.shape[-1:] == (2,), where, "source_size", "[*batch, 2]", checks.shape_of(source_size)
        )
        source_height, source_width = source_size.to(torch.float32).unbind(-1)
    else:
        source_height, source_width = (tensor(x) for x in checks.pair_of_sizes(source_size, where, "source_size"))
    if checks.values_visible(height):
        for name, side in (("h", height), ("w", width), ("source_size", source_height), ("source_size", source_width)):
            legal = bool(((side > 0) & torch.isfinite(side)).all())
            checks.require(legal, where, name, "positive and finite", "other values")
        checks.require(bool(torch.isfinite(top + left).all()), where, "i and j", "finite", "other values")
    mask = flip if isinstance(flip, Tensor) else torch.full_like(number, bool(flip), dtype=torch.bool)
    checks.require(mask.dtype == torch.bool, where, "flip", "bool", checks.shape_of(mask))
    batch = top.shape
    for name, x in (("j", left), ("h", height), ("w", width), ("flip", mask), ("source_size", source_height)):
        checks.same_batch(batch, x.shape, where, name)
        batch = torch.broadcast_shapes(batch, x.shape)
    edges = (left / source_width, top / source_height)
    ends = ((left + width) / source_width, (top + height) / source_height)
    *corners, mask = torch.broadcast_tensors(*edges, *ends, mask)
    return AxisAffine.flip_x(mask) @ AxisAffine.sending(torch.stack(corners, dim=-1))


def from_kornia(
    matrix: Float[Tensor, "*batch 3 3"], source_size: Sequence[int], view_size: Sequence[int]
) -> AxisAffine:
    """The map of a kornia `transform_matrix`, which maps pixel centres, counted 0 to W - 1, to pixel centres.

    Adding half a pixel on both sides gives edges: this is what the matrix claims, and kornia's crops claim the corner
    centres (`align_corners=True`). A matrix that rotates, shears or projects is refused.

    >>> flip = torch.tensor([[-1.0, 0.0, 9.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    >>> from_kornia(flip, (5, 10), (5, 10)).shift
    tensor([1., 0.])
    """
    where = "from_kornia"
    ok = isinstance(matrix, Tensor) and matrix.is_floating_point() and matrix.shape[-2:] == (3, 3)
    checks.require(ok, where, "matrix", "floating [*batch, 3, 3]", checks.shape_of(matrix))
    (h, w), (h_view, w_view) = (checks.pair_of_sizes(s, where, "a size") for s in (source_size, view_size))
    if checks.values_visible(matrix):
        diagonal = matrix.new_tensor([[0, 1, 0], [1, 0, 0], [1, 1, 0]], dtype=torch.bool)
        axis_aligned = bool((matrix[..., diagonal].abs() < 1e-4).all()) and bool(
            ((matrix[..., 2, 2] - 1).abs() < 1e-4).all()
        )
        checks.require(axis_aligned, where, "matrix", "axis-aligned (no rotation, shear or perspective)", "another")
    scale = torch.diagonal(matrix, dim1=-2, dim2=-1)[..., :2]
    shift = matrix[..., :2, 2] + 0.5 - 0.5 * scale  # y + 0.5 = scale * (x + 0.5) + shift
    source, view = checks.on_device((w, h), matrix), checks.on_device((w_view, h_view), matrix)
    return AxisAffine(scale * source / view, shift / view)


def from_lightly(location: LightlyLocation | Sequence[LightlyLocation]) -> AxisAffine:
    """The maps [B] of lightly `Location` records; a vertical flip is a negative scale of y."""
    records = location if isinstance(location, Sequence) else [location]
    names = ("top", "left", "height", "width", "image_height", "image_width")
    table = torch.tensor([[getattr(record, name) for name in names] for record in records], dtype=torch.float32)
    flips = torch.tensor([[bool(r.horizontal_flip), bool(r.vertical_flip)] for r in records]).reshape(-1, 2)
    i, j, h, w, height, width = table.reshape(-1, 6).unbind(-1)
    crop = from_torchvision(i, j, h, w, torch.zeros(len(records), dtype=torch.bool), torch.stack((height, width), -1))
    return AxisAffine(torch.where(flips.bool(), -1.0, 1.0), flips.float()) @ crop


def from_ffcv_ssl(row: Num[Tensor, "*batch 6"], flip: Tensor | bool = False) -> AxisAffine:
    """The maps of FFCV-SSL's crop records (source width, source height, top, left, height, width), and a flip if known.

    >>> from_ffcv_ssl(torch.tensor([200, 80, 20, 10, 50, 100])).scale
    tensor([2.0000, 1.6000])
    """
    six = isinstance(row, Tensor) and row.shape[-1:] == (6,)
    checks.require(six, "from_ffcv_ssl", "row", "a tensor [*batch, 6]", checks.shape_of(row))
    width, height, i, j, h, w = row.to(torch.float32).unbind(-1)
    return from_torchvision(i, j, h, w, flip, torch.stack((height, width), dim=-1))

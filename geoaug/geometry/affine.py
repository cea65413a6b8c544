"""The one map type: axis-aligned affine maps between unit squares, y = scale * x + shift per axis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from . import checks


@dataclass(frozen=True, eq=False)
class AxisAffine:
    """A batch of maps y = scale * x + shift per axis; a negative scale mirrors. Name them `<to>_from_<from>`.

    Coordinates are continuous, x right and y down, with the edges of an image at 0 and 1. Maps compose with `@`,
    invert with `~`, and take points when called:

    >>> view_from_source = AxisAffine.sending(torch.tensor([[0.25, 0.0, 0.75, 1.0]]))
    >>> view_from_source(torch.tensor([[[0.5, 0.5]]]))
    tensor([[[0.5000, 0.5000]]])
    >>> b_from_a = view_from_source @ ~AxisAffine.identity(1)
    """

    scale: Float[Tensor, "*batch 2"]
    shift: Float[Tensor, "*batch 2"]

    def __post_init__(self) -> None:
        checks.floats(self.scale, 2, "AxisAffine", "scale", "floating [*batch, 2]")
        checks.floats(self.shift, 2, "AxisAffine", "shift", "floating [*batch, 2]")
        same = self.scale.device == self.shift.device and self.scale.dtype == self.shift.dtype
        if self.scale.shape != self.shift.shape or not same:
            like = f"shaped like scale {list(self.scale.shape)}" if same else "of scale's device and dtype"
            checks.require(False, "AxisAffine", "shift", like, checks.shape_of(self.shift))
        if checks.values_visible(self.scale):
            invertible = bool((checks.plain(self.scale) != 0).all())
            checks.require(invertible, "AxisAffine", "scale", "non-zero", "a zero scale, which has no inverse")

    @classmethod
    def identity(cls, *batch: int, device: torch.device | str | None = None) -> AxisAffine:
        """The identity of a batch shape: `identity(4)` has scale [4, 2]."""
        ones = torch.ones(*batch, 2, device=device)
        return cls(ones, torch.zeros_like(ones))

    @classmethod
    def sending(cls, box: Float[Tensor, "*batch 4"]) -> AxisAffine:
        """The map that carries each box [*batch, 4] onto the unit square: the view that a crop of `box` is."""
        box = checks.xyxy(box, "AxisAffine.sending", "box")
        sides = box[..., 2:] - box[..., :2]
        if checks.values_visible(box):
            filled = bool((sides > 0).all())
            checks.require(filled, "AxisAffine.sending", "box", "of positive width and height", "a box without area")
        return cls(1 / sides, -box[..., :2] / sides)

    @classmethod
    def flip_x(cls, mask: Bool[Tensor, "*batch"]) -> AxisAffine:
        """x -> 1 - x where mask [*batch] is true, the identity elsewhere."""
        ok = isinstance(mask, Tensor) and mask.dtype == torch.bool
        checks.require(ok, "AxisAffine.flip_x", "mask", "a bool tensor [*batch]", checks.shape_of(mask))
        one = torch.ones(mask.shape, device=mask.device)
        scale = torch.stack((torch.where(mask, -one, one), one), dim=-1)
        return cls(scale, torch.stack((mask.to(one.dtype), torch.zeros_like(one)), dim=-1))

    def __matmul__(self, other: AxisAffine) -> AxisAffine:
        """`c_from_b @ b_from_a` is c_from_a."""
        if not isinstance(other, AxisAffine):
            return NotImplemented
        checks.same_batch(self.batch_shape, other.batch_shape, "AxisAffine", "the map on the right of @")
        scale, shift = self.scale * other.scale, self.scale * other.shift + self.shift
        return AxisAffine(*torch.broadcast_tensors(scale, shift))

    def __invert__(self) -> AxisAffine:
        """`~b_from_a` is a_from_b."""
        return AxisAffine(1 / self.scale, -self.shift / self.scale)

    def __call__(self, points: Float[Tensor, "*#batch P 2"]) -> Float[Tensor, "*#batch P 2"]:
        """Map points [*batch, P, 2], each (x, y)."""
        points = checks.floats(points, 2, "AxisAffine", "points", "floating points [*batch, P, 2]")
        checks.require(points.ndim >= 2, "AxisAffine", "points", "points [*batch, P, 2]", checks.shape_of(points))
        checks.same_batch(self.batch_shape, points.shape[:-2], "AxisAffine", "points")
        return self.scale[..., None, :] * points + self.shift[..., None, :]

    def boxes(self, xyxy: Float[Tensor, "*#batch K 4"]) -> Float[Tensor, "*#batch K 4"]:
        """Map boxes [*batch, K, 4]; a mirrored box keeps x0 <= x1. Nothing is clipped."""
        xyxy = checks.xyxy(xyxy, "AxisAffine.boxes", "xyxy")
        checks.require(xyxy.ndim >= 2, "AxisAffine.boxes", "xyxy", "boxes [*batch, K, 4]", checks.shape_of(xyxy))
        first, second = self(xyxy[..., :2]), self(xyxy[..., 2:])
        return torch.cat((torch.minimum(first, second), torch.maximum(first, second)), dim=-1)

    def matrix(self) -> Float[Tensor, "*batch 3 3"]:
        """The same maps as homogeneous matrices [*batch, 3, 3]."""
        one = torch.ones_like(self.shift[..., :1])
        diagonal = torch.diag_embed(torch.cat((self.scale, one), dim=-1))
        last_column = torch.nn.functional.pad(self.shift, (0, 1))
        return diagonal + torch.nn.functional.pad(last_column[..., None], (2, 0))

    @property
    def batch_shape(self) -> torch.Size:
        """The shape of the batch, without the axis of x and y."""
        return self.scale.shape[:-1]

    def __getitem__(self, index: Any) -> AxisAffine:
        """Some maps of the batch, indexed as a tensor of shape [*batch] would be."""
        rows = index if isinstance(index, tuple) else (index,)
        rows = rows if any(row is Ellipsis for row in rows) else (*rows, Ellipsis)
        return AxisAffine(self.scale[*rows, :], self.shift[*rows, :])

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> AxisAffine:
        """The same maps on another device."""
        return AxisAffine(
            self.scale.to(device, non_blocking=non_blocking), self.shift.to(device, non_blocking=non_blocking)
        )

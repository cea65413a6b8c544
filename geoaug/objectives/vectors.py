"""What all losses do with vectors first: check them, and bring them to unit length."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..geometry import checks

# Shortest length that is divided by: a zero vector stays zero, and its gradient finite.
SHORT = 1e-6


def vectors(x: object, where: str, argument: str) -> Tensor:
    """Check floating vectors [*batch, D]."""
    ok = isinstance(x, Tensor) and x.is_floating_point() and x.ndim >= 1
    checks.require(ok, where, argument, "floating vectors [*batch, D]", checks.shape_of(x))
    assert isinstance(x, Tensor)
    return x


def wide(x: Tensor) -> Tensor:
    """The same in float32, or float64 as it came."""
    return x if x.dtype == torch.float64 else x.float()


def unit(x: Tensor) -> Tensor:
    """The vectors at length 1, in float32, or float64 as they came."""
    return functional.normalize(wide(x), dim=-1, eps=SHORT)

"""Regular points of a feature map in unit coordinates of its view."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from . import checks


def cell_centers(h: int, w: int, *, device: torch.device | str | None = None) -> Float[Tensor, "cells 2"]:
    """The centres of h x w cells as points [h*w, 2] (x, y), row-major: x = (column + 0.5)/w, y = (row + 0.5)/h.

    >>> cell_centers(1, 2)
    tensor([[0.2500, 0.5000],
            [0.7500, 0.5000]])
    """
    h = checks.index(h, 1, 2**24, "cell_centers", "h")
    w = checks.index(w, 1, 2**24, "cell_centers", "w")
    # A GPU divides by a number by multiplying with its reciprocal; in float64 that rounds to the CPU's float32.
    y, x = (((torch.arange(n, device=device, dtype=torch.float64) + 0.5) / n).to(torch.float32) for n in (h, w))
    return torch.stack((x.repeat(h), y.repeat_interleave(w)), dim=-1)

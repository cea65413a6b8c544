"""The one thing a measure asks of a backbone, and how its maps are read.

A backbone is any callable that takes images as they are stored or scaled (uint8, or floating in [0, 1]; 0 is black),
normalises them itself, and gives named maps [B, C, h, w]. Whoever calls puts it in eval mode and picks the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from ..geometry import checks

Backbone = Callable[[Tensor], Mapping[str, Tensor]]


def layers(backbone: Backbone, images: Tensor, where: str) -> dict[str, Tensor]:
    """What a backbone gives for images, checked: named floating maps [B, C, h, w]."""
    maps = backbone(images)
    named = isinstance(maps, Mapping)
    checks.require(named, where, "backbone", "a callable that gives named maps", type(maps).__name__)
    for name, one in maps.items():
        ok = isinstance(one, Tensor) and one.ndim == 4 and len(one) == len(images) and one.is_floating_point()
        expected = f"a backbone whose maps are floating [{len(images)}, C, h, w]"
        checks.require(ok, where, "backbone", expected, f"{name!r}: {checks.shape_of(one)}")
    return dict(maps)


def chunks(count: int, size: int, where: str) -> Iterator[slice]:
    """Rows of `count` in slices of `size`."""
    size = checks.index(size, 1, 2**31, where, "batch_size")
    return (slice(start, start + size) for start in range(0, count, size))


def tile_means(features: Float[Tensor, "B C h w"], rows: int, columns: int) -> Float[Tensor, "B {rows*columns} C"]:
    """The mean of the cells that lie wholly inside each of rows x columns equal tiles of a map, row by row, in float32.

    >>> tile_means(torch.tensor([[[[1.0, 1.0, 9.0, 3.0, 3.0]]]]), 1, 2).flatten()
    tensor([1., 3.])
    """
    height, width = features.shape[2:]
    fits = rows <= height and columns <= width
    checks.require(fits, "tile_means", "features", f"maps of {rows} x {columns} cells or more", f"{height} x {width}")
    wide = features if features.dtype == torch.float64 else features.float()
    means = []
    for i in range(rows):
        for j in range(columns):
            top, left = -(-i * height // rows), -(-j * width // columns)
            bottom, right = (i + 1) * height // rows, (j + 1) * width // columns
            inside = f"maps with a cell inside each of {rows} x {columns} tiles"
            checks.require(top < bottom and left < right, "tile_means", "features", inside, f"{height} x {width}")
            means.append(wide[:, :, top:bottom, left:right].mean(dim=(2, 3)))
    return torch.stack(means, dim=1)

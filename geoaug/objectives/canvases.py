"""Pictures composed for measuring a backbone: tiles on black, repeated tiles, objects on a foreign background.

All take and give images [B, 3, H, W] before normalisation, uint8 or floating in [0, 1], on any device; 0 is black.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor
from torch.nn import functional

from ..geometry import checks


def _images(x: object, where: str, argument: str, batch: int | None = None) -> Tensor:
    ok = isinstance(x, Tensor) and x.ndim == 4 and (x.is_floating_point() or x.dtype == torch.uint8)
    ok = ok and min(x.shape[2:]) > 0 and batch in (None, len(x))  # type: ignore[attr-defined,arg-type]
    expected = f"uint8 or floating images [{'B' if batch is None else batch}, C, H, W]"
    checks.require(ok, where, argument, expected, checks.shape_of(x))
    assert isinstance(x, Tensor)
    return x


def resize(images: Num[Tensor, "B C _ _"], size: int | tuple[int, int]) -> Num[Tensor, "B C h w"]:
    """Antialiased bilinear resize, aspect not kept; computed in float32 on every device, rounded for uint8."""
    images = _images(images, "resize", "images")
    height, width = checks.pair_of_sizes(size, "resize", "size")
    if 0 in images.shape:
        return images.new_zeros(*images.shape[:2], height, width)
    wide = images if images.dtype == torch.float64 else images.float()
    out = functional.interpolate(wide, (height, width), mode="bilinear", align_corners=False, antialias=True)
    return (out if images.is_floating_point() else out.round().clamp(0, 255)).to(images.dtype)


def object_tiles(
    image: Num[Tensor, "C H W"], boxes: Float[Tensor, "n 4"], size: int | tuple[int, int] = 224
) -> Num[Tensor, "n C h w"]:
    """Each box of one image cut out, outwards to whole pixels, and resized to a tile; aspect not kept.

    For pictures prepared on the host: it reads the boxes' values.

    >>> object_tiles(torch.zeros(3, 50, 70), torch.tensor([[0.1, 0.2, 0.5, 0.8]]), 32).shape
    torch.Size([1, 3, 32, 32])
    """
    ok = isinstance(image, Tensor) and image.ndim == 3
    checks.require(ok, "object_tiles", "image", "one image [C, H, W]", checks.shape_of(image))
    boxes = checks.xyxy(boxes, "object_tiles", "boxes")
    height, width = image.shape[1:]
    sides = checks.pair_of_sizes(size, "object_tiles", "size")
    tiles = []
    for x0, y0, x1, y1 in (boxes.double().clamp(0, 1) * torch.tensor([width, height] * 2)).tolist():
        # A thousandth of a pixel over an edge is rounding; a box without area keeps one pixel.
        left, top = min(math.floor(x0 + 1e-3), width - 1), min(math.floor(y0 + 1e-3), height - 1)
        right, bottom = max(math.ceil(x1 - 1e-3), left + 1), max(math.ceil(y1 - 1e-3), top + 1)
        tiles.append(resize(image[None, :, top:bottom, left:right], sides))
    return torch.cat(tiles) if tiles else image.new_zeros(0, len(image), *sides)


def side_by_side(
    first: Num[Tensor, "B C H W"], second: Num[Tensor, "B C H W"]
) -> tuple[Num[Tensor, "B C H 2*W"], Num[Tensor, "B C H 2*W"]]:
    """Two canvases (D3SSL, Fig. 3a): first and second next to each other, and first alone at its place on black.

    >>> both, alone = side_by_side(torch.ones(2, 3, 224, 224), torch.ones(2, 3, 224, 224))
    >>> both.shape, float(alone.mean())
    (torch.Size([2, 3, 224, 448]), 0.5)
    """
    first = _images(first, "side_by_side", "first")
    same = isinstance(second, Tensor) and second.shape == first.shape and second.dtype == first.dtype
    checks.require(same, "side_by_side", "second", checks.shape_of(first), checks.shape_of(second))
    return torch.cat((first, second), dim=-1), torch.cat((first, torch.zeros_like(second)), dim=-1)


def tiled(images: Num[Tensor, "B C H W"], n: int = 3) -> Num[Tensor, "B C {n}*H {n}*W"]:
    """Each image repeated in an n x n grid (D3SSL, Fig. 4a)."""
    n = checks.index(n, 1, 2**8, "tiled", "n")
    return _images(images, "tiled", "images").repeat(1, 1, n, n)


def disturb(
    images: Num[Tensor, "B C H W"],
    boxes: Float[Tensor, "B K 4"],
    valid: Bool[Tensor, "B K"],
    others: Num[Tensor, "B C _ _"],
) -> Num[Tensor, "B C H W"]:
    """Every pixel outside the valid boxes replaced by another image, resized to the same size (D3SSL, section 5.3).

    A pixel is inside a box if its centre is.

    >>> box = torch.tensor([[[0.0, 0.0, 0.5, 1.0]]])
    >>> disturb(torch.ones(1, 3, 4, 4), box, torch.ones(1, 1).bool(), torch.zeros(1, 3, 9, 9))[0, 0, 0]
    tensor([1., 1., 0., 0.])
    """
    images = _images(images, "disturb", "images")
    others = _images(others, "disturb", "others", len(images))
    same = others.dtype == images.dtype and others.shape[1] == images.shape[1]
    checks.require(same, "disturb", "others", f"{images.dtype} of {images.shape[1]} channels", checks.shape_of(others))
    # The box of an invalid slot becomes one that holds no centre.
    boxes = checks.xyxy(torch.where(valid[..., None], boxes, 0), "disturb", "boxes")
    height, width = images.shape[2:]
    inside = []
    for axis, length in ((1, height), (0, width)):
        centre = (torch.arange(length, device=images.device) + 0.5) / length
        within = (boxes[..., axis, None] <= centre) & (centre < boxes[..., axis + 2, None])  # [B, K, length]
        inside.append(within.float())
    keep = inside[0].mT @ inside[1] > 0  # some box holds the row and the column: [B, H, W]
    return torch.where(keep[:, None], images, resize(others, (height, width)))

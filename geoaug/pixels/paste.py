"""Foregrounds on other backgrounds (D3SSL, eq. 8): a numba kernel on a CPU, torch elsewhere, the same bits."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from ..geometry import checks
from . import paste_kernels, rectangles

_ROWS = 4  # images a thread takes at a time
_PER_THREAD = 2**24  # bytes of output below which a thread more costs what it saves: torch's own still spin
_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # a number's bits are copied, never read


def paste(
    images: Shaped[Tensor, "B C h w"],
    mask: Bool[Tensor, "B h w"],
    backgrounds: Shaped[Tensor, "N C h w"] | Int64[Tensor, " B"],
    shift: Int64[Tensor, "B 2"],
    *,
    rows: Int64[Tensor, " B"] | None = None,
    fill: float = 0.0,
    moved: bool = False,
) -> Shaped[Tensor, "B C h w"]:
    """The pixels of images under mask, moved by shift (x, y) pixels, on backgrounds: C of D3SSL's eq. 8.

    The mask lies on the images and moves with them; with `moved=True` it lies on the result already. `backgrounds` are
    images, row for row or those that `rows` names, or rows of `images` themselves, as `block_derangement` gives them;
    row -1 is `fill`. What is moved out of the view is lost. Any number type; no gradient flows through.

    >>> image, mask = torch.ones(1, 3, 2, 4), torch.tensor([[[True, False, False, False], [False] * 4]])
    >>> paste(image, mask, torch.zeros(1, 3, 2, 4), torch.tensor([[2, 1]]))[0, 0]
    tensor([[0., 0., 0., 0.],
            [0., 0., 1., 0.]])
    """
    rows, backgrounds = _check(images, mask, backgrounds, shift, rows)
    run = _on_cpu if images.device.type == "cpu" else on_device
    return run(images.detach(), mask, backgrounds.detach(), rows, shift, moved, fill)


def _check(
    images: Tensor, mask: Tensor, backgrounds: Tensor, shift: Tensor, rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    where = "paste"
    ok = isinstance(images, Tensor) and images.ndim == 4 and images.dtype != torch.bool and min(images.shape[2:]) > 0
    checks.require(ok, where, "images", "[B, C, h, w]", checks.shape_of(images))
    batch, _, h, w = images.shape
    ok = isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == (batch, h, w)
    checks.require(ok, where, "mask", f"bool [{batch}, {h}, {w}]", checks.shape_of(mask))
    ok = isinstance(shift, Tensor) and shift.dtype == torch.int64 and shift.shape == (batch, 2)
    checks.require(ok, where, "shift", f"int64 [{batch}, 2] (x, y)", checks.shape_of(shift))
    if rows is None and isinstance(backgrounds, Tensor) and backgrounds.ndim == 1:
        rows, backgrounds = backgrounds, images
    ok = isinstance(backgrounds, Tensor) and backgrounds.dtype == images.dtype
    ok = ok and backgrounds.ndim == 4 and backgrounds.shape[1:] == images.shape[1:]
    ok = ok and (rows is not None or len(backgrounds) == batch)
    expected = f"like images {list(images.shape)} {str(images.dtype)[6:]}, or rows of them"
    checks.require(ok, where, "backgrounds", expected, checks.shape_of(backgrounds))
    rows = torch.arange(batch, device=images.device) if rows is None else rows
    ok = isinstance(rows, Tensor) and rows.dtype == torch.int64 and rows.shape == (batch,)
    checks.require(ok, where, "rows", f"int64 [{batch}]", checks.shape_of(rows))
    for name, x in (("mask", mask), ("backgrounds", backgrounds), ("shift", shift), ("rows", rows)):
        checks.require(x.device == images.device, where, name, f"on {images.device}", x.device)
    if checks.values_visible(rows):
        ok = bool(((rows >= -1) & (rows < len(backgrounds))).all())
        checks.require(ok, where, "rows", f"in [-1, {len(backgrounds) - 1}]", "others")
    return rows, backgrounds


def _on_cpu(
    images: Tensor, mask: Tensor, backgrounds: Tensor, rows: Tensor, shift: Tensor, moved: bool, fill: float
) -> Tensor:  # fmt: skip
    bits = _WHOLE[images.element_size()]
    source, behind = (x.contiguous().view(bits).numpy() for x in (images, backgrounds))
    inside, which, moves = (x.contiguous().numpy() for x in (mask.view(torch.uint8), rows, shift))
    blank = torch.tensor([fill]).to(images.dtype).view(bits).numpy()[0]
    target = np.empty_like(source)  # numpy asks for huge pages, torch does not: a third less time for a large batch

    def work(first: int) -> None:
        last = min(first + _ROWS, len(source))
        paste_kernels.paste(source, inside, behind, which, moves, moved, blank, first, last, target)

    firsts = range(0, len(images), _ROWS)
    threads = min(torch.get_num_threads(), len(firsts), images.nbytes // _PER_THREAD)
    if threads > 1:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, firsts))  # the list raises what a thread raised
    else:
        for first in firsts:
            work(first)
    return torch.from_numpy(target).view(images.dtype)


def on_device(
    images: Tensor, mask: Tensor, backgrounds: Tensor, rows: Tensor, shift: Tensor, moved: bool, fill: float
) -> Tensor:  # fmt: skip
    """The same in torch, on any device."""
    (batch, channels, h, w), device = images.shape, images.device
    x = torch.arange(w, device=device) - shift[:, :1]  # [B, w]: where each column comes from
    y = torch.arange(h, device=device) - shift[:, 1:]
    inside = ((y >= 0) & (y < h))[:, :, None] & ((x >= 0) & (x < w))[:, None, :]
    x, y = x.clamp(0, w - 1)[:, None, :], y.clamp(0, h - 1)[:, :, None]
    b, c = torch.arange(batch, device=device)[:, None, None], torch.arange(channels, device=device)[:, None, None]
    chosen = (mask if moved else mask[b, y, x]) & inside
    front = images[b[:, None], c, y[:, None], x[:, None]]
    if len(backgrounds) == 0:
        return torch.where(chosen[:, None], front, fill).to(images.dtype)
    behind = torch.where((rows < 0)[:, None, None, None], fill, backgrounds[rows.clamp(min=0)]).to(images.dtype)
    return torch.where(chosen[:, None], front, behind)


def shift_boxes(
    boxes: Float[Tensor, "B K 4"], shift: Int64[Tensor, "B 2"], size: tuple[int, int]
) -> Float[Tensor, "B K 4"]:
    """Unit boxes of views of size (h, w), moved by shift (x, y) pixels; nothing is clipped.

    >>> shift_boxes(torch.tensor([[[0.0, 0.0, 0.5, 0.5]]]), torch.tensor([[2, 1]]), (4, 8))
    tensor([[[0.2500, 0.2500, 0.7500, 0.7500]]])
    """
    where = "shift_boxes"
    checks.xyxy(boxes, where, "boxes")
    ok = isinstance(shift, Tensor) and shift.shape == (*boxes.shape[:-2], 2)
    checks.require(ok, where, "shift", f"[{len(boxes)}, 2] (x, y)", checks.shape_of(shift))
    height, width = checks.pair_of_sizes(size, where, "size")
    by = shift.repeat(1, 2) / rectangles.frame((height, width), boxes.device)
    return (boxes + by[:, None]).to(boxes.dtype)

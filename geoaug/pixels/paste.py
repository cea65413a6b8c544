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


def paste(
    images: Shaped[Tensor, "B C h w"],
    mask: Bool[Tensor, "B h w"],
    backgrounds: Shaped[Tensor, "N C h w"] | Int64[Tensor, " B"],
    shift: Int64[Tensor, "B 2"],
    *,
    rows: Int64[Tensor, " B"] | None = None,
    fill: float = 0.0,
    moved: bool = False,
    out: Shaped[Tensor, "B C h w"] | None = None,
) -> Shaped[Tensor, "B C h w"]:
    """The pixels of images under mask, moved by shift (x, y) pixels, on backgrounds: C of D3SSL's eq. 8.

    The mask lies on the images and moves with them; with `moved=True` it lies on the result already. `backgrounds` are
    images, row for row or those that `rows` names, or rows of `images` themselves, as `block_derangement` gives them;
    row -1 is `fill`. What is moved out of the view is lost. Any number type; no gradient flows through. `out`, if
    given, takes the result, like `images` in kind and contiguous: a buffer of one's own spares the cost of fresh
    memory, and it may be `images` or `backgrounds` themselves.

    >>> image, mask = torch.ones(1, 3, 2, 4), torch.tensor([[[True, False, False, False], [False] * 4]])
    >>> paste(image, mask, torch.zeros(1, 3, 2, 4), torch.tensor([[2, 1]]))[0, 0]
    tensor([[0., 0., 0., 0.],
            [0., 0., 1., 0.]])
    """
    rows, backgrounds = _check(images, mask, backgrounds, shift, rows)
    if out is not None:
        ok = isinstance(out, Tensor) and out.shape == images.shape and out.dtype == images.dtype
        ok = ok and out.device == images.device and out.is_contiguous() and not out.requires_grad
        expected = f"contiguous {str(images.dtype)[6:]} {list(images.shape)} on {images.device} without a gradient"
        checks.require(ok, "paste", "out", expected, checks.shape_of(out))
    run = _on_cpu if images.device.type == "cpu" else on_device
    return run(images.detach(), mask, backgrounds.detach(), rows, shift, moved, fill, out)


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
    images: Tensor, mask: Tensor, backgrounds: Tensor, rows: Tensor, shift: Tensor, moved: bool, fill: float,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    images, mask, backgrounds = images.contiguous(), mask.contiguous(), backgrounds.contiguous()
    front_stays = out is not None and out.data_ptr() == images.data_ptr()
    back_stays = out is not None and not front_stays and out.data_ptr() == backgrounds.data_ptr()
    if back_stays:
        own = torch.arange(len(rows))
        back_stays = len(backgrounds) == len(images) and bool(((rows == own) | (rows < 0)).all())
    read = [mask, *([] if front_stays else [images]), *([] if back_stays else [backgrounds])]
    if out is not None and any(_overlap(out, x) for x in read):
        return out.copy_(_on_cpu(images, mask, backgrounds, rows, shift, moved, fill))  # else it would spoil them
    target = _fresh(images) if out is None else out
    blank = torch.full(images.shape[-1:], fill, dtype=torch.float64).to(images.dtype)
    places = images.data_ptr(), backgrounds.data_ptr(), blank.data_ptr(), target.data_ptr()
    inside, which, moves = mask.view(torch.uint8).numpy(), rows.contiguous().numpy(), shift.contiguous().numpy()

    def work(first: int) -> None:
        last = min(first + _ROWS, len(images))
        paste_kernels.paste(*places, tuple(images.shape[1:]), images.element_size(), inside, which, moves, moved,
                            front_stays, back_stays, first, last)  # fmt: skip

    firsts = range(0, len(images), _ROWS)
    threads = min(torch.get_num_threads(), len(firsts), images.nbytes // _PER_THREAD)
    if threads > 1:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, firsts))  # the list raises what a thread raised
    else:
        for first in firsts:
            work(first)
    return target


def _fresh(like: Tensor) -> Tensor:
    """Memory of numpy's, which asks for huge pages, as torch does not: a third less time for a large batch."""
    if like.numel() == 0:
        return torch.empty_like(like)
    return torch.from_numpy(np.empty(like.nbytes, dtype=np.uint8)).view(like.dtype).view(like.shape)


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two contiguous tensors on a CPU share memory."""
    return a.data_ptr() < b.data_ptr() + b.nbytes and b.data_ptr() < a.data_ptr() + a.nbytes


def on_device(
    images: Tensor, mask: Tensor, backgrounds: Tensor, rows: Tensor, shift: Tensor, moved: bool, fill: float,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The same in torch, on any device."""
    (batch, channels, h, w), device = images.shape, images.device
    x = torch.arange(w, device=device) - shift[:, :1]  # [B, w]: where each column comes from
    y = torch.arange(h, device=device) - shift[:, 1:]
    inside = ((y >= 0) & (y < h))[:, :, None] & ((x >= 0) & (x < w))[:, None, :]
    x, y = x.clamp(0, w - 1)[:, None, :], y.clamp(0, h - 1)[:, :, None]
    b, c = torch.arange(batch, device=device)[:, None, None], torch.arange(channels, device=device)[:, None, None]
    chosen = (mask if moved else mask[b, y, x]) & inside
    front = images[b[:, None], c, y[:, None], x[:, None]]  # a copy, so `out` may be what it is taken from
    behind = torch.full((1,), fill, dtype=torch.float64, device=device).to(images.dtype)
    if len(backgrounds) > 0:
        behind = torch.where((rows < 0)[:, None, None, None], behind, backgrounds[rows.clamp(min=0)])
    return torch.where(chosen[:, None], front, behind, out=out)


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

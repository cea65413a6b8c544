"""Pixels from a plan: `render` on a CPU is the contract, `render_batch` gives the same bytes on any device."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from ..geometry import checks
from ..geometry.plan import Plan
from .resample import VECTOR, resample, scratch_bytes

_SPLIT_ABOVE = 16  # bits of precision up to which the sums of unsplit products stay below 2^24
_MOST_TAPS = 250  # up to which the sums of low halves (8 bits each) do
_WORKSPACE = {"cpu": 1 << 28}  # bytes; other devices:
_DEVICE_WORKSPACE = 1 << 31
# torch 2.8 can multiply halves into float32; before, float32 operands are the exact way.
_WIDE_PRODUCT = "out_dtype" in (inspect.getdoc(torch.bmm) or "")


def render(image: UInt8[Tensor, "H W 3"] | UInt8[np.ndarray, "H W 3"], plan_row: Plan) -> list[UInt8[Tensor, "3 h w"]]:
    """The views of one image uint8 [H, W, 3] (CPU tensor or array) by a plan of one row; crop, resize, then mirror.

    Byte for byte torch's (torchvision's) bilinear resize of uint8 with `antialias=True`; the contract of all renderers.

    >>> plan = plan_views([ViewSpec(224), ViewSpec(96)], [[375, 500]], [7], seed=0, epoch=0)
    >>> [view.shape for view in render(torch.zeros(375, 500, 3, dtype=torch.uint8), plan)]
    [torch.Size([3, 224, 224]), torch.Size([3, 96, 96])]
    """
    ok = isinstance(plan_row, Plan) and len(plan_row) == 1
    got = f"{len(plan_row)} rows" if isinstance(plan_row, Plan) else checks.shape_of(plan_row)
    checks.require(ok, "render", "plan_row", "a Plan of one row", got)
    checks.require(plan_row.crop.device.type == "cpu", "render", "plan_row", "on the CPU", plan_row.crop.device)
    source, address = _pixels(image)
    height, width = source.shape[:2]
    size = plan_row.source_size[0].tolist()
    checks.require([height, width] == size, "render", "image", f"of the plan's source size {size}", [height, width])

    views = [torch.empty(3, h, w, dtype=torch.uint8) for h, w in plan_row.view_sizes]
    _render_into(views, address, height, width, plan_row.crop[0].tolist(), plan_row.flipped[0].tolist())
    return views


def _render_into(
    views: Sequence[Tensor], address: int, height: int, width: int, crops: list[list[int]], flips: list[bool]
) -> None:
    """Fill contiguous views [3, h, w] from the pixels at an address."""
    sizes = [(view.shape[1], view.shape[2]) for view in views]
    scratch = torch.empty(max((scratch_bytes(height, width, h, w) for h, w in sizes), default=0), dtype=torch.uint8)
    for view, (x0, y0, x1, y1), flip, (h, w) in zip(views, crops, flips, sizes, strict=True):
        memory, out = scratch.data_ptr(), view.data_ptr()
        resample(address, height, width, x0, y0, x1, y1, int(flip), memory, out, h, w, int(VECTOR))


def render_rows(
    images: Sequence[UInt8[Tensor, "_H _W 3"] | None], plan: Plan, views: Sequence[UInt8[Tensor, "B 3 _h _w"]]
) -> None:
    """Fill the rows of views [B, 3, h, w] that have an image with what `render` gives; zeros where there is None.

    For loaders, which know that images and plan fit: nothing is allocated or checked a row.
    """
    crops, flips = plan.crop.tolist(), plan.flipped.tolist()
    for row, image in enumerate(images):
        outs = [view[row] for view in views]
        if image is None:
            for out in outs:
                out.zero_()
        else:
            _render_into(outs, image.data_ptr(), image.shape[0], image.shape[1], crops[row], flips[row])


def _pixels(image: Tensor | npt.NDArray[np.uint8]) -> tuple[Tensor | npt.NDArray[np.uint8], int]:
    """The image, contiguous, and where its pixels lie."""
    of_tensor = isinstance(image, Tensor) and image.dtype == torch.uint8 and image.device.type == "cpu"
    of_array = isinstance(image, np.ndarray) and image.dtype == np.uint8
    ok = (of_tensor or of_array) and image.ndim == 3 and image.shape[2] == 3
    described = f"array {image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else checks.shape_of(image)
    described += f" on {image.device}" if isinstance(image, Tensor) else ""
    checks.require(ok, "render", "image", "uint8 [H, W, 3] on the CPU", described)
    if isinstance(image, Tensor):
        image = image.contiguous()
        return image, image.data_ptr()
    image = np.ascontiguousarray(image)
    return image, int(image.ctypes.data)


def render_batch(
    images: UInt8[Tensor, "B 3 H W"], plan: Plan, *, fp16: bool = False, chunk: int | None = None
) -> list[UInt8[Tensor, "B 3 h w"]]:
    """All views of images uint8 [B, 3, H, W], padded at the bottom and right, on their device: the bytes of `render`.

    Two batched matrix products a view, with the integer weights of the CPU kernel as operands that every multiplier
    holds exactly: no result depends on TF32, autocast or the order of sums. `fp16=True` is faster and within 1 level.
    `chunk` images are rendered at once; they take about 12 HW + 66 Hw + 51 hw + 8 (Ww + Hh) bytes each, and None
    chooses as many as fit 2 GiB (256 MiB on a CPU).

    >>> plan = plan_views([ViewSpec(224)], [[375, 500], [500, 333]], [7, 8], seed=0, epoch=0)
    >>> render_batch(torch.zeros(2, 3, 500, 500, dtype=torch.uint8), plan)[0].shape
    torch.Size([2, 3, 224, 224])
    """
    ok = isinstance(images, Tensor) and images.dtype == torch.uint8 and images.ndim == 4 and images.shape[1] == 3
    checks.require(ok, "render_batch", "images", "uint8 [B, 3, H, W]", checks.shape_of(images))
    rows, _, height, width = images.shape
    checks.require(isinstance(plan, Plan), "render_batch", "plan", "a Plan", checks.shape_of(plan))
    checks.require(len(plan) == rows, "render_batch", "plan", f"of one row per image, {rows}", len(plan))
    same = plan.crop.device == images.device
    checks.require(same, "render_batch", "plan", f"on the images' device, {images.device}", plan.crop.device)
    if checks.values_visible(plan.crop):
        room = torch.tensor((height, width), device=images.device)
        fits = bool((plan.source_size <= room).all())
        checks.require(fits, "render_batch", "images", "at least as large as the plan's sources", [height, width])
    if chunk is not None:
        chunk = checks.index(chunk, 1, 2**31, "render_batch", "chunk")

    views = [torch.empty(rows, 3, *size, dtype=torch.uint8, device=images.device) for size in plan.view_sizes]
    workspace = _WORKSPACE.get(images.device.type, _DEVICE_WORKSPACE)
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        for v, (view, (h, w)) in enumerate(zip(views, plan.view_sizes, strict=True)):
            each = 12 * height * width + 66 * height * w + 51 * h * w + 8 * (width * w + height * h)
            step = chunk or max(1, workspace // each)
            for start in range(0, rows, step):
                part = slice(start, start + step)
                crop, flipped = plan.crop[part, v].to(torch.int64), plan.flipped[part, v]
                across = _axis_weights(crop[:, 0], crop[:, 2], flipped, width, w)
                along = _axis_weights(crop[:, 1], crop[:, 3], torch.zeros_like(flipped), height, h)
                view[part] = (_fast if fp16 else _exact)(images[part], across, along)
    return views


class _Axis(NamedTuple):
    weights: Tensor  # float64 [b, n, T]
    place: Tensor  # int64 [b, n, T], in the padded image; its `side` for a tap that is none
    bits: Tensor  # int64 [b]
    side: int


def _axis_weights(low: Int64[Tensor, " b"], high: Int64[Tensor, " b"], flipped: Tensor, side: int, n: int) -> _Axis:
    """Normalised weights of one axis of crops [low, high), where they lie, and the precision they are rounded to.

    The law of `resample._weigh` in the same float64 steps: whole numbers and one division, so the same integers.
    """
    taps = min(side, -(-2 * max(side, n) // n))  # of the largest crop possible: known without asking the device
    size = (high - low)[:, None, None].to(torch.float64)
    i = torch.arange(n, device=low.device)
    i = torch.where(flipped[:, None], n - 1 - i, i)[..., None].to(torch.float64)
    centre, reach = (2 * i + 1) * size, 2 * size.clamp_min(n)
    at = torch.floor((centre - reach + n) / (2 * n)).clamp_min(0) + torch.arange(taps, device=low.device)
    triangle = (reach - ((2 * at + 1) * n - centre).abs()).clamp_min(0)
    triangle = torch.where(at < size, triangle, 0.0)
    weights = triangle / triangle.sum(-1, keepdim=True)
    powers = (1 << torch.arange(1, 23, device=low.device)).to(torch.float64)
    bits = ((0.5 + weights.amax((1, 2))[:, None] * powers).floor() < 2**15).sum(-1)
    place = torch.where(triangle > 0, at.to(torch.int64) + low[:, None, None], side)
    return _Axis(weights, place, bits, side)


def _dense(values: Float[Tensor, "b n T"], place: Int64[Tensor, "b n T"], side: int, dtype: torch.dtype) -> Tensor:
    """Rows [b, n, side] with the values at their places; one column more takes those that have none."""
    padded = -(-(side + 1) // 8) * 8  # rows start where tensor cores like them to
    rows = values.new_zeros(*values.shape[:2], padded, dtype=dtype)
    return rows.scatter_(2, place, values.to(dtype))[..., :side]


def _product(a: Float[Tensor, "b m k"], b: Float[Tensor, "b k n"]) -> Float[Tensor, "b m n"]:
    """Batched product in float32 sums and results, or in float64."""
    if a.dtype in (torch.float16, torch.bfloat16):
        product: Tensor = torch.bmm(a, b, out_dtype=torch.float32)
        return product
    return torch.bmm(a, b)


def _round_product(data: UInt8[Tensor, "b m k"], axis: _Axis) -> UInt8[Tensor, "b n m"]:
    """floor((weights x data^T + half) / 2^bits): exact, since every partial sum is a whole number the type holds."""
    weights, place, bits, side = axis
    n = weights.shape[1]
    whole = (weights * (1 << bits)[:, None, None] + 0.5).floor()
    on_cpu = data.device.type == "cpu"
    if weights.shape[2] > _MOST_TAPS:
        split, dtype = False, torch.float64
    else:
        split = not on_cpu or bool((bits > _SPLIT_ABOVE).any())
        dtype = torch.bfloat16 if data.is_cuda and _WIDE_PRODUCT else torch.float32
    if split:  # both halves and the pixels have 8 bits: exact in bfloat16, TF32 and float32 alike
        high = (whole / 256).floor()
        whole, place = torch.cat((high, whole - 256 * high), dim=1), place.repeat(1, 2, 1)
    sums = _product(_dense(whole, place, side, dtype), data.to(dtype).mT)
    total = sums[:, :n].to(torch.int32)
    if split:
        total.mul_(256).add_(sums[:, n:].to(torch.int32))
    shift = bits.to(torch.int32)[:, None, None]
    return total.add_(1 << (shift - 1)).bitwise_right_shift_(shift).to(torch.uint8)


def _exact(images: UInt8[Tensor, "b 3 H W"], across: _Axis, along: _Axis) -> UInt8[Tensor, "b 3 h w"]:
    b, _, height, width = images.shape
    rows = _round_product(images.reshape(b, 3 * height, width), across)  # [b, w, 3 * H]
    w, h = rows.shape[1], along.weights.shape[1]
    columns = _round_product(rows.reshape(b, 3 * w, height), along)  # [b, h, w * 3]
    return columns.reshape(b, h, w, 3).permute(0, 3, 1, 2)


def _fast(images: UInt8[Tensor, "b 3 H W"], across: _Axis, along: _Axis) -> UInt8[Tensor, "b 3 h w"]:
    """Weights and unrounded rows in half precision, sums in float32; a CPU multiplies the same halves as float32."""
    b, _, height, width = images.shape
    dtype = torch.float16 if images.is_cuda and _WIDE_PRODUCT else torch.float32
    by_x, by_y = (_dense(weights.half(), place, side, dtype) for weights, place, _, side in (across, along))
    w, h = by_x.shape[1], by_y.shape[1]
    rows = _product(by_x, images.reshape(b, 3 * height, width).to(dtype).mT)
    columns = _product(by_y, rows.half().to(dtype).reshape(b, w * 3, height).mT)
    levels = (columns + 0.5).clamp_(0, 255).to(torch.uint8)
    return levels.reshape(b, h, w, 3).permute(0, 3, 1, 2)

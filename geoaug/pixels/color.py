"""Colour: what each sample gets by a recipe (`ColorTable`), and the pixels.

As with geometry, numbers are drawn before pixels are touched. A sample's colour depends on its key alone, and its
pixels have the same bits in whatever batch, row or rank they are computed. The order is BYOL's and MoCo v2's: jitter,
gray, blur, solarize, normalise. On a CPU a numba kernel does it all (`color_kernels.py`), elsewhere torch does
(`color_ops.py`); the two agree within 1e-5 in [0, 1].
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64, UInt8
from torch import Tensor

from ..geometry import checks
from ..geometry.rng import Key
from . import color_kernels, color_ops
from .color_spec import BYOL_1, BYOL_2, MOCO_V2, PICIE, ColorSpec

__all__ = ["BYOL_1", "BYOL_2", "MOCO_V2", "PICIE", "ColorSpec", "ColorTable", "color", "draw_colors", "paint"]

_PER_THREAD = 2**20  # values below which a thread more costs what it saves
_ROWS = 4  # samples a thread takes at a time: enough to hide the call, few enough to share blurred rows out evenly


@dataclass(frozen=True, eq=False)
class ColorTable:
    """What each sample gets, drawn by `draw_colors` or made by hand; an operator left out has its neutral value.

    >>> draw_colors(ColorSpec.BYOL_1, Key(0, 0, [7, 8, 9])).sigma.shape
    torch.Size([3])
    """

    factors: Float32[Tensor, "B 4"]  # of brightness, contrast, saturation (neutral 1) and the hue's turn (neutral 0)
    order: Int64[Tensor, "B 4"]  # which of these four comes first, second, third, last
    gray: Bool[Tensor, " B"]
    sigma: Float32[Tensor, " B"]  # 0: not blurred
    solarize: Bool[Tensor, " B"]

    def __post_init__(self) -> None:
        B = len(self.factors) if isinstance(self.factors, Tensor) and self.factors.ndim else 0
        for name, x, dtype, expected in (
            ("factors", self.factors, torch.float32, "float32 [B, 4]"),
            ("order", self.order, torch.int64, "int64 [B, 4]"),
            ("gray", self.gray, torch.bool, "bool [B]"),
            ("sigma", self.sigma, torch.float32, "float32 [B]"),
            ("solarize", self.solarize, torch.bool, "bool [B]"),
        ):
            ok = isinstance(x, Tensor) and x.dtype == dtype and x.shape == ((B, 4) if expected.endswith("4]") else (B,))
            if not ok:
                checks.require(ok, "ColorTable", name, expected, checks.shape_of(x))
        if checks.values_visible(self.factors):
            factors, order, sigma = (x.detach().cpu().numpy() for x in (self.factors, self.order, self.sigma))
            ok = bool(((factors[:, :3] >= 0) & np.isfinite(factors[:, :3])).all())
            ok = ok and bool((np.abs(factors[:, 3]) <= 0.5).all())
            checks.require(
                ok, "ColorTable", "factors", "three of at least 0 and a turn in [-0.5, 0.5]", "values outside"
            )
            ok = bool((np.sort(order, axis=1) == np.arange(4)).all())
            checks.require(ok, "ColorTable", "order", "0, 1, 2, 3 in some order", "rows that are not")
            ok = bool(((sigma >= 0) & np.isfinite(sigma)).all())
            checks.require(ok, "ColorTable", "sigma", "finite and at least 0", "values outside")

    @property
    def columns(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The fields, in their order above."""
        return self.factors, self.order, self.gray, self.sigma, self.solarize

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> ColorTable:
        """The same table on another device."""
        if self.factors.device == torch.device(device):
            return self
        return ColorTable(*(x.to(device, non_blocking=non_blocking) for x in self.columns))

    def __len__(self) -> int:
        return len(self.factors)


def draw_colors(spec: ColorSpec, key: Key) -> ColorTable:
    """Draw each sample's colour, on the device of the key.

    >>> draw_colors(ColorSpec.BYOL_1, Key(0, 0, [7, 8, 9])).factors.shape
    torch.Size([3, 4])
    """
    u = key.uniform("color", 16)  # one stream, because each is some 140 launches on a device that draws it
    # Every operation below is exactly rounded, so that a number's bits never depend on its place in a vector.
    jittered = (u[:, :4] if spec.each else u[:, :1].expand(-1, 4)) < spec.jitter
    strengths = (spec.brightness, spec.contrast, spec.saturation)
    least = [max(0.0, 1.0 - x) for x in strengths]
    span = [1.0 + x - low for x, low in zip(strengths, least, strict=True)]
    drawn = u[:, 4:7] * checks.on_device(span, u) + checks.on_device(least, u)
    blends = torch.where(jittered[:, :3], drawn, 1.0)
    turn = torch.where(jittered[:, 3:], (u[:, 7:8] * 2.0 - 1.0) * spec.hue, 0.0)
    order = torch.argsort(u[:, 8:12], dim=1, stable=True)
    if spec.order == "fixed":
        order = torch.arange(4, device=u.device).repeat(len(key), 1)
    low, high = spec.sigma
    sigma = (u[:, 14] * (high - low) + low).abs()
    return ColorTable(
        factors=torch.cat((blends, turn), dim=1),
        order=order,
        gray=u[:, 12] < spec.gray,
        sigma=torch.where(u[:, 13] < spec.blur, sigma, 0.0),
        solarize=u[:, 15] < spec.solarize,
    )


def color(
    images: UInt8[Tensor, "B 3 h w"] | Float[Tensor, "B 3 h w"], spec: ColorSpec, key: Key
) -> Float32[Tensor, "B 3 h w"]:
    """Colour views, uint8 or floats in [0, 1], by a recipe, each by its own draw; no gradient flows through.

    Give every call of a step its own fold. A key on the CPU, or one sent from there, draws on the host, which is the
    cheapest for images on any device.

    >>> views = torch.zeros(2, 3, 224, 224, dtype=torch.uint8)
    >>> color(views, ColorSpec.BYOL_1, Key(0, 0, [7, 8]).fold("x1")).shape
    torch.Size([2, 3, 224, 224])
    """
    _check(images, spec, "color")
    checks.require(isinstance(key, Key), "color", "key", "a Key", checks.shape_of(key))
    checks.require(len(key) == len(images), "color", "key", f"of the {len(images)} images", f"one of {len(key)} ids")
    return _paint(images.detach(), spec, draw_colors(spec, key.host))


def paint(
    images: UInt8[Tensor, "B 3 h w"] | Float[Tensor, "B 3 h w"], spec: ColorSpec, table: ColorTable
) -> Float32[Tensor, "B 3 h w"]:
    """Colour views by a table drawn before, or made by hand; the spec gives kernel, threshold, mean and std.

    >>> views = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    >>> paint(views, ColorSpec(), draw_colors(ColorSpec(), Key(0, 0, [7, 8]))).shape
    torch.Size([2, 3, 8, 8])
    """
    _check(images, spec, "paint")
    rows = f"of the {len(images)} images"
    checks.require(isinstance(table, ColorTable), "paint", "table", "a ColorTable", checks.shape_of(table))
    checks.require(len(table) == len(images), "paint", "table", rows, f"one of {len(table)} rows")
    return _paint(images.detach(), spec, table)


def _check(images: Tensor, spec: ColorSpec, where: str) -> None:
    ok = isinstance(images, Tensor) and images.ndim == 4 and images.shape[1] == 3 and min(images.shape[2:]) > 0
    ok = ok and (images.dtype == torch.uint8 or images.is_floating_point())
    expected = "uint8 [B, 3, h, w], or floating in [0, 1]"
    checks.require(ok, where, "images", expected, checks.shape_of(images))
    if images.is_floating_point() and checks.values_visible(images) and images.numel():
        low, high = torch.aminmax(images)  # NaN if there is any, which no comparison passes
        checks.require(bool(low >= 0) and bool(high <= 1), where, "images", expected, "values outside, or NaN")
    checks.require(isinstance(spec, ColorSpec), where, "spec", "a ColorSpec", checks.shape_of(spec))


def _paint(images: Tensor, spec: ColorSpec, table: ColorTable) -> Tensor:
    radius = spec.radius(*images.shape[2:]) if images.numel() else 0
    mean, std = spec.channels("mean"), spec.channels("std")
    if images.device.type == "cpu":
        columns = table.to("cpu").columns
        return _paint_cpu(images, *columns, radius=radius, threshold=spec.threshold, mean=mean, std=std)
    rows = color_ops.rows_of(*table.columns, radius=radius, mean=mean, std=std)
    if rows.device != images.device:
        rows = checks.sent(rows, images.device) if rows.device.type == "cpu" else rows.to(images.device)
    return color_ops.paint(images, rows, radius=radius, threshold=spec.threshold)


def _paint_cpu(
    images: Tensor, *columns: Tensor, radius: int, threshold: float, mean: tuple[float, ...], std: tuple[float, ...]
) -> Tensor:
    """The numba kernel, its rows shared out to as many threads as torch has; numba's own do not survive a fork."""
    scale = np.float32(255 if images.dtype == torch.uint8 else 1)
    source = (images if images.dtype == torch.uint8 else images.to(torch.float32)).contiguous().numpy()
    out = torch.empty(images.shape, dtype=torch.float32)
    target = out.numpy()
    arrays = [x.contiguous().numpy() for x in columns]
    centre, spread = np.array(mean, np.float32), np.array(std, np.float32)

    def work(first: int) -> None:
        rows = slice(first, first + _ROWS)
        part = (array[rows] for array in arrays)
        color_kernels.paint(source[rows], scale, *part, radius, np.float32(threshold), centre, spread, target[rows])

    firsts = range(0, len(images), _ROWS)
    threads = min(torch.get_num_threads(), len(firsts), images.numel() // _PER_THREAD)
    if threads > 1:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, firsts))  # the list raises what a thread raised
    else:
        for first in firsts:
            work(first)
    return out

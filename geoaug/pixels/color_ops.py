"""The colour operators as batched torch, for devices: every sample's own factors, no look at a value, no branch on one.

An operator that a sample does without is given its neutral factor or masked out. Sums that decide a sample's bits are
either whole numbers (the contrast's mean) or taken tap by tap for each pixel (the blur), so they do not depend on the
batch. Torchvision's formulas throughout; the hue's hexagon is in closed form.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor
from torch.nn import functional

from ..geometry import checks
from .color_kernels import CONTRAST, FIXED, HUE, SATURATION

_PIXELS = 2**22  # of a chunk: 83 views of 224, some 50 MB a buffer, so that a large batch needs little memory
_FIXED = float(FIXED)


def rows_of(
    factors: Float32[Tensor, "B 4"],
    order: Int64[Tensor, "B 4"],
    gray: Bool[Tensor, " B"],
    sigma: Float32[Tensor, " B"],
    solarize: Bool[Tensor, " B"],
    *,
    radius: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Float32[Tensor, "B numbers"]:
    """All that the operators need of a colour table, one row a sample, made where the table is and sent as one tensor.

    The hue costs most, so all samples turn theirs at once: three blends may come before it and three after it, and each
    sample leaves those that are not its own neutral. Columns: six blends' factors, their shares of the mean gray and of
    the pixel's gray, the turn, gray, blur, solarize, mean, std, and the blur's taps.
    """
    at = torch.arange(4, device=order.device)
    hue = (order == HUE).to(torch.int64).argmax(dim=1, keepdim=True)
    mine = torch.cat((hue > at[:3], hue < at[1:]), dim=1)  # [B, 6]
    ops = torch.cat((order[:, :3], order[:, 1:]), dim=1)
    blends = torch.where(mine, factors.gather(1, ops), 1.0)
    rest = 1.0 - blends
    contrast, saturation = (torch.where(ops == op, rest, 0.0) for op in (CONTRAST, SATURATION))
    flags = torch.stack((factors[:, HUE], gray, sigma > 0, solarize), dim=1)
    numbers = checks.on_device((*mean, *std), blends).expand(len(order), 6)
    return torch.cat((blends, contrast, saturation, flags, numbers, _taps(sigma, radius)), dim=1)


def _taps(sigma: Float32[Tensor, " B"], radius: int) -> Float32[Tensor, "B taps"]:
    """The Gaussians' weights [B, 2 radius + 1], in float64 and added in a fixed order: the same bits in any batch."""
    distance = torch.arange(-radius, radius + 1, device=sigma.device, dtype=torch.float64)
    taps = torch.exp(-0.5 * (distance / sigma.double().clamp_min(1e-3)[:, None]).square())
    total = taps[:, 0]
    for i in range(1, 2 * radius + 1):
        total = total + taps[:, i]
    return (taps / total[:, None]).float()


def paint(
    images: Tensor, rows: Float32[Tensor, "B numbers"], *, radius: int, threshold: float
) -> Float32[Tensor, "B 3 h w"]:
    """All operators on images [B, 3, h, w] of their device, normalised, by rows that `rows_of` made for the radius."""
    out = torch.empty(images.shape, dtype=torch.float32, device=images.device)
    step = max(1, _PIXELS // max(1, images.shape[2] * images.shape[3]))
    for first in range(0, len(images), step):
        part = slice(first, first + step)
        x = images[part].to(torch.float32)
        if images.dtype == torch.uint8:
            x = x / checks.on_device((255.0,), x)  # a tensor: CUDA makes a number a product with its inverse
        blends, flags, centre, spread, taps = rows[part].split((18, 4, 3, 3, rows.shape[1] - 28), dim=1)
        blend = blends[..., None, None, None].unbind(dim=1)  # 18 of [B, 1, 1, 1]
        turn, gray, blurred, solarize = flags[..., None, None, None].unbind(dim=1)
        for i in range(3):
            x = _blend(x, *blend[i::6])
        x = _turn_hue(x, turn)
        for i in range(3, 6):
            x = _blend(x, *blend[i::6])
        x = torch.where(gray > 0, gray_of(x), x)
        if radius > 0:
            x = torch.where(blurred > 0, blur(x, taps), x)
        x = torch.where((solarize > 0) & (x >= threshold), 1.0 - x, x)
        torch.div(x - centre[..., None, None], spread[..., None, None], out=out[part])
    return out


def gray_of(x: Float32[Tensor, "B 3 h w"]) -> Float32[Tensor, "B 1 h w"]:
    """Torchvision's gray."""
    r, g, b = x[:, 0:1], x[:, 1:2], x[:, 2:3]
    return (r * 0.2989).add_(g, alpha=0.587).add_(b, alpha=0.114)


def _blend(x: Tensor, factor: Tensor, contrast: Tensor, saturation: Tensor) -> Tensor:
    """x * factor + target * (1 - factor) in [0, 1]: target black, the mean gray, or each pixel's gray."""
    gray = gray_of(x)
    total = (gray * _FIXED + 0.5).to(torch.int32).sum((1, 2, 3), True, dtype=torch.int64)
    mean = total / (_FIXED * gray.shape[2] * gray.shape[3])
    shift = torch.addcmul(contrast * mean, gray, saturation)
    return torch.addcmul(shift, x, factor).clamp_(0.0, 1.0)


def _turn_hue(x: Tensor, shift: Tensor) -> Tensor:
    """HSV's hue turned by a share of the circle: a channel is `high` where it leads, `span` lower where it trails."""
    r, g, b = x[:, 0:1], x[:, 1:2], x[:, 2:3]
    low, high = torch.aminmax(x, dim=1, keepdim=True)
    span = high - low
    first, second = high == r, high == g
    step = torch.where(first, g - b, torch.where(second, b - r, r - g))
    base = torch.where(first, 0.0, torch.where(second, 2.0, 4.0))
    k = base + shift * 6.0 + step / torch.where(span > 0, span, 1.0)
    ahead = torch.cat([k + 5.0, k + 3.0, k + 1.0], dim=1).remainder_(6.0)  # sextants of red, green and blue
    lag = torch.minimum(ahead, 4.0 - ahead).clamp_(0.0, 1.0)
    turned = torch.addcmul(high, span, lag, value=-1.0)
    return torch.where(shift == 0, x, turned)


def blur(x: Float32[Tensor, "B 3 h w"], taps: Float32[Tensor, "B taps"]) -> Float32[Tensor, "B 3 h w"]:
    """Each sample by its own taps, first down the columns, then along the rows; borders reflect.

    A depthwise convolution with the samples as channels. Torch's own kernel sums tap by tap for each pixel, whatever
    the batch; cuDNN's may neither do so nor keep float32, so it is left out.
    """
    (B, C, h, w), r = x.shape, taps.shape[1] // 2
    weight = taps.repeat_interleave(C, dim=0)[:, None, None]
    with torch.backends.cudnn.flags(enabled=False):
        y = functional.pad(x, (r, r, r, r), mode="reflect").view(1, B * C, h + 2 * r, -1)
        y = functional.conv2d(y, weight.mT, groups=B * C)
        return functional.conv2d(y, weight, groups=B * C).view(B, C, h, w)

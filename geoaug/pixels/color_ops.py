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

from .color_kernels import CONTRAST, FIXED, HUE, SATURATION

_PIXELS = 2**22  # of a chunk: 83 views of 224, some 50 MB a buffer, so that a large batch needs little memory
_FIXED = float(FIXED)


def paint(
    images: Tensor,
    factors: Float32[Tensor, "B 4"],
    order: Int64[Tensor, "B 4"],
    gray: Bool[Tensor, " B"],
    sigma: Float32[Tensor, " B"],
    solarize: Bool[Tensor, " B"],
    *,
    radius: int,
    threshold: float,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Float32[Tensor, "B 3 h w"]:
    """All operators, the columns of a colour table, on images [B, 3, h, w] of their device, normalised."""
    out = torch.empty(images.shape, dtype=torch.float32, device=images.device)
    scale, centre, spread = (constants(values, images.device)[:, None, None] for values in ((255.0,), mean, std))
    step = max(1, _PIXELS // max(1, images.shape[2] * images.shape[3]))
    for first in range(0, len(images), step):
        rows = slice(first, first + step)
        x = images[rows].to(torch.float32)
        if images.dtype == torch.uint8:
            x = x / scale  # by a tensor: CUDA would turn a number into a product with its inverse
        x = jitter(x, factors[rows], order[rows])
        x = torch.where(gray[rows, None, None, None], gray_of(x), x)
        if radius > 0:
            x = blur(x, sigma[rows], radius)
        x = torch.where(solarize[rows, None, None, None] & (x >= threshold), 1.0 - x, x)
        out[rows] = (x - centre) / spread
    return out


def constants(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Numbers on a device, filled in there: a copy from the host would make it wait."""
    return torch.cat([torch.full((1,), value, dtype=torch.float32, device=device) for value in values])


def gray_of(x: Float32[Tensor, "B 3 h w"]) -> Float32[Tensor, "B 1 h w"]:
    """Torchvision's gray."""
    r, g, b = x[:, 0:1], x[:, 1:2], x[:, 2:3]
    return (r * 0.2989).add_(g, alpha=0.587).add_(b, alpha=0.114)


def jitter(
    x: Float32[Tensor, "B 3 h w"], factors: Float32[Tensor, "B 4"], order: Int64[Tensor, "B 4"]
) -> Float32[Tensor, "B 3 h w"]:
    """Brightness, contrast, saturation and hue in each sample's order.

    The hue costs most, so all samples turn theirs at once: three blends may come before it and three after it, and each
    sample leaves those that are not its own neutral.
    """
    turn = (order == HUE).to(torch.int64).argmax(dim=1)
    for i in range(3):
        x = _blend(x, factors, order[:, i], turn > i)
    x = _turn_hue(x, factors[:, HUE])
    for i in range(1, 4):
        x = _blend(x, factors, order[:, i], turn < i)
    return x


def _blend(x: Tensor, factors: Tensor, op: Tensor, mine: Tensor) -> Tensor:
    """x * factor + target * (1 - factor) in [0, 1]: target black, the mean gray, or each pixel's gray."""
    factor = torch.where(mine, factors.gather(1, op[:, None])[:, 0], 1.0)[:, None, None, None]
    op, rest = op[:, None, None, None], 1.0 - factor
    gray = gray_of(x)
    total = (gray * _FIXED + 0.5).to(torch.int32).sum((1, 2, 3), True, dtype=torch.int64)
    mean = total.to(torch.float32) / _FIXED / float(gray.shape[2] * gray.shape[3])
    flat = torch.where(op == CONTRAST, rest * mean, 0.0)
    shift = torch.addcmul(flat, gray, torch.where(op == SATURATION, rest, 0.0))
    return torch.addcmul(shift, x, factor).clamp_(0.0, 1.0)


def _turn_hue(x: Tensor, shift: Tensor) -> Tensor:
    """HSV's hue turned by a share of the circle: a channel is `high` where it leads, `span` lower where it trails."""
    r, g, b = x[:, 0:1], x[:, 1:2], x[:, 2:3]
    low, high = torch.aminmax(x, dim=1, keepdim=True)
    span = high - low
    first, second = high == r, high == g
    step = torch.where(first, g - b, torch.where(second, b - r, r - g))
    base = torch.where(first, 0.0, torch.where(second, 2.0, 4.0))
    k = base + shift[:, None, None, None] * 6.0 + step / torch.where(span > 0, span, 1.0)
    ahead = torch.cat([k + 5.0, k + 3.0, k + 1.0], dim=1).remainder_(6.0)  # sextants of red, green and blue
    lag = torch.minimum(ahead, 4.0 - ahead).clamp_(0.0, 1.0)
    turned = torch.addcmul(high, span, lag, value=-1.0)
    return torch.where(shift[:, None, None, None] == 0, x, turned)


def blur(x: Float32[Tensor, "B 3 h w"], sigma: Float32[Tensor, " B"], radius: int) -> Float32[Tensor, "B 3 h w"]:
    """A Gaussian of each sample's width (0: none), first down the columns, then along the rows; borders reflect.

    A depthwise convolution with the samples as channels. Torch's own kernel sums tap by tap for each pixel, whatever
    the batch; cuDNN's may neither do so nor keep float32, so it is left out.
    """
    B, C, h, w = x.shape
    distance = torch.arange(-radius, radius + 1, device=x.device, dtype=torch.float32)
    taps = torch.exp(-0.5 * (distance / sigma.clamp_min(1e-3)[:, None]).square())
    total = taps[:, 0]
    for i in range(1, 2 * radius + 1):  # in a fixed order
        total = total + taps[:, i]
    weight = (taps / total[:, None]).repeat_interleave(C, dim=0)
    with torch.backends.cudnn.flags(enabled=False):
        y = functional.pad(x, (radius, radius, radius, radius), mode="reflect").view(1, B * C, h + 2 * radius, -1)
        y = functional.conv2d(y, weight[:, None, :, None], groups=B * C)
        y = functional.conv2d(y, weight[:, None, None, :], groups=B * C).view(B, C, h, w)
    return torch.where(sigma[:, None, None, None] > 0, y, x)

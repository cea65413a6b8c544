"""Colour recipes: what the views of each method may look like, in numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from ..geometry import checks

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class ColorSpec:
    """One view's colour recipe; the default changes nothing but the scale: (x - mean) / std of x in [0, 1].

    Factors of brightness, contrast and saturation are uniform in [max(0, 1 - x), 1 + x], the hue's turn in [-hue, hue];
    `jitter` is the chance of all four together, or with `each=True` of every one by itself. `gray`, `blur` and
    `solarize` are chances. `mean=0, std=1` leaves the output in [0, 1].

    >>> from dataclasses import replace
    >>> replace(ColorSpec.BYOL_2, mean=0.0, std=1.0).mean
    (0.0, 0.0, 0.0)
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    jitter: float = 1.0
    each: bool = False
    order: Literal["random", "fixed"] = "random"  # fixed: brightness, contrast, saturation, hue
    gray: float = 0.0
    blur: float = 0.0
    sigma: tuple[float, float] = (0.1, 2.0)  # of the Gaussian, in pixels; uniform, and a negative draw is its absolute
    kernel: int | None = None  # odd width; None: BYOL's law, a tenth of the shorter side made odd (224: 23, 112: 11)
    solarize: float = 0.0
    threshold: float = 0.5  # from here on x becomes 1 - x; in uint8, 128
    mean: tuple[float, float, float] | float = _IMAGENET_MEAN
    std: tuple[float, float, float] | float = _IMAGENET_STD

    BYOL_1: ClassVar[ColorSpec]
    BYOL_2: ClassVar[ColorSpec]
    MOCO_V2: ClassVar[ColorSpec]
    PICIE: ClassVar[ColorSpec]

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            _number(getattr(self, name), 0.0, math.inf, name, "a finite number of at least 0")
        _number(self.hue, 0.0, 0.5, "hue", "in [0, 0.5]")
        for name in ("jitter", "gray", "blur", "solarize"):
            _number(getattr(self, name), 0.0, 1.0, name, "a chance in [0, 1]")
        _number(self.threshold, 0.0, 1.0, "threshold", "in [0, 1]")
        checks.require(self.order in ("random", "fixed"), "ColorSpec", "order", "'random' or 'fixed'", repr(self.order))
        pair = isinstance(self.sigma, tuple) and len(self.sigma) == 2
        ordered = pair and -math.inf < self.sigma[0] <= self.sigma[1] < math.inf
        checks.require(ordered, "ColorSpec", "sigma", "a finite pair (low, high) with low <= high", self.sigma)
        if self.kernel is not None:
            width = checks.index(self.kernel, 1, 2**16, "ColorSpec", "kernel")
            checks.require(width % 2 == 1, "ColorSpec", "kernel", "odd, or None for a tenth of the shorter side", width)
        for name in ("mean", "std"):
            value = getattr(self, name)
            three = (value,) * 3 if isinstance(value, int | float) else value
            ok = isinstance(three, tuple) and len(three) == 3 and all(math.isfinite(v) for v in three)
            checks.require(ok, "ColorSpec", name, "a finite number, or one for each of R, G, B", value)
            object.__setattr__(self, name, tuple(float(v) for v in three))
        positive = min(self.channels("std")) > 0
        checks.require(positive, "ColorSpec", "std", "positive", self.std)

    def channels(self, name: Literal["mean", "std"]) -> tuple[float, ...]:
        """`mean` or `std` as one number for each of R, G, B."""
        value = self.mean if name == "mean" else self.std
        return value if isinstance(value, tuple) else (value,) * 3

    def radius(self, height: int, width: int) -> int:
        """The blur's reach in pixels on a view of this size: `kernel` is 2 * radius + 1.

        >>> ColorSpec.BYOL_1.radius(224, 224), ColorSpec.BYOL_1.radius(112, 112)
        (11, 5)
        """
        short = min(height, width)
        reach = short // 20 if self.kernel is None else self.kernel // 2
        # The border is a reflection that does not repeat the edge, as torchvision's: one side reaches side - 1 pixels.
        fits = "narrower than twice the view's shorter side"
        checks.require(reach < short, "ColorSpec.radius", "kernel", fits, f"{2 * reach + 1} on {(height, width)}")
        return reach


def _number(value: float, low: float, high: float, name: str, expected: str) -> None:
    ok = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    checks.require(ok and low <= value <= high, "ColorSpec", name, expected, repr(value))


ColorSpec.BYOL_1 = ColorSpec(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, jitter=0.8, gray=0.2, blur=1.0)
ColorSpec.BYOL_2 = ColorSpec(
    brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, jitter=0.8, gray=0.2, blur=0.1, solarize=0.2
)
ColorSpec.MOCO_V2 = ColorSpec(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, jitter=0.8, gray=0.2, blur=0.5)
# PiCIE's public code asks for sigma in (.1, 2), but computes it from the very coin that fell under p, which gives
# U(-1.8, .1), and Pillow blurs by the absolute value: what was rendered is |U(-1.8, .1)|. Its order is always the same.
ColorSpec.PICIE = ColorSpec(
    brightness=0.3, contrast=0.3, saturation=0.3, hue=0.1, jitter=0.8, each=True, order="fixed", gray=0.2, blur=0.5,
    sigma=(-1.8, 0.1),
)  # fmt: skip
BYOL_1, BYOL_2, MOCO_V2, PICIE = ColorSpec.BYOL_1, ColorSpec.BYOL_2, ColorSpec.MOCO_V2, ColorSpec.PICIE

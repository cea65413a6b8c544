"""Selective search (Uijlings et al. 2013): boxes of the regions met while an over-segmentation is merged."""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ..geometry import checks
from . import compat, merging, other_engines, region_features, uijlings
from .blurring import gaussian
from .shrinking import shrink, shrunk_size

Boxes = npt.NDArray[np.uint16]
Image = npt.NDArray[np.uint8]
_WHERE = "selective_search"
_LONGEST = 65535  # a box is uint16
_memory = threading.local()  # spare memory of each thread: fresh pages for every image would double the time


def selective_search(
    image: Image | Tensor,
    *,
    scale: float = 300,
    sigma: float = 0.9,
    min_size: int = 100,
    mode: str = "compat",
    engine: str = "geoaug",
    texture: str = "package",
    strategies: str = "fast",
    max_side: int = 1024,
) -> Boxes:
    """Boxes uint16 [n, 4] (xyxy source pixels, exclusive edges) of an image uint8 [H, W, 3] or [H, W].

    `mode="compat"` gives the regions of the PyPI package `selectivesearch` 0.4 in its order, duplicates included: its
    rect is (x0, y0, x1 - 1 - x0, y1 - 1 - y0). `texture="soco"` bins the local binary patterns over 0 to 255, as SoCo
    does. `mode="strategies"` is the method of the paper over several colours, similarities and scales, `"single"`,
    `"fast"` or `"quality"`: distinct boxes, the most promising first. An image longer than `max_side` is shrunk to it
    by area means (the scale and sizes then count shrunk pixels), and its boxes are mapped back, rounded outwards.

    >>> boxes = selective_search(np.zeros((40, 60, 3), np.uint8))
    >>> boxes.tolist()
    [[0, 0, 60, 40]]
    """
    source = _checked(image)
    _one_of(mode, ("compat", "strategies"), "mode")
    _one_of(engine, ("geoaug", "selectivesearch", "opencv"), "engine")
    _one_of(texture, ("package", "soco"), "texture")
    _one_of(strategies, ("single", "fast", "quality"), "strategies")
    _number(scale, 1e-6, 1e9, "scale")
    _number(sigma, 0.0, 100.0, "sigma")
    checks.index(min_size, 0, 2**31 - 1, _WHERE, "min_size")
    checks.index(max_side, 1, 8192, _WHERE, "max_side")
    height, width, _ = source.shape
    size = shrunk_size(height, width, max_side)
    pixels = source
    if size != (height, width):
        pixels = np.empty((*size, 3), np.uint8)
        shrink(source, pixels)
    if engine == "selectivesearch":
        checks.require(mode == "compat", _WHERE, "mode", "'compat' for engine='selectivesearch'", repr(mode))
        checks.require(texture == "package", _WHERE, "texture", "'package' for engine='selectivesearch'", repr(texture))
        boxes = other_engines.selectivesearch_boxes(pixels, scale, sigma, min_size)
    elif engine == "opencv":
        checks.require(mode == "strategies", _WHERE, "mode", "'strategies' for engine='opencv'", repr(mode))
        boxes = other_engines.opencv_boxes(pixels, scale, sigma, min_size, strategies)
    elif mode == "strategies":
        boxes = _strategies(pixels, scale, sigma, min_size, strategies)
    else:
        boxes = _compat(pixels, scale, sigma, min_size, texture)
    return _back(boxes, size, (height, width))


def _one_of(value: Any, names: tuple[str, ...], argument: str) -> None:
    checks.require(isinstance(value, str) and value in names, _WHERE, argument, f"one of {names}", repr(value))


def _number(value: Any, low: float, high: float, argument: str) -> None:
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    checks.require(ok and low <= value <= high, _WHERE, argument, f"a number in [{low:g}, {high:g}]", repr(value))


def _checked(image: Any) -> Image:
    """The pixels as contiguous uint8 [H, W, 3]; a gray image three times over."""
    expected = "uint8 [H, W, 3] or [H, W] on the CPU with 1 to 65535 pixels a side"
    ok = isinstance(image, (np.ndarray, Tensor)) and str(image.dtype).endswith("uint8")
    ok = ok and (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3))
    ok = ok and all(1 <= side <= _LONGEST for side in image.shape) and str(getattr(image, "device", "cpu")) == "cpu"
    got = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else checks.shape_of(image)
    checks.require(ok, _WHERE, "image", expected, got)
    pixels: Image = image.numpy() if isinstance(image, Tensor) else image
    pixels = pixels if pixels.ndim == 3 else np.repeat(pixels[:, :, None], 3, axis=2)
    return np.require(pixels, requirements=["C", "W"])  # numba would compile anew for arrays that are read-only


def spare(floats: int, whole: int, small: int) -> tuple[npt.NDArray[Any], ...]:
    """Spare memory of this thread: at least so many float64, int32 and bytes, kept for later images."""
    held = getattr(_memory, "held", None)
    if held is None or any(a.size < n for a, n in zip(held, (floats, whole, small), strict=True)):
        held = np.empty(floats), np.empty(whole, np.int32), np.empty(small, np.uint8)
        _memory.held = held
    return held


def _compat(pixels: Image, scale: float, sigma: float, min_size: int, texture: str) -> Boxes:
    height, width, _ = pixels.shape
    area, kind = height * width, region_features.SOCO if texture == "soco" else region_features.PACKAGE
    memory = spare(11 * area, 12 * area, 3 * (height + 2) * (width + 2))
    boxes: Boxes = compat.compat_boxes(pixels, gaussian(sigma), scale / 255.0, min_size, kind, *memory)
    fine = f"such that at most {compat.MOST_REGIONS} regions and {merging.MOST_PAIRS} pairs of neighbours are left"
    checks.require(len(boxes) > 0, _WHERE, "scale and min_size", fine, f"scale={scale}, min_size={min_size}")
    return boxes


def _strategies(pixels: Image, scale: float, sigma: float, min_size: int, strategies: str) -> Boxes:
    height, width, _ = pixels.shape
    area = height * width
    spaces, steps, terms = uijlings.STRATEGIES[strategies]
    memory = spare(11 * area, 12 * area, 6 * area)
    scales = scale / 255.0 * np.array(steps)
    boxes: Boxes = uijlings.strategy_boxes(
        pixels, gaussian(sigma), np.array(spaces), scales, np.array(terms), min_size, *memory
    )
    fine = f"such that at most {uijlings.MOST_REGIONS} regions are left"
    checks.require(len(boxes) > 0, _WHERE, "scale and min_size", fine, f"scale={scale}, min_size={min_size}")
    return boxes


def _back(boxes: Boxes, size: tuple[int, int], source: tuple[int, int]) -> Boxes:
    """Boxes of the shrunk image in source pixels: near edges rounded down, far edges up."""
    if size == source:
        return boxes
    (height, width), (tall, wide) = size, source
    x0, y0, x1, y1 = boxes.astype(np.int64).T
    edges = x0 * wide // width, y0 * tall // height, -(-x1 * wide // width), -(-y1 * tall // height)
    return np.stack(edges, axis=1).astype(np.uint16)

"""What every public function of the geometry says about bad input, in one voice."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Sequence
from dataclasses import is_dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Numbers = Tensor | npt.NDArray[np.generic] | Sequence[Any]  # what users bring: a tensor, an array, nested lists


def require(ok: bool, where: str, argument: str, expected: str, got: object) -> None:
    """Raise `where: argument must be expected, got got` unless ok."""
    if not ok:
        raise ValueError(f"{where}: {argument} must be {expected}, got {got}")


def shape_of(x: Any) -> str:
    """What came, for an error: `float32 [4, 2]` for a tensor, else its repr."""
    if isinstance(x, Tensor):
        return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
    # Asked for at every call, error or not: a key would print its ids, a list of specs each of its fields.
    if is_dataclass(x) or (isinstance(x, (list, tuple)) and len(x) > 0 and is_dataclass(x[0])):
        return type(x).__name__
    text = repr(x)
    return text if len(text) < 80 else type(x).__name__


def values_visible(x: Tensor) -> bool:
    """Whether looking at values is free of a device synchronisation, or asked for by GEOAUG_CHECK=1."""
    if x.device.type == "meta" or torch.compiler.is_compiling():
        return False
    return x.device.type == "cpu" or os.environ.get("GEOAUG_CHECK") == "1"


def plain(x: Tensor) -> Any:
    """A tensor on a CPU as numpy has it, which looks at a few values in a tenth of torch's time; else the tensor."""
    return x.detach().numpy() if x.device.type == "cpu" and x.dtype != torch.bfloat16 else x


def _all_finite(x: Any) -> bool:
    """Whether every value of a tensor or array is finite."""
    return bool(torch.isfinite(x).all() if isinstance(x, Tensor) else np.isfinite(x).all())


def floats(x: Any, last: int, where: str, argument: str, expected: str) -> Tensor:
    """Check a floating tensor whose last axis has `last` entries and whose values are finite."""
    ok = isinstance(x, Tensor) and x.is_floating_point() and x.ndim >= 1 and x.shape[-1] == last
    if not ok:  # what came is put into words in case of need only: this is called tens of times a step
        require(ok, where, argument, expected, shape_of(x))
    if values_visible(x):
        require(_all_finite(plain(x)), where, argument, "finite", "NaN or infinite values")
    tensor: Tensor = x
    return tensor


def ordered(x: Any, where: str, argument: str) -> None:
    """Check boxes [..., 4] of any number type: finite, x0 <= x1 and y0 <= y1."""
    ok = isinstance(x, Tensor) and x.shape[-1:] == (4,)
    if not ok:
        require(ok, where, argument, "a tensor [..., 4]", shape_of(x))
    if values_visible(x):
        values = plain(x)
        require(_all_finite(values), where, argument, "finite", "NaN or infinite values")
        fine = bool((values[..., 2:] >= values[..., :2]).all())
        require(fine, where, argument, "boxes with x0 <= x1 and y0 <= y1", "reversed boxes")


def xyxy(x: Any, where: str, argument: str) -> Tensor:
    """Check floating boxes [..., 4] as `ordered` does."""
    ok = isinstance(x, Tensor) and x.is_floating_point() and x.shape[-1:] == (4,)
    if not ok:
        require(ok, where, argument, "floating boxes [..., 4] (x0, y0, x1, y1)", shape_of(x))
    ordered(x, where, argument)
    boxes: Tensor = x
    return boxes


def index(x: Any, low: int, high: int, where: str, argument: str) -> int:
    """Check one whole number in [low, high]."""
    try:
        number = operator.index(x)
    except TypeError:
        raise TypeError(f"{where}: {argument} must be an integer, got {shape_of(x)}") from None
    expected = f"in [{low}, {high}]"
    require(low <= number <= high and not isinstance(x, bool), where, argument, f"an integer {expected}", x)
    return number


def pair_of_sizes(x: Any, where: str, argument: str) -> tuple[int, int]:
    """Check (height, width), or one side for a square; both at least 1."""
    sides = x if isinstance(x, Sequence) and not isinstance(x, str) else (x, x)
    require(len(sides) == 2, where, argument, "one side or (height, width)", x)
    height, width = (index(side, 1, 2**24, where, argument) for side in sides)
    return height, width


def interval(x: Any, low: float, high: float, where: str, argument: str) -> tuple[float, float]:
    """Check an ordered pair of numbers with low <= first <= second <= high and low < second."""
    pair = isinstance(x, Sequence) and len(x) == 2 and all(isinstance(v, (int, float)) for v in x)
    require(pair, where, argument, "a pair of numbers (low, high)", x)
    first, second = float(x[0]), float(x[1])
    ok = math.isfinite(first) and math.isfinite(second) and low <= first <= second <= high and low < second
    require(ok, where, argument, f"(low, high) with {low:g} <= low <= high <= {high:g} and high > {low:g}", tuple(x))
    return first, second


def row_of(index: Any, length: int, where: str) -> int | None:
    """The row a single whole number names, counted from the end if negative; None for anything but one number."""
    if isinstance(index, (list, slice)) or getattr(index, "ndim", 0) != 0:
        return None
    row = operator.index(index)
    if not -length <= row < length:
        raise IndexError(f"{where}: row must be in [{-length}, {length - 1}], got {row}")
    return row % length


def on_device(values: Sequence[float], like: Tensor) -> Tensor:
    """A few numbers as a tensor of the same type and device, filled there: a copy from the host would synchronise."""
    if like.device.type == "cpu":
        return torch.tensor(values, dtype=like.dtype)
    return torch.cat([like.new_full((1,), value) for value in values])


def sent(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device, without waiting: from page-locked memory, where the device has such."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def same_batch(a: Sequence[int], b: Sequence[int], where: str, argument: str) -> None:
    """Check that two batch shapes broadcast."""
    fits = all(x == y or 1 in (x, y) for x, y in zip(reversed(a), reversed(b), strict=False))
    require(fits, where, argument, f"of a batch that broadcasts with {list(a)}", list(b))


def int64(x: Any, where: str, argument: str) -> Tensor:
    """Check whole numbers (tensor, array or list) and give them as an int64 tensor, a copy unless a tensor came."""
    try:
        tensor: Tensor = x if isinstance(x, Tensor) else torch.tensor(np.asarray(x) if hasattr(x, "dtype") else x)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise TypeError(f"{where}: {argument} must be integers that fit int64, got {shape_of(x)}") from None
    if tensor.numel() == 0 and not isinstance(x, Tensor) and not hasattr(x, "dtype"):
        return tensor.to(torch.int64)  # an empty list says nothing of its type
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{where}: {argument} must be integers, got {shape_of(tensor)}")
    if tensor.dtype == torch.uint64:
        raise TypeError(f"{where}: {argument} must fit int64, got {shape_of(tensor)}")
    return tensor.to(torch.int64)

"""What views a method asks for; `plan.plan_views` turns these wishes into whole source pixels."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from . import checks

_RATIO = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class ViewSpec:
    """One view: by default torchvision's random resized crop (`scale`, `ratio`) to `size`, mirrored with chance `flip`.

    `law="side"` crops a square whose side is a share `scale` of the short side (DenseSiam's segmentation). `within=i`
    crops inside the source crop of the earlier view i: scale and ratio are of that crop, the flip is its own.

    >>> ViewSpec(224, scale=(0.2, 1.0)).size
    (224, 224)
    """

    size: int | tuple[int, int]
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = _RATIO
    flip: float = 0.5
    _: KW_ONLY
    law: Literal["area", "side"] = "area"
    within: int | None = None
    # Set by the named constructors only:
    kind: Literal["crop", "whole", "like", "center", "short_side"] = "crop"
    view: int | None = None
    resize: int | None = None
    max_size: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", checks.pair_of_sizes(self.size, "ViewSpec", "size"))
        checks.interval(self.scale, 0.0, 1.0, "ViewSpec", "scale")
        least, _ = checks.interval(self.ratio, 0.0, math.inf, "ViewSpec", "ratio")
        checks.require(least > 0, "ViewSpec", "ratio", "positive", self.ratio)
        chance = isinstance(self.flip, (int, float)) and 0.0 <= self.flip <= 1.0
        checks.require(chance, "ViewSpec", "flip", "a chance in [0, 1]", self.flip)
        checks.require(self.law in ("area", "side"), "ViewSpec", "law", "'area' or 'side'", repr(self.law))
        square = self.law == "area" or tuple(self.ratio) == _RATIO
        checks.require(square, "ViewSpec", "ratio", "left out with law='side', whose crops are square", self.ratio)
        belongs = {"crop": "within", "like": "view", "center": "resize", "short_side": "max_size"}
        known = self.kind in ("crop", "whole", "like", "center", "short_side")
        checks.require(known, "ViewSpec", "kind", "left to the named constructors", repr(self.kind))
        for name in ("within", "view", "resize", "max_size"):
            mine = belongs.get(self.kind) == name
            needed = mine and self.kind in ("like", "short_side")
            given = getattr(self, name) is not None
            fits = mine if given else not needed
            checks.require(fits, "ViewSpec", name, f"left to the named constructors (kind {self.kind!r})", given)
        for name in ("within", "view"):
            if getattr(self, name) is not None:
                checks.index(getattr(self, name), 0, 2**16, "ViewSpec", name)

    @property
    def height_width(self) -> tuple[int, int]:
        """`size` as (height, width)."""
        return self.size if isinstance(self.size, tuple) else (self.size, self.size)

    @classmethod
    def whole(cls, size: int | tuple[int, int], flip: float = 0.0) -> ViewSpec:
        """The whole image at `size`, aspect not kept."""
        return cls(size, flip=flip, kind="whole")

    @classmethod
    def like(cls, view: int, size: int | tuple[int, int]) -> ViewSpec:
        """The crop and flip of an earlier view at another size (D3SSL's 112-pixel copy)."""
        return cls(size, flip=0.0, kind="like", view=view)

    @classmethod
    def center(cls, size: int | tuple[int, int], resize: int | None = None) -> ViewSpec:
        """For evaluation: short side to `resize`, then the centre crop; None: the largest centre crop of its aspect."""
        spec = cls(size, flip=0.0, kind="center", resize=resize)
        if resize is not None:
            checks.index(
                resize, max(spec.height_width), 2**24, "ViewSpec.center", "resize (at least the longer of size)"
            )
        return spec

    @classmethod
    def short_side(cls, size: int, max_size: int) -> ViewSpec:
        """For evaluation of one image at a time: short side to `size` unless the long side would exceed `max_size`."""
        size = checks.index(size, 1, 2**24, "ViewSpec.short_side", "size")
        checks.index(max_size, size, 2**24, "ViewSpec.short_side", "max_size")
        return cls(size, flip=0.0, kind="short_side", max_size=max_size)

    def view_size(self, sizes: npt.NDArray[np.int32]) -> tuple[int, int]:
        """(height, width) of this view for sources of sizes [N, 2]."""
        height, width = self.height_width
        if self.kind != "short_side" or len(sizes) == 0:
            return height, width
        checks.require(len(sizes) == 1, "plan_views", "sizes", "of one image for ViewSpec.short_side", f"{len(sizes)}")
        assert self.max_size is not None
        short, long = min(sizes[0].tolist()), max(sizes[0].tolist())
        factor = min(height / short, self.max_size / long)
        return max(1, round(int(sizes[0, 0]) * factor)), max(1, round(int(sizes[0, 1]) * factor))

    def center_window(self, sizes: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """The window [N, 4] (source pixels, xyxy) that `center` shows of sources of sizes [N, 2]."""
        height, width = self.height_width
        source = sizes.astype(np.float64)
        if self.resize is None:
            factor = np.minimum(source[:, 0] / height, source[:, 1] / width)
        else:
            factor = source.min(axis=1, initial=np.inf) / self.resize
        wanted = np.stack((height * factor, width * factor), axis=1)
        crop = np.clip(np.rint(wanted).astype(np.int32), 1, sizes)
        start = (sizes - crop) // 2
        return np.concatenate((start[:, ::-1], (start + crop)[:, ::-1]), axis=1)

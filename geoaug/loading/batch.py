"""What every loader yields."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from ..geometry import checks
from ..geometry.plan import Plan
from ..geometry.rng import Key


@dataclass
class Batch:
    """One rank's part of a global batch: B samples, V views, M box slots.

    Rows that could not be read have ok = False, black views, no boxes, and the plan of a one-pixel source; what is
    computed from their plan means nothing, so a loss takes `valid & batch.ok[:, None]`. Boxes are in unit coordinates
    of the source, so `batch.plan.view_from_source[:, v].boxes(batch.boxes)` is where they lie in view v. Unknown labels
    are -1. An instance in `label_map` is counted among its image's objects, crowds left out: its slot, unless there are
    more objects than slots. `plan.key` is at the epoch the views were planned in, `key` at the loader's. A batch sent
    to a GPU keeps its plan on the `host`, too, as its key does its ids: geometry of many small steps is a moment there,
    and many launches on a GPU.
    """

    images: list[UInt8[Tensor, "B 3 _h _w"]]
    plan: Plan
    key: Key
    ok: Bool[Tensor, " B"]
    names: list[str]
    boxes: Float[Tensor, "B M 4"]
    box_valid: Bool[Tensor, "B M"]
    box_labels: Int64[Tensor, "B M"]
    label: Int64[Tensor, " B"]
    label_map: Int64[Tensor, "B _mh _mw"] | None = None
    host: Plan | None = None

    def __len__(self) -> int:
        return len(self.names)

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> Batch:
        """The same batch on another device."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in moved.items():
            if hasattr(value, "to") and name != "host":
                moved[name] = value.to(device, non_blocking=non_blocking)
        moved["images"] = [image.to(device, non_blocking=non_blocking) for image in self.images]
        if self.key.ids.device.type == "cpu":
            moved["host"] = self.plan
        return Batch(**moved)

    def split(self, parts: int) -> list[Batch]:
        """The batch in so many parts of equal size, in its order; a part is a view, not a copy."""
        parts = checks.index(parts, 1, 2**31, "Batch.split", "parts")
        size, rest = divmod(len(self), parts)
        checks.require(rest == 0, "Batch.split", "parts", f"a divisor of the {len(self)} samples", parts)
        return [self._rows(slice(at, at + size)) for at in range(0, max(len(self), 1), max(size, 1))]

    def _rows(self, rows: slice) -> Batch:
        every = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("images", "host")}
        taken: dict[str, Any] = {name: None if value is None else value[rows] for name, value in every.items()}
        taken["images"] = [image[rows] for image in self.images]
        if self.host is not None:
            taken["host"] = self.host[rows]
        return Batch(**taken)

    def pin_memory(self) -> Batch:
        """The same batch with its pixels in page-locked memory."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(**{**moved, "images": [image.pin_memory() for image in self.images]})


def pad_boxes(
    boxes: list[npt.NDArray[np.float32]], labels: list[npt.NDArray[np.int64]], slots: int, key: Key
) -> tuple[Tensor, Tensor, Tensor]:
    """Ragged boxes in fixed slots: boxes [B, M, 4], valid [B, M], labels [B, M].

    Of more candidates than slots, those with the smallest draws under the stream "candidates" are taken, so never by
    size; they keep their order.
    """
    batch = len(boxes)
    padded = np.zeros((batch, slots, 4), dtype=np.float32)
    valid = np.zeros((batch, slots), dtype=np.bool_)
    classes = np.full((batch, slots), -1, dtype=np.int64)
    for i, (candidates, names) in enumerate(zip(boxes, labels, strict=True)):
        if len(candidates) == 0:
            continue
        rows = np.arange(len(candidates))
        if len(rows) > slots:
            draws = key[i].uniform("candidates", len(rows))[0].numpy()
            rows = np.sort(np.argsort(draws, kind="stable")[:slots])
        padded[i, : len(rows)], valid[i, : len(rows)] = candidates[rows], True
        classes[i, : len(rows)] = names[rows]
    return torch.from_numpy(padded), torch.from_numpy(valid), torch.from_numpy(classes)

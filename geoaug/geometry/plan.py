"""Plan, then render: the geometry of all views of a batch as a table of whole source pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Int32, Int64
from torch import Tensor

from . import checks, kernels
from .affine import AxisAffine
from .rng import Key
from .views import ViewSpec

_LAWS = {"area": kernels.AREA, "side": kernels.SIDE}


@dataclass(frozen=True, eq=False)
class Plan:
    """N images x V views: crops in whole source pixels, mirrors, and the maps that follow from them.

    Always a table: `plan[3]` is a plan of one row. Made by `plan_views`; a row says exactly what is rendered.
    """

    crop: Int32[Tensor, "N V 4"]
    flipped: Bool[Tensor, "N V"]
    source_size: Int32[Tensor, "N 2"]
    ids: Int64[Tensor, " N"]
    view_sizes: tuple[tuple[int, int], ...]
    seed: int
    epoch: int

    def __post_init__(self) -> None:
        n, views = len(self.ids), len(self.view_sizes)
        for name, shape, dtype in (
            ("crop", (n, views, 4), torch.int32),
            ("flipped", (n, views), torch.bool),
            ("source_size", (n, 2), torch.int32),
            ("ids", (n,), torch.int64),
        ):
            x = getattr(self, name)
            ok = isinstance(x, Tensor) and x.shape == shape and x.dtype == dtype
            if not ok:
                expected = f"{str(dtype).removeprefix('torch.')} {list(shape)}"
                checks.require(ok, "Plan", name, expected, checks.shape_of(x))
        if checks.values_visible(self.crop):
            inside = kernels.crops_inside(self.crop.cpu().numpy(), self.source_size.cpu().numpy())
            checks.require(inside, "Plan", "crop", "boxes with pixels inside the source", "others")

    @property
    def view_from_source(self) -> AxisAffine:
        """The maps [N, V] from unit source coordinates to unit view coordinates, computed from crop and flip."""
        edges, sides = self.crop.to(torch.float32), self.source_size.flip(-1).to(torch.float32)
        low, high = edges[..., :2], edges[..., 2:]
        span = high - low
        scale, shift = sides[:, None] / span, -low / span
        mirror = torch.stack((self.flipped, torch.zeros_like(self.flipped)), dim=-1)
        return AxisAffine(torch.where(mirror, -scale, scale), torch.where(mirror, high / span, shift))

    @property
    def key(self) -> Key:
        """The key the plan was drawn under, for operators that shall follow it."""
        return Key(self.seed, self.epoch, self.ids)

    @property
    def _tables(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.crop, self.flipped, self.source_size, self.ids

    def _with(self, *tables: Tensor) -> Plan:
        crop, flipped, source_size, ids = tables
        return replace(self, crop=crop, flipped=flipped, source_size=source_size, ids=ids)

    def _slice(self, rows: slice) -> Plan:
        """Some rows of what was checked when it was made, and needs no second look."""
        plan, tables = object.__new__(Plan), (table[rows].contiguous() for table in self._tables)
        names = ("crop", "flipped", "source_size", "ids", "view_sizes", "seed", "epoch")
        for name, value in zip(names, (*tables, self.view_sizes, self.seed, self.epoch), strict=True):
            object.__setattr__(plan, name, value)
        return plan

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[Plan]:
        return (self[row] for row in range(len(self)))

    def __getitem__(self, rows: SupportsIndex | slice | Sequence[int] | Tensor) -> Plan:
        """Some rows; one row keeps its axis."""
        row = checks.row_of(rows, len(self), "Plan")
        if row is not None:
            rows = slice(row, row + 1)
        if isinstance(rows, slice):
            return self._slice(rows)
        return self._with(*(table[rows].contiguous() for table in self._tables))

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> Plan:
        """The same plan on another device."""
        return self._with(*(table.to(device, non_blocking=non_blocking) for table in self._tables))

    @classmethod
    def cat(cls, plans: Sequence[Plan]) -> Plan:
        """One plan of the rows of several, which must share view sizes, seed and epoch."""
        checks.require(len(plans) > 0, "Plan.cat", "plans", "at least one plan", "none")
        first = plans[0]
        for other in plans[1:]:
            for name in ("view_sizes", "seed", "epoch"):
                mine, theirs = getattr(first, name), getattr(other, name)
                checks.require(mine == theirs, "Plan.cat", name, f"the same in all plans ({mine})", theirs)
        columns = zip(*(plan._tables for plan in plans), strict=True)
        return first._with(*(torch.cat(column) for column in columns))

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, fit for JSON."""
        tables = {name: getattr(self, name).tolist() for name in ("crop", "flipped", "source_size", "ids")}
        sizes = [list(size) for size in self.view_sizes]
        return {**tables, "view_sizes": sizes, "seed": self.seed, "epoch": self.epoch}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Plan:
        """The plan that `to_dict` wrote."""
        wanted = {"crop", "flipped", "source_size", "ids", "view_sizes", "seed", "epoch"}
        checks.require(set(record) == wanted, "Plan.from_dict", "record", f"a dict of {sorted(wanted)}", sorted(record))
        n, views = len(record["ids"]), len(record["view_sizes"])
        return cls(
            torch.tensor(record["crop"], dtype=torch.int32).reshape(n, views, 4),
            torch.tensor(record["flipped"], dtype=torch.bool).reshape(n, views),
            torch.tensor(record["source_size"], dtype=torch.int32).reshape(n, 2),
            checks.int64(record["ids"], "Plan.from_dict", "ids"),
            tuple(checks.pair_of_sizes(size, "Plan.from_dict", "view_sizes") for size in record["view_sizes"]),
            record["seed"],
            record["epoch"],
        )


def plan_views(specs: Sequence[ViewSpec], sizes: checks.Numbers, ids: checks.Numbers, *, seed: int, epoch: int) -> Plan:
    """Draw the views of N images of sizes int [N, 2] (height, width), purely from specs, size, id, seed and epoch.

    View v draws under the stream "plan/<v>", so a row is the same in every batch, order, rank and worker. Drawn by one
    CPU kernel, because exp and sqrt differ in the last bit between libraries; move the result with `.to(device)`.

    >>> plan = plan_views([ViewSpec(224), ViewSpec.like(0, 112)], [[375, 500]], [7], seed=0, epoch=0)
    >>> plan.view_sizes, plan.crop.shape
    (((224, 224), (112, 112)), torch.Size([1, 2, 4]))
    """
    listed = isinstance(specs, Sequence) and all(isinstance(spec, ViewSpec) for spec in specs)
    checks.require(listed, "plan_views", "specs", "a list of ViewSpec", checks.shape_of(specs))
    checks.require(len(specs) > 0, "plan_views", "specs", "at least one ViewSpec", "none")
    key = Key(seed, epoch, checks.int64(ids, "plan_views", "ids").cpu())
    table = checks.int64(sizes, "plan_views", "sizes").cpu()
    table = table.reshape(0, 2) if table.numel() == 0 and len(key) == 0 else table
    ok = table.ndim == 2 and table.shape[1] == 2
    checks.require(ok, "plan_views", "sizes", "[N, 2] (height, width)", list(table.shape))
    checks.require(len(table) == len(key), "plan_views", "ids", f"one per size, {len(table)}", len(key))
    sides = table.numpy()
    legal = sides.size == 0 or bool(sides.min() >= 1 and sides.max() < 2**24)
    checks.require(legal, "plan_views", "sizes", "sides in [1, 2^24)", "others")

    source: npt.NDArray[np.int32] = sides.astype(np.int32)
    whole = np.concatenate((np.zeros_like(source), source[:, ::-1]), axis=1)
    crops = np.empty((len(specs), len(key), 4), dtype=np.int32)
    flipped = np.empty((len(specs), len(key)), dtype=np.bool_)
    for v, spec in enumerate(specs):
        for name in ("within", "view"):
            earlier = getattr(spec, name)
            if earlier is not None and earlier >= v:
                checks.require(False, "plan_views", f"specs[{v}].{name}", "an earlier view", earlier)
        if spec.view is not None:
            crops[v], flipped[v] = crops[spec.view], flipped[spec.view]
            continue
        window = whole if spec.within is None else crops[spec.within]
        window = spec.center_window(source) if spec.kind == "center" else window
        law = _LAWS[spec.law] if spec.kind == "crop" else kernels.FIXED
        low, high = (float(x) for x in spec.scale)
        log_low, log_high = (float(x) for x in np.log(spec.ratio))
        kernels.draw_crops(
            window, key.ids.numpy(), key.tag(f"plan/{v}"), key.seed, key.epoch,
            law, low, high, log_low, log_high, float(spec.flip), crops[v], flipped[v],
        )  # fmt: skip
    view_sizes = tuple(spec.view_size(source) for spec in specs)
    crops, flipped = np.ascontiguousarray(crops.transpose(1, 0, 2)), np.ascontiguousarray(flipped.T)
    crop_table, flip_table, size_table = (torch.from_numpy(x) for x in (crops, flipped, source))
    return Plan(crop_table, flip_table, size_table, key.ids, view_sizes, key.seed, key.epoch)


def _collate_plans(rows: Sequence[Plan], *, collate_fn_map: object = None) -> Plan:
    return Plan.cat(rows)


# A Plan in a sample goes through a DataLoader's default collate like a tensor does.
torch.utils.data._utils.collate.default_collate_fn_map[Plan] = _collate_plans

"""`Loader`: the batches of an epoch, where the consumer is in it, and what could not be read."""

from __future__ import annotations

import logging
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from functools import cached_property
from types import TracebackType
from typing import Any, Literal, Protocol, runtime_checkable
from weakref import WeakSet

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import UInt8
from torch import Tensor

from ..geometry import checks
from ..geometry.ids import sample_id
from ..geometry.plan import plan_views
from ..geometry.rng import Key
from ..geometry.views import ViewSpec
from ..pixels.render import render as render_one
from ..pixels.render import render_batch
from .batch import Batch
from .decode import ROTATED, read_image
from .folder import LoadError, Task, Tasks, Worked, failure_text
from .order import PADDING, epoch_order, rows_of
from .source import Source

log = logging.getLogger("geoaug")


@runtime_checkable
class Proposals(Protocol):
    """What the loader asks of a store of proposals."""

    def padded(self, ids: Tensor, m: int, *, key: Key | None = None) -> tuple[Tensor, Tensor]:
        """Boxes [B, m, 4] in source units and valid [B, m] of some ids."""


class Loader:
    """Made by `open_loader`. Iterating gives the batches of one epoch; the next epoch follows unless one is set."""

    def __init__(
        self,
        source: Source,
        dataset: Tasks,
        *,
        batch_size: int,
        rank: int,
        world: int,
        steps: int,
        order: Literal["shuffle", "file"],
        replay: bool,
        proposals: Proposals | None,
        max_boxes: int,
        workers: int,
        prefetch: int,
        device: torch.device,
        on_error: Literal["raise", "mask"],
    ) -> None:
        self.source, self.report, self.failures = source, Counter[str](), dict[str, tuple[str, str]]()
        self._dataset, self._order, self._replay, self._on_error = dataset, order, replay, on_error
        self._batch_size, self._rank, self._world, self._steps = batch_size, rank, world, steps
        self._proposals, self._max_boxes, self._device = proposals, max_boxes, device
        self._workers, self._prefetch = workers, prefetch
        self._epoch, self._start, self._position, self._told = 0, 0, 0, False
        self._running: WeakSet[Generator[Batch, None, None]] = WeakSet()  # weak, so that a dropped one ends
        self._rows_of_epoch(0)  # so that a wrong `order` is told at once
        tiny = plan_views([ViewSpec(2)], [[2, 2]], [0], seed=0, epoch=0)
        render_one(torch.zeros(2, 2, 3, dtype=torch.uint8), tiny)  # compiled here once, not in every worker it forks

    def __len__(self) -> int:
        """Steps of an epoch, the same on every rank."""
        return self._steps

    @property
    def has_boxes(self) -> bool:
        """Whether batches come with boxes at all: of a store, or of the data itself."""
        objects = self.source.objects
        return self._proposals is not None or (objects is not None and len(objects.boxes) > 0)

    def stored(self, name: str) -> UInt8[Tensor, "H W 3"]:
        """The stored pixels of one image, as views are cut from them."""
        return read_image(self.source.root / self.source.names[self._row(name)])[0]

    def _row(self, name: str) -> int:
        rows = np.flatnonzero(self.source.ids == sample_id(name))
        checks.require(len(rows) == 1, "Loader.stored", "name", "one of the images'", repr(name))
        return int(rows[0])

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration give this epoch; the epoch just restored by `load_state_dict` goes on where it was."""
        epoch = checks.index(epoch, 0, 2**32 - 1, "Loader.set_epoch", "epoch")
        if epoch != self._epoch:
            self._epoch, self._start, self._position = epoch, 0, 0

    def state_dict(self) -> dict[str, Any]:
        """Where the consumer is: the batch yielded last counts, what lies ready in a worker does not."""
        return {"epoch": self._epoch, "step": self._position, **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the last batch that was yielded; nothing is replayed to get there.

        Every iteration of that epoch starts there, so that a look at the first batch costs nothing.
        """
        where = "Loader.load_state_dict"
        for name, value in self._identity.items():
            same = state.get(name) == value
            checks.require(same, where, name, f"the loader's own, {value!r}", repr(state.get(name)))
        epoch = checks.index(state.get("epoch"), 0, 2**32 - 1, where, "epoch")
        self._start = checks.index(state.get("step"), 0, self._steps, where, "step")
        self._epoch, self._position = epoch, self._start

    @property
    def _identity(self) -> dict[str, Any]:
        samples = int(np.bitwise_xor.reduce(self.source.ids)) if len(self.source) else 0
        counts = {"seed": self._dataset.seed, "batch_size": self._batch_size, "samples": samples, "steps": self._steps}
        return {**counts, "boxes": self._boxes_mark, "order": self._order, "replay": self._replay}

    @cached_property
    def _boxes_mark(self) -> int:
        """A checksum of how many boxes each sample has: other proposals would train something else."""
        counts = self._box_counts()[np.argsort(self.source.ids)]
        return zlib.crc32(counts.astype(np.int64).data)

    def _box_counts(self) -> npt.NDArray[np.int64]:
        objects = self.source.objects
        if self._proposals is not None:
            counts = getattr(self._proposals, "counts", None)  # a store of one's own need not have it
            return np.zeros(len(self.source), np.int64) if counts is None else counts(self.source.ids)
        return np.zeros(len(self.source), np.int64) if objects is None else np.diff(objects.offsets)

    def _rows_of_epoch(self, epoch: int) -> npt.NDArray[np.int64]:
        return epoch_order(self.source.ids, seed=self._dataset.seed, epoch=epoch, order=self._order)

    def _task(self, epoch: int, rows: npt.NDArray[np.int64]) -> Task:
        source, objects = self.source, self.source.objects
        filled = rows[rows != PADDING]
        pad = len(rows) - len(filled)
        boxes = [np.zeros((0, 4), dtype=np.float32)] * len(rows)
        labels = [np.zeros(0, dtype=np.int64)] * len(rows)
        masks: list[list[Any]] = [[]] * len(rows)
        sizes = None
        if objects is not None:
            owned = [slice(objects.offsets[row], objects.offsets[row + 1]) for row in filled]
            masks[: len(filled)] = [objects.masks[own] if self._dataset.label_map else [] for own in owned]
            boxes[: len(filled)] = [objects.boxes[own] for own in owned]
            labels[: len(filled)] = [objects.labels[own] for own in owned]
            sizes = np.concatenate((objects.sizes[filled], np.ones((pad, 2), dtype=np.int32)))
        return Task(
            epoch=epoch,
            planned=0 if self._replay else epoch,
            names=[source.names[row] for row in filled] + [""] * pad,
            ids=np.concatenate((source.ids[filled], np.full(pad, PADDING))),
            labels=np.concatenate((source.labels[filled], np.full(pad, -1))),
            boxes=boxes,
            box_labels=labels,
            slots=self._max_boxes,
            masks=masks if self._dataset.label_map else None,
            sizes=sizes,
        )

    def __iter__(self) -> Iterator[Batch]:
        iterator = self._batches(self._epoch, self._start)
        self._running.add(iterator)
        return iterator

    def _batches(self, epoch: int, start: int) -> Generator[Batch, None, None]:
        import torchvision.io  # noqa: F401  here once, not in every worker of every epoch; its decoders are used

        order = self._rows_of_epoch(epoch)

        def task(step: int) -> Task:
            rows = rows_of(order, step, batch_size=self._batch_size, rank=self._rank, world=self._world)
            return self._task(epoch, rows)

        sampler = _Lazily(task, range(start, self._steps))
        parallel: dict[str, Any] = {"prefetch_factor": self._prefetch} if self._workers else {}
        pin = self._device.type == "cuda"
        loader: torch.utils.data.DataLoader[Worked] = torch.utils.data.DataLoader(
            self._dataset, sampler=sampler, batch_size=None, num_workers=self._workers, collate_fn=_as_it_is,
            **parallel,
        )  # fmt: skip
        results = iter(loader)
        try:
            for step, worked in enumerate(results, start):
                batch = self._finished(worked, pin)
                self._epoch, self._position = epoch, step + 1
                yield batch
            self._end_epoch(epoch)
        finally:  # also when the consumer stops early or an error is raised: no process is left behind
            stop = getattr(results, "_shutdown_workers", None)
            if stop is not None:
                stop()

    def _end_epoch(self, epoch: int) -> None:
        """Go on to the next epoch; what could not be read so far, and what was ignored, is told in one line."""
        self._epoch, self._start, self._position = epoch + 1, 0, 0
        failed = sorted(kind for kind in self.report if kind not in ("read", ROTATED))
        if failed or (self.report[ROTATED] and not self._told):  # rotations are no failure: told once
            counts = ", ".join(f"{self.report[kind]} {kind}" for kind in [*failed, ROTATED] if self.report[kind])
            log.warning("after epoch %d: %d images read so far; %s", epoch, self.report["read"], counts)
        self._told = True

    def _finished(self, worked: Worked, pin: bool) -> Batch:
        self.report.update(worked.notes)
        self.report["read"] += int(worked.batch.ok.sum())
        for name, kind, reason in worked.failures:
            if self.report[kind] == 0 and self._on_error == "mask":
                log.warning(
                    "masked: %s: %s: %s (the first of this kind; all are in loader.failures)", name, kind, reason
                )
            self.report[kind] += 1
            self.failures[name] = (kind, reason)
        if worked.failures and self._on_error == "raise":
            count = len(worked.failures)
            raise LoadError(f"loader: {count} images could not be read:\n{failure_text(worked.failures)}")
        batch = worked.batch
        if self._proposals is not None:
            boxes, valid = self._proposals.padded(batch.plan.ids, self._max_boxes, key=batch.key)
            batch.boxes, batch.box_labels = boxes, torch.full_like(valid, -1, dtype=torch.int64)
            batch.box_valid = valid & batch.ok[:, None]
        padded = worked.padded
        if pin:
            batch, padded = batch.pin_memory(), None if padded is None else padded.pin_memory()
        if self._device.type != "cpu":  # where all of it is made
            batch = batch.to(self._device, non_blocking=pin)
        if padded is not None:
            batch.images = render_batch(padded.to(self._device, non_blocking=pin), batch.plan)
        return batch

    def close(self) -> None:
        """End every iteration and its workers; safe to call twice."""
        for iterator in list(self._running):
            iterator.close()
        self._running.clear()

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Lazily:
    """A sampler that makes each task when a worker is free for it."""

    def __init__(self, make: Callable[[int], Task], steps: range) -> None:
        self._make, self._steps = make, steps

    def __iter__(self) -> Iterator[Task]:
        return map(self._make, self._steps)

    def __len__(self) -> int:
        return len(self._steps)


def _as_it_is(worked: Any) -> Any:
    return worked

"""One rank's part of one batch out of a .beton: planned at once, rendered by several threads, finished by one."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..geometry.plan import Plan, plan_views
from ..geometry.rng import Key
from .batch import Batch, pad_boxes
from .decode import ROTATED as ROTATED_NOTE
from .folder import Worked
from .jpeg_kernels import OK
from .order import PADDING
from .turbojpeg import KINDS, most_scratch, reason

_AT_ONCE = 16  # batches that are planned together
UNKNOWN, PLAIN, ROTATED, DAMAGED = range(4)  # what has been seen of a sample


class Plans:
    """The plans of an epoch's batches, drawn for several at once: a call costs more than its draws do."""

    def __init__(self, loader: Any, epoch: int, rows: Callable[[int], npt.NDArray[np.int64]]) -> None:
        """`rows(step)` are the rows of the .beton in a batch, PADDING among them."""
        self._loader, self._epoch, self._rows = loader, epoch, rows
        short = any(spec.kind == "short_side" for spec in loader.tasks.specs)  # its size is that of its batch
        self._at_once, self._lock = 1 if short else _AT_ONCE, threading.Lock()
        self._drawn: dict[int, tuple[Plan, int]] = {}  # with the rows of each batch

    def of(self, step: int) -> Plan:
        """The plan of a batch; steps are asked for about in order, by any thread."""
        block, place = divmod(step, self._at_once)
        with self._lock:
            if block not in self._drawn:
                steps = range(block * self._at_once, min((block + 1) * self._at_once, len(self._loader)))
                rows = np.concatenate([self._rows(s) for s in steps])
                self._drawn = {b: drawn for b, drawn in self._drawn.items() if b == block - 1}
                self._drawn[block] = plan_rows(self._loader, self._epoch, rows), len(rows) // len(steps)
            plan, share = self._drawn[block]
        return plan[place * share : (place + 1) * share]


def plan_rows(loader: Any, epoch: int, rows: npt.NDArray[np.int64]) -> Plan:
    """The views of rows of the loader's .beton; PADDING is a source of one pixel."""
    filled, dataset = rows != PADDING, loader.tasks
    sizes = np.where(filled[:, None], loader.beton.stored[rows], 1)
    ids = np.where(filled, loader.beton.ids[rows], PADDING)
    return plan_views(dataset.specs, sizes, ids, seed=dataset.seed, epoch=epoch)


class BetonJob:
    """One batch in the making, see `Crew`; `loader` is the `BetonLoader`, which imports this module."""

    def __init__(self, loader: Any, epoch: int, rows: npt.NDArray[np.int64], plan: Plan) -> None:
        beton, dataset = loader.beton, loader.tasks
        self._loader, self._rows, self._filled = loader, rows, rows[rows != PADDING]
        filled = len(self._filled)
        self._task = loader._task(epoch, rows)
        self.names = self._task.names
        self._plan, self._sizes = plan, plan.source_size.numpy()
        self._key = Key(dataset.seed, epoch, self._plan.ids)

        self._metadata = np.zeros(len(rows), dtype=loader.pipeline.type)  # rows of padding have no bytes
        fields = self._metadata["f0"]
        fields["height"], fields["width"] = self._sizes.T
        fields["data_ptr"][:filled], fields["size"][:filled] = beton.starts[self._filled], beton.lengths[self._filled]
        fields["crc"][:filled] = beton.crcs[self._filled]
        height, width = self._sizes.max(axis=0, initial=1).tolist()
        if dataset.on_device:  # decoded straight into the batch, so colours stay innermost
            shapes, self._area, self._scratch = [(height, width)], 0, 0
        else:
            fields["plan"][..., :4], fields["plan"][..., 4] = self._plan.crop.numpy(), self._plan.flipped.numpy()
            shapes, self._scratch = list(self._plan.view_sizes), most_scratch(height, width, self._plan.view_sizes)
            self._area = int(self._sizes.astype(np.int64).prod(axis=1).max(initial=1))
        ends = np.cumsum([0, *(3 * len(rows) * h * w for h, w in shapes)])
        memory = torch.from_numpy(loader.pool.take(int(ends[-1])))
        self._images = [
            memory[low:high].view(len(rows), 3, h, w)
            for low, high, (h, w) in zip(ends[:-1], ends[1:], shapes, strict=True)
        ]
        places = [[image.data_ptr(), *shape] for image, shape in zip(self._images, shapes, strict=True)]
        self._places, self._status = np.array(places, dtype=np.int64), np.zeros(len(rows), dtype=np.int32)
        self.dealt = np.zeros(1, dtype=np.int64)

    def take_part(self, worker: Any) -> None:
        """Decode and render rows until all are dealt out."""
        worker.bench.make_room(self._area, self._scratch)
        worker.render(self._metadata, self._places, self.dealt, self._status)

    def finish(self) -> Worked:
        """The batch, and the names and reasons of what could not be read."""
        loader, task, dataset = self._loader, self._task, self._loader.tasks
        ok, notes = self._status == OK, Counter[str]()
        failures = self._failures(ok)
        rotated = int((loader.known[self._filled][ok[: len(self._filled)]] == ROTATED).sum())
        if rotated:
            notes[ROTATED_NOTE] = rotated
        images, plan = self._images, self._plan
        if failures:  # as the folder loader has it: what cannot be read is one black pixel
            sizes = np.where(ok[:, None], self._sizes, 1)
            plan = plan_views(dataset.specs, sizes, task.ids, seed=dataset.seed, epoch=task.planned)
            if plan.view_sizes != self._plan.view_sizes:  # a short_side view, alone in its batch
                images = [torch.zeros(len(ok), 3, h, w, dtype=torch.uint8) for h, w in plan.view_sizes]
        boxes, box_valid, box_labels = pad_boxes(task.boxes, task.box_labels, task.slots, self._key)
        box_valid &= torch.from_numpy(ok)[:, None]
        batch = Batch(
            images=[] if dataset.on_device else images, plan=plan, key=self._key, ok=torch.from_numpy(ok),
            names=task.names, boxes=boxes, box_valid=box_valid, box_labels=box_labels,
            label=torch.from_numpy(task.labels),
        )  # fmt: skip
        if not dataset.on_device:
            return Worked(batch, None, failures, dict(notes))
        whole = self._images[0].view(len(ok), *self._images[0].shape[2:], 3).permute(0, 3, 1, 2)
        return Worked(batch, whole, failures, dict(notes))

    def _failures(self, ok: npt.NDArray[np.bool_]) -> list[tuple[str, str, str]]:
        """(name, kind, reason) of what could not be read; samples whose boxes are damaged lose `ok` and pixels."""
        loader, beton, failures = self._loader, self._loader.beton, []
        loader.look_at(self._filled)
        good = ok[: len(self._filled)] & (loader.known[self._filled] != DAMAGED)
        for i in np.flatnonzero(~good).tolist():
            if ok[i]:
                ok[i] = False
                failures.append((self.names[i], "crc", "its boxes or its name are not as they were written"))
                for image in self._images:
                    image[i] = 0
            else:
                row, status = int(self._filled[i]), int(self._status[i])
                told = reason(status, beton.jpeg(row).tobytes(), int(beton.crcs[row]), self._sizes[i].tolist())
                failures.append((self.names[i], KINDS[status], told))
        return failures

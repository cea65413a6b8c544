"""`BetonLoader`: the batches of the folder loader out of an FFCV file, each image decoded once for all its views."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import numpy.typing as npt
from jaxtyping import UInt8
from torch import Tensor

from .batch import Batch
from .beton import Beton
from .beton_job import DAMAGED, PLAIN, ROTATED, UNKNOWN, BetonJob, Plans, plan_rows
from .crew import Crew, Pool
from .decode import _orientation, decode_jpeg
from .folder import LoadError, Task, Tasks, Worked
from .loader import Loader
from .order import PADDING, rows_of
from .source import Source
from .turbojpeg import Bench


def open_beton(path: Path | str, *, verify: bool) -> tuple[Beton, Source]:
    """A .beton made by write_beton.py, and its images as a source; `verify` checks its tables."""
    beton = Beton.open(path, verify=verify)
    classes = beton.manifest.get("classes", [])
    known = tuple(map(str, classes)) if isinstance(classes, list) else ()
    return beton, Source(Path(path), beton.names, beton.ids, beton.labels, known)


class BetonLoader(Loader):
    """Made by `open_loader` of a .beton: a `Loader` whose workers are threads that run an FFCV pipeline."""

    def __init__(self, source: Source, dataset: Tasks, *, beton: Beton, **options: Any) -> None:
        from .ffcv_ops import pipeline_of

        super().__init__(source, dataset, **options)
        self.beton, self.tasks = beton, dataset
        self.known = np.full(len(beton), UNKNOWN, dtype=np.uint8)
        self.pipeline = pipeline_of(0 if dataset.on_device else len(dataset.specs))
        self.pool = Pool(most=self._prefetch + 5)
        self._crews: WeakSet[Crew[Worked]] = WeakSet()
        nobody = np.zeros(0, dtype=np.int64)
        with self._hired(1) as (worker,):  # compiles here, in the thread of whoever opens the loader
            BetonJob(self, 0, nobody, plan_rows(self, 0, nobody)).take_part(worker)

    @property
    def has_boxes(self) -> bool:
        """Whether batches come with boxes at all: of a store, or of the .beton."""
        return self._proposals is not None or bool(self.beton.counts.any())

    def _box_counts(self) -> npt.NDArray[np.int64]:
        return self.beton.counts if self._proposals is None else super()._box_counts()

    def stored(self, name: str) -> UInt8[Tensor, "H W 3"]:
        """The stored pixels of one image, as views are cut from them."""
        return decode_jpeg(self.beton.jpeg(self._row(name)).tobytes(), verify=True)

    def look_at(self, rows: npt.NDArray[np.int64]) -> None:
        """Once for each sample: whether its boxes and name are as written (`verify`), and its EXIF orientation."""
        new = rows[self.known[rows] == UNKNOWN]
        if not len(new):
            return
        damaged = set(self.beton.damaged_facts(new.tolist())) if self.tasks.verify else set()
        for row in new.tolist():
            rotated = _orientation(self.beton.jpeg(row).tobytes()) > 1
            self.known[row] = DAMAGED if row in damaged else ROTATED if rotated else PLAIN

    def _hired(self, count: int, work: Any = None) -> _Hired:
        return _Hired(self.pipeline, self.beton.data, self.tasks.verify, count, work)

    def _task(self, epoch: int, rows: npt.NDArray[np.int64]) -> Task:
        filled = rows[rows != PADDING]
        pad = len(rows) - len(filled)
        boxes = [np.zeros((0, 4), dtype=np.float32)] * len(rows)
        labels = [np.zeros(0, dtype=np.int64)] * len(rows)
        for i in np.flatnonzero(self.beton.counts[filled]).tolist():
            boxes[i], labels[i] = self.beton.boxes(int(filled[i]))
        return Task(
            epoch=epoch,
            planned=0 if self._replay else epoch,
            names=self.beton.names.of(filled) + [""] * pad,
            ids=np.concatenate((self.beton.ids[filled], np.full(pad, PADDING))),
            labels=np.concatenate((self.beton.labels[filled], np.full(pad, -1))),
            boxes=boxes,
            box_labels=labels,
            slots=self._max_boxes,
            masks=None,
            sizes=None,
        )

    def _batches(self, epoch: int, start: int) -> Generator[Batch, None, None]:
        order = self._rows_of_epoch(epoch)

        def rows(step: int) -> npt.NDArray[np.int64]:
            return rows_of(order, step, batch_size=self._batch_size, rank=self._rank, world=self._world)

        plans = Plans(self, 0 if self._replay else epoch, rows)

        def job(step: int) -> BetonJob:
            return BetonJob(self, epoch, rows(step), plans.of(step))

        pin = self._device.type == "cuda"
        crew: Crew[Worked]
        with self._hired(max(1, self._workers), lambda worker: crew.work(worker)) as workers:
            crew = Crew(workers, job, range(start, self._steps), ahead=self._prefetch + 1, error_type=LoadError)
            self._crews.add(crew)
            try:
                crew.start()
                for step, worked in enumerate(crew, start):
                    batch = self._finished(worked, pin)
                    self._epoch, self._position = epoch, step + 1
                    del worked
                    yield batch
                    del batch
                self._end_epoch(epoch)
            finally:  # also when the consumer stops early or an error is raised: no thread is left behind
                crew.close()

    def close(self) -> None:
        """End every iteration and its threads; safe to call twice. Another thread that waits gets a LoadError."""
        for crew in list(self._crews):
            crew.close()
        for iterator in list(self._running):
            with suppress(ValueError):  # another thread is in it, and on its way out
                iterator.close()
        self._running.clear()


class _Hired:
    """Workers and what they work with, for as long as a `with`; their types wait for FFCV, so Any stands for them."""

    def __init__(self, pipeline: Any, file: npt.NDArray[np.uint8], verify: bool, count: int, work: Any) -> None:
        from .ffcv_ops import Worker

        self.workers = [Worker(pipeline, Bench(file, verify), work) for _ in range(count)]

    def __enter__(self) -> list[Any]:
        return self.workers

    def __exit__(self, *exception: object) -> None:
        for worker in self.workers:
            if not worker.is_alive():  # joining may have been interrupted; then the bench goes with its thread
                worker.bench.close()

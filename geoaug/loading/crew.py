"""Threads that make the batches of one epoch together, in order, and stop when told to.

Every thread visits every batch and takes rows of it until none is left, then goes on to the next batch without waiting
for the others; the last one to leave a batch finishes it. No thread idles at the end of a batch.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, NoReturn, Protocol, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt

Done = TypeVar("Done", covariant=True)
_here = threading.local()  # has `at_work` in the threads of a crew


@runtime_checkable
class Job(Protocol[Done]):
    """One batch in the making."""

    dealt: npt.NDArray[np.int64]  # [1]: rows taken so far

    @property
    def names(self) -> Sequence[str]:
        """Of its samples, for errors."""

    def take_part(self, worker: threading.Thread) -> None:
        """Work on rows of the batch until none is left."""

    def finish(self) -> Done:
        """What the consumer gets; called once, when all rows are made."""


class Crew(Generic[Done]):
    """Iterates over what `make(step)` leads to, for each of `steps`, at most `ahead` of them begun and not taken.

    An error in a thread ends the iteration with `error_type`, raised from it. `close` stops within a sample or two.
    """

    def __init__(
        self,
        workers: Sequence[threading.Thread],
        make: Callable[[int], Job[Done]],
        steps: range,
        *,
        ahead: int,
        error_type: type[Exception],
    ) -> None:
        self._make, self._steps, self._ahead, self._error_type = make, steps, ahead, error_type
        self._changed = threading.Condition()
        self._jobs: dict[int, Job[Done]] = {}
        self._left: dict[int, int] = {}
        self._done: dict[int, Done] = {}
        self._taken, self._stopped = steps.start, False
        self._error: tuple[int, BaseException] | None = None
        self.workers, self._process = list(workers), os.getpid()
        _open.add(self)

    def start(self) -> None:
        """Set all threads to work."""
        for worker in self.workers:
            worker.start()

    def work(self, worker: threading.Thread) -> None:
        """What each thread runs."""
        _here.at_work = True
        for step in self._steps:
            try:
                job = self._job(step)
                if job is None:
                    return
                job.take_part(worker)
                self._leave(step, job)
            except BaseException as error:  # whatever it is, the consumer must hear of it and not wait for ever
                with self._changed:
                    self._error = self._error or (step, error)
                    self._stop()
                return

    def _job(self, step: int) -> Job[Done] | None:
        """The batch of a step, made by the first thread that gets there; None when it is time to stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or step in self._jobs or self._may_begin(step))
            if self._stopped:
                return None
            if step in self._jobs:
                return self._jobs[step]
            self._left[step] = 0  # so that no other thread makes it
        job = self._make(step)
        with self._changed:
            self._jobs[step] = job
            self._changed.notify_all()
            return None if self._stopped else job

    def _may_begin(self, step: int) -> bool:
        return step not in self._left and step < self._taken + self._ahead

    def _leave(self, step: int, job: Job[Done]) -> None:
        with self._changed:
            self._left[step] += 1
            last = self._left[step] == len(self.workers) and not self._stopped
        if last:
            done = job.finish()
            with self._changed:
                del self._jobs[step], self._left[step]
                self._done[step] = done
                self._changed.notify_all()

    def _stop(self) -> None:
        self._stopped = True
        for job in list(self._jobs.values()):
            job.dealt[0] = 2**62  # no row is dealt out any more
        self._changed.notify_all()

    def __iter__(self) -> Iterator[Done]:
        for step in self._steps:
            if os.getpid() != self._process:
                raise self._error_type("loader: iterating was begun before a fork, and its threads are in the parent")
            with self._changed:
                self._changed.wait_for(lambda step=step: step in self._done or self._stopped)  # type: ignore[misc]
                if step not in self._done:
                    self._raise()
                done = self._done.pop(step)
                self._taken = step + 1
                self._changed.notify_all()
            yield done

    def _raise(self) -> NoReturn:
        if self._error is None:
            raise self._error_type("loader: closed while another thread waited for a batch")
        step, error = self._error
        job = self._jobs.get(step)
        names = f", {job.names[0]} and others" if job is not None and len(job.names) else ""
        raise self._error_type(f"loader: step {step}{names}: {type(error).__name__}: {error}") from error

    def close(self) -> None:
        """Stop and join all threads; safe to call twice."""
        if os.getpid() != self._process:  # a forked child has the objects and not the threads
            return
        with self._changed:
            self._stop()
        # The garbage collector may close an iterator in any thread. One of a crew may hold what others need to end, so
        # it waits for none of them; they end by themselves.
        if getattr(_here, "at_work", False):
            return
        for worker in self.workers:
            if worker.ident is not None:
                worker.join()
        self._jobs.clear()
        self._done.clear()


_open: weakref.WeakSet[Crew[Any]] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Before the interpreter takes the file away from under the threads."""
    for crew in list(_open):
        crew.close()


class Pool:
    """Memory for pixels, used again once no tensor refers to it: fresh pages would cost as much as the resize."""

    def __init__(self, most: int) -> None:
        self._most, self._lock = most, threading.Lock()
        self._memory: list[npt.NDArray[np.uint8]] = []
        self._unused = self._references([np.empty(0, dtype=np.uint8)], 0)

    @staticmethod
    def _references(memory: list[npt.NDArray[np.uint8]], i: int) -> int:
        return sys.getrefcount(memory[i])

    def take(self, size: int) -> npt.NDArray[np.uint8]:
        """uint8 [size], uninitialised, that nobody else holds; whole images differ in size from batch to batch."""
        with self._lock:
            for i in range(len(self._memory)):
                fits = size <= self._memory[i].nbytes <= 2 * size
                if fits and self._references(self._memory, i) <= self._unused:
                    return self._memory[i][:size]
            fresh = np.empty(size, dtype=np.uint8)
            if len(self._memory) >= self._most:
                del self._memory[0]
            self._memory.append(fresh)
            return fresh

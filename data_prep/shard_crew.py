"""One function over many items in processes of their own, so that no item can take the run down with it.

An item whose process dies (a segmentation fault, the kernel out of memory) or gives no answer in time is tried once
more in a fresh process, since a process may have been killed for another reason; then it is a recorded failure.
"""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

_TRIES = 2
_LOST = ("crash", "timeout")  # what a process may say by being no more use
_START = 600.0  # seconds a process may take to import what it needs
_STATEMENT = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); import data_prep.shard_crew as c; c.serve()"


class Outcome(NamedTuple):
    """What became of one item: what the function gave, or (kind, reason) of why it gave nothing."""

    value: Any
    failure: tuple[str, str] | None = None


class CrewError(RuntimeError):
    """The processes themselves do not work: a package is missing, or they end before their first item."""


class Task(NamedTuple):
    """An item, its number, and the how many-th try this is."""

    number: int
    item: Any
    tries: int = 1


class Worker:
    """One process and the task it is at."""

    def __init__(self, work: bytes, timeout: float) -> None:
        """Start a process that runs the pickled function."""
        self.task: Task | None = None
        self.ready, self._timeout, self._deadline = False, timeout, time.monotonic() + _START
        self.connection, theirs = Pipe()
        paths = json.dumps([path or os.getcwd() for path in sys.path])
        arguments = [sys.executable, "-c", _STATEMENT, paths, str(theirs.fileno()), str(timeout)]
        # In a session of its own, so that the terminal's Ctrl-C reaches the driver alone, which then ends its
        # processes. One thread each, since the items are shared out already. What they print goes to stderr.
        self._process = subprocess.Popen(
            arguments, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=2, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        )  # fmt: skip
        theirs.close()
        with suppress(OSError):  # it died already, which is noticed where its answer is awaited
            self.connection.send_bytes(work)

    def give(self, task: Task) -> None:
        """Send a task; it waits while the process starts."""
        self.task = task
        if self.ready:
            self._deadline = time.monotonic() + self._timeout
        with suppress(OSError):
            self.connection.send(task.item)

    def rest(self) -> float:
        """Seconds until it is late."""
        return max(0.0, self._deadline - time.monotonic())

    def hear(self) -> tuple[str, Any] | None:
        """What it says, as (kind, what); "crash" or "timeout" where it is no more use; None: nothing."""
        late = ("timeout", f"no answer in {self._timeout:g} s")
        try:
            if self.connection.poll(0):
                said: tuple[str, Any] = self.connection.recv()
                if said[0] != "ready":
                    return said
                self.ready, self._deadline = True, time.monotonic() + self._timeout
        except (EOFError, OSError):
            code = self._process.wait()
            if code == -signal.SIGALRM:
                return late
            return "crash", f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        return late if self.rest() == 0.0 else None

    def end(self) -> None:
        """Leave nothing of it behind."""
        self._process.kill()
        self._process.wait()
        self.connection.close()


def outcomes(
    work: Callable[[Any], Any] | bytes,
    items: Iterable[tuple[int, Any]],
    *,
    workers: int,
    timeout: float,
    idle: list[Worker] | None = None,
) -> Generator[tuple[int, Outcome], None, None]:
    """(number, outcome) of each (number, item), as they are done; `work`, or its pickle, is known by its module's name.

    An exception of `work` is a failure: its `kind` and `reason`, as `ReadError` has them, else of the kind "error". A
    missing package stops the run. No process is left behind, however the caller leaves; but those that have nothing
    more to do are taken from, and given to, `idle` if there is such a list.
    """
    pickled = work if isinstance(work, bytes) else pickle.dumps(work)
    waiting, again, crew = iter(items), deque[Task](), list[Worker]()

    def following() -> Task | None:
        if again:
            return again.popleft()
        new = next(waiting, None)
        return None if new is None else Task(*new)

    try:
        while True:
            while len(crew) < workers and (task := following()) is not None:
                crew.append(idle.pop() if idle else Worker(pickled, timeout))
                crew[-1].give(task)
            if not crew:
                return
            wait([worker.connection for worker in crew], min(worker.rest() for worker in crew))
            for worker in list(crew):
                said, task = worker.hear(), worker.task
                if said is None or task is None:
                    continue
                kind, value = said
                if kind == "stop" or (kind in _LOST and not worker.ready):
                    raise CrewError(value if kind == "stop" else f"a process could not start: {value}")
                if kind in _LOST:
                    crew.remove(worker)
                    worker.end()
                    if task.tries < _TRIES:
                        again.append(task._replace(tries=task.tries + 1))
                    else:
                        yield task.number, Outcome(None, (kind, value))
                    continue
                if (new := following()) is not None:  # before the caller takes its time over the outcome
                    worker.give(new)
                else:
                    crew.remove(worker)
                    worker.end() if idle is None else idle.append(worker)
                yield task.number, Outcome(value) if kind == "done" else Outcome(None, value)
    finally:
        for worker in crew:
            worker.end()


def serve() -> None:
    """What a process of the crew runs, until nobody listens any more."""
    connection, timeout = Connection(int(sys.argv[2])), float(sys.argv[3])
    # Should nobody be there to end it, a timer of the kernel does, whatever it is doing, even in C with the lock held.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with suppress(EOFError, OSError):  # the other end is gone
        try:
            work = pickle.loads(connection.recv_bytes())
        except (ImportError, AttributeError) as error:
            connection.send(("stop", str(error)))
            return
        connection.send(("ready", None))
        while True:
            item = connection.recv()
            signal.setitimer(signal.ITIMER_REAL, 2 * timeout)
            said = _said(work, item)
            signal.setitimer(signal.ITIMER_REAL, 0)
            connection.send(said)


def _said(work: Callable[[Any], Any], item: Any) -> tuple[str, Any]:
    try:
        return "done", work(item)
    except ImportError as error:
        return "stop", str(error)
    except Exception as error:  # whatever an image brings about must not end the run
        kind, reason = getattr(error, "kind", None), getattr(error, "reason", None)
        if isinstance(kind, str) and isinstance(reason, str):
            return "failed", (kind, reason)
        return "failed", ("error", f"{type(error).__name__}: {error}")

"""Functions of an item for the tests of the driver: quick ones and such as end or stop their process."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any


class UnreadableError(Exception):
    """A failure with a kind, as `ReadError` has one."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(kind, reason)
        self.kind, self.reason = kind, reason


def square(item: int) -> int:
    return item * item


def slow_square(item: int) -> int:
    time.sleep(0.005)
    return item * item


def behave(item: Any) -> Any:
    """What the item says: a number is squared, a word done, a path means dying where it is not there yet."""
    if item == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if item == "exit":
        os._exit(3)
    if item == "hang":
        while True:
            time.sleep(1)
    if item == "unreadable":
        raise UnreadableError("damaged", "half of it is missing")
    if item == "bug":
        raise ValueError("no such colour")
    if item == "no package":
        import a_package_that_is_not_there  # noqa: F401
    if isinstance(item, Path):
        if not item.exists():
            item.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return str(item.name)
    return item * item


def note_and_square(item: tuple[str, int]) -> int:
    """Leaves the process's id in a file beside which others do."""
    folder, number = item
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(0.02)
    return number * number


def encode(rows: list[tuple[str, Any]]) -> tuple[bytes, dict[str, Any]]:
    """A shard as text; its entry has the sum of what lengths it holds."""
    return json.dumps(rows).encode(), {"boxes": sum(len(name) for name, _ in rows)}


def numbers(count: int) -> list[str]:
    return [f"{i}.jpg" for i in range(count)]


def behave_slowly(item: Any) -> Any:
    time.sleep(0.02)
    return behave(item)


def hang(item: str) -> None:
    """Leaves a file when it begins, and hears nothing from then on but the kernel."""
    signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals) - {signal.SIGALRM})
    Path(item).touch()
    while True:
        signal.pause()

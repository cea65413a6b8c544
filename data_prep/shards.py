"""The driver of long jobs: a pure function of each image, results in numbered shards, and never the same work twice.

In the folder of a job lie `job.json` (what it is, written first), `shard-00000.parquet` and on, and beside each shard
`shard-00000.json`, its entry, written after it: a shard that has an entry is done. Every file is written under another
name and then moved to its own, so a job that was killed at any moment goes on by being started again.
"""

import fcntl
import hashlib
import json
import os
import sys
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.shard_cluster import on_cluster
from data_prep.shard_crew import Outcome, outcomes

_PART = ".part"

Entry = dict[str, Any]  # of a shard: file, images, failures, bytes, crc, and what `encode` adds


class JobError(Exception):
    """A folder that this job cannot be continued in, in one line."""


@dataclass(frozen=True)
class Job:
    """What to make of which images, and where.

    `work` is a pure function of an item, known by its module's name; `encode` gives the bytes of a shard and what to
    add to its entry, from (name, result) of the images that did not fail, the same for the same.
    """

    folder: Path
    names: Sequence[str]
    items: Sequence[Any]
    work: Callable[[Any], Any]
    encode: Callable[[list[tuple[str, Any]]], tuple[bytes, Entry]]
    about: dict[str, Any]  # what must not change while it goes on
    versions: dict[str, str] = field(default_factory=dict)  # what may, but not unnoticed
    shard_size: int = 1000

    def __len__(self) -> int:
        return -(-len(self.names) // self.shard_size)

    def rows(self, number: int) -> range:
        """The images of a shard."""
        return range(number * self.shard_size, min((number + 1) * self.shard_size, len(self.names)))


class Made(NamedTuple):
    """The entries of all shards, the versions of what made them, and how many images were done in this run."""

    entries: list[Entry]
    versions: list[dict[str, str]]
    fresh: int


def hash_of(names: Sequence[str]) -> str:
    """A hash of a list of images: their names in order.

    >>> hash_of(["a.jpg", "b.jpg"]) == hash_of(["b.jpg", "a.jpg"])
    False
    """
    digest = hashlib.blake2b(digest_size=16)
    for name in names:
        digest.update(name.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that is either whole or not there."""
    part = path.with_name(path.name + _PART)
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def run(
    job: Job, *, workers: int = 1, timeout: float = 120.0, repair: bool = False, cluster: str | None = None
) -> Made:
    """Make the shards that are not there yet.

    `repair` makes damaged shards anew, which stop a run otherwise. `cluster` is the address of a Dask scheduler, or
    "local" for one of `workers` processes; its workers read the images, and all is written here.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    with alone(job.folder):
        versions = _agree(job)
        entries, damaged = _look(job)
        if damaged and not repair:
            told = "; ".join(f"shard {name}: {problem}" for name, problem in damaged.items())
            raise JobError(f"{job.folder} is damaged: {told}. Add --repair to make them anew")
        for file in job.folder.glob("*" + _PART):
            file.unlink()
        pending = [number for number in range(len(job)) if number not in entries]
        todo = ([(row, job.items[row]) for row in job.rows(number)] for number in pending)
        if cluster and pending:
            made = on_cluster(job.work, todo, cluster, workers=workers, timeout=timeout)
        else:
            made = outcomes(job.work, chain.from_iterable(todo), workers=workers, timeout=timeout)
        done = sum(len(job.rows(number)) for number in entries)
        entries |= _write_all(job, made, done)
    return Made([entries[number] for number in range(len(job))], versions, len(job.names) - done)


def _write_all(job: Job, made: Generator[tuple[int, Outcome], None, None], done: int) -> dict[int, Entry]:
    """Write each shard when the last of its images is done, in a thread, since encoding may take seconds."""
    parts: dict[int, dict[int, Outcome]] = {}
    entries: dict[int, Entry] = {}
    writing: deque[tuple[int, Future[Entry]]] = deque()

    def collect(most: int) -> None:
        while len(writing) > most:
            number, future = writing.popleft()
            entries[number] = future.result()

    with ThreadPoolExecutor(1) as writer, progress(len(job.names), done) as tick, closing(made) as results:
        for row, outcome in results:
            number = row // job.shard_size
            part = parts.setdefault(number, {})
            part[row] = outcome
            if len(part) == len(job.rows(number)):
                writing.append((number, writer.submit(_write, job, number, parts.pop(number))))
                collect(2)
            tick()
        collect(0)
    return entries


def _write(job: Job, number: int, part: dict[int, Outcome]) -> Entry:
    """Write a shard, then its entry."""
    good = [(job.names[row], part[row].value) for row in sorted(part) if part[row].failure is None]
    failures = [[job.names[row], *outcome.failure] for row, outcome in sorted(part.items()) if outcome.failure]
    data, more = job.encode(good)
    file = f"shard-{number:05d}.parquet"
    entry = {
        "file": file, "images": len(good), "failures": failures, "bytes": len(data), "crc": zlib.crc32(data), **more
    }  # fmt: skip
    write_atomically(job.folder / file, data)
    write_atomically((job.folder / file).with_suffix(".json"), _json(entry))
    return entry


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode()


def _agree(job: Job) -> list[dict[str, str]]:
    """Say in job.json what the job is, or check that it says the same; the versions it was worked on with."""
    file = job.folder / "job.json"
    images = {"count": len(job.names), "hash": hash_of(job.names)}
    mine = json.loads(_json({"about": job.about, "images": images, "shard_size": job.shard_size}))
    versions: list[dict[str, str]] = []
    if file.exists():
        try:
            theirs = json.loads(file.read_bytes())
            versions = theirs.pop("versions")
        except (ValueError, AttributeError, KeyError, TypeError):
            raise JobError(f"{file} is damaged: choose another folder") from None
        if differing := list(_differences("", theirs, mine)):
            raise JobError(f"{job.folder} was made otherwise and is not continued: {'; '.join(differing)}")
        if versions and job.versions not in versions:
            told = ", ".join(_differences("", versions[-1], job.versions))
            print(f"{job.folder} goes on under other versions: {told}", file=sys.stderr)
    elif found := sorted(path.name for path in job.folder.iterdir() if not path.name.endswith(_PART)):
        raise JobError(f"{job.folder} is not empty and has no job.json: it holds {', '.join(found[:3])}")
    if job.versions not in versions:
        versions = [*versions, job.versions]
        write_atomically(file, _json({**mine, "versions": versions}))
    return versions


def _differences(name: str, theirs: Any, mine: Any) -> Iterator[str]:
    if isinstance(theirs, dict) and isinstance(mine, dict):
        for key in sorted({*theirs, *mine}):
            inner = f"{name}.{key}" if name else key
            yield from _differences(inner, theirs.get(key, "none"), mine.get(key, "none"))
    elif theirs != mine:
        yield f"{name} was {theirs} and is now {mine}"


def _look(job: Job) -> tuple[dict[int, Entry], dict[str, str]]:
    """The entries of the shards that are done, and by file what is wrong with those that are damaged."""
    entries, damaged = {}, {}
    for number in range(len(job)):
        file = job.folder / f"shard-{number:05d}.parquet"
        try:
            entry = json.loads(file.with_suffix(".json").read_bytes())
            size, crc = entry["bytes"], entry["crc"]
            whole = entry["file"] == file.name and entry["images"] + len(entry["failures"]) == len(job.rows(number))
        except FileNotFoundError:
            continue
        except (ValueError, KeyError, TypeError):
            damaged[file.name] = "its entry cannot be read"
            continue
        data = file.read_bytes() if file.is_file() else None
        if data is None or not whole:
            damaged[file.name] = "it is missing" if data is None else "its entry is of another shard"
        elif len(data) != size:
            damaged[file.name] = f"it is cut short, {len(data):,} of {size:,} bytes"
        elif zlib.crc32(data) != crc:
            damaged[file.name] = "its checksum is not the one written"
        else:
            entries[number] = entry
    return entries, damaged


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Refuse a second run on a folder; the lock goes with the process, however it ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise JobError(f"{folder} is being worked on by another run") from None
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(handle)


@contextmanager
def progress(total: int, done: int) -> Iterator[Callable[[], Any]]:
    """A bar with images per second and the time left; in a log a line a minute."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda: None
        return
    often = {} if sys.stderr.isatty() else {"mininterval": 60.0, "delay": 60.0}
    with tqdm(total=total, initial=done, unit="image", leave=False, **often) as bar:
        yield bar.update

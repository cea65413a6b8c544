"""Many images from a web server into a folder: in parallel, each file whole or not there, never one of them twice.

In the folder come to lie `images/ID.jpg` and `downloads.jsonl`, to which a line is added for each image that is there:
its bytes, SHA-256, height and width. A run that was killed goes on by being started again; an image that is there
without a line is looked at, one whose size is not the line's is fetched anew.
"""

import hashlib
import io
import json
import os
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

from PIL import Image

from data_prep.image_server import FetchError, ImageServer
from data_prep.shards import alone, progress

QUALITY = 90  # of what is encoded anew
_PART = re.compile(r"[0-9a-f]{16}\.jpg\.part")
_ID = re.compile(r"[0-9a-f]{16}")
_IN_A_ROW = 500  # images not to be had one after the other: the server is gone, or the address wrong
_PAUSE, _LONGEST_PAUSE = 0.5, 30.0  # seconds before the second try, and at most before one


@dataclass(frozen=True)
class Wanted:
    """Which images to get from where, and how."""

    ids: Sequence[str]
    split: str  # train, validation or test: the folder at the address
    folder: Path
    address: str
    connections: int = 64
    retries: int = 5
    timeout: float = 60.0
    max_side: int | None = None  # longer images are made smaller as they come
    quality: int = QUALITY  # of those


class Stored(NamedTuple):
    """A file that is there."""

    bytes: int
    sha256: str
    height: int
    width: int
    max_side: int | None = None


@dataclass
class Downloaded:
    """What is there of what was wanted, and why the rest is not."""

    images: dict[str, Stored] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)  # the server has none such
    failures: dict[str, list[tuple[str, str]]] = field(default_factory=dict)  # by kind: id, reason
    fetched: int = 0
    stopped: str | None = None  # why the rest was not tried


def download(wanted: Wanted) -> Downloaded:
    """Get what is not there yet. One server, many threads, which share out the images one by one."""
    if bad := [identity for identity in wanted.ids if not _ID.fullmatch(identity)]:
        raise ValueError(f"download: ids must be 16 hex digits, got {bad[0]!r}")
    (wanted.folder / "images").mkdir(parents=True, exist_ok=True)
    with alone(wanted.folder / "images"), _Journal(wanted.folder / "downloads.jsonl") as journal:
        there = dict(_files(wanted.folder / "images"))
        result, todo = Downloaded(), SimpleQueue[tuple[str, bool]]()
        for identity in wanted.ids:
            known, size = journal.known.get(identity), there.get(f"{identity}.jpg")
            if known is not None and known.bytes == size and known.max_side == wanted.max_side:
                result.images[identity] = known
            else:
                todo.put((identity, known is None and size is not None))
        if todo.qsize():
            _run(wanted, todo, result, journal)
    result.missing.sort()
    for found in result.failures.values():
        found.sort()
    return result


def _files(folder: Path) -> list[tuple[str, int]]:
    """Names and sizes of the images there; what a killed run left half-way is deleted."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if _PART.fullmatch(entry.name):
                os.unlink(entry.path)
            elif entry.is_file():
                found.append((entry.name, entry.stat().st_size))
    return found


class _Journal:
    """The lines of downloads.jsonl; the last may be torn."""

    def __init__(self, path: Path) -> None:
        self.known: dict[str, Stored] = {}
        data = path.read_bytes() if path.exists() else b""
        for line in data.split(b"\n"):
            try:
                entry = json.loads(line)
                identity = entry.pop("id")
                self.known[identity] = Stored(**entry)
            except (ValueError, TypeError, AttributeError, KeyError):
                continue
        self._file = path.open("ab", buffering=0)
        if data and not data.endswith(b"\n"):
            self._file.write(b"\n")

    def __enter__(self) -> "_Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, identity: str, stored: Stored) -> None:
        """A line in one write, so that it is there or not."""
        self._file.write(json.dumps({"id": identity, **stored._asdict()}).encode() + b"\n")


def _run(wanted: Wanted, todo: SimpleQueue[tuple[str, bool]], result: Downloaded, journal: _Journal) -> None:
    count, done = todo.qsize(), len(result.images)
    answers: SimpleQueue[tuple[str, Any, bool]] = SimpleQueue()
    stop = threading.Event()
    for _ in range(min(wanted.connections, count)):
        threading.Thread(target=_work, args=(wanted, todo, answers, stop), daemon=True).start()
    in_a_row = 0
    try:
        with progress(count + done, done) as tick:
            for _ in range(count):
                identity, answer, fresh = answers.get()
                in_a_row = 0 if isinstance(answer, Stored) else in_a_row + 1
                if isinstance(answer, Stored):
                    journal.add(identity, answer)
                    result.images[identity] = answer
                    result.fetched += fresh
                elif not isinstance(answer, FetchError):
                    raise answer
                elif answer.kind == "missing":
                    result.missing.append(identity)
                else:
                    result.failures.setdefault(answer.kind, []).append((identity, answer.reason))
                tick()
                if in_a_row >= _IN_A_ROW:
                    result.stopped = f"{in_a_row} images in a row were not to be had, the last for {answer}"
                    return
    finally:
        stop.set()


def _work(
    wanted: Wanted,
    todo: SimpleQueue[tuple[str, bool]],
    answers: SimpleQueue[tuple[str, Any, bool]],
    stop: threading.Event,
) -> None:
    """One thread: an image after the other, until there is none left."""
    server = ImageServer(wanted.timeout)
    while not stop.is_set():
        try:
            identity, there = todo.get_nowait()
        except Empty:
            break
        path = wanted.folder / "images" / f"{identity}.jpg"
        try:
            found = _adopted(path, wanted) if there else None
            answer: Any = found or _fetched(server, path, wanted, stop)
        except Exception as error:  # a full disk, say: the main thread raises it
            found, answer = None, error
        answers.put((identity, answer, found is None))
    server.close()


def _adopted(path: Path, wanted: Wanted) -> Stored | None:
    """What lies there already, where it is what would be stored."""
    try:
        data = path.read_bytes()
        made, stored = _image(data, wanted)
    except FetchError:
        return None
    return stored if made == data else None


def _fetched(server: ImageServer, path: Path, wanted: Wanted, stop: threading.Event) -> Stored:
    """Ask until the image is there, with longer and longer pauses, which no two images have alike."""
    for attempt in range(wanted.retries + 1):
        try:
            data, stored = _image(server.get(f"{wanted.address}/{wanted.split}/{path.name}"), wanted)
            part = path.with_name(path.name + ".part")
            part.write_bytes(data)
            os.replace(part, path)
            return stored
        except FetchError as error:
            if not error.again or attempt == wanted.retries or stop.is_set():
                raise
            share = 0.5 + (int(path.stem, 16) >> attempt) % 1024 / 1024
            stop.wait(max(error.wait, share * min(_LONGEST_PAUSE, _PAUSE * 2**attempt)))
    raise AssertionError("unreachable")


def _image(data: bytes, wanted: Wanted) -> tuple[bytes, Stored]:
    """The bytes to store, made smaller where asked for, and what is to be said of them."""
    if not data.startswith(b"\xff\xd8\xff"):
        raise FetchError("no JPEG", f"it begins with {data[:24]!r}")
    if b"\xff\xd9" not in data[-4096:]:
        raise FetchError("cut short", f"no end of a JPEG after {len(data):,} bytes")
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            width, height = image.size
            if wanted.max_side is not None and max(width, height) > wanted.max_side:
                share = wanted.max_side / max(width, height)
                width, height = (max(1, round(side * share)) for side in (width, height))
                colours = image if image.mode in ("L", "RGB") else image.convert("RGB")
                made = io.BytesIO()
                colours.resize((width, height), Image.Resampling.BILINEAR).save(made, "JPEG", quality=wanted.quality)
                data = made.getvalue()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise FetchError("no JPEG", f"it cannot be read: {str(error)[:80]}") from None
    return data, Stored(len(data), hashlib.sha256(data).hexdigest(), height, width, wanted.max_side)

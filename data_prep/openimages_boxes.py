"""Open Images' CSV of boxes as arrays, by image: read in blocks, hashed while read, and parsed by threads meanwhile.

Rows stay in the memory, 23 bytes each, so that duplicates are found and the chosen images written without reading the
file again. Arrow is the library that reads, a block at a time, what is not plain (openimages_plain.py): Polars and
DuckDB read faster, but take more than a GiB for the columns alone (benchmarks/results/openimages.md).
"""

import csv
import gzip
import hashlib
import io
import os
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from data_prep.openimages_classes import Classes
from data_prep.openimages_parser import COLUMNS, Parsed, Parser, Problems
from data_prep.openimages_plain import MARGIN, Block

_BLOCK = 2**20  # bytes; with smaller and with larger ones it was slower
_LONGEST = 2**24  # bytes without an end of line: no CSV
_MOST_REFUSED = 100_000  # lines that Arrow refuses; finding one takes as long as reading thousands


class CsvError(Exception):
    """A file that is not what it should be, in one line."""


@dataclass(frozen=True)
class Boxes:
    """The good rows, those of an image side by side; image i, by rising id, owns rows starts[i] to ends[i]."""

    ids: npt.NDArray[np.uint64]
    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]
    classes: npt.NDArray[np.uint16]
    corners: npt.NDArray[np.float32]  # [rows, 4] xyxy, unit coordinates
    flags: npt.NDArray[np.uint8]
    lines: npt.NDArray[np.uint32]


class Read(NamedTuple):
    """A file of boxes: what it holds, what is wrong with it, and its fingerprint."""

    boxes: Boxes
    problems: Problems
    bytes: int
    sha256: str


def read_boxes(path: Path, classes: Classes) -> Read:
    """All good rows of a CSV of boxes, plain or gzipped, with the columns of V4 to V7 in any order."""
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    workers = max(2, os.cpu_count() or 2)
    with _Hashed(path) as raw, ThreadPoolExecutor(workers) as pool:
        stream: Any = gzip.GzipFile(fileobj=raw) if packed else raw
        gathered, waiting = _Gathered(), deque[Future[Parsed]]()
        try:
            blocks = _blocks(stream)
            titles, _, start = next(blocks, _block(b"")).text().partition(b"\n")
            parser = Parser(_titles(titles, path), classes)
            for block in chain((_block(start),), blocks):
                waiting.append(pool.submit(parser, block))
                if len(waiting) > 2 * workers:
                    gathered.add(waiting.popleft().result())
            while waiting:
                gathered.add(waiting.popleft().result())
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise CsvError(f"{path} is damaged: {error}") from None
        finally:
            for future in waiting:
                future.cancel()
        return Read(gathered.boxes(), gathered.problems, raw.size, raw.sha256.hexdigest())


def _titles(line: bytes, path: Path) -> list[str]:
    """The names of the columns, which must be those of Open Images' boxes."""
    titles = [title.strip() for title in next(csv.reader([line.decode("utf-8-sig", "backslashreplace").strip()]), [])]
    if missing := [name for name in COLUMNS if name not in titles]:
        raise ValueError(
            f"--boxes must have the columns of Open Images' boxes, got {path} without {', '.join(missing)}"
        )
    if len(set(titles)) < len(titles):
        raise ValueError(f"--boxes must have each column once, got {path} with {','.join(titles)}")
    return titles


class _Gathered:
    """The pieces of a file so far; each column grows in place, since two copies of it would not fit the memory."""

    def __init__(self) -> None:
        self.problems = Problems()
        self._ids, self._starts, self._columns = bytearray(), bytearray(), [bytearray() for _ in range(4)]
        self._rows, self._line, self._last = 0, 2, -1  # how many rows; the next line; the last id

    def add(self, parsed: Parsed) -> None:
        """Append the rows of the next block."""
        self.problems.merge(parsed.problems, self._line)
        if self.problems.refused > _MOST_REFUSED:
            kinds = ", ".join(f"{number:,} x {kind}" for kind, number in self.problems.kinds.most_common(3))
            line, reason = self.problems.first[0]
            raise CsvError(f"too many rows cannot be read: {kinds}, such as line {line}: {reason}")
        for ids, starts, classes, corners, flags, lines in parsed.pieces:
            if not len(ids):
                continue
            goes_on = int(int(ids[0]) == self._last)  # the image of the rows before
            self._ids += ids[goes_on:].data
            self._starts += (starts[goes_on:] + self._rows).data
            self._last, self._rows = int(ids[-1]), self._rows + len(lines)
            for column, values in zip(
                self._columns, (classes, corners, flags, lines + np.uint32(self._line)), strict=True
            ):
                column += np.ascontiguousarray(values).data.cast("B")
        self._line += parsed.length

    def boxes(self) -> Boxes:
        """All of them by image; where the rows of one lie apart, rows are moved."""
        types = np.uint16, np.float32, np.uint8, np.uint32
        classes, corners, flags, lines = map(np.frombuffer, self._columns, types)
        columns = [classes, corners.reshape(-1, 4), flags, lines]
        ids, starts = np.frombuffer(self._ids, np.uint64), np.frombuffer(self._starts, np.int64)
        ends = np.append(starts[1:], self._rows)
        order = np.argsort(ids, kind="stable")
        runs = ids[order]
        if (runs[1:] == runs[:-1]).any():
            lengths = (ends - starts)[order]
            after = np.cumsum(lengths)
            rows = np.arange(self._rows) + np.repeat(starts[order] - after + lengths, lengths)
            columns = [column[rows] for column in columns]
            first = np.append(True, runs[1:] != runs[:-1])
            starts, order = (after - lengths)[first], np.arange(int(first.sum()))
            ids, ends = runs[first], np.append(starts[1:], self._rows)
        return Boxes(ids[order], starts[order], ends[order], *columns)


class _Hashed(io.RawIOBase):
    """A file that is hashed as it is read."""

    def __init__(self, path: Path) -> None:
        self._file, self.size, self.sha256 = path.open("rb", buffering=0), 0, hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer) or 0
        self.sha256.update(memoryview(buffer)[:count])
        self.size += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _block(text: bytes) -> Block:
    return Block(bytearray(MARGIN) + text + bytes(MARGIN), MARGIN + len(text))


def _blocks(stream: Any) -> Iterator[Block]:
    """The file in pieces that end with a line."""
    rest = b""
    while True:
        buffer, start = bytearray(2 * MARGIN + len(rest) + _BLOCK), MARGIN + len(rest)
        buffer[MARGIN:start] = rest
        with memoryview(buffer)[start : start + _BLOCK] as room:
            end = start + stream.readinto(room)
        if end == start:
            break
        cut = buffer.rfind(b"\n", MARGIN, end) + 1
        rest = bytes(memoryview(buffer)[cut or MARGIN : end])
        if cut:
            yield Block(buffer, cut)
        if len(rest) > _LONGEST:
            raise CsvError(f"a line of more than {_LONGEST:,} bytes: no CSV")
    if rest:
        yield _block(rest + b"\n")

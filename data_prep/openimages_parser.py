"""Lines of Open Images' CSV of boxes to arrays; what is wrong with one is told by its number.

Arrow alone decides what can be read: a block that it refuses is halved until the lines it refuses stand alone, so that
what becomes of a row never depends on its neighbours. The other checks are the same for every row. A block without any
difficulty is read by a compiled loop instead, which gives the same (openimages_plain.py).
"""

import csv
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from data_prep import openimages_plain
from data_prep.openimages_classes import Classes
from data_prep.openimages_plain import DEPICTION, GROUP, NIBBLE, Array, Block, Piece, ids_of

TOLD = 10  # problems that are told one by one
_SIDES, _FLAGS = ("XMin", "XMax", "YMin", "YMax"), ("IsGroupOf", "IsDepiction")
COLUMNS = ("ImageID", "LabelName", *_SIDES, *_FLAGS)  # what is read of the 13 (V4, V5) or 21 (V6, V7)
KINDS = ("", "bad image id", "unknown class", "box outside [0, 1]", "box reversed or without area", "bad flag")


@dataclass
class Problems:
    """What is wrong with rows: how many by kind, and the first few with line and reason."""

    kinds: Counter[str] = field(default_factory=Counter)
    first: list[tuple[int, str]] = field(default_factory=list)
    refused: int = 0  # lines that Arrow could not read

    def add(self, kind: str, lines: Array, reasons: list[str]) -> None:
        """Count rows of one kind; `reasons` are those of the first of them."""
        self.kinds[kind] += len(lines)
        self.first = sorted([*self.first, *zip(lines.tolist(), reasons, strict=False)])[:TOLD]

    def merge(self, other: "Problems", before: int = 0) -> None:
        """Take over those of another part of the file, `before` lines of which come before it."""
        self.kinds.update(other.kinds)
        self.first = sorted([*self.first, *((before + line, reason) for line, reason in other.first)])[:TOLD]
        self.refused += other.refused


class Parsed(NamedTuple):
    """A block: its good rows in a few pieces, how many lines it has, and what is wrong with others of them."""

    pieces: list[Piece]
    length: int
    problems: Problems


class Parser:
    """Blocks of one file to arrays; used by several threads at once."""

    def __init__(self, titles: list[str], classes: Classes) -> None:
        try:
            import pyarrow
            import pyarrow.csv
        except ImportError:
            raise ImportError("reading Open Images' boxes needs pyarrow: pip install 'geoaug[prep]'") from None
        self._arrow, self._csv, self._titles = pyarrow, pyarrow.csv, titles
        self._plain = openimages_plain.PlainLines(titles, classes.mids)
        self._class_of = {mid: i for i, mid in enumerate(classes.mids)}
        self._types: dict[str, Any] = {
            "ImageID": pyarrow.binary(16),
            "LabelName": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
            **dict.fromkeys(_SIDES, pyarrow.float64()),
            **dict.fromkeys(_FLAGS, pyarrow.int8()),
        }
        self._lines = pyarrow.csv.ParseOptions(ignore_empty_lines=False)
        self._columns = pyarrow.csv.ConvertOptions(
            column_types=self._types, include_columns=list(self._types), null_values=[], strings_can_be_null=False
        )

    def __call__(self, block: Block) -> Parsed:
        """The good rows of whole lines."""
        parsed = Parsed([], 0, Problems())
        piece = self._plain(block) if openimages_plain.compiled() else None
        if piece is None:
            return parsed._replace(length=self._parse(block.text(), 0, parsed))
        parsed.pieces.append(piece)
        return parsed._replace(length=len(piece.lines))

    def _parse(self, block: bytes, line: int, parsed: Parsed) -> int:
        """Append what a part of a block holds, `line` lines of which come before it; how many lines it has."""
        read = self._csv.ReadOptions(use_threads=False, block_size=len(block) + 1, column_names=self._titles)
        try:
            table = self._csv.read_csv(self._arrow.BufferReader(block), read, self._lines, self._columns)
            refusal = "it is not one row"
        except self._arrow.ArrowInvalid as error:
            table, refusal = None, str(error)
        # A row is a line unless a quote runs on to the next one, or a carriage return ends one.
        plain = table is not None and b'"' not in block and b"\r" not in block
        count = len(table) if plain else block.count(b"\n")
        if table is not None and len(table) == count:
            parsed.pieces.append(self._checked(table, line, parsed.problems))
        elif count > 1:
            cut = block.find(b"\n", len(block) // 2, len(block) - 1) + 1 or block.rfind(b"\n", 0, -1) + 1
            first = self._parse(block[:cut], line, parsed)
            self._parse(block[cut:], line + first, parsed)
        elif block.strip():
            parsed.problems.refused += 1
            parsed.problems.add(*self._refused(block, line, refusal))
        return count

    def _refused(self, block: bytes, line: int, refusal: str) -> tuple[str, Array, list[str]]:
        """What is wrong with a line that Arrow does not read."""
        lines = np.array([line])
        try:
            (row,) = csv.reader([block.decode(errors="backslashreplace").rstrip("\r\n")], strict=True)
        except (csv.Error, ValueError):
            return "bad row", lines, [f"cannot be read: {refusal[:120]}"]
        if len(row) != len(self._titles):
            return "row of too few or many fields", lines, [f"{len(row)} fields instead of {len(self._titles)}"]
        entry = dict(zip(self._titles, row, strict=True))
        if len(entry["ImageID"]) != 16:
            return "bad image id", lines, [_bad_id(entry["ImageID"])]
        for name in (*_SIDES, *_FLAGS):
            try:
                self._arrow.array([entry[name].strip(" \t")]).cast(self._types[name])
            except self._arrow.ArrowInvalid:
                return "bad number", lines, [f"{name} is no number: {entry[name][:40]!r}"]
        return "bad row", lines, [f"cannot be read: {refusal[:120]}"]

    def _checked(self, table: Any, line: int, problems: Problems) -> Piece:
        """The rows that hold what they should."""
        column = {name: table.column(name).chunk(0) for name in self._types}
        text = np.frombuffer(column["ImageID"].buffers()[1], dtype=np.uint8, count=16 * len(table)).reshape(-1, 16)
        labels, codes = column["LabelName"].dictionary.to_pylist(), column["LabelName"].indices.to_numpy()
        x0, x1, y0, y1 = sides = [column[name].to_numpy() for name in _SIDES]
        group, depiction = marks = [column[name].to_numpy() for name in _FLAGS]
        starts = _runs(text.view(np.uint64))
        nibbles = NIBBLE[text[starts]]
        classes = np.array([self._class_of.get(label, -1) for label in labels], dtype=np.int64)[codes]
        corners = np.stack((x0, y0, x1, y1), axis=1).astype(np.float32)
        flags = (group == 1).view(np.uint8) * np.uint8(GROUP) | (depiction == 1).view(np.uint8) * np.uint8(DEPICTION)
        lines = np.arange(line, line + len(table), dtype=np.uint32)
        faults = _faults(nibbles, starts, classes, sides, marks)
        piece = Piece(ids_of(nibbles), starts, classes.astype(np.uint16), corners, flags, lines)
        if faults is None:
            return piece

        def told(row: int) -> str:
            if faults[row] == 1:
                return _bad_id(text[row].tobytes().decode("latin-1"))
            if faults[row] == 2:
                return f"unknown class {labels[codes[row]][:40]!r}"
            box = ", ".join(f"{name} {side[row]:g}" for name, side in zip(_SIDES, sides, strict=True))
            return f"{KINDS[faults[row]]}: {box if faults[row] < 5 else f'{group[row]}, {depiction[row]}'}"

        for fault in range(1, len(KINDS)):
            rows = np.flatnonzero(faults == fault)
            if len(rows):
                problems.add(KINDS[fault], lines[rows], [told(row) for row in rows[:TOLD].tolist()])
        good = faults == 0
        run = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(table)))[good]
        first = _runs(run[:, None])
        return Piece(piece.ids[run[first]], first, *(values[good] for values in piece[2:]))


def _runs(rows: Array) -> npt.NDArray[np.int64]:
    """Where a row [rows, words] differs from the one before it; the first does."""
    new = np.ones(len(rows), dtype=np.bool_)
    np.not_equal(rows[1:, 0], rows[:-1, 0], out=new[1:])
    for word in range(1, rows.shape[1]):
        new[1:] |= rows[1:, word] != rows[:-1, word]
    return np.flatnonzero(new)


def _faults(nibbles: Array, starts: Array, classes: Array, sides: list[Array], marks: list[Array]) -> Array | None:
    """By row 0 or the first of KINDS that it is; None where all rows are good, which is quicker to see."""
    x0, x1, y0, y1 = sides
    if not len(starts) or (
        nibbles.max() < 16 and classes.min() >= 0 and min(x0.min(), y0.min()) >= 0 and max(x1.max(), y1.max()) <= 1
        and (x0 < x1).all() and (y0 < y1).all() and all(mark.min() >= -1 and mark.max() <= 1 for mark in marks)
    ):  # fmt: skip
        return None
    faults = np.zeros(len(classes), dtype=np.uint8)
    faults[(np.abs(marks[0]) > 1) | (np.abs(marks[1]) > 1)] = 5
    faults[(x0 >= x1) | (y0 >= y1)] = 4
    inside = [(side >= 0) & (side <= 1) for side in sides]  # and a number
    faults[~np.logical_and.reduce(inside)] = 3
    faults[classes < 0] = 2
    faults[np.repeat((nibbles > 15).any(axis=1), np.diff(starts, append=len(classes)))] = 1
    return faults


def _bad_id(text: str) -> str:
    return f"image id {text[:40]!r} is not 16 hex digits"

"""The lines that Open Images' own files consist of, to arrays by a compiled loop, which takes less time than Arrow.

A block is plain if each of its lines has nothing but fields between commas, an id of 16 hex digits, a known class of at
most 16 bytes, numbers such as 1 or 0.195312, a box with an area inside [0, 1], and flags 0, 1 or -1. Any other block is
left to Arrow as a whole, so it is never said here what is wrong with a line.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

MARGIN = 16  # bytes on either side of a block that may be read, whatever they are
NIBBLE = np.full(256, 255, dtype=np.uint8)
NIBBLE[np.frombuffer(b"0123456789abcdef", dtype=np.uint8)] = np.arange(16)
Array = npt.NDArray[Any]
GROUP, DEPICTION = 1, 2  # bits of `flags`

_ID, _LABEL, _GROUP, _DEPICTION, _SIDE = 1, 2, 3, 4, 5  # what a column is; from 5 on a side of the box
_ROLES = {"ImageID": _ID, "LabelName": _LABEL, "IsGroupOf": _GROUP, "IsDepiction": _DEPICTION,
          "XMin": _SIDE, "YMin": _SIDE + 1, "XMax": _SIDE + 2, "YMax": _SIDE + 3}  # fmt: skip
_FIRST = np.array(  # masks of the first n bytes of two words of eight, the first byte the lowest
    [[(1 << 8 * min(n, 8)) - 1, (1 << 8 * max(n - 8, 0)) - 1] for n in range(17)], dtype=np.uint64
)
_CLASSES = 2048  # with as many or more no block is plain: the table below grows with their square
_PLACE = np.uint64  # of indices into the text, which numba does not look at for being negative: a quarter faster
_1, _8 = _PLACE(1), _PLACE(8)
_NUMBER = 16  # longest text of a number, whose digits are then a whole number that a float64 holds


class Block(NamedTuple):
    """Whole lines of a file: buffer[MARGIN:end], with MARGIN bytes of anything behind them."""

    buffer: bytearray
    end: int

    def text(self) -> bytes:
        """The lines alone."""
        return bytes(memoryview(self.buffer)[MARGIN : self.end])


class Piece(NamedTuple):
    """The good rows of a part of a block; run r of them, from row starts[r] on, is of image ids[r]."""

    ids: npt.NDArray[np.uint64]
    starts: npt.NDArray[np.int64]
    classes: npt.NDArray[np.uint16]
    corners: npt.NDArray[np.float32]  # [rows, 4] xyxy, unit coordinates
    flags: npt.NDArray[np.uint8]  # of the bits GROUP and DEPICTION
    lines: npt.NDArray[np.uint32]  # in the block, from 0


@njit(cache=True, nogil=True, error_model="numpy")
def _parse(text, words, end, roles, slots, factors, first, box, ids, starts, classes, corners, flags):
    """How many rows and runs, -1 where a line is not plain; words[i] are bytes i to i + 7 of the text."""
    i, end, row, run, width = _PLACE(MARGIN), _PLACE(end), 0, 0, roles.shape[0]
    while i < end:
        for column in range(width):
            role, begin = roles[column], i
            if role >= _SIDE:
                value, tens = text[i] - 48, 1
                if not 0 <= value <= 9:  # the end of the last line, perhaps
                    return -1, 0
                i += _1
                if text[i] == 46:  # a point
                    i += _1
                    while 0 <= text[i] - 48 <= 9:
                        value, tens = value * 10 + text[i] - 48, tens * 10
                        i += _1
                    if not 2 < np.int64(i - begin) <= _NUMBER:
                        return -1, 0
                box[role - _SIDE] = value / tens  # of two exact numbers, so the nearest to what is written
            else:
                while text[i] > 44:  # a comma; quotes, blanks and ends of lines are below
                    i += _1
                long = np.int64(i - begin)
                if role == _ID:
                    if long != 16:
                        return -1, 0
                    one, two = words[begin], words[begin + _8]
                    if run == 0 or ids[run - 1, 0] != one or ids[run - 1, 1] != two:
                        ids[run, 0], ids[run, 1], starts[run] = one, two, row
                        run += 1
                elif role == _LABEL:
                    if not 0 < long <= 16:
                        return -1, 0
                    one, two = words[begin] & first[long, 0], words[begin + _8] & first[long, 1]
                    slot = (one * factors[0] ^ two * factors[1]) >> factors[2]
                    if slots[slot, 0] != one or slots[slot, 1] != two:
                        return -1, 0
                    classes[row] = slots[slot, 2]
                elif role:
                    if long == 1 and text[begin] == 49:
                        flags[row] |= GROUP if role == _GROUP else DEPICTION
                    elif (long != 1 or text[begin] != 48) and (
                        long != 2 or text[begin] != 45 or text[begin + _1] != 49
                    ):
                        return -1, 0
            if text[i] != (44 if column < width - 1 else 10):
                return -1, 0
            i += _1
        if not (box[0] < box[2] <= 1 and box[1] < box[3] <= 1):
            return -1, 0
        for side in range(4):
            corners[row, side] = box[side]
        row += 1
    return row, run


class PlainLines:
    """The reader of one file's plain blocks; used by several threads at once."""

    def __init__(self, titles: list[str], mids: tuple[str, ...]) -> None:
        self._roles = np.array([_ROLES.get(title, 0) for title in titles])
        known = {mid.encode(): i for i, mid in enumerate(mids) if 0 < len(mid.encode()) <= 16 and "\0" not in mid}
        known = known if len(known) < _CLASSES else {}
        words = np.array(list(known), dtype="S16").view(np.uint64).reshape(-1, 2)
        bits, draw = max(1, 2 * len(known).bit_length() - 2), np.random.default_rng(0)
        while True:  # until no two classes share a slot
            factors = draw.integers(1, 2**63, 2, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
            slots = (words[:, 0] * factors[0] ^ words[:, 1] * factors[1]) >> np.uint64(64 - bits)
            if len(np.unique(slots)) == len(slots):
                break
        self._factors = np.array([*factors, 64 - bits], dtype=np.uint64)
        self._slots = np.zeros((1 << bits, 3), dtype=np.uint64)
        self._slots[slots, :2], self._slots[slots, 2] = words, list(known.values())

    def __call__(self, block: Block) -> Piece | None:
        """The block's rows; None where one is not plain."""
        buffer, end = block
        lines = buffer.count(b"\n", MARGIN, end)
        text, words = np.frombuffer(buffer, np.uint8), np.ndarray(len(buffer) - 7, np.uint64, buffer, strides=(1,))
        ids, starts = np.empty((lines, 2), np.uint64), np.empty(lines, np.int64)
        columns = np.empty(lines, np.uint16), np.empty((lines, 4), np.float32), np.zeros(lines, np.uint8)
        tables = self._roles, self._slots, self._factors, _FIRST, np.empty(4)
        rows, runs = _parse(text, words, end, *tables, ids, starts, *columns)
        nibbles = NIBBLE[ids[:runs].view(np.uint8)]
        if rows < 0 or (nibbles > 15).any():
            return None
        return Piece(ids_of(nibbles), starts[:runs].copy(), *columns, np.arange(lines, dtype=np.uint32))


def compile_kernel() -> None:
    """Compile the loop, in one or two seconds; blocks are Arrow's until then (see `compiled`)."""
    PlainLines(list(_ROLES), ("/m/0",))(Block(bytearray(2 * MARGIN), MARGIN))


def compiled() -> bool:
    """Whether reading plain lines begins at once."""
    return bool(_parse.signatures)


def ids_of(nibbles: Array) -> npt.NDArray[np.uint64]:
    """Ids [images] of hex digits [images, 16]."""
    return (nibbles[:, 0::2] << 4 | nibbles[:, 1::2]).view(">u8").ravel().astype(np.uint64)  # type: ignore[no-any-return]

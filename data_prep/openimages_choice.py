"""Which images: duplicates out, what counts, the seeded order, and the greedy pass under the target's limits.

The order is that of 64 Philox bits of (seed, image id), then of the ids: the stream "order" of `geoaug.Key` folded with
"openimage_mini". They are made here once more, since `import geoaug` loads torch, which takes more than all else here.
"""

import gc
import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numba import njit

from data_prep.openimages_boxes import Boxes
from data_prep.openimages_classes import Shared
from data_prep.openimages_parser import TOLD, Problems
from data_prep.openimages_plain import DEPICTION, GROUP, compile_kernel

_TAG = np.uint64(int.from_bytes(hashlib.blake2b(b"openimage_mini/order").digest()[:4], "little"))
_M0, _M1, _W0, _W1 = (np.uint64(word) for word in (0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85))
_LOW, _32 = np.uint64(0xFFFFFFFF), np.uint64(32)
_FEW = 64  # boxes of an image that are compared each with each
FATES = ("without a shared class", "over a limit", "chosen", "left out by --exclude", "not reached")


@dataclass(frozen=True)
class Rules:
    """What the paper leaves open: which boxes count as objects, and which images may not be chosen."""

    group_of: bool = True  # count boxes around a group
    depictions: bool = True  # count drawings, statues and the like
    min_side: float = 0.0  # least width and height of a box that counts, as a share of its image's
    excluded: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Choice:
    """The chosen images as rows of `Boxes`, in their order, and which boxes count as objects."""

    images: npt.NDArray[np.int64]
    kept: npt.NDArray[np.bool_]  # [rows] not a duplicate
    counted: npt.NDArray[np.bool_]  # [rows] an object by the rules
    running: npt.NDArray[np.int64]  # [categories] objects chosen
    fates: dict[str, int]  # how many images came to what


@njit(cache=True, nogil=True)
def _draw(ids, seed, bits):
    """bits uint64 [images] <- the first two words of Philox4x32-10 of each id."""
    zero = np.uint64(0)
    for i in range(ids.shape[0]):
        c0, c1, c2, c3, k0, k1 = ids[i] & _LOW, ids[i] >> _32, _TAG, zero, seed, zero
        for _ in range(10):
            p0, p1 = _M0 * c0, _M1 * c2
            c0, c1, c2, c3 = (p1 >> _32) ^ c1 ^ k0, p1 & _LOW, (p0 >> _32) ^ c3 ^ k1, p0 & _LOW
            k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
        bits[i] = c0 << _32 | c1


@njit(cache=True, nogil=True)
def _mark_repeats(starts, ends, classes, corners, few, kept):
    """kept bool [rows] <- False where an earlier box of the image is the same; larger images are left to others."""
    for i in range(starts.shape[0]):
        if ends[i] - starts[i] > few:
            continue
        for a in range(starts[i] + 1, ends[i]):
            for b in range(starts[i], a):
                if (
                    classes[a] == classes[b]
                    and corners[a, 0] == corners[b, 0]
                    and corners[a, 1] == corners[b, 1]
                    and corners[a, 2] == corners[b, 2]
                    and corners[a, 3] == corners[b, 3]
                ):
                    kept[a] = False
                    break


@njit(cache=True, nogil=True)
def _choose(order, starts, ends, allowed, category, counted, limits, most, running, fates, chosen, counts, touched):
    """How many images, in this order, are chosen <- each that has a shared object and keeps all limits, until most.

    category int16 [rows] is that of the box, -1 where its class is none of the target's; counts and touched int64
    [categories] are zeros to work with.
    """
    number = 0
    for n in range(order.shape[0]):
        i = order[n]
        if number == most:
            fates[4] += 1
            continue
        if not allowed[i]:
            fates[3] += 1
            continue
        distinct = 0
        for row in range(starts[i], ends[i]):
            c = category[row]
            if c >= 0 and counted[row]:
                if counts[c] == 0:
                    touched[distinct] = c
                    distinct += 1
                counts[c] += 1
        fate = 2 if distinct else 0
        for t in range(distinct):
            c = touched[t]
            if running[c] + counts[c] > limits[c]:
                fate = 1
        for t in range(distinct):
            c = touched[t]
            if fate == 2:
                running[c] += counts[c]
            counts[c] = 0
        fates[fate] += 1
        if fate == 2:
            chosen[number] = i
            number += 1
    return number


def compile_kernels() -> None:
    """Compile what `read_boxes` and then what `choose` needs; a thread does it while the file is read."""
    none, rows = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.bool_)
    corners = np.zeros((0, 4), dtype=np.float32)
    collects = gc.isenabled()
    gc.disable()  # its rounds over numba's many objects are a tenth of the time
    try:
        compile_kernel()
        seeded_order(none.view(np.uint64), 0)
        _mark_repeats(none, none, none.astype(np.uint16), corners, _FEW, rows)
        _choose(none, none, none, rows, none.astype(np.int16), rows, none, 0, none, none, none, none, none)
    finally:
        if collects:
            gc.enable()


def seeded_order(ids: npt.NDArray[np.uint64], seed: int) -> npt.NDArray[np.int64]:
    """The rows of rising ids in the order that a seed gives them."""
    bits = np.empty(len(ids), dtype=np.uint64)
    _draw(ids, np.uint64(seed), bits)
    return np.argsort(bits, kind="stable")


def without_repeats(boxes: Boxes, problems: Problems) -> npt.NDArray[np.bool_]:
    """Which rows are no copy of an earlier one: image, class and box (to float32) the same."""
    kept = np.ones(len(boxes.classes), dtype=np.bool_)
    _mark_repeats(boxes.starts, boxes.ends, boxes.classes, boxes.corners, _FEW, kept)
    for i in np.flatnonzero(boxes.ends - boxes.starts > _FEW).tolist():
        own = slice(boxes.starts[i], boxes.ends[i])
        rows = np.column_stack((boxes.classes[own], boxes.corners[own] + np.float32(0)))
        kept[own] = False
        kept[boxes.starts[i] + np.unique(rows, axis=0, return_index=True)[1]] = True
    repeats = np.flatnonzero(~kept)
    if len(repeats):
        repeats = repeats[np.argsort(boxes.lines[repeats])]
        told = [f"the same box as in line {_first(boxes, row)}" for row in repeats[:TOLD].tolist()]
        problems.add("duplicate row", boxes.lines[repeats], told)
    return kept


def _first(boxes: Boxes, row: int) -> int:
    """The line of the first row that is the same."""
    i = int(np.flatnonzero((boxes.starts <= row) & (row < boxes.ends))[0])
    own = slice(boxes.starts[i], row + 1)
    same = (boxes.classes[own] == boxes.classes[row]) & (boxes.corners[own] == boxes.corners[row]).all(axis=1)
    return int(boxes.lines[own][np.flatnonzero(same)[0]])


def choose(boxes: Boxes, kept: npt.NDArray[np.bool_], shared: Shared, rules: Rules, most: int, seed: int) -> Choice:
    """The paper's two rules, greedily: a shared object at least, and no category above its limit at any moment."""
    counted = kept.copy()
    for counts, bit in ((rules.group_of, GROUP), (rules.depictions, DEPICTION)):
        if not counts:
            counted &= boxes.flags & bit == 0
    if rules.min_side:
        for low, high in ((0, 2), (1, 3)):
            counted &= boxes.corners[:, high].astype(np.float64) - boxes.corners[:, low] >= rules.min_side
    allowed = ~np.isin(boxes.ids, np.array(sorted(rules.excluded), dtype=np.uint64))
    category = shared.category.astype(np.int16)[boxes.classes]
    running, fates = np.zeros(len(shared.target.names), dtype=np.int64), np.zeros(len(FATES), dtype=np.int64)
    chosen = np.empty(min(most, len(boxes.ids)), dtype=np.int64)
    number = _choose(
        seeded_order(boxes.ids, seed), boxes.starts, boxes.ends, allowed, category, counted,
        shared.target.objects, most, running, fates, chosen, np.zeros_like(running), np.zeros_like(running),
    )  # fmt: skip
    return Choice(chosen[:number], kept, counted, running, dict(zip(FATES, fates.tolist(), strict=True)))

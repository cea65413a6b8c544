"""Which sample comes when and on which rank: pure functions of (ids, seed, epoch), the same for every loader.

A batch is global. Step s is order[s*B : (s+1)*B], and rank r takes its r-th contiguous part.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from ..geometry import checks
from ..geometry.rng import Key

PADDING = -1  # the row, and the id, of a slot that holds no sample


def epoch_order(
    ids: npt.NDArray[np.int64], *, seed: int, epoch: int, order: Literal["shuffle", "file"]
) -> npt.NDArray[np.int64]:
    """The rows of one epoch: the source's own order, or sorted by (64 Philox bits of the stream "order", id).

    The shuffle depends on the set of ids alone, not on how the source lists them.
    """
    checks.require(order in ("shuffle", "file"), "open_loader", "order", "'shuffle' or 'file'", repr(order))
    if order == "file":
        return np.arange(len(ids))
    words = Key(seed, epoch, torch.from_numpy(ids)).words("order", 1).numpy()
    return np.lexsort((ids, words[:, 1], words[:, 0]))


def steps_of(samples: int, batch_size: int, last: Literal["drop", "keep"]) -> int:
    """Steps of an epoch: the incomplete last batch is dropped, or kept and padded."""
    checks.require(last in ("drop", "keep"), "open_loader", "last", "'drop' or 'keep'", repr(last))
    return samples // batch_size if last == "drop" else -(-samples // batch_size)


def rows_of(
    order: npt.NDArray[np.int64], step: int, *, batch_size: int, rank: int, world: int
) -> npt.NDArray[np.int64]:
    """The rows of one rank in one step, PADDING where the last batch runs out, so that ranks stay equal."""
    share = batch_size // world
    start = step * batch_size + rank * share
    rows = order[start : start + share]
    return np.concatenate((rows, np.full(share - len(rows), PADDING, dtype=np.int64)))

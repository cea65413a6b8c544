"""Whose picture stands behind whose: a derangement of the batch that no layout of ranks changes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from ..geometry import checks
from ..geometry.rng import Key, below


def block_derangement(
    key: Key, group: int = 4, ok: Bool[Tensor, " B"] | None = None
) -> Int64[Tensor, " B"]:  # fmt: skip
    """For each row another row, drawn within consecutive blocks of `group`: no row has itself, each is had once.

    All derangements of a block are equally likely, and the draw belongs to its first row. The rows of a call start at a
    multiple of `group` in the global batch, so any layout of ranks gives the same pairs. A shorter block at the end
    deranges within itself; a row that is alone there, or whose partner is not `ok`, gets -1: a fill.

    >>> rows = block_derangement(Key(0, 0, range(9)))
    >>> bool((rows[:4] < 4).all() and (rows[4:8] >= 4).all()), int(rows[8])
    (True, -1)
    """
    where = "block_derangement"
    checks.require(isinstance(key, Key), where, "key", "a Key", checks.shape_of(key))
    group = checks.index(group, 2, 2**8, where, "group")
    batch, device = len(key), key.ids.device
    if ok is not None:
        fits = isinstance(ok, Tensor) and ok.dtype == torch.bool and ok.shape == (batch,) and ok.device == device
        checks.require(fits, where, "ok", f"bool [{batch}] on {device}", checks.shape_of(ok))
    first = torch.arange(0, batch, group, device=device)
    place = _derange(key[slice(None, None, group)], (batch - first).clamp(max=group), group)
    rows = (first[:, None] + place).flatten()[:batch]
    fill = rows == torch.arange(batch, device=device)
    if ok is not None:
        fill = fill | ~ok[rows]
    return torch.where(fill, -1, rows)


def _derange(key: Key, size: Int64[Tensor, " n"], group: int) -> Int64[Tensor, "n group"]:
    """A uniform derangement of the first `size` of `group` places, a row each; one place alone keeps itself.

    Martinez, Panholzer and Prodinger (2008): from the last place down, each one that is still free swaps with a free
    one before it, drawn uniformly, which then is closed as well with the probability that their pair is a cycle.
    """
    words = key.words("derangement", group)
    places = torch.arange(group, device=size.device)
    placed = places.expand(len(size), group)
    free = places < size[:, None]
    left = size
    close = checks.on_device(_chances(group), size)  # of each number of free places, in 2^-32
    for i in range(group - 1, 0, -1):
        turn = free[:, i] & (left >= 2)
        earlier = free & (places < i)
        high, low, coin = words[:, 4 * i : 4 * i + 3].unbind(dim=1)
        rank = below(high, low, earlier.sum(dim=1).clamp(min=1))
        j = (earlier.cumsum(dim=1) <= rank[:, None]).sum(dim=1).clamp(max=i)[:, None]
        here, there = (places == i) & turn[:, None], (places == j) & turn[:, None]
        at_j = placed.gather(1, j)
        placed = torch.where(here, at_j, torch.where(there, placed[:, i, None], placed))
        closed = turn & (coin < close[left])
        free = free & ~here & ~(there & closed[:, None])
        left = left - turn.to(left.dtype) - closed.to(left.dtype)
    return placed


def _chances(group: int) -> Sequence[int]:
    """(u - 1) D(u - 2) / D(u) for u = 0 to `group`, in 2^-32; D(u) is the number of derangements of u places."""
    derangements = [1, 0]
    for u in range(2, group + 1):
        derangements.append((u - 1) * (derangements[u - 1] + derangements[u - 2]))
    return [0, 0, *(((u - 1) * derangements[u - 2] << 32) // derangements[u] for u in range(2, group + 1))]

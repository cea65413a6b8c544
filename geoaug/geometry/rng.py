"""Randomness without state: every number is a pure function of (seed, epoch, sample id, stream, counter).

Philox4x32-10 (Salmon et al. 2011) with key words (seed, epoch) and counter words (id low, id high, tag, block), where
the tag is 4 bytes of BLAKE2b over the fold path and the stream. Three implementations give the same bits: numpy here,
torch here (any device), numba in `kernels.py` (callable from other kernels).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, SupportsIndex

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from . import checks, kernels

_LOW = 0xFFFFFFFF
_FEW = 2**16  # words that are drawn on the host sooner than a device has launched its 140 kernels
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85


def philox_numpy(counter: checks.Numbers, key: checks.Numbers) -> npt.NDArray[np.uint32]:
    """Philox4x32-10 of counters [..., 4] under keys [..., 2], as uint32 [..., 4].

    >>> [hex(word) for word in philox_numpy([0, 0, 0, 0], [0, 0])]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    words = np.asarray(counter, dtype=np.uint64)
    keys = np.asarray(key, dtype=np.uint64)
    c0, c1, c2, c3 = (words[..., i] for i in range(4))
    k0, k1 = keys[..., 0], keys[..., 1]
    low, shift = np.uint64(_LOW), np.uint64(32)
    for _ in range(10):
        p0, p1 = np.uint64(_M0) * c0, np.uint64(_M1) * c2
        c0, c1, c2, c3 = (p1 >> shift) ^ c1 ^ k0, p1 & low, (p0 >> shift) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + np.uint64(_W0)) & low, (k1 + np.uint64(_W1)) & low
    return np.stack(np.broadcast_arrays(c0, c1, c2, c3), axis=-1).astype(np.uint32)


def philox_torch(
    c0: Tensor, c1: Tensor, c2: Tensor | int, c3: Tensor | int, k0: int, k1: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 on any device; int64 tensors holding 32-bit words, broadcast against each other.

    Products wrap in int64; their bits are those of the unsigned product, so a shift and a mask give its high word.
    """
    zero = torch.zeros_like(c0)
    w0, w1, w2, w3 = c0 + zero, c1 + zero, c2 + zero, c3 + zero
    for _ in range(10):
        p0, p1 = w0 * _M0, w2 * _M1
        w0, w1 = ((p1 >> 32) & _LOW) ^ w1 ^ k0, p1 & _LOW
        w2, w3 = ((p0 >> 32) & _LOW) ^ w3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return w0, w1, w2, w3


def words_torch(ids: Tensor, tag: int, start: int, blocks: int, seed: int, epoch: int) -> Tensor:
    """The 4 * blocks words [B, 4 * blocks] of the stream `tag` of each id from block `start` on, on the ids' device."""
    block = torch.arange(start, start + blocks, device=ids.device)
    low, high = (ids & _LOW)[:, None], ((ids >> 32) & _LOW)[:, None]
    return torch.stack(philox_torch(low, high, tag, block, seed, epoch), dim=-1).flatten(1)


def unit(words: Tensor) -> Tensor:
    """float32 in [0, 1) from the top 24 bits of int64 tensors holding 32-bit words."""
    return (words >> 8).to(torch.float32) * 2.0**-24


def below(high: Tensor, low: Tensor, n: Tensor | int) -> Tensor:
    """Whole numbers in [0, n) from 64 random bits each: floor(bits * n / 2^64), n <= 2^31.

    A remainder would favour small numbers by n / 2^32 of their share; here no number's share is off by more than 2^-33
    of itself for any n, and by under 2^-48 for n <= 2^16.
    """
    return (high * n + ((low * n) >> 32)) >> 32


@dataclass(frozen=True, eq=False, init=False)
class Key:
    """Who draws: (seed, epoch) and the sample ids int64 [B], plus the path of folds that sets operators apart.

    >>> key = Key(seed=0, epoch=3, ids=[7, 8, 9])
    >>> key.uniform("brightness", 2).shape
    torch.Size([3, 2])
    >>> bool((key.fold("x1").uniform("brightness", 2) == key.fold("x2").uniform("brightness", 2)).any())
    False

    A key sent from the CPU to a device remembers its ids there: a few numbers are drawn on the host, the same bits, and
    sent without waiting; on the device they would be some 140 launches.
    """

    seed: int
    epoch: int
    ids: Int64[Tensor, " B"]
    path: tuple[str, ...] = field(default=())
    _host_ids: ClassVar[Tensor | None] = None  # no field: a key made anew knows of no host

    def __init__(self, seed: int, epoch: int, ids: checks.Numbers, path: Sequence[str] = ()) -> None:
        ids = checks.int64(ids, "Key", "ids")
        checks.require(ids.ndim == 1, "Key", "ids", "one axis [B]", checks.shape_of(ids))
        object.__setattr__(self, "seed", checks.index(seed, 0, _LOW, "Key", "seed"))
        object.__setattr__(self, "epoch", checks.index(epoch, 0, _LOW, "Key", "epoch"))
        object.__setattr__(self, "ids", ids.contiguous())
        object.__setattr__(self, "path", tuple(path))

    def fold(self, name: str) -> Key:
        """An independent key for one operator call. Folds nest, do not commute, and survive `at_epoch`."""
        if not isinstance(name, str):
            raise TypeError(f"Key.fold: name must be a string, got {name!r}")
        # "/" joins the path, so fold("a/b") would be fold("a").fold("b").
        checks.require(name != "" and "/" not in name, "Key.fold", "name", "not empty and without '/'", repr(name))
        return self._with(path=(*self.path, name))

    def _with(self, **parts: Any) -> Key:
        """A key with parts that are known to be right: checking them again would cost more than most draws."""
        key = object.__new__(Key)
        for name in ("seed", "epoch", "ids", "path", "_host_ids"):
            object.__setattr__(key, name, parts.get(name, getattr(self, name)))
        return key

    def at_epoch(self, epoch: int) -> Key:
        """The same key in another epoch."""
        return self._with(epoch=checks.index(epoch, 0, _LOW, "Key", "epoch"))

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> Key:
        """The same key with its ids, and so its draws, on another device."""
        if torch.device(device).type == "cpu":
            return self.host if self._host_ids is not None else self._with(ids=self.ids.to(device))
        near = self.ids if self.ids.device.type == "cpu" else self._host_ids
        return self._with(ids=self.ids.to(device, non_blocking=non_blocking), _host_ids=near)

    @property
    def host(self) -> Key:
        """The same key on the CPU if its ids came from there, else this one."""
        return self if self._host_ids is None else self._with(ids=self._host_ids, _host_ids=None)

    def __getitem__(self, rows: SupportsIndex | slice | Sequence[int] | Tensor) -> Key:
        """The key of some rows; one row keeps its axis, [1]."""
        row = checks.row_of(rows, len(self), "Key")
        if row is not None:
            rows = slice(row, row + 1)
        near = self._host_ids
        if isinstance(rows, slice):
            near = None if near is None else near[rows].contiguous()
            return self._with(ids=self.ids[rows].contiguous(), _host_ids=near)
        if near is not None:  # rows named on the device are not known here
            near = None if isinstance(rows, Tensor) and rows.device.type != "cpu" else near[rows]
        return replace(self, ids=self.ids[rows])._with(_host_ids=near)

    def __len__(self) -> int:
        return len(self.ids)

    def tag(self, stream: str) -> int:
        """The third counter word: 4 bytes (little-endian) of BLAKE2b over the fold path and the stream."""
        if not isinstance(stream, str):
            raise TypeError(f"Key: stream must be a string, got {stream!r}")
        name = "/".join((*self.path, stream))
        return int.from_bytes(hashlib.blake2b(name.encode()).digest()[:4], "little")

    def words(self, stream: str, blocks: int, *, start: int = 0) -> Int64[Tensor, "B words"]:
        """The 4 * blocks 32-bit words of a stream from block `start` on, as int64, for laws of one's own."""
        tag = self.tag(stream)
        if self.ids.device.type == "cpu":
            out = np.empty((len(self), 4 * blocks), dtype=np.uint32)
            kernels.fill_words(self.ids.numpy(), tag, self.seed, self.epoch, start, out)
            return torch.from_numpy(out.astype(np.int64))
        if self._host_ids is not None and 4 * blocks * len(self) <= _FEW:
            return checks.sent(self.host.words(stream, blocks, start=start), self.ids.device)
        return words_torch(self.ids, tag, start, blocks, self.seed, self.epoch)

    def uniform(self, stream: str, n: int) -> Float32[Tensor, "B n"]:
        """n numbers in [0, 1) per sample, on the device of the ids; the first of n + 1 are those of n.

        >>> Key(0, 0, [1, 2]).uniform("area", 5).shape
        torch.Size([2, 5])
        """
        n = checks.index(n, 0, 2**31, "Key.uniform", "n")
        if self.ids.device.type == "cpu":  # the same bits, without the intermediate words
            out = np.empty((len(self), n), dtype=np.float32)
            kernels.fill_unit(self.ids.numpy(), self.tag(stream), self.seed, self.epoch, out)
            return torch.from_numpy(out)
        if self._host_ids is not None and n * len(self) <= _FEW:
            return checks.sent(self.host.uniform(stream, n), self.ids.device)
        return unit(self.words(stream, (n + 3) // 4)[:, :n])

    def integers(self, stream: str, n: int, high: int | Tensor) -> Int64[Tensor, "B n"]:
        """n whole numbers in [0, high) per sample, without modulo bias; high may be a tensor that broadcasts to [B, n].

        >>> bool((Key(0, 0, range(100)).integers("slot", 3, 5) < 5).all())
        True
        """
        n = checks.index(n, 0, 2**31, "Key.integers", "n")
        if isinstance(high, Tensor):
            whole = not high.is_floating_point() and high.dtype != torch.bool
            checks.require(whole, "Key.integers", "high", "integers", checks.shape_of(high))
            if checks.values_visible(high):
                ok = bool(((high >= 1) & (high <= 2**31)).all())
                checks.require(ok, "Key.integers", "high", "in [1, 2^31]", "values outside")
        else:
            high = checks.index(high, 1, 2**31, "Key.integers", "high")
        words = self.words(stream, (n + 1) // 2)[:, : 2 * n]
        return below(words[:, 0::2], words[:, 1::2], high)

"""`ProposalStore`: boxes of many images on disk, in Parquet shards, and read by sample id.

A store is a folder: `manifest.json` (written last, so a folder that has it is whole), shards `shard-00000.parquet` and
on (see `shard_files`), and `index/`, flat arrays made from the shards once and memory-mapped from then on. Boxes are
xyxy in source pixels with exclusive edges, in their maker's order.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..geometry import checks
from ..geometry.rng import Key
from .shard_files import Record, first_names, read_manifest, read_shards, write_atomically, write_manifest, write_shard
from .soco_json import read_soco

_ARRAYS = ("ids", "offsets", "sizes", "boxes")


@dataclass(frozen=True, eq=False)
class ProposalStore:
    """A store opened for reading; rows are sorted by id.

    >>> store = ProposalStore.open("proposals")                                           # doctest: +SKIP
    >>> boxes, valid = store.padded(batch.plan.ids, 64, key=batch.key)                    # doctest: +SKIP
    """

    path: Path
    manifest: dict[str, Any]
    ids: npt.NDArray[np.int64]  # [N], sorted
    offsets: npt.NDArray[np.int64]  # [N + 1]
    sizes: npt.NDArray[np.int32]  # [N, 2] (height, width) of the source
    flat: npt.NDArray[np.uint16]  # [T, 4]

    @classmethod
    def write(
        cls, path: Path | str, records: Iterable[Record], *, about: dict[str, Any] | None = None, shard_size: int = 1000
    ) -> ProposalStore:
        """Write a store of (name, (height, width), boxes uint16 [n, 4]) in one go, and open it."""
        folder = Path(path)
        checks.require(not (folder / "manifest.json").exists(), "ProposalStore.write", "path", "no store yet", folder)
        folder.mkdir(parents=True, exist_ok=True)
        every = list(records)
        parts = [every[i : i + shard_size] for i in range(0, len(every), shard_size)]
        write_manifest(folder, [write_shard(folder, i, part) for i, part in enumerate(parts)], about or {})
        return cls.open(folder)

    @classmethod
    def from_soco(
        cls, file: Path | str, path: Path | str, sizes: Mapping[str, tuple[int, int]], *, shard_size: int = 1000
    ) -> ProposalStore:
        """Write a store of SoCo's json, {file name: [[x, y, w, h], ...]}, and open it.

        `sizes` gives the images' names, relative to their root, and their (height, width), which the file lacks;
        `data_prep/selective_search.py --from-soco` finds both. What has no counterpart is listed in the manifest.
        """
        records, problems = read_soco(Path(file), sizes)
        about = {"made_by": "from_soco", "preset": "soco", "engine": "SoCo's file", "failures": problems}
        return cls.write(path, records, about=about, shard_size=shard_size)

    @classmethod
    def open(cls, path: Path | str) -> ProposalStore:
        """Open a store; the first time its shards are checked and read into the index."""
        folder = Path(path)
        manifest, crc = read_manifest(folder)
        mark = folder / "index" / f"{crc:08x}"  # an index of another manifest is not this store's
        if not _is_whole(mark):
            try:
                _make_index(folder, manifest, mark)
            except OSError:  # a store on a read-only disk is kept in memory
                arrays = read_shards(folder, manifest, lambda _, shape, dtype: np.empty(shape, dtype))
                return cls(folder, manifest, arrays["ids"], arrays["offsets"], arrays["sizes"], arrays["boxes"])
        index = {name: np.load(folder / "index" / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _ARRAYS}
        return cls(folder, manifest, index["ids"], index["offsets"], index["sizes"], index["boxes"])

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The row of each id, -1 where the store has none."""
        at = np.minimum(np.searchsorted(self.ids, ids), max(len(self.ids) - 1, 0))
        found = self.ids[at] == ids if len(self.ids) else np.zeros(len(ids), dtype=bool)
        return np.where(found, at, -1)

    def counts(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """How many boxes each id has, 0 for one that the store does not know."""
        rows = self.rows(ids)
        return np.where(rows < 0, 0, np.append(np.diff(self.offsets), 0)[rows])

    def check_covers(self, ids: npt.NDArray[np.int64], names: Sequence[str]) -> None:
        """Refuse images of which under 99 % have an entry: store and images belong to different roots, most likely."""
        missing = np.flatnonzero(self.rows(ids) < 0)
        if len(missing) > 0.01 * len(ids):
            theirs = self.names(2)
            raise ValueError(
                f"ProposalStore: {len(missing)} of {len(ids)} images have no entry in {self.path}: images are named "
                f"{[names[int(row)] for row in missing[:2]]}, the store's {theirs}"
            )

    def names(self, most: int) -> list[str]:
        """The names of the first images, in the order they were written; the others' lie in the shards alone."""
        return first_names(self.path, self.manifest, most)

    def boxes(self, identity: int) -> npt.NDArray[np.uint16]:
        """All boxes uint16 [n, 4] of one image, in source pixels."""
        row = int(self.rows(np.array([identity], dtype=np.int64))[0])
        if row < 0:
            raise KeyError(f"ProposalStore.boxes: id must be of an image in {self.path}, got {identity}")
        return np.asarray(self.flat[self.offsets[row] : self.offsets[row + 1]])

    def padded(
        self, ids: Tensor, m: int, *, key: Key | None = None
    ) -> tuple[Float[Tensor, "B m 4"], Bool[Tensor, "B m"]]:
        """Boxes [B, m, 4] in source units and valid [B, m]; ids the store lacks have none.

        Of more than m boxes, those with the smallest draws under the key's stream "candidates" are taken, in their
        order; without a key the first m.
        """
        m = checks.index(m, 0, 2**16, "ProposalStore.padded", "m")
        rows = self.rows(checks.int64(ids, "ProposalStore.padded", "ids").cpu().numpy())
        known = rows >= 0
        starts = np.where(known, self.offsets[rows], 0)
        counts = np.where(known, self.offsets[rows + 1] - starts, 0)
        slots = np.arange(m)[None].repeat(len(rows), 0)
        if key is not None and m > 0 and counts.max(initial=0) > m:
            checks.require(len(key) == len(rows), "ProposalStore.padded", "key", f"of {len(rows)} ids", len(key))
            slots[counts > m] = _drawn(key.to("cpu"), counts, m)
        valid = slots < counts[:, None]
        boxes = np.zeros((len(rows), m, 4), dtype=np.float32)
        if valid.any():
            size = np.where(known[:, None], self.sizes[rows], 1)[:, None, [1, 0, 1, 0]].astype(np.float32)
            boxes = np.where(valid[..., None], self.flat[np.where(valid, starts[:, None] + slots, 0)] / size, 0)
        return torch.from_numpy(boxes.astype(np.float32)).to(ids.device), torch.from_numpy(valid).to(ids.device)


def _drawn(key: Key, counts: npt.NDArray[np.int64], m: int) -> npt.NDArray[np.int64]:
    """The m candidates of smallest draw, in their order, of each row of more than m; of equal draws the first."""
    rows = np.flatnonzero(counts > m)
    counts = counts[rows, None]
    draws = key[torch.from_numpy(rows)].uniform("candidates", int(counts.max())).numpy()  # multiples of 2^-24
    if counts.min() < draws.shape[1]:
        draws = np.where(np.arange(draws.shape[1]) < counts, draws, np.float32(2))
    # The m smallest of uniform draws lie below this but in one row of millions; then all are looked at.
    likely = draws < np.minimum((m + 6 * m**0.5 + 12) / counts, 1.5).astype(np.float32)
    if (np.count_nonzero(likely, axis=1) < m).any():
        likely = draws < 1
    row, slot = np.divmod(np.flatnonzero(likely.ravel()), draws.shape[1])  # half the time of `nonzero`
    held = np.bincount(row, minlength=len(rows))
    rank = np.full((len(rows), held.max()), np.iinfo(np.int64).max)
    within = np.arange(len(row)) - np.repeat(np.cumsum(held) - held, held)
    # No two ranks are alike, so that of equal draws the first is taken and exactly m are.
    rank[row, within] = ((draws[row, slot] * 2**24).astype(np.int64) << 32) | slot
    smallest = np.partition(rank, m - 1, axis=1)[:, :m]
    return np.sort(smallest & 0xFFFFFFFF, axis=1)


def _is_whole(mark: Path) -> bool:
    """Whether the index that a mark speaks of is there, in all its bytes."""
    try:
        sizes = json.loads(mark.read_bytes())
        return all((mark.parent / f"{name}.npy").stat().st_size == sizes[name] for name in _ARRAYS)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _make_index(folder: Path, manifest: dict[str, Any], mark: Path) -> None:
    """Write the arrays of the shards, and last what says that they are whole; one process at a time."""
    (folder / "index").mkdir(exist_ok=True)
    with _alone(folder / "index") as sure:
        if _is_whole(mark):  # by a process that was faster
            return
        for left in (folder / "index").glob("*.part.npy") if sure else ():
            left.unlink()
        parts = {name: folder / "index" / f"{name}.{os.getpid()}.part.npy" for name in _ARRAYS}

        def room(name: str, shape: tuple[int, ...], dtype: Any) -> Any:
            array = np.lib.format.open_memmap(parts[name], mode="w+", dtype=dtype, shape=shape)
            if hasattr(os, "posix_fallocate"):  # a full disk is an error here, and a dead process when it is written to
                with parts[name].open("r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, parts[name].stat().st_size)
            return array

        read_shards(folder, manifest, room)
        for name, part in parts.items():
            os.replace(part, folder / "index" / f"{name}.npy")
        sizes = {name: (folder / "index" / f"{name}.npy").stat().st_size for name in _ARRAYS}
        write_atomically(mark, json.dumps(sizes).encode())


@contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Wait until no other process holds the folder; False where there are no locks."""
    handle, sure = os.open(folder, os.O_RDONLY), False
    try:
        with suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
            sure = True
        yield sure
    finally:
        os.close(handle)

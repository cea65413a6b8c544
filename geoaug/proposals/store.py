"""`ProposalStore`: boxes of many images on disk, in Parquet shards, and read by sample id.

A store is a folder: `manifest.json` (written last, so a folder that has it is whole), shards `shard-00000.parquet` and
on with one row an image (id, name, height, width, four lists of uint16 source pixels), and `index/`, flat arrays made
from the shards once and memory-mapped from then on. Boxes are xyxy with exclusive edges, in their maker's order.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..geometry import checks
from ..geometry.ids import sample_id
from ..geometry.rng import Key

FORMAT = 1
_ARRAYS = ("ids", "offsets", "sizes", "boxes")
Record = tuple[str, tuple[int, int], npt.NDArray[np.uint16]]  # name, (height, width), boxes [n, 4]


def _arrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ImportError("ProposalStore needs pyarrow: pip install 'geoaug[prep]'") from None
    return pyarrow, pyarrow.parquet


def _write_atomically(path: Path, data: bytes) -> None:
    part = path.with_name(path.name + f".part{os.getpid()}")
    part.write_bytes(data)
    os.replace(part, path)


def write_shard(folder: Path, number: int, records: Sequence[Record]) -> dict[str, Any]:
    """Write one shard under its final name at once, and give its entry for the manifest."""
    arrow, parquet = _arrow()
    for name, (height, width), boxes in records:
        ok = isinstance(boxes, np.ndarray) and boxes.dtype == np.uint16 and boxes.ndim == 2 and boxes.shape[1] == 4
        got = f"{getattr(boxes, 'dtype', type(boxes).__name__)} {list(getattr(boxes, 'shape', ()))} for {name}"
        checks.require(ok, "write_shard", "boxes", "uint16 [n, 4]", got)
        inside = bool((boxes[:, :2] < boxes[:, 2:]).all() and (boxes[:, 2:] <= (width, height)).all())
        checks.require(
            inside, "write_shard", "boxes", f"boxes with pixels inside {width} x {height}", f"others for {name}"
        )
    counts = np.array([len(boxes) for _, _, boxes in records], dtype=np.int64)
    flat = np.concatenate([np.zeros((0, 4), dtype=np.uint16), *(boxes for _, _, boxes in records)])
    offsets = arrow.array(np.concatenate(([0], np.cumsum(counts))).astype(np.int32))
    columns = {
        "id": arrow.array([sample_id(name) for name, _, _ in records], arrow.int64()),
        "name": arrow.array([name for name, _, _ in records], arrow.string()),
        "height": arrow.array([size[0] for _, size, _ in records], arrow.uint16()),
        "width": arrow.array([size[1] for _, size, _ in records], arrow.uint16()),
    }
    for axis, name in enumerate(("x0", "y0", "x1", "y1")):
        columns[name] = arrow.ListArray.from_arrays(offsets, arrow.array(np.ascontiguousarray(flat[:, axis])))
    sink = arrow.BufferOutputStream()
    parquet.write_table(arrow.table(columns), sink, compression="zstd", compression_level=9)
    data = sink.getvalue().to_pybytes()
    file = f"shard-{number:05d}.parquet"
    _write_atomically(folder / file, data)
    return {
        "file": file,
        "images": len(records),
        "boxes": int(counts.sum()),
        "bytes": len(data),
        "crc": zlib.crc32(data),
    }


def write_manifest(folder: Path, shards: Sequence[dict[str, Any]], about: dict[str, Any]) -> None:
    """Finish a store: its shards' entries and what made it (preset, engine, parameters, versions, failures)."""
    manifest = {"format": FORMAT, **about, "shards": list(shards)}
    _write_atomically(folder / "manifest.json", json.dumps(manifest, indent=1, sort_keys=True).encode())


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
    def open(cls, path: Path | str) -> ProposalStore:
        """Open a store; the first time its shards are checked and read into the index."""
        folder = Path(path)
        file = folder / "manifest.json"
        if not file.is_file():
            raise FileNotFoundError(
                f"ProposalStore.open: path must be a finished store, got {folder}: no manifest.json"
            )
        data = file.read_bytes()
        manifest = json.loads(data)
        form = manifest.get("format") if isinstance(manifest, dict) else None
        checks.require(form == FORMAT, "ProposalStore.open", "path", f"a store of format {FORMAT}", f"{folder}: {form}")
        mark = folder / "index" / f"{zlib.crc32(data):08x}"  # an index of another manifest is not this store's
        if not mark.is_file():
            arrays = _read_shards(folder, manifest)
            try:
                (folder / "index").mkdir(exist_ok=True)
                for name, array in arrays.items():
                    part = folder / "index" / f"{name}.part{os.getpid()}.npy"
                    np.save(part, array, allow_pickle=False)
                    os.replace(part, folder / "index" / f"{name}.npy")
                _write_atomically(mark, b"")
            except OSError:  # a store on a read-only disk is kept in memory
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

    def check_covers(self, ids: npt.NDArray[np.int64], names: Sequence[str]) -> None:
        """Refuse images of which under 99 % have an entry: store and images belong to different roots, most likely."""
        missing = np.flatnonzero(self.rows(ids) < 0)
        if len(missing) > 0.01 * len(ids):
            _, parquet = _arrow()
            shards = self.manifest["shards"]
            theirs = parquet.read_table(self.path / shards[0]["file"], columns=["name"])["name"] if shards else []
            raise ValueError(
                f"ProposalStore: {len(missing)} of {len(ids)} images have no entry in {self.path}: images are named "
                f"{[names[int(row)] for row in missing[:2]]}, the store's {[str(name) for name in theirs[:2]]}"
            )

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
            draws = key.to("cpu").uniform("candidates", int(counts.max())).numpy()
            draws = np.where(np.arange(draws.shape[1]) < counts[:, None], draws, np.inf)
            chosen = np.sort(np.argsort(draws, axis=1, kind="stable")[:, :m], axis=1)
            slots = np.where((counts > m)[:, None], chosen, slots)
        valid = slots < counts[:, None]
        boxes = np.zeros((len(rows), m, 4), dtype=np.float32)
        if valid.any():
            size = np.where(known[:, None], self.sizes[rows], 1)[:, None, [1, 0, 1, 0]].astype(np.float32)
            boxes = np.where(valid[..., None], self.flat[np.where(valid, starts[:, None] + slots, 0)] / size, 0)
        return torch.from_numpy(boxes.astype(np.float32)).to(ids.device), torch.from_numpy(valid).to(ids.device)


def _read_shards(folder: Path, manifest: dict[str, Any]) -> dict[str, npt.NDArray[Any]]:
    """All shards as flat arrays sorted by id; a shard that is not what the manifest says is named."""
    arrow, parquet = _arrow()
    ids, sizes, counts, boxes = [], [], [], []
    for shard in manifest["shards"]:
        file = folder / shard["file"]
        data = file.read_bytes() if file.is_file() else b""
        whole = len(data) == shard["bytes"] and zlib.crc32(data) == shard["crc"]
        checks.require(whole, "ProposalStore.open", f"shard {shard['file']}", "as the manifest says", "another or none")
        table = parquet.read_table(arrow.BufferReader(data))
        ids.append(table["id"].to_numpy())
        sizes.append(np.stack((table["height"].to_numpy(), table["width"].to_numpy()), axis=1).astype(np.int32))
        axes = [table[name].combine_chunks() for name in ("x0", "y0", "x1", "y1")]
        counts.append(np.diff(axes[0].offsets.to_numpy()).astype(np.int64))
        boxes.append(np.stack([axis.flatten().to_numpy() for axis in axes], axis=1).astype(np.uint16))
    every = np.concatenate([np.zeros(0, dtype=np.int64), *ids])
    order = np.argsort(every, kind="stable")
    twice = every[order][1:] == every[order][:-1]
    checks.require(not twice.any(), "ProposalStore.open", "ids", "different", f"{int(twice.sum())} twice in {folder}")
    lengths = np.concatenate([np.zeros(0, dtype=np.int64), *counts])
    starts = np.cumsum(lengths) - lengths
    flat = np.concatenate([np.zeros((0, 4), dtype=np.uint16), *boxes])
    offsets = np.concatenate(([0], np.cumsum(lengths[order]))).astype(np.int64)
    gather = np.repeat(starts[order] - offsets[:-1], lengths[order]) + np.arange(offsets[-1])
    return {
        "ids": every[order],
        "offsets": offsets,
        "sizes": np.concatenate([np.zeros((0, 2), dtype=np.int32), *sizes])[order],
        "boxes": flat[gather],
    }

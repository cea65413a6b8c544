"""What a store of proposals is made of: Parquet shards, one row an image, and the manifest that lists them.

Columns are id, name, height, width and boxes, a flat list of uint16 source pixels, x0 y0 x1 y1 of each box in turn with
exclusive edges. The same records give the same bytes. What is read is checked against the manifest, and the error names
the shard.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..geometry import checks
from ..geometry.ids import sample_id

FORMAT = 1
_LEAF = "boxes.list.element"  # Parquet's path of the column of pixels
_FILE = re.compile(r"shard-\d{5,}\.parquet")  # nothing else is ever joined to the folder of a store
Record = tuple[str, tuple[int, int], npt.NDArray[np.uint16]]  # name, (height, width), boxes [n, 4]
Array = npt.NDArray[Any]


def _arrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ImportError("ProposalStore needs pyarrow: pip install 'geoaug[prep]'") from None
    return pyarrow, pyarrow.parquet


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that is either whole or not there."""
    part = path.with_name(path.name + f".part{os.getpid()}")
    part.write_bytes(data)
    os.replace(part, path)


def encode_shard(records: Sequence[Record]) -> tuple[bytes, dict[str, Any]]:
    """The bytes of one shard, and how many images and boxes it holds."""
    arrow, parquet = _arrow()
    where = "encode_shard"
    for name, (height, width), boxes in records:
        ok = isinstance(boxes, np.ndarray) and boxes.dtype == np.uint16 and boxes.ndim == 2 and boxes.shape[1] == 4
        got = f"{getattr(boxes, 'dtype', type(boxes).__name__)} {list(getattr(boxes, 'shape', ()))} for {name}"
        checks.require(ok, where, "boxes", "uint16 [n, 4]", got)
        small = 1 <= height < 2**16 and 1 <= width < 2**16
        checks.require(small, where, "size", "(height, width), each 1 to 65535", f"{(height, width)} for {name}")
        inside = bool((boxes[:, :2] < boxes[:, 2:]).all() and (boxes[:, 2:] <= (width, height)).all())
        checks.require(inside, where, "boxes", f"boxes with pixels inside {width} x {height}", f"others for {name}")
    names = [name for name, _, _ in records]
    counts = np.array([len(boxes) for _, _, boxes in records], dtype=np.int64)
    flat = np.concatenate([np.zeros((0, 4), dtype=np.uint16), *(boxes for _, _, boxes in records)])
    offsets = arrow.array(4 * np.concatenate(([0], np.cumsum(counts))), arrow.int32())
    try:
        texts = arrow.array(names, arrow.string())
    except UnicodeEncodeError:  # a file name need not be text
        texts = arrow.array([name.encode("utf-8", "surrogateescape") for name in names], arrow.binary())
    columns = {
        "id": arrow.array([sample_id(name) for name in names], arrow.int64()),
        "name": texts,
        "height": arrow.array([size[0] for _, size, _ in records], arrow.uint16()),
        "width": arrow.array([size[1] for _, size, _ in records], arrow.uint16()),
    }
    columns["boxes"] = arrow.ListArray.from_arrays(offsets, arrow.array(flat.ravel()))
    sink = arrow.BufferOutputStream()
    # High bytes and low bytes apart, then matched over many boxes: a seventh smaller than a dictionary with zstd 9.
    parquet.write_table(
        arrow.table(columns), sink, compression="zstd", compression_level=15, write_statistics=False,
        use_dictionary=["height", "width"], column_encoding={_LEAF: "BYTE_STREAM_SPLIT"},
    )  # fmt: skip
    return sink.getvalue().to_pybytes(), {"images": len(records), "boxes": int(counts.sum())}


def write_shard(folder: Path, number: int, records: Sequence[Record]) -> dict[str, Any]:
    """Write one shard under its final name at once, and give its entry for the manifest."""
    data, counts = encode_shard(records)
    file = f"shard-{number:05d}.parquet"
    write_atomically(folder / file, data)
    return {"file": file, **counts, "bytes": len(data), "crc": zlib.crc32(data)}


def write_manifest(folder: Path, shards: Sequence[dict[str, Any]], about: dict[str, Any]) -> None:
    """Finish a store: its shards' entries and what made it (preset, engine, parameters, versions, failures)."""
    counts = {"images": sum(s["images"] for s in shards), "boxes": sum(s["boxes"] for s in shards)}
    manifest = {"format": FORMAT, **about, "counts": counts, "shards": list(shards)}
    write_atomically(folder / "manifest.json", json.dumps(manifest, indent=1, sort_keys=True).encode())


def read_manifest(folder: Path) -> tuple[dict[str, Any], int]:
    """The manifest of a store and its CRC-32; the shards must be there and as long as it says."""
    where, file = "ProposalStore.open", folder / "manifest.json"
    if not file.is_file():
        unfinished = ", but an unfinished job: run it again to finish it" if (folder / "job.json").is_file() else ""
        raise FileNotFoundError(f"{where}: path must be a finished store, got {folder}: no manifest.json{unfinished}")
    data = file.read_bytes()
    try:
        manifest = json.loads(data)
    except ValueError:
        manifest = None
    checks.require(isinstance(manifest, dict), where, "path", "a store", f"{folder}: its manifest is no JSON object")
    form = manifest.get("format")
    checks.require(form == FORMAT, where, "path", f"a store of format {FORMAT}", f"{folder}: {form}")
    shards, seen = manifest.get("shards"), set()
    checks.require(isinstance(shards, list), where, "path", "a store", f"{folder}: its manifest lists no shards")
    for at, shard in enumerate(shards):
        name: Any = shard.get("file") if isinstance(shard, dict) else None
        known = isinstance(name, str) and _FILE.fullmatch(name) is not None and name not in seen
        known = known and all(type(shard.get(key)) is int for key in ("images", "boxes", "bytes", "crc"))
        checks.require(known, where, f"shards[{at}] of the manifest", "one shard and its counts", f"{str(shard)[:80]}")
        seen.add(name)
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != shard["bytes"]:
            raise ValueError(_unlike(name, "is missing" if found is None else f"has {found:,} bytes", shard["bytes"]))
    return manifest, zlib.crc32(data)


def _unlike(name: str, found: str, expected: int | str) -> str:
    said = f"{expected:,} bytes" if isinstance(expected, int) else expected
    return (
        f"ProposalStore.open: shard {name} must be as the manifest says, {said}, but {found}; "
        "data_prep/selective_search.py --repair makes it anew"
    )


def read_shards(
    folder: Path, manifest: dict[str, Any], room: Callable[[str, tuple[int, ...], Any], Array]
) -> dict[str, Array]:
    """All shards as arrays sorted by id: ids, offsets, sizes, boxes, each written into `room(name, shape, dtype)`.

    One shard's boxes are held at a time, since those of a large store need not fit the memory.
    """
    shards = manifest["shards"]
    facts = [_facts(folder, shard) for shard in shards]
    every = np.concatenate([np.zeros(0, dtype=np.int64), *(ids for ids, _, _ in facts)])
    order = np.argsort(every, kind="stable")
    twice = every[order][1:] == every[order][:-1]
    checks.require(not twice.any(), "ProposalStore.open", "ids", "different", f"{int(twice.sum())} twice in {folder}")
    counts = np.concatenate([np.zeros(0, dtype=np.int64), *(counts for _, _, counts in facts)])
    out = {
        "ids": room("ids", every.shape, np.int64),
        "offsets": room("offsets", (len(every) + 1,), np.int64),
        "sizes": room("sizes", (len(every), 2), np.int32),
        "boxes": room("boxes", (int(counts.sum()), 4), np.uint16),
    }
    out["ids"][:] = every[order]
    out["sizes"][:] = np.concatenate([np.zeros((0, 2), dtype=np.int32), *(sizes for _, sizes, _ in facts)])[order]
    out["offsets"][:] = np.concatenate(([0], np.cumsum(counts[order])))
    starts = np.empty(len(every), dtype=np.int64)
    starts[order] = out["offsets"][:-1]
    first = 0
    for shard, (ids, _, lengths) in zip(shards, facts, strict=True):
        _, boxes, _ = _table(folder, shard)
        before = np.cumsum(lengths) - lengths
        out["boxes"][np.repeat(starts[first : first + len(ids)] - before, lengths) + np.arange(len(boxes))] = boxes
        first += len(ids)
    return out


def _facts(folder: Path, shard: dict[str, Any]) -> tuple[Array, Array, Array]:
    """Ids, sizes [n, 2] and numbers of boxes of one shard, checked in all that a reader relies on."""
    table, boxes, lengths = _table(folder, shard)
    ids = table["id"].to_numpy()
    sizes = np.stack((table["height"].to_numpy(), table["width"].to_numpy()), axis=1).astype(np.int32)
    limits = np.repeat(sizes[:, ::-1], lengths, axis=0)
    right = ids.tolist() == [sample_id(name) for name in _texts(table["name"])]
    right &= bool((boxes[:, :2] < boxes[:, 2:]).all() and (boxes[:, 2:] <= limits).all())
    if not right or (len(ids), len(boxes)) != (shard["images"], shard["boxes"]):
        said = f"{shard['images']:,} images and {shard['boxes']:,} boxes inside them"
        raise ValueError(_unlike(shard["file"], f"has {len(ids):,} and {len(boxes):,}, or others", said))
    return ids, sizes, lengths


def _table(folder: Path, shard: dict[str, Any]) -> tuple[Any, Array, Array]:
    """A shard as a table, its boxes [n, 4], and how many each image has."""
    arrow, parquet = _arrow()
    data = (folder / shard["file"]).read_bytes()
    if len(data) != shard["bytes"] or zlib.crc32(data) != shard["crc"]:
        raise ValueError(_unlike(shard["file"], "has another checksum", "in all its bytes"))
    try:
        table = parquet.read_table(arrow.BufferReader(data))
        lists = table["boxes"].combine_chunks()
        numbers, lengths = lists.flatten().to_numpy(), np.diff(lists.offsets.to_numpy()).astype(np.int64)
        if numbers.dtype != np.uint16 or (lengths % 4).any() or lists.null_count:
            raise ValueError("no boxes of four uint16")
    except (arrow.ArrowException, KeyError, AttributeError, ValueError, TypeError) as error:
        raise ValueError(_unlike(shard["file"], f"cannot be read ({error})", "a table of boxes")) from None
    return table, numbers.reshape(-1, 4), lengths // 4


def _texts(column: Any) -> list[str]:
    return [text if isinstance(text, str) else text.decode("utf-8", "surrogateescape") for text in column.to_pylist()]


def first_names(folder: Path, manifest: dict[str, Any], most: int) -> list[str]:
    """The names of the first images of a store, for messages and pictures."""
    _, parquet = _arrow()
    names: list[str] = []
    for shard in manifest["shards"]:
        if len(names) >= most:
            break
        names += _texts(parquet.read_table(folder / shard["file"], columns=["name"])["name"])
    return names[:most]

import json
import shutil

import numpy as np
import pytest
import torch

from geoaug import Key, sample_id
from geoaug.proposals.store import ProposalStore, write_manifest, write_shard

pytest.importorskip("pyarrow")


def some(n=30, seed=0, most=40):
    g = np.random.default_rng(seed)
    records = []
    for i in range(n):
        height, width = (int(x) for x in g.integers(20, 500, 2))
        low = np.stack((g.integers(0, width - 1, most), g.integers(0, height - 1, most)), 1)
        high = low + 1 + g.integers(0, 10**6, (most, 2)) % (np.array([width, height]) - low)
        boxes = np.concatenate((low, high), 1).astype(np.uint16)[: int(g.integers(0, most + 1))]
        records.append((f"{i % 3}/ü {i}.jpg", (height, width), boxes))
    return records


@pytest.fixture
def store(tmp_path):
    return ProposalStore.write(tmp_path / "store", some(), about={"preset": "made up"}, shard_size=7)


def test_what_was_written_is_read(store):
    assert store.manifest["preset"] == "made up"
    assert len(store) == 30
    assert len(store.manifest["shards"]) == 5
    for name, size, boxes in some():
        row = store.rows(np.array([sample_id(name)]))[0]
        assert np.array_equal(store.boxes(sample_id(name)), boxes)
        assert tuple(store.sizes[row]) == size
    assert isinstance(store.flat, np.memmap)
    assert np.array_equal(np.sort(store.ids), store.ids)


def slow_padded(records, m, key):
    """One image, one box at a time."""
    boxes, valid = torch.zeros(len(records), m, 4), torch.zeros(len(records), m, dtype=torch.bool)
    for i, (_, (height, width), candidates) in enumerate(records):
        rows = list(range(len(candidates)))
        if len(rows) > m and key is not None:
            draws = key[i].uniform("candidates", len(rows))[0].tolist()
            rows = sorted(sorted(rows, key=lambda r: draws[r])[:m])
        for slot, row in enumerate(rows[:m]):
            x0, y0, x1, y1 = candidates[row].tolist()
            boxes[i, slot] = torch.tensor([x0 / width, y0 / height, x1 / width, y1 / height])
            valid[i, slot] = True
    return boxes, valid


@pytest.mark.parametrize("m", [0, 1, 16, 64])
@pytest.mark.parametrize("keyed", [False, True])
def test_padded_against_the_loop(store, m, keyed):
    records = some()[::-1]
    ids = torch.tensor([sample_id(name) for name, _, _ in records])
    key = Key(0, 3, ids) if keyed else None
    boxes, valid = store.padded(ids, m, key=key)
    expected_boxes, expected_valid = slow_padded(records, m, key)
    assert boxes.dtype == torch.float32
    assert torch.equal(valid, expected_valid)
    assert torch.allclose(boxes, expected_boxes)


def test_more_than_fit_are_drawn_anew_each_epoch(store):
    ids = torch.from_numpy(np.array(store.ids))
    first, second = (store.padded(ids, 4, key=Key(0, epoch, ids))[0] for epoch in (0, 1))
    assert (first != second).any()


def test_ids_without_an_entry_have_no_boxes(store):
    boxes, valid = store.padded(torch.tensor([-1, 5, int(store.ids[0])]), 8)
    assert not valid[:2].any()
    assert not boxes[:2].any()
    with pytest.raises(KeyError, match="id must be of an image"):
        store.boxes(5)


def test_an_empty_store(tmp_path):
    store = ProposalStore.write(tmp_path / "none", [])
    boxes, valid = store.padded(torch.tensor([3]), 2)
    assert (boxes.shape, valid.any().item(), len(store)) == ((1, 2, 4), False, 0)


def test_the_same_records_give_the_same_bytes(tmp_path):
    a, b = (write_shard(tmp_path, number, some()) for number in (0, 1))
    assert a["crc"] == b["crc"]


def test_an_index_of_another_manifest_is_made_anew(store):
    folder = store.path
    shards = [write_shard(folder, 9, some(5, seed=3))]
    write_manifest(folder, shards, {})
    assert len(ProposalStore.open(folder)) == 5


def test_a_store_on_a_disk_that_cannot_be_written(store, monkeypatch):
    shutil.rmtree(store.path / "index")
    monkeypatch.setattr(np, "save", lambda *a, **k: (_ for _ in ()).throw(OSError("read-only")))
    again = ProposalStore.open(store.path)
    assert np.array_equal(again.flat, store.flat)


def damage_truncate(folder):
    file = folder / "shard-00002.parquet"
    file.write_bytes(file.read_bytes()[:-9])


def damage_flip(folder):
    file = folder / "shard-00002.parquet"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(bytes(data))


def damage_remove(folder):
    (folder / "shard-00002.parquet").unlink()


@pytest.mark.parametrize("damage", [damage_truncate, damage_flip, damage_remove])
def test_a_damaged_shard_is_named(store, damage, our_errors):
    shutil.rmtree(store.path / "index")
    damage(store.path)
    with pytest.raises(ValueError, match=r"shard shard-00002\.parquet must be as the manifest says"):
        ProposalStore.open(store.path)


def test_bad_input(tmp_path, store, our_errors):
    with pytest.raises(FileNotFoundError, match="must be a finished store"):
        ProposalStore.open(tmp_path)
    with pytest.raises(ValueError, match="path must be no store yet"):
        ProposalStore.write(store.path, [])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(ValueError, match=r"a store of format 1, got .*99"):
        ProposalStore.open(tmp_path / "other")
    wide = np.array([[0, 0, 30, 5]], dtype=np.uint16)
    with pytest.raises(ValueError, match=r"boxes must be boxes with pixels inside 20 x 10, got others for a\.jpg"):
        ProposalStore.write(tmp_path / "wide", [("a.jpg", (10, 20), wide)])
    with pytest.raises(ValueError, match=r"write_shard: boxes must be uint16 \[n, 4\], got int64"):
        ProposalStore.write(tmp_path / "int", [("a.jpg", (10, 20), wide.astype(np.int64))])
    with pytest.raises(ValueError, match="ids must be different, got 1 twice"):
        ProposalStore.write(tmp_path / "twice", [("a.jpg", (10, 40), wide)] * 2)

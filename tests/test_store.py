import json
import os
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import geoaug
from geoaug import Key, sample_id
from geoaug.proposals.shard_files import write_manifest, write_shard
from geoaug.proposals.store import ProposalStore

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


def test_of_equal_draws_the_first_is_taken(store, monkeypatch):
    uniform = Key.uniform
    monkeypatch.setattr(Key, "uniform", lambda key, stream, n: (4 * uniform(key, stream, n)).floor() / 4)
    records = some()
    ids = torch.tensor([sample_id(name) for name, _, _ in records])
    boxes, valid = store.padded(ids, 9, key=Key(0, 0, ids))
    expected_boxes, expected_valid = slow_padded(records, 9, Key(0, 0, ids))
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
    monkeypatch.setattr(np.lib.format, "open_memmap", lambda *a, **k: (_ for _ in ()).throw(OSError("read-only")))
    again = ProposalStore.open(store.path)
    assert not isinstance(again.flat, np.memmap)
    assert np.array_equal(again.flat, store.flat)


def damage_truncate(folder):
    file = folder / "shard-00002.parquet"
    file.write_bytes(file.read_bytes()[:-9])
    return r"has \d,\d{3} bytes"


def damage_flip(folder):
    file = folder / "shard-00002.parquet"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(bytes(data))
    return "has another checksum"


def damage_remove(folder):
    (folder / "shard-00002.parquet").unlink()
    return "is missing"


@pytest.mark.parametrize("damage", [damage_truncate, damage_flip, damage_remove])
@pytest.mark.parametrize("indexed", [False, True])
def test_a_damaged_shard_is_named(store, damage, indexed, our_errors):
    if not indexed:
        shutil.rmtree(store.path / "index")
    told = damage(store.path)
    if indexed and damage is damage_flip:  # an index that was made before has what the shard held
        assert np.array_equal(ProposalStore.open(store.path).flat, store.flat)
        return
    with pytest.raises(
        ValueError, match=rf"shard-00002\.parquet must be as the manifest says, .*but {told};.*--repair"
    ):
        ProposalStore.open(store.path)


def change(folder, what):
    manifest = json.loads((folder / "manifest.json").read_text())
    what(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("what", "told"),
    [
        (lambda m: m["shards"][1].update(images=8), r"shard-00001\.parquet must be as the manifest says, 8 images"),
        (
            lambda m: m["shards"][1].update(boxes=1),
            r"shard-00001\.parquet must be as the manifest says, 7 images and 1 ",
        ),
        (lambda m: m["shards"][1].update(crc=1), r"shard-00001\.parquet .*has another checksum"),
        (
            lambda m: m["shards"][1].update(file="../shard-00001.parquet"),
            r"shards\[1\] of the manifest must be one shard",
        ),
        (lambda m: m["shards"][1].update(file="shard-00000.parquet"), r"shards\[1\] of the manifest must be one shard"),
        (lambda m: m["shards"][1].pop("bytes"), r"shards\[1\] of the manifest must be one shard"),
        (lambda m: m.update(shards={}), "its manifest lists no shards"),
        (lambda m: m.update(format=99), "a store of format 1, got .*99"),
    ],
)
def test_a_manifest_that_disagrees_is_told(store, what, told, our_errors):
    change(store.path, what)
    with pytest.raises(ValueError, match=told):
        ProposalStore.open(store.path)


def forge(folder, columns):
    """A shard whose checksum is right and whose content is not."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    record = [("a.jpg", (10, 20), np.array([[1, 2, 3, 4]], dtype=np.uint16))]
    entry = write_shard(folder, 0, record)
    table = parquet.read_table(folder / entry["file"])
    for name, values in columns.items():
        at = table.schema.get_field_index(name)
        table = table.set_column(at, name, arrow.array(values, table.schema.field(name).type))
    parquet.write_table(table, folder / entry["file"])
    data = (folder / entry["file"]).read_bytes()
    write_manifest(folder, [{**entry, "bytes": len(data), "crc": zlib.crc32(data)}], {})


@pytest.mark.parametrize(
    "columns",
    [
        {"id": [7]},
        {"name": ["b.jpg"]},
        {"width": [2]},
        {"boxes": [[3, 2, 3, 4]]},
        {"boxes": [[1, 2, 3]]},
        {"boxes": [None]},
        {"boxes": [[1, 2, None, 4]]},
        {"boxes": [[1, 2, 3, 4, 1, 2, 3, 4]]},
    ],
)
def test_a_shard_that_holds_something_else_is_named(tmp_path, columns, our_errors):
    forge(tmp_path, {})
    ProposalStore.open(tmp_path)
    forge(tmp_path, columns)
    with pytest.raises(ValueError, match=r"shard shard-00000\.parquet must be as the manifest says"):
        ProposalStore.open(tmp_path)


def test_an_index_that_was_cut_short_is_made_anew(store):
    flat = np.array(store.flat)
    file = store.path / "index" / "boxes.npy"
    file.write_bytes(file.read_bytes()[:-8])
    assert np.array_equal(ProposalStore.open(store.path).flat, flat)
    assert file.stat().st_size == 128 + flat.nbytes


def test_many_processes_open_a_new_store_at_once(store):
    shutil.rmtree(store.path / "index")
    (store.path / "index").mkdir()
    (store.path / "index" / "boxes.1.part.npy").write_bytes(b"left by one that was killed")
    with ThreadPoolExecutor(8) as pool:  # locks of open files keep threads apart as they do processes
        stores = list(pool.map(ProposalStore.open, [store.path] * 8))
    assert all(isinstance(other.flat, np.memmap) and np.array_equal(other.flat, store.flat) for other in stores)
    assert not list((store.path / "index").glob("*part*"))


def test_a_shard_of_which_every_image_failed(tmp_path):
    (tmp_path / "store").mkdir()
    shards = [write_shard(tmp_path / "store", i, some(3, seed=i) if i else []) for i in (0, 1)]
    write_manifest(tmp_path / "store", shards, {})
    assert len(ProposalStore.open(tmp_path / "store")) == 3


def test_names_that_are_no_text(tmp_path):
    boxes = np.array([[1, 2, 3, 4]], dtype=np.uint16)
    records = [("a.jpg", (10, 20), boxes), (os.fsdecode(b"\xff \xc3.jpg"), (10, 20), boxes)]
    store = ProposalStore.write(tmp_path, records, shard_size=1)
    assert store.names(5) == [name for name, _, _ in records]
    assert np.array_equal(store.boxes(sample_id(records[1][0])), boxes)


def test_bad_input(tmp_path, store, our_errors):
    with pytest.raises(FileNotFoundError, match="must be a finished store"):
        ProposalStore.open(tmp_path)
    with pytest.raises(ValueError, match="path must be no store yet"):
        ProposalStore.write(store.path, [])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text("[1]")
    with pytest.raises(ValueError, match="its manifest is no JSON object"):
        ProposalStore.open(tmp_path / "other")
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "job.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="but an unfinished job: run it again to finish it"):
        ProposalStore.open(tmp_path / "job")
    with pytest.raises(
        ValueError, match=r"size must be \(height, width\), each 1 to 65535, got \(65536, 9\) for a\.jpg"
    ):
        ProposalStore.write(tmp_path / "large", [("a.jpg", (65536, 9), np.zeros((0, 4), dtype=np.uint16))])
    wide = np.array([[0, 0, 30, 5]], dtype=np.uint16)
    with pytest.raises(ValueError, match=r"boxes must be boxes with pixels inside 20 x 10, got others for a\.jpg"):
        ProposalStore.write(tmp_path / "wide", [("a.jpg", (10, 20), wide)])
    with pytest.raises(ValueError, match=r"encode_shard: boxes must be uint16 \[n, 4\], got int64"):
        ProposalStore.write(tmp_path / "int", [("a.jpg", (10, 20), wide.astype(np.int64))])
    with pytest.raises(ValueError, match="ids must be different, got 1 twice"):
        ProposalStore.write(tmp_path / "twice", [("a.jpg", (10, 40), wide)] * 2)


def soco(tmp_path, listed):
    file = tmp_path / "train_ratio3size0308post.json"
    file.write_text(json.dumps(listed))
    return file


def test_soco_boxes_are_inclusive_pixels(tmp_path):
    listed = {
        "a.jpg": [[10, 20, 30, 40], [0, 0, 100, 90]],
        "n01_7": [[1, 2, 33.0, 34]],
        "empty.jpg": [],
        "gone.jpg": [],
    }
    sizes = {"a.jpg": (90, 100), "n01/n01_7.JPEG": (50, 60), "x/empty.jpg": (7, 5), "new.jpg": (5, 7)}
    store = ProposalStore.from_soco(soco(tmp_path, listed), tmp_path / "store", sizes)
    assert store.boxes(sample_id("a.jpg")).tolist() == [[10, 20, 40, 60], [0, 0, 100, 90]]
    assert store.boxes(sample_id("n01/n01_7.JPEG")).tolist() == [[1, 2, 34, 36]]
    assert store.boxes(sample_id("x/empty.jpg")).shape == (0, 4)
    assert store.manifest["failures"] == {
        "image without an entry": ["new.jpg"], "entry without an image": ["gone.jpg"]
    }  # fmt: skip
    inclusive = torch.tensor([[10, 20, 10 + 30 - 1, 20 + 40 - 1]])  # as SoCo's loader has it
    assert geoaug.boxes.from_soco_inclusive(inclusive).tolist() == store.boxes(sample_id("a.jpg"))[:1].tolist()


def test_a_name_that_two_images_share_is_not_guessed(tmp_path):
    listed = {"a.jpg": [[0, 0, 2, 2]], "b.jpg": [[0, 0, 3, 3]]}
    sizes = {"x/a.jpg": (9, 9), "y/a.jpg": (9, 9), "b.jpg": (9, 9), "x/b.jpg": (9, 9)}
    store = ProposalStore.from_soco(soco(tmp_path, listed), tmp_path / "store", sizes)
    assert store.names(9) == ["b.jpg"]
    assert store.manifest["failures"]["image without an entry"] == ["x/a.jpg", "y/a.jpg", "x/b.jpg"]


@pytest.mark.parametrize(
    ("listed", "told"),
    [
        ([], "file must be SoCo's json"),
        ({"a.jpg": [[0, 0, 10, 5]]}, "boxes of a.jpg must be inside its 9 x 9 pixels, got others"),
        ({"a.jpg": [[0, 0, 0, 5]]}, "boxes of a.jpg must be inside its 9 x 9 pixels, got others"),
        ({"a.jpg": [[-1, 0, 3, 5]]}, "boxes of a.jpg must be inside its 9 x 9 pixels, got others"),
        (
            {"a.jpg": [[0, 0, 3.5, 5]]},
            r"boxes of a.jpg must be \[\[x, y, w, h\], ...\] in whole pixels, got \[\[0, 0, 3.5",
        ),
        ({"a.jpg": [[0, 0, 3]]}, r"boxes of a.jpg must be \[\[x, y, w, h\]"),
        ({"a.jpg": [[0, 0, None, 3]]}, r"boxes of a.jpg must be \[\[x, y, w, h\]"),
        ({"a.jpg": {"x": 3}}, r"boxes of a.jpg must be \[\[x, y, w, h\]"),
        ({"b.jpg": []}, r"file must have the images' names, got .* with \['b.jpg'\]; images are named \['a.jpg'\]"),
    ],
)
def test_what_is_not_socos_is_refused(tmp_path, listed, told, our_errors):
    with pytest.raises(ValueError, match=told):
        ProposalStore.from_soco(soco(tmp_path, listed), tmp_path / "store", {"a.jpg": (9, 9)})
    assert not (tmp_path / "store").exists()

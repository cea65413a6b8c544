import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import geoaug
from data_prep import proposal_work, selective_search, write_beton
from data_prep.shards import Made, hash_of
from geoaug import ProposalStore, read_image, sample_id
from geoaug.loading.decode import ReadError
from geoaug.proposals import select
from geoaug.proposals.shard_files import encode_shard

pytest.importorskip("pyarrow")
ROOT = Path(__file__).resolve().parent.parent


def picture(seed, height, width):
    """Patches of colours under a little noise: something that segments."""
    g = np.random.default_rng(seed)
    small = Image.fromarray(g.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    patches = np.asarray(small.resize((width, height), Image.Resampling.NEAREST)).astype(np.int64)
    return Image.fromarray(np.clip(patches + g.integers(-9, 10, patches.shape), 0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("photographs")
    (root / "images" / "cats").mkdir(parents=True)
    for i in range(8):
        picture(i, 90 + 7 * i, 140 - 5 * i).save(root / "images" / "cats" / f"{i:02d}.jpg", quality=95)
    picture(8, 80, 70).convert("L").save(root / "images" / "gray.png")
    picture(9, 1, 300).save(root / "images" / "line.png")
    Image.new("RGB", (1, 1)).save(root / "images" / "dot.png")
    Image.new("RGB", (90, 61), (3, 5, 7)).save(root / "images" / "flat.png")
    picture(10, 30, 2100).save(root / "images" / "long.jpg")
    (root / "images" / "bad.jpg").write_bytes(b"no picture")
    (root / "images" / "none.jpg").write_bytes(b"")
    names = sorted(path.relative_to(root / "images").as_posix() for path in (root / "images").rglob("*.*"))
    (root / "list.txt").write_text("\n".join(names))
    return root


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("stores") / "store"
    assert selective_search.main([str(folder), "--out", str(out), "--shard-size", "5", "--workers", "2"]) == 0
    return out


def names_of(folder):
    return (folder / "list.txt").read_text().split("\n")


def by_hand(file, **search):
    """The boxes of the preset d3ssl, in the words of the design."""
    pixels = read_image(file)[0].numpy()
    boxes = geoaug.selective_search(pixels, scale=300, sigma=0.9, min_size=100, **search).tolist()
    distinct = [box for i, box in enumerate(boxes) if box not in boxes[:i]]
    return pixels.shape[:2], select.soco_filter(np.array(distinct, dtype=np.uint16), pixels.shape[:2])


def files_of(store, but=("index",)):
    return {path.name: path.read_bytes() for path in store.iterdir() if path.name not in but}


def test_a_store_holds_what_its_preset_says(folder, made):
    store, names = ProposalStore.open(made), names_of(folder)
    good = [name for name in names if name not in ("bad.jpg", "none.jpg")]
    assert len(store) == len(good) == len(names) - 2
    some = 0
    for name in good:
        size, boxes = by_hand(folder / "images" / name)
        assert np.array_equal(store.boxes(sample_id(name)), boxes)
        assert tuple(store.sizes[store.rows(np.array([sample_id(name)]))[0]]) == size
        some += len(boxes)
    assert some > 20
    manifest = store.manifest
    assert manifest["failures"] == {
        "undecodable": [["bad.jpg", "not an image of a known kind"]], "empty": [["none.jpg", "no bytes"]]
    }  # fmt: skip
    assert manifest["counts"] == {"images": len(good), "boxes": some}
    assert manifest["images"] == {"count": len(names), "hash": hash_of(names)}
    assert (manifest["preset"], manifest["engine"], manifest["filter"]) == ("d3ssl", "geoaug", "ratio3size0308")
    assert manifest["parameters"]["scale"] == 300
    assert manifest["versions"][0]["geoaug"] == geoaug.__version__
    assert str(folder) not in json.dumps(manifest)


def test_killed_and_continued_gives_the_same_bytes(folder, made, capsys):
    out = made.with_name("killed")
    arguments = [str(folder), "--out", str(out), "--shard-size", "5", "--workers", "1"]
    for _ in range(5):  # on a busy machine a run may be over before it is seen to have begun
        driver = subprocess.Popen([sys.executable, str(ROOT / "data_prep" / "selective_search.py"), *arguments])
        while not (out / "shard-00000.json").exists():
            assert driver.poll() is None
            time.sleep(0.01)
        driver.kill()
        driver.wait()
        if not (out / "manifest.json").exists():
            break
        shutil.rmtree(out)
    before = {path: path.stat().st_mtime_ns for path in out.glob("shard-00000.*")}
    assert selective_search.main(arguments) == 0
    first, last = capsys.readouterr().out.strip().splitlines()
    assert " images in " in first
    assert "COCO train2017 (118,287 images) takes" in first
    assert last.startswith(f"selective_search: wrote {out}: 13 images, ")
    assert last.endswith("images without a box, 1 failed: empty, 1 failed: undecodable")
    assert files_of(out) == files_of(made)  # made by two workers
    assert selective_search.main(arguments) == 0  # all is done
    assert capsys.readouterr().out.strip() == last
    assert {path: path.stat().st_mtime_ns for path in out.glob("shard-00000.*")} == before


def test_the_same_bytes_on_a_cluster(folder, made):
    pytest.importorskip("distributed")
    out = made.with_name("cluster")
    arguments = [str(folder), "--out", str(out), "--shard-size", "5", "--workers", "1", "--cluster", "local"]
    assert selective_search.main(arguments) == 0
    assert files_of(out) == files_of(made)


def test_the_keyboard_is_told_in_one_line(folder, tmp_path, monkeypatch, capsys):
    def pressed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(selective_search, "run", pressed)
    assert selective_search.main([str(folder), "--out", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == (
        "selective_search: stopped by the keyboard; the same command goes on from here\n"
    )  # fmt: skip


def test_other_sources_have_the_same_boxes(folder, made, tmp_path):
    names = names_of(folder)
    record = {"images": [{"id": i, "file_name": name, "height": 9, "width": 9} for i, name in enumerate(names)]}
    (folder / "instances.json").write_text(json.dumps(record))
    sources = {"list": ["list.txt", "--images", str(folder / "images")], "json": ["instances.json"]}
    for kind, (file, *more) in sources.items():
        opened = proposal_work.open_images(folder / file, Path(more[1]) if more else None)
        assert list(opened.names) == names
        assert opened.items == proposal_work.open_images(folder, None).items, kind
    beton = tmp_path / "small.beton"
    assert write_beton.main([str(folder), "--out", str(beton), "--max-resolution", "100", "--workers", "1"]) == 0
    out = tmp_path / "store"
    assert selective_search.main([str(beton), "--out", str(out), "--workers", "1"]) == 0
    store, theirs = ProposalStore.open(out), ProposalStore.open(made)
    assert np.array_equal(store.ids, theirs.ids)
    assert np.array_equal(store.sizes, theirs.sizes)  # of the source, not of what is stored
    kept, large = sample_id("cats/07.jpg"), sample_id("cats/00.jpg")
    assert np.array_equal(store.boxes(kept), theirs.boxes(kept)) == (139 <= 100)
    stored = geoaug.loading.beton.Beton.open(beton)
    row = stored.ids.tolist().index(large)
    pixels = geoaug.loading.decode.decode_jpeg(stored.jpeg(row).tobytes(), True).numpy()
    assert pixels.shape[:2] == (64, 100)
    grown = proposal_work.in_source(geoaug.selective_search(pixels), (64, 100), (90, 140))
    assert np.array_equal(store.boxes(large), select.soco_filter(select.distinct(grown), (90, 140)))
    assert len(store.boxes(large)) > 2


def test_boxes_of_a_smaller_copy_cover_their_pixels_of_the_source():
    boxes = np.array([[0, 0, 4, 2], [1, 0, 2, 1], [3, 1, 4, 2]], dtype=np.uint16)
    assert proposal_work.in_source(boxes, (2, 4), (3, 10)).tolist() == [[0, 0, 10, 3], [2, 0, 5, 2], [7, 1, 10, 3]]
    assert proposal_work.in_source(boxes, (2, 4), (2, 4)) is boxes


@pytest.mark.parametrize("preset", ["soco", "strategies"])
def test_the_other_presets(folder, preset):
    search, filtered = proposal_work.PRESETS[preset]
    item = str(folder / "images" / "cats" / "03.jpg")
    size, boxes = proposal_work.work_of(search, filtered)(item)
    if preset == "soco":
        assert np.array_equal(boxes, by_hand(Path(item), texture="soco")[1])
    else:
        pixels = read_image(Path(item))[0].numpy()
        assert np.array_equal(boxes, geoaug.selective_search(pixels, mode="strategies", strategies="fast"))
    assert size == (111, 125)
    assert len(boxes) > 0


def test_a_damaged_jpeg_of_a_beton_is_a_failure(folder, tmp_path):
    beton = tmp_path / "few.beton"
    assert write_beton.main([str(folder), "--out", str(beton), "--workers", "1"]) == 0
    opened = proposal_work.Beton.open(beton)
    data = bytearray(beton.read_bytes())
    data[int(opened.starts[3]) + 700] ^= 64
    (tmp_path / "damaged.beton").write_bytes(data)
    with pytest.raises(ReadError) as caught:
        proposal_work.propose((str(tmp_path / "damaged.beton"), 3), search={}, soco_filter=False)
    assert caught.value.kind == "crc"


def test_damage_is_repaired_and_other_parameters_refused(folder, made, capsys):
    out = made.with_name("damaged")
    shutil.copytree(made, out)
    file = out / "shard-00001.parquet"
    file.write_bytes(file.read_bytes()[:-5])
    arguments = [str(folder), "--out", str(out), "--shard-size", "5", "--workers", "1"]
    assert selective_search.main(arguments) == 1
    assert "shard shard-00001.parquet: it is cut short" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"shard shard-00001\.parquet must be as the manifest says, .*--repair"):
        ProposalStore.open(out)
    assert selective_search.main([*arguments, "--repair"]) == 0
    assert files_of(out) == files_of(made)
    capsys.readouterr()
    for more, told in (
        (["--sigma", "0.8"], "about.parameters.sigma was 0.9 and is now 0.8"),
        (
            ["--preset", "soco"],
            "about.parameters.texture was package and is now soco; about.preset was d3ssl and is now ",
        ),
        (["--limit", "9"], "images.count was 15 and is now 9"),
        (["--shard-size", "6"], "shard_size was 5 and is now 6"),
    ):
        assert selective_search.main([*arguments, *more]) == 1
        message = capsys.readouterr().err
        assert "was made otherwise and is not continued" in message
        assert told in message
    assert files_of(out) == files_of(made)


def test_socos_file_becomes_a_store(folder, tmp_path, capsys):
    file = tmp_path / "train.json"
    file.write_text(json.dumps({"00.jpg": [[10, 20, 30, 40]], "01": [[0, 0, 135, 97]], "elsewhere.jpg": []}))
    out = tmp_path / "store"
    assert selective_search.main([str(folder), "--out", str(out), "--from-soco", str(file)]) == 0
    store = ProposalStore.open(out)
    assert store.boxes(sample_id("cats/00.jpg")).tolist() == [[10, 20, 40, 60]]
    assert store.boxes(sample_id("cats/01.jpg")).tolist() == [[0, 0, 135, 97]]
    told = capsys.readouterr()
    assert "2 images, 2 boxes" in told.out
    assert told.out.strip().endswith("1 failed: entry without an image, 11 failed: image without an entry")
    assert "2 images cannot be read, such as ['bad.jpg', 'none.jpg']" in told.err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere", "--out", "x"], "path must be a folder"),
        ([".", "--out", "x", "--preset", "best"], "invalid choice: 'best'"),
        ([".", "--out", "x", "--workers", "0"], "expected 1 to 1024, got 0"),
        ([".", "--out", "x", "--workers", "two"], "invalid whole number value: 'two'"),
        ([".", "--out", "x", "--strategies", "fast"], "--strategies is of --preset strategies, not of d3ssl"),
        ([".", "--out", "x", "--engine", "opencv"], "mode must be 'strategies' for engine='opencv'"),
        (["."], "the following arguments are required: --out"),
    ],
)
def test_wrong_usage_exits_with_2(folder, tmp_path, monkeypatch, capsys, arguments, told):
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as caught:
        selective_search.main(arguments)
    assert caught.value.code == 2
    assert told in capsys.readouterr().err
    assert not Path("x").exists()


def test_no_image_at_all_is_no_store(folder, tmp_path, monkeypatch, capsys):
    def failed(job, **_):
        entry = {"file": "shard-00000.parquet", "images": 0, "boxes": 0, "failures": [["bad.jpg", "empty", "no bytes"]]}
        return Made([entry], [{}], 1)

    monkeypatch.setattr(selective_search, "run", failed)
    assert selective_search.main([str(folder), "--out", str(tmp_path / "out")]) == 1
    assert "no image could be searched, such as ['empty', 'bad.jpg', 'no bytes']" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError):
        ProposalStore.open(tmp_path / "out")


def test_photographs_take_few_bytes(data, tmp_path):
    photographs = sorted((data / "coco_mini" / "images").rglob("*.jpg"))[::9][:40]
    (tmp_path / "list.txt").write_text("\n".join(str(path) for path in photographs))
    source = [str(tmp_path / "list.txt"), "--images", str(data / "coco_mini" / "images")]
    assert selective_search.main([*source, "--out", str(tmp_path / "store")]) == 0
    store = ProposalStore.open(tmp_path / "store")
    assert len(store) == 40
    (stored,) = (shard["bytes"] for shard in store.manifest["shards"])
    bare = [(name, (480, 640), np.zeros((0, 4), dtype=np.uint16)) for name in store.names(40)]
    share = stored - len(encode_shard(bare)[0])  # a large shard's names and tables hardly count
    assert share < 5 * len(store.flat)

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import resize

from data_prep import beton_samples, write_beton
from data_prep.beton_file import BetonFile
from geoaug import Key, read_image, sample_id
from geoaug.loading.batch import pad_boxes
from geoaug.loading.beton import Beton
from geoaug.loading.source import open_source

SIDE = 64  # --max-resolution of these tests


def picture(seed: int, height: int, width: int) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photographs")
    for name in ("cats", "dogs"):
        (root / name).mkdir()
    for i in range(30):
        file = root / ("cats" if i % 3 else "dogs") / f"{i:02d}.jpg"
        picture(i, 40 + i % 20, 64 - i % 11).save(file, quality=85 + i % 10, progressive=i % 4 == 0)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(90, 50, 61).save(root / "cats" / "turned.jpg", exif=exif)
    picture(91, 50, 61).convert("L").save(root / "cats" / "gray.JPEG")
    picture(91, 50, 62).save(root / "cats" / os.fsdecode(b"\xc3\xa9 \xff.jpg"), "JPEG")
    picture(92, 50, 61).convert("CMYK").save(root / "cats" / "cmyk.jpg")
    picture(93, 150, 101).save(root / "cats" / "tall.jpg")
    picture(94, 2, 700).save(root / "cats" / "flat.png")
    picture(95, 51, 32).save(root / "cats" / "plain.png")
    picture(96, 51, 32).convert("P").save(root / "cats" / "palette.png")
    deep = np.random.default_rng(0).integers(0, 2**16, (31, 33), dtype=np.uint16)
    Image.fromarray(deep).save(root / "cats" / "deep.png")
    return root


@pytest.fixture(scope="module")
def broken(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A list of four photographs and of five files that cannot be read."""
    root = tmp_path_factory.mktemp("broken")
    (root / "bad").mkdir()
    whole = (folder / "cats" / "01.jpg").read_bytes()
    for name, content in {
        "cut": whole[:-60] + b"\xff\xd9",
        "text": b"no picture",
        "empty": b"",
        "lost": whole[:200],
    }.items():
        (root / "bad" / f"{name}.jpg").write_bytes(content)
    for i in range(4):
        (root / f"{i}.jpg").write_bytes(whole)
    names = ["0.jpg", "bad/cut.jpg", "1.jpg", "bad/text.jpg", "bad/empty.jpg", "2.jpg", "bad/lost.jpg", "none.jpg"]
    (root / "list.txt").write_text("\n".join([*names, "3.jpg"]))
    return root / "list.txt"


def arguments(images: Path, out: Path, *more: str) -> list[str]:
    return [str(images), "--out", str(out), "--max-resolution", str(SIDE), *more]


@pytest.fixture(scope="module")
def written(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "photographs.beton"
    assert write_beton.main(arguments(folder, out, "--workers", "1")) == 0
    return out


def test_samples_are_the_source(folder: Path, written: Path) -> None:
    beton, source = Beton.open(written), open_source(folder)
    names = list(source.names)
    assert list(beton.names) == names
    assert beton.damaged(range(len(beton))) == []
    assert beton.manifest["classes"] == ["cats", "dogs"]
    assert (beton.slots, beton.manifest["boxes"]) == (1, "none")
    as_it_was = 0
    for row, name in enumerate(names):
        image, _ = read_image(folder / name)
        assert tuple(beton.sizes[row]) == tuple(image.shape[:2])
        assert beton.ids[row] == sample_id(name)
        assert beton.labels[row] == int(name.startswith("dogs"))
        assert [len(part) for part in beton.boxes(row)] == [0, 0]
        jpeg, file = beton.jpeg(row).tobytes(), (folder / name).read_bytes()
        if name.endswith(("cmyk.jpg", "tall.jpg", ".png")):
            size = [max(1, round(side * min(1, SIDE / max(image.shape[:2])))) for side in image.shape[:2]]
            expected = resize(image.permute(2, 0, 1), size, antialias=True).permute(1, 2, 0).numpy()
            assert tuple(beton.stored[row]) == expected.shape[:2]
            Image.fromarray(expected).save(again := io.BytesIO(), "JPEG", quality=90)
            assert jpeg == again.getvalue()
        else:
            assert jpeg == file
            assert tuple(beton.stored[row]) == tuple(beton.sizes[row])
            as_it_was += 1
    assert as_it_was == 33
    assert beton.manifest["conversions"] == {"EXIF orientation ignored": 1, "made smaller": 2, "re-encoded": 6}


def test_two_workers_and_the_command_line_write_the_same_bytes(folder: Path, written: Path, tmp_path: Path) -> None:
    command = [sys.executable, write_beton.__file__, *arguments(folder, tmp_path / "x.beton", "--workers", "2")]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    assert run.stdout.endswith("x.beton: 39 samples, 6 re-encoded, 0 boxes dropped, 0 failures\n")
    assert run.stdout.count("\n") == 1
    assert (tmp_path / "x.beton").read_bytes() == written.read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["x.beton"]


def test_order_is_kept_while_workers_run_ahead(
    folder: Path, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_beton, "_SHARD", 2)  # 20 shards, so that those ahead are bounded
    assert write_beton.main(arguments(folder, tmp_path / "x.beton", "--workers", "2")) == 0
    assert (tmp_path / "x.beton").read_bytes() == written.read_bytes()


def test_what_cannot_be_read_is_left_out_and_named(
    broken: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made" / "x.beton"
    assert write_beton.main(arguments(broken, out, "--workers", "1")) == 0
    said, told = capfd.readouterr()
    beton = Beton.open(out)
    named = {kind: [name for name, _ in listed] for kind, listed in beton.manifest["failures"].items()}
    assert named == {
        "damaged": ["bad/cut.jpg"], "undecodable": ["bad/text.jpg", "bad/lost.jpg"], "empty": ["bad/empty.jpg"],
        "missing": ["none.jpg"],
    }  # fmt: skip
    assert said.startswith(f"write_beton: wrote {out}: 4 samples, ")
    assert said.endswith(", 1 failed: damaged, 2 failed: undecodable, 1 failed: empty, 1 failed: missing\n")
    assert "bad/cut.jpg: damaged: " in told
    assert list(beton.names) == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
    assert str(broken.parent) not in json.dumps(beton.manifest)
    assert [file.name for file in out.parent.iterdir()] == ["x.beton"]


def test_where_nothing_can_be_read_no_file_is_left(
    broken: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert write_beton.main(arguments(broken.parent / "bad", tmp_path / "x.beton", "--workers", "1")) == 1
    said, told = capfd.readouterr()
    assert said == ""
    assert "no image could be stored" in told
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def coco(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    images, annotations = [], []
    for i, name in enumerate(["cats/01.jpg", "cats/tall.jpg", "dogs/00.jpg", "cats/02.jpg"]):
        with Image.open(folder / name) as image:
            width, height = image.size
        images.append({"id": i, "file_name": name, "width": width * (1 + (i == 3)), "height": height})
        for j in range(4 * i):
            box = {"id": 100 * i + j, "image_id": i, "category_id": 5 + j % 3, "bbox": [j, 2 * j, 7, 5], "iscrowd": 0}
            annotations.append({**box, "iscrowd": int(j == 2)})
    categories = [{"id": 5, "name": "five"}, {"id": 6, "name": "six"}]
    file = tmp_path_factory.mktemp("coco") / "instances.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return file


@pytest.mark.parametrize("slots", [None, 4])
def test_boxes_of_a_json(
    folder: Path, coco: Path, tmp_path: Path, slots: int | None, capfd: pytest.CaptureFixture[str]
) -> None:
    more = ["--images", str(folder), *([] if slots is None else ["--slots", str(slots)])]
    assert write_beton.main(arguments(coco, tmp_path / "x.beton", *more)) == 0
    said = capfd.readouterr().out
    beton, objects = Beton.open(tmp_path / "x.beton"), open_source(coco, folder).objects
    assert objects is not None
    assert list(beton.names) == ["cats/01.jpg", "cats/tall.jpg", "dogs/00.jpg"]
    assert "is 62 x 42, its boxes are of 124 x 42" in json.dumps(beton.manifest["failures"]["size"])
    assert beton.slots == (slots or 11)  # also of an image that failed: counted before any is read
    assert (beton.manifest["boxes"], beton.manifest["categories"]) == ("objects", ["five", "six"])
    assert f" {beton.manifest['boxes_dropped']} boxes dropped" in said
    assert beton.manifest["boxes_dropped"] == (0 if slots is None else 3)
    assert np.diff(objects.offsets).tolist() == [0, 3, 7, 11]
    for row in range(3):
        own = slice(objects.offsets[row], objects.offsets[row + 1])
        key = Key(0, 0, [int(beton.ids[row])])
        boxes, valid, labels = pad_boxes([objects.boxes[own]], [objects.labels[own]], beton.slots, key)
        assert np.array_equal(beton.boxes(row)[0], boxes[valid].numpy())
        assert np.array_equal(beton.boxes(row)[1], labels[valid].numpy())
        if slots is None:
            assert np.array_equal(beton.boxes(row)[0], objects.boxes[own])


class Store:
    """Stands in for a store of proposals: six boxes for every image but those left out."""

    def __init__(self, ids: np.ndarray, sizes: np.ndarray, without: int = 0) -> None:
        self.ids, self.sizes, self.manifest = ids[without:], sizes[without:], {"preset": "a test"}

    def rows(self, ids: np.ndarray) -> np.ndarray:
        row_of = {identity: row for row, identity in enumerate(self.ids.tolist())}
        return np.array([row_of.get(identity, -1) for identity in ids.tolist()])

    def boxes(self, identity: int) -> np.ndarray:
        corner = np.arange(identity % 7, dtype=np.uint16)[:, None]
        return np.concatenate((corner, corner + 1, corner + 20, corner + 24), axis=1)


def test_boxes_of_a_store(folder: Path, coco: Path, tmp_path: Path) -> None:
    source = open_source(coco, folder)
    sizes = np.array([read_image(folder / name)[0].shape[:2] for name in source.names])
    done = write_beton.write_beton(
        source, tmp_path / "x.beton", proposals=Store(source.ids, sizes), max_resolution=SIDE
    )
    beton = Beton.open(tmp_path / "x.beton")
    assert (done.samples, len(beton), done.failures) == (4, 4, [])
    assert (beton.manifest["boxes"], beton.manifest["store"]) == ("proposals", {"preset": "a test"})
    assert beton.manifest["categories"] == []
    for row in range(4):
        h, w = sizes[row]
        expected = Store(source.ids, sizes).boxes(int(source.ids[row])) / np.array([w, h, w, h])
        boxes, labels = beton.boxes(row)
        assert np.allclose(boxes, expected, rtol=0, atol=1e-6)
        assert (labels == -1).all()
    with pytest.raises(
        ValueError, match=r"got 2 of 4 with an entry in the store; without one: cats/01\.jpg, cats/tall"
    ):
        write_beton.write_beton(source, tmp_path / "y.beton", proposals=Store(source.ids, sizes, without=2))
    sizes[1:] *= (1, 2)
    other = write_beton.write_beton(source, tmp_path / "z.beton", proposals=Store(source.ids, sizes))
    assert [(name, kind) for name, kind, _ in other.failures] == [(name, "size") for name in source.names[1:]]


def test_a_real_store(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    from geoaug.proposals.store import ProposalStore

    boxes = np.array([[1, 2, 11, 22], [0, 0, 31, 33]], dtype=np.uint16)
    names = open_source(folder / "dogs").names
    records = [(name, read_image(folder / "dogs" / name)[0].shape[:2], boxes[: i % 3]) for i, name in enumerate(names)]
    ProposalStore.write(tmp_path / "store", [(name, (int(h), int(w)), b) for name, (h, w), b in records])
    more = ["--proposals", str(tmp_path / "store"), "--workers", "1"]
    assert write_beton.main(arguments(folder / "dogs", tmp_path / "x.beton", *more)) == 0
    beton, store = Beton.open(tmp_path / "x.beton"), ProposalStore.open(tmp_path / "store")
    assert beton.manifest["store"] == store.manifest
    padded, valid = store.padded(torch.from_numpy(beton.ids), 2)
    for row in range(len(beton)):
        assert np.array_equal(beton.boxes(row)[0], padded[row][valid[row]].numpy())


def dies(jobs: list[object], **options: object) -> None:
    """A process in the process pool was terminated"""
    os._exit(9)


def raises(jobs: list[object], **options: object) -> None:
    """a fault in a worker"""
    raise RuntimeError("a fault in a worker")


@pytest.mark.parametrize("fault", [dies, raises])
def test_a_worker_that_dies_or_raises_ends_it_in_one_line(
    fault: Callable[..., None], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(write_beton, "_shard", fault)
    began = time.monotonic()
    assert write_beton.main(arguments(folder, tmp_path / "x.beton", "--workers", "2")) == 1
    assert time.monotonic() - began < 30
    said, told = capfd.readouterr()
    assert said == ""
    assert told.startswith(f"write_beton: stopped, {fault.__doc__}")
    assert told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_stops_it_leaves_the_older_file(
    error: BaseException, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def add(*_: object) -> bool:
        raise error

    monkeypatch.setattr(BetonFile, "add", add)
    (tmp_path / "x.beton").write_bytes(b"older")
    assert write_beton.main(arguments(folder, tmp_path / "x.beton", "--workers", "1", "--overwrite")) == 1
    assert capfd.readouterr().err.count("\n") == 1
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"older"]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--out", "there.beton"], "--out there.beton exists: add --overwrite"),
        (["--out", "x.ffcv"], "--out must be a file that ends in .beton"),
        (["--slots", "0"], "--slots"),
        (["--max-resolution", "-1"], "--max-resolution"),
        (["--jpeg-quality", "101"], "--jpeg-quality"),
        (["--proposals", "nowhere"], "nowhere"),
        (["--images", "nowhere"], "nowhere"),
    ],
)
def test_wrong_usage_exits_with_2(
    more: list[str], says: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("there.beton").write_bytes(b"mine")
    for images in (str(folder), "no/such/folder"):
        with pytest.raises(SystemExit) as stop:
            write_beton.main([images, "--out", "x.beton", *more])
        assert stop.value.code == 2
        told = capfd.readouterr().err
        assert says in told or images != str(folder)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"mine"]


def test_overwriting_and_writing_twice_give_the_same(folder: Path, tmp_path: Path) -> None:
    more = ["--workers", "1", "--overwrite"]
    (tmp_path / "x.beton").write_bytes(b"older")
    for _ in range(2):
        assert write_beton.main(arguments(folder / "dogs", tmp_path / "x.beton", *more)) == 0
    assert Beton.open(tmp_path / "x.beton").damaged(range(10)) == []


def test_an_image_larger_than_a_page_is_a_failure(folder: Path, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1100, 1000, 3), dtype=np.uint8)
    (tmp_path / "in").mkdir()
    Image.fromarray(noise).save(tmp_path / "in" / "noise.jpg", quality=100, subsampling=0)
    picture(0, 1100, 1000).save(tmp_path / "in" / "plain.jpg")
    source = open_source(tmp_path / "in")
    done = write_beton.write_beton(source, tmp_path / "x.beton", max_resolution=None, page_size=2**21)
    assert [(name, kind) for name, kind, _ in done.failures] == [("noise.jpg", "too large")]
    done = write_beton.write_beton(source, tmp_path / "x.beton", max_resolution=None)
    assert (done.samples, done.notes["re-encoded"]) == (2, 0)


def test_frames_are_found_in_headers(folder: Path) -> None:
    seen = set()
    for file in sorted(folder.rglob("*.*")):
        data = file.read_bytes()
        with Image.open(file) as image:
            expected = (image.height, image.width, len(image.getbands())) if image.format == "JPEG" else None
        assert beton_samples.frame_of(data) == expected
        seen.add(expected and expected[2])
        for cut in range(0, min(len(data), 700), 7):
            assert beton_samples.frame_of(data[:cut]) in (None, expected)
    assert seen == {1, 3, 4, None}
    start = b"\xff\xd8\xff\xff\xe0\x00\x04ab"  # with a fill byte
    frame = b"\x00\x0b%c\x00\x07\x00\x05\x01\x01\x11\x00"
    assert beton_samples.frame_of(start + b"\xff\xc0" + frame % 8) == (7, 5, 1)
    assert beton_samples.frame_of(start + b"\xff\xc0" + frame % 12) is None  # 12 bits
    assert beton_samples.frame_of(start + b"\xff\xc9" + frame % 8) is None  # arithmetic code
    assert beton_samples.frame_of(b"\xff\xd8" + bytes(100)) is None


STOCK = """
import sys, zlib
import numpy as np
from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.reader import Reader
reader = Reader(sys.argv[1])
assert len(reader.alloc_table) == 4 * reader.num_samples, "allocations"
assert list(reader.metadata_type.fields) == [f"f{i}" for i in range(11)]
assert reader.handlers["boxes"].shape == (11, 4) and reader.handlers["box_labels"].dtype == np.int64
for os_cache in (True, False):
    kept = {name: [] for name in reader.field_names}
    loader = Loader(sys.argv[1], batch_size=2, num_workers=1, os_cache=os_cache, drop_last=False,
                    pipelines={"image": [SimpleRGBImageDecoder()]})
    for batch in loader:
        for name, value in zip(reader.field_names, batch):
            kept[name] += [np.array(row) for row in value]
    np.savez(sys.argv[2 + os_cache], **{name: np.stack(rows) for name, rows in kept.items()})
"""


def test_ffcv_reads_it(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("ffcv")
    images, annotations = [], []
    for i in range(5):
        picture(i, 48, 56).save(tmp_path / f"{i}.jpg")
        images.append({"id": i, "file_name": f"{i}.jpg", "width": 56, "height": 48})
        annotations += [
            {"id": 20 * i + j, "image_id": i, "category_id": 1, "bbox": [j, 1, 5 + i, 7]} for j in range(3 * i - 1)
        ]
    (tmp_path / "images").mkdir()
    record = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "one"}]}
    (tmp_path / "i.json").write_text(json.dumps(record))
    out = tmp_path / "x.beton"
    assert write_beton.main([str(tmp_path / "i.json"), "--images", str(tmp_path), "--out", str(out)]) == 0
    kept = [tmp_path / "process.npz", tmp_path / "system.npz"]
    command = [sys.executable, "-c", STOCK, str(out), *map(str, kept)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    beton = Beton.open(out)
    for file in kept:
        stock = np.load(file)
        assert np.array_equal(stock["id"][:, 0], beton.ids)
        assert np.array_equal(stock["crc"][:, 0], beton.crcs)
        assert np.array_equal(stock["label"][:, 0], beton.labels)
        assert np.array_equal(np.concatenate((stock["height"], stock["width"]), 1), beton.sizes)
        for row in range(5):
            boxes, labels = beton.boxes(row)
            assert stock["box_count"][row, 0] == len(boxes) == max(0, 3 * row - 1)
            assert np.array_equal(stock["boxes"][row][: len(boxes)], boxes)
            assert np.array_equal(stock["box_labels"][row][: len(boxes)], labels)
            assert bytes(stock["name"][row]) == beton.names[row].encode()
            image, _ = read_image(tmp_path / f"{row}.jpg")
            assert np.abs(stock["image"][row].astype(int) - image.numpy()).max() <= 8  # FFCV's decoder is the fast one

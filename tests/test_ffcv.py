"""The .beton loader: the folder loader's batches, the pixels the plan says, and threads that end."""

import gc
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import warnings
import weakref
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg

from data_prep.beton_file import BetonFile, Sample
from geoaug import LoadError, ProposalStore, ViewSpec, grids, open_loader, plan_views, render, sample_id
from geoaug.loading.beton import Beton
from geoaug.loading.crc import _through_tables, crc32
from geoaug.loading.crew import Crew, Pool
from geoaug.loading.source import open_source
from geoaug.testing import coordinate_image, disagreement

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # FFCV imports distutils at its first import
    pytest.importorskip("ffcv")

from geoaug.loading import beton_job, ffcv_ops, jpeg_kernels

pytestmark = pytest.mark.timeout(120)
SPECS = [ViewSpec((24, 32), (0.2, 1.0)), ViewSpec.like(0, 16), ViewSpec.whole(20, flip=0.5)]
VIEWS = [ViewSpec(96, (0.08, 1.0), flip=0.5), ViewSpec((48, 80), (0.08, 1.0), flip=1.0), ViewSpec.whole(64),
         ViewSpec((33, 57), (0.08, 1.0), flip=0.0)]  # fmt: skip
SIZES = [(97, 131), (128, 96), (61, 60), (45, 120), (110, 70)]
TINY = [(5, 7), (7, 5), (9, 16), (11, 6), (6, 6)]
BANDS = 8


def jpeg(image, **options):
    with io.BytesIO() as file:
        Image.fromarray(image).save(file, "JPEG", **{"quality": 90, **options})
        return file.getvalue()


def picture(seed, height, width):
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BILINEAR))


def write(path, samples, slots=4):
    """A .beton of (name, jpeg, label, boxes, box labels), each stored as it is."""
    with BetonFile(path, len(samples), slots, 1 << 21) as file:
        for name, data, label, boxes, labels in samples:
            width, height = Image.open(io.BytesIO(data)).size
            padded, classes = np.zeros((slots, 4), dtype=np.float32), np.full(slots, -1, dtype=np.int64)
            padded[: len(boxes)], classes[: len(labels)] = np.reshape(boxes, (-1, 4)), labels
            size = (height, width)
            file.add(Sample(name, sample_id(name), label, data, size, size, padded, classes, len(boxes)))
        file.finish({})
    return path


def convert(path, out, slots=4):
    """The .beton of a folder, list or json whose images are all JPEGs."""
    source = open_source(path)
    samples = []
    for i, name in enumerate(source.names):
        own = slice(0, 0) if source.objects is None else slice(*source.objects.offsets[i : i + 2])
        boxes = np.zeros((0, 4)) if source.objects is None else source.objects.boxes[own]
        labels = np.zeros(0) if source.objects is None else source.objects.labels[own]
        samples.append((name, (source.root / name).read_bytes(), int(source.labels[i]), boxes, labels))
    return write(out, samples, slots)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "photographs"
    rotated = Image.Exif()
    rotated[0x0112] = 6
    for i in range(22):
        sub = root / "images" / ("cats" if i % 3 else "dogs")
        sub.mkdir(parents=True, exist_ok=True)
        image = picture(i, 40 + 3 * i, 90 - 2 * i)
        kinds = [{}, {"progressive": True}, {"subsampling": 0}, {"exif": rotated}, {"restart_marker_rows": 1}]
        options = kinds[i % 5]
        (sub / f"{i:03d}.jpg").write_bytes(jpeg(image[..., 0] if i == 7 else image, **options))
    return root


@pytest.fixture(scope="module")
def coco(folder):
    images, annotations = [], []
    for i in range(22):
        name, h, w = f"{'cats' if i % 3 else 'dogs'}/{i:03d}.jpg", 40 + 3 * i, 90 - 2 * i
        images.append({"id": 100 + i, "file_name": name, "height": h, "width": w})
        for j in range(i % 5):
            box = {"bbox": [3 * j, 2 * j, 20, 10], "category_id": 7 if j % 2 else 3, "iscrowd": 0}
            annotations.append({"id": 10 * i + j, "image_id": 100 + i, **box})
    record = {"images": images, "annotations": annotations, "categories": [{"id": 7}, {"id": 3}]}
    for category in record["categories"]:
        category["name"] = str(category["id"])
    (folder / "instances.json").write_text(json.dumps(record))
    return folder / "instances.json"


@pytest.fixture(scope="module")
def beton(folder, tmp_path_factory):
    return convert(folder, tmp_path_factory.mktemp("beton") / "photographs.beton")


def fields(batch):
    plan = [batch.plan.crop, batch.plan.flipped, batch.plan.ids, batch.plan.source_size]
    return [*batch.images, *plan, batch.ok, batch.boxes, batch.box_valid, batch.box_labels, batch.label, batch.key.ids]


def same(a, b):
    keys = (a.key.epoch, a.plan.epoch, a.names) == (b.key.epoch, b.plan.epoch, b.names)
    return keys and all(torch.equal(x, y) for x, y in zip(fields(a), fields(b), strict=True))


def epochs(open_, path, count=1, specs=SPECS, **options):
    with open_(path, specs, **{"batch_size": 8, "seed": 3, "workers": 1, **options}) as loader:
        return [batch for _ in range(count) for batch in loader], loader


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "geoaug loader"]


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    before = torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # rendering "on a device" is tested on the CPU, where the loader's threads are busy already
    yield
    torch.set_num_threads(before)
    gc.collect()
    assert threads() == []


# --- pixels ---------------------------------------------------------------------------------------------------------


def bands(height, width):
    """Gray images uint8 [H, W, 3]: of BANDS a coordinate each shows a part of its ramp in full contrast, the sum all.

    Rendering is linear, so the sum of their views is the view of the sum, and a level is 1 / BANDS of what it is in one
    coordinate image. There it is half a pixel of the source, and more of a narrow view: rounding alone (with a ratio of
    two, torch's law rounds half of all pixels up) takes an exact renderer beyond the bound, JPEG or not. Gray, since
    JPEG rounds colours twice.
    """
    ramps = 255 * BANDS * coordinate_image(height, width)[:2]
    parts = [(ramp - 255 * k).clamp(0, 255).round().to(torch.uint8) for ramp in ramps for k in range(BANDS)]
    return [part[..., None].expand(-1, -1, 3).contiguous().numpy() for part in parts]


def coordinates(views):
    """The coordinates float32 [3, h, w] that the views of the bands hold together."""
    values = torch.stack([view[0].float() for view in views]).unflatten(0, (2, BANDS)).sum(1) / (255 * BANDS)
    return torch.cat((values, torch.zeros_like(values[:1])))


@pytest.fixture(scope="module")
def banded(tmp_path_factory):
    """For each set of sizes a .beton a band; all have the same names, so they get the same plan."""
    root, paths = tmp_path_factory.mktemp("bands"), {}
    for kind, sizes in (("large", SIZES), ("tiny", TINY)):
        parts = [[jpeg(part, quality=100, subsampling=0) for part in bands(*size)] for size in sizes]
        paths[kind] = [
            write(root / f"{kind}{k}.beton", [(f"{i}.jpg", part[k], -1, [], []) for i, part in enumerate(parts)])
            for k in range(2 * BANDS)
        ]
    return paths


def golden(paths, specs, mode):
    """(disagreement, longer side of its source) of every view in two epochs, flipped and not, narrow and wide."""
    loaded = [epochs(open_loader, path, 2, specs, batch_size=5, render=mode, workers=2)[0] for path in paths]
    flips, crops = set(), []
    for batches in zip(*loaded, strict=True):
        plan = batches[0].plan
        assert all(torch.equal(batch.plan.crop, plan.crop) for batch in batches)
        for row in range(5):
            size = plan.source_size[row].tolist()
            for v in range(len(specs)):
                view = coordinates([batch.images[v][row] for batch in batches])
                yield disagreement(view, plan.view_from_source[row, v], size), max(size)
                flips.add(bool(plan.flipped[row, v]))
        crops.append(plan.crop[:, 0])
    assert flips == {True, False}
    assert not torch.equal(*crops)


@pytest.mark.parametrize("views", [1, 2, 3, 4])
@pytest.mark.parametrize("mode", ["cpu", "device"])
def test_pixels_lie_where_the_plan_says_in_both_epochs(banded, views, mode):
    for found, side in golden(banded["large"], VIEWS[:views], mode):
        assert found.corner < 0.15
        assert found.pixel < side / 255 + 0.1


@pytest.mark.parametrize("mode", ["cpu", "device"])
def test_pixels_of_the_smallest_images_lie_where_the_plan_says(banded, mode):
    specs = [ViewSpec(96, (0.5, 1.0), flip=0.5), ViewSpec.whole((48, 80), flip=0.5)]
    for found, side in golden(banded["tiny"], specs, mode):
        assert found.corner < 0.15
        assert found.pixel < side / 255 + 0.1


@pytest.mark.parametrize("mode", ["cpu", "device"])
def test_pixels_of_the_smallest_views_lie_where_the_plan_says(banded, mode):
    specs = [ViewSpec((5, 7), (0.08, 1.0), flip=0.5), ViewSpec((7, 5), (0.08, 1.0), flip=0.5)]
    for found, side in golden(banded["large"], specs, mode):
        assert found.pixel < side / 255 + 0.1  # too few pixels inside the border for a fit


def test_pixels_follow_the_plan_of_their_own_epoch(beton):
    """A plan captured as a global would stay at the first epoch's."""
    file = Beton.open(beton)
    images = {}
    for row, name in enumerate(file.names):
        data = torch.from_numpy(file.jpeg(row).copy())
        images[name] = decode_jpeg(data, mode=ImageReadMode.RGB).permute(1, 2, 0).contiguous()
    batches, _ = epochs(open_loader, beton, 3, batch_size=22)
    moved = 0
    for epoch, batch in enumerate(batches):
        for row, name in enumerate(batch.names):
            own, old = (plan_views(SPECS, [images[name].shape[:2]], [sample_id(name)], seed=3, epoch=e)
                        for e in (epoch, 0))  # fmt: skip
            for mine, expected in zip(batch.images, render(images[name], own), strict=True):
                assert torch.equal(mine[row], expected)
            moved += not torch.equal(own.crop, old.crop)
    assert moved > 40


@pytest.mark.parametrize("size", [(5, 7), (1, 1), (7, 5), (16, 3), (1, 40)])
@pytest.mark.parametrize("mode", ["cpu", "device"])
def test_small_images(tmp_path, size, mode):
    image = picture(1, *size)
    path = write(tmp_path / "small.beton", [("a.jpg", jpeg(image), -1, [], [])])
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(jpeg(image))
    ours, _ = epochs(open_loader, path, 3, VIEWS, batch_size=1, render=mode)
    theirs, _ = epochs(open_loader, tmp_path / "images", 3, VIEWS, batch_size=1, workers=0)
    assert all(same(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    "options",
    [{}, {"render": "device"}, {"last": "keep"}, {"last": "keep", "render": "device", "replay": True},
     {"order": "file", "max_boxes": 2}, {"replay": True}, {"verify": False}, {"rank": 1, "world": 2},
     {"last": "keep", "batch_size": 20, "rank": 1, "world": 2},  # in its second step this rank has padding alone
     {"last": "keep", "batch_size": 20, "rank": 1, "world": 2, "render": "device"}],
)  # fmt: skip
def test_the_batches_of_the_folder_loader(folder, coco, beton, tmp_path, options):
    objects = convert(coco, tmp_path / "objects.beton")
    for there, here in ((folder, beton), (coco, objects)):
        theirs, folders = epochs(open_loader, there, 2, **{**options, "workers": 0})
        ours, loader = epochs(open_loader, here, 2, **options)
        assert len(ours) == len(theirs) > 0
        assert all(same(a, b) for a, b in zip(ours, theirs, strict=True))
        assert loader.report == folders.report
        assert loader.state_dict() == folders.state_dict()


def test_real_photographs_to_the_last_bit(data, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for file in sorted((data / "coco_mini").rglob("*.jpg"))[:24]:
        (images / file.name).write_bytes(file.read_bytes())
    path = convert(images, tmp_path / "real.beton")
    ours, _ = epochs(open_loader, path, specs=[ViewSpec(224), ViewSpec(96)], workers=2)
    theirs, _ = epochs(open_loader, images, specs=[ViewSpec(224), ViewSpec(96)], workers=0)
    assert all(same(a, b) for a, b in zip(ours, theirs, strict=True))


def test_proposals_replace_the_boxes_of_the_file(coco, tmp_path):
    class Store:
        def padded(self, ids, m, *, key=None):
            return torch.full((len(ids), m, 4), 0.5), torch.ones(len(ids), m, dtype=torch.bool)

    (batch, *_), _ = epochs(open_loader, convert(coco, tmp_path / "a.beton"), proposals=Store(), max_boxes=3)
    assert (batch.boxes == 0.5).all()
    assert (batch.box_labels == -1).all()


def test_short_side_views_come_one_at_a_time(beton, folder):
    specs = [ViewSpec.short_side(64, 100)]
    ours, _ = epochs(open_loader, beton, specs=specs, batch_size=1)
    theirs, _ = epochs(open_loader, folder, specs=specs, batch_size=1, workers=0)
    assert all(same(a, b) for a, b in zip(ours, theirs, strict=True))


# --- layouts, state, memory -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["cpu", "device"])
def test_workers_and_ranks_change_nothing(beton, mode):
    one, _ = epochs(open_loader, beton, 2, render=mode)
    for workers in (0, 2, 5):
        other, _ = epochs(open_loader, beton, 2, render=mode, workers=workers)
        assert all(same(a, b) for a, b in zip(one, other, strict=True))
    parts = [epochs(open_loader, beton, 2, render=mode, rank=r, world=2)[0] for r in range(2)]
    for whole, left, right in zip(one, *parts, strict=True):
        for x, *halves in zip(fields(whole), fields(left), fields(right), strict=True):
            assert torch.equal(torch.cat(halves), x)


def test_resume_in_mid_epoch(beton):
    uninterrupted, _ = epochs(open_loader, beton, 2, batch_size=4)
    with open_loader(beton, SPECS, batch_size=4, seed=3, workers=2) as loader:
        iterator = iter(loader)
        begun = [next(iterator) for _ in range(3)]
        state = json.loads(json.dumps(loader.state_dict()))
        iterator.close()
        loader.set_epoch(1)
        assert same(next(iter(loader)), uninterrupted[5])
    assert (state["epoch"], state["step"]) == (0, 3)
    with open_loader(beton, SPECS, batch_size=4, seed=3, workers=1) as loader:
        loader.load_state_dict(state)
        rest = [batch for _ in range(2) for batch in loader]
    assert all(same(a, b) for a, b in zip(begun + rest, uninterrupted, strict=True))


def test_what_a_consumer_keeps_is_never_written_again(beton):
    with open_loader(beton, SPECS, batch_size=2, seed=0, workers=2) as loader:
        kept = [(batch, [image.clone() for image in batch.images]) for _ in range(3) for batch in loader]
        views = [batch.images[0][0, 0] for batch in loader]  # a view alone keeps the memory
        copies = [view.clone() for view in views]
        list(loader)
    assert all(torch.equal(x, y) for batch, clones in kept for x, y in zip(batch.images, clones, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(views, copies, strict=True))


def test_the_pool_gives_memory_again_for_batches_that_are_a_little_smaller():
    pool = Pool(most=2)
    addresses = {torch.from_numpy(pool.take(size)).data_ptr() for size in (10, 7, 9, 5, 10)}
    assert len(addresses) == 1
    held = torch.from_numpy(pool.take(6))
    assert held.shape == (6,)
    assert torch.from_numpy(pool.take(6)).data_ptr() not in addresses
    assert torch.from_numpy(pool.take(4)).data_ptr() not in addresses  # of 10 bytes, 6 would be idle


def test_the_pool_gives_memory_again_once_nobody_holds_it():
    pool = Pool(most=2)
    first = torch.from_numpy(pool.take(10))
    at = first.data_ptr()
    second = torch.from_numpy(pool.take(10))
    part = first[3:5]
    del first
    assert torch.from_numpy(pool.take(10)).data_ptr() not in (at, second.data_ptr())
    del part, second
    pool = Pool(most=2)
    addresses = {torch.from_numpy(pool.take(10)).data_ptr() for _ in range(5)}
    assert len(addresses) == 1


def tasks():
    """The system's ids of this process's threads, and its open files; the end of a joined thread takes a moment."""
    if not Path("/proc/self/task").exists():
        pytest.skip("counts threads as Linux does")
    return set(os.listdir("/proc/self/task")), set(os.listdir("/proc/self/fd"))


def test_epochs_grow_neither_threads_nor_memory(beton):
    gc.collect()
    gc.disable()  # what only the garbage collector would free is a leak: it may come late, and images are large
    try:
        with open_loader(beton, SPECS, batch_size=22, seed=0, workers=2) as loader:
            for _ in range(5):
                list(loader)
            held = tasks()
            tracemalloc.start()
            for epoch in range(50):
                for batch in loader:
                    assert batch.ok.all()
                if epoch == 9:
                    before = tracemalloc.get_traced_memory()[0]
            after = tracemalloc.get_traced_memory()[0]
            assert len(loader.pool._memory) <= 7
        assert after - before < 40 * 2000  # 40 epochs; one thread's bench alone has 40,000 bytes
        deadline = time.monotonic() + 5
        while not (tasks()[0] <= held[0] and tasks()[1] <= held[1]):
            assert time.monotonic() < deadline, (tasks(), held)
            time.sleep(0.01)
    finally:
        tracemalloc.stop()
        gc.enable()


def test_what_an_iteration_worked_with_goes_when_it_ends(beton, monkeypatch):
    alive, make = weakref.WeakSet(), ffcv_ops.Worker.__init__

    def noted(self, *arguments):
        make(self, *arguments)
        alive.add(self)

    monkeypatch.setattr(ffcv_ops.Worker, "__init__", noted)
    gc.disable()
    try:
        with open_loader(beton, SPECS, batch_size=2, seed=0, workers=2) as loader:
            list(loader)
            assert len(alive) == 0
            iterator = iter(loader)
            next(iterator)
            assert len(alive) == 2
            del iterator
            assert len(alive) == 0
    finally:
        gc.enable()


def test_closed_loaders_leave_no_file_open(beton):
    def open_and_close():
        with open_loader(beton, SPECS, batch_size=2, seed=0, workers=1) as loader:
            next(iter(loader))

    open_and_close()
    gc.collect()
    _, before = tasks()
    for _ in range(5):
        open_and_close()
    gc.collect()
    assert len(tasks()[1]) <= len(before)


# --- damage ---------------------------------------------------------------------------------------------------------


def damage(path, out, change):
    """A copy whose JPEG bytes went through `change(row, uint8 array)`."""
    data = np.fromfile(path, dtype=np.uint8)
    file = Beton.open(path)
    for row in range(len(file)):
        start, length = int(file.starts[row]), int(file.lengths[row])
        change(row, data[start : start + length])
    data.tofile(out)
    return out


@pytest.fixture(scope="module")
def thousand(tmp_path_factory):
    root = tmp_path_factory.mktemp("thousand")
    stored = [jpeg(picture(i, 30 + i, 50 - i), progressive=bool(i % 2)) for i in range(20)]
    samples = [(f"{i}.jpg", stored[i % 20], -1, [], []) for i in range(1000)]
    path, random = write(root / "good.beton", samples), np.random.default_rng(0)

    def harm(row, data):
        if row % 4 == 0:
            data[len(data) // (2 + row % 3) :] = 0  # the rest was never written
        else:
            for _ in range(1 + row % 5):
                data[random.integers(len(data))] ^= 1 << random.integers(8)

    return damage(path, root / "bad.beton", harm)


@pytest.mark.parametrize("mode", ["cpu", "device"])
def test_every_damaged_sample_is_reported(thousand, mode):
    intact = 1000 - len(Beton.open(thousand).damaged(range(1000)))  # flips may undo each other
    batches, loader = epochs(open_loader, thousand, batch_size=100, workers=2, render=mode, on_error="mask")
    assert sum(int(batch.ok.sum()) for batch in batches) == intact < 5
    assert loader.report["crc"] == len(loader.failures) == 1000 - intact
    assert not any(image[~batch.ok].any() for batch in batches for image in batch.images)
    with pytest.raises(
        LoadError, match=r"(?s)100 images could not be read:.*\.jpg: crc: the CRC-32 of its bytes is 0x"
    ):
        epochs(open_loader, thousand, batch_size=100, render=mode)


@pytest.mark.parametrize("mode", ["cpu", "device"])
def test_damage_that_is_not_checked_crashes_nothing(thousand, mode):
    batches, loader = epochs(open_loader, thousand, 2, verify=False, batch_size=100, workers=2, render=mode,
                             on_error="mask")  # fmt: skip
    kinds = set(loader.report)
    assert kinds <= {"read", "undecodable", "size", "truncated"}
    assert {"read", "undecodable"} <= kinds
    assert not any(image[~batch.ok].any() for batch in batches for image in batch.images)
    assert len(batches) == 20


def test_masked_batches_are_those_of_a_folder_with_the_same_damage(folder, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    samples = []
    for i in range(6):
        data = jpeg(picture(i, 60, 80))
        data = data[: len(data) // 2] if i == 2 else data[:-60] + bytes(40) + data[-60:] if i == 4 else data
        (images / f"{i}.jpg").write_bytes(data)
        samples.append((f"{i}.jpg", data, -1, [], []))
    path = write(tmp_path / "a.beton", samples)  # damaged before it was written: the CRC-32 is that of the damage
    for specs in (SPECS, [ViewSpec.short_side(30, 50)]):
        options = {"specs": specs, "batch_size": 6 if specs is SPECS else 1, "on_error": "mask"}
        ours, loader = epochs(open_loader, path, **options)
        theirs, folders = epochs(open_loader, images, **options)
        assert all(same(a, b) for a, b in zip(ours, theirs, strict=True))
        assert set(loader.failures) == set(folders.failures) == {"2.jpg", "4.jpg"}
    assert {kind for kind, _ in loader.failures.values()} == {"damaged"}
    assert all("JPEG" in reason for _, reason in loader.failures.values())


def test_metadata_that_do_not_fit_the_jpeg_are_caught(beton, monkeypatch):
    opened = Beton.open(beton)
    opened.stored[3] = 5000, 4000
    opened.stored[4] = opened.stored[4, 0], opened.stored[4, 1] - 1
    opened.lengths[5] = 2**62
    opened.starts[6] = 2**62
    opened.stored[7] = opened.stored[7, ::-1].copy()
    monkeypatch.setattr(Beton, "open", lambda path, verify: opened)
    (batch,), loader = epochs(open_loader, beton, batch_size=22, order="file", on_error="mask")
    assert (~batch.ok).nonzero().flatten().tolist() == [3, 4, 5, 6, 7]
    assert loader.report["size"] == 3
    assert loader.report["truncated"] == 2
    name = opened.names[4]
    height, width = opened.stored[4].tolist()
    assert loader.failures[name] == ("size", f"is {width + 1} x {height}, the metadata say {width} x {height}")


def resized(data, height, width):
    """The JPEG with another size in its header."""
    at = next(i for i in range(len(data)) if data[i : i + 2] == b"\xff\xc0") + 5
    return data[:at] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + data[at + 4 :]


@pytest.mark.parametrize("mode", ["cpu", "device"])
def test_jpegs_that_no_writer_would_store_are_reported(tmp_path, mode):
    """Their CRC-32 is right: the file was made so. None may leave its place in the batch, or show another's pixels."""
    good = jpeg(picture(0, 40, 50))
    with io.BytesIO() as file:
        Image.fromarray(picture(1, 40, 50)).convert("CMYK").save(file, "JPEG")
        cmyk = file.getvalue()
    forged = {"cmyk": cmyk, "no rows": resized(good, 0, 50), "no columns": resized(good, 40, 0),
              "huge": resized(good, 65000, 65000), "taller": resized(good, 41, 50), "swapped": resized(good, 50, 40),
              "start only": good[:2], "one byte": good[:1], "text": b"no JPEG at all"}  # fmt: skip
    padded, classes = np.zeros((1, 4), dtype=np.float32), np.full(1, -1, dtype=np.int64)
    gray = jpeg(picture(2, 40, 50)[..., 0])
    with BetonFile(tmp_path / "a.beton", 30, 1, 1 << 21) as file:
        for name, data in {"first": good, **forged, "last": gray}.items():
            file.add(Sample(name, sample_id(name), -1, data, (40, 50), (40, 50), padded, classes, 0))
        file.finish({})
    options = {"batch_size": len(forged) + 2, "order": "file", "on_error": "mask", "render": mode, "workers": 2}
    for verify in (True, False):
        for batch in epochs(open_loader, tmp_path / "a.beton", 2, verify=verify, **options)[0]:
            assert batch.ok.tolist() == [True, *[False] * len(forged), True]
            assert not any(image[1:-1].any() for image in batch.images)
            assert all(image[0].any() and image[-1].any() for image in batch.images)
        _, loader = epochs(open_loader, tmp_path / "a.beton", verify=verify, **options)
        assert set(loader.failures) == set(forged)
        assert {name for name, (kind, _) in loader.failures.items() if kind == "size"} == {"huge", "taller", "swapped"}
        assert loader.report["undecodable"] == len(forged) - 3


def test_damaged_boxes_are_reported(coco, tmp_path):
    path = convert(coco, tmp_path / "a.beton")
    opened, data = Beton.open(path), np.fromfile(path, dtype=np.uint8)
    data[int(opened._boxes_at[4])] ^= 4
    data.tofile(tmp_path / "b.beton")
    batches, loader = epochs(open_loader, tmp_path / "b.beton", 2, batch_size=22, on_error="mask")
    assert loader.report["crc"] == 2
    assert loader.failures == {opened.names[4]: ("crc", "its boxes or its name are not as they were written")}
    for batch in batches:
        assert not any(image[~batch.ok].any() for image in batch.images)
    assert epochs(open_loader, tmp_path / "b.beton", verify=False, batch_size=22)[0][0].ok.all()


# --- threads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1])
def test_plans_drawn_for_several_batches_at_once_are_those_of_each(beton, folder, monkeypatch, rank):
    monkeypatch.setattr(beton_job, "_AT_ONCE", 3)  # six batches: two blocks of plans, the last batch padded
    options = {"batch_size": 4, "workers": 2, "last": "keep", "rank": rank, "world": 2}
    there, _ = epochs(open_loader, beton, 2, **options)
    here, _ = epochs(open_loader, folder, 2, **options)
    assert len(there) == len(here) == 12
    assert all(same(a, b) for a, b in zip(there, here, strict=True))
    assert not torch.equal(there[0].plan.crop, there[6].plan.crop)
    for step in (2, 4):  # in the middle of a block
        with open_loader(beton, SPECS, seed=3, **options) as loader:
            loader.load_state_dict({**loader.state_dict(), "epoch": 1, "step": step})
            assert all(same(a, b) for a, b in zip(loader, here[6 + step :], strict=True))


class BoomError(Exception):
    pass


def boom(*arguments, **options):
    raise BoomError("inside")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("where", ["run_pipeline", "finish", "most_scratch"])
def test_an_error_in_a_thread_reaches_the_consumer_at_once(beton, monkeypatch, where):
    owner = {"run_pipeline": ffcv_ops.Worker, "finish": beton_job.BetonJob, "most_scratch": beton_job}[where]
    with open_loader(beton, SPECS, batch_size=2, seed=0, workers=2) as loader:
        iterator = iter(loader)
        next(iterator)
        monkeypatch.setattr(owner, where, boom)
        start = time.monotonic()
        with pytest.raises(LoadError, match=r"loader: step \d.*: BoomError: inside") as caught:
            list(iterator)
        assert time.monotonic() - start < 1
        assert isinstance(caught.value.__cause__, BoomError)
        assert threads() == []
        monkeypatch.undo()
        assert len(list(loader)) == 11  # the loader is as good as before


@pytest.mark.timeout(20)
def test_an_error_while_compiling_is_raised_by_the_constructor(beton, monkeypatch):
    def uncompilable(self):
        return lambda rows, status, metadata, state: rows.no_such_attribute

    monkeypatch.setattr(ffcv_ops.RenderViews, "generate_code", uncompilable)
    monkeypatch.setattr(ffcv_ops, "pipeline_of", ffcv_ops.Pipeline)  # not the one that is compiled already
    with pytest.raises(Exception, match="no_such_attribute"):
        open_loader(beton, SPECS, batch_size=2, seed=0)


def test_iterators_that_are_left_end_with_their_threads(beton):
    with open_loader(beton, SPECS, batch_size=2, seed=0, workers=2) as loader:
        for _ in loader:
            break
        assert threads() == []
        left = [iter(loader) for _ in range(3)]
        for iterator in left:
            next(iterator)
        assert len(threads()) == 6
        start = time.monotonic()
        loader.close()
        assert time.monotonic() - start < 0.5
        assert threads() == []
        loader.close()
        assert len(list(loader)) == 11
    del loader
    next(iter(open_loader(beton, SPECS, batch_size=2, seed=0, workers=2)))


def test_closing_takes_no_longer_than_a_sample_or_two(tmp_path):
    path = write(tmp_path / "large.beton", [(f"{i}.jpg", jpeg(picture(i, 700, 900)), -1, [], []) for i in range(64)])
    with open_loader(path, [ViewSpec(224)], batch_size=32, seed=0, workers=2) as loader:
        seconds = []
        for _ in range(7):
            iterator = iter(loader)
            next(iterator)
            start = time.monotonic()
            loader.close()
            seconds.append(time.monotonic() - start)
    assert min(seconds) < 0.05  # the least of them, since the machine may be busy; a batch takes longer than that


class Member(threading.Thread):
    """A thread as a crew wants it."""

    def __init__(self, work):
        super().__init__(daemon=True)
        self.work = work

    def run(self):
        self.work(self)


class Meeting:
    """A job whose first thread closes the crew while it holds what the second one waits for."""

    names = ("a",)

    def __init__(self, crew):
        self.dealt, self._crew, self._lock, self._held = (
            np.zeros(1, np.int64),
            crew,
            threading.Lock(),
            threading.Event(),
        )

    def take_part(self, worker):
        if worker is self._crew[0].workers[0]:
            with self._lock:
                self._held.set()
                time.sleep(0.05)
                self._crew[0].close()
        else:
            self._held.wait()
            with self._lock:
                pass

    def finish(self):
        return self


@pytest.mark.timeout(20)
def test_an_iterator_collected_as_garbage_in_one_of_its_threads_blocks_none():
    crew = []
    members = [Member(lambda worker: crew[0].work(worker)) for _ in range(2)]
    crew.append(Crew(members, lambda step: Meeting(crew), range(3), ahead=2, error_type=LoadError))
    crew[0].start()
    for member in members:
        member.join(5)
    assert not any(member.is_alive() for member in members)
    with pytest.raises(LoadError, match="closed while another thread waited"):
        next(iter(crew[0]))


@pytest.mark.timeout(20)
def test_closing_ends_the_wait_of_another_thread(beton, monkeypatch):
    go, heard = threading.Event(), []
    finish = beton_job.BetonJob.finish
    with open_loader(beton, SPECS, batch_size=2, seed=0, workers=2) as loader:
        monkeypatch.setattr(beton_job.BetonJob, "finish", lambda job: go.wait() and finish(job))

        def consume():
            try:
                list(loader)
            except LoadError as error:
                heard.append(str(error))

        consumer = threading.Thread(target=consume)
        consumer.start()
        while not threads():
            time.sleep(0.01)
        threading.Timer(0.2, go.set).start()
        loader.close()
        consumer.join(5)
        assert heard == ["loader: closed while another thread waited for a batch"]
        assert loader.state_dict()["epoch"] == 0  # no epoch has ended


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_is_told_that_the_threads_are_its_parents(beton):
    with open_loader(beton, SPECS, batch_size=2, seed=0, workers=2) as loader:
        iterator = iter(loader)
        next(iterator)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # newer Pythons warn of forks beside threads
            child = os.fork()
        if not child:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(10)
            try:
                next(iterator)
            except LoadError as error:
                loader.close()
                os._exit(0 if "before a fork" in str(error) else 2)
            finally:
                os._exit(3)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert len(list(iterator)) == 10


def test_a_bench_in_use_is_not_taken_away(beton):
    go = threading.Event()
    with open_loader(beton, SPECS, batch_size=2, seed=0) as loader:
        hired = loader._hired(1, lambda worker: go.wait())
        (worker,) = hired.workers
        worker.start()
        hired.__exit__(None, None, None)  # as if joining had been interrupted
        assert worker.bench.state[jpeg_kernels.HANDLE] != 0
        go.set()
        worker.join()
        hired.__exit__(None, None, None)
        assert worker.bench.state[jpeg_kernels.HANDLE] == 0


def test_two_iterators_and_two_loaders_at_once(beton):
    expected, _ = epochs(open_loader, beton, batch_size=2)
    with open_loader(beton, SPECS, batch_size=2, seed=3, workers=2) as one:
        list(one)
        one.set_epoch(0)
        with open_loader(beton, SPECS[:2], batch_size=2, seed=3, workers=2) as two:
            iterators = iter(one), iter(one), iter(two)
            for a, b, c, e in zip(*iterators, expected, strict=True):
                assert same(a, e)
                assert same(b, e)
                assert torch.equal(c.images[1], e.images[1])


@pytest.mark.filterwarnings("ignore")  # FFCV's own code, and numba's about it
def test_beside_ffcvs_own_loader_which_spoils_a_type_of_numba(beton):
    from ffcv.fields.rgb_image import CenterCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    before, _ = epochs(open_loader, beton)
    options = {"batch_size": 2, "num_workers": 1, "order": OrderOption.SEQUENTIAL}
    fields = {name: None for name in Beton.open(beton).manifest} | {"image": [CenterCropRGBImageDecoder((8, 8), 1.0)]}
    from ffcv.reader import Reader

    fields |= {name: None for name in Reader(str(beton)).handlers if name != "image"}
    theirs = Loader(str(beton), pipelines=fields, **options)
    after, _ = epochs(open_loader, beton)
    assert all(same(a, b) for a, b in zip(before, after, strict=True))
    iterator = iter(theirs)
    assert len(list(iterator)) == 11
    iterator.join()
    again, _ = epochs(open_loader, beton, render="device")
    assert all(same(a, b) for a, b in zip(before, again, strict=True))


def script(text, beton):
    text = "import warnings; warnings.simplefilter('ignore')\n" + text.replace("BETON", repr(str(beton)))
    return subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=60)


def test_a_script_that_leaves_an_iterator_open_ends(beton):
    run = script(
        "import numba, torch; from geoaug import ViewSpec, open_loader\n"
        "torch.set_num_threads(3); before = numba.get_num_threads()\n"
        "loader = open_loader(BETON, [ViewSpec(64)], batch_size=2, seed=0, workers=2)\n"
        "print(torch.get_num_threads(), numba.get_num_threads() - before)  # FFCV's import sets both to 1\n"
        "it = iter(loader); next(it); print('last line')",
        beton,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "3 0\nlast line\n", "")


# --- what is refused ------------------------------------------------------------------------------------------------


def test_without_ffcv_one_line_says_what_to_install(beton, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "ffcv"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ffcv", None)
    monkeypatch.delitem(sys.modules, "geoaug.loading.ffcv_ops")
    with pytest.raises(ImportError, match=r"needs FFCV.*apt-get.*conda install.*geoaug\[ffcv\]") as caught:
        open_loader(beton, SPECS, batch_size=2, seed=0)
    assert "\n" not in str(caught.value)


def test_opening_the_module_needs_no_ffcv(beton):
    run = script("import sys, geoaug.loading.ffcv; print('ffcv' in sys.modules)", beton)
    assert run.stdout == "False\n", run.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_map": "instance"}, "open_loader: label_map must be None for a .beton"),
        ({"images": "."}, "open_loader: images must be None for a .beton"),
        ({"batch_size": 100}, "batch_size must be at most the 22 images with last='drop', got 100"),
        ({"batch_size": 9, "world": 2}, "batch_size must be a multiple of world, 2, got 9"),
        ({"render": "gpu"}, "render must be 'cpu' or 'device'"),
        ({"order": "random"}, "order must be 'shuffle' or 'file'"),
        ({"workers": -1}, "workers must"),
    ],
)
def test_bad_arguments(our_errors, beton, change, message):
    with pytest.raises(ValueError, match=message):
        open_loader(beton, SPECS, **{"batch_size": 8, "seed": 0, **change})


def test_images_beside_a_folder_would_be_ignored_and_are_refused(folder):
    with pytest.raises(ValueError, match=r"open_loader: images must be left out with a folder, .* got /"):
        open_loader(folder, SPECS, batch_size=8, seed=0, images=folder / "images")


# --- checksum -------------------------------------------------------------------------------------------------------


def test_crc32_is_zlibs():
    random = np.random.default_rng(0)
    for size in [*range(200), 255, 256, 1000, 54321]:
        data = random.integers(0, 256, size + 3, dtype=np.uint8)[3:]
        at = int(data.ctypes.data)
        expected = zlib.crc32(data.tobytes())
        assert crc32(at, size) == expected
        assert int(_through_tables(np.uint32(0xFFFFFFFF), at, size)) ^ 0xFFFFFFFF == expected


def test_a_decoded_image_fits_its_centres():
    """The coordinate images of the golden test say what they should before JPEG touches them."""
    held = coordinate_image(5, 7)
    assert torch.equal(held[:2].permute(1, 2, 0).reshape(-1, 2), grids.cell_centers(5, 7))
    assert jpeg_kernels.ACCURATE == 0


def test_open_loader_takes_a_beton_by_its_name(beton, folder, tmp_path):
    options = {"batch_size": 4, "seed": 1, "workers": 2}
    with open_loader(beton, SPECS, **options) as loader, open_loader(folder, SPECS, **options) as other:
        assert type(loader).__name__ == "BetonLoader"
        assert all(same(a, b) for a, b in zip(loader, other, strict=True))
        other.load_state_dict(loader.state_dict())
    names = list(Beton.open(beton).names)
    box = np.array([[1, 2, 11, 22]], dtype=np.uint16)
    ProposalStore.write(tmp_path / "store", [(name, (40, 50), box) for name in names])
    with open_loader(beton, SPECS, proposals=tmp_path / "store", **options) as loader:
        batch = next(iter(loader))
        assert batch.box_valid.sum(1).tolist() == [1] * 4
        state = loader.state_dict()
    with open_loader(folder, SPECS, proposals=tmp_path / "store", **options) as other:
        other.load_state_dict(state)
    with open_loader(folder, SPECS, **options) as other, pytest.raises(ValueError, match="boxes must be the loader's"):
        other.load_state_dict(state)
    ProposalStore.write(tmp_path / "other", [(f"other/{name}", (40, 50), box) for name in names])
    with pytest.raises(ValueError, match="images have no entry"):
        open_loader(beton, SPECS, proposals=tmp_path / "other", **options)

import io
import json
import os
import shutil
import signal
import struct
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.io import decode_jpeg, write_jpeg

import geoaug
from geoaug import LoadError, ViewSpec, open_loader, sample_id
from geoaug.loading.decode import ReadError, read_image
from geoaug.loading.order import epoch_order, rows_of, steps_of
from geoaug.proposals.store import ProposalStore

SPECS = [ViewSpec((24, 32), (0.2, 1.0)), ViewSpec.like(0, 16), ViewSpec.whole(20, flip=0.5)]
ON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def noise(seed, height, width):
    g = torch.Generator().manual_seed(seed)
    small = torch.randint(0, 256, (1, 3, 5, 7), generator=g, dtype=torch.uint8)
    return torch.nn.functional.interpolate(small, (height, width), mode="bilinear")[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "photographs"
    for i in range(22):
        sub = root / "images" / ("cats" if i % 3 else "dogs")
        sub.mkdir(parents=True, exist_ok=True)
        write_jpeg(noise(i, 40 + 3 * i, 90 - 2 * i), str(sub / f"{i:03d}.jpg"))
    return root


@pytest.fixture(scope="module")
def coco(folder):
    images, annotations = [], []
    for i in range(22):
        name = f"{'cats' if i % 3 else 'dogs'}/{i:03d}.jpg"
        h, w = 40 + 3 * i, 90 - 2 * i
        images.append({"id": 100 + i, "file_name": name, "height": h, "width": w})
        for j in range(i % 5):
            x, y = 3 * j, 2 * j
            polygon = [x, y, x + 20, y, x + 20, y + 10, x, y + 10]
            annotations.append(
                {"id": 10 * i + j, "image_id": 100 + i, "category_id": 7 if j % 2 else 3, "bbox": [x, y, 20, 10],
                 "area": 200, "iscrowd": int(j == 3), "segmentation": [polygon]}
            )  # fmt: skip
    annotations += [
        {"id": 900, "image_id": 101, "category_id": 3, "bbox": [-5, 30, 50, 500], "iscrowd": 0, "segmentation": None},
        {"id": 901, "image_id": 101, "category_id": 3, "bbox": [5, 5, 0, 8], "iscrowd": 0},
        {"id": 902, "image_id": 5555, "category_id": 3, "bbox": [5, 5, 3, 8], "iscrowd": 0},
    ]
    record = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 7, "name": "seven"}, {"id": 3, "name": "three"}],
    }
    (folder / "instances.json").write_text(json.dumps(record))
    return folder / "instances.json"


def fields(batch):
    tensors = [*batch.images, batch.plan.crop, batch.plan.flipped, batch.plan.ids, batch.ok, batch.boxes]
    tensors += [batch.box_valid, batch.box_labels, batch.label, batch.key.ids]
    return tensors + ([] if batch.label_map is None else [batch.label_map])


def same(a, b):
    return a.names == b.names and all(torch.equal(x, y) for x, y in zip(fields(a), fields(b), strict=True))


def epoch(path, **options):
    options = {"batch_size": 8, "seed": 3, "workers": 0, **options}
    with open_loader(path, SPECS, **options) as loader:
        return list(loader)


def test_a_batch_is_what_render_makes_of_the_plan(folder):
    for batch in epoch(folder):
        assert [tuple(v.shape) for v in batch.images] == [(8, 3, 24, 32), (8, 3, 16, 16), (8, 3, 20, 20)]
        assert batch.ok.all()
        for row, name in enumerate(batch.names):
            file = torch.frombuffer(bytearray((folder / "images" / name).read_bytes()), dtype=torch.uint8)
            image = decode_jpeg(file).permute(1, 2, 0).contiguous()
            sizes, ids = [image.shape[:2]], [sample_id(name)]
            plan = geoaug.plan_views(SPECS, sizes, ids, seed=3, epoch=0)
            assert torch.equal(plan.crop[0], batch.plan.crop[row])
            for mine, view in zip(geoaug.render(image, plan), batch.images, strict=True):
                assert torch.equal(mine, view[row])
            assert batch.label[row] == (0 if name.startswith("cats") else 1)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
@pytest.mark.parametrize("workers", [1, 4])
def test_the_same_batches_from_any_number_of_workers(coco, workers):
    here = epoch(coco, label_map="semantic")
    there = epoch(coco, label_map="semantic", workers=workers)
    assert len(here) == len(there) == 2
    assert all(same(a, b) for a, b in zip(here, there, strict=True))


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("last", ["drop", "keep"])
def test_ranks_are_contiguous_parts_of_the_global_batch(folder, world, last):
    whole = epoch(folder, last=last)
    parts = [epoch(folder, last=last, rank=r, world=world) for r in range(world)]
    assert all(len(part) == len(whole) for part in parts)
    for step, batch in enumerate(whole):
        assert [n for part in parts for n in part[step].names] == batch.names
        for x, *ys in zip(fields(batch), *(fields(part[step]) for part in parts), strict=True):
            assert torch.equal(torch.cat(ys), x)


def test_resume_in_mid_epoch(folder):
    uninterrupted = []
    with open_loader(folder, SPECS, batch_size=4, seed=0, workers=0) as loader:
        for e in range(2):
            loader.set_epoch(e)
            uninterrupted += list(loader)
    with open_loader(folder, SPECS, batch_size=4, seed=0, workers=2) as loader:
        iterator = iter(loader)
        begun = [next(iterator) for _ in range(3)]
        state = json.loads(json.dumps(loader.state_dict()))
    assert (state["epoch"], state["step"]) == (0, 3)
    with open_loader(folder, SPECS, batch_size=4, seed=0, workers=1) as loader:
        loader.load_state_dict(state)
        rest = []
        for e in range(state["epoch"], 2):
            loader.set_epoch(e)
            rest += list(loader)
    assert len(begun + rest) == len(uninterrupted) == 10
    assert all(same(a, b) for a, b in zip(begun + rest, uninterrupted, strict=True))


def test_state_after_an_epoch_is_the_start_of_the_next(folder):
    with open_loader(folder, SPECS, batch_size=8, seed=0, workers=0) as loader:
        first = list(loader)
        assert loader.state_dict()["epoch"] == 1
        assert loader.state_dict()["step"] == 0
        second = list(loader)  # without set_epoch the next epoch follows
    assert not same(first[0], second[0])
    assert {n for b in first for n in b.names} != {n for b in second for n in b.names}  # another 6 are dropped


def test_a_look_at_the_first_batch_does_not_lose_a_restored_position(folder):
    with open_loader(folder, SPECS, batch_size=4, seed=0, workers=0) as loader:
        whole = list(loader)
    with open_loader(folder, SPECS, batch_size=4, seed=0, workers=0) as loader:
        state = {**loader.state_dict(), "epoch": 0, "step": 2}
        loader.load_state_dict(state)
        assert same(next(iter(loader)), whole[2])
        rest = list(loader)
        assert len(rest) == 3
        assert same(rest[0], whole[2])
        assert (loader.state_dict()["epoch"], loader.state_dict()["step"]) == (1, 0)
        assert len(list(loader)) == 5


def test_the_batch_yielded_last_is_the_state(folder):
    with open_loader(folder, SPECS, batch_size=4, seed=0, workers=0) as loader:
        iterator = iter(loader)
        next(iterator), next(iterator)
        next(iter(loader))  # a peek
        next(iterator)
        assert loader.state_dict()["step"] == 3
        iter(loader)  # made and never run
        assert loader.state_dict()["step"] == 3


def test_a_state_at_the_end_of_an_epoch_leads_to_the_next(folder):
    with open_loader(folder, SPECS, batch_size=4, seed=0, workers=0) as loader:
        for _ in zip(range(5), loader, strict=False):
            pass
        state = loader.state_dict()
        assert state["step"] == 5
    with open_loader(folder, SPECS, batch_size=4, seed=0, workers=0) as loader:
        loader.load_state_dict(state)
        assert list(loader) == []
        assert len(list(loader)) == 5


def test_peeking_starts_at_the_front_again(folder):
    with open_loader(folder, SPECS, batch_size=8, seed=0, workers=0) as loader:
        assert same(next(iter(loader)), next(iter(loader)))


def two_epochs(path, **options):
    with open_loader(path, SPECS, batch_size=22, seed=0, workers=0, **options) as loader:
        return [batch for _ in range(2) for batch in loader]


def test_every_epoch_shuffles_and_plans_anew(folder):
    first, second = two_epochs(folder)
    assert sorted(first.names) == sorted(second.names)
    assert first.names != second.names
    at = [second.names.index(name) for name in first.names]
    assert (first.plan.crop[:, 0] != second.plan.crop[at, 0]).any(-1).float().mean() > 0.8
    assert second.key.epoch == second.plan.key.epoch == 1


def test_replay_keeps_views_while_the_order_follows_the_epoch(folder):
    first, second = two_epochs(folder, replay=True)
    assert first.names != second.names
    at = [second.names.index(name) for name in first.names]
    assert torch.equal(first.plan.crop, second.plan.crop[at])
    assert torch.equal(first.images[0], second.images[0][at])
    assert (second.key.epoch, second.plan.key.epoch) == (1, 0)


def test_order_depends_on_the_set_of_ids_alone():
    ids = np.random.default_rng(0).integers(0, 2**62, 500)
    shuffled = np.random.default_rng(1).permutation(ids)
    a, b = (x[epoch_order(x, seed=1, epoch=2, order="shuffle")] for x in (ids, shuffled))
    assert np.array_equal(a, b)
    assert not np.array_equal(a, ids[epoch_order(ids, seed=1, epoch=3, order="shuffle")])
    assert np.array_equal(epoch_order(ids, seed=1, epoch=2, order="file"), np.arange(500))
    assert abs(np.corrcoef(np.argsort(epoch_order(ids, seed=1, epoch=2, order="shuffle")), np.arange(500))[0, 1]) < 0.15


def test_steps_and_padding():
    order = np.arange(10)
    assert steps_of(10, 4, "drop") == 2
    assert steps_of(10, 4, "keep") == 3
    assert [rows_of(order, 2, batch_size=4, rank=r, world=2).tolist() for r in range(2)] == [[8, 9], [-1, -1]]


def test_evaluation_keeps_everything_in_the_files_order(folder):
    batches = epoch(folder, order="file", last="keep")
    names = [n for b in batches for n in b.names]
    assert names[:22] == sorted(names[:22])
    assert names[22:] == ["", ""]
    assert torch.cat([b.ok for b in batches]).tolist() == [True] * 22 + [False] * 2
    assert not batches[-1].images[0][-2:].any()
    assert batches[-1].plan.ids[-2:].tolist() == [-1, -1]


def test_short_side_views_come_one_at_a_time(folder):
    with open_loader(folder, [ViewSpec.short_side(64, 100)], batch_size=1, seed=0, workers=0, order="file") as loader:
        for batch in loader:
            h, w = batch.images[0].shape[-2:]
            assert min(h, w) <= 64
            assert max(h, w) <= 100
            assert (h, w) == batch.plan.view_sizes[0]


def test_a_folder_a_list_and_a_json_give_the_same_images(folder, coco, tmp_path):
    names = sorted(p.relative_to(folder / "images").as_posix() for p in (folder / "images").rglob("*.jpg"))
    (tmp_path / "list.txt").write_text("\n".join(names[::-1]) + "\n\n")
    (folder / "images" / "own.txt").write_text("\n".join(names))
    batches = [
        epoch(folder)[0],
        epoch(folder / "images")[0],
        epoch(tmp_path / "list.txt", images=folder / "images")[0],
        epoch(folder / "images" / "own.txt")[0],
        epoch(coco)[0],
        epoch(coco, images=folder / "images")[0],
    ]
    (folder / "images" / "own.txt").unlink()
    for other in batches[1:]:
        assert other.names == batches[0].names
        assert torch.equal(other.label, batches[0].label)
        assert all(torch.equal(x, y) for x, y in zip(batches[0].images, other.images, strict=True))


def test_boxes_and_labels_of_a_json(coco, caplog):
    with open_loader(coco, SPECS, batch_size=22, seed=0, workers=0, order="file", max_boxes=8) as loader:
        batch = next(iter(loader))
    problems = loader.source.problems
    assert problems["box beyond its image, clipped"] == ["cats/001.jpg box 900"]
    assert problems["box without area, dropped"] == ["cats/001.jpg box 901"]
    assert problems["box of an image that the json does not list, dropped"] == ["902"]
    assert "1 x box without area, dropped, such as ['cats/001.jpg box 901']" in caplog.text
    row = batch.names.index("dogs/009.jpg")  # four objects, the last a crowd
    assert batch.box_valid[row].tolist() == [True] * 3 + [False] * 5
    h, w = 40 + 27, 90 - 18
    expected = torch.tensor([[3 * j / w, 2 * j / h, (3 * j + 20) / w, (2 * j + 10) / h] for j in range(3)])
    assert torch.allclose(batch.boxes[row, :3], expected)
    assert batch.box_labels[row].tolist() == [0, 1, 0, -1, -1, -1, -1, -1]
    assert loader.source.objects.categories == ("three", "seven")
    row = batch.names.index("cats/001.jpg")
    clipped = torch.tensor([0.0, 30 / 43, 45 / 88, 1.0])
    assert torch.allclose(batch.boxes[row, batch.box_valid[row]][-1], clipped)
    assert batch.label.tolist() == [0 if name.startswith("cats") else 1 for name in batch.names]


def test_more_candidates_than_slots_are_drawn_anew_each_epoch_and_keep_their_order(coco):
    drawn = set()
    with open_loader(coco, SPECS, batch_size=22, seed=0, workers=0, max_boxes=2) as loader:
        for _ in range(12):
            (batch,) = loader
            row = batch.names.index("dogs/009.jpg")
            x = (batch.boxes[row, :, 0] * 72 / 3).round().int().tolist()
            assert batch.box_valid[row].all()
            assert x == sorted(x)
            drawn.add(tuple(x))
    assert drawn == {(0, 1), (0, 2), (1, 2)}


@pytest.mark.parametrize("kind", ["instance", "semantic"])
def test_label_maps(coco, kind):
    size = (43, 88)  # the source's own size for cats/001.jpg
    options = {"label_map": kind, "label_map_size": size, "order": "file", "batch_size": 22}
    batch = epoch(coco, **options)[0]
    assert batch.label_map.shape == (22, *size)
    row = batch.names.index("cats/004.jpg")  # four objects, one of them a crowd; each 20 x 10 and 3, 2 further on
    h, w = 40 + 12, 90 - 8
    y, x = np.meshgrid((np.arange(43) + 0.5) * h / 43, (np.arange(88) + 0.5) * w / 88, indexing="ij")
    y, x = np.floor(y), np.floor(x)
    expected = np.full(size, -1)
    for j in (0, 1, 2):
        inside = (x >= 3 * j) & (x < 3 * j + 20) & (y >= 2 * j) & (y < 2 * j + 10)
        expected[inside] = j if kind == "instance" else j % 2
    assert (batch.label_map[row].numpy() == expected).mean() > 0.97
    assert set(batch.label_map[row].unique().tolist()) == {-1, *([0, 1, 2] if kind == "instance" else [0, 1])}


def test_rendering_on_the_device_gives_the_same_bytes(coco):
    here, there = epoch(coco), epoch(coco, render="device", device=ON_DEVICE)
    for a, b in zip(here, there, strict=True):
        assert same(a, b.to("cpu"))


def test_proposals_replace_the_jsons_boxes(coco):
    class Store:
        def padded(self, ids, m, *, key=None):
            assert torch.equal(key.ids, ids)
            return torch.full((len(ids), m, 4), 0.5), torch.ones(len(ids), m, dtype=torch.bool)

    batch = epoch(coco, proposals=Store(), max_boxes=3)[0]
    assert batch.boxes.shape == (8, 3, 4)
    assert (batch.boxes == 0.5).all()
    assert (batch.box_labels == -1).all()


def test_a_store_of_proposals_by_path(folder, tmp_path, our_errors):
    names = [p.relative_to(folder / "images").as_posix() for p in (folder / "images").rglob("*.jpg")]
    box = np.array([[1, 2, 11, 22]], dtype=np.uint16)
    ProposalStore.write(tmp_path / "store", [(name, (40, 50), box) for name in names])
    batch = epoch(folder, proposals=tmp_path / "store", max_boxes=2)[0]
    assert torch.allclose(batch.boxes[:, 0], torch.tensor([1 / 50, 2 / 40, 11 / 50, 22 / 40]))
    assert batch.box_valid.tolist() == [[True, False]] * 8
    ProposalStore.write(tmp_path / "other", [(f"other/{name}", (40, 50), box) for name in names])
    with pytest.raises(ValueError, match=r"22 of 22 images have no entry in .*'cats/.*the store's \['other/"):
        epoch(folder, proposals=tmp_path / "other")


def test_a_state_goes_with_its_proposals(folder, tmp_path, our_errors):
    names = [p.relative_to(folder / "images").as_posix() for p in (folder / "images").rglob("*.jpg")]
    box = np.array([[1, 2, 11, 22]], dtype=np.uint16)
    for path, counts in (("one", [1] * 22), ("same", [1] * 22), ("more", [1] * 21 + [2])):
        entries = [(name, (40, 50), box.repeat(n, 0)) for name, n in zip(names, counts, strict=True)]
        ProposalStore.write(tmp_path / path, entries)
    options = {"batch_size": 4, "seed": 0, "workers": 0}
    with open_loader(folder, SPECS, proposals=tmp_path / "one", **options) as loader:
        state = loader.state_dict()
    with open_loader(folder, SPECS, proposals=tmp_path / "same", **options) as loader:
        loader.load_state_dict(state)
    for other in ({"proposals": tmp_path / "more"}, {}):
        told = pytest.raises(ValueError, match="load_state_dict: boxes must be the loader's own")
        with open_loader(folder, SPECS, **other, **options) as loader, told:
            loader.load_state_dict(state)


def test_batches_move(folder):
    batch = epoch(folder)[0]
    moved = batch.to("meta")
    assert moved.images[0].device.type == moved.boxes.device.type == moved.plan.crop.device.type == "meta"
    assert moved.names == batch.names


# --- files that are not what they should be -------------------------------------------------------------------------


def jpeg(image):
    with io.BytesIO() as file:
        Image.fromarray(image).save(file, "JPEG", quality=90)
        return file.getvalue()


@pytest.fixture
def broken(tmp_path, folder):
    good = (folder / "images" / "dogs" / "000.jpg").read_bytes()
    (tmp_path / "good.jpg").write_bytes(good)
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "cut.jpg").write_bytes(good[: len(good) // 2])
    (tmp_path / "text.jpg").write_bytes(b"this is no image" * 50)
    at = len(good) * 2 // 3
    (tmp_path / "warned.jpg").write_bytes(good[:at] + bytes(200) + good[at:])
    return tmp_path


KINDS = {"empty.jpg": "empty", "cut.jpg": "undecodable", "text.jpg": "undecodable", "warned.jpg": "damaged"}


def test_broken_files_are_raised_with_name_and_reason(broken):
    with pytest.raises(LoadError, match="4 images could not be read") as caught:
        epoch(broken, batch_size=5)
    for name, kind in KINDS.items():
        assert f"{name}: {kind}: " in str(caught.value)
    assert "Corrupt JPEG data" in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_files_are_masked_counted_and_named(broken, workers, caplog):
    with open_loader(broken, SPECS, batch_size=5, seed=0, workers=workers, on_error="mask") as loader:
        batch = next(iter(loader))
    assert [name for name, ok in zip(batch.names, batch.ok, strict=True) if ok] == ["good.jpg"]
    assert not batch.images[0][~batch.ok].any()
    assert batch.images[0][batch.ok].any()
    assert {name: kind for name, (kind, _) in loader.failures.items()} == KINDS
    assert dict(loader.report) == {"read": 1, "empty": 1, "undecodable": 2, "damaged": 1}
    for kind in ("empty", "undecodable", "damaged"):
        assert len([r for r in caplog.records if f": {kind}: " in r.message]) == 1  # the first of each kind


def test_masked_rows_have_no_boxes_and_no_labels(coco, tmp_path):
    where = tmp_path / "images"
    shutil.copytree(coco.parent / "images", where)
    (where / "cats" / "004.jpg").write_bytes(b"spoiled")
    options = {"on_error": "mask", "label_map": "instance", "batch_size": 22, "order": "file", "images": where}
    with open_loader(coco, SPECS, seed=0, workers=0, **options) as loader:
        (batch,) = loader
    row = batch.names.index("cats/004.jpg")
    assert batch.ok.tolist() == [i != row for i in range(22)]
    assert not batch.box_valid[row].any()
    assert (batch.label_map[row] == -1).all()
    assert (batch.label_map[batch.ok] >= 0).any()


def test_an_epoch_with_failures_ends_with_a_summary(broken, caplog):
    with open_loader(broken, SPECS, batch_size=5, seed=0, workers=0, on_error="mask") as loader:
        list(loader)
    assert "after epoch 0: 1 images read so far; 1 damaged, 1 empty, 2 undecodable" in caplog.text


def test_a_mask_that_cannot_be_read_fails_its_image(coco, tmp_path):
    record = json.loads(coco.read_text())
    record["annotations"][0]["segmentation"] = {"size": [3, 3], "counts": [4, 5]}
    (tmp_path / "bad.json").write_text(json.dumps(record))
    with pytest.raises(LoadError, match=r"cats/001.jpg: mask: "):
        epoch(tmp_path / "bad.json", images=coco.parent / "images", label_map="semantic", batch_size=22)


def test_without_verify_what_the_decoder_only_warns_about_is_taken(broken):
    image, _ = read_image(broken / "warned.jpg", verify=False)
    assert image.shape == (40, 90, 3)
    with pytest.raises(ReadError, match="Corrupt JPEG data"):
        read_image(broken / "warned.jpg")


def test_what_others_write_to_stderr_is_left_alone(broken, capfd):
    read_image(broken / "good.jpg")
    print("still here", file=sys.stderr)
    assert capfd.readouterr().err == "still here\n"


def test_many_threads_may_read_and_talk(folder, capfd):
    paths = [path for path in (folder / "images").rglob("*.jpg")] * 10
    stop = threading.Event()

    def talk():
        while not stop.is_set():
            os.write(2, b"harmless line\n")
            time.sleep(0.0005)

    talker = threading.Thread(target=talk)
    talker.start()
    try:
        with ThreadPoolExecutor(4) as pool:
            images = list(pool.map(lambda path: read_image(path)[0], paths))
    finally:
        stop.set()
        talker.join()
    assert all(image.numel() for image in images)
    print("after", file=sys.stderr)
    heard = capfd.readouterr().err.splitlines()
    assert heard[-1] == "after"
    assert set(heard[:-1]) == {"harmless line"}


@pytest.mark.parametrize("suffix", ["png", "gif", "webp"])
def test_a_damaged_picture_never_ends_the_process(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    g = np.random.default_rng(0)
    Image.fromarray(g.integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(path)
    data = path.read_bytes()
    refused = 0
    for at in range(8, len(data), max(1, len(data) // 60)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :])
        try:
            read_image(path)
        except ReadError:  # any other kind of error fails the test
            refused += 1
    assert refused > 0


def test_missing_images(coco, tmp_path):
    record = json.loads(coco.read_text())
    record["images"].append({"id": 999, "file_name": "gone.jpg", "height": 5, "width": 5})
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(record))
    where = coco.parent / "images"
    with pytest.raises(LoadError, match=r"1 images are missing under .*images, such as \['gone.jpg'\]"):
        epoch(changed, images=where)
    with open_loader(changed, SPECS, batch_size=23, seed=0, workers=0, on_error="mask", images=where) as loader:
        batch = next(iter(loader))
    assert [n for n, ok in zip(batch.names, batch.ok, strict=True) if not ok] == ["gone.jpg"]
    assert loader.report["missing"] == 1


def test_an_image_of_another_shape_than_the_json_says(coco, tmp_path):
    record = json.loads(coco.read_text())
    record["images"][2]["width"] *= 2
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(record))
    with pytest.raises(LoadError, match=r"cats/002.jpg: size: is 86 x 46, the json says 172 x 46"):
        epoch(changed, images=coco.parent / "images", batch_size=22)


def test_every_kind_of_image_becomes_rgb(tmp_path):
    g = np.random.default_rng(0)
    rgb = g.integers(0, 256, (9, 7, 3), dtype=np.uint8)
    gray, alpha = rgb[..., 0], np.dstack((rgb, g.integers(0, 256, (9, 7), dtype=np.uint8)))
    deep = g.integers(0, 65536, (9, 7)).astype(np.uint16)
    images = {
        "rgb.png": Image.fromarray(rgb),
        "gray.png": Image.fromarray(gray),
        "alpha.png": Image.fromarray(alpha),
        "palette.png": Image.fromarray(rgb).quantize(16),
        "deep.png": Image.fromarray(deep),
        "still.gif": Image.fromarray(rgb).quantize(16),
        "cmyk.jpg": Image.new("CMYK", (7, 9), (0, 255, 255, 0)),
        "gray.jpg": Image.new("L", (7, 9), 77),
    }
    for name, image in images.items():
        image.save(tmp_path / name)
    Image.fromarray(rgb).save(tmp_path / "lossless.webp", lossless=True)
    found = {name: read_image(tmp_path / name)[0] for name in [*images, "lossless.webp"]}
    assert all(x.shape == (9, 7, 3) and x.dtype == torch.uint8 for x in found.values())
    assert np.array_equal(found["rgb.png"], rgb)
    assert np.array_equal(found["lossless.webp"], rgb)
    assert np.array_equal(found["alpha.png"], rgb)  # dropped, not blended
    assert np.array_equal(found["gray.png"], np.dstack([gray] * 3))
    assert np.array_equal(found["deep.png"], np.dstack([deep >> 8] * 3))
    assert np.array_equal(found["palette.png"], np.array(images["palette.png"].convert("RGB")))
    assert np.abs(found["cmyk.jpg"].float().mean((0, 1)).numpy() - [255, 0, 0]).max() < 10
    assert (found["gray.jpg"] == 77).all()


@pytest.mark.parametrize("order", ["<", ">"])
def test_exif_orientation_is_ignored_and_counted(folder, tmp_path, order):
    good = (folder / "images" / "dogs" / "000.jpg").read_bytes()
    tiff = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IHHHIHHI", 8, 1, 0x0112, 3, 1, 6, 0, 0)
    exif = b"Exif\0\0" + tiff
    (tmp_path / "turned.jpg").write_bytes(good[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + good[2:])
    (tmp_path / "plain.jpg").write_bytes(good)
    assert read_image(tmp_path / "turned.jpg")[0].shape == (40, 90, 3)
    with open_loader(tmp_path, SPECS, batch_size=2, seed=0, workers=0) as loader:
        list(loader)
    assert loader.report == {"read": 2, "EXIF orientation ignored": 1}


def test_files_that_are_no_images_are_listed(folder, tmp_path):
    (tmp_path / "a.jpg").write_bytes((folder / "images" / "dogs" / "000.jpg").read_bytes())
    (tmp_path / "notes.md").write_text("hello")
    with open_loader(tmp_path, SPECS, batch_size=1, seed=0, workers=0) as loader:
        assert loader.source.problems == {"file that is no image, ignored": ["notes.md"]}


class Dying(torch.utils.data.Dataset):
    seed, label_map = 0, None

    def __getitem__(self, task):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.timeout(60)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_worker_that_dies_is_an_exception_not_a_hang(folder):
    with open_loader(folder, SPECS, batch_size=4, seed=0, workers=1) as loader:
        loader._dataset = Dying()
        with pytest.raises(RuntimeError, match="DataLoader worker"):
            list(loader)


def test_workers_end_with_an_abandoned_iteration(folder):
    import multiprocessing

    with open_loader(folder, SPECS, batch_size=4, seed=0, workers=2) as loader:
        iterator = iter(loader)
        next(iterator)
        assert len(multiprocessing.active_children()) == 2
    assert multiprocessing.active_children() == []
    loader.close()


def test_dropped_iterations_do_not_pile_up(folder):
    import multiprocessing

    with open_loader(folder, SPECS, batch_size=4, seed=0, workers=2) as loader:
        for e in range(3):
            loader.set_epoch(e)
            for _ in loader:
                break
            assert len(multiprocessing.active_children()) == 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "open_loader: batch_size must be an integer"),
        ({"batch_size": 9, "world": 2}, ValueError, "open_loader: batch_size must be a multiple of world, 2, got 9"),
        ({"rank": 1}, ValueError, r"open_loader: rank must be an integer in \[0, 0\], got 1"),
        ({"batch_size": 100}, ValueError, "batch_size must be at most the 22 images with last='drop', got 100"),
        ({"order": "random"}, ValueError, "order must be 'shuffle' or 'file', got 'random'"),
        ({"last": "some"}, ValueError, "last must be 'drop' or 'keep'"),
        ({"render": "gpu"}, ValueError, "render must be 'cpu' or 'device'"),
        ({"on_error": "skip"}, ValueError, "on_error must be"),
        ({"label_map": "instance"}, ValueError, "label_map must be left out without a COCO json"),
        ({"max_boxes": -1}, ValueError, "max_boxes must"),
        ({"seed": -1}, ValueError, "seed must"),
        ({"images": "nowhere"}, NotADirectoryError, "images must be a folder, got nowhere"),
    ],
)
def test_bad_arguments(our_errors, folder, change, error, message):
    with pytest.raises(error, match=message):
        open_loader(folder, SPECS, **{"batch_size": 8, "seed": 0, "workers": 0, **change})


def test_bad_paths(our_errors, folder, tmp_path):
    options = {"batch_size": 1, "seed": 0, "workers": 0}
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "out.txt").write_text("../photographs/a.jpg\n")
    (tmp_path / "twice.txt").write_text("a.jpg\na.jpg\n")
    (tmp_path / "bytes.bin").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "no_images.json").write_text("{}")
    (tmp_path / "out.json").write_text(json.dumps({"images": [{"id": 1, "file_name": "/etc/passwd"}]}))
    cases = {
        "nowhere": (FileNotFoundError, "none there"),
        "empty": (ValueError, "must hold images"),
        "empty.txt": (ValueError, "must list images"),
        "out.txt": (ValueError, r"names must lie under .*, got '\.\./photographs/a\.jpg'"),
        "twice.txt": (ValueError, "'a.jpg' twice"),
        "bytes.bin": (ValueError, "not text"),
        "bad.json": (ValueError, "must be a COCO json"),
        "no_images.json": (ValueError, "without any"),
    }
    for name, (error, message) in cases.items():
        with pytest.raises(error, match=message):
            open_loader(tmp_path / name, SPECS, **options)
    with pytest.raises(ValueError, match=r"names must lie under .*, got '/etc/passwd'"):
        open_loader(tmp_path / "out.json", SPECS, images=tmp_path, **options)
    with pytest.raises(NotADirectoryError, match="images must be given"):
        open_loader(tmp_path / "out.json", SPECS, **options)


def test_a_state_of_another_run_is_refused(our_errors, folder):
    with open_loader(folder, SPECS, batch_size=8, seed=0, workers=0) as loader:
        state = loader.state_dict()
    with (
        open_loader(folder, SPECS, batch_size=8, seed=1, workers=0) as loader,
        pytest.raises(ValueError, match=r"Loader\.load_state_dict: seed must be the loader's own, 1, got 0"),
    ):
        loader.load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 99}, "step must be an integer in"),
        ({"step": -1}, "step must"),
        ({"order": "file"}, "order must be the"),
    ],
)
def test_a_state_that_cannot_be_is_refused(our_errors, folder, change, message):
    with open_loader(folder, SPECS, batch_size=8, seed=0, workers=0) as loader:
        state = loader.state_dict() | change
        with pytest.raises(ValueError, match=message):
            loader.load_state_dict(state)
        with pytest.raises(TypeError, match="step must be an integer, got None"):
            loader.load_state_dict({k: v for k, v in loader.state_dict().items() if k != "step"})

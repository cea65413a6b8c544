import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import geoaug
from data_prep import coco_coarse, coco_subsets

SIZE = (9, 12)  # height, width


def square(image, category, x, y, side, **more):
    corners = [x, y, x + side, y, x + side, y + side, x, y + side]
    return {"id": 100 * image + category, "image_id": image, "category_id": category, "iscrowd": 0,
            "bbox": [x, y, side, side], "area": side * side, "segmentation": [corners], **more}  # fmt: skip


def category(number):
    fine = coco_coarse.FINE[number]
    return {"id": number, "name": fine.name, "supercategory": coco_coarse.NAMES[fine.coarse]}


def coco(annotations, count=2):
    images = [{"id": i, "file_name": f"{i:012d}.jpg", "height": SIZE[0], "width": SIZE[1]} for i in range(1, count + 1)]
    numbers = sorted({entry["category_id"] for entry in annotations} - {183})
    return {"info": {"year": 2017}, "images": images, "annotations": annotations,
            "categories": [category(number) for number in numbers]}  # fmt: skip


@pytest.fixture
def things(tmp_path):
    """A dog on a sky with a crowd of people, and an image of a car."""
    file = tmp_path / "instances_val.json"
    crowd = {"iscrowd": 1, "segmentation": {"size": list(SIZE), "counts": [0, 9, 99]}}  # the first column
    file.write_text(json.dumps(coco([square(1, 18, 4, 3, 4), square(1, 1, 0, 0, 9, **crowd), square(2, 3, 0, 0, 3)])))
    return file


@pytest.fixture
def stuff(tmp_path):
    file = tmp_path / "stuff_val.json"
    entries = [square(1, 157, 8, 0, 4), square(2, 183, 0, 0, 3), square(2, 149, 0, 5, 4)]
    file.write_text(json.dumps(coco(entries)))
    return file


def run(*arguments):
    return coco_subsets.main([str(argument) for argument in arguments])


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("coco_subsets.py")
    return told


def label_map(file, images, row):
    for name in json.loads(file.read_text())["images"]:
        Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(images / name["file_name"])
    specs = [geoaug.ViewSpec.whole(SIZE)]
    with geoaug.open_loader(file, specs, batch_size=2, seed=0, images=images, workers=0, order="file",
                            label_map="semantic", label_map_size=SIZE) as loader:  # fmt: skip
        return next(iter(loader)).label_map[row].numpy(), loader.source.objects.categories


def test_twelve_classes_of_things_come_first_and_every_category_of_coco_has_one():
    assert (len(coco_coarse.NAMES), coco_coarse.THINGS) == (27, 12)
    assert sorted(coco_coarse.FINE) == list(range(1, 183))
    assert all((number < 92) == (fine.coarse < 12) for number, fine in coco_coarse.FINE.items())
    assert sorted({fine.coarse for fine in coco_coarse.FINE.values()}) == list(range(27))
    for number, name, coarse in ((1, "person", "person"), (72, "tv", "electronic"), (182, "wood", "solid"),
                                 (120, "fog", "water"), (66, "mirror", "furniture")):  # fmt: skip
        assert coco_coarse.FINE[number] == (name, coco_coarse.NAMES.index(coarse))


def test_the_classes_are_those_of_real_annotations(data):
    record = json.loads((data / "coco_mini/annotations/instances_val.json").read_text())
    assert len(record["categories"]) == 80
    for entry in record["categories"]:
        fine = coco_coarse.FINE[entry["id"]]
        assert (fine.name, coco_coarse.NAMES[fine.coarse]) == (entry["name"], entry["supercategory"])


def test_subsets_are_the_smallest_hashes_and_nested(tmp_path, capsys):
    entries = [square(i, 3, 0, 0, 3) for i in range(1, 201)]
    file = tmp_path / "instances_train.json"
    file.write_text(json.dumps(coco(entries, 200)))
    assert run("subsets", file, "--out", tmp_path / "out") == 0
    told = capsys.readouterr().out
    assert len(told.splitlines()) == 1
    assert "instances_train-1pct.txt: 2 images" in told
    assert told.endswith("0 failures\n")
    by_hash = sorted(range(1, 201), key=lambda i: hashlib.blake2b(str(i).encode(), digest_size=8).digest())
    for share, count in ((1, 2), (5, 10), (10, 20)):
        stem = tmp_path / "out" / f"instances_train-{share}pct"
        ids = [int(line) for line in Path(f"{stem}.ids.txt").read_text().split()]
        assert ids == sorted(by_hash[:count])
        assert Path(f"{stem}.txt").read_text().split() == [f"{i:012d}.jpg" for i in ids]
        record = json.loads(Path(f"{stem}.json").read_text())
        assert [image["id"] for image in record["images"]] == ids
        assert [entry["image_id"] for entry in record["annotations"]] == ids
        assert record["info"] == {"year": 2017}
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["shares"] == [1, 5, 10]
    assert sorted(manifest["files"]) == sorted(f.name for f in (tmp_path / "out").iterdir() if "manifest" not in f.name)


def test_membership_does_not_depend_on_the_order_of_the_json():
    images = coco([], 50)["images"]
    assert coco_subsets.chosen(images, 10) == coco_subsets.chosen(images[::-1], 10)[::-1]
    assert len(coco_subsets.chosen(images, 0.1)) == 1  # at least one


def test_the_same_command_again_does_nothing_and_another_is_refused(things, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("subsets", things, "--out", out) == 0
    before = {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    assert run("subsets", things, "--out", out) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert before == {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    assert "made with other arguments: add --overwrite" in refused(
        capsys, "subsets", things, "--out", out, "--shares", 5
    )
    assert run("subsets", things, "--out", out, "--shares", 50, "--overwrite") == 0
    things.write_text(json.dumps(coco([square(1, 18, 4, 3, 4)])))  # another file of the same name
    assert "other arguments" in refused(capsys, "subsets", things, "--out", out, "--shares", 50)


def test_coarse_classes_of_things_and_stuff_reach_the_label_map(things, stuff, tmp_path, capsys):
    assert run("coarse", things, "--stuff", stuff, "--out", tmp_path / "out") == 0
    assert "2 images, 5 areas of 5 classes, 0 failures" in capsys.readouterr().out
    file = tmp_path / "out" / "instances_val-coarse27.json"
    labels, names = label_map(file, tmp_path, 0)
    assert names == coco_coarse.NAMES
    row = coco_coarse.NAMES.index
    assert (labels[3:7, 4:8] == row("animal")).all()
    assert (labels[:4, 8:] == row("sky")).all()
    assert (labels[:, 0] == row("person")).all()  # the crowd
    assert (labels == -1).sum() == 9 * 12 - 16 - 16 - 9
    record = json.loads(file.read_text())
    assert [entry["id"] for entry in record["annotations"]] == [1, 2, 3, 4, 5]
    assert record["categories"][26]["fine"] == [120, 148, 155, 178, 179]


def test_pixelmaps_give_the_classes_they_hold(things, tmp_path, capsys):
    maps = np.full((2, *SIZE), 255, np.uint8)
    maps[0, :4, :6], maps[0, 5:, 2:] = 18 - 1, 157 - 1
    maps[1] = 92 - 1
    (tmp_path / "maps").mkdir()
    for i, fine in enumerate(maps, 1):
        Image.fromarray(fine).save(tmp_path / "maps" / f"{i:012d}.png")
    assert run("coarse", things, "--pixelmaps", tmp_path / "maps", "--out", tmp_path / "out") == 0
    labels, _ = label_map(tmp_path / "out" / "instances_val-coarse27.json", tmp_path, 0)
    expected = np.full(SIZE, -1)
    expected[:4, :6], expected[5:, 2:] = coco_coarse.NAMES.index("animal"), coco_coarse.NAMES.index("sky")
    assert (labels == expected).all()
    # What cannot be read is left out, counted and told.
    (tmp_path / "maps" / f"{2:012d}.png").write_bytes(b"no picture")
    capsys.readouterr()
    assert run("coarse", things, "--pixelmaps", tmp_path / "maps", "--out", tmp_path / "out", "--overwrite") == 0
    assert capsys.readouterr().out.endswith("1 images, 2 areas of 2 classes, 1 failed: pixelmap unreadable\n")
    Image.fromarray(maps[0, :5]).save(tmp_path / "maps" / f"{1:012d}.png")
    told = refused(capsys, "coarse", things, "--pixelmaps", tmp_path / "maps", "--out", tmp_path / "out", "--overwrite")
    assert "has a map of none of the images: {'pixelmap of another size': 1, 'pixelmap unreadable': 1}" in told


def test_a_list_keeps_images_by_name_stem_or_id(things, stuff, tmp_path, capsys):
    for line in ("000000000002.jpg", "000000000002", "2"):
        (tmp_path / "list.txt").write_text(f"{line}\n\n")
        arguments = ("coarse", things, "--stuff", stuff, "--list", tmp_path / "list.txt", "--out", tmp_path / "out")
        assert run(*arguments, "--overwrite") == 0
        record = json.loads((tmp_path / "out" / "instances_val-coarse27.json").read_text())
        assert [image["id"] for image in record["images"]] == [2]
        assert {entry["image_id"] for entry in record["annotations"]} == {2}
    (tmp_path / "list.txt").write_text("2\n7\n")
    assert "must name images, got 1 lines that name none, such as ['7']" in refused(capsys, *arguments, "--overwrite")


def test_annotations_without_stuff_are_told_in_one_line(things, tmp_path, capsys):
    for more in ((), ("--stuff", things)):
        told = refused(capsys, "coarse", things, *more, "--out", tmp_path / "out")
        assert "instances_val.json has no labels of stuff (categories 92 to 182): give --stuff" in told
    assert not (tmp_path / "out").exists()


def test_what_is_no_coco_json_is_told_in_one_line(things, tmp_path, capsys):
    bad = tmp_path / "bad.json"
    for text, message in (
        ("[", "is no COCO json"),
        ("{}", "must have lists of images"),
        ('{"images": [{}], "annotations": [], "categories": []}', "images[0] has no 'id'"),
        ('{"images": [], "annotations": [], "categories": []}', "lists no images"),
        (
            json.dumps(coco([square(1, 3, 0, 0, 3)]) | {"categories": [{"id": 3, "name": "motorcycle"}]}),
            "must be COCO's",
        ),
    ):
        bad.write_text(text)
        assert message in refused(capsys, "coarse", bad, "--out", tmp_path / "out")
    assert "is no file" in refused(capsys, "subsets", tmp_path / "none.json", "--out", tmp_path / "out")
    assert "expected a share" in refused(capsys, "subsets", things, "--out", tmp_path / "out", "--shares", "0")

"""Loading a curated part of a data set."""

import json

import numpy as np
import pytest
from PIL import Image

import geoaug

NAMES = ["a/one.jpg", "a/two.png", "b/one.jpg", "b/three.jpg"]


@pytest.fixture
def folder(tmp_path):
    for i, name in enumerate(NAMES):
        file = tmp_path / "data" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((6, 8, 3), 50 * i, np.uint8)).save(file, quality=95)
    return tmp_path / "data"


def loaded(path, lines, tmp_path, **more):
    file = tmp_path / "list.txt"
    file.write_text("".join(f"{line}\n" for line in lines))
    specs = [geoaug.ViewSpec.whole(4)]
    options = {"batch_size": 4, "seed": 0, "workers": 0, "order": "file", "last": "keep", **more}
    with geoaug.open_loader(path, specs, only=file, **options) as loader:
        batch = next(iter(loader))
    return batch, [name for name in batch.names if name]


def test_names_and_stems_choose_in_the_sources_order(folder, tmp_path):
    batch, names = loaded(folder, ["three", "a/two", "", "a/one.jpg", "three"], tmp_path)
    assert names == ["a/one.jpg", "a/two.png", "b/three.jpg"]
    assert batch.label[:3].tolist() == [0, 0, 1]  # as in the whole folder
    assert batch.images[0][:3, 0, 0, 0].tolist() == [0, 50, 150]


def test_objects_go_with_their_images(folder, tmp_path):
    images = [{"id": i, "file_name": name, "height": 6, "width": 8} for i, name in enumerate(NAMES)]
    entries = [
        {"id": 10 * i + k, "image_id": i, "category_id": i, "bbox": [i, k, 2, 2],
         "segmentation": [[i, k, i + 2, k, i + 2, k + 2, i, k + 2]]} for k in range(2) for i in (3, 0, 2)
    ]  # fmt: skip
    categories = [{"id": i, "name": str(i)} for i in range(4)]
    file = tmp_path / "x.json"
    file.write_text(json.dumps({"images": images, "annotations": entries, "categories": categories}))
    more = {"images": folder, "label_map": "semantic", "label_map_size": (6, 8)}
    batch, names = loaded(file, ["two", "b/one", "three"], tmp_path, **more)
    assert names == ["a/two.png", "b/one.jpg", "b/three.jpg"]
    assert batch.box_valid.sum(1).tolist() == [0, 2, 2, 0]
    assert batch.box_labels[:, :2].tolist()[1:3] == [[2, 2], [3, 3]]
    assert batch.boxes[2, 0].tolist() == [3 / 8, 0, 5 / 8, pytest.approx(2 / 6)]
    assert sorted(batch.label_map[2].unique().tolist()) == [-1, 3]
    assert (batch.label_map[0] == -1).all()


def test_images_that_are_missing_matter_if_listed(folder, tmp_path):
    images = [{"id": i, "file_name": name, "height": 6, "width": 8} for i, name in enumerate(NAMES)]
    file = tmp_path / "x.json"
    file.write_text(json.dumps({"images": images, "annotations": [], "categories": []}))
    (folder / NAMES[0]).unlink()
    assert loaded(file, ["two"], tmp_path, images=folder)[1] == ["a/two.png"]
    with pytest.raises(geoaug.LoadError, match="1 images are missing"):
        loaded(file, ["two", "a/one"], tmp_path, images=folder)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["three", "four"], r"must name images of .*data, got .*list.txt with 1 other, \['four'\]"),
        ([""], "with 0 other"),
        (["one"], "must name one image a line, got .*: 'one' is more than one"),
    ],
)
def test_a_line_that_names_no_image_or_two_is_told(lines, message, folder, tmp_path):
    with pytest.raises(ValueError, match=message):
        loaded(folder, lines, tmp_path)


def test_a_list_that_is_not_there_is_told(folder, tmp_path):
    for only in (tmp_path / "none.txt", folder / NAMES[1]):
        with pytest.raises(ValueError, match="only must be a text file of names"):
            geoaug.open_loader(folder, [geoaug.ViewSpec(4)], batch_size=1, seed=0, only=only)

"""The task unsupervised-segmentation of evaluate.py, and k-means."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import geoaug
from data_prep.coco_rle import rle_of
from tests import reference_segmentation as slow
from trainers import common, evaluate, evaluation, measure_segmentation
from trainers.clusters import drawn_cells, k_means, squared

COLORS = np.array(
    [(230, 30, 30), (30, 200, 60), (40, 60, 220), (250, 240, 60), (200, 200, 200)], np.uint8
)  # the last: void
SIZES = [(60, 90), (80, 50), (64, 64), (72, 96)]


@pytest.fixture(scope="module")
def painted(tmp_path_factory):
    """Rectangles in the colours of four classes on what has no label; stored without loss."""
    folder = tmp_path_factory.mktemp("painted")
    images, annotations = [], []
    for i, (height, width) in enumerate(SIZES):
        labels = np.full((height, width), 4)
        for c in range(4):
            y, x = 2 + (7 * c + 11 * i) % (height - 30), (9 + 13 * c + 5 * i) % (width - 24)
            labels[y : y + 22, x : x + 15] = c
        Image.fromarray(COLORS[labels]).save(folder / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "height": height, "width": width})
        for c in range(4):
            mask = labels == c
            if mask.any():
                annotations.append({"id": 10 * i + c, "image_id": i, "category_id": c + 1, "bbox": [0, 0, 9, 9],
                                    "segmentation": rle_of(mask), "iscrowd": 0})  # fmt: skip
    categories = [{"id": c + 1, "name": f"class {c}"} for c in range(4)]
    (folder / "x.json").write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return folder


def config(painted, **changed):
    values = {"weights": "random", "arch": "resnet10-narrow", "data": painted / "x.json", "images": painted,
              "workers": 0, "layer": "c5", "view": 40, "device": "cpu"}  # fmt: skip
    return evaluation.Config("unsupervised-segmentation", **(values | changed))


def eyes(images):
    """A backbone that sees colours, and nothing else."""
    return {"c5": images.float() / 255 + 0.01}


def test_what_sees_colours_names_painted_classes(painted):
    """Only if a label lies where its pixel does, in images of every shape; edges mix colours."""
    result = measure_segmentation.segmentation(config(painted, background=True, things=3, clusters=5), eyes)
    assert result["segmenter"] == "k-means"
    assert (result["images"], result["classes"], result["categories"], result["categories_in_use"]) == (4, 5, 5, 5)
    assert result["miou"] > 0.85
    assert result["pixel_accuracy"] > 0.93
    assert list(result["iou"]) == ["class 0", "class 1", "class 2", "class 3", "unlabelled"]
    assert result["majority"]["miou"] > 0.85
    assert min(result["things"], result["stuff"]) <= result["miou"] <= max(result["things"], result["stuff"])
    assert result["published_form"].keys() == {"things", "stuff"}


def test_truth_is_the_nearest_label_of_every_pixel_of_the_view(painted):
    """At the source's own resolution nothing is resampled: colours and labels say the same."""
    data = measure_segmentation.Data(config(painted, view=64, background=True), painted / "x.json", painted)
    for each in data:
        image, truth = each.images[2], each.truth[2]  # 64 x 64
        assert torch.equal(torch.from_numpy(COLORS)[truth].permute(2, 0, 1), image)
    data = measure_segmentation.Data(config(painted, view=64), painted / "x.json", painted)
    void = next(iter(data)).truth[2]
    assert torch.equal(torch.where(void < 0, 4, void), truth)


def test_scores_are_those_of_the_confusion_of_all_images(painted, monkeypatch):
    named = torch.randint(0, 6, (4, 40, 40), generator=torch.Generator().manual_seed(0))
    rows = iter(named)
    monkeypatch.setattr(measure_segmentation, "BATCH", 2)

    def head(config):
        def scores(images):
            return torch.stack([torch.nn.functional.one_hot(next(rows), 6).permute(2, 0, 1) for _ in images]).float()

        return scores

    monkeypatch.setattr(measure_segmentation, "of_head", head)
    result = measure_segmentation.segmentation(config(painted), eyes)
    truth = torch.cat([each.truth for each in measure_segmentation.Data(config(painted), painted / "x.json", painted)])
    table = slow.confusion(truth.flatten().tolist(), named.flatten().tolist(), 4, 6)
    score = geoaug.metrics.hungarian_miou(torch.tensor(table))
    assert result["segmenter"] == "head"
    assert result["miou"] == score.miou
    assert result["iou"] == {f"class {c}": value for c, value in enumerate(score.iou.tolist())}
    assert result["things"] is None
    assert "published_form" not in result


def test_sheets_show_photographs_beside_classes(painted, tmp_path, monkeypatch):
    monkeypatch.setattr(measure_segmentation, "ROWS", 3)
    result = measure_segmentation.segmentation(
        config(painted, background=True, sheets=tmp_path / "sheets", sheet_count=4), eyes
    )
    assert result["sheets"] == [str(tmp_path / "sheets" / f"sheet-0{i}.png") for i in (0, 1)]
    sheet = np.array(Image.open(result["sheets"][0]))
    assert sheet.shape[1] == 3 * 200 + 2 * 8
    named, truth = (sheet[21:221, start : start + 200] for start in (208, 416))
    assert (np.abs(named.astype(int) - truth).max(-1) < 8).mean() > 0.9  # one class, one colour, on both sides
    assert len(np.unique(truth.reshape(-1, 3) // 16, axis=0)) > 4


def test_a_label_of_none_has_the_colour_of_none():
    image = torch.zeros(3, 2, 2, dtype=torch.uint8)
    shown = measure_segmentation.tinted(image, torch.tensor([[0, -1], [-1, 1]]), (128, 128, 128), 2)
    assert shown[:, 0, 1].tolist() == [96, 96, 96]
    assert shown[:, 0, 0].tolist() == [round(0.75 * x) for x in geoaug.viz.color_of(0)]


def test_the_command_line_measures_a_random_backbone(painted, tmp_path, capsys):
    for bank in ({}, {"bank": painted, "clusters": 7}):
        out = tmp_path / "x.json"
        evaluate.main(config(painted, out=out, **bank))
        result = json.loads(out.read_text())
        assert result["task"] == "unsupervised-segmentation"
        assert 0 < result["miou"] < 1
        assert result["categories"] == (7 if bank else 4)
        assert capsys.readouterr().out.splitlines()[-1] == f"wrote {out}: unsupervised-segmentation of random"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"things": 5}, "--things must be at most the 4 classes, got 5"),
        ({"segmenter": "head"}, "--segmenter head needs a run of densesiam.py --task segmentation, got random"),
        ({"clusters": 100_000}, "cells for 100000 clusters"),
        ({"data": "folder"}, "label_map must be left out without a COCO json"),
    ],
)
def test_what_cannot_be_measured_is_told(changed, message, painted, our_errors):
    if changed.get("data") == "folder":
        changed = {"data": painted, "images": None}
    with pytest.raises(common.UsageError, match=message):
        evaluate.main(config(painted, **changed))


def test_data_without_a_labelled_pixel_is_told(painted, tmp_path):
    record = json.loads((painted / "x.json").read_text())
    (tmp_path / "x.json").write_text(json.dumps({**record, "annotations": []}))
    with pytest.raises(common.UsageError, match="must have labelled pixels, got none"):
        evaluate.main(config(painted, data=tmp_path / "x.json"))


# -- k-means ----------------------------------------------------------------------------------------------------------


def test_k_means_finds_what_lies_apart():
    generator = torch.Generator().manual_seed(0)
    middles = torch.tensor([[0.0, 0], [9, 0], [0, 9], [9, 9], [30, 30]])
    vectors = (middles[:, None] + torch.randn(5, 40, 2, generator=generator) * 0.3).flatten(0, 1)
    for seed in range(5):
        centres = k_means(vectors, 5, seed=seed)
        own = squared(vectors, centres).argmin(1).view(5, 40)
        assert (own == own[:, :1]).all()
        assert len(own[:, 0].unique()) == 5
        means = torch.stack([vectors[own.flatten() == c].mean(0) for c in range(5)])
        assert torch.allclose(means, centres, atol=1e-4)
    assert torch.equal(k_means(vectors, 5, seed=3), k_means(vectors, 5, seed=3))


def test_k_means_of_equal_vectors_and_of_as_many_as_there_are():
    assert torch.equal(k_means(torch.ones(6, 2), 3), torch.ones(3, 2))
    vectors = torch.arange(4.0)[:, None]
    assert sorted(k_means(vectors, 4).flatten().tolist()) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="vectors must be at least k, 3, got 2"):
        k_means(torch.ones(2, 2), 3)


def test_cells_are_drawn_by_the_image():
    maps = torch.rand(3, 5, 6, 7)
    key = geoaug.Key(0, 0, torch.tensor([4, 5, 6]))
    every, some = drawn_cells(maps, 99, key), drawn_cells(maps, 10, key)
    assert (every.shape, some.shape) == ((3 * 42, 5), (30, 5))
    assert torch.allclose(some.norm(dim=1), torch.ones(30))
    assert torch.equal(drawn_cells(maps[1:], 10, key[torch.tensor([1, 2])]), some[10:])
    found = (some.view(3, 10, 1, 5) == every.view(3, 1, 42, 5)).all(-1)
    assert (found.sum(2) == 1).all()  # each image's own, none twice
    assert (found.sum(1) <= 1).all()

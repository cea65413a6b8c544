import json
import math

import pytest
import torch
from PIL import Image
from torch.nn import functional

from data_prep import make_scenes
from geoaug import metrics, viz
from geoaug.objectives.readout import sample_points
from tests import reference_points
from trainers import common, evaluate, measure_affinity
from trainers.evaluation import Config


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def jaccard(values, mask, ignored, keep, law):
    """One map and one mask as flat lists."""
    order = sorted(range(len(values)), key=lambda i: -values[i])
    total = sum(max(v, 0) for v in values)
    kept, mass = set(), 0.0
    for n, i in enumerate(order):
        if law == "cells" and n < keep * len(values):
            kept.add(i)
        if law == "mass" and values[i] > 0 and mass < keep * total:
            kept.add(i)
            mass += values[i]
    own = {i for i, on in enumerate(mask) if on}
    both, either = ({i for i in x if not ignored[i]} for x in (kept & own, kept | own))
    return len(both) / len(either) if either else 0.0


@pytest.mark.parametrize("law", ["mass", "cells"])
@pytest.mark.parametrize("keep", [0.3, 0.8, 1.0])
def test_jaccard_against_the_loop(law, keep):
    maps, masks, ignore = draw(2, 3, 5, 7), draw(2, 3, 5, 7, seed=1) > 0.5, draw(2, 5, 7, seed=2) > 1
    masks[1, 2] = False
    found = metrics.affinity_iou(maps, masks, keep=keep, law=law, ignore=ignore)
    plain = metrics.affinity_iou(maps, masks, keep=keep, law=law)
    for b in range(2):
        for k in range(3):
            lists = maps[b, k].flatten().tolist(), masks[b, k].flatten().tolist()
            void = ignore[b].flatten().tolist()
            assert found[b, k].item() == pytest.approx(jaccard(*lists, void, keep, law))
            assert plain[b, k].item() == pytest.approx(jaccard(*lists, [False] * 35, keep, law))
    assert found[1, 2] == 0 < found[0].min()


def test_a_map_that_is_the_mask_gives_one():
    masks = torch.zeros(1, 2, 8, 8, dtype=torch.bool)
    masks[0, 0, 2:5, 1:7], masks[0, 1, :4] = True, True
    assert metrics.affinity_iou(masks.float(), masks, keep=1.0).tolist() == [[1.0, 1.0]]
    assert metrics.affinity_iou(2 * masks.float() - 1, masks, keep=1.0).tolist() == [[1.0, 1.0]]
    assert metrics.affinity_iou(-masks.float(), masks).tolist() == [[0.0, 0.0]]
    cells = metrics.affinity_iou(masks.float(), masks, law="cells")
    assert cells.tolist() == [[pytest.approx(18 / 52), pytest.approx(32 / 52)]]  # 52 of 64 cells are kept


def test_maps_against_the_loop():
    features, points = draw(2, 4, 3, 5), draw(2, 2, 2, seed=1).sigmoid()
    found = metrics.affinity_maps(features, points, (6, 7))
    whole = functional.interpolate(features, (6, 7), mode="bilinear", align_corners=False)
    at = sample_points(whole, points)
    for b in range(2):
        for k in range(2):
            for y in range(6):
                for x in range(7):
                    expected = reference_points.cosine(at[b, k].tolist(), whole[b, :, y, x].tolist())
                    assert found[b, k, y, x].item() == pytest.approx(expected)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    arguments = ["--out", str(folder), "--images", "6", "--size", "96", "--objects", "1", "3", "--workers", "1"]
    assert make_scenes.main(arguments) == 0
    return folder / "instances.json"


def config_of(data, **more):
    options = {"weights": "random", "arch": "resnet10-narrow", "side": 96, "map_size": 24, "workers": 0} | more
    return Config("affinity", data=data, device="cpu", **options)


def test_the_task_measures_and_shows(scenes, tmp_path, capsys):
    page = tmp_path / "maps.html"
    result = evaluate.main(config_of(scenes, pictures=page, shown=2, beside=("random",), out=tmp_path / "a.json"))
    capsys.readouterr()
    assert 0 < result["jaccard"] < 1
    assert 0 < result["standard_error"] < 1
    assert 0 < result["jaccard_of_cells"] < 1
    annotations = json.loads(scenes.read_text())["annotations"]
    assert result["objects"] + result["too_small"] == len(annotations)
    assert result["images"] == 6
    assert page.read_text().count("<img") == 2
    assert json.loads((tmp_path / "a.json").read_text())["jaccard"] == result["jaccard"]
    assert evaluate.main(config_of(scenes, count=2))["images"] == 2


def test_features_that_know_the_objects_are_ideal(scenes):
    """A backbone that answers with the painted masks themselves: each object a channel of its own."""
    record = json.loads(scenes.read_text())
    assert record["annotations"]
    truth = {}

    def backbone(images):
        return {"c5": truth["features"]}

    found = []
    for batch in measure_affinity.images_of(
        config_of(scenes), scenes, None, measure_affinity.geoaug.ViewSpec.whole(96), label_map="instance",
        label_map_size=(24, 24),
    ):  # fmt: skip
        truth["features"] = functional.one_hot(batch.label_map + 1, 12).permute(0, 3, 1, 2).float()
        slots = measure_affinity.seen(batch)
        points = (batch.boxes[:, slots, :2] + batch.boxes[:, slots, 2:]) / 2
        maps = measure_affinity.maps_of(backbone, batch.images[0], points, config_of(scenes))
        masks = (batch.label_map == slots[:, None, None])[None]
        inside = torch.stack([m[int(y * 24), int(x * 24)] for m, (x, y) in zip(masks[0], points[0], strict=True)])
        found.append(metrics.affinity_iou(maps, masks, keep=1.0)[0][inside])
    assert torch.cat(found).median() > 0.8  # a centre near an edge reads two objects


def test_what_a_crowd_covers_counts_for_nothing(scenes, tmp_path):
    """A crowd over the left half: its cells are neither object nor background, but those of objects in front of it."""
    record = json.loads(scenes.read_text())
    for image in record["images"]:
        h, w = image["height"], image["width"]
        left = [h * (w // 2), h * w - h * (w // 2)]  # columns first: the left half is in the second run
        crowd = {"size": [h, w], "counts": [0, *left]}
        entry = {"image_id": image["id"], "category_id": 1, "bbox": [0, 0, w // 2, h], "segmentation": crowd}
        record["annotations"].append({"id": 1000 + image["id"], "iscrowd": 1, "area": left[0], **entry})
    (tmp_path / "crowds.json").write_text(json.dumps(record))
    images = scenes.parent / "images"
    plain = evaluate.main(config_of(scenes))
    crowds = evaluate.main(config_of(tmp_path / "crowds.json", images=images))
    assert crowds["objects"] == plain["objects"]  # a crowd is none
    assert crowds["jaccard"] > plain["jaccard"] * 1.05  # background that was kept wrongly is no longer looked at
    found = measure_affinity.crowds_of(tmp_path / "crowds.json")
    assert [len(each.masks) for each in found.values()] == [1] * 6
    for batch in measure_affinity.images_of(
        config_of(scenes), scenes, None, measure_affinity.geoaug.ViewSpec.whole(96), label_map="instance",
        label_map_size=(24, 24),
    ):  # fmt: skip
        void = measure_affinity.void_of(batch, found[batch.names[0]])
        assert not void[:, :, 13:].any()
        assert torch.equal(void[:, :, :11], batch.label_map[:, :, :11] < 0)
    (tmp_path / "half").mkdir()
    for file in images.iterdir():  # a set that was made smaller as a whole, its json left as it was
        picture = Image.open(file)
        picture.resize((picture.width // 2, picture.height // 2)).save(tmp_path / "half" / file.name)
    smaller = evaluate.main(config_of(tmp_path / "crowds.json", images=tmp_path / "half"))
    assert smaller["objects"] == crowds["objects"]
    assert smaller["jaccard"] == pytest.approx(crowds["jaccard"], rel=0.3)
    record["annotations"][-1]["segmentation"] = {"size": [1, 1], "counts": [1]}
    (tmp_path / "bad.json").write_text(json.dumps(record))
    with pytest.raises(common.UsageError, match=r"got a crowd in .*: mask is of \["):
        evaluate.main(config_of(tmp_path / "bad.json", images=images))
    for change in ({"image_id": [1]}, {"image_id": None}):
        record["annotations"][-1] |= change
        (tmp_path / "bad.json").write_text(json.dumps(record))
        with pytest.raises(common.UsageError, match=r"path must be a COCO json, got .*annotations"):
            evaluate.main(config_of(tmp_path / "bad.json", images=images))


def test_data_without_masks_is_told(scenes, tmp_path):
    with pytest.raises(common.UsageError, match="--data must be a COCO json with masks"):
        evaluate.main(config_of(scenes.parent / "images"))
    record = json.loads(scenes.read_text()) | {"annotations": []}
    (tmp_path / "none.json").write_text(json.dumps(record))
    with pytest.raises(common.UsageError, match="--data has no objects with a mask"):
        evaluate.main(config_of(tmp_path / "none.json", images=scenes.parent / "images"))


def test_pictures_of_affinities():
    values = torch.linspace(-0.5, 1, 4).expand(3, 4)
    picture = viz.heat(values, (30, 40))
    assert picture.shape == (3, 30, 40)
    assert picture[:, 0, 0].tolist() == [0, 0, 0]
    assert picture[:, 0, -1].tolist() == [255, 255, 255]
    assert (picture.float().sum(0).diff(dim=1) >= 0).all()  # brighter is more alike
    ring = viz.ring(torch.zeros(3, 40, 60, dtype=torch.uint8), 0.25, 0.5)
    rows, columns = (ring[0] > 0).nonzero().unbind(1)
    assert rows.float().mean().item() == pytest.approx(20, abs=1)
    assert columns.float().mean().item() == pytest.approx(15, abs=1)
    assert not ring[0, 20, 15]
    assert not ring[1:].any()


@pytest.mark.usefixtures("our_errors")
def test_bad_input_is_named():
    maps, masks = torch.rand(1, 2, 4, 4), torch.ones(1, 2, 4, 4).bool()
    bad = [
        (lambda: metrics.affinity_iou(maps[0], masks), "affinity_iou: maps must be"),
        (lambda: metrics.affinity_iou(maps, masks.float()), "affinity_iou: masks must be"),
        (lambda: metrics.affinity_iou(maps, masks[:, :1]), "affinity_iou: masks must be"),
        (lambda: metrics.affinity_iou(maps, masks, keep=0), "affinity_iou: keep must be"),
        (lambda: metrics.affinity_iou(maps, masks, keep=math.nan), "affinity_iou: keep must be"),
        (lambda: metrics.affinity_iou(maps, masks, law="all"), "affinity_iou: law must be"),
        (lambda: metrics.affinity_iou(maps, masks, ignore=masks), "affinity_iou: ignore must be"),
        (lambda: metrics.affinity_maps(maps[0], torch.rand(1, 1, 2)), "affinity_maps: features must be"),
        (lambda: metrics.affinity_maps(maps, torch.rand(2, 1, 2)), "sample_points: points must be"),
    ]
    for call, message in bad:
        with pytest.raises(ValueError, match=message):
            call()

"""The measures as a command, and the page made of them: on scenes, with a tiny net."""

import json
from pathlib import Path

import pytest
import torch

from data_prep import make_scenes
from trainers import common, evaluate, report

QUICK = {"arch": "resnet10-tiny", "size": 64, "tile": 32, "workers": 0, "count": 8, "k": (5, 3)}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    out = tmp_path_factory.mktemp("scenes")
    assert make_scenes.main(["--out", str(out), "--images", "24", "--size", "96", "--objects", "2", "3"]) == 0
    return out / "instances.json"


def measured(task: str, scenes: Path, **more) -> dict:
    return evaluate.main(evaluate.Config(**{"task": task, "weights": "random", "data": scenes, **QUICK, **more}))


def test_object_knn_counts_each_object_once_and_repeats_itself(scenes, tmp_path):
    found = measured("object-knn", scenes, out=tmp_path / "a" / "knn.json")
    objects = json.loads(scenes.read_text())["annotations"]
    assert 0 < found["bank"] <= 3 * 24
    assert found["bank"] + found["queries"] <= len(objects)  # of an image in the bank, three objects at most
    assert set(found["k"]) == {"5", "3"}
    assert json.loads((tmp_path / "a" / "knn.json").read_text()) == json.loads(json.dumps(found))
    assert measured("object-knn", scenes) == found
    assert measured("object-knn", scenes, seed=1)["k"] != found["k"]  # another split, another net


def test_with_a_bank_of_its_own_every_object_of_the_data_is_a_query(scenes):
    found = measured("object-knn", scenes, bank=scenes, k=(1,))
    assert found["queries"] == len(json.loads(scenes.read_text())["annotations"])
    # the bank holds the queries themselves, so a nearest neighbour is the object itself wherever it was drawn
    assert found["k"]["1"]["top1"] > 0.9


def test_disturbed_objects_are_named_from_other_features(scenes):
    alone, both = (measured("disturbed-knn", scenes, disturb=side)["k"] for side in ("queries", "both"))
    assert alone != both
    assert both != measured("object-knn", scenes)["k"]


def test_coupling_and_position_are_given_layer_by_layer(scenes):
    layers = measured("coupling-rate", scenes)["layers"]
    assert set(layers) == set(common.Trunk.stages)
    # a stem cell next to the other object sees it, so nothing is exactly 1; far from 1 it would be no rate
    assert all(0.5 < layer["ratio_of_means"] < 3 for layer in layers.values())
    position = measured("position-similarity", scenes)
    assert position["images"] == 8
    assert all(0.5 < x <= 1.0001 for x in position["layers"].values())


def test_weights_of_a_file_are_the_ones_measured(scenes, tmp_path):
    torch.manual_seed(0)
    trunk = common.Trunk("resnet10-tiny")
    torch.save(trunk.state_dict(), tmp_path / "same.pth")
    random = measured("object-knn", scenes)["k"]
    assert measured("object-knn", scenes, weights=str(tmp_path / "same.pth"))["k"] == random
    with torch.no_grad():
        trunk.conv1.weight.mul_(-1)
    torch.save(trunk.state_dict(), tmp_path / "other.pth")
    assert measured("object-knn", scenes, weights=str(tmp_path / "other.pth"))["k"] != random


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"data": Path("nowhere.json")}, "--data must exist"),
        ({"bank": Path("nowhere.json")}, "--bank must exist"),
        ({"layer": "c6"}, "--layer must be one of stem"),
        ({"k": (10_000,)}, "--k must be at most"),
        ({"weights": "nowhere.pth"}, "nowhere.pth"),
    ],
)
def test_wrong_arguments_get_one_line(more, told, scenes):
    with pytest.raises(common.UsageError, match=told) as refused:
        measured("object-knn", scenes, **more)
    assert "\n" not in str(refused.value)


def test_data_without_objects_is_refused(scenes):
    with pytest.raises(common.UsageError, match="no objects of a known class"):
        measured("object-knn", scenes.parent / "images")


def test_the_table_of_a_report_sets_trained_beside_random(scenes):
    names = ("object-knn", "object-knn-c3", "disturbed-knn", "coupling-rate", "position-similarity")
    scores = {f"{side}-{name}": measured(name.removesuffix("-c3"), scenes) for side in ("random",) for name in names}
    scores |= {name.replace("random", "trained"): score for name, score in list(scores.items())}
    scores["trained-object-knn"] = {**scores["random-object-knn"], "k": {"5": {"top1": 0.625, "top5": 0.75}}}
    text = report.table(scores)
    first = next(line for line in text.splitlines() if line.startswith("object k-NN, Top-1"))
    assert first.split()[-2:] == ["62.5", "%"]
    assert f"{scores['random-object-knn']['queries']} objects" in text

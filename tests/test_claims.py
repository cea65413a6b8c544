import importlib
import json
import sys
import time

import pytest
import tyro

from benchmarks import claims, experiments
from benchmarks.experiments import Claim, Lab, side
from trainers import common, evaluation

SCORES = {"miou": 0.1, "jaccard": 0.2, "accuracy": 0.3, "k": {"20": {"top1": 0.4}}}


@pytest.mark.parametrize(
    ("differences", "expected"),
    [([1.0, 1.1, 0.9], 1), ([-1.0, -1.1, -0.9], -1), ([1.0, 1.0, -0.1], 0), ([9.0, 0.1, 0.1], 0), ([3.0], 0),
     ([0.0, 0.0, 0.0], 0)],
)  # fmt: skip
def test_a_difference_counts_where_all_seeds_agree_and_it_is_clear_of_its_error(differences, expected):
    assert side(differences) == expected


def test_a_claim_holds_where_every_step_of_its_order_does():
    best, middle, worst = [3.0, 3.1], [2.0, 2.2], [1.0, 1.1]
    assert Claim("", "", "", {"a": best, "b": middle, "c": worst}).holds() == "yes"
    assert Claim("", "", "", {"a": worst, "b": middle}, higher=False).holds() == "yes"
    assert Claim("", "", "", {"a": best, "b": worst, "c": middle}).holds() == "no"
    assert Claim("", "", "", {"a": best, "b": middle, "c": [1.0, 3.0]}).holds() == "unclear"
    assert Claim("It is so.", "yes: 2", "cm", {"a": best, "b": middle}).row() == (
        "It is so.", "yes: 2", "cm: a 3.05 ± 0.071; b 2.1 ± 0.14", "+0.95 ± 0.071", "yes",
    )  # fmt: skip


def test_what_was_trained_and_measured_is_not_done_again(tmp_path, monkeypatch):
    ran = []

    def run(lab, script, arguments, log):
        ran.append((script, list(map(str, arguments))))
        out = arguments[arguments.index("--out" if "--out" in arguments else "--output") + 1]
        (out if not out.suffix else out.parent).mkdir(parents=True, exist_ok=True)
        if script.startswith("data_prep"):
            (out / "instances.json").write_text("{}")
        elif "evaluate" in script:
            out.write_text(json.dumps({"score": out.name}))

    monkeypatch.setattr(Lab, "_run", run)
    lab = Lab(tmp_path, scale=experiments.SCALES["tiny"], jobs=2)
    for _ in range(2):
        scores = lab.each_seed(lambda seed: lab.measure("object-knn", lab.train("byol", seed, "--lr", "1"))["score"])
    assert len({*scores}) == 3
    scripts = [script for script, _ in ran]
    assert scripts.count("trainers/byol.py") == scripts.count("trainers/evaluate.py") == 3
    assert scripts.count("data_prep/make_scenes.py") == 2  # to train on, and to measure on
    flags = next(words for script, words in ran if script == "trainers/byol.py")
    assert flags[flags.index("--epochs") + 1] == "1"
    assert "--cpu" in flags
    assert lab.train("byol", 0, "--lr", "2") != lab.train("byol", 0, "--lr", "1")


def test_an_error_ends_the_runs_that_have_not_begun(tmp_path):
    began = []

    def run(seed):
        began.append(seed)
        time.sleep(0.01)
        raise SystemExit("it broke")

    with pytest.raises(SystemExit, match="it broke"):
        Lab(tmp_path, seeds=tuple(range(200))).each_variant({"a": run, "b": run})
    assert len(began) < 400


@pytest.mark.parametrize("size", ["cpu", "gpu"])
@pytest.mark.parametrize("paper", claims.NAMES)
def test_every_command_of_a_papers_claims_is_one(paper, size, tmp_path, monkeypatch):
    """Runs are read as their trainer reads them, measures as evaluate.py does; the scores are made up."""
    trained, measured = [], []

    def run(lab, script, arguments, log):
        words = list(map(str, arguments))
        if script.startswith("data_prep"):
            arguments[1].mkdir(parents=True)
            (arguments[1] / "instances.json").write_text("{}")
        elif script == "trainers/evaluate.py":
            config = tyro.cli(evaluation.Config, args=words)
            config.out.parent.mkdir(parents=True, exist_ok=True)
            config.out.write_text(json.dumps(SCORES))
            measured.append(config)
        else:
            name = script.removeprefix("trainers/").removesuffix(".py")
            name += "_segmentation" if common.flag("task", words) == "segmentation" else ""
            trainer = importlib.import_module(f"trainers.{name}")
            config = common.parse(trainer.Config, trainer.PRESETS, words)
            config.output.mkdir(parents=True)
            trained.append(config)

    monkeypatch.setattr(Lab, "_run", run)
    folders = ["--work", str(tmp_path / "work"), "--out", str(tmp_path)]
    one_thread = ["--jobs", "1"]  # tyro, which reads the commands here, is not for several
    command = ["claims.py", "--papers", paper, "--size", size, "--seeds", "2", *folders, *one_thread]
    monkeypatch.setattr(sys, "argv", command)
    claims.main()
    name = f"claims_{paper}" + ("_gpu" if size == "gpu" else "")
    found = json.loads((tmp_path / f"{name}.json").read_text())["claims"]
    assert len(found) >= (1 if paper == "pace" else 3)
    assert all(len(values) == 2 for claim in found for values in claim["values"].values())
    assert {claim["holds"] for claim in found} == {"unclear"}
    assert len({config.output for config in trained}) == len(trained) >= (4 if paper == "pace" else 6)
    assert {config.seed for config in trained} == {0, 1}
    # Whatever was trained is measured, with the architecture it has.
    arches = {str(config.output): config.arch for config in trained}
    assert {config.weights for config in measured if config.weights != "random"} == arches.keys()
    assert all(config.arch == arches.get(config.weights, config.arch) for config in measured)

import json

import pytest

from benchmarks import experiments
from benchmarks.experiments import Claim, Lab, side


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

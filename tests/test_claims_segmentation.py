import json

import torch
import tyro

from benchmarks import claims_segmentation, experiments
from benchmarks.experiments import Lab
from trainers import common, evaluation
from trainers import densesiam_segmentation as segmentation


def test_every_command_of_the_claims_is_one(tmp_path, monkeypatch):
    """Runs are read as a trainer reads them, measures as evaluate.py does; the scores are made up."""
    trained, measured = [], []

    def run(lab, script, arguments, log):
        words = list(map(str, arguments))
        if script.startswith("data_prep"):
            (arguments[1]).mkdir(parents=True)
            (arguments[1] / "instances.json").write_text("{}")
        elif "evaluate" in script:
            measured.append(tyro.cli(evaluation.Config, args=words))
            score = 0.3 if measured[-1].weights == "random" else 0.2 if "random" not in words else 0.1
            measured[-1].out.parent.mkdir(parents=True, exist_ok=True)
            measured[-1].out.write_text(json.dumps({"miou": score}))
        else:
            assert script == "trainers/densesiam.py"
            trained.append(common.parse(segmentation.Config, segmentation.PRESETS, words))
            trained[-1].output.mkdir(parents=True)

    monkeypatch.setattr(Lab, "_run", run)
    claims = claims_segmentation.claims(Lab(tmp_path, scale=experiments.SCALES["tiny"]))
    assert [(c.aux, c.seg_weight, c.region_weight) for c in trained[::3]] == [(64, 1, 0.1), (64, 1, 0), (0, 0, 0)]
    assert {c.classes for c in trained} == {17}
    assert len(measured) == 9 + 3 * 4
    assert all(c.background and c.things == 16 for c in measured)
    assert claims[0].values.keys() == {"DenseSiam", "k-means"}
    assert [len(each) for claim in claims for each in claim.values.values()] == [3] * 6


def test_k_means_has_the_backbone_that_training_starts_from():
    config = common.parse(segmentation.Config, segmentation.PRESETS, ["--arch", "resnet10-tiny", "--seed", "3"])
    torch.manual_seed(3)
    ours = segmentation.Model(config).net.trunk.state_dict()
    torch.manual_seed(3)
    theirs = common.make_trunk("resnet10-tiny").state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

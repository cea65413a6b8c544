import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests import test_trainers, training
from tests.test_no_synchronisation import Copies
from trainers import byol, common, scrl
from trainers.monitors import Monitor

from .test_trainers import _fresh_accelerate, _one_thread, scenes  # noqa: F401  fixtures


def blobs(n, classes=4, width=12, seed=0, apart=1.5):
    """Features around a centre for each class, all far from zero."""
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=g)
    return 5 + apart * centres[labels] + torch.randn(n, width, generator=g), labels


def test_both_learn_what_can_be_told_and_nothing_where_there_is_nothing():
    for apart, low, high in ((1.5, 0.9, 1.0), (0.0, 0.1, 0.45)):
        monitor = Monitor(12, 4, bank=128, k=20)
        for step in range(30):
            features, labels = blobs(64, seed=step, apart=apart)
            found = monitor.update(features, labels, torch.arange(64) + 64 * step)
        assert all(low <= accuracy.item() <= high for accuracy in found.values()), (apart, found)


def test_votes_against_the_loop():
    monitor = Monitor(12, 4, bank=50, k=7, temperature=0.1)
    seen = []
    for step in range(6):
        features, labels = blobs(13, seed=step, apart=0.5)
        ids = torch.randint(40, (13,), generator=torch.Generator().manual_seed(step))
        labels[3] = -1
        hits = 0
        for x, label, own in zip(features, labels.tolist(), ids.tolist(), strict=True):
            voters = [(torch.cosine_similarity(x, v, dim=0).item(), n) for v, n, i in seen if i != own and n >= 0]
            votes = [0.0] * 4
            for cosine, name in sorted(voters, reverse=True)[:7]:
                votes[name] += math.exp(cosine / 0.1)
            hits += label >= 0 and max(votes) > 0 and votes.index(max(votes)) == label
        found = monitor.update(features, labels, ids)
        assert found["knn"].item() == pytest.approx(hits / 12)
        seen = (seen + list(zip(features, labels.tolist(), ids.tolist(), strict=True)))[-50:]
    assert int(monitor.at) == 78 % 50


def test_the_linear_step_is_its_gradient():
    monitor, weight = Monitor(12, 4, bank=8), torch.zeros(4, 13, requires_grad=True)
    optimizer = torch.optim.SGD([weight], 2.0, momentum=0.9)
    for step in range(4):
        features, labels = blobs(9, seed=step)
        labels[5] = -1
        monitor.update(features, labels, torch.arange(9))
        x = torch.nn.functional.normalize(features - features.mean(0), dim=1)
        logits = torch.cat((x, torch.ones(9, 1)), 1) @ weight.T
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, labels, ignore_index=-1).backward()
        optimizer.step()
        assert torch.allclose(monitor.weight, weight, atol=1e-5)


def test_unknown_labels_and_an_empty_bank_give_zeros_and_a_batch_may_exceed_the_bank():
    monitor = Monitor(12, 4, bank=8, k=20)
    features, _ = blobs(20)
    for _ in range(2):
        found = monitor.update(features, torch.full((20,), -1), torch.arange(20))
        assert [x.item() for x in found.values()] == [0.0, 0.0]
    assert not monitor.weight.any()
    assert monitor.ids.tolist() == list(range(12, 20))
    assert not list(monitor.parameters())


def test_no_update_waits_for_the_host():
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        monitor = Monitor(12, 4, bank=8, k=20)
        features, labels = torch.randn(5, 12), torch.arange(5) % 3
        with Copies() as copies:
            monitor.update(features, labels, labels)
    assert copies.found == []


@pytest.fixture(scope="module")
def labelled(scenes, tmp_path_factory):  # noqa: F811
    """The scenes in two subfolders, and one that is broken."""
    folder = tmp_path_factory.mktemp("labelled")
    for i, file in enumerate(sorted((scenes.parent / "images").iterdir())):
        (folder / "ab"[i % 2]).mkdir(exist_ok=True)
        (folder / "ab"[i % 2] / file.name).write_bytes(b"no picture" if i == 5 else file.read_bytes())
    return folder


@pytest.mark.usefixtures("_fresh_accelerate")
@pytest.mark.parametrize("method", ["byol", "scrl", "lc_loss"])
def test_a_monitor_changes_no_bit_of_what_is_trained(method, labelled, tmp_path):
    for monitor in ("on", "off"):
        lines = test_trainers.here(
            method, labelled, tmp_path / monitor, "--max-steps", "3", "--accumulate", "2", "--monitor", monitor
        )
        assert [{"linear", "knn"} <= line.keys() for line in lines] == [monitor == "on"] * 3
    on, off = (training.newest(tmp_path / monitor) for monitor in ("on", "off"))
    watching = [name for name in on["model"] if name.startswith("monitor.")]
    assert bool(on["model"]["monitor.weight"].any())
    assert on["model"].keys() - set(watching) == off["model"].keys()
    assert test_trainers.same({name: on["model"][name] for name in off["model"]}, off["model"])
    assert test_trainers.same(on["optimizer"], off["optimizer"])


def test_two_processes_watch_as_one(labelled, tmp_path):
    for world in (1, 2):
        more = ("--max-steps", "3", "--lr", "0.1", "--monitor", "on")
        command = training.command("byol", labelled, tmp_path / str(world), *more)
        assert training.train("byol", command, tmp_path / "log", world=world) == [0] * world
    test_trainers.near(tmp_path / "1", tmp_path / "2")
    one, two = (training.logged(tmp_path / str(world)) for world in (1, 2))
    assert [(line["linear"], line["knn"]) for line in one] == [(line["linear"], line["knn"]) for line in two]


def test_the_form_for_other_trainers_is_the_one_described():
    for trainer in (byol, scrl):
        assert trainer.Config().monitor == "off"
        assert trainer.Model(trainer.PRESETS["demo"], 3).monitor.weight.shape[0] == 3
        assert trainer.Model(trainer.PRESETS["demo"]).monitor is None
    watched = common.watched(torch.ones(2, 3, requires_grad=True), torch.zeros(2, 3))
    assert watched.tolist() == [[0.5] * 3] * 2
    assert not watched.requires_grad

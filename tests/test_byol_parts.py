import math

import pytest
import torch
from torch import nn

import geoaug
from geoaug import Key
from tests import test_trainers, training
from trainers import byol, common

from .test_trainers import _one_thread, batches, scenes  # noqa: F401  fixtures


def rows(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def body(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4)).double()


def views():
    return [rows(5, 3, 2, 2), 3 + rows(5, 3, 2, 2, seed=1)]


def test_apart_is_a_pass_each_and_joint_is_one_pass_of_all_rows():
    x = views()
    apart = common.of_views(body(), "apart", x)
    for found, each in zip(apart, x, strict=True):
        assert torch.allclose(found, body()(each))
    joint = common.of_views(body(), "joint", x)
    assert torch.allclose(torch.cat(joint), body()(torch.cat(x)))
    assert not torch.allclose(joint[0], apart[0], atol=1e-2)  # the views are not distributed alike
    boxes = [rows(5, 7, 4), rows(5, 7, 4, seed=1)]
    both = common.of_views(lambda image, box: (image.sum((1, 2, 3)), box + 1), "joint", x, boxes)
    assert len(both) == 2
    for (sums, moved), image, box in zip(both, x, boxes, strict=True):
        assert torch.allclose(sums, image.sum((1, 2, 3)))
        assert torch.equal(moved, box + 1)


def shuffled_views(rank, forward):
    mine = slice(4 * rank, 4 * rank + 4)
    x = [rows(8, 3, 2, 2)[mine], rows(8, 3, 2, 2, seed=1)[mine]]
    key = Key(0, 0, range(8)).fold("z")[mine]
    seen = []

    def network(image):
        seen.append(image.sum((1, 2, 3)))
        return image.sum((1, 2, 3)), image

    out = common.of_views(network, forward, x, shuffle=key)
    assert all(torch.equal(image, view) for (_, image), view in zip(out, x, strict=True))
    return {"out": [sums for sums, _ in out], "seen": seen}


@pytest.mark.parametrize("forward", ["apart", "joint"])
def test_shuffled_views_come_back_in_their_order(forward, tmp_path):
    ranks = training.on_ranks(shuffled_views, tmp_path, forward)
    for v in (0, 1):
        whole = rows(8, 3, 2, 2, seed=v).sum((1, 2, 3))
        assert torch.allclose(torch.cat([rank["out"][v] for rank in ranks]), whole)
    own = rows(8, 3, 2, 2).sum((1, 2, 3))[:4]
    assert len(ranks[0]["seen"]) == (2 if forward == "apart" else 1)
    assert not torch.isclose(own[:, None], ranks[0]["seen"][0]).any(1).all()  # some row went to the other process


def test_a_target_has_weights_of_its_own_or_a_copy():
    student = body()
    for target in ("random", "copy"):
        made = common.target_of(student, lambda: body(seed=1), target)
        same = [torch.equal(a, b) for a, b in zip(student.parameters(), made.parameters(), strict=True)]
        assert all(same) == (target == "copy")
        assert not any(p.requires_grad for p in made.parameters())
        assert all(p.requires_grad for p in student.parameters())


def test_both_ways_against_the_loop():
    p1, p2, z1, z2 = (rows(3, 2, 5, seed=s).requires_grad_() for s in range(4))

    def distance(p, z):
        a, b = p.tolist(), z.tolist()
        lengths = [math.sqrt(sum(v * v for v in x)) for x in (a, b)]
        return sum((u / lengths[0] - v / lengths[1]) ** 2 for u, v in zip(a, b, strict=True))

    found = common.both_ways(p1, p2, z1, z2)
    for i in range(3):
        for k in range(2):
            slow = distance(p1[i, k], z2[i, k]) + distance(p2[i, k], z1[i, k])
            assert found[i, k].item() == pytest.approx(slow, rel=1e-9)
    found.sum().backward()
    assert p1.grad.any()
    assert p2.grad.any()
    assert z1.grad is z2.grad is None


@pytest.mark.parametrize("forward", ["apart", "joint"])
def test_byols_loss_image_by_image(forward, batches):  # noqa: F811
    """With every network's statistics fixed; the fourth image could not be read."""
    batch = batches["byol"].split(2)[0]
    batch.ok = torch.tensor([True, True, True, False])
    model, _ = test_trainers.model_and_inputs("byol", batch, ("--forward", forward))
    model.eval()
    colors = byol.recipe(model.config).colors
    views = [geoaug.color(batch.images[v], colors[v], batch.key.fold(f"v{v + 1}")) for v in (0, 1)]
    total = 0.0
    with torch.no_grad():
        for i in range(3):
            p, z = ([] for _ in "pz")
            for view in views:
                features = [network.trunk(view[i : i + 1]).mean((2, 3)) for network in (model.student, model.teacher)]
                p.append(model.predictor(model.student.projector(features[0])))
                z.append(model.teacher.projector(features[1]))
            for a, b in ((0, 1), (1, 0)):
                total += 2 - 2 * torch.cosine_similarity(p[a].double(), z[b].double()).item()
        assert model(batch, torch.tensor(3.0))[0].item() == pytest.approx(total / 3, rel=1e-4)


def test_the_heads_are_byols():
    head = common.byol_head(7, 11, 3)
    assert [type(layer).__name__ for layer in head] == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert [layer.bias is not None for layer in (head[0], head[3])] == [True, False]

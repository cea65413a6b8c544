import math
import os
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import geoaug
from data_prep import make_scenes
from geoaug import AxisAffine, Key, losses
from tests import reference_densesiam as reference
from tests import training
from tests.test_no_synchronisation import Copies
from trainers import common, densesiam, simsiam

TRAINERS = {"simsiam": simsiam, "densesiam": densesiam}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    assert make_scenes.main(["--out", str(folder), "--images", "8", "--size", "96", "--workers", "1"]) == 0
    return folder / "instances.json"


@pytest.fixture(scope="module")
def loaded(scenes):
    """One batch of eight crops of 64 pixels, all of which overlap by a cell."""
    specs = (geoaug.ViewSpec(64, scale=(0.5, 1.0)), geoaug.ViewSpec(64, scale=(0.5, 1.0)))
    with geoaug.open_loader(scenes, specs, batch_size=8, seed=0, workers=0) as loader:
        return next(iter(loader))


@pytest.fixture
def batch(loaded):
    return loaded.split(1)[0]


class Plan:
    """Maps and sizes of views, without pixels."""

    def __init__(self, a, b, sizes=((64, 64), (64, 64))):
        self.view_from_source = AxisAffine(torch.stack((a.scale, b.scale), 1), torch.stack((a.shift, b.shift), 1))
        self.view_sizes = sizes


def a_batch(a, b, sizes=((64, 64), (64, 64)), ok=None):
    """A batch of nothing but geometry."""
    count = len(a.scale)
    made = geoaug.Batch.__new__(geoaug.Batch)
    made.plan, made.key = Plan(a, b, sizes), Key(3, 1, torch.arange(count))
    made.ok = torch.ones(count, dtype=torch.bool) if ok is None else ok
    return made


def crops(count, seed=0):
    """Crops of half the source at least, every other mirrored."""
    low = torch.rand(count, 2, generator=torch.Generator().manual_seed(seed)) * 0.4
    return AxisAffine.flip_x(torch.arange(count) % 2 == 0) @ AxisAffine.sending(torch.cat((low, low + 0.6), 1))


# -- points -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", ["regular", "corners", "random", "mild", "heavy"])
def test_points_of_both_views_are_the_same_source_points_inside_both(law):
    a, b = crops(6), crops(6, seed=1)
    points = common.share_points(a_batch(a, b), 4, law, cells=2)
    assert points.valid.all()
    assert points.in_x1.shape == points.in_x2.shape == (6, {"mild": 48 + 4, "heavy": 160}.get(law, 16), 2)
    assert (points.candidates, points.hard) == {"mild": (48, 12), "heavy": (160, 16)}.get(law, (0, 0))
    source = (~a)(points.in_x1)
    assert torch.allclose(source, (~b)(points.in_x2), atol=1e-5)
    for x in (points.in_x1, points.in_x2):
        assert (x > -1e-5).all()
        assert (x < 1 + 1e-5).all()
    shared = geoaug.overlap(a, b).in_source[:, None]
    shares = (source - shared[..., :2]) / (shared[..., 2:] - shared[..., :2])
    if law == "regular":
        in_x1, in_x2, _ = geoaug.overlap_grid(a, b, 4)
        assert torch.equal(points.in_x1, in_x1)
        assert torch.equal(points.in_x2, in_x2)
    elif law == "corners":
        assert shares[0, :4, 0].tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1], abs=1e-5)
        assert shares[0, ::4, 1].tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1], abs=1e-5)
    else:
        assert shares.mean().item() == pytest.approx(0.5, abs=0.1)
        assert len(shares.flatten(0, 1).unique(dim=0)) == shares.shape[0] * shares.shape[1]
        again = common.share_points(a_batch(a, b), 4, law, cells=2)
        assert torch.equal(again.in_x1, points.in_x1)


def test_an_overlap_under_a_cell_of_the_coarser_view_is_not_valid():
    """Two cells of 32 pixels: the second view's crop is half the first's, so the first is the coarser one."""
    whole = AxisAffine.identity(6)
    low = torch.tensor([0.0, 0.4, 0.49, 0.5, 0.52, 1.2])
    boxes = torch.stack((low, torch.zeros(6), low + 0.55, torch.ones(6)), 1)
    b = AxisAffine.sending(boxes)  # overlaps of 0.55, 0.55, 0.51, 0.5, 0.48 and none of the whole's 64 pixels
    points = common.share_points(a_batch(whole, b), 3, "regular", cells=2)
    assert points.valid.tolist() == [True, True, True, True, False, False]
    assert torch.equal(points.in_x1[4:], geoaug.grids.cell_centers(3, 3).expand(2, 9, 2))
    assert torch.equal(points.in_x2[4:], points.in_x1[4:])
    unread = torch.tensor([False, True, True, True, True, True])
    assert common.share_points(a_batch(whole, b, ok=unread), 3, "regular", cells=2).valid.tolist()[:2] == [False, True]


def test_the_hardest_candidates_are_kept_and_the_others_as_they_are():
    points = common.share_points(a_batch(crops(2), crops(2, seed=1)), 2, "mild", cells=2)  # 12 candidates for 3, and 1
    distances = torch.stack((torch.arange(12.0), -torch.arange(12.0)))
    kept = points.hardest(distances)
    assert torch.equal(kept.in_x1[0], points.in_x1[0, [11, 10, 9, 12]])
    assert torch.equal(kept.in_x2[1], points.in_x2[1, [0, 1, 2, 12]])
    assert kept.candidates == 0
    first, second = points.split(2)
    assert torch.equal(second.in_x1, points.in_x1[1:])
    assert (first.candidates, first.hard) == (12, 3)


# -- heads and what they log ------------------------------------------------------------------------------------------


def test_a_head_at_points_is_the_head_on_a_map():
    head = common.conv_head(3, 5, 7, last_bias=False, last_norm=True)
    assert [type(layer).__name__ for layer in head] == ["Conv2d", "BatchNorm2d", "ReLU", "Conv2d", "BatchNorm2d"]
    assert [p.shape for p in head.parameters()] == [(5, 3, 1, 1), (5,), (5,), (7, 5, 1, 1)]
    maps = torch.randn(2, 3, 4, 6)
    flat = maps.flatten(2).mT  # [2, 24, 3]
    assert torch.allclose(common.at_points(head, flat), head(maps).flatten(2).mT, atol=1e-6)
    assert common.conv_head(3, 5, 7)[-1].bias is not None


def test_categories_in_use_are_counted_where_valid():
    values = torch.eye(5)[torch.tensor([[0, 1, 1], [4, 4, 2]])]  # [2, 3, 5]
    assert common.categories_in_use(values, torch.ones(2, 3, dtype=torch.bool)).item() == 4
    assert common.categories_in_use(values, torch.tensor([[True, True, True], [False] * 3])).item() == 2
    assert common.categories_in_use(values, torch.zeros(2, 3, dtype=torch.bool)).item() == 0
    assert common.categories_in_use(values[:0], torch.zeros(0, 3, dtype=torch.bool)).item() == 0


def test_the_predictors_keep_their_rate():
    model = nn.ModuleDict({"trunk": nn.Linear(2, 2), "predictor": nn.Linear(2, 2)})
    for law, expected in (("constant", [0.05, 0.1]), ("cosine", [0.05, 0.05])):
        optimizer = torch.optim.SGD(common.siamese_groups(model, model["predictor"], predictor_lr=law), 1.0)
        assert sum(len(group["params"]) for group in optimizer.param_groups) == 4
        common.set_lr(optimizer, 5, 10, peak=0.1)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(expected)


def test_there_is_no_teacher_to_shuffle_before():
    two = type("Two", (), {"num_processes": 2})()
    with pytest.raises(common.UsageError, match="--norm must be sync or batch, got shuffle"):
        common.check_norm(simsiam.Config(norm="shuffle"), two)
    with pytest.raises(common.UsageError, match="--batch-size must give batch norm 2 images at least, got 2: 1"):
        common.check_norm(simsiam.Config(norm="batch", batch_size=2), two)
    common.check_norm(simsiam.Config(norm="sync", batch_size=2), two)


# -- the models -------------------------------------------------------------------------------------------------------


def config_of(method, *more):
    trainer = TRAINERS[method]
    command = training.command(method, Path("x"), Path("x"), "--size", "64", *more)
    return common.parse(trainer.Config, trainer.PRESETS, command)


def model_and_inputs(method, batch, *more, weight=0.1):
    config = config_of(method, *more)
    torch.manual_seed(0)
    model = TRAINERS[method].Model(config)
    for module in model.trunk.modules():
        if isinstance(module, nn.BatchNorm2d):  # residual blocks begin at zero, and pass no gradient then
            nn.init.uniform_(module.weight, 0.5, 1.5)
    if method == "simsiam":
        return model, (batch, batch.ok.sum().float())
    points = common.share_points(batch, config.grid, config.points, cells=2)
    return model, (batch, points, torch.stack((batch.ok.sum(), points.valid.sum())).float(), weight)


def slow_loss(model, batch, points, weight):
    """Eq. 7 by loops over images and points, from the maps of the trunk in evaluation."""
    config = model.config
    recipe = geoaug.recipes.recipe("densesiam").at(config.size)
    views = zip(batch.images, recipe.colors, ("x1", "x2"), strict=True)
    maps = [model.trunk(geoaug.color(image, spec, batch.key.fold(name))) for image, spec, name in views]
    z = [model.projector(x.mean((2, 3))) for x in maps]
    p = [model.predictor(x) for x in z]
    heads = [model.dense_projector(x) for x in maps]
    zs, ps, fs = [], [], []
    for v, at in enumerate((points.in_x1, points.in_x2)):
        zs.append(geoaug.sample_points(heads[v], at).tolist())
        ps.append(geoaug.sample_points(model.dense_predictor(heads[v]), at).tolist())
        fs.append(geoaug.sample_points(maps[v], at).tolist())
    whole, dense, region = [], [], []
    for b in range(len(batch.ok)):
        whole += [reference.cosine_similarity(p[i][b].tolist(), z[1 - i][b].tolist()) for i in (0, 1)]
        if not points.valid[b]:
            continue
        for i in (0, 1):
            dense += [reference.cross_entropy(target, q) for target, q in zip(zs[1 - i][b], ps[i][b], strict=True)]
        vs = []
        for i in (0, 1):
            regions = torch.tensor(reference.region_embeddings(zs[i][b], fs[i][b], True, False), dtype=torch.float64)
            vs.append(model.region_projector(regions))
        us = [model.region_predictor(x) for x in vs]
        for i in (0, 1):
            region += reference.region_contrast(us[i].tolist(), vs[1 - i].tolist(), 0.1, True)
    terms = [sum(each) / len(each) for each in (whole, dense, region)]
    return terms[0] + terms[1] + weight * terms[2], terms


@torch.no_grad()
def test_the_loss_is_eq_7(batch, monkeypatch):
    """In evaluation, so that a row does not depend on its neighbours; one image without an overlap."""
    color = geoaug.color
    monkeypatch.setattr(geoaug, "color", lambda images, spec, key: color(images, spec, key).double())
    model, (_, points, counts, weight) = model_and_inputs("densesiam", batch)
    model = model.double().eval()
    for module in model.modules():  # statistics that are not the ones of the start
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    assert points.valid.all()
    points.valid[2] = False
    counts[1] = 7
    loss, log = model(batch, points, counts, weight)
    expected, terms = slow_loss(model, batch, points, weight)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert [log[name].item() for name in ("global", "dense", "region")] == pytest.approx(terms, rel=1e-5)
    assert log["overlap"].item() == 7 / 8


ORDERS = ["after", "between", "before"]
LAWS = ["regular", "heavy"]


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("order", ORDERS)
def test_gradient_reaches_every_weight(order, law, batch):
    model, inputs = model_and_inputs("densesiam", batch, "--order", order, "--points", law)
    loss, log = model(*inputs)
    loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert math.isfinite(loss.item())
    assert 2 < log["categories"].item() <= 8


def test_orders_are_three_networks(batch):
    values = [
        model_and_inputs("densesiam", batch, "--order", order)[0](*model_and_inputs("densesiam", batch)[1])[1]["dense"]
        for order in ORDERS
    ]
    assert len({round(x.item(), 5) for x in values}) == 3


def test_the_hardest_points_are_the_most_dissimilar(batch):
    model, (_, points, *_) = model_and_inputs("densesiam", batch, "--points", "heavy", "--grid", "4")
    maps = [model.dense_maps(model.trunk(torch.randn(8, 3, 64, 64))) for _ in "ab"]
    chosen = model.chosen(maps, points)
    assert chosen.in_x1.shape == (8, 16, 2)
    (z1, p1), (z2, p2) = model.read(maps, points)
    every = common.symmetrised(p1, p2, z1, z2, "cross_entropy")
    (z1, p1), (z2, p2) = model.read(maps, chosen)
    kept = common.symmetrised(p1, p2, z1, z2, "cross_entropy")
    assert torch.allclose(kept.sort(1).values, every.sort(1).values[:, -16:], atol=1e-5)


@pytest.mark.parametrize("method", TRAINERS)
def test_projections_are_targets_without_a_gradient(method, batch, monkeypatch):
    """With predictors that say nothing of their input, no gradient may reach the trunk by way of a target."""
    model, inputs = model_and_inputs(method, batch, weight=0)
    for name in ("predictor", "dense_predictor"):
        if hasattr(model, name):
            nn.init.zeros_(getattr(model, name)[-1].weight)
    model(*inputs)[0].backward()
    assert not model.trunk.conv1.weight.grad.any()
    nn.init.normal_(model.predictor[-1].weight)
    model(*inputs)[0].backward()
    assert model.trunk.conv1.weight.grad.any()


@pytest.mark.parametrize(("stop", "learns"), [("none", True), ("masks", False), ("target", True)])
def test_where_the_gradient_of_regions_ends(stop, learns, batch):
    model, inputs = model_and_inputs("densesiam", batch, "--region-stop", stop, "--dense-weight", "0", weight=1.0)
    model(*inputs)[0].backward()
    assert bool(model.dense_projector[0].weight.grad.any()) == learns
    assert model.region_projector[0].weight.grad.any()


def test_regions_wait_for_their_start_without_wearing_away(batch):
    model, inputs = model_and_inputs("densesiam", batch, weight=0.0)
    loss, log = model(*inputs)
    loss.backward()
    assert log["region"].item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.of_regions())  # in the graph, for DDP
    other, inputs = model_and_inputs("densesiam", batch, weight=0.1)
    assert other(*inputs)[0].item() != pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("order", ORDERS)
def test_images_without_an_overlap_keep_the_global_term(order, law, batch):
    model, inputs = model_and_inputs("densesiam", batch, "--order", order, "--points", law)
    inputs[1].valid[:] = False
    inputs[2][1] = 0
    loss, log = model(*inputs)
    loss.backward()
    assert (log["dense"].item(), log["region"].item()) == (0, 0)
    assert log["categories"].item() > 2  # of the readable images, whether they overlap or not: no false alarm
    assert loss.item() == pytest.approx(log["global"].item())
    assert model.trunk.conv1.weight.grad.any()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("method", TRAINERS)
def test_a_batch_that_could_not_be_read_gives_zero_inside_the_graph(method, batch):
    batch.ok = torch.zeros_like(batch.ok)
    model, inputs = model_and_inputs(method, batch)
    loss, log = model(*inputs)
    loss.backward()
    assert loss.item() == 0
    assert [n for n, p in model.named_parameters() if p.grad is None or p.grad.any()] == []
    assert all(bool(torch.isfinite(x).all()) for x in log.values())


@pytest.mark.parametrize("method", TRAINERS)
def test_rows_that_could_not_be_read_change_nothing(method, batch):
    """With fixed statistics the others' loss is the same, whatever stands in those rows."""
    found = []
    batch.ok = torch.tensor([True] * 6 + [False, True])
    for junk in (0, 255):
        batch.images = [image.clone() for image in batch.images]
        for image in batch.images:
            image[6] = junk
        model, inputs = model_and_inputs(method, batch)
        found.append(model.eval()(*inputs)[0].item())
    assert found[0] == found[1] != 0


def test_the_two_views_have_colours_of_their_own(batch, monkeypatch):
    draws, color = [], geoaug.color

    def watched(images, spec, key):
        draws.append(float(key.uniform("color", 1)[0]))
        return color(images, spec, key)

    monkeypatch.setattr(geoaug, "color", watched)
    for method in TRAINERS:
        model, inputs = model_and_inputs(method, batch)
        model(*inputs)
    assert len(draws) == 4
    assert len(set(draws)) == 2


def test_symmetrised_is_half_of_both_directions():
    p1, p2, z1, z2 = torch.randn(4, 3, 5).unbind(0)
    found = common.symmetrised(p1, p2, z1, z2)
    one, other = (losses.dense_similarity(p, z, kind="cosine") for p, z in ((p1, z2), (p2, z1)))
    assert torch.allclose(found, (one + other) / 2)
    assert torch.allclose(common.symmetrised(p1, p1, p1, p1), -torch.ones(3))


def test_the_task_is_read_before_all_else():
    assert common.flag("task", ["--data", "x", "--task", "segmentation", "--wide=1"]) == "segmentation"
    assert common.flag("wide", ["--data", "x", "--wide=1", "--wide=2"]) == "2"
    assert common.flag("task", ["--data", "x"]) == ""
    assert common.flag("task", ["--task"]) == ""


@pytest.mark.parametrize("law", ["regular", "corners", "mild"])
def test_points_are_shared_without_waiting_for_the_device(law, monkeypatch, our_errors):
    monkeypatch.setenv("GEOAUG_CHECK", "0")
    with FakeTensorMode(allow_non_fake_inputs=True):
        maps = [AxisAffine(torch.rand(4, 2, device="cuda"), torch.rand(4, 2, device="cuda")) for _ in "ab"]
        made = a_batch(*maps, ok=torch.ones(4, device="cuda").bool())
        made.key = Key(0, 0, torch.zeros(4, dtype=torch.int64, device="cuda"))
        with Copies() as copies:
            points = common.share_points(made, 3, law, cells=2)
            if points.candidates:
                points = points.hardest(points.in_x1[:, : points.candidates, 0])
            common.categories_in_use(points.in_x1, points.valid[:, None].expand(-1, 9))
    assert copies.found == []


# -- whole runs -------------------------------------------------------------------------------------------------------


@pytest.fixture
def _fresh_accelerate(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.usefixtures("_fresh_accelerate")
def test_a_collapse_is_told_once(scenes, tmp_path, monkeypatch, capsys):
    """All images alike: every vector is the same, and every point of one category."""
    monkeypatch.setattr(geoaug, "color", lambda images, spec, key: torch.zeros(images.shape))
    command = training.command("densesiam", scenes, tmp_path / "run", "--size", "64", "--max-steps", "3")
    densesiam.main(common.parse(densesiam.Config, densesiam.PRESETS, command))
    told = capsys.readouterr().err.splitlines()
    assert [line.split()[3] for line in told] == ["spread", "spread_predictor", "categories"]
    assert told[2] == "warning: step 1: categories is 1, under 2: is it collapsing?"
    assert all(line["spread"] < 0.1 and line["categories"] == 1 for line in training.logged(tmp_path / "run"))


@pytest.mark.usefixtures("_fresh_accelerate", "our_errors")
@pytest.mark.parametrize(
    ("method", "wrong", "message"),
    [
        ("simsiam", "--batch-size 8 --accumulate 8", "--batch-size must give batch norm 2 images at least, got 8: 1"),
        ("densesiam", "--masks raw --region-mass on", "--region-mass must be off with --masks raw"),
        ("densesiam", "--target p --similarity cosine", "--target must be z with --similarity cosine, got p"),
        ("densesiam", "--channels 1", "--channels must be at least 2, got 1"),
        ("densesiam", "--grid 0", "--grid must be at least 1, got 0"),
        ("densesiam", "--region-weight nan", "--region-weight must be at least 0.0, got nan"),
    ],
)
def test_a_mistake_is_told_in_one_line_before_any_training(
    method, wrong, message, scenes, tmp_path, monkeypatch, capsys
):
    arguments = training.command(method, scenes, tmp_path / "run", *wrong.split())
    monkeypatch.setattr(sys, "argv", [f"trainers/{method}.py", *arguments])
    trainer = TRAINERS[method]
    with pytest.raises(SystemExit) as stop:
        common.launch(trainer.main, trainer.Config, trainer.PRESETS)
    assert stop.value.code == 2
    out = capsys.readouterr()
    assert out.out == ""
    assert message in out.err
    assert len(out.err.splitlines()) == 1
    assert not (tmp_path / "run").exists()

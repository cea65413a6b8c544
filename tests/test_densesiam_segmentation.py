import json
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
from geoaug import losses
from tests import reference_densesiam as reference
from tests import reference_segmentation as slow
from tests import training
from tests.test_no_synchronisation import Copies
from trainers import common
from trainers import densesiam_segmentation as segmentation

METHOD = "densesiam_segmentation"


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def _fresh_accelerate(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)  # no test pulls the plug
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    assert make_scenes.main(["--out", str(folder), "--images", "24", "--size", "96", "--workers", "1"]) == 0
    return folder / "images"


@pytest.fixture(scope="module")
def broken(scenes, tmp_path_factory):
    """The same with two that cannot be read, so that no part of a batch has as many as another."""
    folder = tmp_path_factory.mktemp("broken")
    for i, file in enumerate(sorted(scenes.iterdir())):
        (folder / file.name).write_bytes(b"no picture" if i in (3, 17) else file.read_bytes())
    return folder


def config_of(data, output, *more):
    return common.parse(
        segmentation.Config, segmentation.PRESETS, training.command(METHOD, Path(data), Path(output), *more)
    )


def here(data, output, *more):
    """Train in this process."""
    segmentation.main(config_of(data, output, *more))
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return training.logged(output)


@pytest.fixture(scope="module")
def loaded(scenes):
    specs = geoaug.recipes.recipe("densesiam_segmentation").at(64).views[:2]
    with geoaug.open_loader(scenes, specs, batch_size=8, seed=0, workers=0, replay=True) as loader:
        return next(iter(loader))


@pytest.fixture
def batch(loaded):
    return loaded.split(1)[0]


def model_and_inputs(batch, *more, weight=0.1):
    torch.manual_seed(0)
    model = segmentation.Model(config_of("x", "x", "--size", "64", *more))
    return model, (batch, batch.ok.sum().float(), weight)


# -- the losses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", ["code", "inverse", "none"])
def test_the_loss_of_own_labels_is_that_of_loops(law):
    z = torch.randn(3, 20, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    z[..., 4] -= 9  # of which nothing is
    ok = torch.tensor([True, False, True])
    found, shares = segmentation.own_labels_loss(z, ok, law)
    expected = slow.own_labels(z.tolist(), ok.tolist(), law)
    assert torch.allclose(found[ok], torch.tensor(expected, dtype=torch.float64)[ok], atol=1e-12)
    assert shares.sum().item() == pytest.approx(1)
    assert shares[4] == 0


def test_the_weight_of_frequent_categories_is_larger_smaller_or_alike():
    z = torch.zeros(1, 10, 3)
    z[0, :8, 0], z[0, 8:, 1] = 1, 1  # eight of one, two of another
    rows = {
        law: segmentation.own_labels_loss(z, torch.ones(1).bool(), law)[0][0] for law in ("code", "inverse", "none")
    }
    ratio = {law: (row[0] / row[9]).item() for law, row in rows.items()}
    assert ratio == pytest.approx({"code": 4, "inverse": 1 / 4, "none": 1})
    assert rows["inverse"].sum().item() == pytest.approx(rows["none"].sum().item())  # so that its size is kept


@pytest.mark.parametrize("law", ["code", "inverse", "none"])
def test_one_category_alone_or_no_image_at_all_is_no_nan(law):
    z = torch.zeros(2, 6, 4, requires_grad=True)  # all equal: the first is the largest
    for ok in (torch.ones(2).bool(), torch.zeros(2).bool()):
        found, shares = segmentation.own_labels_loss(z, ok, law)
        losses.mean(found.mean(1), ok).backward()
        assert found.isfinite().all()
        assert z.grad.isfinite().all()
        assert shares.tolist() == [float(ok.any()), 0, 0, 0]


@pytest.mark.parametrize("law", ["code", "inverse", "none"])
def test_the_loss_of_own_labels_waits_for_no_device(law, monkeypatch):
    monkeypatch.setenv("GEOAUG_CHECK", "0")
    with FakeTensorMode(allow_non_fake_inputs=True):
        z, ok = torch.rand(2, 6, 4, device="cuda"), torch.ones(2, device="cuda").bool()
        with Copies() as copies:
            segmentation.own_labels_loss(z, ok, law)
    assert copies.found == []


def test_the_heads_share_one_weight_by_the_logs_of_the_others_categories():
    own, aux = segmentation.pixel_weights(27, 128)
    assert own == pytest.approx(math.log(128) / (math.log(27) + math.log(128)))
    assert own + aux == pytest.approx(1)
    assert own > aux
    assert segmentation.pixel_weights(27, 0) == (1, 0)


def slow_loss(model, batch, weight):
    """Eq. 8 by loops over images and cells, from the maps of the pyramid in evaluation, the grid read first."""
    config, views = model.config, segmentation.recipe(model.config)
    images = [
        geoaug.color(batch.images[v], views.colors[0], batch.plan.key.fold(views.draws[k])) for v, k in ((1, 1), (0, 2))
    ]
    f1, whole = (model.net.features(x) for x in images)
    maps = batch.plan.view_from_source
    cells = geoaug.grids.cell_centers(f1.shape[-2], f1.shape[-1])
    at = maps[:, 0]((~maps[:, 1])(cells.expand(len(batch), -1, -1)))  # of the inner view's cells, in the centre
    f = [f1.flatten(2).mT, geoaug.sample_points(whole, at)]
    terms = {"dense": [], "aux": [], "own_labels": [], "region": []}
    for name, projector, predictor in (
        ("dense", model.net.projector, model.predictor), ("aux", model.aux_projector, model.aux_predictor)
    ):  # fmt: skip
        z = [common.at_points(projector, x) for x in f]
        p = [common.at_points(predictor, x) for x in z]
        for b in range(len(batch)):
            for i in (0, 1):
                pairs = zip(z[1 - i][b].tolist(), p[i][b].tolist(), strict=True)
                terms[name] += [reference.cross_entropy(target, q) for target, q in pairs]
        if name == "aux":
            continue
        for x in z:
            terms["own_labels"] += [y for row in slow.own_labels(x.tolist(), [True] * len(batch), "code") for y in row]
        for b in range(len(batch)):
            v = [model.region_projector(torch.tensor(
                reference.region_embeddings(z[i][b].tolist(), f[i][b].tolist(), True, False), dtype=torch.float64
            )) for i in (0, 1)]  # fmt: skip
            u = [model.region_predictor(x) for x in v]
            for i in (0, 1):
                terms["region"] += reference.region_contrast(u[i].tolist(), v[1 - i].tolist(), config.temperature, True)
    found = {name: sum(each) / len(each) for name, each in terms.items()}
    own, aux = segmentation.pixel_weights(config.classes, config.aux)
    return own * found["dense"] + aux * found["aux"] + found["own_labels"] + weight * found["region"], found


@torch.no_grad()
def test_the_loss_is_eq_8(batch, monkeypatch):
    """In evaluation, so that a row does not depend on its neighbours."""
    color = geoaug.color
    monkeypatch.setattr(geoaug, "color", lambda images, spec, key: color(images, spec, key).double())
    batch = batch.split(4)[0]
    model, inputs = model_and_inputs(batch)
    model = model.double().eval()
    for module in model.modules():  # statistics that are not the ones of the start
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.3, 0.6)
    loss, log = model(*inputs)
    expected, terms = slow_loss(model, batch, 0.1)
    assert {name: log[name].item() for name in terms} == pytest.approx(terms, rel=1e-5)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert len({round(x, 3) for x in terms.values()}) == 4


# -- the views --------------------------------------------------------------------------------------------------------


def test_both_views_show_one_place_at_one_cell(batch, monkeypatch):
    """A network that sees where a pixel of the source lies says the same of both views, mirrored or not."""
    assert 0 < batch.plan.flipped[:, 1].sum() < 8
    crops = batch.plan.crop
    for v in (0, 1):
        x0, y0, x1, y1 = crops[:, v].unbind(1)
        assert torch.equal(x1 - x0, y1 - y0)  # square
        if v == 1:
            share = (x1 - x0) / (crops[:, 0, 2] - crops[:, 0, 0])
            assert (share > 0.48).all()
            assert (crops[:, 1, :2] >= crops[:, 0, :2]).all()
            assert (crops[:, 1, 2:] <= crops[:, 0, 2:]).all()
    centres = geoaug.grids.cell_centers(16, 16).expand(8, -1, -1)
    places = [(~batch.plan.view_from_source[:, v])(centres).mT.unflatten(2, (16, 16)) for v in (1, 0)]
    model, inputs = model_and_inputs(batch)
    seen = iter(places)
    monkeypatch.setattr(model.net, "features", lambda images: next(seen).repeat(1, 16, 1, 1))
    read = []
    monkeypatch.setattr(model, "pixels", lambda *x: read.append(x) or (x[2].flatten(2).mT, x[4], torch.zeros(8, 256)))
    monkeypatch.setattr(segmentation, "own_labels_loss", lambda z, ok, law: (z[..., 0], z[0, 0]))
    model(*inputs)
    _, _, f1, _, f2, _ = read[0]
    inside = (read[0][5] > 1 / 32).all(-1) & (read[0][5] < 31 / 32).all(-1)  # beyond the outermost cells it is clamped
    assert inside.float().mean() > 0.8
    assert torch.allclose(f1.flatten(2).mT[inside], f2[inside], atol=1e-5)


def watched_colours(monkeypatch):
    """What color() makes, by image and draw, a list of each epoch's."""
    seen, color = {}, geoaug.color

    def watch(images, spec, key):
        out = color(images, spec, key)
        for row, identity in enumerate(key.ids.tolist()):
            seen.setdefault((identity, round(float(key.uniform("who", 1)[row]), 6)), []).append(out[row].clone())
        return out

    monkeypatch.setattr(geoaug, "color", watch)
    return seen


@pytest.mark.usefixtures("_fresh_accelerate")
@pytest.mark.parametrize("replay", ["on", "off"])
def test_crops_and_colours_are_drawn_once_and_replayed(replay, scenes, tmp_path, monkeypatch):
    """Over two epochs, whose order differs; each image has two views, of colours of their own."""
    order = []
    forward = segmentation.Model.forward

    def watch(model, batch, count, weight):
        order.extend(zip(batch.names, batch.plan.crop.tolist(), batch.plan.flipped.tolist(), strict=True))
        return forward(model, batch, count, weight)

    monkeypatch.setattr(segmentation.Model, "forward", watch)
    seen = watched_colours(monkeypatch)
    here(scenes, tmp_path / "run", "--epochs", "2", "--replay", replay)
    first, second = order[:24], order[24:]
    assert [name for name, *_ in first] != [name for name, *_ in second]
    assert sorted(name for name, *_ in first) == sorted(name for name, *_ in second)
    crops = [{name: (crop, flip) for name, crop, flip in half} for half in (first, second)]
    if replay == "on":
        assert crops[0] == crops[1]
        assert len(seen) == 48
        assert all(len(made) == 2 and torch.equal(*made) for made in seen.values())
        by_image = {}
        for (identity, _), made in seen.items():
            by_image.setdefault(identity, []).append(made[0])
        assert all(len(made) == 2 for made in by_image.values())
    else:
        assert all(crops[0][name] != crops[1][name] for name in crops[0])
        assert len(seen) == 96
        assert all(len(made) == 1 for made in seen.values())


@pytest.mark.usefixtures("_fresh_accelerate")
def test_a_list_keeps_its_images(scenes, tmp_path, monkeypatch):
    names = []
    forward = segmentation.Model.forward
    monkeypatch.setattr(
        segmentation.Model,
        "forward",
        lambda model, batch, *more: names.extend(batch.names) or forward(model, batch, *more),
    )
    (tmp_path / "list.txt").write_text("".join(f"{i:06d}\n" for i in range(3, 19)))
    lines = here(scenes, tmp_path / "run", "--list", str(tmp_path / "list.txt"), "--epochs", "1")
    assert len(lines) == 2
    assert sorted(names) == [f"{i:06d}.jpg" for i in range(3, 19)]


# -- the model --------------------------------------------------------------------------------------------------------

ORDERS = ["before", "between", "after"]


@pytest.mark.parametrize("order", ORDERS)
def test_gradient_reaches_every_weight(order, batch):
    model, inputs = model_and_inputs(batch, "--order", order)
    loss, log = model(*inputs)
    loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert 2 <= log["categories"].item() <= 7
    assert 1 / 7 <= log["largest"].item() < 1


def test_orders_are_three_networks(batch):
    values = [model_and_inputs(batch, "--order", order)[0](*model_and_inputs(batch)[1])[1]["dense"] for order in ORDERS]
    assert len({round(x.item(), 5) for x in values}) == 3


def test_projections_are_targets_without_a_gradient(batch):
    """With predictors that say nothing of their input, no gradient may reach the trunk by way of a target."""
    model, inputs = model_and_inputs(batch, "--seg-weight", "0", weight=0)
    for head in (model.predictor, model.aux_predictor):
        nn.init.zeros_(head[-1].weight)
    model(*inputs)[0].backward()
    assert not model.net.trunk.conv1.weight.grad.any()
    nn.init.normal_(model.aux_predictor[-1].weight)
    model(*inputs)[0].backward()
    assert model.net.trunk.conv1.weight.grad.any()


def test_pixsim_alone_is_one_term(batch):
    model, inputs = model_and_inputs(batch, "--aux", "0", "--seg-weight", "0", weight=0.0)
    loss, log = model(*inputs)
    loss.backward()
    assert loss.item() == pytest.approx(log["dense"].item())
    assert "aux" not in log
    assert all(p.grad is not None and not p.grad.any() for p in model.of_regions())  # in the graph, for DDP


def test_images_of_one_colour_fewer_categories_and_all_of_one_are_no_nan(batch):
    batch.images = [torch.full_like(x, 90) for x in batch.images]
    for law in ("code", "inverse"):
        model, inputs = model_and_inputs(batch, "--classes", "2", "--aux", "2", "--class-weight", law)
        nn.init.zeros_(model.net.projector[3].weight)  # every pixel has the same scores
        loss, log = model(*inputs)
        loss.backward()
        assert all(x.isfinite().all() for x in log.values())
        assert log["categories"].item() == log["largest"].item() == 1
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.usefixtures("_fresh_accelerate")
def test_a_collapse_is_told_once(scenes, tmp_path, monkeypatch, capsys):
    def collapsed(model, batch, *more):
        return sum(p.sum() for p in model.parameters()) * 0 + 1, {"categories": torch.tensor(1.0)}

    monkeypatch.setattr(segmentation.Model, "forward", collapsed)
    here(scenes, tmp_path / "run", "--epochs", "1")
    told = capsys.readouterr().err.splitlines()
    assert told == ["warning: step 1: categories is 1, under 2: is it collapsing?"]


def test_a_batch_that_could_not_be_read_gives_zero_inside_the_graph(batch):
    batch.ok = torch.zeros_like(batch.ok)
    model, inputs = model_and_inputs(batch)
    loss, log = model(*inputs)
    loss.backward()
    assert loss.item() == 0
    assert [n for n, p in model.named_parameters() if p.grad is None or p.grad.any()] == []
    assert all(bool(torch.isfinite(x).all()) for x in log.values())


def test_rows_that_could_not_be_read_change_nothing(batch):
    """With fixed statistics the others' loss is the same, whatever stands in those rows."""
    found = []
    batch.ok = torch.tensor([True] * 6 + [False, True])
    for junk in (0, 255):
        batch.images = [image.clone() for image in batch.images]
        for image in batch.images:
            image[6] = junk
        model, inputs = model_and_inputs(batch)
        found.append(model.eval()(*inputs)[0].item())
    assert found[0] == found[1] != 0


def test_the_pyramid_adds_up_what_lies_at_one_place():
    maps = [torch.rand(2, c, s, s, dtype=torch.float64) for c, s in ((3, 12), (5, 6), (7, 3), (4, 2))]
    pyramid = common.LightPyramid([3, 5, 7, 4], 8).double()
    expected = None
    for x, conv in zip(reversed(maps), reversed(pyramid.lateral), strict=True):
        here = torch.einsum("bchw,oc->bohw", x, conv.weight[:, :, 0, 0]) + conv.bias[:, None, None]
        if expected is not None:
            h, w = here.shape[-2:]
            centres = geoaug.grids.cell_centers(h, w).double().expand(2, -1, -1)
            here = here + geoaug.sample_points(expected, centres).mT.unflatten(2, (h, w))
        expected = here
    assert torch.allclose(pyramid(maps), expected, atol=1e-6)


def near(run, other):
    """To 1e-5, of a value's own size where that is larger: statistics of regions, which are sums, are."""
    logs = [[line["loss"] for line in training.logged(r)] for r in (run, other)]
    assert len(logs[0]) > 1
    assert logs[0] == pytest.approx(logs[1], rel=1e-5, abs=1e-5)
    ours, theirs = training.newest(run)["model"], training.newest(other)["model"]
    assert [n for n in ours if not torch.allclose(ours[n].double(), theirs[n].double(), rtol=1e-5, atol=1e-5)] == []


# -- whole runs -------------------------------------------------------------------------------------------------------

SWITCHES = [
    "--order between --target p --class-weight inverse --masks raw --norm batch --no-channels-last",
    "--order after --class-weight none --replay off --schedule cosine --accumulate 2 --region-start 0",
    "--aux 0 --seg-weight 0 --region-weight 0 --precision bf16 --render device",
]


@pytest.mark.usefixtures("_fresh_accelerate")
@pytest.mark.parametrize("switches", SWITCHES)
def test_every_switch_runs_two_steps(switches, scenes, tmp_path):
    lines = here(scenes, tmp_path / "run", "--max-steps", "2", *switches.split())
    assert [line["step"] for line in lines] == [1, 2]
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert all(0.1 < line["spread"] < 1.5 for line in lines)
    about = json.loads((tmp_path / "run" / "config.json").read_text())
    assert about["method"] == METHOD
    weights = geoaug.weights.read_backbone(tmp_path / "run")
    assert common.make_trunk(about["config"]["arch"], str(tmp_path / "run")).state_dict().keys() == weights.keys()
    net = common.read_segmenter(tmp_path / "run")
    assert net(torch.zeros(1, 3, 32, 32)).shape[1] == 7
    state = training.newest(tmp_path / "run")["model"]
    assert torch.equal(net.projector[0].weight, state["net.projector.0.weight"])


def test_the_rate_is_constant_after_its_warm_up():
    optimizer = torch.optim.SGD([torch.zeros(1)], 1.0)
    rates = [common.set_lr(optimizer, step, 10, peak=0.1, warmup=2, end=0.1) for step in range(11)]
    assert rates == pytest.approx([0, 0.05] + [0.1] * 9)


def test_what_is_no_segmentation_run_has_no_segmenter(tmp_path):
    assert common.read_segmenter("random") is None
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "x.pth")
    assert common.read_segmenter(tmp_path / "x.pth") is None
    (tmp_path / "y.pth").write_bytes(b"nothing")
    assert common.read_segmenter(tmp_path / "y.pth") is None


def test_two_processes_are_one(broken, tmp_path):
    """The categories' weights are of both processes' pixels; an image of one cannot be read."""
    more = ("--max-steps", "3", "--region-start", "0", "--lr", "0.02")
    for world in (1, 2):
        command = training.command(METHOD, broken, tmp_path / str(world), *more)
        assert training.train(METHOD, command, tmp_path / "log", world=world) == [0] * world
    near(tmp_path / "1", tmp_path / "2")


@pytest.mark.usefixtures("_fresh_accelerate")
def test_micro_batches_are_the_batch_where_norm_and_weights_are_fixed(broken, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "prepare_model", lambda model, config, device: model.eval())
    for parts in (1, 2):
        more = ("--max-steps", "3", "--accumulate", str(parts), "--class-weight", "none", "--region-start", "0")
        here(broken, tmp_path / str(parts), *more)
    near(tmp_path / "1", tmp_path / "2")


WRONG = [
    ("--aux 1", "--aux must be 0 or at least 2, got 1"),
    ("--classes 1", "--classes must be at least 2, got 1"),
    ("--norm shuffle", "shuffle"),
    ("--list /no/such/list", "only must be a text file of names"),
    ("--seg-weight -1", "--seg-weight must be at least 0.0, got -1.0"),
]


@pytest.mark.usefixtures("_fresh_accelerate", "our_errors")
@pytest.mark.parametrize(("wrong", "message"), WRONG)
def test_a_mistake_is_told_in_one_line_before_any_training(wrong, message, scenes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["densesiam.py", *training.command(METHOD, scenes, tmp_path / "run", *wrong.split())]
    )
    with pytest.raises(SystemExit) as stop:
        common.launch(segmentation.main, segmentation.Config, segmentation.PRESETS)
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert message in told
    assert len(told.splitlines()) == 1
    assert not (tmp_path / "run").exists()

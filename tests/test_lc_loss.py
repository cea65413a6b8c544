import json
import math
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import geoaug
from geoaug import AxisAffine, Key, export
from tests import reference_local_contrast as slow
from tests import test_trainers, training
from tests.test_no_synchronisation import Copies
from trainers import common, evaluate, lc_loss

from .test_trainers import _fresh_accelerate, _one_thread, batches, scenes  # noqa: F401  fixtures

DINO = ("--preset", "demo-dino", "--dim", "24")


def config_of(*more):
    return test_trainers.config_of("lc_loss", Path("x"), Path("x"), *more)


def ready(batch, *more):
    """A model whose online and target networks differ, in double precision, and what its forward takes."""
    config = config_of("--local-dim", "5", *more)
    torch.manual_seed(0)
    model = lc_loss.Model(config).double()
    for p in model.teacher.parameters():
        nn.init.normal_(p, std=0.1)
    points, valid = lc_loss.find_cells(batch, config)
    counts = torch.cat((batch.ok.sum()[None], valid.any(2).sum(1))).float()
    return model, (batch, points, valid, counts, 0.05)


def watch(module, seen):
    """Keep what a module was given and gave."""
    module.register_forward_hook(lambda _, given, out: seen.append((given[0].detach(), out.detach())))
    return seen


def run(model, inputs, monkeypatch):
    """The loss, its log, and by name what passed through trunks, heads and branches, in order."""
    paint = lc_loss.paint
    monkeypatch.setattr(lc_loss, "paint", lambda *arguments: paint(*arguments).double())
    parts = {"student": model.student.trunk, "teacher": model.teacher.trunk, "keys": model.student.local,
             "queries": model.teacher.local, "targets": model.teacher.head}  # fmt: skip
    parts["predictions"] = model.predictor if model.centre is None else model.student.head
    seen = {name: watch(module, []) for name, module in parts.items()}
    loss, log = model(*inputs)
    return loss, log, seen


@pytest.fixture
def batch(batches):  # noqa: F811
    """Two rows of eight are to be left out: one that could not be read, one with no cell inside its crop."""
    batch = batches["lc_loss"].split(1)[0]
    batch.ok = torch.tensor([True] * 6 + [False, True])
    return batch


@pytest.mark.parametrize("local", ["contrast", "mse"])
def test_the_loss_is_eq_5_of_loops(local, batch, monkeypatch):
    model, inputs = ready(
        batch, "--local", local, "--symmetric-global", "off", "--alpha", "0.3", "--temperature", "0.2"
    )
    _, points, valid, counts, _ = inputs
    valid[0, 3] = False  # a crop that shows no centre of a cell
    counts[1] = valid[0].any(1).sum()
    loss, log, seen = run(model, inputs, monkeypatch)
    ((_, queries),), ((_, keys),), ((_, z),), ((_, p),) = (
        seen[name] for name in ("queries", "keys", "targets", "predictions")
    )
    images, cosines = [], []
    for i in range(8):
        if batch.ok[i]:
            cosines.append(sum(a * b for a, b in zip(slow.unit(p[i].tolist()), slow.unit(z[i].tolist()), strict=True)))
        arguments = (queries[i].tolist(), keys[i].tolist(), points[0, i].tolist())
        found = slow.local_contrastive(*arguments, 0.2) if local == "contrast" else slow.local_regression(*arguments)
        inside = [value for value, ok in zip(found, valid[0, i].tolist(), strict=True) if ok]
        images += [sum(inside) / len(inside)] if inside else []
    assert len(images) == 6
    assert any(0 < n < 4 for n in valid[0].sum(1).tolist())
    mine = sum(images) / 6
    whole = 2 - 2 * sum(cosines) / 7
    assert log["local"].item() == pytest.approx(mine, abs=1e-6)
    assert log["global"].item() == pytest.approx(whole, abs=1e-6)
    assert loss.item() == pytest.approx(0.7 * whole + 0.3 * mine, abs=1e-6)


def test_the_target_sees_the_whole_image_and_the_online_network_the_crop(batch, monkeypatch):
    model, inputs = ready(batch, "--symmetric-global", "off")
    whole, crop = model.colored(batch)
    _, _, seen = run(model, inputs, monkeypatch)
    ((target, c5_target),), ((online, c5_online),) = seen["teacher"], seen["student"]
    assert torch.equal(target.float(), whole)
    assert torch.equal(online.float(), crop)
    assert torch.equal(seen["queries"][0][0], c5_target)
    assert torch.equal(seen["keys"][0][0], c5_online)


def test_both_ways_are_added_up(batch, monkeypatch):
    logs = {}
    for both in ("off", "on"):
        model, inputs = ready(batch, "--symmetric-local", both)
        _, logs[both], seen = run(model, inputs, monkeypatch)
        assert [len(seen[name]) for name in ("student", "teacher", "keys", "queries")] == (
            [2, 2, 2, 2] if both == "on" else [2, 2, 1, 1]  # the branch is for maps that a loss asks for
        )
    points, valid = inputs[1:3]
    assert torch.equal(valid[1], batch.ok[:, None].expand(-1, 4))  # the whole image shows every cell of the crop
    (_, crop_queries), (_, whole_keys) = seen["queries"][1], seen["keys"][1]
    assert torch.equal(seen["queries"][1][0], seen["teacher"][1][1])
    assert torch.equal(seen["keys"][1][0], seen["student"][0][1])
    back = [
        sum(slow.local_contrastive(crop_queries[i].tolist(), whole_keys[i].tolist(), points[1, i].tolist(), 0.1)) / 4
        for i in range(8) if batch.ok[i]
    ]  # fmt: skip
    assert logs["on"]["local"].item() - logs["off"]["local"].item() == pytest.approx(sum(back) / 7, abs=1e-6)
    (_, p1), (_, p2) = seen["predictions"]
    (_, z1), (_, z2) = seen["targets"]
    each = geoaug.losses.regression(p1, z2) + geoaug.losses.regression(p2, z1)
    assert logs["on"]["global"].item() == pytest.approx(each[batch.ok].mean().item(), abs=1e-6)


def test_cells_are_found_by_geometry():
    """A crop of the right half, mirrored: the cells of the whole image's right columns lie in it, in mirrored order."""
    flips, half = torch.tensor([False, True]), torch.tensor([0.5, 0.0, 1.0, 1.0]).expand(2, 4)
    views = [AxisAffine.identity(2), AxisAffine.flip_x(flips) @ AxisAffine.sending(half)]

    class Plan:
        view_from_source = AxisAffine(*(torch.stack([getattr(v, n) for v in views], 1) for n in ("scale", "shift")))

    class Batch:
        plan, ok = Plan, torch.ones(2, dtype=torch.bool)

    points, valid = lc_loss.find_cells(Batch, config_of("--size", "128"))
    assert valid.view(2, 4, 4).tolist() == [[[False, False, True, True]] * 4] * 2
    rows = points.view(2, 4, 4, 2)
    assert rows[0, 1, 2:].flatten().tolist() == pytest.approx([0.25, 0.375, 0.75, 0.375])
    assert rows[1, 1, 2:].flatten().tolist() == pytest.approx([0.75, 0.375, 0.25, 0.375])


def test_cells_are_found_without_waiting_for_the_host(monkeypatch):
    monkeypatch.setenv("GEOAUG_CHECK", "0")
    with FakeTensorMode(allow_non_fake_inputs=True):
        views = AxisAffine(torch.rand(4, 2, 2, device="cuda") + 0.5, torch.rand(4, 2, 2, device="cuda"))

        class Batch:
            plan = type("Plan", (), {"view_from_source": views})
            ok = torch.ones(4, device="cuda").bool()

        with Copies() as copies:
            lc_loss.find_cells(Batch, config_of("--symmetric-local", "on"))
    assert copies.found == []


def test_colours_are_drawn_apart_and_change_places_in_every_other_image(batch):
    tables = {}
    for swap in ("off", "on"):
        config, drawn = config_of("--swap-colors", swap), []
        torch.manual_seed(0)
        model, paint = lc_loss.Model(config), lc_loss.paint
        try:
            lc_loss.paint = lambda images, spec, table, drawn=drawn: drawn.append(table)
            batch.key = Key(0, 0, range(8))
            model.colored(batch)
        finally:
            lc_loss.paint = paint
        tables[swap] = drawn
    whole, crop = tables["off"]
    assert (whole.factors != crop.factors).any(1).all()
    assert not whole.solarize.any()
    kept = (tables["on"][0].factors == whole.factors).all(1)
    assert kept.any()
    assert not kept.all()
    for i, own in enumerate(kept.tolist()):
        first, second = (whole, crop) if own else (crop, whole)
        for found, expected in zip(tables["on"], (first, second), strict=True):
            assert all(torch.equal(a[i], b[i]) for a, b in zip(found.columns, expected.columns, strict=True))


# -- DINO -------------------------------------------------------------------------------------------------------------


def test_self_distillation_against_the_loop():
    torch.manual_seed(0)
    student, teacher, centre = torch.randn(3, 7), torch.randn(3, 7), torch.randn(7)
    found = common.self_distillation(student, teacher, centre, student_temperature=0.3, teacher_temperature=0.2)

    def softmax(values):
        most = max(values)
        return [math.exp(v - most) / sum(math.exp(u - most) for u in values) for v in values]

    for i in range(3):
        target = softmax([(t - c) / 0.2 for t, c in zip(teacher[i].tolist(), centre.tolist(), strict=True)])
        ours = softmax([s / 0.3 for s in student[i].tolist()])
        assert found[i].item() == pytest.approx(-sum(t * math.log(s) for t, s in zip(target, ours, strict=True)), 1e-4)


def test_dino_compares_each_view_with_the_others_target(batch, monkeypatch):
    model, inputs = ready(batch, *DINO)
    model.centre.mean.normal_(std=0.1)
    _, log, seen = run(model, inputs, monkeypatch)
    (_, s1), (_, s2), (_, t1), (_, t2) = (*seen["predictions"], *seen["targets"])
    assert s1.shape == (8, 24)
    assert s1.abs().max() <= 1 + 1e-6  # cosines
    temperatures = {"student_temperature": 0.1, "teacher_temperature": 0.05}
    pairs = ((s1, t2), (s2, t1))
    each = [common.self_distillation(s, t, model.centre.mean, **temperatures)[batch.ok].mean() for s, t in pairs]
    assert log["global"].item() == pytest.approx(float(each[0] + each[1]) / 2, abs=1e-5)
    assert torch.allclose(log["outputs"], (t1[batch.ok].sum(0) + t2[batch.ok].sum(0)).to(log["outputs"].dtype))


def test_the_centre_moves_to_the_mean_and_stays_without_any():
    centre = common.Centre(3, momentum=0.75)
    centre.move(torch.tensor([8.0, 4.0, 0.0]), torch.tensor(2.0))
    assert centre.mean.tolist() == [1.0, 0.5, 0.0]
    centre.move(torch.zeros(3), torch.tensor(0.0))
    assert centre.mean.tolist() == [1.0, 0.5, 0.0]


def test_each_tensors_gradient_is_shortened_by_itself():
    long, short, none = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    long.grad, short.grad = torch.tensor([3.0, 4.0]), torch.tensor([0.3, 0.4])
    common.clip_each([long, short, none], 1.0)
    assert long.grad.tolist() == pytest.approx([0.6, 0.8])
    assert short.grad.tolist() == pytest.approx([0.3, 0.4])
    common.clip_each([none], 1.0)


@pytest.mark.usefixtures("_fresh_accelerate")
def test_prototypes_stay_for_an_epoch_and_the_centre_follows_the_teacher(scenes, tmp_path):  # noqa: F811
    """24 images are three steps of eight."""
    runs = {}
    for steps in (3, 4):
        test_trainers.here("lc_loss", scenes, tmp_path / str(steps), *DINO, "--max-steps", str(steps))
        runs[steps] = training.newest(tmp_path / str(steps))["model"]
    config = test_trainers.config_of("lc_loss", scenes, tmp_path, *DINO)
    torch.manual_seed(config.seed)
    first = lc_loss.Model(config).student.head.prototypes
    assert torch.equal(runs[3]["student.head.prototypes"], first)
    assert not torch.equal(runs[4]["student.head.prototypes"], first)
    assert runs[3]["centre.mean"].any()
    lines = training.logged(tmp_path / "4")
    assert "outputs" not in lines[0]
    assert [line["lr"] for line in lines] == pytest.approx([5e-4 / 32 * s / 3 for s in range(3)] + [5e-4 / 32])


# -- Swin -------------------------------------------------------------------------------------------------------------


def test_swin_is_torchvisions():
    torch.manual_seed(0)
    net = torchvision.models.swin_t(weights=None).eval()
    trunk = common.make_trunk("swin_t").eval()
    trunk.load_state_dict({n: x for n, x in net.state_dict().items() if not n.startswith("head.")})
    net.head = nn.Identity()
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        maps = trunk.maps(images)
        assert torch.allclose(trunk(images).mean((2, 3)), net(images), atol=1e-5)
        assert torch.equal(trunk.maps(images, "c3")[-1], maps[2])
        assert [len(trunk.maps(images, stage)) for stage in trunk.stages] == [1, 2, 3, 4, 5]
    assert [tuple(x.shape[1:]) for x in maps] == [(96, 16, 24), (96, 16, 24), (192, 8, 12), (384, 4, 6), (768, 2, 3)]
    assert [x.shape[1] for x in maps] == list(trunk.channels.values())


@pytest.mark.usefixtures("_fresh_accelerate")
def test_a_run_of_swin_is_measured(scenes, tmp_path, capsys):  # noqa: F811
    run = tmp_path / "run"
    (line,) = test_trainers.here("lc_loss", scenes, run, *DINO, "--arch", "swin_t", "--max-steps", "1")
    assert math.isfinite(line["loss"])
    config = evaluate.Config(
        task="correspondence",
        weights=str(run),
        data=scenes,
        arch="swin_t",
        tile=64,
        device="cpu",
        workers=0,
        count=4,
    )
    assert evaluate.main(config)["cells"] == 4
    config.arch = "resnet10-narrow"
    with pytest.raises(common.UsageError, match="must fit --arch resnet10-narrow"):
        evaluate.main(config)
    capsys.readouterr()


def test_a_swin_is_exported_where_its_names_are_known(tmp_path):
    weights = common.make_trunk("swin_t").state_dict()
    for to, name in (("torchvision", "x.pth"), ("safetensors", "x.safetensors")):
        assert export.write_backbone(weights, to, tmp_path / name) == len(weights)
        again = geoaug.weights.read_backbone(tmp_path / name)
        assert all(torch.equal(again[n], x) for n, x in weights.items())
    missing, unexpected = torchvision.models.swin_t().load_state_dict(torch.load(tmp_path / "x.pth"), strict=False)
    assert (missing, unexpected) == (["head.weight", "head.bias"], [])
    for to in ("timm", "detectron2", "mmdet"):
        with pytest.raises(ValueError, match="to must be torchvision or safetensors for a Swin"):
            export.write_backbone(weights, to, tmp_path / ("x.pkl" if to == "detectron2" else "x.pth"))
    del weights["norm.bias"]
    with pytest.raises(ValueError, match=r"one without norm\.bias"):
        export.write_backbone(weights, "torchvision", tmp_path / "x.pth")


# -- the base's numbers -----------------------------------------------------------------------------------------------


def test_what_no_flag_gives_is_the_bases():
    byol = common.parse(lc_loss.Config, lc_loss.PRESETS, [])
    assert (byol.alpha, byol.lr, byol.batch_size, byol.epochs, byol.dim, byol.target) == (
        0.1,
        0.3,
        4096,
        400,
        256,
        "random",
    )
    dino = common.parse(lc_loss.Config, lc_loss.PRESETS, ["--base", "dino", "--arch", "swin_t"])
    assert (dino.alpha, dino.lr, dino.batch_size, dino.epochs, dino.dim) == (0.5, 5e-4, 1024, 300, 65536)
    assert dino.weight_decay == 0.04
    mine = common.parse(lc_loss.Config, lc_loss.PRESETS, ["--base", "dino", "--lr", "0.3", "--alpha", "0"])
    assert (mine.lr, mine.alpha, mine.epochs) == (0.3, 0.0, 300)
    small = common.parse(lc_loss.Config, lc_loss.PRESETS, ["--preset", "imagenet-200ep-160"])
    assert (small.size, small.epochs, small.lr) == (160, 200, 0.3)
    assert json.loads(json.dumps(vars(small), default=str))["alpha"] == 0.1

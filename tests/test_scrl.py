import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy import stats
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.ops import roi_align

import geoaug
from geoaug import AxisAffine, Key
from tests import reference_scrl, test_trainers, training
from tests.test_no_synchronisation import Copies
from trainers import common, scrl

from .test_trainers import _one_thread, batches, scenes  # noqa: F401  fixtures

SIZE, K = 224, 6
# Two crops of a source of 400 x 400 pixels. Overlaps are whole pixels of the coarser view, so nothing is rounded.
CROPS = [
    ((0, 0, 224, 224), (56, 28, 168, 140)),  # of 112 pixels, at twice the scale in the second view
    (
        (0, 0, 224, 112),
        (64, 0, 288, 224),
    ),  # 160 x 224 of the second one's 160 x 112: each axis has its own coarser view
    ((10, 20, 234, 244), (170, 20, 394, 244)),  # 64 pixels across: one or two cells
]
FLIPS = [(False, True), (True, False), (True, True)]


def config_of(*more):
    return test_trainers.config_of("scrl", Path("x"), Path("x"), "--size", str(SIZE), "--min-side", "32", *more)


def batch_of(crops, flips, images):
    """As many images with these two views, as far as their geometry is looked at."""
    views = []
    for crop, flip in zip(crops, flips, strict=True):
        sending = AxisAffine.sending(torch.tensor(crop, dtype=torch.float32).expand(images, 4) / 400)
        views.append(AxisAffine.flip_x(torch.full((images,), flip)) @ sending)
    maps = AxisAffine(*(torch.stack([getattr(v, name) for v in views], 1) for name in ("scale", "shift")))

    class Plan:
        view_from_source, view_sizes = maps, ((SIZE, SIZE), (SIZE, SIZE))

    class Batch:
        plan, key, ok = Plan, Key(5, 0, range(images)), torch.ones(images, dtype=torch.bool)
        host = None

    return Batch


def alike(ours, theirs):
    """The smallest p of Kolmogorov and Smirnov's two-sample test over the four edges and the two sides."""
    columns = [torch.cat((x, x[:, 2:] - x[:, :2]), 1).T.numpy().round(2) for x in (ours, theirs)]  # equal is equal
    return min(stats.ks_2samp(a, b).pvalue for a, b in zip(*columns, strict=True))


def largest_iou(box):
    """Of each image's last box with those before it."""
    return geoaug.boxes.iou(box[:, -1:], box[:, :-1])[:, 0].amax(1).numpy().round(4)


@pytest.mark.parametrize("law", ["grid", "uniform"])
@pytest.mark.parametrize("case", range(3))
def test_both_laws_are_the_slow_references(law, case):
    crops, flips, images, chance = CROPS[case], FLIPS[case], 1000, random.Random(case)
    pairs = scrl.find_pairs(batch_of(crops, flips, images), config_of("--law", law, "--boxes", str(K)))
    slow = {
        other: torch.tensor(
            [
                reference_scrl.pairs(crops, flips, SIZE, K, least=32, most=0.5, law=other, keep=True, chance=chance)
                for _ in range(images)
            ]
        )
        for other in ("grid", "uniform")
    }  # [images, K, 2 views, 4]
    assert pairs.valid.all()
    for slot in (0, 1, K - 1):
        for v, ours in enumerate((pairs.in_v1, pairs.in_v2)):
            assert alike(ours[:, slot] * SIZE, slow[law][:, slot, v]) > 1e-3
    nearest = stats.ks_2samp(largest_iou(pairs.in_v1), largest_iou(slow[law][:, :, 0])).pvalue
    assert nearest > 1e-3
    if case == 0:  # else the test would see nothing
        other = "uniform" if law == "grid" else "grid"
        assert alike(pairs.in_v1[:, 0] * SIZE, slow[other][:, 0, 0]) < 1e-9
        assert alike(pairs.in_v1[:, 0] * SIZE, slow[law][:, 0, 1]) < 1e-9
        free = scrl.find_pairs(
            batch_of(crops, flips, images), config_of("--law", law, "--boxes", str(K), "--max-iou", "1")
        )
        assert stats.ks_2samp(largest_iou(free.in_v1), largest_iou(slow[law][:, :, 0])).pvalue < 1e-9


def test_an_image_without_a_large_overlap_has_no_box_and_reads_the_whole_view():
    for crops in (((0, 0, 100, 100), (90, 0, 190, 100)), ((0, 0, 100, 100), (200, 200, 300, 300))):
        assert reference_scrl.pairs(
            crops, (False, False), SIZE, K, least=32, most=0.5, law="grid", keep=True, chance=random.Random(0)
        ) == [None] * K  # fmt: skip
        pairs = scrl.find_pairs(batch_of(crops, (False, False), 3), config_of())
        assert not pairs.valid.any()
        for boxes in (pairs.in_v1, pairs.in_v2):
            assert torch.equal(boxes, torch.tensor([0.0, 0, 1, 1]).expand_as(boxes))


def test_a_slot_that_was_dropped_reads_the_first_box():
    more = ("--boxes", "60", "--on-fail", "drop", "--max-iou", "0.2")
    pairs = scrl.find_pairs(batch_of(CROPS[2], FLIPS[2], 40), config_of(*more))
    assert pairs.valid[:, 0].all()
    assert 0.05 < pairs.valid.float().mean() < 0.5
    for boxes in (pairs.in_v1, pairs.in_v2):
        first = boxes[:, :1].expand_as(boxes)
        assert torch.equal(boxes[~pairs.valid], first[~pairs.valid])
        assert not torch.equal(boxes, first)


def test_all_boxes_of_a_batch_are_one_call(monkeypatch):
    calls, matched = [], geoaug.matched_boxes

    def watched(*arguments, **more):
        calls.append(1)
        return matched(*arguments, **more)

    monkeypatch.setattr(geoaug, "matched_boxes", watched)
    batch = batch_of(CROPS[0], FLIPS[0], 64)
    batch.ok[7] = False
    assert scrl.find_pairs(batch, config_of()).valid.sum() == 63 * 10
    assert len(calls) == 1


@pytest.mark.parametrize("jitter", ["0", "0.2", "inf"])
def test_no_draw_waits_for_the_host(jitter, monkeypatch, our_errors):
    monkeypatch.setenv("GEOAUG_CHECK", "0")
    config = config_of("--jitter", jitter)
    with FakeTensorMode(allow_non_fake_inputs=True):
        a, b = (torch.rand(4, 2, 2, device="cuda") + 0.5 for _ in "ab")

        class Plan:
            view_from_source, view_sizes = AxisAffine(a, b), ((SIZE, SIZE), (SIZE, SIZE))

        class Batch:
            plan = Plan
            key = Key(0, 0, torch.zeros(4, dtype=torch.int64, device="cuda"))
            ok = torch.ones(4, dtype=torch.bool, device="cuda")
            host = None  # as of a batch that was made on its device

        with Copies() as copies:
            scrl.find_pairs(Batch, config)
    assert copies.found == []


def test_jitter_moves_the_second_views_boxes_by_the_papers_law():
    batch, chance = batch_of(CROPS[0], FLIPS[0], 3000), random.Random(1)
    still = scrl.find_pairs(batch, config_of("--boxes", "1"))
    for r in (0.1, 0.2):
        moved = scrl.find_pairs(batch, config_of("--boxes", "1", "--jitter", str(r)))
        assert torch.equal(moved.in_v1, still.in_v1)
        slow = torch.tensor(
            [reference_scrl.jitter(box, r, SIZE, chance) for box in (still.in_v2[:, 0] * SIZE).tolist()]
        )
        before = still.in_v2[:, 0] * SIZE
        sides = (before[:, 2:] - before[:, :2]).repeat(1, 2)
        inside = ((slow > 0) & (slow < SIZE)).all(1), ((moved.in_v2[:, 0] > 0) & (moved.in_v2[:, 0] < 1)).all(1)
        ours, theirs = ((x - before) / sides for x in (moved.in_v2[:, 0] * SIZE, slow))
        assert alike(ours[inside[1]], theirs[inside[0]]) > 1e-3
        assert ours[:, :2][inside[1]].abs().max() <= r + 1e-4
    unrelated = scrl.find_pairs(batch, config_of("--boxes", "1", "--jitter", "inf"))
    assert torch.equal(unrelated.in_v1, still.in_v1)
    assert alike(unrelated.in_v2[:, 0], still.in_v2[:, 0]) > 1e-3  # the same law, other boxes
    assert abs(torch.corrcoef(torch.stack((unrelated.in_v2[:, 0, 0], still.in_v2[:, 0, 0])))[0, 1]) < 0.05


@pytest.mark.parametrize("aligned", ["on", "off"])
def test_the_loss_is_equation_three_box_by_box(aligned, batches):  # noqa: F811
    """In float64, with every network's statistics fixed, one RoI at a time."""
    batch = batches["scrl"].split(2)[0]
    model, (_, pairs, _) = test_trainers.model_and_inputs("scrl", batch, ("--aligned", aligned, "--boxes", "3"))
    valid = pairs.valid.clone()
    valid[1] = False
    valid[2, 1] = False
    pairs = replace(pairs, valid=valid)
    model.eval().double()
    key, colors = batch.key, scrl.recipe(model.config).colors
    views = [geoaug.color(batch.images[v], colors[v], key.fold(f"v{v + 1}")).double() for v in (0, 1)]
    boxes = (pairs.in_v1.double(), pairs.in_v2.double())

    def vector(network, v, i, k):
        c5 = network.trunk(views[v][i : i + 1])
        edges = boxes[v][i, k] * torch.tensor([c5.shape[3], c5.shape[2]] * 2)
        cell = roi_align(c5, torch.cat((torch.zeros(1), edges))[None].double(), 1, 1.0, 0, aligned == "on")
        return network.projector(cell.flatten(1))[0]

    total, terms = 0.0, 0
    with torch.no_grad():
        for i in range(4):
            for k in range(3):
                if not valid[i, k]:
                    continue
                terms += 1
                for a, b in ((0, 1), (1, 0)):
                    p = model.predictor(vector(model.student, a, i, k)[None])[0]
                    z = vector(model.teacher, b, i, k)
                    unit = [x / math.sqrt(sum(float(y) ** 2 for y in x)) for x in (p, z)]
                    total += sum(float(x - y) ** 2 for x, y in zip(*unit, strict=True))
        model.float()
        found = model(batch, pairs, torch.tensor(float(terms)))[0].item()
    assert terms > 3
    assert found == pytest.approx(total / terms, rel=1e-4)


def test_means_over_boxes_and_over_images(batches):  # noqa: F811
    batch = batches["scrl"].split(1)[0]
    values = {}
    for mean in ("boxes", "images"):
        model, (_, pairs, _) = test_trainers.model_and_inputs("scrl", batch, ("--mean", mean, "--boxes", "4"))
        valid = torch.zeros(8, 4, dtype=torch.bool)
        valid[0, 0] = valid[1] = True
        count = torch.tensor(5.0 if mean == "boxes" else 2.0)
        with torch.no_grad():
            each = {}
            for row in (0, 1):
                rows = valid & (torch.arange(8) == row)[:, None]
                mine = torch.tensor(float(rows.sum()))
                pair = replace(pairs, valid=rows)
                each[row] = model(batch, pair, mine if mean == "boxes" else torch.tensor(1.0))[0].item()
            values[mean] = model(batch, replace(pairs, valid=valid), count)[0].item()
    assert values["boxes"] == pytest.approx((each[0] + 4 * each[1]) / 5, rel=1e-3)
    assert values["images"] == pytest.approx((each[0] + each[1]) / 2, rel=1e-3)
    assert values["boxes"] != pytest.approx(values["images"], rel=1e-3)


def test_a_batch_without_a_box_gives_zero_and_the_same_used_parameters(batches):  # noqa: F811
    """All images can be read, but no overlap is large enough."""
    batch = batches["scrl"].split(1)[0]
    model, (_, some, _) = test_trainers.model_and_inputs("scrl", batch)
    none = scrl.find_pairs(
        batch, test_trainers.config_of("scrl", Path("x"), Path("x"), "--size", "64", "--min-side", "63")
    )
    assert some.valid.any()
    assert not none.valid.any()
    used = []
    for pairs in (some, none):
        model.zero_grad()
        loss, log = model(batch, pairs, pairs.valid.sum().float())
        loss.backward()
        used.append({name for name, p in model.named_parameters() if p.grad is not None})
        assert math.isfinite(log["spread"])
    assert loss.item() == 0
    assert used[0] == used[1] == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_processes_without_a_box_take_the_same_steps(scenes, tmp_path):  # noqa: F811
    """Step 1: one of two has no box. Step 3: neither has any, so the loss is zero; and no process waits for ever."""
    data = scenes.parent / "instances.json"
    more = ("--size", "64", "--min-side", "52", "--lr", "0.1", "--save-every", "1")
    config = test_trainers.config_of("scrl", data, tmp_path, *more)
    with geoaug.open_loader(data, scrl.recipe(config).views, batch_size=8, seed=config.seed, workers=0) as loader:
        halves = [scrl.find_pairs(batch, config).valid.any(1).chunk(2) for batch in loader]
    assert [[bool(x.any()) for x in step] for step in halves] == [[False, True], [True, True], [False, False]]
    for steps in ("2", "3"):
        for world in (1, 2):
            command = training.command("scrl", data, tmp_path / str(world), *more, "--max-steps", steps)
            assert training.train("scrl", command, tmp_path / "log", world=world) == [0] * world
        if steps == "2":
            test_trainers.near(tmp_path / "1", tmp_path / "2", gradients_of=1)
    test_trainers.near(tmp_path / "1", tmp_path / "2", gradients=math.inf)
    assert [line["loss"] > 0 for line in training.logged(tmp_path / "2")] == [True, True, False]


def test_the_published_schedules():
    presets = scrl.PRESETS
    table = {
        name: (p.epochs, p.lr, p.weight_decay, p.ema, p.batch_size, p.warmup_epochs, p.boxes, p.law, p.arch)
        for name, p in presets.items() if name != "demo"
    }  # fmt: skip
    shared = (10, "grid", "resnet50")
    assert table == {
        "imagenet-200ep": (200, 0.45, 1e-6, 0.97, 8192, 10.0, *shared),
        "imagenet-1000ep": (1000, 0.2, 1.5e-6, 0.996, 8192, 10.0, *shared),
        "imagenet-1000ep-paper": (1000, 0.45, 1.5e-6, 0.97, 8192, 10.0, *shared),
        "coco-as-imagenet-200ep": (2229, 0.45, 1e-6, 0.97, 8192, 111, *shared),
    }
    coco, imagenet = 118_287 // 8192, 1_281_167 // 8192
    assert presets["coco-as-imagenet-200ep"].epochs * coco == pytest.approx(200 * imagenet, abs=coco)
    with torch.device("meta"):
        deep = scrl.Model(common.parse(scrl.Config, presets, ["--preset", "imagenet-200ep", "--arch", "resnet101"]))
    assert [deep.student.projector[i].weight.shape for i in (0, 3)] == [(4096, 2048), (256, 4096)]
    assert [deep.predictor[i].weight.shape for i in (0, 3)] == [(4096, 256), (256, 4096)]
    assert len(deep.student.trunk.layer3) == 23
    assert scrl.recipe(presets["imagenet-200ep"]).views[0].scale == (0.2, 1.0)

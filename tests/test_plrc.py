"""What PLRC alone must get right: regions and points of two views, the teacher's points, the weights of the terms."""

import dataclasses
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

import geoaug
from data_prep import make_scenes
from geoaug import Key, ViewSpec, grids, losses, plan_views, regions
from tests import reference_points, training
from trainers import common, plrc

CELLS = (20, 12)


def command(data, output, *more):
    return training.command("plrc", data, output, "--size", "64", *more)


def config_of(*more):
    return common.parse(plrc.Config, plrc.PRESETS, command(Path("x"), Path("x"), *more))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    assert make_scenes.main(["--out", str(folder), "--images", "16", "--size", "96", "--workers", "1"]) == 0
    return folder / "instances.json"


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def main(data, output, *more):
    plrc.main(common.parse(plrc.Config, plrc.PRESETS, command(data, output, *more)))
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return training.logged(output)


@pytest.fixture(scope="module")
def batch(scenes):
    specs = geoaug.recipes.recipe("plrc").at(64).views
    with geoaug.open_loader(scenes, specs, batch_size=8, seed=0, workers=0, label_map="instance") as loader:
        return next(iter(loader))


def batch_of(plan, ok=None):
    """A batch without pixels: what `find_points` reads."""
    n = len(plan.ids)
    return SimpleNamespace(
        plan=plan, key=plan.key, ok=torch.ones(n).bool() if ok is None else ok, boxes=torch.zeros(n, 0, 4),
        box_valid=torch.zeros(n, 0).bool(), label_map=None,
    )  # fmt: skip


def views(n=60, scale=(0.2, 1.0)):
    sizes = torch.tensor([[48, 80], [200, 400], [97, 131]])[torch.arange(n) % 3]  # a grid's lines may cut pixels
    return plan_views([ViewSpec(64, scale), ViewSpec(64, scale)], sizes.numpy(), range(n), seed=0, epoch=0)


def drawn(plan, law="grid:4", teacher="mapped", slots=16, points=5, ok=None):
    return common.find_points(batch_of(plan, ok), law, slots, points, cells=CELLS, teacher=teacher)


# -- regions and points -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 4])
def test_regions_are_those_of_a_grid_painted_and_cropped_pixel_by_pixel(n):
    plan = views(30)
    found = drawn(plan, f"grid:{n}")
    centres = grids.cell_centers(*CELLS).tolist()
    for i in range(30):
        picture = reference_points.painted(n, *plan.source_size[i].tolist())
        for view, points, ids in ((0, found.v, found.ids), (1, found.v2, found.ids2)):
            pixels = reference_points.cropped(picture, plan.crop[i, view].tolist(), bool(plan.flipped[i, view]))
            h, w = len(pixels), len(pixels[0])
            labels = regions.label_map(plan.view_from_source[i : i + 1, view], n, CELLS).flatten().tolist()
            claims = [*zip(points[i].tolist(), ids[i].tolist(), strict=True), *zip(centres, labels, strict=True)]
            assert len(claims) == 80 + CELLS[0] * CELLS[1]
            cut = 0
            for (x, y), region in claims:
                if min(abs(x * w - round(x * w)), abs(y * h - round(y * h))) > 1e-4:  # not on an edge of two pixels
                    painted = pixels[int(y * h)][int(x * w)]
                    cut += painted is None
                    assert painted in (None, region)
            assert cut < len(claims) / 4


def test_published_vector_eight_painted():
    picture = reference_points.painted(4, 200, 400)
    assert (picture[199][399], picture[0][100], picture[0][99]) == (15, 1, 0)
    points = torch.tensor([[399 / 400, 199 / 200], [100 / 400, 0.0], [99 / 400, 0.0]])
    assert regions.region_of(points, 4).tolist() == [15, 1, 0]


@pytest.mark.parametrize("teacher", ["mapped", "extra", "slot"])
def test_the_teacher_sees_what_it_should(teacher):
    plan = views()
    v, v2 = (plan.view_from_source[:, view] for view in (0, 1))
    ok = torch.arange(60) != 7
    found = drawn(plan, teacher=teacher, ok=ok)
    source, source2 = (~v)(found.v), (~(v if teacher == "extra" else v2))(found.twins)
    seen = found.distilled
    assert 0.3 < seen.float().mean() <= 1
    assert not seen[7].any()
    assert (found.ids[7] == found.ids2[7]).all()
    assert found.ids[7].max() == -1
    assert torch.equal(found.shared, losses.positive_pairs(found.ids, found.ids2) > 0)
    assert (seen.any(1) <= found.shared).all()
    if teacher == "slot":  # another point of the region, and one that v' has drawn
        inside = regions.region_of(source2.clamp(0, 1), 4)
        assert (inside == found.ids)[seen].float().mean() > 0.999
        assert not torch.allclose(source[seen], source2[seen], atol=0.01)
        assert all((found.v2[i] == p).all(-1).any() for i in range(60) for p in found.twins[i][seen[i]])
        shared = (found.ids[:, :, None] == found.ids2[:, None]).any(-1) & ok[:, None]
        assert torch.equal(seen, shared)
    else:
        assert torch.allclose(source[seen], source2[seen], atol=1e-5)
    if teacher == "mapped":
        inside = ((found.twins >= 0) & (found.twins < 1)).all(-1)
        assert torch.equal(seen, inside & (found.ids >= 0) & found.shared[:, None])
        assert not inside.all()


def with_crops(plan, first, second):
    """The same plan with one crop for all in each view, in shares of the source."""
    sides = plan.source_size[:, [1, 0, 1, 0]]
    crop = torch.stack([(sides * torch.tensor(box)).round().int() for box in (first, second)], dim=1)
    return dataclasses.replace(plan, crop=crop)


@pytest.mark.parametrize("teacher", ["mapped", "extra", "slot"])
def test_views_that_share_no_region_have_no_point_loss(teacher):
    plan = with_crops(views(), (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0))
    found = drawn(plan, teacher=teacher)
    assert found.ids.min() >= 0 <= found.ids2.min()
    assert not found.shared.any()
    assert not found.distilled.any()


def test_regions_of_boxes_and_masks_are_the_same_objects_in_both_views(batch):
    for law in ("boxes", "masks"):
        found = common.find_points(batch, law, 16, 4, cells=(24, 24), teacher="mapped")
        for view, points, ids in ((0, found.v, found.ids), (1, found.v2, found.ids2)):
            source = (~batch.plan.view_from_source[:, view])(points)
            for i in range(len(batch)):
                for (x, y), k in zip(source[i].tolist(), ids[i].tolist(), strict=True):
                    if k < 0:
                        continue
                    x0, y0, x1, y1 = batch.boxes[i, k].tolist()
                    assert x0 - 0.01 <= x <= x1 + 0.01
                    assert y0 - 0.01 <= y <= y1 + 0.01
        assert found.shared.float().mean() > 0.5
        if law == "masks":
            under = regions.lookup(batch.label_map, (~batch.plan.view_from_source[:, 0])(found.v))
            assert torch.equal(under, found.ids)
    batch = dataclasses.replace(batch, box_valid=torch.zeros_like(batch.box_valid))
    none = common.find_points(batch, "boxes", 16, 4, cells=(24, 24), teacher="mapped")
    assert none.ids.max() == none.ids2.max() == -1
    assert not none.shared.any()


# -- outputs come back to their images --------------------------------------------------------------------------------


def returned(rank, ids):
    """Each row's image, points and features carry its index; the rows are dealt anew and back."""
    seen = []

    def teacher(images, points):
        rows = images[:, 0, 0, 0]
        assert torch.equal(points[:, 0, 0], rows)
        seen.append(rows)
        return rows[:, None] + torch.tensor([0.0, 0.25]), torch.cat((points, rows[:, None, None].expand(-1, 3, 1)), 2)

    mine = torch.arange(8.0)[4 * rank : 4 * rank + 4]
    model = SimpleNamespace(config=SimpleNamespace(norm="shuffle"), teacher=teacher)
    images, points = mine[:, None, None, None].expand(-1, 3, 2, 2), mine[:, None, None].expand(-1, 3, 2)
    vectors, features = plrc.Model.of_teacher(model, images, points, Key(0, 0, ids)[4 * rank : 4 * rank + 4].fold("k"))
    gathered = common.gathered(mine)
    return {
        "mine": mine,
        "vectors": vectors,
        "features": features,
        "seen": seen[0],
        "all": gathered,
        "rank": common.rank(),
    }


def test_shuffling_brings_every_output_back_to_its_image(tmp_path):
    ranks = training.on_ranks(returned, tmp_path, list(range(30, 38)))
    for r, found in enumerate(ranks):
        rows = found["mine"]
        assert torch.equal(found["vectors"], rows[:, None] + torch.tensor([0.0, 0.25]))
        assert torch.equal(found["features"], rows[:, None, None].expand(-1, 3, 3))
        assert set(found["seen"].tolist()) != set(rows.tolist())
        assert found["all"].tolist() == list(range(8))
        assert found["rank"] == r


def contrast_of(rank, negatives):
    config = plrc.Config(slots=2, points=3, negatives=negatives)
    generator = torch.Generator().manual_seed(0)
    p, p2 = (torch.randn(4, 6, 5, generator=generator) for _ in "ab")
    ids, ids2 = (torch.randint(0, 3, (4, 2), generator=generator).repeat_interleave(3, 1) for _ in "ab")
    mine = slice(2 * rank, 2 * rank + 2) if rank is not None else slice(0, 4)
    points = SimpleNamespace(ids=ids[mine], ids2=ids2[mine])
    return plrc.Model.contrast(SimpleNamespace(config=config), p[mine], p2[mine], points)


def test_negatives_are_of_the_image_the_process_or_the_whole_batch(tmp_path):
    found = {n: torch.cat(training.on_ranks(contrast_of, tmp_path / n, n)) for n in ("global", "local", "image")}
    whole = {n: contrast_of(None, n) for n in found}
    assert torch.allclose(found["global"], whole["global"])
    assert torch.allclose(whole["global"], whole["local"])
    assert torch.allclose(found["image"], whole["image"])
    valid = whole["global"] > 0
    assert (whole["global"] > found["local"])[valid].all()
    assert (found["local"] > whole["image"])[valid].all()


# -- the loss ---------------------------------------------------------------------------------------------------------


def vectors(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("strategy", [1, 2, 3])
@pytest.mark.parametrize("across", ["image", "batch"])
def test_the_three_strategies_against_the_loop(strategy, across):
    """Eq. 4 with the paper's section 4.5.2: i and k are points of v, k' of strategy 1 the key points of v'."""
    p, p2, twins = (vectors(2, 6, 5, seed=i) for i in range(3))
    points = SimpleNamespace(ids2=torch.tensor([[0, 0, 0, 1, 1, 1], [-1, -1, -1, 2, 2, 2]]),
                             distilled=torch.tensor([[1, 1, 0, 1, 0, 1], [0, 1, 1, 0, 1, 1]]).bool())  # fmt: skip
    config = plrc.Config(affinity=strategy, affinity_keys=across)
    found = plrc.Model.affinity(SimpleNamespace(config=config), p, p2, twins, points)
    student, teacher = {1: (p, twins), 2: (p, p), 3: (p, twins)}[strategy]
    keys, its_keys = {1: (p2, p2), 2: (p, twins), 3: (p, twins)}[strategy]
    valid = points.ids2 >= 0 if strategy == 1 else points.distilled
    lists = [x.tolist() for x in (student, keys, teacher, its_keys, valid)]
    expected = reference_points.distillation(*lists, 0.1, 0.07, inter=across == "batch")
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64))


def test_region_level_is_the_contrast_of_the_means_of_slots():
    p, p2 = (vectors(2, 6, 5, seed=i) for i in range(2))
    ids, ids2 = torch.tensor([[0, 1], [2, 2]]), torch.tensor([[1, 1], [2, 0]])
    points = SimpleNamespace(ids=ids.repeat_interleave(3, 1), ids2=ids2.repeat_interleave(3, 1))
    found = plrc.Model.contrast(SimpleNamespace(config=plrc.Config(slots=2, points=3, level="region")), p, p2, points)
    means = [x.view(2, 2, 3, 5).mean(2).tolist() for x in (p, p2)]
    expected, _ = reference_points.region_contrast(means[0], ids.tolist(), means[1], ids2.tolist(), 0.2)
    assert found.tolist() == pytest.approx(expected)


def test_points_are_read_where_they_lie():
    """Features that hold their own place: the encoder's trunk and projector replaced by coordinates."""
    config = plrc.Config(arch="resnet10-narrow", hidden=8, dim=2, upsample=28)
    encoder = plrc.Encoder(config)
    del encoder.trunk, encoder.projector
    encoder.trunk = lambda images: grids.cell_centers(4, 7).mT.reshape(1, 2, 4, 7).expand(2, -1, -1, -1)
    encoder.projector = lambda x: x
    points = torch.tensor([[0.5, 0.5], [0.3, 0.71], [0.85, 0.2]]).expand(2, -1, -1)
    whole, found = encoder(torch.zeros(2, 3, 8, 8), points)
    assert torch.allclose(found, points, atol=0.01)
    assert torch.allclose(whole, torch.full((2, 2), 0.5))
    encoder.upsample = None
    assert torch.allclose(encoder(torch.zeros(2, 3, 8, 8), points)[1], points, atol=1e-6)


def model_of(batch, *more):
    config = config_of("--regions", "grid:4", *more)
    torch.manual_seed(0)
    model = plrc.Model(config).eval()
    queue = model.queue.vectors.shape
    model.queue.enqueue(torch.nn.functional.normalize(torch.randn(queue), dim=1), torch.ones(queue[0]).bool())
    points = plrc.find_points(batch, config)
    terms = batch.ok.sum(), points.shared.sum(), points.distilled.any(1).sum()
    return model, (batch, points, torch.stack(terms).float())


def test_the_terms_are_weighed_as_equations_five_and_six_say(batch):
    for more, distil, weights in (
        ((), True, (0.7 * 0.5, 0.7 * 0.5, 0.3)),
        ((), False, (0.7 * 0.5, 0.0, 0.3)),
        (("--warmup-weight", "one"), False, (0.7, 0.0, 0.3)),
        (("--warmup-weight", "one"), True, (0.7 * 0.5, 0.7 * 0.5, 0.3)),
        (("--alpha", "0.3", "--beta", "0.9"), True, (0.9 * 0.3, 0.9 * 0.7, 0.1)),
        (("--alpha", "1"), True, (0.7, 0.0, 0.3)),
        (("--level", "region"), True, (0.7, 0.0, 0.3)),
    ):
        model, inputs = model_of(batch, *more)
        loss, log = model(*inputs, distil)
        parts = [log["contrast"], log.get("affinity", torch.zeros(())), log["image"]]
        assert ("affinity" in log) == (weights[1] > 0)
        assert all(math.isfinite(float(x)) and x > 0 for x in parts if x is not parts[1])
        expected = sum(w * float(x) for w, x in zip(weights, parts, strict=True))
        assert loss.item() == pytest.approx(expected, rel=1e-5), more


def test_images_whose_views_share_nothing_keep_the_image_loss_alone(batch):
    plan = with_crops(batch.plan, (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0))
    apart = dataclasses.replace(batch, plan=plan)
    for more in ((), ("--teacher-points", "extra", "--affinity", "3"), ("--level", "region"), ("--regions", "masks")):
        model, inputs = model_of(apart, *more)
        loss, log = model(*inputs, True)
        loss.backward()
        if more[:1] != ("--regions",):
            assert log["contrast"] == 0
            assert loss.item() == pytest.approx(0.3 * float(log["image"]))
        assert all(p.grad.isfinite().all() for p in model.student.parameters())


def test_a_single_image_is_contrasted_with_itself(batch):
    model, inputs = model_of(batch.split(8)[0])
    loss, log = model.train()(*inputs, True)
    loss.backward()
    assert log["contrast"] > 0
    assert math.isfinite(loss.item())
    assert all(p.grad.isfinite().all() for p in model.student.parameters())


# -- runs -------------------------------------------------------------------------------------------------------------


def test_distillation_starts_after_its_warm_up_and_a_run_goes_on_bit_by_bit(scenes, tmp_path):
    more = ("--epochs", "3", "--affinity-warmup", "1", "--max-steps")
    whole = main(scenes, tmp_path / "whole", *more, "4")
    assert ["affinity" in line for line in whole] == [False, False, True, True]
    main(scenes, tmp_path / "parts", *more, "2")
    parts = main(scenes, tmp_path / "parts", *more, "4")
    strip = [{k: v for k, v in line.items() if k[-2:] not in ("_s", "mb")} for line in whole]
    assert strip == [{k: v for k, v in line.items() if k[-2:] not in ("_s", "mb")} for line in parts]
    states = [training.newest(tmp_path / name)["model"] for name in ("whole", "parts")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_boxes_of_a_store_are_the_regions(scenes, tmp_path, monkeypatch):
    """Two boxes an image, the left and the right half, which no json knows of."""
    record = json.loads(scenes.read_text())
    halves = {}
    for image in record["images"]:
        h, w = image["height"], image["width"]
        boxes = np.array([[0, 0, w // 2, h], [w // 2, 0, w, h]], dtype=np.uint16)
        halves[image["file_name"]] = ((h, w), boxes)
    geoaug.ProposalStore.write(tmp_path / "store", [(name, *each) for name, each in halves.items()])
    seen, find = [], plrc.find_points

    def watched(batch, config):
        seen.append((batch, find(batch, config)))
        return seen[-1][1]

    monkeypatch.setattr(plrc, "find_points", watched)
    more = ("--regions", "boxes", "--proposals", str(tmp_path / "store"), "--max-steps", "2")
    lines = main(scenes.parent / "images", tmp_path / "run", *more)
    assert all(math.isfinite(line["loss"]) and line["contrast"] > 0 for line in lines)
    assert len(seen) == 2
    for batch, points in seen:
        assert batch.box_valid.sum(1).tolist() == [2] * 8
        source = (~batch.plan.view_from_source[:, 0])(points.v)
        for i, name in enumerate(batch.names):
            (_, width), boxes = halves[Path(name).name]
            side = (batch.boxes[i, points.ids[i], 0] > 0).tolist()  # a point of the right half?
            assert (points.ids[i] >= 0).all()
            assert [x >= boxes[0, 2] / width - 1e-5 for x in source[i, :, 0].tolist()] == side


def test_the_default_warm_up_is_thirty_epochs_or_a_part_of_a_short_run():
    assert plrc.warmup_of(plrc.Config(epochs=200)) == 30
    assert plrc.warmup_of(plrc.Config(epochs=100)) == 15
    assert plrc.warmup_of(plrc.Config(epochs=800)) == 30
    assert plrc.warmup_of(plrc.Config(epochs=100, affinity_warmup=0.0)) == 0


def told(monkeypatch, capsys, arguments):
    monkeypatch.setattr(sys, "argv", ["trainers/plrc.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        common.launch(plrc.main, plrc.Config, plrc.PRESETS)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_masks_and_boxes_must_be_there(scenes, tmp_path, monkeypatch, capsys):
    bare = json.loads(scenes.read_text())
    for annotation in bare["annotations"]:
        del annotation["segmentation"]
    (tmp_path / "bare.json").write_text(json.dumps(bare))
    images = scenes.parent / "images"
    for data, more, message in (
        (images, ("--regions", "masks"), "--regions masks needs --data to be a COCO json with masks, got"),
        (images, ("--regions", "boxes"), "--data has no boxes: give --proposals STORE"),
        (tmp_path / "bare.json", ("--regions", "masks", "--images", str(images)), "--data has no masks: give a COCO"),
    ):
        arguments = command(data, tmp_path / "run", *more)
        line = told(monkeypatch, capsys, arguments)
        assert message in line
        assert len(line.splitlines()) == 1
        AcceleratorState._reset_state(reset_partial_state=True)
    assert not (tmp_path / "run").exists()

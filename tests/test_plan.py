import json
import pickle

import numpy as np
import pytest
import torch
import torchvision
from scipy import stats
from torch.utils.data import default_collate

from geoaug import Plan, ViewSpec, plan_views
from geoaug.geometry import kernels

from . import reference

SPECS = [
    ViewSpec.whole(224),
    ViewSpec((224, 160), scale=(0.2, 1.0)),
    ViewSpec.like(1, 112),
    ViewSpec(64, scale=(0.05, 0.3), ratio=(0.5, 2.0), flip=1.0),
    ViewSpec(96, scale=(0.5, 1.0), law="side", within=3),
]


def some(n=40, seed=0):
    g = np.random.default_rng(seed)
    return g.integers(1, 700, (n, 2)), g.integers(0, 2**62, n)


def make(n=40, specs=SPECS, seed=0, epoch=0):
    sizes, ids = some(n)
    return plan_views(specs, sizes, ids, seed=seed, epoch=epoch)


@pytest.mark.parametrize(
    ("scale", "ratio"), [((0.08, 1.0), (3 / 4, 4 / 3)), ((0.9, 1.0), (0.2, 0.3)), ((0.3, 0.3), (1, 1))]
)
def test_crop_law_against_the_loop(scale, ratio):
    sizes, ids = some(300)
    plan = plan_views([ViewSpec(224), ViewSpec(224, scale, ratio, flip=0.3)], sizes, ids, seed=3, epoch=8)
    tag = plan.key.tag("plan/1")
    for i, (height, width) in enumerate(sizes.tolist()):
        words = reference.stream(3, 8, int(ids[i]), tag, 28)
        assert plan.crop[i, 1].tolist() == list(reference.crop_law(height, width, scale, ratio, words))
        assert bool(plan.flipped[i, 1]) == (reference.unit(words[24]) < 0.3)


def test_crop_law_agrees_with_torchvision_over_200000_draws():
    n, height, width = 200_000, 375, 500
    torch.manual_seed(0)
    image = torch.zeros(1, height, width)
    get = torchvision.transforms.RandomResizedCrop.get_params
    theirs = np.array([get(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(n)])
    sizes = np.tile([height, width], (n, 1))
    ours = plan_views([ViewSpec(224, (0.2, 1.0))], sizes, np.arange(n), seed=0, epoch=0).crop[:, 0].numpy()
    columns = [ours[:, 1], ours[:, 0], ours[:, 3] - ours[:, 1], ours[:, 2] - ours[:, 0]]
    for mine, other in zip(columns, theirs.T, strict=True):
        assert stats.ks_2samp(mine, other).statistic < 0.005  # 1 % critical value at 200k against 200k: 0.0051
    assert stats.ks_2samp(columns[2] * columns[3], theirs[:, 2] * theirs[:, 3]).statistic < 0.005


def test_centre_fallback_is_torchvisions():
    get = torchvision.transforms.RandomResizedCrop.get_params
    for height, width in [(10, 400), (400, 10), (1, 50), (2, 40)]:
        image = torch.zeros(1, height, width)
        ratio = [3 / 4, 4 / 3]
        i, j, h, w = get(image, [1.0, 1.0], ratio)  # a whole image of another aspect is never accepted
        crop = plan_views([ViewSpec(8, (1.0, 1.0))], [[height, width]], [5], seed=0, epoch=0).crop[0, 0].tolist()
        assert crop == [j, i, j + w, i + h]


def test_rows_do_not_depend_on_batch_or_order():
    sizes, ids = some(64)
    whole = plan_views(SPECS, sizes, ids, seed=1, epoch=2)
    order = np.random.default_rng(1).permutation(64)
    shuffled = plan_views(SPECS, sizes[order], ids[order], seed=1, epoch=2)
    assert torch.equal(shuffled.crop, whole.crop[order])
    assert torch.equal(shuffled.flipped, whole.flipped[order])
    parts = Plan.cat([plan_views(SPECS, sizes[a : a + 8], ids[a : a + 8], seed=1, epoch=2) for a in range(0, 64, 8)])
    assert parts.to_dict() == whole.to_dict()


def test_operators_that_follow_a_plan_draw_anew_each_epoch():
    keys = [make(epoch=epoch, seed=seed).key for epoch, seed in ((0, 0), (1, 0), (0, 1))]
    assert [(key.epoch, key.seed) for key in keys] == [(0, 0), (1, 0), (0, 1)]
    first, *others = (key.uniform("boxes", 8) for key in keys)
    assert not any(torch.equal(first, other) for other in others)
    assert torch.equal(first, make().key.uniform("boxes", 8))


def test_every_epoch_seed_and_view_is_another_draw():
    specs = [ViewSpec(224), ViewSpec(224)]
    first = make(200, specs)
    for other in (make(200, specs, epoch=1), make(200, specs, seed=1)):
        assert (first.crop != other.crop).any(-1).float().mean() > 0.8
    assert (first.crop[:, 0] != first.crop[:, 1]).any(-1).float().mean() > 0.8
    assert 0.3 < (first.flipped[:, 0] ^ first.flipped[:, 1]).float().mean() < 0.7


def test_a_view_keeps_its_draw_whatever_stands_beside_it():
    assert torch.equal(make(30, [ViewSpec(224)]).crop[:, 0], make(30, [ViewSpec(96), *SPECS]).crop[:, 0])


def test_flips_come_as_often_as_asked():
    specs = [ViewSpec(8, flip=p) for p in (0.0, 0.25, 1.0)] + [ViewSpec.whole(8, flip=0.5)]
    shares = make(4000, specs).flipped.float().mean(0).tolist()
    assert shares[0] == 0
    assert shares[1] == pytest.approx(0.25, abs=0.03)
    assert shares[2] == 1
    assert shares[3] == pytest.approx(0.5, abs=0.03)


def test_maps_agree_with_pixels_one_by_one():
    plan = make()
    points = torch.rand(40, 5, 3, 2, generator=torch.Generator().manual_seed(0))
    mapped = plan.view_from_source(points)
    for i in range(len(plan)):
        for v in range(5):
            crop, flipped, size = plan.crop[i, v].tolist(), bool(plan.flipped[i, v]), plan.source_size[i].tolist()
            expected = [reference.map_point(crop, flipped, size, p) for p in points[i, v].tolist()]
            assert torch.allclose(mapped[i, v], torch.tensor(expected), rtol=1e-5, atol=1e-4)


def test_forms_of_a_view():
    plan = make(100)
    sizes = plan.source_size
    height, width = sizes.unbind(-1)
    zero = torch.zeros_like(width)
    assert torch.equal(plan.crop[:, 0], torch.stack((zero, zero, width, height), -1))
    assert not plan.flipped[:, 0].any()
    assert torch.equal(plan.crop[:, 2], plan.crop[:, 1])
    assert torch.equal(plan.flipped[:, 2], plan.flipped[:, 1])
    assert plan.flipped[:, 3].all()
    inner, outer = plan.crop[:, 4], plan.crop[:, 3]
    assert (inner[:, :2] >= outer[:, :2]).all()
    assert (inner[:, 2:] <= outer[:, 2:]).all()
    assert torch.equal(inner[:, 2] - inner[:, 0], inner[:, 3] - inner[:, 1])
    assert plan.view_sizes == ((224, 224), (224, 160), (112, 112), (64, 64), (96, 96))


def test_within_measures_shares_of_the_outer_crop():
    specs = [ViewSpec.center(320), ViewSpec(64, scale=(0.25, 0.25), ratio=(1, 1), within=0)]
    plan = plan_views(specs, np.tile([400, 600], (200, 1)), np.arange(200), seed=0, epoch=0)
    crop = plan.crop[:, 1]
    assert (crop[:, 2:] - crop[:, :2] == 200).all()  # half of the 400-pixel centre square
    assert crop[:, 0].min() >= 100
    assert crop[:, 2].max() <= 500
    assert len(crop[:, 0].unique()) > 50


def test_side_law_draws_squares_by_side_length():
    n = 20_000
    plan = plan_views(
        [ViewSpec(64, (0.5, 1.0), law="side")], np.tile([300, 400], (n, 1)), np.arange(n), seed=0, epoch=0
    )
    side = plan.crop[:, 0, 2] - plan.crop[:, 0, 0]
    assert torch.equal(side, plan.crop[:, 0, 3] - plan.crop[:, 0, 1])
    assert stats.kstest((side.numpy() - 150) / 150, "uniform").statistic < 0.02


@pytest.mark.parametrize(
    ("spec", "size", "crop"),
    [
        (ViewSpec.center(224, 256), (300, 500), (119, 19, 381, 281)),  # 300 * 224 / 256 = 262.5 -> 262
        (ViewSpec.center(224), (300, 500), (100, 0, 400, 300)),
        (ViewSpec.center(224), (300, 501), (100, 0, 400, 300)),  # an odd margin: the spare pixel lies behind
        (ViewSpec.center((100, 200)), (300, 500), (0, 25, 500, 275)),
        (ViewSpec.center((200, 100)), (300, 500), (175, 0, 325, 300)),
        (ViewSpec.center(224, 256), (1, 1), (0, 0, 1, 1)),
    ],
)
def test_center(spec, size, crop):
    assert plan_views([spec], [size], [3], seed=0, epoch=0).crop[0, 0].tolist() == list(crop)


@pytest.mark.parametrize(
    ("size", "view"),
    [((480, 640), (800, 1067)), ((200, 800), (333, 1333 - 1)), ((640, 480), (1067, 800)), ((1, 1), (800, 800))],
)
def test_short_side(size, view):
    plan = plan_views([ViewSpec.short_side(800, 1332)], [size], [3], seed=0, epoch=0)
    assert plan.view_sizes == (view,)
    assert plan.crop[0, 0].tolist() == [0, 0, size[1], size[0]]


def test_one_pixel_images():
    plan = plan_views(SPECS, [[1, 1]] * 3, [1, 2, 3], seed=0, epoch=0)
    assert (plan.crop == torch.tensor([0, 0, 1, 1], dtype=torch.int32)).all()


def test_an_empty_batch():
    for sizes in ([], np.zeros((0, 2), dtype=np.int64)):
        plan = plan_views([*SPECS, ViewSpec.short_side(8, 9), ViewSpec.center(8)], sizes, [], seed=0, epoch=0)
        assert len(plan) == 0
        assert plan.view_from_source.batch_shape == (0, 7)
        assert Plan.from_dict(plan.to_dict()).crop.shape == (0, 7, 4)


def test_a_plan_survives_json_pickle_and_collate():
    plan = make()
    for copy in (
        Plan.from_dict(json.loads(json.dumps(plan.to_dict()))),
        pickle.loads(pickle.dumps(plan)),
        Plan.cat([plan]),
    ):
        assert copy.to_dict() == plan.to_dict()
        assert copy.crop.dtype == torch.int32
    samples = [{"image": torch.zeros(2), "plan": row} for row in plan]
    assert default_collate(samples)["plan"].to_dict() == plan.to_dict()


def test_rows():
    plan = make()
    assert plan[3].to_dict() == plan[3:4].to_dict() == plan[torch.tensor([3])].to_dict() == plan[[3]].to_dict()
    assert plan[-1].ids.tolist() == plan.ids[-1:].tolist()
    assert torch.equal(plan[torch.arange(39, -1, -1)].crop, plan.crop.flip(0))
    assert [len(row) for row in plan] == [1] * 40
    assert torch.equal(plan[7].key.uniform("s", 3), plan.key.uniform("s", 3)[7:8])
    for row in (np.int64(3), torch.tensor(3)):
        assert plan[row].to_dict() == plan[3].to_dict()
    for row in (40, -41):
        with pytest.raises(IndexError, match="Plan: row must be in"):
            plan[row]


def test_memory_of_a_plan():
    plan = make(1000, [ViewSpec(224), ViewSpec(224)])
    tables = (plan.crop, plan.flipped, plan.source_size, plan.ids)
    assert sum(t.numel() * t.element_size() for t in tables) <= 48 * 2 * len(plan)


def test_the_kernel_compiles_once_for_any_number_of_views():
    make(3, SPECS)
    before = len(kernels.draw_crops.signatures)
    make(3, [ViewSpec(8)])
    make(3, [ViewSpec.center(8), ViewSpec(8, within=0)])
    assert len(kernels.draw_crops.signatures) == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_same_maps_on_a_gpu():
    plan = make()
    there = plan.to("cuda").view_from_source
    assert torch.equal(there.scale.cpu(), plan.view_from_source.scale)
    assert torch.equal(there.shift.cpu(), plan.view_from_source.shift)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ViewSpec(0), r"ViewSpec: size must be an integer in \[1, 16777216\], got 0"),
        (lambda: ViewSpec((1, 2, 3)), r"ViewSpec: size must be one side or \(height, width\)"),
        (lambda: ViewSpec(8, scale=(1.0, 0.2)), r"ViewSpec: scale must be \(low, high\).*got \(1.0, 0.2\)"),
        (lambda: ViewSpec(8, scale=(0.2, 1.2)), "ViewSpec: scale must"),
        (lambda: ViewSpec(8, scale=(float("nan"), 1.0)), "ViewSpec: scale must"),
        (lambda: ViewSpec(8, ratio=(2.0, 0.5)), "ViewSpec: ratio must"),
        (lambda: ViewSpec(8, ratio=(0.0, 0.5)), "ViewSpec: ratio must be positive"),
        (lambda: ViewSpec(8, flip=1.5), r"ViewSpec: flip must be a chance in \[0, 1\], got 1.5"),
        (lambda: ViewSpec(8, law="volume"), "ViewSpec: law must"),
        (lambda: ViewSpec(8, law="side", ratio=(1, 2)), "ViewSpec: ratio must be left out"),
        (lambda: ViewSpec.center(224, 200), r"ViewSpec.center: resize .* must be an integer in \[224"),
        (lambda: ViewSpec.short_side(800, 700), "ViewSpec.short_side: max_size must"),
        (lambda: ViewSpec(8, kind="bogus"), "ViewSpec: kind must be left to the named constructors, got 'bogus'"),
        (lambda: ViewSpec(8, kind="like"), "ViewSpec: view must be left to the named constructors"),
        (lambda: ViewSpec(8, view=0), "ViewSpec: view must be left to the named constructors"),
        (lambda: ViewSpec(8, flip=None), "ViewSpec: flip must be a chance"),
        (lambda: ViewSpec(8, scale=("a", 1)), "ViewSpec: scale must be a pair of numbers"),
        (lambda: plan_views(ViewSpec(8), [[5, 5]], [1], seed=0, epoch=0), "specs must be a list of ViewSpec"),
        (lambda: plan_views([8], [[5, 5]], [1], seed=0, epoch=0), "specs must be a list of ViewSpec"),
        (lambda: Plan.from_dict(make(2).to_dict() | {"view_sizes": [[0, 5]] * 5}), "view_sizes must be an integer"),
        (lambda: ViewSpec.like(-1, 8), "ViewSpec: view must"),
        (lambda: plan_views([], [[5, 5]], [1], seed=0, epoch=0), "plan_views: specs must be at least one ViewSpec"),
        (lambda: plan_views([ViewSpec.like(0, 8)], [[5, 5]], [1], seed=0, epoch=0), "must be an earlier view, got 0"),
        (lambda: plan_views([ViewSpec(8, within=1)], [[5, 5]], [1], seed=0, epoch=0), r"specs\[0\].within must be"),
        (
            lambda: plan_views([ViewSpec(8)], [[5, 5, 3]], [1], seed=0, epoch=0),
            r"must be \[N, 2\] \(height, width\), got \[1, 3\]",
        ),
        (lambda: plan_views([ViewSpec(8)], [[5, 0]], [1], seed=0, epoch=0), "plan_views: sizes must be sides in"),
        (
            lambda: plan_views([ViewSpec(8)], [[5, 5]], [1, 2], seed=0, epoch=0),
            "plan_views: ids must be one per size, 1, got 2",
        ),
        (lambda: plan_views([ViewSpec(8)], [[5, 5]], [1], seed=-1, epoch=0), "seed must"),
        (lambda: plan_views([ViewSpec.short_side(8, 9)], [[5, 5]] * 2, [1, 2], seed=0, epoch=0), "of one image"),
        (lambda: Plan.cat([]), "Plan.cat: plans must be at least one plan"),
        (lambda: Plan.cat([make(2), make(2, epoch=1)]), "Plan.cat: epoch must be the same in all plans"),
        (lambda: Plan.from_dict({"crop": []}), "Plan.from_dict: record must be a dict of"),
        (lambda: Plan.from_dict(make(2).to_dict() | {"crop": [[[0, 0, 9999, 1]] * 5] * 2}), "Plan: crop must be boxes"),
    ],
)
def test_bad_input(our_errors, build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_ids_are_a_copy_of_the_callers():
    ids = np.array([1, 2])
    plan = plan_views([ViewSpec(8)], [[5, 5]] * 2, ids, seed=0, epoch=0)
    ids[:] = 9
    assert plan.ids.tolist() == [1, 2]


@pytest.mark.parametrize("ids", [[0.5], torch.ones(1), ["a.jpg"], [None], [2**63]])
def test_ids_and_sizes_that_are_not_integers(our_errors, ids):
    with pytest.raises(TypeError, match="plan_views: ids must be integers"):
        plan_views([ViewSpec(8)], [[5, 5]], ids, seed=0, epoch=0)
    with pytest.raises(TypeError, match="plan_views: sizes must be integers"):
        plan_views([ViewSpec(8)], [[5.0, 5.5]], [1], seed=0, epoch=0)

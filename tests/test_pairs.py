import numpy as np
import pytest
import torch
from scipy import stats

from geoaug import AxisAffine, Key, ViewSpec, boxes, correspond, grids, matched_boxes, overlap, overlap_grid, plan_views
from geoaug.geometry import pairs

from . import reference

SIZES = ((224, 160), (96, 128))


def two_views(n=60, scale=(0.08, 1.0), seed=0):
    g = np.random.default_rng(seed)
    specs = [ViewSpec(size, scale) for size in SIZES]
    return plan_views(specs, g.integers(60, 500, (n, 2)), np.arange(n), seed=seed, epoch=0)


def maps(plan):
    return plan.view_from_source[:, 0], plan.view_from_source[:, 1]


def crops(*rows, size=(100, 200)):
    """Maps of crops (x0, y0, x1, y1) in pixels of one source size."""
    height, width = size
    return AxisAffine.sending(torch.tensor(rows, dtype=torch.float32) / torch.tensor([width, height] * 2))


def test_overlap_against_the_loop():
    plan = two_views()
    shared = overlap(*maps(plan))
    for i in range(len(plan)):
        height, width = plan.source_size[i].tolist()
        common = reference.intersect_crops(*plan.crop[i].tolist())
        assert bool(shared.valid[i]) == (common is not None)
        if common is None:
            assert not torch.stack(shared[:3])[:, i].any()
            continue
        unit = [common[0] / width, common[1] / height, common[2] / width, common[3] / height]
        assert shared.in_source[i].tolist() == pytest.approx(unit, abs=1e-5)
        for v, found in enumerate((shared.in_a, shared.in_b)):
            crop, flipped = plan.crop[i, v].tolist(), bool(plan.flipped[i, v])
            expected = reference.map_box(crop, flipped, (height, width), unit)
            assert found[i].tolist() == pytest.approx(expected, abs=1e-4)


def test_crops_that_only_touch_do_not_overlap():
    g = np.random.default_rng(0)
    for _ in range(200):
        width = int(g.integers(3, 4000))
        x = int(g.integers(1, width))
        shared = overlap(crops((0, 0, x, 50), size=(50, width)), crops((x, 0, width, 50), size=(50, width)))
        assert not shared.valid.any()
        shared = overlap(crops((0, 0, x, 50), size=(50, width)), crops((x - 1, 0, width, 50), size=(50, width)))
        assert shared.valid.all()


def test_published_vector_four():
    """Crops of 100 x 100 at (0, 0) and (50, 50) to 224 share 112 pixels; at (90, 0) 22, too few."""
    a = crops((0, 0, 100, 100), (0, 0, 100, 100), size=(300, 300))
    b = crops((50, 50, 150, 150), (90, 0, 190, 100), size=(300, 300))
    shared = overlap(a, b)
    assert pairs._coarser_pixels(shared, (224, 224), "test").tolist() == [[112, 112], [22, 224]]
    valid = matched_boxes(a, b, 10, sizes=(224, 224), key=Key(0, 0, [1, 2]))[2]
    assert valid.all(1).tolist() == [True, False]
    assert valid.any(1).tolist() == [True, False]


def test_an_overlap_of_exactly_the_least_size_is_too_small():
    a, b = crops((0, 0, 100, 100)), crops((68, 0, 168, 100))
    for least, usable in ((31, True), (32, False), (33, False)):
        assert matched_boxes(a, b, 2, sizes=(100, 100), key=Key(0, 0, [1]), min_size=least)[2].all() == usable


@pytest.mark.parametrize("on_fail", ["keep", "drop"])
@pytest.mark.parametrize("max_iou", [0.05, 0.5, 1.0])
def test_grid_law_against_the_loop(max_iou, on_fail):
    plan, k, least = two_views(20, (0.3, 1.0)), 6, 20
    a, b = maps(plan)
    found_a, found_b, valid = matched_boxes(
        a, b, k, sizes=SIZES, key=plan.key.fold("pair"), min_size=least, max_iou=max_iou, on_fail=on_fail
    )
    shared = overlap(a, b)
    sizes = pairs._coarser_pixels(shared, SIZES, "test").tolist()
    tag = plan.key.fold("pair").tag("boxes")
    dropped = 0
    for i in range(len(plan)):
        width, height = sizes[i]
        if not shared.valid[i] or min(width, height) <= least:
            assert not valid[i].any()
            assert not found_a[i].any()
            continue
        words = lambda block, i=i: reference.philox((int(plan.ids[i]), 0, tag, block), (0, 0))  # noqa: E731
        expected = reference.grid_boxes(width, height, k, least, max_iou, on_fail == "keep", words)
        x0, y0, x1, y1 = shared.in_source[i].tolist()
        for slot, box in enumerate(expected):
            assert bool(valid[i, slot]) == (box is not None)
            if box is None:
                dropped += 1
                assert not found_a[i, slot].any()
                continue
            source = [x0 + box[0] / width * (x1 - x0), y0 + box[1] / height * (y1 - y0),
                      x0 + box[2] / width * (x1 - x0), y0 + box[3] / height * (y1 - y0)]  # fmt: skip
            for v, found in enumerate((found_a, found_b)):
                crop, flipped = plan.crop[i, v].tolist(), bool(plan.flipped[i, v])
                mapped = reference.map_box(crop, flipped, plan.source_size[i].tolist(), source)
                assert found[i, slot].tolist() == pytest.approx(mapped, abs=1e-4)
    assert (dropped > 0) == (on_fail == "drop" and max_iou < 0.5)


@pytest.mark.parametrize("law", ["grid", "uniform"])
@pytest.mark.parametrize("keep", [True, False])
def test_lazy_and_vectorised_draws_are_the_same(law, keep):
    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(17, 225, (50, 2), generator=g, dtype=torch.int32)
    usable = torch.rand(50, generator=g) < 0.8
    key = Key(3, 1, range(50))
    for most in (0.1, 0.5, 1.0):
        arguments = (pixels, usable, key, 8, 16, most, law == "grid", keep)
        lazy, every = pairs._draw_lazily(*arguments), pairs._draw_all(*arguments)
        assert torch.equal(lazy[0], every[0])
        assert torch.equal(lazy[1], every[1])
        assert keep or most > 0.1 or not lazy[1][usable].all()


@pytest.mark.parametrize("law", ["grid", "uniform"])
def test_matched_boxes_are_one_source_rectangle_inside_both_views(law):
    plan = two_views(300)
    a, b = maps(plan)
    in_a, in_b, valid = matched_boxes(a, b, 10, sizes=SIZES, key=plan.key, law=law, min_size=16, on_fail="drop")
    back_a, back_b = (~a).boxes(in_a), (~b).boxes(in_b)
    assert valid.any(1).float().mean() > 0.7
    assert torch.allclose(back_a[valid], back_b[valid], atol=1e-5)
    for found in (in_a, in_b):
        assert found[valid].min() > -1e-4
        assert found[valid].max() < 1 + 1e-4
        assert not found[~valid].any()
    both = valid[:, :, None] & valid[:, None] & ~torch.eye(10, dtype=torch.bool)
    assert boxes.iou(back_a, back_a)[both].max() < 0.5 + 1e-3
    for found, (height, width) in zip((in_a, in_b), SIZES, strict=True):
        sides = (found[..., 2:] - found[..., :2]) * torch.tensor([width, height])
        assert sides[valid].min() > 16 * 0.97  # up to half a pixel of rounding in an overlap just over 16


def test_uniform_law_is_equation_one():
    n, size, least = 20_000, 100, 32
    whole = AxisAffine.identity(n)
    box = matched_boxes(whole, whole, 1, sizes=(size, size), key=Key(0, 0, range(n)), law="uniform")[0][:, 0] * size
    width = box[:, 2] - box[:, 0]
    assert stats.kstest((width.numpy() - least) / (size - least), "uniform").statistic < 0.015
    assert stats.kstest((box[:, 0] / (size - width)).numpy(), "uniform").statistic < 0.015
    assert abs(np.corrcoef(width, box[:, 3] - box[:, 1])[0, 1]) < 0.03


def test_grid_law_draws_inside_cells():
    n = 5000
    whole = AxisAffine.identity(n)
    box = matched_boxes(whole, whole, 1, sizes=(112, 112), key=Key(0, 0, range(n)))[0][:, 0] * 112
    width = (box[:, 2] - box[:, 0]).round()
    assert set(width.int().tolist()) == set(range(32, 113))
    # Of 3, 2 or 1 divisions each a third; cells of 37, 56 and 112 pixels: P(width <= 37) = 1/3 + 6/25/3 + 6/81/3.
    assert (width <= 37).float().mean().item() == pytest.approx((1 + 6 / 25 + 6 / 81) / 3, abs=0.03)


def test_matched_boxes_do_not_depend_on_the_batch():
    plan = two_views(64)
    a, b = maps(plan)
    whole = matched_boxes(a, b, 5, sizes=SIZES, key=plan.key)
    rows = torch.randperm(64, generator=torch.Generator().manual_seed(1))[:7]
    part = matched_boxes(a[rows], b[rows], 5, sizes=SIZES, key=plan.key[rows])
    for x, y in zip(whole, part, strict=True):
        assert torch.equal(x[rows], y)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_overlap_grid_against_the_loop(k):
    plan = two_views()
    points_a, points_b, valid = overlap_grid(*maps(plan), k)
    assert valid.shape == (60, k * k)
    for i in range(len(plan)):
        common = reference.intersect_crops(*plan.crop[i].tolist())
        assert bool(valid[i].all()) == bool(valid[i].any()) == (common is not None)
        if common is None:
            continue
        height, width = plan.source_size[i].tolist()
        x0, y0, x1, y1 = common
        source = [((x0 + (c + 0.5) / k * (x1 - x0)) / width, (y0 + (r + 0.5) / k * (y1 - y0)) / height)
                  for r in range(k) for c in range(k)]  # fmt: skip
        for v, found in enumerate((points_a, points_b)):
            crop, flipped = plan.crop[i, v].tolist(), bool(plan.flipped[i, v])
            expected = [reference.map_point(crop, flipped, (height, width), p) for p in source]
            assert torch.allclose(found[i], torch.tensor(expected), atol=1e-4)


def test_overlap_grid_leaves_out_small_overlaps():
    a, b = crops((0, 0, 100, 100), (0, 0, 100, 100)), crops((68, 0, 168, 100), (67, 0, 167, 100))
    assert overlap_grid(a, b, 2, sizes=(100, 100), min_size=32)[2].all(1).tolist() == [False, True]
    assert overlap_grid(a, b, 2)[2].all()


def test_correspond_against_the_loop():
    plan, (h, w) = two_views(), (5, 7)
    points, valid = correspond(*maps(plan), (h, w))
    assert points.shape == (60, 35, 2)
    centers = grids.cell_centers(h, w).tolist()
    for i in range(len(plan)):
        size = plan.source_size[i].tolist()
        for cell, center in enumerate(centers):
            source = reference.unmap_point(plan.crop[i, 0].tolist(), bool(plan.flipped[i, 0]), size, center)
            x, y = reference.map_point(plan.crop[i, 1].tolist(), bool(plan.flipped[i, 1]), size, source)
            assert points[i, cell].tolist() == pytest.approx((x, y), rel=1e-4, abs=1e-4)
            if min(abs(x), abs(x - 1), abs(y), abs(y - 1)) > 1e-5:
                assert bool(valid[i, cell]) == (0 <= x < 1 and 0 <= y < 1)


def test_mirrored_views_correspond_cell_by_cell():
    whole, mirrored = AxisAffine.identity(1), AxisAffine.flip_x(torch.tensor([True]))
    points, valid = correspond(whole, mirrored, (5, 7))
    assert valid.all()
    columns = (points.view(5, 7, 2)[..., 0] * 7 - 0.5).round().int()
    assert columns[0].tolist() == [6, 5, 4, 3, 2, 1, 0]


def test_an_overlap_is_rounded_to_whole_pixels():
    a, b = crops((0, 0, 100, 100)), crops((85, 0, 185, 100))
    assert pairs._coarser_pixels(overlap(a, b), (224, 224), "test").tolist() == [[34, 224]]  # 15 * 2.24 = 33.6


def test_a_point_at_zero_is_valid():
    b = AxisAffine(torch.ones(1, 2), torch.full((1, 2), -0.5))
    points, valid = correspond(AxisAffine.identity(1), b, (1, 1))
    assert points.tolist() == [[[0.0, 0.0]]]
    assert valid.all()


def test_valid_is_half_open():
    b = AxisAffine(torch.ones(1, 2), torch.tensor([[0.5, -0.5]]))
    points, valid = correspond(AxisAffine.identity(1), b, (1, 1))
    assert points.tolist() == [[[1.0, 0.0]]]
    assert not valid.any()


def test_degenerate_but_legal_input():
    plan = plan_views([ViewSpec(size) for size in SIZES], [[1, 1], [1, 500], [500, 1]], [1, 2, 3], seed=0, epoch=0)
    a, b = maps(plan)
    for result in (overlap(a, b), matched_boxes(a, b, 50, sizes=SIZES, key=plan.key), overlap_grid(a, b, 3)):
        assert all(bool(torch.isfinite(x.float()).all()) for x in result)
    empty = AxisAffine.identity(0)
    assert overlap(empty, empty).in_source.shape == (0, 4)
    assert matched_boxes(empty, empty, 3, sizes=SIZES, key=Key(0, 0, []))[2].shape == (0, 3)
    assert overlap_grid(empty, empty, 3)[0].shape == (0, 9, 2)
    assert correspond(empty, empty, (2, 3))[0].shape == (0, 6, 2)


def test_more_boxes_than_fit_are_kept_or_masked():
    whole, key = AxisAffine.identity(4), Key(0, 0, range(4))
    assert matched_boxes(whole, whole, 200, sizes=(40, 40), key=key)[2].all()
    dropped = matched_boxes(whole, whole, 200, sizes=(40, 40), key=key, on_fail="drop")[2]
    assert dropped[:, 0].all()
    assert dropped.float().mean() < 0.2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("law", ["grid", "uniform"])
def test_the_same_boxes_on_a_gpu_without_synchronising(law, monkeypatch):
    monkeypatch.setenv("GEOAUG_CHECK", "0")
    plan = two_views(256)
    here = matched_boxes(*maps(plan), 10, sizes=SIZES, key=plan.key, law=law)
    moved = plan.to("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        there = matched_boxes(*maps(moved), 10, sizes=SIZES, key=moved.key, law=law)
        overlap_grid(*maps(moved), 7), correspond(*maps(moved), (7, 7))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(there[2].cpu(), here[2])
    assert torch.equal(there[0].cpu(), here[0])
    assert torch.equal(there[1].cpu(), here[1])


ONE = AxisAffine.identity(1)
KEY = Key(0, 0, [1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: overlap(ONE, AxisAffine.identity(2)), r"overlap: b must be maps \[1\], got \[2\]"),
        (lambda: overlap(AxisAffine.identity(), ONE), r"overlap: a must be maps \[B\]"),
        (lambda: matched_boxes(ONE, ONE, 0, sizes=SIZES, key=KEY), "matched_boxes: k must be an integer in"),
        (lambda: matched_boxes(ONE, ONE, 1, sizes=(1, 2, 3), key=KEY), "matched_boxes: sizes must be"),
        (lambda: matched_boxes(ONE, ONE, 1, sizes=224, key=KEY), "matched_boxes: sizes must be"),
        (lambda: matched_boxes(ONE, ONE, 1, sizes=None, key=KEY), "matched_boxes: sizes must be"),
        (lambda: matched_boxes(ONE, ONE, 1, sizes=SIZES, key=3), "matched_boxes: key must be a Key, got 3"),
        (lambda: matched_boxes(ONE, ONE, 1, sizes=(0, 5), key=KEY), "matched_boxes: sizes must be an integer"),
        (lambda: matched_boxes(ONE, ONE, 1, sizes=SIZES, key=Key(0, 0, [1, 2])), "key must be a key of 1 ids, got 2"),
        (lambda: matched_boxes(ONE, ONE, 1, sizes=SIZES, key=KEY, min_size=0), "min_size must"),
        (
            lambda: matched_boxes(ONE, ONE, 1, sizes=SIZES, key=KEY, max_iou=0.0),
            r"max_iou must be in \(0, 1\], got 0.0",
        ),
        (
            lambda: matched_boxes(ONE, ONE, 1, sizes=SIZES, key=KEY, law="soco"),
            "law must be 'grid' or 'uniform', got 'soco'",
        ),
        (lambda: matched_boxes(ONE, ONE, 1, sizes=SIZES, key=KEY, on_fail="raise"), "on_fail must be"),
        (lambda: overlap_grid(ONE, ONE, 0), "overlap_grid: k must"),
        (lambda: overlap_grid(ONE, ONE, 3, min_size=5), "overlap_grid: sizes must be given when min_size is"),
        (lambda: correspond(ONE, ONE, (0, 3)), "correspond: size must be"),
    ],
)
def test_bad_input(our_errors, make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_types(our_errors):
    with pytest.raises(TypeError, match="overlap: b must be an AxisAffine"):
        overlap(ONE, torch.ones(1, 2))
    with pytest.raises(TypeError, match=r"matched_boxes: k must be an integer, got 2\.5"):
        matched_boxes(ONE, ONE, 2.5, sizes=SIZES, key=KEY)

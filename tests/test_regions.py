import numpy as np
import pytest
import torch
from scipy import stats

from geoaug import AxisAffine, Key, ViewSpec, grids, plan_views, regions

from . import reference

N, CELLS = 4, (5, 7)


def views(n=40, seed=0):
    g = np.random.default_rng(seed)
    return plan_views([ViewSpec(64, (0.05, 0.6))], g.integers(20, 300, (n, 2)), np.arange(n), seed=seed, epoch=0)


def source_of(plan, i, point):
    return reference.unmap_point(
        plan.crop[i, 0].tolist(), bool(plan.flipped[i, 0]), plan.source_size[i].tolist(), point
    )


def slow_region(x, y, n=N):
    if not (0 <= x <= 1 and 0 <= y <= 1):
        return -1
    return min(int(y * n), n - 1) * n + min(int(x * n), n - 1)


def test_published_vector_eight():
    points = torch.tensor([[399 / 400, 199 / 200], [100 / 400, 0.0]])
    assert regions.region_of(points, 4).tolist() == [15, 1]


def test_region_of_edges():
    points = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [-1e-6, 0.5], [0.5, 1.0001]])
    assert regions.region_of(points, 3).tolist() == [8, 2, 6, -1, -1]


def test_label_map_and_visible_against_the_loop():
    plan = views()
    a = plan.view_from_source[:, 0]
    labels, seen = regions.label_map(a, N, CELLS), regions.visible(a, N, CELLS)
    assert labels.shape == (40, 5, 7)
    for i in range(40):
        expected = [slow_region(*source_of(plan, i, c)) for c in grids.cell_centers(*CELLS).tolist()]
        assert (labels[i].flatten() == torch.tensor(expected)).float().mean() > 0.97  # centres on a grid line may round
        assert set(seen[i].nonzero().flatten().tolist()) == set(labels[i].flatten().tolist())


def test_a_view_beyond_the_source_sees_void():
    a = AxisAffine.sending(torch.tensor([[-1.0, 0.0, 1.0, 1.0]]))
    assert regions.label_map(a, 2, (2, 4)).tolist() == [[[-1, -1, 0, 1], [-1, -1, 2, 3]]]


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (64, 48)])
def test_lookup_against_the_loop(size):
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(-1, 9, (6, *size), generator=g)
    points = torch.rand(6, 50, 2, generator=g) * 1.4 - 0.2
    points[:, 0] = 1.0
    found = regions.lookup(labels, points)
    for i in range(6):
        for p, (x, y) in enumerate(points[i].tolist()):
            if min(abs(x * size[1] - round(x * size[1])), abs(y * size[0] - round(y * size[0]))) < 1e-4 and p:
                continue  # on an edge between two labels, where float32 may round either way
            inside = 0 <= x <= 1 and 0 <= y <= 1
            at = labels[i, min(int(y * size[0]), size[0] - 1), min(int(x * size[1]), size[1] - 1)] if inside else -1
            assert found[i, p] == at


def test_an_external_map_of_the_grid_gives_the_grid():
    plan = views()
    a = plan.view_from_source[:, 0]
    picture = regions.label_map(AxisAffine.identity(40), N, (4 * 9, 4 * 9))
    through = regions.lookup(picture, (~a)(grids.cell_centers(*CELLS))).view(40, *CELLS)
    assert (through == regions.label_map(a, N, CELLS)).float().mean() > 0.99


def as_boxes(n, batch):
    corner = grids.cell_centers(n, n) - 0.5 / n
    return torch.cat((corner, corner + 1 / n), -1).expand(batch, -1, 4)


@pytest.mark.parametrize("kind", ["grid", "boxes", "labels"])
def test_points_lie_in_their_region_and_in_the_view(kind):
    plan = views(200)
    a, key = plan.view_from_source[:, 0], plan.key
    what = {"grid": N, "boxes": as_boxes(N, 200), "labels": regions.label_map(AxisAffine.identity(200), N, (64, 64))}[
        kind
    ]
    points, ids, valid = regions.draw_points(a, what, 16, 9, key=key)
    assert points.shape == (200, 144, 2)
    assert ids.shape == (200, 144)
    assert valid.all()
    assert points.min() >= 0
    assert points.max() <= 1
    assert (regions.region_of((~a)(points).clamp(0, 1), N) == ids).float().mean() > 0.999
    slots = ids.view(200, 16, 9)
    assert torch.equal(slots, slots[:, :, :1].expand(-1, -1, 9))
    seen = regions.visible(a, N, (56, 56))
    assert seen.gather(1, ids).float().mean() > 0.999


def test_slots_are_uniform_over_what_is_visible():
    n = 3000
    a = AxisAffine.sending(torch.tensor([[0.0, 0.0, 0.75, 0.25]]))[torch.zeros(n, dtype=torch.int64)]
    ids = regions.draw_points(a, 4, 16, 1, key=Key(0, 0, range(n)))[1]
    assert set(ids.flatten().tolist()) == {0, 1, 2}
    assert stats.chisquare(torch.bincount(ids.flatten()).numpy()).pvalue > 1e-3


def test_points_are_uniform_over_the_visible_rectangle():
    n = 500
    a = AxisAffine.sending(torch.tensor([[0.1, 0.0, 0.5, 1.0]]))[torch.zeros(n, dtype=torch.int64)]
    points, ids, _ = regions.draw_points(a, 2, 8, 16, key=Key(0, 0, range(n)))
    first = points[ids == 0]
    assert stats.kstest(first[:, 0].numpy(), "uniform").statistic < 0.02
    assert stats.kstest((2 * first[:, 1]).numpy(), "uniform").statistic < 0.02


def test_label_points_are_uniform_over_the_labels_cells_and_labels_over_their_number():
    n = 2000
    labels = torch.full((n, 4, 4), -1)
    labels[:, 0, 0], labels[:, 1:, :2] = 70_000, 3  # one cell against six, and void
    points, ids, valid = regions.draw_points(
        AxisAffine.identity(n), labels, 4, 2, key=Key(0, 0, range(n)), cells=(4, 4)
    )
    assert valid.all()
    assert set(ids.flatten().tolist()) == {3, 70_000}
    assert (ids == 3).float().mean().item() == pytest.approx(0.5, abs=0.03)
    cells = ((points * 4 - 0.5).round().int() @ torch.tensor([1, 4], dtype=torch.int32))[ids == 3]
    counts = torch.bincount(cells)[[4, 5, 8, 9, 12, 13]]
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    assert counts.sum() == len(cells)


def test_boxes_that_are_hidden_or_empty_are_never_drawn():
    a = AxisAffine.sending(torch.tensor([[0.0, 0.0, 0.5, 0.5]]))
    boxes = torch.tensor([[[0.6, 0.6, 0.9, 0.9], [0.1, 0.1, 0.3, 0.4], [0.2, 0.2, 0.2, 0.2], [-3.0, -3.0, 0.2, 0.1]]])
    ids = regions.draw_points(a, boxes, 200, 1, key=Key(0, 0, [1]))[1]
    assert set(ids.flatten().tolist()) == {1, 3}


def test_an_unsigned_map_has_a_void_too():
    labels = torch.full((1, 3, 3), 255, dtype=torch.uint8)
    assert regions.lookup(labels, torch.tensor([[[0.5, 0.5], [1.5, 0.5]]])).tolist() == [[255, -1]]


def test_points_of_a_box_lie_inside_the_source():
    a = AxisAffine.sending(torch.tensor([[-1.0, 0.0, 1.0, 1.0]]))
    points = regions.draw_points(a, torch.tensor([[[-1.0, 0.0, 0.2, 1.0]]]), 4, 64, key=Key(0, 0, [1]))[0]
    assert points[..., 0].min() >= 0.5


def test_a_box_between_two_cell_centres_is_not_visible():
    boxes = torch.tensor([[[0.3, 0.0, 0.7, 1.0], [0.1, 0.0, 0.3, 1.0]]])  # centres of 2 cells: 0.25 and 0.75
    ids = regions.draw_points(AxisAffine.identity(1), boxes, 50, 1, key=Key(0, 0, [1]), cells=(2, 2))[1]
    assert set(ids.flatten().tolist()) == {1}


@pytest.mark.parametrize("what", ["boxes", "no boxes", "labels"])
def test_nothing_visible_gives_a_mask(what):
    nothing = {"boxes": torch.zeros(2, 3, 4), "no boxes": torch.zeros(2, 0, 4), "labels": torch.full((2, 3, 3), -1)}
    points, ids, valid = regions.draw_points(AxisAffine.identity(2), nothing[what], 4, 3, key=Key(0, 0, [1, 2]))
    assert not valid.any()
    assert (ids == -1).all()
    assert not points.any()
    assert points.shape == (2, 12, 2)


def test_draws_do_not_depend_on_the_batch():
    plan = views()
    a = plan.view_from_source[:, 0]
    for what in (N, as_boxes(N, 40), regions.label_map(AxisAffine.identity(40), N, (64, 64))):
        whole = regions.draw_points(a, what, 5, 3, key=plan.key)
        rows = slice(11, 17)
        part = regions.draw_points(a[rows], what if isinstance(what, int) else what[rows], 5, 3, key=plan.key[rows])
        for x, y in zip(whole, part, strict=True):
            assert torch.equal(x[rows], y)


def test_empty_batch():
    a, key = AxisAffine.identity(0), Key(0, 0, [])
    for what in (3, torch.zeros(0, 2, 4), torch.zeros(0, 5, 7, dtype=torch.int64)):
        points, ids, valid = regions.draw_points(a, what, 4, 3, key=key)
        assert (points.shape, ids.shape, valid.shape) == ((0, 12, 2), (0, 12), (0, 4))
    assert regions.visible(a, 3, (5, 7)).shape == (0, 9)
    assert regions.region_of(torch.zeros(0, 2), 3).shape == (0,)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_same_points_on_a_gpu_without_synchronising(monkeypatch):
    monkeypatch.setenv("GEOAUG_CHECK", "0")
    plan = views()
    there = plan.to("cuda")
    for what in (N, as_boxes(N, 40), regions.label_map(AxisAffine.identity(40), N, (64, 64))):
        here = regions.draw_points(plan.view_from_source[:, 0], what, 5, 3, key=plan.key)
        moved = what if isinstance(what, int) else what.cuda()
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = regions.draw_points(there.view_from_source[:, 0], moved, 5, 3, key=there.key)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for x, y in zip(here, found, strict=True):
            assert torch.equal(x, y.cpu())


ONE, KEY = AxisAffine.identity(1), Key(0, 0, [1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: regions.region_of(torch.zeros(3, 2), 0), "region_of: n must be an integer in"),
        (lambda: regions.region_of(torch.full((3, 2), float("nan")), 2), "region_of: points_in_source must be finite"),
        (lambda: regions.region_of(torch.zeros(3), 2), "region_of: points_in_source must be floating points"),
        (lambda: regions.label_map(AxisAffine.identity(), 2, (3, 3)), r"label_map: a must be maps \[B\]"),
        (lambda: regions.visible(ONE, 2, (0, 3)), "visible: size must"),
        (
            lambda: regions.lookup(torch.zeros(1, 0, 3, dtype=torch.int64), torch.zeros(1, 2, 2)),
            "lookup: label_map must",
        ),
        (
            lambda: regions.lookup(torch.zeros(1, 2, 3), torch.zeros(1, 2, 2)),
            r"integers \[1, H, W\].*float32 \[1, 2, 3\]",
        ),
        (lambda: regions.draw_points(ONE, 4, 0, 1, key=KEY), "draw_points: slots must"),
        (lambda: regions.draw_points(ONE, 4, 1, 0, key=KEY), "draw_points: points must"),
        (lambda: regions.draw_points(ONE, 4, 1, 1, key=Key(0, 0, [1, 2])), "draw_points: key must be a key of 1 ids"),
        (lambda: regions.draw_points(ONE, torch.zeros(2, 3, 4), 1, 1, key=KEY), r"regions must be boxes \[1, K, 4\]"),
        (lambda: regions.draw_points(ONE, torch.full((1, 1, 4), float("nan")), 1, 1, key=KEY), "must be finite"),
    ],
)
def test_bad_input(our_errors, make, message):
    with pytest.raises(ValueError, match=message):
        make()

import math

import numpy as np
import pytest
import torch

from geoaug import AxisAffine, Key, ViewSpec, plan_views
from geoaug.proposals import select


def random_boxes(g, n, height, width):
    low = np.stack((g.integers(0, width - 1, n), g.integers(0, height - 1, n)), 1)
    high = low + 1 + g.integers(0, 10**6, (n, 2)) % (np.array([width, height]) - low)
    return np.concatenate((low, high), 1).astype(np.uint16)


def xyxy(*rows):
    return np.array(rows, dtype=np.uint16).reshape(-1, 4)


def slow_soco(boxes, size):
    """SoCo's words, one rectangle (x, y, w, h) at a time; its w and h are one pixel short of the box."""
    height, width = size
    rects = [(x0, y0, x1 - 1 - x0, y1 - 1 - y0) for x0, y0, x1, y1 in boxes.tolist()]
    large = [r for r in rects if r[2] >= 32 and r[3] >= 32]
    square = [r for r in large if 1.0 / 3 <= r[2] / r[3] <= 3]
    whole = math.sqrt(height * width)
    sized = [r for r in square if 0.3 <= math.sqrt(r[2] * r[3]) / whole <= 0.8]
    kept = sized or square or large
    return [[x, y, x + w + 1, y + h + 1] for x, y, w, h in kept]


@pytest.mark.parametrize("size", [(300, 224), (64, 500), (33, 33), (1, 7), (120, 90)])
def test_the_filter_against_its_words(size):
    g = np.random.default_rng(size[0])
    seen = set()
    for n in (0, 1, 2, 5, 200):
        for _ in range(10):
            boxes = random_boxes(g, n, *size) if min(size) > 1 else np.zeros((0, 4), dtype=np.uint16)
            kept = select.soco_filter(boxes, size)
            assert kept.tolist() == slow_soco(boxes, size)
            assert kept.dtype == np.uint16
            seen.add(len(kept) > 0)
    assert seen == {True, False} or min(size) < 60


def test_the_filter_counts_sides_as_soco_does():
    # SoCo's rectangle (0, 0, 32, 32) spans pixels 0 to 32, so the box with exclusive edges is 33 wide.
    assert len(select.soco_filter(xyxy([0, 0, 33, 33]), (100, 100))) == 1
    assert len(select.soco_filter(xyxy([0, 0, 32, 33]), (100, 100))) == 0
    # ratio 3 is 96 / 32 of the rectangle, 97 / 33 of the box
    good = [20, 20, 70, 70]
    assert select.soco_filter(xyxy([0, 0, 97, 33], good), (100, 100)).tolist() == [[0, 0, 97, 33], good]
    assert select.soco_filter(xyxy([0, 0, 98, 33], good), (100, 100)).tolist() == [good]
    # a share of .8 is 80 of 100 pixels
    assert select.soco_filter(xyxy([0, 0, 81, 81], good), (100, 100)).tolist() == [[0, 0, 81, 81], good]
    assert select.soco_filter(xyxy([0, 0, 82, 81], good), (100, 100)).tolist() == [good]


def test_the_filter_falls_back_in_order():
    flat, huge, narrow = [0, 0, 200, 40], [0, 0, 199, 199], [0, 0, 20, 200]
    assert select.soco_filter(xyxy(flat, huge, narrow), (200, 200)).tolist() == [huge]  # the ratio alone
    assert select.soco_filter(xyxy(flat, narrow), (200, 200)).tolist() == [flat]  # 32 pixels alone
    assert select.soco_filter(xyxy(narrow), (200, 200)).shape == (0, 4)
    assert select.soco_filter(xyxy(), (200, 200)).shape == (0, 4)


def test_duplicates_leave_their_first():
    g = np.random.default_rng(0)
    boxes = random_boxes(g, 300, 6, 5)
    kept = list(dict.fromkeys(map(tuple, boxes.tolist())))
    assert len(kept) < 300
    assert select.distinct(boxes).tolist() == [list(box) for box in kept]
    assert select.distinct(xyxy()).shape == (0, 4)


def slow_nms(boxes, most):
    kept = []
    for box in boxes.tolist():
        for other in kept:
            w = min(box[2], other[2]) - max(box[0], other[0])
            h = min(box[3], other[3]) - max(box[1], other[1])
            common = max(w, 0) * max(h, 0)
            areas = sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (box, other))
            if common > most * (areas - common):
                break
        else:
            kept.append(box)
    return kept


@pytest.mark.parametrize("most", [0.0, 0.3, 0.5, 1.0])
def test_nms_against_the_loop(most):
    g = np.random.default_rng(1)
    for n in (0, 1, 7, 120):
        boxes = random_boxes(g, n, 60, 40)
        assert select.nms(boxes, most).tolist() == slow_nms(boxes, most)


def test_the_k_best():
    boxes = xyxy(*([0, 0, i + 1, 1] for i in range(6)))
    scores = np.array([1, 3, 2, 3, 0, 2])
    assert select.top_k(boxes, 4, scores)[:, 2].tolist() == [2, 4, 3, 6]
    assert select.top_k(boxes, 99, scores)[:, 2].tolist() == [2, 4, 3, 6, 1, 5]
    assert select.top_k(boxes, 2).tolist() == boxes[:2].tolist()
    assert select.top_k(boxes, 0, scores).shape == (0, 4)


SPECS = [ViewSpec.whole(96, flip=0.5), ViewSpec((64, 80), scale=(0.05, 0.6))]
SIZES = [(96, 96), (64, 80)]


def a_batch(batch=40, slots=9, seed=0):
    g = np.random.default_rng(seed)
    sizes = g.integers(20, 400, (batch, 2))
    ids = g.integers(0, 2**62, batch)
    plan = plan_views(SPECS, sizes, ids, seed=seed, epoch=0)
    low = g.random((batch, slots, 2)) * 0.9
    extent = g.random((batch, slots, 2)) * (1 - low) * g.choice([0.1, 0.5, 1.0], (batch, slots, 1))
    boxes = np.concatenate((low, low + extent), -1)
    boxes[:, 0] = [1.2, 1.2, 1.5, 1.5]  # outside
    boxes[::3, 1] = [-0.5, -0.5, 1.5, 1.5]  # larger than the image
    valid = g.random((batch, slots)) < 0.6
    valid[1::5] = False
    maps = [plan.view_from_source[:, v] for v in range(len(SPECS))]
    return torch.from_numpy(boxes).float(), torch.from_numpy(valid), maps, plan.key


def slow_choose(boxes, valid, k, views, sizes, key, min_side=16, min_visible=0.3):
    chosen, slots, fallback = [], [], []
    for i in range(len(boxes)):
        eligible = []
        for j in range(boxes.shape[1]):
            fits = bool(valid[i, j])
            for view, (height, width) in zip(views, sizes, strict=True):
                sides, clipped = [], []
                for axis, pixels in ((0, width), (1, height)):
                    scale, shift = view.scale[i, axis].item(), view.shift[i, axis].item()
                    ends = sorted(scale * boxes[i, j, axis + far].item() + shift for far in (0, 2))
                    sides.append((ends[1] - ends[0]) * pixels)
                    clipped.append((min(max(ends[1], 0), 1) - min(max(ends[0], 0), 1)) * pixels)
                fits = fits and min(clipped) > 0 and min(clipped) >= min_side - 1e-3
                fits = fits and clipped[0] * clipped[1] >= (min_visible - 1e-5) * sides[0] * sides[1]
            if fits:
                eligible.append(j)
        if eligible:
            draws = key[i].uniform("choose", boxes.shape[1])[0].tolist()
            order = sorted(eligible, key=lambda j: draws[j])
            again = key[i].integers("choose again", k, len(order))[0].tolist()
            row = [order[place] if place < len(order) else order[again[place]] for place in range(k)]
            chosen.append([boxes[i, j].tolist() for j in row])
        else:
            low, high = [0.0, 0.0], [1.0, 1.0]
            for n, view in enumerate(views):
                for axis in (0, 1):
                    scale, shift = view.scale[i, axis].item(), view.shift[i, axis].item()
                    ends = sorted((end - shift) / scale for end in (0, 1))
                    low[axis] = max(low[axis], ends[0]) if n else ends[0]
                    high[axis] = min(high[axis], ends[1]) if n else ends[1]
                if n == 0:
                    first = [*low, *high]
            box = [*low, *high] if high[0] - low[0] > 1e-6 and high[1] - low[1] > 1e-6 else first
            row = [-1] * k
            chosen.append([box] * k)
        slots.append(row)
        fallback.append(not eligible)
    shape = (len(boxes), k)
    tensors = torch.tensor(chosen, dtype=torch.float32).reshape(*shape, 4), torch.tensor(slots).reshape(shape).long()
    return *tensors, torch.tensor(fallback, dtype=torch.bool)


@pytest.mark.parametrize("k", [0, 1, 4, 20])
@pytest.mark.parametrize("slots", [0, 1, 9])
@pytest.mark.parametrize("views", [1, 2])
def test_choice_against_the_loop(k, slots, views):
    boxes, valid, maps, key = a_batch()
    boxes, valid, maps, sizes = boxes[:, :slots], valid[:, :slots], maps[-views:], SIZES[-views:]
    found = select.choose(boxes, valid, k, maps, sizes, key=key)
    expected = slow_choose(boxes, valid, k, maps, sizes, key)
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[2], expected[2])
    assert torch.allclose(found[0], expected[0], atol=1e-5)
    if slots == 9:
        assert set(found[2].tolist()) == {True, False}
    own = ~found[2]
    taken = boxes[own].gather(1, found[1][own][..., None].expand(-1, -1, 4)) if k and slots else found[0][own]
    assert torch.equal(found[0][own], taken)  # unclipped and untouched


def test_no_slot_comes_twice_before_all_came_once():
    boxes, valid = torch.tensor([0.1, 0.1, 0.9, 0.9]).expand(50, 7, 4), torch.ones(50, 7, dtype=torch.bool)
    key, whole = Key(0, 0, range(50)), AxisAffine.identity(50)
    slot = select.choose(boxes, valid, 9, [whole], [224], key=key)[1]
    assert (slot[:, :7].sort(dim=1).values == torch.arange(7)).all()
    assert len(slot[:, 7:].unique()) == 7
    assert torch.equal(slot[:, :3], select.choose(boxes, valid, 3, [whole], [224], key=key)[1])
    counts = torch.bincount(slot[:, 0], minlength=7)
    assert (counts > 0).all()


def test_neither_the_batch_nor_unused_slots_change_a_choice():
    boxes, valid, maps, key = a_batch()
    whole = select.choose(boxes, valid, 4, maps, SIZES, key=key)
    for rows in (slice(0, 7), slice(7, 40), slice(3, 4), slice(5, 5)):
        part = select.choose(boxes[rows], valid[rows], 4, [m[rows] for m in maps], SIZES, key=key[rows])
        for a, b in zip(part, whole, strict=True):
            assert torch.equal(a, b[rows])
    wider = torch.cat((boxes, torch.ones(40, 5, 4)), 1), torch.cat((valid, torch.zeros(40, 5).bool()), 1)
    for a, b in zip(select.choose(*wider, 4, maps, SIZES, key=key), whole, strict=True):
        assert torch.equal(a, b)
    other = select.choose(boxes, valid, 4, maps, SIZES, key=key.at_epoch(1))[1]
    assert not torch.equal(other, whole[1])


@pytest.mark.parametrize("side", [15, 16, 17])
def test_a_side_of_exactly_the_least_is_eligible(side):
    for width in (100, 224, 333, 641):
        boxes = torch.tensor([[[3.0, 5.0, 3.0 + side, 90.0]]]) / torch.tensor([width, 97.0, width, 97.0])
        view = AxisAffine.identity(1)
        fallback = select.choose(boxes, torch.ones(1, 1).bool(), 1, [view], [(97, width)], key=Key(0, 0, [1]))[2]
        assert fallback.tolist() == [side < 16]


@pytest.mark.parametrize("tenths", range(1, 11))
def test_a_share_of_exactly_the_least_is_eligible(tenths):
    view = AxisAffine.sending(torch.tensor([[0.1, 0.0, 1.0, 1.0]]))
    boxes = torch.tensor([[[0.1 - 0.01 * (10 - tenths), 0.2, 0.1 + 0.01 * tenths, 0.7]]])
    for least, empty in ((tenths / 10, False), (min(tenths / 10 + 0.01, 1.0), tenths < 10)):
        key, valid = Key(0, 0, [1]), torch.ones(1, 1).bool()
        got = select.choose(boxes, valid, 1, [view], [100], key=key, min_side=0, min_visible=least)[2]
        assert got.tolist() == [empty]


def test_a_box_beside_the_view_is_never_eligible():
    boxes = torch.tensor([[[1.0, 0.0, 1.5, 1.0], [-0.5, 1.1, 0.5, 1.2], [0.2, 0.2, 0.2, 0.6]]])
    view, valid, key = AxisAffine.identity(1), torch.ones(1, 3).bool(), Key(0, 0, [1])
    box, _, fallback = select.choose(boxes, valid, 1, [view], [100], key=key, min_side=0, min_visible=0)
    assert (box.tolist(), fallback.tolist()) == ([[[0, 0, 1, 1]]], [True])


def test_a_box_must_be_seen_in_every_view():
    left, right = (AxisAffine.sending(torch.tensor([[x, 0.0, x + 0.5, 1.0]])) for x in (0.0, 0.5))
    boxes, valid = torch.tensor([[[0.0, 0.0, 0.4, 1.0], [0.3, 0.0, 0.7, 1.0]]]), torch.ones(1, 2).bool()
    key = Key(0, 0, [5])
    assert select.choose(boxes, valid, 1, [left, right], [64, 64], key=key)[1].tolist() == [[1]]
    only = boxes[:, :1], valid[:, :1]
    box, slot, fallback = select.choose(*only, 2, [left, right], [64, 64], key=key)
    assert (slot.tolist(), fallback.tolist()) == ([[-1, -1]], [True])
    assert torch.allclose(box, torch.tensor([0.0, 0.0, 0.5, 1.0]).expand(1, 2, 4))  # nothing in common: the first view
    wide = AxisAffine.sending(torch.tensor([[0.4, 0.2, 1.0, 0.8]]))
    box = select.choose(*only, 1, [left, wide], [64, 64], key=key, min_visible=1.0)[0]
    assert torch.allclose(box, torch.tensor([[[0.4, 0.2, 0.5, 0.8]]]))


def test_nothing_to_choose_from():
    box, slot, fallback = select.choose(
        torch.zeros(0, 3, 4), torch.zeros(0, 3).bool(), 4, [AxisAffine.identity(0)], [224], key=Key(0, 0, [])
    )
    assert (box.shape, slot.shape, fallback.shape) == ((0, 4, 4), (0, 4), (0,))
    assert slot.dtype == torch.int64
    whole = AxisAffine.identity(2)
    box, slot, fallback = select.choose(
        torch.zeros(2, 0, 4), torch.zeros(2, 0).bool(), 1, [whole], [(5, 7)], key=Key(0, 0, [1, 2])
    )
    assert box.tolist() == [[[0, 0, 1, 1]]] * 2
    assert fallback.all()


def test_bad_input(our_errors):
    boxes, valid, whole, key = torch.zeros(2, 3, 4), torch.zeros(2, 3).bool(), AxisAffine.identity(2), Key(0, 0, [1, 2])
    for change, message in (
        ({"valid": valid[:, :2]}, r"choose: valid must be bool \[2, 3\], got bool \[2, 2\]"),
        ({"views": [whole, whole]}, r"choose: sizes must be one \(h, w\) for each of at least one view"),
        ({"views": [], "sizes": []}, r"choose: sizes must be one \(h, w\) for each of at least one view"),
        ({"views": [AxisAffine.identity(3)]}, r"choose: views must be AxisAffine maps \[2\], got \[3\]"),
        ({"key": Key(0, 0, [1])}, r"choose: key must be a key of 2 ids, got 1"),
        ({"k": -1}, r"choose: k must be an integer in \[0, 1048576\], got -1"),
        ({"min_visible": 1.5}, r"choose: min_visible must be in \[0, 1\], got 1.5"),
        ({"boxes": boxes[0]}, r"choose: boxes must be boxes \[B, M, 4\], got float32 \[3, 4\]"),
        ({"boxes": boxes + torch.tensor([1.0, 0, 0, 0])}, r"choose: boxes must be boxes with x0 <= x1"),
    ):
        given = {"boxes": boxes, "valid": valid, "k": 1, "views": [whole], "sizes": [8], "key": key}
        with pytest.raises(ValueError, match=message):
            select.choose(**{**given, **change})
    with pytest.raises(ValueError, match=r"soco_filter: boxes must be uint16 \[n, 4\] .*, got int64 \[1, 4\]"):
        select.soco_filter(np.zeros((1, 4), dtype=np.int64), (9, 9))
    with pytest.raises(ValueError, match="soco_filter: boxes must be inside 30 x 40, got others"):
        select.soco_filter(xyxy([0, 0, 31, 5]), (40, 30))
    with pytest.raises(ValueError, match=r"nms: boxes must be boxes with pixels"):
        select.nms(xyxy([5, 5, 5, 9]))
    with pytest.raises(ValueError, match="top_k: scores must be a number for each of 1 boxes"):
        select.top_k(xyxy([5, 5, 6, 9]), 1, np.array([1.0, 2.0]))

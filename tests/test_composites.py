import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from geoaug import AxisAffine, Key, boxes
from geoaug.pixels import cutout as cutting
from geoaug.pixels import paste as pasting
from geoaug.pixels import rectangles
from geoaug.pixels.composites import (
    JITTER_LAWS,
    Composite,
    block_derangement,
    boxes_with_room,
    cutout_masks,
    draw_cutouts,
    draw_square_cutouts,
    draw_windows,
    free_boxes,
    grid_boxes,
    jitter_boxes,
    paste,
    shift_boxes,
    shift_composite,
    square_cutout_masks,
    window_masks,
)

from . import reference

SIZES = [(17, 23), (5, 7), (1, 1), (30, 4)]
WAYS = [(clip, restore) for clip in ("image", "box") for restore in ("tolerance", "threshold")]


def scene(B=6, K=4, seed=0):
    """Boxes of all sizes, some beyond the view, some without area, some equal; some slots not valid."""
    g = np.random.default_rng(seed)
    low, sides = g.uniform(-0.3, 0.9, (B, K, 2)), g.uniform(0.02, 0.9, (B, K, 2))
    sides[g.random((B, K)) < 0.1] = 0
    both = torch.from_numpy(np.concatenate((low, low + sides), axis=-1).astype(np.float32))
    if K > 1:
        both[::3, 1] = both[::3, 0]
    return both, torch.from_numpy(g.random((B, K)) < 0.85)


def key_of(B, seed=3):
    return Key(seed, 1, torch.arange(B) * 977 + 5)


def mask_of(pixels, size):
    out = torch.zeros(size, dtype=torch.bool)
    for i, j in pixels:
        out[i, j] = True
    return out


def pixels_of(boxes, valid, size):
    return [reference.box_pixels(box, bool(ok), size) for box, ok in zip(boxes.tolist(), valid, strict=True)]


def draws(key, stream, shape):
    return key.uniform(stream, int(np.prod(shape))).view(len(key), *shape).tolist()


# --- cutouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("clip", "restore"), WAYS)
@pytest.mark.parametrize("size", SIZES)
def test_cutouts_are_the_loops(size, clip, restore):
    for slots in (1, 4, 9):  # nine need three bytes of bits
        given_boxes, valid = scene(K=slots, seed=slots)
        key = key_of(6)
        ways = {"ratio": (0.1, 0.6), "clip": clip, "restore": restore}
        plan = draw_cutouts(given_boxes, valid, size, key=key, **ways)
        u = draws(key, "cutout", (slots, 3))
        for b in range(6):
            turns = reference.cutout(pixels_of(given_boxes[b], valid[b], size), size, u[b], **ways)
            assert plan.order[b].tolist() == [k for k, *_ in turns]
            assert plan.restored[b].tolist() == [again for _, _, again, *_ in sorted(turns, key=lambda t: t[0])]
            for turn, (_, _, _, _, cut) in enumerate(turns):
                assert torch.equal(~plan.keep(turn + 1)[b], mask_of(cut, size))
        assert torch.equal(cutout_masks(given_boxes, valid, size, key=key, **ways), plan.keep())


@pytest.mark.parametrize("size", SIZES)
def test_squares_are_the_loops(size):
    given_boxes, valid = scene(K=5)
    key = key_of(6)
    keep = square_cutout_masks(given_boxes, valid, size, key=key, ratio=(0.2, 0.7))
    u = draws(key, "square", (5, 4))
    for b in range(6):
        cut = reference.square_cutout(pixels_of(given_boxes[b], valid[b], size), size, u[b], 0.5, (0.2, 0.7))
        assert torch.equal(~keep[b], mask_of(cut, size))


def test_squares_are_told_box_by_box():
    given_boxes, valid = scene(K=5)
    plan = draw_square_cutouts(given_boxes, valid, (40, 60), key=key_of(6), ratio=(0.2, 0.7))
    assert torch.equal(plan.keep(), square_cutout_masks(given_boxes, valid, (40, 60), key=key_of(6), ratio=(0.2, 0.7)))
    drawn = plan.ratio > 0
    assert 0 < drawn.float().mean() < 1
    assert ((plan.ratio[drawn] >= 0.2) & (plan.ratio[drawn] < 0.7)).all()
    assert not rectangles.count(plan.cuts)[~drawn].any()
    kept = plan.keep()
    for b, k in itertools.product(range(6), range(5)):
        x0, y0, x1, y1 = plan.boxes[b, k].tolist()
        inside = kept[b, y0:y1, x0:x1].float()
        assert plan.shown()[b, k] == pytest.approx(float(inside.mean()) if inside.numel() else 0.0)


def test_published_vector_nine():
    box = boxes.from_pixels(torch.tensor([[[60.0, 40.0, 160.0, 90.0]]]), (224, 224))
    plan = draw_cutouts(box, torch.tensor([[True]]), 224, key=Key(0, 0, [1]), ratio=(0.25, 0.25))
    x0, y0, x1, y1 = plan.cuts[0, 0].tolist()
    assert (x1 - x0, y1 - y0) == (50, 25)
    assert 60 <= (x0 + x1) / 2 <= 160
    assert 40 <= (y0 + y1) / 2 <= 90
    key = Key(0, 0, torch.arange(600))
    row = boxes.from_pixels(torch.tensor([20.0, 0.0, 180.0, 224.0]), (224, 224)).expand(600, 1, 4)
    valid, images = torch.ones(600, 1, dtype=torch.bool), torch.zeros(600, 0, 224, 224)
    shift = shift_composite(images, row, valid, images, key=key, cut=False).shift
    assert (int(shift[:, 0].min()), int(shift[:, 0].max())) == (-20, 44)
    assert (shift[:, 1] == 0).all()


SHARE = st.tuples(st.floats(0.05, 0.5), st.floats(0.0, 0.4)).map(lambda t: (t[0], t[0] + t[1]))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), slots=st.integers(1, 6), ratio=SHARE, way=st.sampled_from(WAYS))
def test_after_its_own_turn_a_box_has_lost_what_it_may(seed, slots, ratio, way):
    size = (40, 53)
    given_boxes, valid = scene(B=3, K=slots, seed=seed)
    clip, restore = way
    plan = draw_cutouts(given_boxes, valid, size, key=key_of(3, seed), ratio=ratio, clip=clip, restore=restore)
    for turn in range(slots):
        away = ~plan.keep(turn + 1)
        for b in range(3):
            k = int(plan.order[b, turn])
            x0, y0, x1, y1 = plan.boxes[b, k].tolist()
            rows, columns = y1 - y0, x1 - x0
            pixels, lost = rows * columns, int(away[b, y0:y1, x0:x1].sum())
            target = float(plan.ratio[b, k]) * pixels
            assert lost <= 1.5 * target + rows + columns
            if way == ("box", "threshold"):
                assert abs(lost - target) <= max(rows, columns) / 2
            if plan.restored[b, k]:  # nothing is left but its own cut
                own = torch.zeros_like(away[b])
                own[slice(*plan.cuts[b, k, 1::2].tolist()), slice(*plan.cuts[b, k, ::2].tolist())] = True
                assert torch.equal(own[y0:y1, x0:x1], away[b, y0:y1, x0:x1])


@pytest.mark.parametrize(("clip", "restore"), WAYS)
def test_cuts_stay_where_clip_says(clip, restore):
    given_boxes, valid = scene(B=200, K=3)
    plan = draw_cutouts(given_boxes, valid, (40, 53), key=key_of(200), clip=clip, restore=restore)
    beyond = (plan.cuts[..., :2] < plan.boxes[..., :2]) | (plan.cuts[..., 2:] > plan.boxes[..., 2:])
    beyond = beyond.any(-1) & (plan.cuts != 0).any(-1)
    assert bool(beyond.any()) == (clip == "image")
    assert (plan.cuts >= 0).all()


def test_what_is_shown_is_what_is_kept():
    given_boxes, valid = scene(B=20, K=6)
    plan = draw_cutouts(given_boxes, valid, (40, 53), key=key_of(20))
    keep, shown = plan.keep(), plan.shown()
    for b, k in itertools.product(range(20), range(6)):
        x0, y0, x1, y1 = plan.boxes[b, k].tolist()
        part = keep[b, y0:y1, x0:x1]
        assert shown[b, k] == (part.float().mean() if part.numel() else 0)


# --- windows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["masked", "visible"])
@pytest.mark.parametrize("size", [*SIZES, (60, 80)])
def test_windows_are_the_loops(size, mode):
    given_boxes, valid = scene(K=9)
    key = key_of(6)
    keep = window_masks(given_boxes, valid, size, key=key, mode=mode)
    u = draws(key, "window", (4,))
    for b in range(6):
        kept = reference.window(size, u[b], (0.2, 0.6), (3 / 4, 4 / 3), mode)
        assert torch.equal(keep[b], mask_of(kept.union(*pixels_of(given_boxes[b], valid[b], size)), size))
    record = draw_windows(given_boxes, valid, size, key=key, mode=mode)
    assert torch.equal(record.keep(), keep)
    torch.testing.assert_close(record.masked(), 1 - keep.float().mean(dim=(1, 2)))
    for b, (x0, y0, x1, y1) in enumerate(record.window.tolist()):
        assert keep[b, y0:y1, x0:x1].all()
        kept = reference.window(size, u[b], (0.2, 0.6), (3 / 4, 4 / 3), mode)
        assert (y1 - y0) * (x1 - x0) == len(kept)


@pytest.mark.parametrize(("mode", "low", "high"), [("masked", 0.2, 0.6), ("visible", 0.4, 0.8)])
def test_the_share_of_a_window_is_what_its_mode_says(mode, low, high):
    none = torch.zeros(2000, 0, 4), torch.zeros(2000, 0, dtype=torch.bool)
    hidden = 1 - window_masks(*none, 224, key=key_of(2000), mode=mode).float().mean(dim=(1, 2))
    assert low - 0.01 < hidden.min() < low + 0.03
    assert high - 0.03 < hidden.max() < high + 0.01
    assert abs(hidden.mean() - (low + high) / 2) < 0.01


# --- jitter and laws of boxes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", JITTER_LAWS)
def test_jitter_is_the_loop(law):
    given_boxes, _ = scene(B=200, K=3)
    for p, scale, shift in ((None, None, None), (1.0, (0.3, 0.9), 0.7)):
        moved = jitter_boxes(given_boxes, key=key_of(200), law=law, p=p, scale=scale, shift=shift)
        preset = JITTER_LAWS[law]
        numbers = (preset.p, preset.scale, preset.shift) if p is None else (p, scale, shift)
        u = draws(key_of(200), "jitter", (3, 5))
        expected = [[reference.jitter(box, v, *numbers, corner=law == "free") for box, v in zip(row, w, strict=True)]
                    for row, w in zip(given_boxes.tolist(), u, strict=True)]  # fmt: skip
        torch.testing.assert_close(moved, torch.tensor(expected), rtol=0, atol=1e-6)
        assert (moved != boxes.clip(given_boxes)).any(-1).float().mean() > 0.3


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), law=st.sampled_from(list(JITTER_LAWS)), shift=st.floats(0, 2), strict=st.booleans(),
       scale=st.tuples(st.floats(0.01, 0.5), st.floats(0.5, 1)))  # fmt: skip
def test_jitter_never_empties_and_never_grows_when_restricted(seed, law, shift, strict, scale):
    given_boxes, _ = scene(B=8, K=3, seed=seed)
    moved = jitter_boxes(given_boxes, key=key_of(8, seed), law=law, p=0.8, shift=shift, scale=scale,
                         strict_inside=strict)  # fmt: skip
    seen = boxes.clip(given_boxes)
    sides, old = moved[..., 2:] - moved[..., :2], seen[..., 2:] - seen[..., :2]
    assert (sides[(old > 0).all(-1)] > 0).all()
    assert ((moved >= 0) & (moved <= 1)).all()
    assert (sides <= old + 2e-7).all()  # no scale above 1 is drawn here, by any law
    if strict:
        assert ((moved[..., :2] >= seen[..., :2]) & (moved[..., 2:] <= seen[..., 2:])).all()


def test_only_free_laws_grow():
    given_boxes = torch.tensor([0.3, 0.3, 0.6, 0.6]).expand(500, 1, 4)
    old = boxes.area(given_boxes)
    grown = {law: (boxes.area(jitter_boxes(given_boxes, key=key_of(500), law=law)) > old * 1.0001).float().mean()
             for law in JITTER_LAWS}  # fmt: skip
    assert grown["restricted"] == 0
    assert 0.15 < grown["soco"] < 0.35
    assert 0.35 < grown["free"] < 0.65


def test_boxes_without_proposals_follow_their_laws():
    key = key_of(3000)
    cells = grid_boxes(key=key, share=(0.01, 0.02))
    assert cells.shape == (3000, 9, 4)
    centre = (cells[..., :2] + cells[..., 2:]) / 2 * 3 - torch.tensor([[k % 3, k // 3] for k in range(9)])
    assert centre.min() > 0.25 - 1e-5
    assert centre.max() < 0.75 + 1e-5
    assert abs(centre.mean() - 0.5) < 0.01
    whole = grid_boxes(4, key=key)
    assert whole.shape == (3000, 16, 4)
    assert ((whole >= 0) & (whole <= 1)).all()
    for drawn, (low, high) in ((cells, (0.01, 0.02)), (free_boxes(key=key), (0.09, 0.2))):
        area, sides = boxes.area(drawn), drawn[..., 2:] - drawn[..., :2]
        assert low - 1e-5 < area.min()
        assert area.max() < high + 1e-5
        assert stats.kstest(((area - low) / (high - low)).flatten()[::7].numpy(), "uniform").pvalue > 1e-3
        aspect = torch.log(sides[..., 0] / sides[..., 1]) / np.log(2)
        assert stats.kstest((aspect.flatten()[::7] / 2 + 0.5).numpy(), "uniform").pvalue > 1e-3
    drawn = free_boxes(key=key)
    assert ((drawn >= 0) & (drawn <= 1)).all()
    place = drawn[..., :2] / (1 - (drawn[..., 2:] - drawn[..., :2]))
    assert stats.kstest(place.flatten()[::7].numpy(), "uniform").pvalue > 1e-3
    assert free_boxes(0, key=key).shape == (3000, 0, 4)


# --- backgrounds ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [2, 3, 4, 5, 7])
def test_derangements_are_the_loops(group):
    key = Key(5, 2, torch.arange(10 * group + group // 2))
    rows = block_derangement(key, group)
    for first in range(0, len(key), group):
        size = min(group, len(key) - first)
        words = reference.stream(5, 2, first, key.tag("derangement"), 4 * group)
        place = reference.derange(words, size)
        expected = [first + j if j != i else -1 for i, j in enumerate(place)]
        assert rows[first : first + size].tolist() == expected


@pytest.mark.parametrize(("group", "kinds"), [(2, 1), (3, 2), (4, 9), (5, 44)])
def test_all_derangements_are_equally_likely(group, kinds):
    blocks = 300 * kinds
    rows = block_derangement(Key(1, 0, torch.arange(blocks * group)), group).view(blocks, group)
    seen = Counter(map(tuple, (rows % group).tolist()))
    legal = [p for p in itertools.permutations(range(group)) if all(i != j for i, j in enumerate(p))]
    assert len(legal) == kinds
    assert set(seen) == set(legal)
    if kinds > 1:
        assert stats.chisquare([seen[p] for p in legal]).pvalue > 1e-3


def test_backgrounds_of_a_tail_and_of_what_could_not_be_read():
    assert block_derangement(Key(0, 0, [4])).tolist() == [-1]
    assert block_derangement(Key(0, 0, [])).tolist() == []
    assert block_derangement(Key(0, 0, range(6)))[4:].tolist() == [5, 4]
    key = Key(0, 0, range(8))
    ok = torch.tensor([True, False, True, True, True, True, True, True])
    rows, told = block_derangement(key), block_derangement(key, ok=ok)
    assert torch.equal(told, torch.where(rows == 1, -1, rows))


# --- paste and composite ----------------------------------------------------------------------------------------------


DTYPES = [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64]


def pictures(B, h, w, dtype=torch.float32, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (B, 3, h, w))).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(5, 7), (1, 1)])
def test_paste_is_the_loop(dtype, size):
    g = np.random.default_rng(0)
    images, others = pictures(9, *size, dtype), pictures(4, *size, dtype, seed=1)
    mask = torch.from_numpy(g.random((9, *size)) < 0.5)
    shift = torch.from_numpy(g.integers(-9, 10, (9, 2)))
    rows = torch.from_numpy(g.integers(-1, 4, 9))
    kept = images.clone(), others.clone(), mask.clone()
    out = paste(images, mask, others, shift, rows=rows, fill=7)
    assert (out.dtype, out.shape) == (dtype, images.shape)
    for b, c in itertools.product(range(9), range(3)):
        behind = torch.full(size, 7.0) if rows[b] < 0 else others[rows[b], c]
        expected = reference.compose(images[b, c].tolist(), mask[b].tolist(), behind.tolist(), shift[b].tolist())
        assert out[b, c].tolist() == expected
    assert all(torch.equal(a, b) for a, b in zip(kept, (images, others, mask), strict=True))
    assert torch.equal(pasting.on_device(images, mask, others, rows, shift, False, 7.0), out)


def test_a_mask_on_the_result_is_one_moved_before():
    images, others = pictures(6, 5, 7), pictures(6, 5, 7, seed=1)
    g = np.random.default_rng(2)
    mask, shift = torch.from_numpy(g.random((6, 5, 7)) < 0.5), torch.from_numpy(g.integers(-3, 4, (6, 2)))
    there = paste(mask[:, None].to(torch.uint8), mask, torch.zeros(6, 1, 5, 7, dtype=torch.uint8), shift)[:, 0] > 0
    expected = paste(images, mask, others, shift)
    rows = torch.arange(6)
    assert torch.equal(paste(images, there, others, shift, moved=True), expected)
    assert torch.equal(pasting.on_device(images, there, others, rows, shift, True, 0.0), expected)
    assert torch.equal(paste(images, mask, torch.flip(others, (0,)), shift, rows=rows.flip(0)), expected)
    assert torch.equal(paste(images, mask, rows, shift), paste(images, mask, images, shift))


@pytest.mark.parametrize("per_thread", [1, 2**30])  # threads that share the images, and none
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float64], ids=str)
def test_paste_writes_where_it_is_told_even_onto_what_it_reads(dtype, per_thread, monkeypatch):
    monkeypatch.setattr(pasting, "_PER_THREAD", per_thread)
    g, n = np.random.default_rng(3), 12
    images, others = pictures(n, 9, 11, dtype), pictures(n, 9, 11, dtype, seed=1)
    mask = torch.from_numpy(g.random((n, 9, 11)) < 0.5)
    shift = torch.from_numpy(np.stack((g.integers(-3, 4, n), np.arange(n) % 5 - 2), axis=1))  # up, down and level
    assert ((shift[:, 0] > 0) & (shift[:, 1] == 0)).any()
    fill = torch.arange(n).masked_fill(torch.arange(n) % 3 == 0, -1)
    others_too = torch.from_numpy(g.integers(-1, n, n))
    for rows, moved in itertools.product((torch.arange(n), fill, others_too), (True, False)):
        ways = {"rows": rows, "fill": 7, "moved": moved}
        expected = paste(images, mask, others, shift, **ways)
        alone, front, back = torch.empty_like(images), images.clone(), others.clone()
        for out, (a, b) in ((alone, (images, others)), (front, (front, others)), (back, (images, back))):
            assert paste(a, mask, b, shift, **ways, out=out) is out
            assert torch.equal(out, expected)
        memory = torch.cat((images, torch.zeros_like(images)))  # the result lies half over the images
        assert torch.equal(paste(memory[:n], mask, others, shift, **ways, out=memory[5 : n + 5]), expected)
        own = images.clone()  # backgrounds that are overwritten before they are read
        assert torch.equal(paste(own, mask, own, shift, **ways, out=own), paste(images, mask, images, shift, **ways))
        front, back = images.clone(), others.clone()
        for out, (a, b) in ((front, (front, others)), (back, (images, back))):
            assert torch.equal(pasting.on_device(a, mask, b, rows, shift, moved, 7.0, out), expected)


def test_paste_takes_what_is_not_contiguous_and_no_backgrounds_at_all():
    images = pictures(4, 5, 7).permute(0, 1, 3, 2)
    mask, shift = torch.ones(4, 7, 5, dtype=torch.bool), torch.ones(4, 2, dtype=torch.int64)
    fill = torch.full((4,), -1)
    plain = paste(images.contiguous(), mask, images[:0], shift, rows=fill)
    assert torch.equal(paste(images, mask, images[:0], shift, rows=fill), plain)
    assert torch.equal(pasting.on_device(images, mask, images[:0], fill, shift, False, 0.0), plain)
    grad = torch.rand(1, 3, 5, 7, requires_grad=True)
    assert not paste(grad, mask[:1].mT, grad, shift[:1]).requires_grad
    assert paste(images[:0], mask[:0], images, shift[:0], rows=fill[:0]).shape == (0, 3, 7, 5)


@pytest.mark.parametrize("room", [0.0, 0.25, 0.6])
@pytest.mark.parametrize("size", [(17, 23), (5, 7), (1, 1)])
def test_composites_are_the_loops(size, room):
    B, K, key = 9, 4, key_of(9)
    given_boxes, valid = scene(B, K, seed=5)
    given_boxes[1, 1:] = given_boxes[1, 1:] * 0.3 + 0.4  # boxes that can move
    given_boxes[4:7] = given_boxes[4:7] * 0.4 + 0.2
    images, rows = pictures(B, *size), block_derangement(key)
    ways = {"ratio": (0.2, 0.5), "clip": "image", "restore": "tolerance"}
    out = shift_composite(images, given_boxes, valid, rows, key=key, room=room, fill=300)
    u = draws(key.fold("cut"), "cutout", (K, 3))
    words = key.words("shift", 1).tolist()
    for b in range(B):
        here, pixels = given_boxes[b].tolist(), pixels_of(given_boxes[b], valid[b], size)
        stay = reference.make_room(here, pixels, size, room)
        (x0, x1), (y0, y1) = reference.feasible(here, stay, size)
        shift = (x0 + reference.below(*words[b][:2], x1 - x0 + 1), y0 + reference.below(*words[b][2:], y1 - y0 + 1))
        assert tuple(out.shift[b].tolist()) == shift
        assert out.valid[b].tolist() == [k in stay for k in range(K)]
        assert boxes_with_room(given_boxes, valid, size, room)[b].tolist() == out.valid[b].tolist()
        moved = [{(i + shift[1], j + shift[0]) for i, j in p} if k in stay else set() for k, p in enumerate(pixels)]
        cut = reference.cutout(moved, size, u[b], **ways)[-1][-1]
        shown = set().union(*moved) - cut
        assert torch.equal(out.mask[b], mask_of(shown, size))
        assert out.foreground[b] == pytest.approx(len(shown) / (size[0] * size[1]), abs=1e-6)
        assert bool(out.filled[b]) == (rows[b] < 0)
        behind = torch.full((3, *size), 300.0) if rows[b] < 0 else images[rows[b]]
        here = mask_of({(i - shift[1], j - shift[0]) for i, j in shown}, size).tolist()
        for c in range(3):
            expected = reference.compose(images[b, c].tolist(), here, behind[c].tolist(), shift)
            assert out.images[b, c].tolist() == expected
        inside = boxes.visible_fraction(given_boxes[b])
        for k in range(K):
            part = len(moved[k] - cut) / len(moved[k]) if moved[k] else 0
            assert out.visible[b, k] == pytest.approx(float(inside[k]) * part, abs=1e-6)
    by = out.shift.float() / torch.tensor([size[1], size[0]])
    torch.testing.assert_close(out.boxes, boxes.clip(given_boxes) + by.repeat(1, 2)[:, None])
    kept = out.boxes[out.valid]
    assert ((kept > -1e-4) & (kept < 1 + 1e-4)).all()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), room=st.sampled_from([0.0, 0.25, 0.5]), cut=st.booleans())
def test_a_composite_holds_the_foreground_at_its_place_and_background_elsewhere(seed, room, cut):
    size = (19, 24)
    given_boxes, valid = scene(5, 3, seed=seed)
    images, others = pictures(5, *size), pictures(5, *size) + 1000
    out = shift_composite(images, given_boxes, valid, others, key=key_of(5, seed), room=room, cut=cut)
    y, x = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    for b in range(5):
        tx, ty = out.shift[b].tolist()
        shown = out.mask[b]
        assert torch.equal(out.images[b][:, ~shown], others[b][:, ~shown])
        assert torch.equal(out.images[b][:, shown], images[b][:, y[shown] - ty, x[shown] - tx])
        if not cut:
            covered = mask_of(set().union(*pixels_of(given_boxes[b], out.valid[b], size)), size)
            assert shown.sum() == covered.sum()
        spans = [p for p, ok in zip(pixels_of(given_boxes[b], valid[b], size), out.valid[b], strict=True) if ok]
        frames = np.array([reference.frame(p) for p in spans]).reshape(-1, 4)
        sides = frames[:, 2:].max(0) - frames[:, :2].min(0) if len(frames) else np.zeros(2)
        assert len(spans) <= 1 or (sides <= (1 - room) * np.array(size[::-1]) + 1).all()


def test_the_shift_is_uniform_over_what_is_feasible():
    box = boxes.from_pixels(torch.tensor([[3.0, 2.0, 9.0, 6.0], [5.4, 1.2, 7.3, 6.0]]), (9, 14))
    n, valid = 6000, torch.ones(6000, 2, dtype=torch.bool)
    images = torch.zeros(n, 1, 9, 14, dtype=torch.uint8)
    shift = shift_composite(images, box.expand(n, 2, 4), valid, images, key=Key(0, 0, torch.arange(n))).shift
    seen = Counter(map(tuple, shift.tolist()))
    places = list(itertools.product(range(-3, 6), range(-1, 4)))
    assert set(seen) == set(places)
    assert stats.chisquare([seen[p] for p in places]).pvalue > 1e-3


def test_the_cut_is_that_of_the_moved_boxes():
    given_boxes, valid = scene(8, 3)
    key, images = key_of(8), pictures(8, 40, 53)
    out = shift_composite(images, given_boxes * 0.5 + 0.2, valid, images, key=key)
    again = draw_cutouts(out.boxes, out.valid, (40, 53), key=key.fold("cut"))
    whole = shift_composite(images, given_boxes * 0.5 + 0.2, valid, images, key=key, cut=False)
    assert torch.equal(out.mask, whole.mask & again.keep())
    moved = shift_boxes(boxes.clip(given_boxes * 0.5 + 0.2), out.shift, (40, 53))
    torch.testing.assert_close(moved, out.boxes)


def test_a_composite_takes_the_place_of_its_foreground():
    given_boxes, valid = scene(8, 3)
    key, images, others = key_of(8), pictures(8, 40, 53), pictures(8, 40, 53, seed=1)
    expected = shift_composite(images, given_boxes, valid, others, key=key, rows=block_derangement(key))
    out = shift_composite(images, given_boxes, valid, others, key=key, rows=block_derangement(key), out=images)
    assert out.images is images
    for name in Composite.__dataclass_fields__:
        assert torch.equal(getattr(out, name), getattr(expected, name)), name


def test_room_is_made_by_dropping_the_largest_first():
    size = (100, 100)
    three = torch.tensor([[[0.0, 0.0, 0.2, 0.2], [0.0, 0.1, 0.9, 0.9], [0.5, 0.5, 0.7, 0.7]]])
    valid, images = torch.ones(1, 3, dtype=torch.bool), torch.zeros(1, 1, *size)
    dropped = shift_composite(images, three, valid, images, key=key_of(1))
    assert dropped.valid.tolist() == [[True, False, True]]
    assert dropped.visible[0, 1] == 0
    assert shift_composite(images, three, valid, images, key=key_of(1), room=0).valid.all()
    alone = shift_composite(images, three[:, 1:2], valid[:, :1], images, key=key_of(1), room=0.9)
    assert alone.valid.all()  # at least one stays
    full = torch.tensor([[[-0.2, 0.0, 1.0, 1.3]]])
    still = shift_composite(images, full, valid[:, :1], images, key=key_of(1), cut=False)
    assert still.shift.tolist() == [[0, 0]]
    assert still.foreground.tolist() == [1.0]
    assert still.visible.item() == pytest.approx(1 / 1.2 / 1.3)


# --- what runs on a CPU is what runs on a device ---


@pytest.mark.parametrize(("clip", "restore"), WAYS)
@pytest.mark.parametrize("size", [*SIZES, (70, 200)])
def test_the_turns_of_a_cpu_are_those_of_a_device(size, clip, restore):
    for slots in (0, 1, 4, 9):
        given_boxes, valid = scene(40, slots, seed=slots)
        plan = draw_cutouts(given_boxes, valid, size, key=key_of(40), ratio=(0.1, 0.6), clip=clip, restore=restore)
        u = key_of(40).uniform("cutout", 3 * slots).view(40, slots, 3)
        torch_s = cutting.turns_on_device(plan.boxes, u, size, (0.1, 0.6), clip, restore, (0.8, 1.2, 0.5))
        for name in ("ratio", "order", "events", "restored", "cuts"):
            assert torch.equal(getattr(plan, name), getattr(torch_s, name)), name


@pytest.mark.parametrize("size", [*SIZES, (70, 200)])
def test_masks_and_counts_of_a_cpu_are_those_of_a_device(size):
    g = np.random.default_rng(1)
    for many in (0, 1, 3, 9, 20):
        corners = g.integers(0, np.array(size[::-1]) + 1, (30, many, 2, 2))
        rects = torch.from_numpy(np.concatenate((corners.min(2), corners.max(2)), axis=-1))
        rects[(rects[..., 2:] == rects[..., :2]).any(-1)] = 0  # as `whole` has it
        events, within = rects, rects.flip(1)[:, : many // 2 + 1]
        boxes_there = torch.cat((rects[:, :2], torch.tensor([0, 0, *size[::-1]]).expand(30, 1, 4)), dim=1)
        for part in (None, within, rects[:, :0]):
            mask = rectangles.drawn(events, size, within=part)
            assert torch.equal(mask, rectangles.drawn_on_device(events, size, within=part))
            counts = rectangles.count_uncut(events, boxes_there, within=part)
            assert torch.equal(counts, rectangles.count_uncut_on_device(events, boxes_there, within=part))
            assert torch.equal(counts[:, -1], mask.sum((1, 2)))
            slow = torch.ones(30, *size, dtype=torch.bool)
            inside = torch.zeros_like(slow) if part is not None else slow.clone()
            for b in range(30):
                for e, (x0, y0, x1, y1) in enumerate(events[b].tolist()):
                    slow[b, y0:y1, x0:x1] = e % 2 == 0
                for x0, y0, x1, y1 in [] if part is None else part[b].tolist():
                    inside[b, y0:y1, x0:x1] = True
            assert torch.equal(mask, slow & inside)


# --- invariance, bad input --------------------------------------------------------------------------------------------


def everything(given_boxes, valid, key, images, rows):
    composite = shift_composite(images, given_boxes, valid, rows, key=key.fold("x3"))
    size = tuple(images.shape[2:])
    return {
        "cutout": cutout_masks(given_boxes, valid, size, key=key.fold("a")),
        "threshold": cutout_masks(given_boxes, valid, size, key=key.fold("b"), clip="box", restore="threshold"),
        "square": square_cutout_masks(given_boxes, valid, size, key=key.fold("c")),
        "window": window_masks(given_boxes, valid, size, key=key.fold("d")),
        "jitter": jitter_boxes(given_boxes, key=key.fold("e")),
        "grid": grid_boxes(key=key),
        "free": free_boxes(key=key),
        **{name: getattr(composite, name) for name in Composite.__dataclass_fields__},
    }


def test_no_split_of_the_batch_changes_a_bit():
    given_boxes, valid = scene(24, 4)
    images, key = pictures(24, 33, 41), key_of(24)
    whole = everything(given_boxes, valid, key, images, block_derangement(key))
    for ranks in (2, 3, 6):
        each = 24 // ranks
        parts = []
        for rank in range(ranks):
            own = slice(rank * each, (rank + 1) * each)
            rows = block_derangement(key[own])
            assert torch.equal(rows + rank * each, block_derangement(key)[own])
            parts.append(everything(given_boxes[own], valid[own], key[own], images[own], rows))
        for name, expected in whole.items():
            assert torch.equal(torch.cat([part[name] for part in parts]), expected), name


def test_more_slots_do_not_change_the_draws_of_the_first():
    given_boxes, valid = scene(6, 5)
    few = draw_cutouts(given_boxes[:, :3], valid[:, :3], (40, 53), key=key_of(6))
    many = draw_cutouts(given_boxes, valid, (40, 53), key=key_of(6))
    assert torch.equal(few.ratio, many.ratio[:, :3])
    moved = jitter_boxes(given_boxes, key=key_of(6))
    assert torch.equal(jitter_boxes(given_boxes[:, :3], key=key_of(6)), moved[:, :3])


def test_slots_keep_their_identity():
    given_boxes, valid = scene(6, 4, seed=8)
    turned = given_boxes.flip(1), valid.flip(1)
    images = pictures(6, 40, 53)
    a = shift_composite(images, given_boxes, valid, images, key=key_of(6), cut=False)
    b = shift_composite(images, *turned, images, key=key_of(6), cut=False)
    assert torch.equal(a.valid, b.valid.flip(1))
    assert torch.equal(a.mask, b.mask)
    assert torch.equal(a.boxes, b.boxes.flip(1))


NOTHING = {
    "no slots": (torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.bool)),
    "none valid": (torch.rand(2, 3, 4).sort().values[..., [0, 1, 2, 3]], torch.zeros(2, 3, dtype=torch.bool)),
    "outside": (torch.tensor([1.2, -3.0, 1.5, -2.0]).expand(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)),
    "no area": (torch.tensor([0.5, 0.5, 0.5, 0.5]).expand(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)),
    "between centres": (torch.tensor([0.501, 0.501, 0.502, 0.502]).expand(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)),
}


@pytest.mark.parametrize("name", NOTHING)
def test_nothing_to_do_gives_masks_and_records(name):
    given_boxes, valid = NOTHING[name]
    key, images = key_of(2), pictures(2, 40, 53)
    found = everything(given_boxes, valid, key, images, block_derangement(key))
    assert found["cutout"].all()
    assert found["threshold"].all()
    assert found["square"].all()
    assert 0.3 < found["window"].float().mean() < 0.9
    assert torch.equal(found["images"], images.flip(0))
    assert not found["mask"].any()
    assert not found["valid"].any()
    assert (found["shift"] == 0).all()
    assert (found["visible"] == 0).all()
    assert (found["foreground"] == 0).all()
    for x in found.values():
        assert torch.isfinite(x).all()


def test_one_image_gets_a_fill_and_an_empty_batch_nothing():
    given_boxes, valid = torch.tensor([[[0.2, 0.2, 0.6, 0.6]]]), torch.ones(1, 1, dtype=torch.bool)
    images, key = torch.ones(1, 3, 20, 30), key_of(1)
    out = shift_composite(images, given_boxes, valid, block_derangement(key), key=key, fill=0.5)
    assert out.filled.tolist() == [True]
    assert out.images.unique().tolist() == [0.5, 1.0]
    none = everything(given_boxes[:0], valid[:0], key[:0], images[:0], block_derangement(key[:0]))
    assert all(len(x) == 0 for x in none.values())


def test_boxes_come_straight_from_a_plan():
    view_from_source = AxisAffine.sending(torch.tensor([[0.25, 0.0, 0.75, 1.0]])) @ AxisAffine.identity(1)
    in_view = view_from_source.boxes(torch.tensor([[[0.0, 0.2, 0.5, 0.6]]]))  # half of it is visible
    valid, images = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 3, 20, 40)
    plan = draw_cutouts(in_view, valid, (20, 40), key=key_of(1))
    assert plan.boxes.tolist() == [[[0, 4, 20, 12]]]
    out = shift_composite(images, in_view, valid, images, key=key_of(1))
    kept = 1 - plan.shown().item()
    assert 0.1 < kept < 0.6
    assert 0.2 < out.visible.item() < 0.45
    assert out.boxes[..., 0].item() > -1e-6
    assert jitter_boxes(in_view, key=key_of(1), p=0.0).tolist()[0][0] == pytest.approx([0, 0.2, 0.5, 0.6])


BOX, VALID, IMAGES = torch.tensor([[[0.1, 0.1, 0.5, 0.5]]]), torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 3, 8, 8)
NAN, ONE, STILL = torch.full((1, 1, 4), torch.nan), Key(0, 0, [1]), torch.zeros(1, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cutout_masks(BOX[0], VALID, 8, key=ONE), r"cutout_masks: boxes must be \[B, K, 4\]"),
        (lambda: cutout_masks(BOX[..., :3], VALID, 8, key=ONE), "cutout_masks: boxes must be floating boxes"),
        (lambda: cutout_masks(NAN, VALID, 8, key=ONE), "cutout_masks: boxes must be finite"),
        (lambda: cutout_masks(BOX.flip(-1), VALID, 8, key=ONE), "boxes must be boxes with x0 <= x1"),
        (lambda: cutout_masks(BOX, VALID[0], 8, key=ONE), r"cutout_masks: valid must be bool \[1, 1\]"),
        (lambda: cutout_masks(BOX, VALID, 8, key=Key(0, 0, [1, 2])), "cutout_masks: key must be a key of 1 ids"),
        (lambda: cutout_masks(BOX, VALID, 0, key=ONE), "cutout_masks: size must be an integer"),
        (lambda: cutout_masks(BOX, VALID, 8, key=ONE, ratio=(0.5, 0.2)), "cutout_masks: ratio must be"),
        (lambda: cutout_masks(BOX, VALID, 8, key=ONE, clip="view"), "cutout_masks: clip must be 'image' or 'box'"),
        (lambda: cutout_masks(BOX, VALID, 8, key=ONE, restore="no"), "cutout_masks: restore must be 'tolerance'"),
        (lambda: cutout_masks(BOX, VALID, 8, key=ONE, tolerance=(1, 2, 3)), "cutout_masks: tolerance must be"),
        (lambda: square_cutout_masks(NAN, VALID, 8, key=ONE), "square_cutout_masks: boxes must be finite"),
        (lambda: square_cutout_masks(BOX, VALID, 8, key=ONE, p=2.0), "square_cutout_masks: p must be in"),
        (lambda: window_masks(NAN, VALID, 8, key=ONE), "window_masks: boxes must be finite"),
        (lambda: window_masks(BOX, VALID, 8, key=ONE, mode="both"), "window_masks: mode must be"),
        (lambda: window_masks(BOX, VALID, 8, key=ONE, ratio=(0.0, 1.0)), "window_masks: ratio must be positive"),
        (lambda: jitter_boxes(NAN, key=ONE), "jitter_boxes: boxes must be finite"),
        (lambda: jitter_boxes(BOX, key=ONE, law="wild"), "jitter_boxes: law must be one of restricted, soco, free"),
        (lambda: jitter_boxes(BOX, key=ONE, scale=(0.8, 1.2)), "jitter_boxes: scale must be .* <= 1"),
        (lambda: jitter_boxes(BOX, key=ONE, shift=-1.0), "jitter_boxes: shift must be at least 0"),
        (lambda: grid_boxes(0, key=ONE), "grid_boxes: n must be an integer"),
        (lambda: free_boxes(3, key=ONE, share=(0.5, 2.0)), "free_boxes: share must be"),
        (lambda: block_derangement(ONE, 1), "block_derangement: group must be an integer"),
        (lambda: block_derangement(ONE, ok=torch.ones(2)), r"block_derangement: ok must be bool \[1\]"),
        (lambda: paste(IMAGES, VALID, IMAGES, torch.zeros(1, 2).long()), r"paste: mask must be bool \[1, 8, 8\]"),
        (lambda: paste(IMAGES, IMAGES[:, 0] > 0, IMAGES, torch.zeros(1, 2)), r"paste: shift must be int64 \[1, 2\]"),
        (lambda: paste(IMAGES, IMAGES[:, 0] > 0, IMAGES[..., :4], torch.zeros(1, 2).long()), "paste: backgrounds must"),
        (lambda: paste(IMAGES, IMAGES[:, 0] > 0, torch.tensor([1]), torch.zeros(1, 2).long()), "paste: rows must be"),
        (lambda: paste(IMAGES, IMAGES[:, 0] > 0, IMAGES, STILL, out=IMAGES[..., :4]), "paste: out must be contiguous"),
        (lambda: paste(IMAGES, IMAGES[:, 0] > 0, IMAGES, STILL, out=IMAGES.mT), "paste: out must be contiguous"),
        (lambda: paste(IMAGES, IMAGES[:, 0] > 0, IMAGES, STILL, out=IMAGES.half()), "paste: out must be contiguous"),
        (lambda: shift_composite(IMAGES[0], BOX, VALID, IMAGES, key=ONE), "shift_composite: images must be"),
        (lambda: shift_composite(IMAGES, NAN, VALID, IMAGES, key=ONE), "shift_composite: boxes must be finite"),
        (lambda: shift_composite(IMAGES, BOX, VALID, IMAGES, key=ONE, room=1.0), "shift_composite: room must be in"),
        (lambda: shift_composite(IMAGES, BOX, VALID, IMAGES[..., :4], key=ONE), "backgrounds must be"),
        (lambda: boxes_with_room(NAN, VALID, (8, 8)), "boxes_with_room: boxes must be finite"),
        (lambda: shift_boxes(BOX, torch.zeros(3, 2), (8, 8)), "shift_boxes: shift must be"),
    ],
)  # fmt: skip
def test_bad_input_is_named(our_errors, call, message):
    with pytest.raises(ValueError, match=message):
        call()

import math

import pytest
import torch
from torch.nn import functional
from torchvision.ops import roi_align

from geoaug import grids
from geoaug.objectives.cell_weights import roi_weights
from geoaug.objectives.readout import fpn_level, roi_features, sample_points

H, W = 5, 7


def features(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def some_boxes(batch, k, *, low=-0.1, high=1.1, seed=1, dtype=torch.float64):
    corners = features(batch, k, 2, 2, seed=seed).sigmoid().mul(high - low).add(low).sort(dim=2)[0]
    return corners.flatten(2).to(dtype)


def bilinear(image, x, y):
    """One value of a map given as rows of floats, at indices (x, y) clamped to it."""
    height, width = len(image), len(image[0])
    x, y = min(max(x, 0), width - 1), min(max(y, 0), height - 1)
    x0, y0 = math.floor(x), math.floor(y)
    x1, y1, s, t = min(x0 + 1, width - 1), min(y0 + 1, height - 1), x - x0, y - y0
    top, bottom = (image[r][x0] * (1 - s) + image[r][x1] * s for r in (y0, y1))
    return top * (1 - t) + bottom * t


def pool_box(image, box, bins, aligned, ratio):
    """RoIAlign of one unit box on one channel; a sample more than a cell outside the map counts as 0."""
    height, width = len(image), len(image[0])
    offset = 0.5 if aligned else 0.0
    x0, y0, x1, y1 = (v * s - offset for v, s in zip(box, (width, height, width, height), strict=True))
    w, h = x1 - x0, y1 - y0
    if not aligned:
        w, h = max(w, 1), max(h, 1)
    rows, columns = bins
    ny, nx = (ratio, ratio) if ratio > 0 else (math.ceil(h / rows), math.ceil(w / columns))
    out = []
    for r in range(rows):
        out.append([])
        for c in range(columns):
            total = 0.0
            for i in range(ny):
                for j in range(nx):
                    y = y0 + (r + (i + 0.5) / ny) * h / rows
                    x = x0 + (c + (j + 0.5) / nx) * w / columns
                    if -1 <= y <= height and -1 <= x <= width:
                        total += bilinear(image, x, y)
            out[-1].append(total / (ny * nx))
    return out


def test_points_against_the_loop():
    maps, points = features(2, 3, H, W), features(2, 11, 2, seed=1) * 0.7 + 0.5
    read = sample_points(maps, points)
    for b in range(2):
        for p, (x, y) in enumerate(points[b].tolist()):
            for c in range(3):
                expected = bilinear(maps[b, c].tolist(), x * W - 0.5, y * H - 0.5)
                assert read[b, p, c].item() == pytest.approx(expected, abs=1e-12)


def test_a_point_at_a_cell_centre_reads_the_cell():
    maps = features(2, 3, H, W, dtype=torch.float32)
    centres = grids.cell_centers(H, W).expand(2, -1, -1)
    assert torch.allclose(sample_points(maps, centres), maps.flatten(2).mT, atol=1e-5)


def test_points_follow_a_mirrored_map():
    maps, points = features(2, 3, H, W), features(2, 9, 2, seed=2).sigmoid()
    mirrored = torch.stack((1 - points[..., 0], points[..., 1]), -1)
    assert torch.allclose(sample_points(maps, points), sample_points(maps.flip(-1), mirrored))


@pytest.mark.parametrize("size", [(11, 9), (3, 20), 56, (1, 1), (5, 7)])
def test_points_of_an_upsampled_map_are_read_without_making_it(size):
    maps, points = features(2, 3, H, W).requires_grad_(), features(2, 40, 2, seed=1) * 0.7 + 0.5
    read = sample_points(maps, points, upsample=size)
    whole = sample_points(functional.interpolate(maps, size, mode="bilinear", align_corners=False), points)
    assert torch.allclose(read, whole, atol=1e-12)
    weights = features(2, 40, 3, seed=2)
    found, expected = (torch.autograd.grad((x * weights).sum(), maps)[0] for x in (read, whole))
    assert torch.allclose(found, expected, atol=1e-12)
    assert sample_points(maps.bfloat16(), points.float(), upsample=size).dtype == torch.bfloat16


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize(("output", "ratio"), [(1, 0), (3, 0), ((2, 3), 0), (2, 2)])
def test_boxes_against_the_loop(aligned, output, ratio):
    maps, boxes = features(2, 2, H, W), some_boxes(2, 6)
    valid = torch.ones(2, 6, dtype=torch.bool)
    pooled = roi_features(maps, boxes, valid, output, aligned=aligned, sampling_ratio=ratio)
    bins = output if isinstance(output, tuple) else (output, output)
    for b in range(2):
        for k in range(6):
            for c in range(2):
                expected = pool_box(maps[b, c].tolist(), boxes[b, k].tolist(), bins, aligned, ratio)
                assert torch.allclose(pooled[b, k, c], torch.tensor(expected, dtype=torch.float64), atol=1e-10)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [0, 1, 2, 5])
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.5, 2.5)])
def test_one_bin_reads_and_teaches_as_the_operator_does(aligned, ratio, low, high):
    maps, boxes = features(3, 4, H, W).requires_grad_(), some_boxes(3, 50, low=low, high=high)
    boxes[0, 0] = torch.tensor([-0.5, 0.2, 0.5, 0.3])  # begins half the map outside
    boxes[0, 1], boxes[0, 2] = torch.tensor([0, 0, 1, 1]), torch.tensor([2.0, 2.0, 3.0, 3.0])
    pooled = roi_features(maps, boxes, torch.ones(3, 50, dtype=torch.bool), 1, aligned=aligned, sampling_ratio=ratio)
    rows = torch.arange(3.0).repeat_interleave(50)[:, None]
    rois = torch.cat((rows, boxes.flatten(0, 1) * torch.tensor([W, H, W, H])), 1)
    expected = roi_align(maps, rois, 1, 1.0, ratio, aligned).view(3, 50, 4, 1, 1)
    assert torch.allclose(pooled, expected, atol=1e-12)
    assert not pooled[0, 2].any()
    weights = features(3, 50, 4, 1, 1, seed=3)
    found, wanted = (torch.autograd.grad((x * weights).sum(), maps)[0] for x in (pooled, expected))
    assert torch.allclose(found, wanted, atol=1e-12)


@pytest.mark.parametrize("aligned", [True, False])
def test_samples_on_the_last_place_that_counts(aligned):
    """A sample one cell before the first centre's cell, or at the far edge, still belongs to the outermost cells."""
    maps, shift = features(1, 2, 8, 8), 0.5 if aligned else 0.0
    cells = torch.tensor([[-2.0, 2, 0, 4], [-2.5, 2, 0, 4], [7, 2, 9, 4], [7.5, 2, 9, 4]], dtype=torch.float64) + shift
    pooled = roi_features(
        maps, cells[None] / 8, torch.ones(1, 4, dtype=torch.bool), 1, aligned=aligned, sampling_ratio=1
    )
    expected = roi_align(maps, torch.cat((torch.zeros(4, 1), cells), 1), 1, 1.0, 1, aligned)
    assert torch.allclose(pooled[0], expected, atol=1e-12)
    assert [bool(x.any()) for x in pooled[0]] == [True, False, True, False]


def test_weights_of_a_large_map_keep_float32s_digits():
    boxes = some_boxes(1, 200, low=0, high=1, dtype=torch.float32)
    wide = roi_weights(boxes.double(), (200, 300))
    assert torch.allclose(roi_weights(boxes, (200, 300)).double(), wide, atol=2e-6)


def test_no_gradient_reaches_the_boxes():
    boxes = some_boxes(1, 3).requires_grad_()
    for output in (1, 2):
        maps = features(1, 2, H, W).requires_grad_()
        roi_features(maps, boxes, torch.ones(1, 3, dtype=torch.bool), output).sum().backward()
    assert boxes.grad is None or not boxes.grad.any()


def test_one_bin_of_a_level_that_a_box_does_not_read():
    """Its corners on cell centres of that level, where a box without samples must not become 0 / 0."""
    maps = [features(1, 2, 7, 7, seed=s).requires_grad_() for s in (0, 1)]
    boxes, valid = torch.tensor([[[1.5, 2.5, 4.5, 3.5]]], dtype=torch.float64) / 7, torch.ones(1, 1, dtype=torch.bool)
    pooled = roi_features(maps, boxes, valid, 1, level=torch.ones(1, 1, dtype=torch.int64))
    assert torch.equal(pooled, roi_features(maps[1], boxes, valid, 1))
    pooled.sum().backward()
    assert not maps[0].grad.any()
    assert maps[1].grad.sum() == pytest.approx(2)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [0, 3])
def test_weights_of_cells_are_what_one_bin_reads(aligned, ratio):
    maps, boxes = features(3, 4, H, W), some_boxes(3, 20)
    boxes[0, 0, 2:] = boxes[0, 0, :2]  # a point
    weights = roi_weights(boxes, (H, W), aligned=aligned, sampling_ratio=ratio)
    read = roi_features(maps, boxes, torch.ones(3, 20).bool(), 1, aligned=aligned, sampling_ratio=ratio)
    assert torch.allclose(weights @ maps.flatten(2).mT, read.flatten(2))
    inside = roi_weights(some_boxes(3, 20, low=0, high=1, dtype=torch.float32), (H, W), sampling_ratio=ratio)
    assert inside.dtype == torch.float32
    assert torch.allclose(inside.sum(-1), torch.ones(3, 20), atol=1e-6)


def test_one_bin_takes_as_many_samples_as_the_operator_on_whole_cells():
    """A side of a whole number of cells may come out longer by a rounding, which is one sample more."""
    maps = features(1, 2, 7, 7, dtype=torch.float32)
    sides = [(a / 7, b / 7) for a in range(7) for b in range(a + 1, 8)]
    boxes = torch.tensor([[(x0, y0, x1, y1) for x0, x1 in sides for y0, y1 in sides]])
    pooled = roi_features(maps, boxes, torch.ones(1, len(sides) ** 2, dtype=torch.bool), 1)
    expected = roi_align(maps, torch.cat((boxes[0, :, :1] * 0, boxes[0] * 7), 1), 1, 1.0, 0, True)
    assert torch.allclose(pooled[0], expected, atol=1e-5)


def test_published_vector_three():
    """Features that hold their own centre coordinate at stride 32: true centres only with aligned=True."""
    maps = ((torch.arange(7.0) + 0.5) * 32).expand(1, 1, H, W)
    box = torch.tensor([[[32, 0, 96, 160], [128, 0, 192, 160], [100, 0, 110, 160]]]) / torch.tensor([224, 160] * 2)
    valid = torch.ones(1, 3, dtype=torch.bool)
    read = [roi_features(maps, box, valid, 1, aligned=aligned).flatten().tolist() for aligned in (True, False)]
    assert read[0] == pytest.approx([64, 160, 105], abs=1e-3)
    assert read[1] == pytest.approx([80, 176, 132], abs=1e-3)


def test_boxes_follow_a_mirrored_map():
    maps, boxes = features(2, 3, H, W), some_boxes(2, 4)
    mirrored = torch.stack((1 - boxes[..., 2], boxes[..., 1], 1 - boxes[..., 0], boxes[..., 3]), -1)
    valid = torch.ones(2, 4, dtype=torch.bool)
    pooled = roi_features(maps, boxes, valid, 3)
    assert torch.allclose(pooled, roi_features(maps.flip(-1), mirrored, valid, 3).flip(-1))


def test_a_box_without_area_reads_its_point():
    maps = features(1, 3, H, W)
    points = torch.tensor([[[0.3, 0.6], [0.71, 0.2]]], dtype=torch.float64)
    pooled = roi_features(maps, points.repeat(1, 1, 2), torch.ones(1, 2, dtype=torch.bool), 1)
    assert torch.allclose(pooled[..., 0, 0], sample_points(maps, points), atol=1e-3)


def test_invalid_slots_are_zero_whatever_they_hold():
    maps, boxes = features(2, 3, H, W).requires_grad_(), some_boxes(2, 4)
    valid = torch.tensor([[True, False, True, False], [False] * 4])
    clean = roi_features(maps, boxes, valid, 2)
    dirty = boxes.clone()
    dirty[0, 1], dirty[0, 3], dirty[1] = math.nan, torch.tensor([1.0, 1.0, 0.0, 0.0]), math.inf
    pooled = roi_features(maps, dirty, valid, 2)
    assert torch.equal(pooled, clean)
    assert not pooled[~valid].any()
    assert pooled[valid].abs().min() > 0
    pooled.sum().backward()
    assert maps.grad is not None
    assert maps.grad[0].any()
    assert not maps.grad[1].any()
    assert torch.isfinite(maps.grad).all()


@pytest.mark.parametrize(("batch", "k"), [(0, 3), (2, 0), (0, 0), (2, 3)])
def test_nothing_to_read_stays_in_the_graph(batch, k):
    maps = features(batch, 4, H, W, dtype=torch.float32).requires_grad_()
    boxes, valid = torch.zeros(batch, k, 4), torch.zeros(batch, k, dtype=torch.bool)
    pooled = roi_features(maps, boxes, valid, 2)
    assert pooled.shape == (batch, k, 4, 2, 2)
    levels = roi_features([maps, maps], boxes, valid, 2, level=torch.zeros(batch, k, dtype=torch.int64))
    read = sample_points(maps, boxes[..., :2])
    assert read.shape == (batch, k, 4)
    (pooled.sum() + levels.sum() + 0 * read.sum()).backward()
    assert maps.grad is not None
    assert not maps.grad.any()


def test_a_map_of_one_cell():
    maps = features(2, 3, 1, 1)
    valid = torch.ones(2, 2, dtype=torch.bool)
    expected = maps[:, None].expand(-1, 2, -1, 2, 2)
    inside = some_boxes(2, 2, low=0.0, high=1.0)
    assert torch.allclose(roi_features(maps, inside, valid, 2), expected)
    assert torch.allclose(sample_points(maps, inside[..., :2]), maps[:, :, 0, 0][:, None].expand(-1, 2, -1))


def test_each_slot_reads_its_level():
    maps = [features(2, 3, H * s, W * s, seed=s).requires_grad_() for s in (4, 2, 1)]
    boxes, valid = some_boxes(2, 5), torch.ones(2, 5, dtype=torch.bool)
    valid[1, 2] = False
    level = torch.tensor([[0, 1, 2, 2, 0], [1, 1, 2, 0, 2]])
    pooled = roi_features(maps, boxes, valid, 3, level=level)
    alone = torch.stack([roi_features(m, boxes, valid, 3) for m in maps])
    for b in range(2):
        for k in range(5):
            assert torch.equal(pooled[b, k], alone[level[b, k], b, k])
    pooled[:, 0].sum().backward()
    assert maps[0].grad[0].any()
    assert not maps[0].grad[1].any()
    assert not maps[2].grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_are_read_in_float32(dtype):
    maps, boxes = features(2, 3, H, W, dtype=dtype).requires_grad_(), some_boxes(2, 4, dtype=torch.float32)
    valid = torch.ones(2, 4, dtype=torch.bool)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pooled, read = roi_features(maps, boxes, valid, 2), sample_points(maps, boxes[..., :2])
    assert pooled.dtype == read.dtype == dtype
    assert torch.equal(pooled, roi_features(maps.float(), boxes, valid, 2).to(dtype))
    assert torch.equal(read, sample_points(maps.float(), boxes[..., :2]).to(dtype))
    (pooled.sum() + read.sum()).backward()
    assert maps.grad.isfinite().all()


def test_readouts_pass_gradcheck():
    maps, boxes = features(1, 2, 3, 4).requires_grad_(), some_boxes(1, 2, low=0.05, high=0.95)
    valid = torch.tensor([[True, False]])
    assert torch.autograd.gradcheck(lambda m: roi_features(m, boxes, valid, 2), maps)
    assert torch.autograd.gradcheck(lambda m: sample_points(m, boxes[..., :2]), maps)


def test_levels_against_the_loop():
    size, edges = (160, 224), (48, 96, 192)
    boxes = some_boxes(50, 4, low=0, high=1, dtype=torch.float32)
    found = fpn_level(boxes, size)
    assert found.dtype == torch.int64
    for box, level in zip(boxes.reshape(-1, 4).tolist(), found.flatten().tolist(), strict=True):
        side = math.sqrt((box[2] - box[0]) * size[1] * (box[3] - box[1]) * size[0])
        assert level == sum(side > edge for edge in edges)


def test_a_side_on_the_edge_belongs_to_the_finer_level():
    x = torch.arange(224 - 192) / 224
    for side, level in ((48, 0), (49, 1), (96, 1), (97, 2), (192, 2), (193, 3)):
        boxes = torch.stack((x, x, x + side / 224, x + side / 224), -1)[:, None]
        assert set(fpn_level(boxes, (224, 224)).flatten().tolist()) == {level}
    assert fpn_level(torch.zeros(0, 3, 4), 224).shape == (0, 3)


@pytest.mark.usefixtures("our_errors")
def test_bad_input_is_named():
    maps, boxes = features(2, 3, H, W, dtype=torch.float32), some_boxes(2, 4, dtype=torch.float32)
    valid = torch.ones(2, 4, dtype=torch.bool)
    level = torch.zeros(2, 4, dtype=torch.int64)
    bad = [
        (lambda: sample_points(maps[0], boxes[..., :2]), "sample_points: features must be"),
        (lambda: sample_points(maps, boxes), "sample_points: points must be"),
        (lambda: sample_points(maps, boxes[:1, :, :2]), "sample_points: points must be"),
        (lambda: sample_points(maps, boxes[..., :2] * math.nan), "sample_points: points must be finite"),
        (lambda: roi_features(maps.long(), boxes, valid, 2), "roi_features: features must be"),
        (lambda: roi_features(maps, boxes[0], valid, 2), "roi_features: boxes must be"),
        (lambda: roi_features(maps, boxes.flip(-1), valid, 2), "roi_features: boxes must be boxes with x0 <= x1"),
        (lambda: roi_features(maps, boxes * math.nan, valid, 2), "roi_features: boxes must be finite"),
        (lambda: roi_features(maps, boxes, valid.float(), 2), "roi_features: valid must be"),
        (lambda: roi_features(maps, boxes, valid[:, :3], 2), "roi_features: valid must be"),
        (lambda: roi_features(maps, boxes, valid, 0), "roi_features: output_size must be"),
        (lambda: roi_features(maps, boxes, valid, 2, sampling_ratio=-1), "roi_features: sampling_ratio must be"),
        (lambda: roi_features([maps, maps], boxes, valid, 2), "roi_features: level must be"),
        (lambda: roi_weights(boxes[0], 7), "roi_weights: boxes must be floating unit boxes"),
        (lambda: roi_weights(boxes.flip(-1), 7), "roi_weights: boxes must be boxes with x0 <= x1"),
        (lambda: roi_weights(boxes, (0, 7)), "roi_weights: size must be"),
        (lambda: roi_weights(boxes, 7, sampling_ratio=-1), "roi_weights: sampling_ratio must be"),
        (lambda: roi_features(maps, boxes, valid, 2, level=level), "roi_features: level must be"),
        (lambda: roi_features([maps, maps], boxes, valid, 2, level=level + 2), "roi_features: level must be"),
        (lambda: roi_features([maps, maps[:, :2]], boxes, valid, 2, level=level), "roi_features: features must be"),
        (lambda: roi_features([], boxes, valid, 2, level=level), "roi_features: features must be"),
        (lambda: fpn_level(boxes[..., :3], 224), "fpn_level: boxes must be"),
        (lambda: fpn_level(boxes, (1, 2, 3)), "fpn_level: size must be"),
        (lambda: fpn_level(boxes, 224, (96, 48)), "fpn_level: edges must be"),
    ]
    for call, message in bad:
        with pytest.raises(ValueError, match=message):
            call()


def test_readout_is_what_grid_sample_says():
    """A second witness that is not ours, for points inside and outside."""
    maps, points = features(2, 3, H, W, dtype=torch.float32), features(2, 9, 2, seed=3, dtype=torch.float32)
    grid = (points * 2 - 1)[:, None]
    peer = functional.grid_sample(maps, grid, padding_mode="border", align_corners=False)[:, :, 0].mT
    assert torch.allclose(sample_points(maps, points), peer, atol=1e-6)

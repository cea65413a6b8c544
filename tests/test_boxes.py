import pytest
import torch
import torchvision

from geoaug import boxes, grids

from . import reference


def some(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    low = torch.rand(n, 2, generator=g, dtype=torch.float64) * 1.5 - 0.5
    return torch.cat((low, low + torch.rand(n, 2, generator=g, dtype=torch.float64)), -1)


def test_area_and_iou_against_loops_and_torchvision():
    a, b = some(5), some(7, seed=1)
    expected = [[reference.iou(x, y) for y in b.tolist()] for x in a.tolist()]
    assert torch.allclose(boxes.iou(a, b), torch.tensor(expected, dtype=torch.float64))
    assert torch.allclose(boxes.iou(a, b), torchvision.ops.box_iou(a, b))
    assert torch.allclose(boxes.area(a), torchvision.ops.box_area(a))


def test_iou_of_batches():
    a, b = torch.stack((some(5), some(5, 2))), torch.stack((some(3, 4), some(3, 5)))
    assert boxes.iou(a, b).shape == (2, 5, 3)
    assert torch.equal(boxes.iou(a, b)[1], boxes.iou(a[1], b[1]))


def test_iou_of_nothing_is_zero_not_nan():
    point = torch.tensor([[0.5, 0.5, 0.5, 0.5]])
    assert boxes.iou(point, point).tolist() == [[0.0]]
    assert boxes.iou(torch.zeros(0, 4), point).shape == (0, 1)


def test_clip_and_visible_fraction():
    b = torch.tensor([[-0.5, 0.25, 0.5, 0.75], [1.5, 0.0, 2.0, 1.0], [0.0, 0.0, 1.0, 1.0], [0.3, 0.3, 0.3, 0.9]])
    expected = [[0.0, 0.25, 0.5, 0.75], [1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0], [0.3, 0.3, 0.3, 0.9]]
    assert torch.equal(boxes.clip(b), torch.tensor(expected))
    assert boxes.visible_fraction(b).tolist() == [0.5, 0.0, 1.0, 0.0]


def test_intersect():
    a = torch.tensor([[0.0, 0.0, 0.5, 1.0], [0.0, 0.0, 0.2, 0.2]])
    b = torch.tensor([[0.25, 0.5, 1.0, 2.0], [0.5, 0.5, 1.0, 1.0]])
    common = boxes.intersect(a, b)
    assert common[0].tolist() == [0.25, 0.5, 0.5, 1.0]
    assert boxes.area(common)[1] == 0


def test_pixels_there_and_back():
    pixels = torch.tensor([[20, 10, 40, 30]])
    assert boxes.from_pixels(pixels, (100, 200))[0].tolist() == pytest.approx([0.1, 0.1, 0.2, 0.3])
    assert torch.allclose(boxes.to_pixels(boxes.from_pixels(pixels, (100, 200)), (100, 200)), pixels.float())
    sizes = torch.tensor([[100, 200], [50, 70]])
    batch = torch.tensor([[[20.0, 10.0, 40.0, 30.0]], [[35.0, 25.0, 70.0, 50.0]]])
    unit = boxes.from_pixels(batch, sizes)
    assert unit[1, 0].tolist() == pytest.approx([0.5, 0.5, 1.0, 1.0])
    assert torch.allclose(boxes.to_pixels(unit, sizes), batch)


def test_other_formats():
    assert boxes.from_xywh(torch.tensor([[10, 20, 30, 40]])).tolist() == [[10, 20, 40, 60]]
    assert boxes.to_xywh(torch.tensor([[10, 20, 40, 60]])).tolist() == [[10, 20, 30, 40]]
    # Published vector 11: SoCo's [10, 20, 30, 40] is loaded as inclusive (10, 20, 39, 59) = edges (10, 20, 40, 60).
    assert boxes.from_soco_inclusive(torch.tensor([[10, 20, 39, 59]])).tolist() == [[10, 20, 40, 60]]


def test_cell_centers():
    centers = grids.cell_centers(5, 7)
    assert centers.shape == (35, 2)
    expected = [[(column + 0.5) / 7, (row + 0.5) / 5] for row in range(5) for column in range(7)]
    assert torch.allclose(centers, torch.tensor(expected))  # every cell: the middle one cannot tell x from y
    assert grids.cell_centers(1, 1).tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: boxes.area(torch.zeros(3)), r"area: boxes must be floating boxes \[\.\.\., 4\].*got float32 \[3\]"),
        (lambda: boxes.area(torch.tensor([1.0, 0.0, 0.0, 1.0])), "area: boxes must be boxes with x0 <= x1"),
        (lambda: boxes.iou(torch.full((1, 4), float("nan")), torch.zeros(1, 4)), "finite"),
        (lambda: boxes.clip(torch.full((1, 4), float("inf"))), "clip: boxes must be finite"),
        (lambda: boxes.from_pixels(torch.zeros(1, 4), (0, 5)), "from_pixels: size must be an integer"),
        (lambda: boxes.from_pixels(torch.zeros(2, 1, 4), torch.zeros(2, 2)), "from_pixels: size must be at least 1"),
        (lambda: boxes.from_pixels(torch.zeros(2, 1, 4), torch.ones(2, 3)), r"size must be \[\*batch, 2\]"),
        (lambda: boxes.from_xywh(torch.tensor([1.0, 1.0, -1.0, 1.0])), "from_xywh: boxes must be finite with width"),
        (lambda: boxes.from_soco_inclusive(torch.zeros(3)), "from_soco_inclusive: boxes must"),
        (lambda: boxes.from_pixels([[1.0, 2.0, 3.0, 4.0]], (5, 5)), "from_pixels: boxes must be floating boxes"),
        (lambda: boxes.from_pixels(torch.zeros(2, 1, 4), torch.full((2, 2), float("inf"))), "at least 1 and finite"),
        (lambda: boxes.to_xywh(torch.tensor([5, 5, 1, 9])), "to_xywh: boxes must be boxes with x0 <= x1"),
        (lambda: boxes.from_soco_inclusive(torch.tensor([5, 5, 1, 9])), "boxes with x0 <= x1"),
        (lambda: boxes.intersect(torch.zeros(2, 4), torch.zeros(3, 4)), r"broadcasts with \[2\], got \[3\]"),
        (lambda: boxes.iou(torch.zeros(4), torch.zeros(4)), r"iou: a must be boxes \[\*batch, N, 4\]"),
        (lambda: grids.cell_centers(0, 3), "cell_centers: h must be an integer in"),
    ],
)
def test_bad_input(our_errors, make, message):
    with pytest.raises(ValueError, match=message):
        make()

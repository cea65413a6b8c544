import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from geoaug import AxisAffine

from . import reference

scales = st.floats(0.05, 20).flatmap(lambda s: st.sampled_from([s, -s]))
shifts = st.floats(-10, 10)


@st.composite
def maps(draw, batch=(5,)):
    n = 2 * torch.Size(batch).numel()
    rows = [draw(st.lists(x, min_size=n, max_size=n)) for x in (scales, shifts)]
    scale, shift = (torch.tensor(row, dtype=torch.float64).reshape(*batch, 2) for row in rows)
    return AxisAffine(scale, shift)


def points(seed=0, shape=(5, 7, 2)):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 4 - 2


def close(a, b, tolerance=1e-6):
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance)


@given(maps(), maps())
def test_composition_is_one_map_after_the_other(a, b):
    assert close((a @ b)(points()), a(b(points())))


@given(maps(), maps(), maps())
def test_composition_is_associative(a, b, c):
    assert close(((a @ b) @ c)(points()), (a @ (b @ c))(points()))


@given(maps())
def test_inverse_undoes_on_both_sides(a):
    assert close((~a @ a)(points()), points())
    assert close((a @ ~a)(points()), points())
    assert close((~~a)(points()), a(points()))


@given(maps(), maps())
def test_inverse_of_a_composition(a, b):
    assert close((~(a @ b))(points()), (~b @ ~a)(points()))


@given(maps())
def test_identity_changes_nothing(a):
    identity = AxisAffine.identity(5)
    assert close((identity @ a)(points()), a(points()))
    assert close((a @ identity)(points()), a(points()))


@given(maps())
def test_boxes_follow_their_corners(a):
    low = points(1, (5, 3, 2))
    boxes = torch.cat((low, low + points(2, (5, 3, 2)).abs()), -1)
    mapped = a.boxes(boxes)
    for i in range(5):
        for j in range(3):
            (sx, sy), (tx, ty) = a.scale[i].tolist(), a.shift[i].tolist()
            x0, y0, x1, y1 = boxes[i, j].tolist()
            xs, ys = sorted((sx * x0 + tx, sx * x1 + tx)), sorted((sy * y0 + ty, sy * y1 + ty))
            assert mapped[i, j].tolist() == pytest.approx([xs[0], ys[0], xs[1], ys[1]], abs=1e-9)


@given(maps())
def test_matrix_is_the_same_map(a):
    homogeneous = torch.nn.functional.pad(points(), (0, 1), value=1.0)
    assert close((homogeneous @ a.matrix().mT)[..., :2], a(points()))
    assert torch.equal(a.matrix()[..., 2, :], torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64).expand(5, 3))


@pytest.mark.parametrize("flipped", [False, True])
def test_published_vector_one(flipped):
    """Crop (x0=10, y0=20, w=100, h=50) of a 200 x 80 image to 224, point (35, 30), box (35, 30, 60, 40)."""
    size = torch.tensor([200.0, 80.0])
    crop = AxisAffine.sending((torch.tensor([10.0, 20.0, 110.0, 70.0]) / size.repeat(2))[None])
    a = AxisAffine.flip_x(torch.tensor([flipped])) @ crop
    u, v = (a((torch.tensor([35.0, 30.0]) / size)[None, None]) * 224)[0, 0].tolist()
    assert (u, v) == pytest.approx((168 if flipped else 56, 44.8), abs=1e-4)
    assert u / 32 - 0.5 == pytest.approx(4.75 if flipped else 1.25, abs=1e-5)
    box = (a.boxes((torch.tensor([35.0, 30.0, 60.0, 40.0]) / size.repeat(2))[None, None]) * 224)[0, 0].tolist()
    assert box == pytest.approx([112, 44.8, 168, 89.6] if flipped else [56, 44.8, 112, 89.6], abs=1e-4)
    back = (~a)(torch.tensor([[[u, v]]]) / 224)[0, 0] * size
    assert back.tolist() == pytest.approx([35, 30], abs=1e-4)


def test_sending_carries_the_box_onto_the_unit_square():
    boxes = torch.tensor([[0.1, 0.2, 0.5, 0.9], [-1.0, 0.0, 3.0, 0.25]])
    assert torch.allclose(
        AxisAffine.sending(boxes).boxes(boxes[:, None]), torch.tensor([0.0, 0.0, 1.0, 1.0]), atol=1e-6
    )


def test_flip_mirrors_x_alone_and_only_where_asked():
    a = AxisAffine.flip_x(torch.tensor([True, False]))
    p = torch.tensor([[0.2, 0.3]]).expand(2, 1, 2)
    assert torch.allclose(a(p), torch.tensor([[[0.8, 0.3]], [[0.2, 0.3]]]))


def test_a_mirrored_box_keeps_its_order():
    a = AxisAffine.flip_x(torch.tensor([True]))
    assert torch.allclose(a.boxes(torch.tensor([[[0.1, 0.2, 0.4, 0.9]]])), torch.tensor([[[0.6, 0.2, 0.9, 0.9]]]))


def test_agrees_with_the_pixel_loop():
    crop, size = (13, 7, 50, 61), (97, 71)
    box = torch.tensor([13 / 71, 7 / 97, 50 / 71, 61 / 97], dtype=torch.float64)
    p = points(3, (1, 6, 2))
    for flipped in (False, True):
        a = AxisAffine.flip_x(torch.tensor([flipped])) @ AxisAffine.sending(box[None])
        expected = [reference.map_point(crop, flipped, size, q) for q in p[0].tolist()]
        assert close(a(p)[0], torch.tensor(expected, dtype=torch.float64))
        back = [reference.unmap_point(crop, flipped, size, q) for q in p[0].tolist()]
        assert close((~a)(p)[0], torch.tensor(back, dtype=torch.float64))


def test_indexing_follows_the_batch_shape():
    a = AxisAffine(torch.arange(1.0, 25).reshape(4, 3, 2), torch.zeros(4, 3, 2))
    assert a[:, 1].batch_shape == (4,)
    assert a[2].batch_shape == (3,)
    assert a[2, 1].batch_shape == ()
    assert a[..., 1].batch_shape == (4,)
    assert a[torch.tensor([3, 0])].batch_shape == (2, 3)
    assert torch.equal(a[:, 1].scale, a.scale[:, 1])
    assert torch.equal(a[torch.tensor([True, False, False, True])].scale, a.scale[[0, 3]])


def test_maps_broadcast():
    a = AxisAffine.sending(torch.tensor([[0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0]]))
    assert (AxisAffine.identity() @ a).batch_shape == (2,)
    assert a(torch.rand(1, 9, 2)).shape == (2, 9, 2)
    assert a[0](torch.rand(9, 2)).shape == (9, 2)


def test_inputs_are_not_mutated_and_dtype_is_kept():
    p = points()
    kept = p.clone()
    a = AxisAffine(torch.full((5, 2), 2.0), torch.ones(5, 2))
    assert a(p).dtype == torch.float64
    assert a(p.float()).dtype == torch.float32
    assert torch.equal(p, kept)
    with pytest.raises(AttributeError):
        a.scale = a.shift


@pytest.mark.parametrize("batch", [(0,), (5, 0), (0, 3)])
def test_empty_batches(batch):
    a = AxisAffine.identity(*batch)
    assert (~a @ a)(torch.zeros(*batch, 4, 2)).shape == (*batch, 4, 2)
    assert a.boxes(torch.zeros(*batch, 0, 4)).shape == (*batch, 0, 4)
    assert a.matrix().shape == (*batch, 3, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AxisAffine(torch.ones(3), torch.ones(3)), r"AxisAffine: scale must be floating \[\*batch, 2\], got"),
        (
            lambda: AxisAffine(torch.ones(3, 2), torch.ones(2, 2)),
            r"shift must be shaped like scale \[3, 2\], got float32",
        ),
        (lambda: AxisAffine(torch.ones(2).double(), torch.ones(2)), "dtype"),
        (lambda: AxisAffine(torch.ones(2, dtype=torch.int64), torch.ones(2)), "scale must be floating"),
        (lambda: AxisAffine(torch.tensor([0.0, 1.0]), torch.ones(2)), "scale must be non-zero"),
        (lambda: AxisAffine(torch.tensor([float("nan"), 1.0]), torch.ones(2)), "scale must be finite"),
        (lambda: AxisAffine.sending(torch.tensor([0.5, 0.0, 0.5, 1.0])), "sending: box must be of positive width"),
        (lambda: AxisAffine.sending(torch.tensor([0.6, 0.0, 0.5, 1.0])), "x0 <= x1"),
        (lambda: AxisAffine.flip_x(torch.ones(2)), r"flip_x: mask must be a bool tensor"),
        (lambda: AxisAffine.identity(3) @ AxisAffine.identity(2), r"broadcasts with \[3\], got \[2\]"),
        (lambda: AxisAffine.identity(3)(torch.ones(2, 1, 2)), r"points must be of a batch that broadcasts with \[3\]"),
        (lambda: AxisAffine.identity(1)(torch.ones(2)), r"points must be points \[\*batch, P, 2\]"),
        (lambda: AxisAffine.identity(1)(torch.ones(1, 1, 3)), r"points must be .* got float32 \[1, 1, 3\]"),
        (lambda: AxisAffine.identity(1)(torch.full((1, 1, 2), float("inf"))), "points must be finite"),
        (
            lambda: AxisAffine.identity(1).boxes(torch.tensor([[[1.0, 0.0, 0.0, 1.0]]])),
            "boxes: xyxy must be boxes with",
        ),
    ],
)
def test_bad_input(our_errors, make, message):
    with pytest.raises(ValueError, match=message):
        make()

from types import SimpleNamespace

import pytest
import torch

from geoaug import ViewSpec, from_ffcv_ssl, from_kornia, from_lightly, from_torchvision, plan_views

PLAN = plan_views([ViewSpec((5, 7)), ViewSpec(8)], [[97, 71], [40, 300], [300, 40]], [1, 2, 3], seed=0, epoch=1)
OURS = PLAN.view_from_source[:, 0]
X0, Y0, X1, Y1 = PLAN.crop[:, 0].unbind(-1)
FLIP = PLAN.flipped[:, 0]


def same(a, b):
    assert torch.allclose(a.scale, b.scale, rtol=1e-4, atol=1e-5)
    assert torch.allclose(a.shift, b.shift, rtol=1e-4, atol=1e-5)


def test_some_rows_are_mirrored_and_some_not():
    assert FLIP.any()
    assert not FLIP.all()


def test_torchvision_records():
    same(from_torchvision(Y0, X0, Y1 - Y0, X1 - X0, FLIP, PLAN.source_size), OURS)
    one = from_torchvision(int(Y0[0]), int(X0[0]), int(Y1[0] - Y0[0]), int(X1[0] - X0[0]), bool(FLIP[0]), (97, 71))
    same(one, OURS[0])


def test_ffcv_ssl_records():
    height, width = PLAN.source_size.unbind(-1)
    row = torch.stack((width, height, Y0, X0, Y1 - Y0, X1 - X0), -1)
    same(from_ffcv_ssl(row, FLIP), OURS)
    same(from_ffcv_ssl(row[0], bool(FLIP[0])), OURS[0])


def lightly_location(i, **flips):
    x0, y0, x1, y1 = PLAN.crop[i, 0].tolist()
    height, width = PLAN.source_size[i].tolist()
    sides = {"top": y0, "left": x0, "height": y1 - y0, "width": x1 - x0, "image_height": height, "image_width": width}
    return SimpleNamespace(**sides, **flips)


def test_lightly_records():
    records = [lightly_location(i, horizontal_flip=bool(FLIP[i]), vertical_flip=False) for i in range(3)]
    same(from_lightly(records), OURS)
    same(from_lightly(records[0]), OURS[:1])
    assert from_lightly([]).batch_shape == (0,)


def test_lightly_records_mirrored_upside_down():
    upright = from_lightly(lightly_location(0, horizontal_flip=False, vertical_flip=False))
    mirrored = from_lightly(lightly_location(0, horizontal_flip=False, vertical_flip=True))
    points = torch.rand(1, 5, 2)
    assert torch.allclose(mirrored(points), upright(points) * torch.tensor([1.0, -1.0]) + torch.tensor([0.0, 1.0]))


def test_kornia_records():
    """A matrix between pixel centres: built here from edges, as kornia counts pixels."""
    for i, (height, width) in enumerate(PLAN.source_size.tolist()):
        scale = OURS.scale[i] * torch.tensor([7 / width, 5 / height])
        shift = OURS.shift[i] * torch.tensor([7.0, 5.0]) + 0.5 * scale - 0.5
        matrix = torch.diag(torch.cat((scale, torch.ones(1))))
        matrix[:2, 2] = shift
        same(from_kornia(matrix[None], (height, width), (5, 7)), OURS[i : i + 1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: from_torchvision(0, 0, 0, 5, False, (9, 9)),
            "from_torchvision: h must be positive and finite",
        ),
        (lambda: from_torchvision(0, 0, 5, 5, False, (9, 9, 3)), "from_torchvision: source_size must be"),
        (
            lambda: from_kornia(torch.eye(2)[None], (5, 5), (5, 5)),
            r"from_kornia: matrix must be floating \[\*batch, 3, 3\]",
        ),
        (lambda: from_kornia(torch.ones(1, 3, 3), (5, 5), (5, 5)), "must be axis-aligned"),
        (lambda: from_kornia(torch.eye(3)[None] * 2, (5, 5), (5, 5)), "must be axis-aligned"),
        (lambda: from_kornia(torch.diag(torch.tensor([1.0, 1.0, -1.0])), (5, 5), (5, 5)), "must be axis-aligned"),
        (
            lambda: from_torchvision(0, 0, 5, 5, torch.zeros(2).bool(), torch.ones(3, 2)),
            "source_size must be of a batch",
        ),
        (lambda: from_torchvision(0, float("nan"), 5, 5, False, (9, 9)), "i and j must be finite"),
        (
            lambda: from_ffcv_ssl(torch.zeros(5)),
            r"from_ffcv_ssl: row must be a tensor \[\*batch, 6\], got float32 \[5\]",
        ),
    ],
)
def test_bad_input(our_errors, make, message):
    with pytest.raises(ValueError, match=message):
        make()

"""The suite itself: it must pass what is right and catch every classic mistake."""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import grid_sample, interpolate

from geoaug import AxisAffine, ViewSpec, plan_views, testing
from geoaug.peers import PEERS, markdown

SIZE = (48, 64)


def crop_and_resize(image, draw, flip=False, align_corners=False):
    """An honest crop and antialiased resize with its record."""
    plan = plan_views([ViewSpec(SIZE, (0.2, 1.0), flip=float(flip))], [image.shape[-2:]], [draw], seed=0, epoch=0)
    x0, y0, x1, y1 = plan.crop[0, 0].tolist()
    crop = image[None, :, y0:y1, x0:x1]
    if align_corners:
        view = interpolate(crop.float(), SIZE, mode="bilinear", align_corners=True)[0]
    else:
        view = interpolate(crop, SIZE, mode="bilinear", antialias=True)[0]
    return (view.flip(-1) if flip else view), plan.view_from_source[0, 0]


def counted(transform, **options):
    draws = iter(range(10**6))
    return lambda image: transform(image, next(draws), **options)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 0.02), (torch.uint8, 0.15)])
def test_an_honest_transform_passes(flip, dtype, limit):
    report = testing.measure("honest", counted(crop_and_resize, flip=flip), draws=10, dtype=dtype)
    assert report.worst < limit
    assert report.draws == 50
    assert report.worst_pixel < (0.1 if dtype == torch.float32 else 1.07 * 320 / 255 + 0.1)


def lie(change):
    def transform(image, draw):
        view, claim = crop_and_resize(image, draw, flip=bool(draw % 2))
        return change(view, claim)

    return counted(transform)


LIES = {
    "flip dropped": lambda view, claim: (view, AxisAffine(claim.scale.abs(), claim.shift)),
    "x and y swapped": lambda view, claim: (view, AxisAffine(claim.scale.flip(-1), claim.shift.flip(-1))),
    "picture transposed": lambda view, claim: (view[[1, 0, 2]], claim),
    "half a pixel to the right": lambda view, claim: (view, AxisAffine(claim.scale, claim.shift + 0.5 / SIZE[1])),
    "scale by W - 1": lambda view, claim: (view, AxisAffine(claim.scale * (1 - 1 / SIZE[1]), claim.shift)),
    "one pixel of roll": lambda view, claim: (view.roll(1, -1), claim),
}


@pytest.mark.parametrize("name", LIES)
def test_every_lie_is_caught(name):
    assert testing.measure(name, lie(LIES[name]), draws=4).worst > 0.3


def test_align_corners_is_caught():
    """The classic bug: the pixels are stretched to the corner centres, the record says edges."""
    assert testing.measure("align_corners", counted(crop_and_resize, align_corners=True), draws=5).worst > 0.3


def test_grid_sample_with_our_convention_passes():
    def transform(image, draw):
        plan = plan_views([ViewSpec((160, 200), (0.1, 0.2))], [image.shape[-2:]], [draw], seed=0, epoch=0)
        a = plan.view_from_source[0, 0]
        theta = torch.cat((torch.diag((~a).scale), (2 * (~a).shift + (~a).scale - 1)[:, None]), -1)
        grid = torch.nn.functional.affine_grid(theta[None], [1, 3, 160, 200], align_corners=False)
        return grid_sample(image[None], grid, align_corners=False, padding_mode="border")[0], a

    assert testing.measure("grid_sample", counted(transform), sizes=[(61, 60), (97, 131)], draws=5).worst < 0.02


def test_a_claim_of_points_is_measured_at_the_points():
    points = torch.tensor([[0.25, 0.5], [0.75, 0.25]])
    right = testing.measure("points", lambda image: (image, (points, points)), draws=1)
    wrong = testing.measure("points", lambda image: (image, (points, points + 0.01)), draws=1)
    assert right.worst < 1e-3
    assert wrong.worst == pytest.approx(0.01 * 320, rel=0.05)


def test_coordinate_images():
    image = testing.coordinate_image(5, 7)
    assert image.shape == (3, 5, 7)
    assert image[0, 3, 2].item() == pytest.approx(2.5 / 7)
    assert image[1, 3, 2].item() == pytest.approx(3.5 / 5)
    bytes_ = testing.coordinate_image(5, 7, torch.uint8)
    assert bytes_.dtype == torch.uint8
    held = testing._coordinates(bytes_)
    assert (held - testing.coordinate_image(5, 7)[:2].permute(1, 2, 0)).abs().max() < 0.6 / 255


def test_our_own_adapter_passes_and_the_table_names_it():
    rows = [("geoaug", claim, testing.measure(name, view, draws=2)) for name, claim, view in PEERS["geoaug"]()]
    assert max(report.worst for _, _, report in rows) < 0.02
    table = markdown(rows, ["kornia"])
    assert "| geoaug | flip | map |" in table
    header = table[: table.index("| library")]
    assert (Path(__file__).parent.parent / "docs" / "conformance.md").read_text().startswith(header)
    assert "not measured: kornia" in table


def test_torchvision_boxes_agree_with_its_pixels():
    reports = {(name, claim): testing.measure(name, view, draws=2) for name, claim, view in PEERS["torchvision"]()}
    assert all(report.worst < 0.02 for (_, claim), report in reports.items() if claim == "BoundingBoxes")


def test_bad_input(our_errors):
    with pytest.raises(ValueError, match=r"measure: the transform's view must be \[3, h, w\], got float32 \[5\]"):
        testing.measure("flat", lambda image: (torch.zeros(5), AxisAffine.identity()))
    for broken in (torch.zeros(3, 8, 8), torch.full((3, 8, 8), float("nan"))):
        with pytest.raises(ValueError, match="view must be finite and not of one value"):
            testing.measure("broken", lambda image, view=broken: (view, AxisAffine.identity()))
    with pytest.raises(ValueError, match="measure: sizes must be at least one"):
        testing.measure("nothing", lambda image: (image, AxisAffine.identity()), sizes=[])
    with pytest.raises(ValueError, match="measure: draws must be an integer"):
        testing.measure("none", lambda image: (image, AxisAffine.identity()), draws=0)

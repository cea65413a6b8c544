"""Both renderers give torch's bytes, and what the plan says is where the pixels come from."""

import warnings
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import interpolate, pad
from torchvision.io import ImageReadMode, read_image

from geoaug import Plan, ViewSpec, plan_views
from geoaug.pixels.render import render, render_batch

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def make_plan(crops: list[list[int]], flips: list[bool], source: tuple[int, int], sizes: list[tuple[int, int]]) -> Plan:
    """One row whose views have these crops, mirrors and sizes."""
    crop, flipped = torch.tensor([crops], dtype=torch.int32), torch.tensor([flips])
    return Plan(crop, flipped, torch.tensor([source], dtype=torch.int32), torch.tensor([1]), tuple(sizes), 0, 0)


def torchs(image: Tensor, plan: Plan) -> list[Tensor]:
    views = []
    for (x0, y0, x1, y1), flip, size in zip(plan.crop[0].tolist(), plan.flipped[0], plan.view_sizes, strict=True):
        crop = image.permute(2, 0, 1)[None, :, y0:y1, x0:x1]
        view = interpolate(crop, size, mode="bilinear", antialias=True, align_corners=False)[0]
        views.append(view.flip(-1) if flip else view)
    return views


def random_batch(sizes: npt.NDArray[np.int64], specs: list[ViewSpec], seed: int) -> tuple[list[Tensor], Tensor, Plan]:
    """Images of these sizes, the same padded with noise (which no view may see), and a plan."""
    generator = torch.Generator().manual_seed(seed)
    images = [torch.randint(0, 256, (h, w, 3), dtype=torch.uint8, generator=generator) for h, w in sizes.tolist()]
    height, width = (int(side) for side in sizes.max(0))
    padded = torch.randint(0, 256, (len(images), 3, height, width), dtype=torch.uint8, generator=generator)
    for row, image in zip(padded, images, strict=True):
        row[:, : image.shape[0], : image.shape[1]] = image.permute(2, 0, 1)
    return images, padded, plan_views(specs, sizes, np.arange(len(images)), seed=seed, epoch=0)


SPECS = [ViewSpec(32), ViewSpec((5, 7), scale=(0.05, 1.0)), ViewSpec((64, 48)), ViewSpec.like(2, (9, 31))]


def test_render_equals_torch() -> None:
    sizes = np.random.default_rng(0).integers(1, 90, (40, 2))
    images, _, plan = random_batch(sizes, SPECS, 0)
    for image, row in zip(images, plan, strict=True):
        before = image.clone()
        for mine, other in zip(render(image, row), torchs(image, row), strict=True):
            assert torch.equal(mine, other)
        assert torch.equal(image, before)


def test_render_takes_arrays_and_any_strides() -> None:
    (image,), _, plan = random_batch(np.array([[31, 44]]), SPECS, 1)
    expected = render(image, plan)
    planar = image.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    mirrored = np.ascontiguousarray(image.numpy()[:, ::-1])[:, ::-1]
    frozen = image.numpy().copy()
    frozen.flags.writeable = False
    for same in (planar, image.numpy(), mirrored, frozen):
        assert all(torch.equal(a, b) for a, b in zip(render(same, plan), expected, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("largest", "count"), [(1, 2), (6, 9), (70, 24), (330, 6)])
def test_render_batch_equals_render(device: str, largest: int, count: int) -> None:
    sizes = np.random.default_rng(largest).integers(1, largest + 1, (count, 2))
    images, padded, plan = random_batch(sizes, SPECS, largest)
    on_device, moved, before = padded.to(device), plan.to(device), padded.clone()
    exact, pieces = render_batch(on_device, moved), render_batch(on_device, moved, chunk=4)
    fast = render_batch(on_device, moved, fp16=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        under_autocast = render_batch(on_device, moved)
    rendered = [render(image, row) for image, row in zip(images, plan, strict=True)]
    for v, expected in enumerate(torch.stack(column) for column in zip(*rendered, strict=True)):
        assert torch.equal(exact[v].cpu(), expected)
        assert torch.equal(pieces[v].cpu(), expected)
        assert torch.equal(under_autocast[v].cpu(), expected)
        assert int((fast[v].cpu().int() - expected.int()).abs().max()) <= 1
    assert torch.equal(on_device.cpu(), before)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sides", [(520, 6), (7, 2500)])
def test_render_batch_equals_render_at_large_reductions(device: str, sides: tuple[int, int]) -> None:
    """Precision above 16 bits (halves), and more than 250 taps (float64), on bright images: the largest sums."""
    images, padded, plan = random_batch(np.array([sides, sides]), [ViewSpec.whole((3, 5)), ViewSpec((2, 4))], 5)
    images, padded = [image | 240 for image in images], padded | 240
    views = render_batch(padded.to(device), plan.to(device))
    for row, (image, one) in enumerate(zip(images, plan, strict=True)):
        assert all(torch.equal(view[row].cpu(), other) for view, other in zip(views, render(image, one), strict=True))


def test_render_batch_equals_torch_on_photographs(data: Path) -> None:
    files = sorted((data / "coco_mini" / "images").rglob("*.jpg"))
    if not files:
        pytest.skip("no photographs in coco_mini")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torchvision's decoders are on their way out
        images = [read_image(str(file), ImageReadMode.RGB) for file in files[:: len(files) // 8][:8]]
    sizes = np.array([image.shape[1:] for image in images])
    padded = torch.zeros(len(images), 3, *sizes.max(0).tolist(), dtype=torch.uint8)
    for row, image in zip(padded, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    plan = plan_views([ViewSpec(224, scale=(0.2, 1.0)), ViewSpec.whole((60, 50))], sizes, range(8), seed=0, epoch=0)
    views, fast = render_batch(padded, plan), render_batch(padded, plan, fp16=True)
    for row, (image, one) in enumerate(zip(images, plan, strict=True)):
        hwc = image.permute(1, 2, 0)
        for v, (mine, other) in enumerate(zip(render(hwc, one), torchs(hwc, one), strict=True)):
            assert torch.equal(mine, other)
            assert torch.equal(views[v][row], other)
            assert int((fast[v][row].int() - other.int()).abs().max()) <= 1


def test_render_batch_never_asks_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor without values answers no question, so any host synchronisation is an error here."""
    monkeypatch.delenv("GEOAUG_CHECK")
    with FakeTensorMode(), torch.device("cuda"):
        images = torch.empty(5, 3, 30, 40, dtype=torch.uint8)
        crop, flipped = torch.empty(5, 2, 4, dtype=torch.int32), torch.empty(5, 2, dtype=torch.bool)
        source, ids = torch.empty(5, 2, dtype=torch.int32), torch.empty(5, dtype=torch.int64)
        plan = Plan(crop, flipped, source, ids, ((5, 7), (64, 48)), 0, 0)
        for fp16 in (False, True):
            views = render_batch(images, plan, fp16=fp16, chunk=2)
            assert [view.shape for view in views] == [(5, 3, 5, 7), (5, 3, 64, 48)]


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("epoch", [0, 1])
def test_golden_coordinates(flip: bool, batched: bool, epoch: int) -> None:
    """An image of its own coordinates: the map fitted to the views is the plan's at the views' corners."""
    height, width = 180, 250
    x, y = (255 * (np.arange(side) + 0.5) / side for side in (width, height))
    image = np.stack(np.broadcast_arrays(x[None, :], y[:, None], 0.0), axis=-1).round().astype(np.uint8)
    specs = [ViewSpec(224, (0.3, 1.0), flip=float(flip)), ViewSpec((96, 128), flip=float(flip), scale=(0.2, 0.9))]
    plan = plan_views(specs, [[height, width]] * 6, range(6), seed=4, epoch=epoch)
    padded = pad(torch.from_numpy(image).permute(2, 0, 1), (0, 9, 0, 14), value=200).expand(6, -1, -1, -1)
    views = render_batch(padded, plan) if batched else [None] * len(specs)
    source_from_view = ~plan.view_from_source
    corners = source_from_view(torch.tensor([[0.0, 0.0], [1.0, 1.0]]).expand(6, len(specs), 2, 2))
    for row in range(6):
        one = render(image, plan[row]) if not batched else [view[row] for view in views if view is not None]
        for v, (h, w) in enumerate(plan.view_sizes):
            inside = one[v][:2, 2:-2, 2:-2].double().numpy() / 255
            for axis, (cells, side) in enumerate(((w, width), (h, height))):
                at = (np.arange(2, cells - 2) + 0.5) / cells
                slope, start = np.polyfit(at, inside[axis].mean(axis=axis), 1)
                found = np.array([start, start + slope])
                expected = corners[row, v, :, axis].double().numpy()
                assert np.abs(found - expected).max() * side < 0.15


def test_empty_batch_and_no_images() -> None:
    _, padded, plan = random_batch(np.array([[5, 7], [7, 5]]), SPECS, 0)
    views = render_batch(padded[:0], plan[[]])
    assert [view.shape for view in views] == [(0, 3, *size) for size in plan.view_sizes]
    assert all(view.dtype == torch.uint8 for view in views)
    assert [v.shape for v in render_batch(padded[:0], plan[[]], fp16=True)] == [v.shape for v in views]


@pytest.mark.usefixtures("our_errors")
def test_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    (image, other), padded, plan = random_batch(np.array([[5, 7], [7, 5]]), SPECS, 0)
    with pytest.raises(ValueError, match=r"render: plan_row must be a Plan of one row, got 2 rows"):
        render(image, plan)
    with pytest.raises(ValueError, match=r"render: plan_row must be a Plan of one row, got None"):
        render(image, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"render: image must be of the plan's source size \[5, 7\], got \[7, 5\]"):
        render(other, plan[0])
    for bad in (image.float(), image.permute(2, 0, 1), image[None], image.numpy().astype(np.int16), "a.jpg"):
        with pytest.raises(ValueError, match=r"render: image must be uint8 \[H, W, 3\] on the CPU"):
            render(bad, plan[0])  # type: ignore[arg-type]
    for bad in (padded.float(), padded[0], padded[:, :2], padded.numpy()):
        with pytest.raises(ValueError, match=r"render_batch: images must be uint8 \[B, 3, H, W\]"):
            render_batch(bad, plan)
    with pytest.raises(ValueError, match=r"render_batch: plan must be of one row per image, 2, got 1"):
        render_batch(padded, plan[0])
    with pytest.raises(ValueError, match=r"render_batch: images must be at least as large as the plan's sources"):
        render_batch(padded[:, :, :6], plan)
    with pytest.raises(ValueError, match=r"render_batch: chunk must be an integer in \[1, 2147483648\], got 0"):
        render_batch(padded, plan, chunk=0)
    monkeypatch.delenv("GEOAUG_CHECK")  # tables without values cannot be looked at
    with pytest.raises(ValueError, match=r"render_batch: plan must be on the images' device, cpu, got meta"):
        render_batch(padded, plan.to("meta"))
    with pytest.raises(ValueError, match=r"render: plan_row must be on the CPU, got meta"):
        render(image, plan[0].to("meta"))

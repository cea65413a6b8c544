import math

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import geoaug
from geoaug import AxisAffine, ViewSpec, correspond, losses, plan_views
from tests import reference_local_contrast as slow

TALL, WIDE = (3, 5), (4, 6)  # cells of the target's map and of the online one


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(batch=2, wide=7, dtype=torch.float64):
    points = torch.rand(batch, TALL[0] * TALL[1], 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    points = points * 1.4 - 0.2  # some outside, which read the border
    target, online = (normal(batch, wide, *size, seed=i, dtype=dtype) for i, size in enumerate((TALL, WIDE)))
    return target, online, points


@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])
def test_against_the_loop(temperature):
    target, online, points = inputs()
    found = losses.local_contrastive(target, online, points, temperature=temperature)
    assert found.shape == (2, 15)
    for i in range(2):
        expected = slow.local_contrastive(target[i].tolist(), online[i].tolist(), points[i].tolist(), temperature)
        assert found[i].tolist() == pytest.approx(expected, abs=1e-12)


def test_regression_against_the_loop():
    target, online, points = inputs()
    found = losses.local_regression(target, online, points)
    assert found.shape == (2, 15)
    for i in range(2):
        expected = slow.local_regression(target[i].tolist(), online[i].tolist(), points[i].tolist())
        assert found[i].tolist() == pytest.approx(expected, abs=1e-12)


def explicit(target, online, points, temperature):
    """The paper's way: a map of -log softmax per cell of the target, each read bilinearly at its point."""
    t, o = (functional.normalize(x.flatten(2), dim=1) for x in (target.detach(), online))
    nll = -torch.log_softmax(torch.einsum("bdp,bdq->bpq", t, o) / temperature, dim=-1)  # [B, P, h*w]
    maps = nll.flatten(0, 1).view(-1, 1, *online.shape[2:])
    grid = (2 * points - 1).flatten(0, 1)[:, None, None]
    read = functional.grid_sample(maps, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return read.view(len(target), -1)


def test_value_and_gradient_are_those_of_the_explicit_map():
    target, online, points = inputs()
    online.requires_grad_()
    found = losses.local_contrastive(target, online, points, temperature=0.1)
    expected = explicit(target, online, points, 0.1)
    assert torch.allclose(found, expected, atol=1e-12)
    weights = normal(*found.shape, seed=3)
    (ours,), (theirs,) = (torch.autograd.grad((x * weights).sum(), online) for x in (found, expected))
    assert theirs.abs().min() > 0
    assert torch.allclose(ours, theirs, atol=1e-11)
    few = [x[:1, :2, :2, :2].detach() for x in (target, online)]
    check = torch.autograd.gradcheck
    assert check(
        lambda o: losses.local_contrastive(few[0], o, points[:1, :4], temperature=0.3), few[1].requires_grad_()
    )


def soft_target(point, height, width):
    """The labels of a point: with the cells of the online map at right angles, the j-th target tells of the j-th."""
    cells = height * width
    basis = torch.eye(cells, dtype=torch.float64)
    online = basis.view(1, cells, height, width).expand(cells, -1, -1, -1)
    points = torch.tensor(point, dtype=torch.float64).expand(cells, 1, 2)
    found = losses.local_contrastive(basis.view(cells, cells, 1, 1), online, points, temperature=1.0)
    return (math.log(math.e + cells - 1) - found[:, 0]).tolist()


def test_published_vector_two():
    """Index 1.25: weight .75 on cell 1, .25 on cell 2; index -.2: cell 0 alone."""
    assert soft_target([(1.25 + 0.5) / 7, 0.5], 1, 7) == pytest.approx([0, 0.75, 0.25, 0, 0, 0, 0], abs=1e-12)
    assert soft_target([(-0.2 + 0.5) / 7, 0.5], 1, 7) == pytest.approx([1, 0, 0, 0, 0, 0, 0], abs=1e-12)
    # Four cells of a map of 2 rows and 3 columns: index .5 along x, .25 along y.
    four = soft_target([(0.5 + 0.5) / 3, (0.25 + 0.5) / 2], 2, 3)
    assert four == pytest.approx([0.375, 0.375, 0, 0.125, 0.125, 0], abs=1e-12)


def test_published_vector_seven():
    """All features equal: log 49 wherever a point lies."""
    maps = normal(1, 8, 1, 1).expand(2, 8, 7, 7)
    points = correspond(*(AxisAffine.identity(2) for _ in "ab"), (7, 7))[0]
    found = losses.local_contrastive(maps, maps, points, temperature=0.1)
    assert found.flatten().tolist() == pytest.approx([3.8918] * 98, abs=1e-4)


@pytest.mark.parametrize("flip", [False, True])
def test_the_true_place_is_the_least_loss(flip):
    """Maps that say where they are in the source: the loss is least at the corresponding points, flipped or not."""
    sizes = torch.tensor([[300, 400]] * 8)
    specs = [ViewSpec.whole(224), ViewSpec(224, scale=(0.3, 0.6), flip=float(flip))]
    plan = plan_views(specs, sizes, range(8), seed=1, epoch=0)
    whole, crop = (plan.view_from_source[:, v] for v in (0, 1))
    points, valid = correspond(whole, crop, (7, 7))

    def tells_its_place(view):
        at = (~view)(geoaug.grids.cell_centers(7, 7).expand(8, 49, 2))
        waves = torch.cat([f(k * math.pi * at / 2) for k in (1, 2) for f in (torch.sin, torch.cos)], -1)
        return waves.mT.reshape(8, 8, 7, 7)

    maps = [tells_its_place(view) for view in (whole, crop)]
    true = losses.local_contrastive(*maps, points, temperature=0.01)
    for moved in (points.flip(-1), torch.stack((1 - points[..., 0], points[..., 1]), -1), points + 0.2):
        other = losses.local_contrastive(*maps, moved, temperature=0.01)
        assert true[valid].mean() < other[valid].mean() - 0.5


def test_gradient_reaches_the_online_map_and_never_the_target():
    target, online, points = (x.requires_grad_() if x.ndim == 4 else x for x in inputs())
    for values in (
        losses.local_contrastive(target, online, points, temperature=0.1),
        losses.local_regression(target, online, points),
    ):
        online.grad = None
        values.sum().backward()
        assert online.grad.any()
        assert target.grad is None
    changed = losses.local_contrastive(normal(2, 7, *TALL, seed=9), online, points, temperature=0.1)
    assert (changed != losses.local_contrastive(target, online, points, temperature=0.1)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_under_autocast(dtype):
    target, online, points = inputs(wide=64, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = losses.local_contrastive(target, online, points, temperature=0.05)
    expected = losses.local_contrastive(target.double(), online.double(), points, temperature=0.05)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-4)


def test_zero_vectors_and_empty_batches():
    target, online, points = inputs(dtype=torch.float32)
    zero = torch.zeros_like(online, requires_grad=True)
    values = losses.local_contrastive(target, zero, points, temperature=0.1)
    assert values.flatten().tolist() == pytest.approx([math.log(24)] * 30)
    values.sum().backward()
    assert zero.grad.isfinite().all()
    assert losses.local_contrastive(target[:0], online[:0], points[:0], temperature=0.1).shape == (0, 15)
    assert losses.local_regression(target[:0], online[:0], points[:0]).shape == (0, 15)
    one = losses.local_contrastive(target, online[..., :1, :1], points, temperature=0.1)
    assert one.abs().max() < 1e-6  # a single cell to choose from


def saved_bytes(batch, side, wide):
    """What the graph keeps for the backward pass, but for the maps themselves; and the largest single tensor."""
    target, online = (normal(batch, wide, side, side, seed=i, dtype=torch.float32) for i in (0, 1))
    online.requires_grad_()
    points = torch.rand(batch, side * side, 2)
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        values = losses.local_contrastive(target, online, points, temperature=0.1)
    for own in (target, online, points):
        kept.pop(own.untyped_storage().data_ptr(), None)
    assert values.requires_grad
    return sum(kept.values()), max(kept.values())


def test_memory_grows_with_the_pairs_of_cells_and_nothing_larger():
    pairs = 8 * 49 * 49 * 4  # bytes of one [B, 49, 49]
    total, largest = saved_bytes(8, 7, 256)
    assert largest <= pairs
    assert total < 3.5 * pairs
    assert saved_bytes(8, 7, 2048)[0] == total  # not with the width of the vectors
    assert saved_bytes(16, 7, 256)[0] == 2 * total
    assert saved_bytes(8, 14, 256)[0] < 16.1 * total


class Largest(TorchDispatchMode):
    """Notes the most numbers that any operation gives out, forward and backward."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numbers = max(self.numbers, out.untyped_storage().nbytes() // 4)
        return out


def test_no_tensor_is_larger_than_the_pairs_of_cells_or_the_map_itself():
    target, online = (normal(8, 16, 7, 7, seed=i, dtype=torch.float32) for i in (0, 1))
    online.requires_grad_()
    points = torch.rand(8, 49, 2)
    with Largest() as largest:
        losses.local_contrastive(target, online, points, temperature=0.1).sum().backward()
    assert largest.numbers == 8 * 49 * 49


@pytest.mark.usefixtures("our_errors")
def test_bad_input_is_named():
    target, online, points = inputs(dtype=torch.float32)
    points = points.float()
    where = "local_contrastive: "
    bad = [
        ((target[0], online, points), {}, where + "target_map must be"),
        ((target.long(), online, points), {}, where + "target_map must be"),
        ((target, online[:1], points), {}, where + "online_map must be"),
        ((target, online[:, :3], points), {}, where + "online_map must be"),
        ((target, online[..., :0], points), {}, where + "online_map must be"),
        ((target, online, points[:, :14]), {}, where + "points must be"),
        ((target, online, points.long()), {}, where + "points must be"),
        ((target, online, points / 0), {}, where + "points must be"),
        ((target, online, points), {"temperature": 0.0}, where + "temperature must be"),
        ((target, online, points), {"temperature": math.inf}, where + "temperature must be"),
    ]
    for arguments, more, message in bad:
        with pytest.raises(ValueError, match=message):
            losses.local_contrastive(*arguments, **{"temperature": 0.1, **more})
    with pytest.raises(ValueError, match="local_regression: points must be"):
        losses.local_regression(target, online, points[:, :3])

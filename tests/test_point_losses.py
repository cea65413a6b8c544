import math

import pytest
import torch

from geoaug.objectives import losses, point_losses

from . import reference_points

B, M, M2, D = 3, 7, 5, 4


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def ids(*shape, seed=0, high=4):
    return torch.randint(-1, high, shape, generator=torch.Generator().manual_seed(seed))


def case(dtype=torch.float64):
    """Queries and keys of three images; the last one shares no region."""
    a, a2 = ids(B, M), ids(B, M2, seed=1)
    a[2], a2[2] = torch.tensor([0, 0, 1, -1, 1, 0, 1]), torch.tensor([2, 3, 3, -1, 2])
    return draw(B, M, D, dtype=dtype), a, draw(B, M2, D, seed=1, dtype=dtype), a2


def twins(dtype=torch.float64):
    """Student points and keys, the teacher's of both, and which keys count."""
    shapes = ((B, M, D), (B, M2, D), (B, M, D), (B, M2, D))
    valid = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 0, 1], [0, 0, 1, 0, 0]]).bool()
    return *(draw(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)), valid


def distil(p, keys, teacher, teacher_keys, valid, **more):
    options = {"temperature": 0.1, "teacher_temperature": 0.07} | more
    return losses.affinity_distillation(p, keys, teacher, teacher_keys, valid, **options)


def contrast(p, a, p2, a2, **more):
    return losses.point_region_contrast(p, a, p2, a2, **{"temperature": 0.2} | more)


@pytest.mark.parametrize("temperature", [0.05, 0.2, 1.0])
@pytest.mark.parametrize("negatives", ["batch", "image"])
def test_contrast_against_the_loop(temperature, negatives):
    p, a, p2, a2 = case()
    found = contrast(p, a, p2, a2, temperature=temperature, negatives=negatives)
    lists = [x.tolist() for x in (p, a, p2, a2)]
    expected, pairs = reference_points.region_contrast(*lists, temperature, inter=negatives == "batch")
    assert found.tolist() == pytest.approx(expected, abs=1e-9)
    assert losses.positive_pairs(a, a2).tolist() == pairs
    assert pairs[0] > 0 < pairs[1]
    assert pairs[2] == 0 == found[2]


def test_keys_of_other_processes_are_negatives_too():
    """Two ranks that gather their keys compute what one computes."""
    p, a, p2, a2 = case()
    whole = contrast(p, a, p2, a2)
    for first in range(B):
        one = slice(first, first + 1)
        assert torch.allclose(contrast(p[one], a[one], p2, a2, first=first), whole[one])
        alone = reference_points.region_contrast(
            *(x.tolist() for x in (p[one], a[one], p2, a2)), 0.2, first=first
        )  # fmt: skip
        assert alone[0] == pytest.approx(whole[one].tolist(), abs=1e-9)


@pytest.mark.parametrize(("temperature", "teacher"), [(0.1, 0.07), (0.2, 0.15), (1.0, 0.5)])
@pytest.mark.parametrize("across", ["image", "batch"])
def test_distillation_against_the_loop(temperature, teacher, across):
    inputs = twins()
    found = distil(*inputs, temperature=temperature, teacher_temperature=teacher, across=across)
    assert found.shape == (B, M)
    lists = [x.tolist() for x in inputs]
    expected = reference_points.distillation(*lists, temperature, teacher, inter=across == "batch")
    for row, theirs in zip(found.tolist(), expected, strict=True):
        assert row == pytest.approx(theirs, abs=1e-9)


def test_distillation_of_a_teacher_alike_is_its_entropy():
    p, keys, _, _, valid = twins()
    found = distil(p, keys, p, keys, valid, temperature=0.1, teacher_temperature=0.1)
    rows = [reference_points.affinities(x, keys[0].tolist(), 0.1) for x in p[0].tolist()]
    assert found[0].tolist() == pytest.approx([-sum(x * math.log(x) for x in row) for row in rows], abs=1e-9)
    assert torch.allclose(found[2], torch.zeros(M, dtype=torch.float64), atol=1e-12)  # one key: nothing to say


@pytest.mark.parametrize("chunk", [1, 7, 20, 2**23])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_loss_and_gradient_for_any_chunk(chunk, dtype):
    p, a, p2, a2 = case(dtype)
    s, keys, teacher, teacher_keys, valid = twins(dtype)
    for student, function in (
        (p, lambda x, n: contrast(x, a, p2, a2, chunk=n)),
        (p, lambda x, n: contrast(x, a, p2, a2, negatives="image", chunk=n)),
        (s, lambda x, n: distil(x, keys, teacher, teacher_keys, valid, chunk=n)),
        (s, lambda x, n: distil(x, keys, teacher, teacher_keys, valid, across="batch", chunk=n)),
    ):
        got = []
        for n in (chunk, 2**30):
            x = student.clone().requires_grad_()
            value = function(x, n)
            value.sum().backward()
            got.append((value.detach(), x.grad))
        for one, other in zip(*got, strict=True):
            assert torch.allclose(one, other, rtol=1e-6 if dtype == torch.float32 else 1e-13, atol=1e-6)


def test_gradients_are_right_and_reach_the_student_alone():
    p, a, p2, a2 = case()
    s, keys, teacher, teacher_keys, valid = twins()
    for negatives in ("batch", "image"):
        assert torch.autograd.gradcheck(
            lambda x, n=negatives: contrast(x, a, p2, a2, negatives=n, chunk=20), p.clone().requires_grad_(),
            fast_mode=True,
        )  # fmt: skip
    for across in ("image", "batch"):
        assert torch.autograd.gradcheck(
            lambda x, n=across: distil(x, keys, teacher, teacher_keys, valid, across=n, chunk=20),
            s.clone().requires_grad_(), fast_mode=True,
        )  # fmt: skip
    students = [x.clone().requires_grad_() for x in (p, s)]
    others = [x.clone().requires_grad_() for x in (p2, keys, teacher, teacher_keys)]
    before = contrast(students[0], a, others[0], a2), distil(students[1], *others[1:], valid)
    (before[0].sum() + before[1].sum()).backward()
    assert all(x.grad.isfinite().all() and x.grad.any() for x in students)
    assert all(x.grad is None for x in others)
    # A point that is in no positive pair has no part in the loss.
    apart = ~((a[..., None] == a2[:, None]) & (a >= 0)[..., None]).any(-1)
    assert not students[0].grad[apart].any()
    assert students[0].grad[~apart].abs().sum(-1).min() > 0
    for i in range(4):  # and each of the others counts
        changed = [x.detach() + (0.5 * draw(*x.shape, seed=9) if j == i else 0) for j, x in enumerate(others)]
        after = contrast(p, a, changed[0], a2), distil(s, *changed[1:], valid)
        assert not torch.allclose(after[min(i, 1)], before[min(i, 1)])


def test_points_beyond_what_is_valid_may_hold_anything():
    p, a, p2, a2 = case()
    s, keys, teacher, teacher_keys, valid = twins()
    before = contrast(p, a, p2, a2), distil(s, keys, teacher, teacher_keys, valid)
    p[a < 0], p2[a2 < 0] = math.nan, math.inf
    keys[~valid], teacher_keys[~valid] = math.nan, math.inf
    p.requires_grad_()
    s.requires_grad_()
    after = contrast(p, a, p2, a2), distil(s, keys, teacher, teacher_keys, valid)
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[1], before[1])
    (after[0].sum() + after[1].sum()).backward()
    assert p.grad.isfinite().all()
    assert s.grad.isfinite().all()


@pytest.mark.parametrize("images", [1, 3])
def test_no_shared_region_and_nothing_visible_give_zero_inside_the_graph(images):
    p, a, p2, a2 = (x[:images] for x in case(torch.float32))
    s, keys, teacher, teacher_keys, valid = (x[:images] for x in twins(torch.float32))
    for ours, theirs in ((a * 0, a2 * 0 + 1), (a * 0 - 1, a2), (a, a2 * 0 - 1), (a * 0 - 1, a2 * 0 - 1)):
        x = p.clone().requires_grad_()
        values = contrast(x, ours, p2, theirs)
        assert values.tolist() == [0.0] * images
        values.sum().backward()
        assert x.grad.tolist() == torch.zeros_like(x).tolist()
    y = s.clone().requires_grad_()
    values = distil(y, keys, teacher, teacher_keys, torch.zeros_like(valid))
    loss = losses.mean(values, torch.zeros(images, M).bool(), per_image=True)
    loss.backward()
    assert loss.item() == 0
    assert not y.grad.any()
    assert values.isfinite().all()


def test_one_image_has_its_own_points_as_negatives():
    p, a, p2, a2 = (x[:1] for x in case())
    assert torch.allclose(contrast(p, a, p2, a2), contrast(p, a, p2, a2, negatives="image"))
    assert contrast(p, a, p2, a2).item() > 0


def test_a_single_pair_is_its_own_mean():
    p, _, p2, _ = case()
    a, a2 = torch.full((B, M), -1), torch.tensor([[0, 1, 1, 1, 1]]).expand(B, M2)
    a[:, 3] = 0
    found = contrast(p, a, p2, a2, negatives="image")
    rows = [reference_points.affinities(p[b, 3].tolist(), p2[b].tolist(), 0.2) for b in range(B)]
    assert found.tolist() == pytest.approx([-math.log(row[0]) for row in rows])


def test_equal_points_give_the_logarithm_of_the_keys():
    same = draw(D).expand(2, 6, D)
    a = torch.tensor([[0, 0, 1, 1, 2, 2]]).expand(2, 6)
    assert contrast(same, a, same, a).tolist() == pytest.approx([math.log(12)] * 2)
    assert distil(same, same, same, same, torch.ones(2, 6).bool()).flatten().tolist() == pytest.approx(
        [math.log(6)] * 12
    )


@pytest.mark.parametrize("shape", [(0, 7, 5), (2, 0, 5), (2, 7, 0)])
def test_no_elements(shape):
    b, m, m2 = shape
    p, p2 = torch.ones(b, m, D, requires_grad=True), torch.ones(b, m2, D)
    a, a2 = torch.zeros(b, m, dtype=torch.int64), torch.zeros(b, m2, dtype=torch.int64)
    values = contrast(p, a, p2, a2), distil(p, p2, p.detach(), p2, torch.ones(b, m2).bool())
    assert values[0].shape == (b,)
    assert values[1].shape == (b, m)
    (values[0].sum() + values[1].sum()).backward()
    assert p.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_point_losses_are_float32_under_autocast(dtype):
    p, p2 = draw(2, 40, 64, dtype=dtype), draw(2, 30, 64, seed=1, dtype=dtype)
    a, a2, valid = ids(2, 40), ids(2, 30, seed=1), ids(2, 30, seed=2) > 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = p.clone().requires_grad_()
        found = contrast(x, a, p2, a2), distil(x, p2, p.flip(0), p2.flip(0), valid)
    (found[0].sum() + found[1].sum()).backward()
    assert x.grad.dtype == dtype
    wide, keys = p.double(), p2.double()
    expected = contrast(wide, a, keys, a2), distil(wide, keys, wide.flip(0), keys.flip(0), valid)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert torch.allclose(one.double(), other, rtol=1e-5, atol=1e-5)


def peak_bytes(function):
    """The most memory that was allocated at a time, beyond what was there before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = torch.tensor([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).cumsum(0)
    return int(held.max())


@pytest.mark.filterwarnings("ignore")  # of the profiler
def test_logits_are_never_whole():
    """1,024 points and keys: their logits are 4 MB, of which 2^16 are in memory at a time."""
    x, p2 = (draw(8, 128, 8, seed=i, dtype=torch.float32) for i in (0, 1))
    a = torch.arange(16).repeat_interleave(8).expand(8, 128)
    student, valid = x.requires_grad_(), a >= 0

    def both(chunk):
        contrast(student, a, p2, a, chunk=chunk).sum().backward()
        distil(student, p2, p2, p2, valid, across="batch", chunk=chunk).sum().backward()

    assert peak_bytes(lambda: both(2**23)) > 2**22
    assert peak_bytes(lambda: both(2**16)) < 2**21
    assert 4 * point_losses.CHUNK == 2**25  # so 32 MB for 8,192 points, whose logits are 268 MB


@pytest.mark.usefixtures("our_errors")
def test_bad_input_is_named():
    p, a, p2, a2 = case()
    s, keys, teacher, teacher_keys, valid = twins()
    c, d = "point_region_contrast: ", "affinity_distillation: "
    bad = [
        (lambda: contrast(p[0], a, p2, a2), c + "p must be"),
        (lambda: contrast(p.long(), a, p2, a2), c + "p must be"),
        (lambda: contrast(p, a.int(), p2, a2), c + "a must be"),
        (lambda: contrast(p, a[:, :2], p2, a2), c + "a must be"),
        (lambda: contrast(p, a, p2[..., :2], a2), c + "p2 must be"),
        (lambda: contrast(p, a, p2, a2[:, :2]), c + "a2 must be"),
        (lambda: contrast(p, a, p2[:2], a2[:2]), c + "p2 must be"),
        (lambda: contrast(p, a, p2, a2, first=1), c + "p2 must be"),
        (lambda: contrast(p, a, p2, a2, first=-1), c + "first must be"),
        (lambda: contrast(p, a, p2, a2, temperature=0), c + "temperature must be"),
        (lambda: contrast(p, a, p2, a2, negatives="all"), c + "negatives must be"),
        (lambda: contrast(p, a, p2, a2, chunk=0), c + "chunk must be"),
        (lambda: losses.positive_pairs(a.float(), a2), "positive_pairs: a must be"),
        (lambda: losses.positive_pairs(a, a2[:2]), "positive_pairs: a2 must be"),
        (lambda: distil(s[0], keys, teacher, teacher_keys, valid), d + "p must be"),
        (lambda: distil(s, keys[:2], teacher, teacher_keys, valid), d + "keys must be"),
        (lambda: distil(s, keys, teacher[:, :2], teacher_keys, valid), d + "teacher must be"),
        (lambda: distil(s, keys, teacher, teacher_keys[:, :2], valid), d + "teacher_keys must be"),
        (lambda: distil(s, keys, teacher, teacher_keys, valid[:, :2]), d + "valid must be"),
        (lambda: distil(s, keys, teacher, teacher_keys, valid.long()), d + "valid must be"),
        (lambda: distil(s, keys, teacher, teacher_keys, valid, temperature=math.nan), d + "temperature must be"),
        (lambda: distil(s, keys, teacher, teacher_keys, valid, teacher_temperature=0), d + "teacher_temperature must"),
        (lambda: distil(s, keys, teacher, teacher_keys, valid, across="all"), d + "across must be"),
    ]
    for call, message in bad:
        with pytest.raises((ValueError, TypeError), match=message):
            call()

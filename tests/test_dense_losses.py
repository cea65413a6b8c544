import math

import pytest
import torch

from geoaug import losses
from tests import reference_densesiam as reference


def vectors(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def slow_similarity(p, z, kind, target):
    if kind == "cosine":
        return reference.cosine_similarity(p, z)
    return reference.cross_entropy(z, p) if target == "z" else reference.cross_entropy(p, z)


KINDS = [("cosine", "z"), ("cross_entropy", "z"), ("cross_entropy", "p")]


@pytest.mark.parametrize(("kind", "target"), KINDS)
def test_dense_similarity_against_the_loop(kind, target):
    p, z = vectors(2, 3, 5), 2 * vectors(2, 3, 5, seed=1)
    found = losses.dense_similarity(p, z, kind=kind, target=target)
    assert found.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            expected = slow_similarity(p[i, j].tolist(), z[i, j].tolist(), kind, target)
            assert found[i, j].item() == pytest.approx(expected, abs=1e-12)


def test_cross_entropy_of_hand():
    """softmax(0, log 3) is (1/4, 3/4)."""
    p, z = torch.tensor([0.0, math.log(3)]), torch.tensor([5.0, 5.0])
    assert losses.dense_similarity(p, z, kind="cross_entropy").item() == pytest.approx(math.log(16 / 3) / 2)
    assert losses.dense_similarity(p, z, kind="cross_entropy", target="p").item() == pytest.approx(math.log(2))
    even = losses.dense_similarity(torch.zeros(512), torch.zeros(512), kind="cross_entropy")
    assert even.item() == pytest.approx(math.log(512))
    assert losses.dense_similarity(3 * p, p, kind="cosine").item() == pytest.approx(-1)


@pytest.mark.parametrize(("softmax", "by_mass"), [(True, False), (True, True), (False, False)])
def test_region_embeddings_against_the_loop(softmax, by_mass):
    masks, features = 3 * vectors(2, 7, 4), vectors(2, 7, 5, seed=1)
    found = losses.region_embeddings(masks, features, softmax=softmax, by_mass=by_mass)
    assert found.shape == (2, 4, 5)
    for i in range(2):
        expected = reference.region_embeddings(masks[i].tolist(), features[i].tolist(), softmax, by_mass)
        assert torch.allclose(found[i], torch.tensor(expected, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize(("temperature", "unit"), [(0.1, True), (1.0, True), (1.0, False)])
def test_region_contrast_against_the_loop(temperature, unit):
    u, v = vectors(2, 4, 5), 2 * vectors(2, 4, 5, seed=1)
    found = losses.region_contrast(u, v, temperature=temperature, unit=unit)
    assert found.shape == (2, 4)
    for i in range(2):
        expected = reference.region_contrast(u[i].tolist(), v[i].tolist(), temperature, unit)
        assert found[i].tolist() == pytest.approx(expected, abs=1e-9)


def test_equal_regions_cannot_be_told_apart():
    same = vectors(6).expand(3, 8, 6)
    assert losses.region_contrast(same, same, temperature=0.1).tolist() == [pytest.approx([math.log(8)] * 8)] * 3


@pytest.mark.parametrize(("kind", "target"), KINDS)
def test_gradient_reaches_p_and_never_z_and_z_counts(kind, target):
    p, z = vectors(4, 5).requires_grad_(), vectors(4, 5, seed=1).requires_grad_()
    values = losses.dense_similarity(p, z, kind=kind, target=target)
    values.sum().backward()
    assert p.grad.abs().min() > 0
    assert z.grad is None
    assert (losses.dense_similarity(p, vectors(4, 5, seed=9), kind=kind, target=target) != values).all()
    assert torch.autograd.gradcheck(lambda x: losses.dense_similarity(x, z, kind=kind, target=target), p)


def test_published_eq_3_only_sharpens_p():
    """As printed, p goes to one category, z's likeliest; as coded, to z's shares: the fixed point is p = z."""
    z = torch.tensor([1.0, 0.5, -1.0])
    for target, expected in (("z", torch.softmax(z, 0)), ("p", torch.tensor([1.0, 0, 0]))):
        p = torch.zeros(3, requires_grad=True)
        for _ in range(2000):
            (grad,) = torch.autograd.grad(losses.dense_similarity(p, z, kind="cross_entropy", target=target), p)
            p = (p - grad).detach().requires_grad_()
        assert torch.allclose(torch.softmax(p, 0), expected, atol=5e-3)


def test_regions_learn_on_both_sides_unless_stopped():
    """The paper writes no stop-gradient into eq. 6, and the public code has none."""
    for stop in (False, True):
        u, v = vectors(2, 4, 5).requires_grad_(), vectors(2, 4, 5, seed=1).requires_grad_()
        losses.region_contrast(u, v, temperature=0.1, stop_gradient=stop).sum().backward()
        assert u.grad.abs().min() > 0
        assert v.grad is None if stop else v.grad.abs().min() > 0
    assert torch.autograd.gradcheck(lambda a, b: losses.region_contrast(a, b, temperature=0.5), (u, v))
    masks, features = vectors(2, 7, 4).requires_grad_(), vectors(2, 7, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: losses.region_embeddings(a, b, by_mass=True), (masks, features))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dense_losses_are_float32_under_autocast(dtype):
    p, z = vectors(2, 6, 64, dtype=dtype), vectors(2, 6, 64, seed=1, dtype=dtype)
    calls = [
        lambda a, b: losses.dense_similarity(a, b, kind="cosine"),
        lambda a, b: losses.dense_similarity(a, b, kind="cross_entropy"),
        lambda a, b: losses.region_embeddings(a, b),
        lambda a, b: losses.region_contrast(a, b, temperature=0.1),
    ]
    for call in calls:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = call(p, z)
        assert found.dtype == torch.float32
        assert torch.allclose(found.double(), call(p.double(), z.double()), rtol=1e-5, atol=1e-5)


def test_extreme_values_are_finite():
    """Half precision's largest logits, zero vectors, a category that no point belongs to."""
    large = torch.tensor([[6e4, -6e4, 0.0], [-6e4, 6e4, 0.0]], requires_grad=True)
    zero = torch.zeros(2, 3, requires_grad=True)
    for p, z in ((large, -large), (zero, zero), (large, zero)):
        values = [losses.dense_similarity(p, z, kind=kind, target=target) for kind, target in KINDS]
        regions = losses.region_embeddings(p, z, by_mass=True)
        values += [losses.region_contrast(regions, z.new_ones(3, 3), temperature=0.1)]
        total = torch.cat(values).sum()
        (grad,) = torch.autograd.grad(total, p)
        assert total.isfinite()
        assert grad.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 1, 5)])
def test_no_points_and_one_region(shape):
    p = vectors(*shape, dtype=torch.float32).requires_grad_()
    values = [losses.dense_similarity(p, p, kind=kind) for kind in ("cosine", "cross_entropy")]
    values.append(losses.region_contrast(p, p, temperature=0.1))
    assert all(x.shape == shape[:-1] for x in values)
    assert losses.region_embeddings(p, p, by_mass=True).shape == (shape[0], 5, 5)
    loss = losses.mean(torch.stack(values), torch.zeros(3, *shape[:-1], dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert not losses.region_contrast(vectors(2, 1, 5), vectors(2, 1, 5, seed=1), temperature=0.1).any()  # one region


@pytest.mark.usefixtures("our_errors")
def test_bad_input_is_named():
    p = torch.rand(2, 3, 5)
    bad = [
        (lambda: losses.dense_similarity(p.long(), p, kind="cosine"), "dense_similarity: p must be"),
        (lambda: losses.dense_similarity(p, p[:, :2], kind="cosine"), "dense_similarity: z must be"),
        (lambda: losses.dense_similarity(p, p, kind="dot"), "dense_similarity: kind must be"),
        (lambda: losses.dense_similarity(p, p, kind="cosine", target="q"), "dense_similarity: target must be"),
        (lambda: losses.dense_similarity(p, p, kind="cosine", target="p"), "dense_similarity: target must be"),
        (lambda: losses.region_embeddings(p[0, 0], p), "region_embeddings: masks must be"),
        (lambda: losses.region_embeddings(p, p[:, :2]), "region_embeddings: features must be"),
        (lambda: losses.region_embeddings(p, p, softmax=False, by_mass=True), "region_embeddings: by_mass must be"),
        (lambda: losses.region_contrast(p[0, 0], p[0, 0], temperature=1), "region_contrast: u must be"),
        (lambda: losses.region_contrast(p, p[:, :2], temperature=1), "region_contrast: v must be"),
        (lambda: losses.region_contrast(p, p, temperature=0), "region_contrast: temperature must be"),
        (lambda: losses.region_contrast(p, p, temperature=math.nan), "region_contrast: temperature must be"),
    ]
    for call, message in bad:
        with pytest.raises(ValueError, match=message):
            call()

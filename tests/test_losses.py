import math

import pytest
import torch

from geoaug.objectives import losses


def vectors(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def cosine(a, b):
    dot, aa, bb = (sum(x * y for x, y in zip(u, v, strict=True)) for u, v in ((a, b), (a, a), (b, b)))
    return dot / math.sqrt(aa * bb)


def nce(q, k, queue, queue_valid, temperature):
    """One query, one key, a bank: eq. 5 of D3SSL on unit vectors."""
    logits = [cosine(q, k) / temperature]
    logits += [cosine(q, other) / temperature for other, ok in zip(queue, queue_valid, strict=True) if ok]
    most = max(logits)
    return most + math.log(sum(math.exp(x - most) for x in logits)) - logits[0]


def test_regression_against_the_loop():
    p, z = vectors(2, 3, 5), vectors(2, 3, 5, seed=1)
    found = losses.regression(p, z)
    assert found.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            expected = 2 - 2 * cosine(p[i, j].tolist(), z[i, j].tolist())
            assert found[i, j].item() == pytest.approx(expected, abs=1e-12)
    assert torch.allclose(losses.regression(p, 3 * p), torch.zeros(2, 3, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(losses.regression(p, -p), torch.full((2, 3), 4.0, dtype=torch.float64))


@pytest.mark.parametrize("temperature", [0.05, 0.2, 1.0])
def test_info_nce_against_the_loop(temperature):
    q, k, queue = vectors(2, 3, 5), vectors(2, 3, 5, seed=1), vectors(7, 5, seed=2)
    ok = torch.tensor([True, False, True, True, False, True, True])
    found = losses.info_nce(q, k, queue, ok, temperature=temperature)
    flat = losses.info_nce(q.flatten(0, 1), k.flatten(0, 1), queue, ok, temperature=temperature)
    assert found.shape == (2, 3)
    assert torch.allclose(found.flatten(), flat)
    for i in range(2):
        for j in range(3):
            expected = nce(q[i, j].tolist(), k[i, j].tolist(), queue.tolist(), ok.tolist(), temperature)
            assert found[i, j].item() == pytest.approx(expected, abs=1e-9)


def test_two_positives_of_one_query_are_two_losses():
    q, k, queue, ok = vectors(2, 3, 5), vectors(2, 2, 3, 5, seed=1), vectors(7, 5, seed=2), torch.ones(7).bool()
    found = losses.info_nce(q, k, queue, ok, temperature=0.2)
    alone = torch.stack([losses.info_nce(q, one, queue, ok, temperature=0.2) for one in k])
    assert found.shape == (2, 2, 3)
    assert torch.allclose(found, alone)


def test_published_vector_seven():
    """All similarities equal: log(K + 1), counting valid entries alone."""
    q, bank = vectors(5).expand(2, 5), vectors(5).expand(9, 5)
    ok = torch.arange(9) < 6
    assert losses.info_nce(q, q, bank, ok, temperature=0.1).tolist() == pytest.approx([math.log(7)] * 2)


@pytest.mark.parametrize("entries", [0, 6])
def test_an_empty_queue_gives_zero_inside_the_graph(entries):
    q = vectors(2, 3, 5, dtype=torch.float32).requires_grad_()
    bank, ok = torch.zeros(entries, 5), torch.zeros(entries, dtype=torch.bool)
    found = losses.info_nce(q, vectors(2, 3, 5, seed=1, dtype=torch.float32), bank, ok, temperature=0.2)
    assert found.tolist() == [[0.0] * 3] * 2
    found.sum().backward()
    assert q.grad.isfinite().all()
    assert not q.grad.any()


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (0, 5)])
def test_no_elements(shape):
    q = vectors(*shape, dtype=torch.float32).requires_grad_()
    values = losses.info_nce(q, q.detach(), torch.ones(4, 5), torch.ones(4).bool(), temperature=0.2)
    assert values.shape == losses.regression(q, q).shape == shape[:-1]
    loss = losses.mean(values, torch.zeros(shape[:-1], dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0


def test_gradient_reaches_the_student_and_no_teacher():
    student, teacher, bank = (vectors(*s, seed=i).requires_grad_() for i, s in enumerate(((4, 5), (4, 5), (7, 5))))
    for loss in (
        lambda t, b: losses.regression(student, t),
        lambda t, b: losses.info_nce(student, t, b, torch.ones(7).bool(), temperature=0.2),
    ):
        for one in (student, teacher, bank):
            one.grad = None
        values = loss(teacher, bank)
        values.sum().backward()
        assert student.grad.abs().min() > 0
        assert teacher.grad is None
        assert bank.grad is None
        assert (loss(vectors(4, 5, seed=9), bank) != values).all()
        assert torch.autograd.gradcheck(lambda s: losses.regression(s, teacher), student)
    assert torch.autograd.gradcheck(
        lambda s: losses.info_nce(s, teacher, bank, torch.arange(7) < 5, temperature=0.2), student
    )


def test_the_queue_changes_the_loss_where_it_is_valid():
    q, k, queue = vectors(3, 5), vectors(3, 5, seed=1), vectors(4, 5, seed=2)
    ok = torch.tensor([True, True, False, False])
    before = losses.info_nce(q, k, queue, ok, temperature=0.2)
    queue[3] = math.nan  # an entry never written may hold anything
    assert torch.equal(losses.info_nce(q, k, queue, ok, temperature=0.2), before)
    queue[1] += 1
    assert (losses.info_nce(q, k, queue, ok, temperature=0.2) != before).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_are_float32_under_autocast(dtype):
    q, k, queue = (vectors(*s, seed=i, dtype=dtype) for i, s in enumerate(((4, 64), (4, 64), (99, 64))))
    ok = torch.arange(99) < 90
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = losses.info_nce(q, k, queue, ok, temperature=0.05), losses.regression(q, k)
        mean = losses.mean(found[0], ok[:4])
    wide = [x.double() for x in (q, k, queue)]
    expected = losses.info_nce(*wide, ok, temperature=0.05), losses.regression(*wide[:2])
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == mean.dtype == torch.float32
        assert torch.allclose(one.double(), other, rtol=1e-5, atol=1e-5)


def test_zero_vectors_give_finite_values_and_gradients():
    q = torch.zeros(3, 5, requires_grad=True)
    values = losses.info_nce(q, q, torch.zeros(4, 5), torch.ones(4).bool(), temperature=0.2) + losses.regression(q, q)
    assert values.tolist() == pytest.approx([math.log(5) + 2] * 3)
    values.sum().backward()
    assert q.grad.isfinite().all()


def test_mean_against_the_loop():
    values, valid = vectors(4, 3), torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]]).bool()
    rows = zip(values.tolist(), valid.tolist(), strict=True)
    kept = [[v for v, ok in zip(*row, strict=True) if ok] for row in rows]
    every = [v for row in kept for v in row]
    images = [sum(row) / len(row) for row in kept if row]
    assert losses.mean(values, valid).item() == pytest.approx(sum(every) / 6)
    assert losses.mean(values, valid, per_image=True).item() == pytest.approx(sum(images) / 3)
    assert losses.mean(values, valid, count=8).item() == pytest.approx(sum(every) / 8)
    found = losses.mean(values, valid, per_image=True, count=torch.tensor(1.5))
    assert found.item() == pytest.approx(sum(images) / 1.5)
    half = losses.mean(values[:1, :1], valid[:1, :1], count=torch.tensor(0.5))  # one element on two ranks
    assert half.item() == pytest.approx(2 * values[0, 0].item())
    flat = losses.mean(values[:, 0], valid[:, 0], per_image=True)  # one element an image
    assert flat.item() == pytest.approx(losses.mean(values[:, 0], valid[:, 0]).item())


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_mean_of_ranks_and_micro_batches_is_the_global_mean(per_image, as_tensor):
    """2 ranks x 3 micro-batches as in a trainer: DDP averages ranks, the loop multiplies by its micro-batches."""
    values, valid = vectors(12, 5).requires_grad_(), vectors(12, 5, seed=1) > 0.6
    valid[2:4] = False  # rank 0 has a micro-batch without any
    whole = losses.mean(values, valid, per_image=per_image)
    (expected,) = torch.autograd.grad(whole, values)
    count = (valid.any(1) if per_image else valid).sum() / 2  # / world
    ranks = []
    for rank in (slice(0, 6), slice(6, 12)):
        parts = zip(values[rank].split(2), valid[rank].split(2), strict=True)
        losses_ = [
            3 * losses.mean(v, ok, per_image=per_image, count=count if as_tensor else count.item()) / 3
            for v, ok in parts
        ]
        ranks.append(sum(losses_))
    total = sum(ranks) / 2
    assert total.item() == pytest.approx(whole.item(), abs=1e-12)
    assert torch.allclose(torch.autograd.grad(total, values)[0], expected, atol=1e-12)


@pytest.mark.parametrize("count", [None, 0, 0.0, torch.tensor(0), torch.tensor(0.0), 2.5])
@pytest.mark.parametrize("per_image", [False, True])
def test_mean_of_nothing_is_zero_inside_the_graph(per_image, count):
    values = torch.full((2, 3), math.nan).requires_grad_()
    loss = losses.mean(values, torch.zeros(2, 3, dtype=torch.bool), per_image=per_image, count=count)
    loss.backward()
    assert loss.item() == 0
    assert values.grad.tolist() == [[0.0] * 3] * 2


def test_mean_never_reads_a_masked_element():
    values = torch.tensor([[1.0, math.nan], [math.inf, 3.0]], requires_grad=True)
    valid = torch.tensor([[True, False], [False, True]])
    loss = losses.mean(values, valid)
    loss.backward()
    assert loss.item() == 2
    assert values.grad.tolist() == [[0.5, 0.0], [0.0, 0.5]]
    assert losses.mean(values.half(), valid).dtype == torch.float32


@pytest.mark.usefixtures("our_errors")
def test_bad_input_is_named():
    q, queue, ok = torch.rand(2, 3, 5), torch.rand(4, 5), torch.ones(4).bool()
    bad = [
        (lambda: losses.regression(q, q[:, :2]), "regression: z must be"),
        (lambda: losses.regression(q.long(), q), "regression: p must be"),
        (lambda: losses.info_nce(q.long(), q, queue, ok, temperature=0.2), "info_nce: q must be"),
        (lambda: losses.info_nce(q, q[:1], queue, ok, temperature=0.2), "info_nce: k must be"),
        (lambda: losses.info_nce(q, q, queue[:, :4], ok, temperature=0.2), "info_nce: queue must be"),
        (lambda: losses.info_nce(q, q, queue, ok[:3], temperature=0.2), "info_nce: queue_valid must be"),
        (lambda: losses.info_nce(q, q, queue, ok.float(), temperature=0.2), "info_nce: queue_valid must be"),
        (lambda: losses.info_nce(q, q, queue, ok, temperature=0), "info_nce: temperature must be"),
        (lambda: losses.info_nce(q, q, queue, ok, temperature=math.nan), "info_nce: temperature must be"),
        (lambda: losses.mean(q.long(), q > 0), "mean: values must be"),
        (lambda: losses.mean(q, q), "mean: valid must be"),
        (lambda: losses.mean(q, q[0] > 0), "mean: valid must be"),
        (lambda: losses.mean(q, q > 0, count=-1), "mean: count must be"),
        (lambda: losses.mean(q, q > 0, count=math.nan), "mean: count must be"),
        (lambda: losses.mean(q, q > 0, count=torch.ones(2)), "mean: count must be"),
        (lambda: losses.mean(q.sum(), q.sum() > 0, per_image=True), "mean: values must be"),
    ]
    for call, message in bad:
        with pytest.raises(ValueError, match=message):
            call()

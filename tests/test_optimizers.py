import copy
import math

import pytest
import torch
from torch import nn

from trainers import common
from trainers.optimizers import LARS, Queue, cosine_lr, cosine_momentum


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3, bias=False)).double()


def norm(values):
    return math.sqrt(sum(v * v for v in values))


def lars_loop(parameters, gradients, velocities, *, lr, momentum, eta, decay):
    """BYOL's LARS, number by number: decay first, then the ratio of the norms, then momentum."""
    for p, g, v in zip(parameters, gradients, velocities, strict=True):
        ratio = 1.0
        if p["ndim"] > 1:
            g = [gi + decay * pi for gi, pi in zip(g, p["values"], strict=True)]
            if norm(p["values"]) > 0 and norm(g) > 0:
                ratio = eta * norm(p["values"]) / norm(g)
        for i, gi in enumerate(g):
            v[i] = momentum * v[i] + ratio * gi
            p["values"][i] -= lr * v[i]


def test_lars_against_the_loop():
    model, steps = net(), 4
    with torch.no_grad():
        model[2].weight.zero_()  # its ratio is 1 at first
    slow = [{"ndim": p.ndim, "values": p.detach().flatten().tolist()} for p in model.parameters()]
    velocities = [[0.0] * len(p["values"]) for p in slow]
    optimizer = LARS(common.weights_and_vectors(model.parameters(), weight_decay=0.125), lr=1.0, momentum=0.8, eta=0.02)
    for step in range(steps):
        lr = common.set_lr(optimizer, step, steps, peak=0.5)
        optimizer.zero_grad()
        torch.manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        if step == 0:
            model[0].weight.grad = -0.125 * model[0].weight.detach()  # the update is 0: its ratio is 1 too
        gradients = [p.grad.flatten().tolist() for p in model.parameters()]
        optimizer.step()
        lars_loop(slow, gradients, velocities, lr=lr, momentum=0.8, eta=0.02, decay=0.125)
        for ours, loop in zip(model.parameters(), slow, strict=True):
            assert ours.flatten().tolist() == pytest.approx(loop["values"], rel=1e-9, abs=1e-12)


def test_lars_by_hand():
    """Two steps of rate 2, momentum 0.9, eta 0.1 and decay 0.5, worked out on paper."""
    matrix, bias = nn.Parameter(torch.tensor([[3.0, 4.0]])), nn.Parameter(torch.tensor([1.0]))
    optimizer = LARS(common.weights_and_vectors([matrix, bias], weight_decay=0.5), lr=2.0, momentum=0.9, eta=0.1)
    # With decay the gradient is (0.6, 0.8), of length 1; the matrix is 5 long: times 0.5. The bias moves by 2 * 0.5.
    matrix.grad, bias.grad = torch.tensor([[-0.9, -1.2]]), torch.tensor([0.5])
    optimizer.step()
    assert matrix.tolist() == [pytest.approx([2.4, 3.2])]
    assert bias.tolist() == pytest.approx([0.0])
    # (0, 2), of length 2, on a matrix 4 long: times 0.2, so (0, 0.4); the velocity is 0.9 * (0.3, 0.4) + (0, 0.4).
    matrix.grad, bias.grad = torch.tensor([[-1.2, 0.4]]), torch.tensor([0.5])
    optimizer.step()
    assert matrix.tolist() == [pytest.approx([1.86, 1.68])]
    assert bias.tolist() == pytest.approx([-1.9])


def test_lars_leaves_out_what_has_no_gradient_and_goes_on_from_its_state():
    one, two = net(), net()
    data = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def optimizer_of(model):
        return LARS(common.weights_and_vectors(model.parameters(), weight_decay=1e-3), lr=0.1)

    def steps(model, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            model(data).square().sum().backward()
            optimizer.step()

    first = optimizer_of(one)
    steps(one, first, 4)
    half = optimizer_of(two)
    steps(two, half, 2)
    other = net(1)
    other.load_state_dict(two.state_dict())
    again = optimizer_of(other)
    again.load_state_dict(copy.deepcopy(half.state_dict()))
    steps(other, again, 2)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))

    still = net()
    optimizer = optimizer_of(still)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(still.parameters(), net().parameters(), strict=True))
    assert optimizer.step(lambda: still(data).sum()) is not None


def test_groups_hold_every_trained_parameter_once():
    model = nn.Sequential(net(), common.frozen(net(1)))
    matrices, vectors = common.weights_and_vectors(model.parameters(), weight_decay=0.5)
    assert {p.ndim for p in matrices["params"]} == {2}
    assert {p.ndim for p in vectors["params"]} == {1}
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(model[0].parameters()))
    assert (matrices["weight_decay"], matrices["adapt"]) == (0.5, True)
    assert (vectors["weight_decay"], vectors["adapt"]) == (0.0, False)


def test_learning_rate_follows_the_cosine_after_the_warm_up():
    assert [cosine_lr(s, 100, peak=2.0) for s in (0, 50, 100, 200)] == pytest.approx([2.0, 1.0, 0.0, 0.0])
    rates = [cosine_lr(s, 110, peak=2.0, warmup=10, start=0.5, end=1.0) for s in (0, 5, 10, 60, 110)]
    assert rates == pytest.approx([0.5, 1.25, 2.0, 1.5, 1.0])
    assert cosine_lr(3, 3, peak=1.0, warmup=5) == pytest.approx(0.6)  # a warm-up longer than the run


def test_a_fixed_group_keeps_the_peak():
    model = net()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "fixed_lr": True}]
    optimizer = torch.optim.SGD(groups, 9.0)
    assert common.set_lr(optimizer, 5, 10, peak=0.4) == pytest.approx(0.2)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.2, 0.4])


def test_momentum_of_the_teacher():
    """Published vector ten."""
    values = [cosine_momentum(s, 200, base=0.99) for s in (0, 100, 200)]
    assert values == pytest.approx([0.99, 0.995, 1.0])


def test_the_teacher_moves_by_its_parameters_alone():
    student, teacher = net(), common.frozen(net(1))
    before, own = copy.deepcopy(teacher), copy.deepcopy(student.state_dict())
    student(torch.randn(4, 5, dtype=torch.float64))  # moves the student's running statistics
    common.move_teacher(teacher, student, 0.75)
    for now, was, other in zip(teacher.parameters(), before.parameters(), student.parameters(), strict=True):
        assert torch.allclose(now, 0.75 * was + 0.25 * other)
        assert not now.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(teacher.buffers(), before.buffers(), strict=True))
    assert all(torch.equal(x, own[name]) for name, x in student.named_parameters())
    common.move_teacher(teacher, student, 0.0)
    assert all(torch.allclose(a, b) for a, b in zip(teacher.parameters(), student.parameters(), strict=True))
    with pytest.raises(ValueError, match="must have the student's parameters"):
        common.move_teacher(teacher[0], student, 0.5)


def test_the_queue_keeps_the_last_vectors_in_turn():
    queue, slow = Queue(8, 3), [(torch.zeros(3), False)] * 8
    at = 0
    for n in (2, 4, 2, 2, 2, 8, 1, 1):
        vectors = torch.arange(3 * n).view(n, 3) + 100.0 * (at + 1)
        valid = torch.arange(n) % 3 != 1
        queue.enqueue(vectors, valid)
        for v, ok in zip(vectors, valid.tolist(), strict=True):
            slow[at % 8] = (v, ok)
            at += 1
        assert int(queue.at) == at % 8
        assert torch.equal(queue.vectors, torch.stack([v for v, _ in slow]))
        assert queue.valid.tolist() == [ok for _, ok in slow]
    assert len(torch.unique(queue.vectors, dim=0)) == 8  # nothing is stored twice
    again = Queue(8, 3)
    again.load_state_dict(queue.state_dict())
    assert int(again.at) == at % 8


@pytest.mark.parametrize("n", [0, 3, 16])
def test_the_queue_takes_divisors_of_its_capacity(n):
    with pytest.raises(ValueError, match=f"divisor of the capacity 8, got {n}"):
        Queue(8, 3).enqueue(torch.zeros(n, 3), torch.zeros(n, dtype=torch.bool))


def test_the_queue_is_a_buffer_that_no_gradient_reaches():
    queue = Queue(4, 3)
    assert not list(queue.parameters())
    queue.enqueue(torch.ones(2, 3, requires_grad=True).bfloat16(), torch.ones(2, dtype=torch.bool))
    assert queue.vectors.dtype == torch.float32
    assert not queue.vectors.requires_grad

"""Optimisers, schedules and the moving teacher of all trainers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def cosine_lr(step: int, total: int, *, peak: float, warmup: int = 0, start: float = 0.0, end: float = 0.0) -> float:
    """Linear warm-up from `start` over `warmup` steps, then half a cosine from `peak` to `end`; per optimiser step.

    >>> [round(cosine_lr(step, 10, peak=1.0, warmup=2), 3) for step in (0, 1, 2, 6, 10)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if step < warmup:
        return start + (peak - start) * step / warmup
    along = min(1.0, (step - warmup) / max(1, total - warmup))
    return end + (peak - end) * (1 + math.cos(math.pi * along)) / 2


def set_lr(optimizer: Any, step: int, total: int, *, peak: float, warmup: int = 0, end: float = 0.0) -> float:
    """Set the step's learning rate, but for groups with `fixed_lr` (SimSiam's predictor), which keep the peak."""
    lr = cosine_lr(step, total, peak=peak, warmup=warmup, end=end)
    for group in optimizer.param_groups:
        group["lr"] = peak if group.get("fixed_lr") else lr
    return lr


def cosine_momentum(step: int, total: int, *, base: float) -> float:
    """BYOL's momentum of the teacher: `base` at first, 1 at last.

    >>> [round(cosine_momentum(step, 10, base=0.99), 3) for step in (0, 5, 10)]
    [0.99, 0.995, 1.0]
    """
    return 1 - (1 - base) * (math.cos(math.pi * step / max(1, total)) + 1) / 2


def ramp(step: int, steps: int, first: float, last: float) -> float:
    """From `first` to `last` in a straight line over so many steps, and `last` from then on.

    >>> [round(ramp(step, 10, 0.04, 0.07), 4) for step in (0, 5, 10, 99)]
    [0.04, 0.055, 0.07, 0.07]
    """
    return first + (last - first) * min(1.0, step / max(1, steps))


@torch.no_grad()
def move_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, parameters only; after the optimiser's step."""
    ours, theirs = list(teacher.parameters()), list(student.parameters())
    if [p.shape for p in ours] != [p.shape for p in theirs]:
        raise ValueError("move_teacher: teacher must have the student's parameters, got others")
    torch._foreach_lerp_(ours, theirs, 1 - momentum)


def frozen(module: nn.Module) -> nn.Module:
    """The module with gradients off: a teacher moves by `move_teacher` alone."""
    return module.requires_grad_(False)


def weights_and_vectors(parameters: Iterable[nn.Parameter], *, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices and kernels with decay; biases and norms (ndim <= 1) without decay and adaptation."""
    every = [p for p in parameters if p.requires_grad]
    return [
        {"params": [p for p in every if p.ndim > 1], "weight_decay": weight_decay, "adapt": True},
        {"params": [p for p in every if p.ndim <= 1], "weight_decay": 0.0, "adapt": False},
    ]


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step is scaled per tensor by eta |p| / |g + wd p|, as in BYOL; 1 where a norm is 0.

    Groups with `adapt` False are plain SGD with the same learning rate.

    >>> layer = nn.Linear(3, 2)
    >>> _ = LARS(weights_and_vectors(layer.parameters(), weight_decay=1e-6), lr=0.1)
    """

    def __init__(self, params: Any, lr: float, *, momentum: float = 0.9, eta: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "eta": eta, "weight_decay": 0.0, "adapt": True})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step; the closure, if any, is evaluated first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            updates = torch._foreach_add([p.grad for p in parameters], parameters, alpha=group["weight_decay"])
            if group["adapt"]:
                norms = (torch.stack(torch._foreach_norm(tensors)) for tensors in (parameters, updates))
                torch._foreach_mul_(updates, list(self._ratio(*norms, group["eta"]).unbind()))
            fresh = [p for p in parameters if "velocity" not in self.state[p]]
            for p in fresh:
                self.state[p]["velocity"] = torch.zeros_like(p)
            velocities = [self.state[p]["velocity"] for p in parameters]
            torch._foreach_mul_(velocities, group["momentum"])
            torch._foreach_add_(velocities, updates)
            torch._foreach_add_(parameters, velocities, alpha=-group["lr"])
        return loss

    @staticmethod
    def _ratio(parameter: Tensor, update: Tensor, eta: float) -> Tensor:
        there = (parameter > 0) & (update > 0)
        return torch.where(there, eta * parameter / update.clamp_min(torch.finfo(update.dtype).tiny), 1.0)


class Queue(nn.Module):
    """The last `capacity` unit vectors with a flag each, overwritten in turn (the memory bank of MoCo).

    >>> queue = Queue(8, 4)
    >>> queue.enqueue(torch.ones(2, 4), torch.tensor([True, False]))
    >>> int(queue.valid.sum()), int(queue.at)
    (1, 2)
    """

    def __init__(self, capacity: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("vectors", torch.zeros(capacity, dim))
        self.register_buffer("valid", torch.zeros(capacity, dtype=torch.bool))
        self.register_buffer("at", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def enqueue(self, vectors: Tensor, valid: Tensor) -> None:
        """Store [N, D] with flags [N], the same on every rank; N must divide the capacity."""
        if len(vectors) == 0 or len(self.vectors) % len(vectors):
            raise ValueError(
                f"Queue.enqueue: vectors must be a divisor of the capacity {len(self.vectors)}, got {len(vectors)}"
            )
        # No slice by `at`: reading it on the host would wait for the device.
        rows = (self.at + torch.arange(len(vectors), device=self.at.device)) % len(self.vectors)
        self.vectors.index_copy_(0, rows, vectors.to(self.vectors.dtype))
        self.valid.index_copy_(0, rows, valid)
        self.at.copy_((self.at + len(vectors)) % len(self.vectors))

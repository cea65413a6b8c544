"""What LC-loss on DINO (appendix B) takes of DINO (Caron et al., 2021): head, loss, centre, clipped gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from .networks import mlp


@dataclasses.dataclass
class DinoFlags:
    """DINO's own numbers."""

    student_temperature: float = 0.1
    """DINO's, of the student's outputs."""
    teacher_temperature: tuple[float, float] = (0.04, 0.07)
    """DINO's, at first and after --teacher-epochs, linear between."""
    teacher_epochs: float = 30.0
    """Epochs in which the teacher's temperature rises."""
    centre_momentum: float = 0.9
    """Of the mean that DINO takes from the teacher's outputs."""
    frozen_epochs: float = 1.0
    """Epochs at first in which DINO's prototypes stay as they are."""
    clip: float = 3.0
    """Longest gradient of a tensor with DINO."""


def dino_flags(config: DinoFlags) -> list[str]:
    """Those of DINO's flags that differ from their defaults."""
    every = dataclasses.fields(DinoFlags)
    return [f"--{f.name.replace('_', '-')}" for f in every if getattr(config, f.name) != f.default]


class DinoHead(nn.Module):
    """Three layers to a bottleneck of unit length, then its cosines with prototypes: weight norm with its scale at 1.

    >>> DinoHead(768, 2048, 4096)(torch.randn(2, 768)).shape
    torch.Size([2, 4096])
    """

    def __init__(self, wide: int, hidden: int, out: int, bottleneck: int = 256) -> None:
        super().__init__()
        self.layers = mlp(wide, hidden, hidden, bottleneck, norm=False)
        for i, layer in enumerate(self.layers):
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
            else:
                self.layers[i] = nn.GELU()
        self.prototypes = nn.Parameter(torch.empty(out, bottleneck).uniform_(-1, 1) * bottleneck**-0.5)

    def forward(self, features: Tensor) -> Tensor:
        """Cosines [B, out] of features [B, wide], in float32: temperatures of a twentieth come next."""
        vectors = self.layers(features)
        with torch.autocast(vectors.device.type, enabled=False):
            unit = functional.normalize(vectors.float(), dim=1, eps=1e-6)
            return functional.linear(unit, functional.normalize(self.prototypes.float(), dim=1, eps=1e-6))


def self_distillation(
    student: Tensor, teacher: Tensor, centre: Tensor, *, student_temperature: float, teacher_temperature: float
) -> Tensor:
    """Cross-entropy [B] of the student's distribution with the teacher's, centred and sharpened (DINO, eq. 3 and 4).

    >>> outputs, centre = torch.zeros(2, 8), torch.zeros(8)
    >>> self_distillation(outputs, outputs, centre, student_temperature=0.1, teacher_temperature=0.04)
    tensor([2.0794, 2.0794])
    """
    with torch.autocast(student.device.type, enabled=False):
        target = ((teacher.detach().float() - centre) / teacher_temperature).softmax(1)
        return -(target * (student.float() / student_temperature).log_softmax(1)).sum(1)


class Centre(nn.Module):
    """The moving mean of the teacher's outputs, which keeps one prototype from taking all."""

    def __init__(self, out: int, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(out))

    @torch.no_grad()
    def move(self, total: Tensor, count: Tensor) -> None:
        """Towards the mean of a step: the sum [out] of `count` outputs, over all processes; not at all without any."""
        mean = torch.where(count > 0, total / count.clamp_min(1), self.mean)
        self.mean.lerp_(mean, 1 - self.momentum)


@torch.no_grad()
def clip_each(parameters: Iterable[nn.Parameter], longest: float) -> None:
    """Shorten the gradient of every tensor that is longer than `longest`, each by itself, as DINO's code does."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients:
        shares = [(longest / (norm + 1e-6)).clamp_max(1) for norm in torch._foreach_norm(gradients)]
        torch._foreach_mul_(gradients, shares)

"""What BYOL and the methods built on it share (SCRL, LC-loss): its heads, its target network, the passes of two views.

    self.student = Encoder(config)                                          # trunk and projector
    self.teacher = common.target_of(self.student, lambda: Encoder(config), config.target)
    self.predictor = common.byol_head(config.dim, config.hidden, config.dim)
    ...
    p1, p2 = common.of_views(lambda x: self.predictor(self.student(x)), config.forward, [x1, x2])
    with torch.no_grad():
        shuffle = batch.key.fold("z") if config.norm == "shuffle" else None
        z1, z2 = common.of_views(self.teacher, config.forward, [x1, x2], shuffle=shuffle)
    each = common.both_ways(p1, p2, z1, z2)                                 # [B] or [B, K], in [0, 8]

The optimiser is `common.LARS(common.weights_and_vectors(model.parameters(), weight_decay=...), lr)`, the teacher moves
by `common.move_teacher(teacher, student, common.cosine_momentum(step, total, base=ema))` after its step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from geoaug import Key, losses

from .networks import mlp, shuffled
from .optimizers import frozen

Target = Literal["random", "copy"]
Forward = Literal["apart", "joint"]


def byol_head(wide: int, hidden: int, out: int) -> nn.Sequential:
    """Projector and predictor: linear, batch norm, ReLU, linear without bias.

    >>> [type(layer).__name__ for layer in byol_head(2048, 4096, 256)]
    ['Linear', 'BatchNorm1d', 'ReLU', 'Linear']
    """
    return mlp(wide, hidden, out, last_bias=False)


def target_of(student: nn.Module, make: Callable[[], nn.Module], target: Target) -> nn.Module:
    """The frozen teacher: made anew, with first weights of its own (BYOL's and SCRL's code), or a copy."""
    return frozen(make() if target == "random" else copy.deepcopy(student))


def of_views(
    network: Callable[..., Any], forward: Forward, *views: Sequence[Tensor], shuffle: Key | None = None
) -> list[Any]:
    """What the network gives for each view, a tensor or a tuple of them.

    `apart`: one pass a view, each with batch norm's statistics of its own (BYOL's code). `joint`: one pass for all
    views, which must be of one size and share the statistics (SCRL's code). `views` are the network's arguments, each
    with an entry a view; with a key to shuffle by, rows are dealt over the processes (see `shuffled`).

    >>> one, two = of_views(nn.Flatten(), "joint", [torch.zeros(4, 3, 2, 2), torch.ones(4, 3, 2, 2)])
    >>> one.shape, bool((two == 1).all())
    (torch.Size([4, 12]), True)
    """
    if forward == "apart":
        columns = list(zip(*views, strict=True))
        if shuffle is not None:
            return [shuffled(network, shuffle.fold(f"view {v}"), *each) for v, each in enumerate(columns)]
        return [network(*each) for each in columns]

    def joint(*stacked: Tensor) -> Any:
        out = network(*(x.flatten(0, 1) for x in stacked))
        split = tuple(x.unflatten(0, (-1, len(views[0]))) for x in (out if isinstance(out, tuple) else (out,)))
        return split if isinstance(out, tuple) else split[0]

    stacked = [torch.stack(tuple(x), dim=1) for x in views]  # [B, V, ...]
    out = shuffled(joint, shuffle, *stacked) if shuffle is not None else joint(*stacked)
    return list(zip(*(x.unbind(1) for x in out), strict=True)) if isinstance(out, tuple) else list(out.unbind(1))


def both_ways(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    """The symmetrised loss: each view's prediction against the other's projection, added up (BYOL; SCRL, eq. 3)."""
    return losses.regression(p1, z2) + losses.regression(p2, z1)

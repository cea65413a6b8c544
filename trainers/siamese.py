"""What SimSiam and DenseSiam share: the loss both ways, the groups of the optimiser, what their batch norm needs."""

from __future__ import annotations

from typing import Any, Literal

from accelerate import Accelerator
from torch import Tensor, nn

from geoaug import losses

from .arguments import RunConfig, UsageError

PredictorLR = Literal["constant", "cosine"]
Similarity = Literal["cosine", "cross_entropy"]
# Under these (see `spread`) a run warns of collapse.
SPREAD_FLOORS = {"spread": 0.1, "spread_predictor": 0.1}


def symmetrised(
    p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor, kind: Similarity = "cosine", target: Literal["z", "p"] = "z"
) -> Tensor:
    """Half of each view's prediction against the other's projection, which is detached (DenseSiam, eq. 1)."""
    one = losses.dense_similarity(p1, z2, kind=kind, target=target)
    return (one + losses.dense_similarity(p2, z1, kind=kind, target=target)) / 2


def siamese_groups(model: nn.Module, *predictors: nn.Module, predictor_lr: PredictorLR) -> list[dict[str, Any]]:
    """Two groups: the predictors, at a constant learning rate where asked for (see `set_lr`), and all else."""
    theirs = [p for predictor in predictors for p in predictor.parameters()]
    known = {id(p) for p in theirs}
    others = [p for p in model.parameters() if id(p) not in known]
    return [{"params": others}, {"params": theirs, "fixed_lr": predictor_lr == "constant"}]


def check_norm(config: RunConfig, accelerator: Accelerator) -> None:
    """Refuse what a Siamese network cannot be trained with: nothing to shuffle before, or one image to normalise by."""
    if config.norm == "shuffle":
        raise UsageError("--norm must be sync or batch, got shuffle: there is no teacher to shuffle before")
    rows = config.batch_size // (config.accumulate * (accelerator.num_processes if config.norm == "batch" else 1))
    if rows < 2:
        raise UsageError(
            f"--batch-size must give batch norm 2 images at least, got {config.batch_size}: {rows} at a time"
        )

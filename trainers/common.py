"""The trainers' shared leaves under one name: `from trainers.common import ...`. No loop lives here."""

from .arguments import ARCHES, REQUEUE, Norm, RunConfig, TrainingError, UsageError, launch, open_data, parse, start
from .byol_parts import Forward, Target, both_ways, byol_head, of_views, target_of
from .checkpoints import load_checkpoint, save_checkpoint
from .networks import (
    AllReduceBatchNorm,
    Pyramid,
    Trunk,
    make_trunk,
    mlp,
    prepare_model,
    region_head,
    shuffled,
    spread,
    with_norm,
)
from .optimizers import LARS, Queue, cosine_lr, cosine_momentum, frozen, move_teacher, set_lr, weights_and_vectors
from .region_views import Cutout, Jitter, OnOff, RegionLaw, choose_boxes, jittered, kept_pixels, need_boxes
from .runs import Run

__all__ = [
    "ARCHES",
    "LARS",
    "REQUEUE",
    "AllReduceBatchNorm",
    "Cutout",
    "Forward",
    "Jitter",
    "Norm",
    "OnOff",
    "Pyramid",
    "Queue",
    "RegionLaw",
    "Run",
    "RunConfig",
    "Target",
    "TrainingError",
    "Trunk",
    "UsageError",
    "both_ways",
    "byol_head",
    "choose_boxes",
    "cosine_lr",
    "cosine_momentum",
    "frozen",
    "jittered",
    "kept_pixels",
    "launch",
    "load_checkpoint",
    "make_trunk",
    "mlp",
    "move_teacher",
    "need_boxes",
    "of_views",
    "open_data",
    "parse",
    "prepare_model",
    "region_head",
    "save_checkpoint",
    "set_lr",
    "shuffled",
    "spread",
    "start",
    "target_of",
    "weights_and_vectors",
    "with_norm",
]

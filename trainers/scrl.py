"""SCRL: Spatially Consistent Representation Learning (Roh et al., CVPR 2021).

    accelerate launch trainers/scrl.py --data imagenet.beton --preset imagenet-200ep --output runs/scrl
    python trainers/scrl.py --data scenes/instances.json --preset demo --output runs/s     # minutes on two cores

To expect: COCO box 40.2 AP after 200 epochs of ImageNet, 40.9 after 1000 (Faster R-CNN, FPN, 1x; Tables 6 and 2), 39.0
after as many steps of COCO as 200 epochs of ImageNet are (Table A3); we have not run them. `imagenet-1000ep` is the
public code's recipe (rate 0.2, momentum 0.996), which gave 40.92; `imagenet-1000ep-paper` the paper's (0.45, 0.97).

Paper and public code differ; docs/choices.md has all of it. Boxes are drawn in cells of a random grid, as the code does
(--law uniform: the paper's eq. 1); after 50 candidates that overlap too much the last one is kept (--on-fail drop:
none). RoIAlign is aligned, the code's is half a cell off (--aligned off). The code's LARS moves biases by the rate
squared; here they move by the rate. Views pass as one batch and the target starts from weights of its own, as in the
code (--forward, --target). Blur is Gaussian, as in the paper.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import geoaug
from geoaug import boxes as box_algebra
from geoaug import losses
from trainers import common


@dataclass
class Config(common.RunConfig):
    """The paper's recipe of 1000 epochs."""

    output: Path = Path("runs/scrl")
    crop: float = 0.2
    """Smallest share of the image that a view shows."""
    boxes: int = 10
    """Boxes an image and step, K (Table 6)."""
    law: Literal["grid", "uniform"] = "grid"
    """How boxes are drawn: in a cell of a random grid, or eq. 1."""
    min_side: int = 32
    """Least side of a box, in pixels of the coarser view: a cell of C5."""
    max_iou: float = 0.5
    """A box whose IoU with an earlier one is not under it is drawn again; 1 takes all (Table 7)."""
    on_fail: Literal["keep", "drop"] = "keep"
    """After 50 candidates: the last one, or no box."""
    jitter: float = 0.0
    """Share by which the second view's boxes are moved and scaled at most; inf: any box of the overlap (Table 7)."""
    aligned: common.OnOff = "on"
    """RoIAlign with half a cell's correction; off is the public code's."""
    mean: Literal["boxes", "images"] = "boxes"
    """The loss is the mean over all boxes of a step, or over its images of each one's mean."""
    target: common.Target = "random"
    """First weights of the target network: its own, or a copy of the online network's."""
    forward: common.Forward = "joint"
    """Views pass as one batch, or one after the other, each with its own statistics."""
    hidden: int = 4096
    """Width of projector and predictor."""
    dim: int = 256
    """Width of their output."""
    epochs: int = 1000
    lr: float = 0.45
    """LARS learning rate per 256 images."""
    weight_decay: float = 1.5e-6
    warmup_epochs: float = 10.0
    """Epochs of linear warm-up."""
    batch_size: int = 8192
    """Images per optimiser step, over all processes."""
    ema: float = 0.97
    """Momentum of the target at first; 1 at last."""
    monitor: common.OnOff = "off"
    """Log linear and k-NN accuracy on the images' labels; nothing is trained by them."""


PRESETS = {
    "imagenet-200ep": Config(epochs=200, weight_decay=1e-6, output=Path("runs/scrl-200ep")),
    "imagenet-1000ep": Config(lr=0.2, ema=0.996),
    "imagenet-1000ep-paper": Config(),
    # 156 steps an epoch of ImageNet, 14 of COCO: 31,200 steps, of which 1,560 warm up.
    "coco-as-imagenet-200ep": Config(
        epochs=2229, warmup_epochs=111, weight_decay=1e-6, output=Path("runs/scrl-coco"),
    ),
    "demo": Config(
        output=Path("runs/demo/scrl"), epochs=12, batch_size=64, arch="resnet10-narrow", size=96, hidden=512, lr=1.0,
        warmup_epochs=1.0, log_every=5, save_every=200,
    ),
}  # fmt: skip


def recipe(config: Config) -> geoaug.recipes.Recipe:
    """Two crops at the run's size."""
    made = geoaug.recipes.recipe("scrl").at(config.size)
    return replace(made, views=tuple(replace(view, scale=(config.crop, 1.0)) for view in made.views))


@dataclass(frozen=True)
class Pairs:
    """The K matched boxes of each image in v1 and v2 [B, K, 4], unit coordinates, and what they read of C5.

    That is what each of its cells counts in a box's RoIAlign [B, K, cells]; drawn once, it serves both networks.
    """

    in_v1: Tensor
    in_v2: Tensor
    reads_v1: Tensor
    reads_v2: Tensor
    valid: Tensor  # [B, K]

    def split(self, parts: int) -> list[Pairs]:
        """The same in so many parts of equal size."""
        columns = [getattr(self, f.name).chunk(parts) for f in dataclasses.fields(self)]
        return [Pairs(*part) for part in zip(*columns, strict=True)]


@torch.no_grad()
def find_pairs(batch: geoaug.Batch, config: Config) -> Pairs:
    """Draw all boxes of the batch (section 3.1); geometry alone, so their number is known before the first forward.

    Where the plan was made, and then sent to the device as one tensor: there, it would be some hundred launches.
    """
    plan, key = batch.plan if batch.host is None else batch.host, batch.key.host
    maps = plan.view_from_source
    v1, v2 = maps[:, 0], maps[:, 1]

    def draw(name: str) -> tuple[Tensor, Tensor, Tensor]:
        return geoaug.matched_boxes(
            v1, v2, config.boxes, sizes=plan.view_sizes, key=key.fold(name), min_size=config.min_side,
            max_iou=config.max_iou, law=config.law, on_fail=config.on_fail,
        )  # fmt: skip

    in_v1, in_v2, valid = draw("pairs")
    if config.jitter == math.inf:
        _, in_v2, also = draw("elsewhere")
        valid = valid & also
    elif config.jitter > 0:
        scale = (1 - config.jitter, 1 + config.jitter)
        in_v2 = geoaug.jitter_boxes(in_v2, key=key.fold("jitter"), law="free", scale=scale, shift=config.jitter)
    both = filled(box_algebra.clip(torch.cat((in_v1, in_v2))), valid.repeat(2, 1))  # [2 B, K, 4]
    cells = config.size // common.stride(config.arch, "c5")
    reads = geoaug.roi_weights(both, cells, aligned=config.aligned == "on")
    drawn = torch.cat((*both.chunk(2), *reads.chunk(2), valid[..., None]), dim=-1)
    if drawn.device != batch.ok.device:  # page-locked, so that nothing waits for the copy
        drawn = drawn.pin_memory().to(batch.ok.device, non_blocking=True)
    *columns, valid = drawn.split((4, 4, cells**2, cells**2, 1), dim=-1)
    return Pairs(*columns, valid=(valid[..., 0] > 0) & batch.ok[:, None])


def filled(boxes: Tensor, valid: Tensor) -> Tensor:
    """Slots without a box read their image's first one, or the whole view: batch norm sees no zeros."""
    first = valid.int().argmax(1)[:, None, None].expand(-1, 1, 4)
    whole = torch.cat((torch.zeros_like(boxes[:, :1, :2]), torch.ones_like(boxes[:, :1, 2:])), -1)
    instead = torch.where(valid.any(1)[:, None, None], boxes.gather(1, first), whole)  # [B, 1, 4]
    return torch.where(valid[..., None], boxes, instead)


class Encoder(nn.Module):
    """ResNet, RoIAlign 1 x 1 on C5, projector: vectors [B, K, D] of boxes, and C5's mean [B, C]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.trunk = common.make_trunk(config.arch, config.init)
        self.projector = common.byol_head(self.trunk.channels["c5"], config.hidden, config.dim)

    def forward(self, images: Tensor, reads: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors of the boxes that read [B, K, cells] of images [B, 3, h, w], and features of the whole images."""
        c5 = self.trunk(images)  # [B, C, h/32, w/32]
        wide = c5 if c5.dtype == torch.float64 else c5.float()
        with torch.autocast(c5.device.type, enabled=False):
            vectors = reads.to(wide.dtype) @ wide.flatten(2).mT  # [B, K, C]
        return self.projector(vectors.flatten(0, 1)).view(*reads.shape[:2], -1), c5.mean((2, 3))


class Model(nn.Module):
    """Online network with its predictor, and target network."""

    def __init__(self, config: Config, classes: int = 0) -> None:
        super().__init__()
        self.config = config
        self.student = Encoder(config)
        self.predictor = common.byol_head(config.dim, config.hidden, config.dim)
        self.teacher = common.target_of(self.student, lambda: Encoder(config), config.target)
        self.monitor = common.Monitor(self.student.trunk.channels["c5"], classes) if classes else None

    def online(self, images: Tensor, reads: Tensor) -> tuple[Tensor, Tensor]:
        """Predictions [B, K, D] and features [B, C]."""
        z, features = self.student(images, reads)
        return self.predictor(z.flatten(0, 1)).view_as(z), features

    def forward(self, batch: geoaug.Batch, pairs: Pairs, count: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Eq. 3; `count` is the step's number of boxes, or of images with any, over all ranks."""
        config, colors = self.config, recipe(self.config).colors
        reads = [pairs.reads_v1, pairs.reads_v2]
        with torch.no_grad():
            x = [geoaug.color(batch.images[v], colors[v], batch.key.fold(f"v{v + 1}")) for v in (0, 1)]
            shuffle = batch.key.fold("z") if config.norm == "shuffle" else None
            (z1, _), (z2, _) = common.of_views(self.teacher, config.forward, x, reads, shuffle=shuffle)
        (p1, f1), (p2, f2) = common.of_views(self.online, config.forward, x, reads)
        each = common.both_ways(p1, p2, z1, z2)  # [B, K]
        log = {
            "spread": common.spread(p1),
            "spread_teacher": common.spread(z1),
            "with_boxes": pairs.valid.any(1).float().mean(),
        }
        if self.monitor is not None:
            log["features"] = common.watched(f1, f2)
        return losses.mean(each, pairs.valid, per_image=config.mean == "images", count=count), log


def check(config: Config) -> None:
    """What is wrong in the numbers of the boxes."""
    cell = common.stride(config.arch, "c5")
    if config.size % cell:  # or unit boxes would lie elsewhere on the map than in the view
        raise common.UsageError(f"--size must be a multiple of the {cell} pixels of a cell, got {config.size}")
    for name, value, most in (
        ("crop", config.crop, 1), ("max-iou", config.max_iou, 1), ("min-side", config.min_side, config.size - 1),
    ):  # fmt: skip
        if not 0 < value <= most:
            raise common.UsageError(f"--{name} must be over 0 and at most {most}, got {value}")
    if not (0 <= config.jitter < 1 or config.jitter == math.inf):
        raise common.UsageError(f"--jitter must be in [0, 1) or inf, got {config.jitter}")


def main(config: Config) -> None:
    """Train."""
    accelerator = common.start(config)
    check(config)
    loader = common.open_data(config, recipe(config).views, accelerator)
    classes = common.classes_of(loader, config.monitor)
    model = common.prepare_model(Model(config, classes), config, accelerator.device)
    groups = common.weights_and_vectors(model.parameters(), weight_decay=config.weight_decay)
    model, optimizer = accelerator.prepare(model, common.LARS(groups, config.lr))
    bare, peak = accelerator.unwrap_model(model), config.lr * config.batch_size / 256
    run = common.Run(
        config, accelerator, loader, model=model, optimizer=optimizer, backbone="student.trunk.",
        floors=common.SPREAD_FLOORS,
    )  # fmt: skip
    warmup = int(config.warmup_epochs * len(loader))
    with loader, run:
        for step, batch in run.batches():
            lr = common.set_lr(optimizer, step, run.total, peak=peak, warmup=warmup)
            ema = common.cosine_momentum(step, run.total, base=config.ema)
            pairs = find_pairs(batch, config)
            terms = pairs.valid if config.mean == "boxes" else pairs.valid.any(1)
            count = run.sum_over_ranks(terms.sum().float()) / accelerator.num_processes
            total, logs = torch.zeros((), device=accelerator.device), []
            for part, its_pairs in zip(batch.split(config.accumulate), pairs.split(config.accumulate), strict=True):
                with accelerator.accumulate(model):
                    loss, log = model(part, its_pairs, count)
                    logs.append(log)
                    accelerator.backward(loss * config.accumulate)  # which divides by it
                    optimizer.step()
                    optimizer.zero_grad()
                total = total + loss.detach()
            common.move_teacher(bare.teacher, bare.student, ema)
            logs = common.monitored(bare.monitor, accelerator, batch, logs)
            run.end_step(batch.names, total, logs, lr=lr, ema=ema)


if __name__ == "__main__":
    common.launch(main, Config, PRESETS)

"""PLRC: Point-Level Region Contrast for Object Detection Pre-Training (Bai et al., CVPR 2022).

    accelerate launch trainers/plrc.py --data imagenet/train --preset imagenet-200ep           # the paper's main run
    accelerate launch trainers/plrc.py --data coco.beton --preset coco-800ep --output runs/plrc-coco
    python trainers/plrc.py --data runs/demo/scenes --preset demo --output runs/p              # minutes on two cores

To expect: VOC07+12 59.4 AP, COCO box 40.7 AP after 200 epochs of ImageNet; 57.1 and 39.8 AP after 800 epochs of COCO
(Tables 1 and 2; we have not run them). The image loss first rises while the queue fills.

The paper is implemented, not its released code, which computes other losses. Our choices, each with its switch, and
why, are in docs/choices.md: R = 56 (--upsample), tau of the contrast is MoCo's (--temperature), negatives are the
points of each process' own part of the batch (--negatives), the teacher reads the points of v at their places in v'
(--teacher-points), distillation starts after 30 epochs or 15 % of a shorter run (--affinity-warmup), region vectors are
means of their points and are not distilled (--level region). Ours, too: `--norm sync` by default; `--norm shuffle`,
which needs several processes, is the paper's.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

import geoaug
from geoaug import losses
from trainers import common


@dataclass
class Config(common.RunConfig):
    """The paper's recipe on ImageNet."""

    output: Path = Path("runs/plrc")
    epochs: int = 200
    """Passes over the data; the schedules end with them."""
    proposals: Path | None = None
    """A store of proposals for --regions boxes; by default the boxes of the .beton, or a json's objects."""
    regions: str = "grid:4"
    """grid:N on the source, boxes of the data, or masks of a COCO json (Figure 7)."""
    level: Literal["point", "region"] = "point"
    """Contrast points, or the means of each slot's points (Table 3, Figures 6 and 7)."""
    slots: int = 16
    """Regions drawn per view, with repetition, N."""
    points: int = 16
    """Points drawn per region, P."""
    upsample: int | None = 56
    """Side R to which the map is brought before points are read; None reads it as it is."""
    negatives: Literal["local", "global", "image"] = "local"
    """Whose points are negatives: of this process' part of the batch, of the whole batch, or of the image alone."""
    affinity: Literal[1, 2, 3] = 1
    """Teacher and student of the distillation: A_i'k' and A_ik'; A_ik' and A_ik; A_i'k' and A_ik (section 4.5.2)."""
    teacher_points: common.TeacherPoints = "mapped"
    """Where the teacher reads a point of v: at its place in v', in v (a forward more), or in its region in v'."""
    affinity_keys: Literal["image", "batch"] = "image"
    """Whether affinities are with the points of the image, or of this process' part of the batch."""
    affinity_warmup: float | None = None
    """Epochs without distillation; None: 30, or 15 % of a shorter run."""
    warmup_weight: Literal["alpha", "one"] = "alpha"
    """Weight of the contrast in these epochs."""
    alpha: float = 0.5
    """Share of the contrast in the point loss, eq. 5; at 1 nothing is distilled (Figures 5 and 6)."""
    beta: float = 0.7
    """Share of the point loss in the whole, eq. 6."""
    temperature: float = 0.2
    """Of both contrasts, of images and of points."""
    student_temperature: float = 0.1
    teacher_temperature: float = 0.07
    chunk: int = 2**23
    """Logits of points in memory at a time; the loss does not depend on it."""
    queue: int = 65536
    dim: int = 128
    """Width of the projector's output."""
    hidden: int = 2048
    """Width of its hidden layer."""
    lr: float = 0.03
    """Learning rate per 256 images; DenseCL's recipe for COCO takes 0.3."""
    ema: float = 0.999
    """Momentum of the teacher."""
    momentum: float = 0.9
    """Momentum of SGD."""


PRESETS = {
    "imagenet-200ep": Config(output=Path("runs/plrc-imagenet")),
    "coco-800ep": Config(epochs=800, lr=0.3, output=Path("runs/plrc-coco")),
    "demo": Config(
        output=Path("runs/demo/plrc"), epochs=8, batch_size=64, arch="resnet10", size=96, upsample=24, points=8,
        hidden=512, queue=1024, ema=0.99, lr=0.2, warmup_epochs=0.5, log_every=5, save_every=200,
    ),
}  # fmt: skip


def find_points(batch: geoaug.Batch, config: Config) -> common.Points:
    """Draw the step's points, so that its valid terms are known before its first forward."""
    side = config.upsample or PRESETS["imagenet-200ep"].upsample
    assert side is not None
    return common.find_points(
        batch, config.regions, config.slots, config.points, cells=(side, side), teacher=config.teacher_points
    )


class Encoder(nn.Module):
    """ResNet and a two-layer projector, applied to the pooled map and, as 1x1 convolutions, to its every cell."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.trunk = common.make_trunk(config.arch, config.init)
        self.projector = common.mlp(self.trunk.channels["c5"], config.hidden, config.dim, norm=False)
        self.upsample = config.upsample

    def forward(self, images: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors [B, D] of images [B, 3, h, w], and [B, M, D] of the points [B, M, 2] in them."""
        c5 = self.trunk(images)
        cells = self.projector(c5.flatten(2).mT)  # [B, h/32 * w/32, D]
        maps = cells.float().mT.unflatten(2, c5.shape[2:])
        return self.projector(c5.mean((2, 3))), geoaug.sample_points(maps, points, upsample=self.upsample)


class Model(nn.Module):
    """Student, teacher and the queue of images."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.student = Encoder(config)
        self.teacher = common.frozen(copy.deepcopy(self.student))
        self.queue = common.Queue(config.queue, config.dim)

    def forward(
        self, batch: geoaug.Batch, points: common.Points, counts: Tensor, distil: bool
    ) -> tuple[Tensor, dict[str, Any]]:
        """Eq. 6; `counts` [3] are the images that are readable, that share a region, that have a distilled point."""
        config, key = self.config, batch.key
        colors = geoaug.recipes.recipe("plrc").at(config.size).colors
        v, v2 = (geoaug.color(x, c, key.fold(n)) for x, c, n in zip(batch.images, colors, ("v", "v2"), strict=True))
        distil = distil and config.level == "point" and config.alpha < 1
        extra = config.teacher_points == "extra"
        with torch.no_grad():
            reads = torch.cat((points.v2, points.twins), dim=1) if distil and not extra else points.v2
            k, t = self.of_teacher(v2, reads, key.fold("k"))
            p2, twins = t[:, : points.v2.shape[1]], t[:, points.v2.shape[1] :]
            if distil and extra:
                _, twins = self.of_teacher(v, points.twins, key.fold("t"))
        q, p = self.student(v, points.v)
        each = losses.info_nce(q, k, self.queue.vectors, self.queue.valid, temperature=config.temperature)  # [B]
        image = losses.mean(each, batch.ok, count=counts[0])
        contrast = losses.mean(self.contrast(p, p2, points), points.shared, count=counts[1])
        log = {
            "spread": common.spread(q),
            "spread_teacher": common.spread(k),
            "spread_points": common.spread(p),
            "image": image.detach() * config.accumulate,
            "contrast": contrast.detach() * config.accumulate,
            "shared": points.shared.float().mean(),
            "distilled": points.distilled.float().mean(),
        }
        early = config.level == "region" or (not distil and config.warmup_weight == "one")
        loss = (1.0 if early else config.alpha) * contrast
        if distil:
            each = self.affinity(p, p2, twins, points)  # [B, N * P]
            affinity = losses.mean(each, points.distilled, per_image=True, count=counts[2])
            loss = loss + (1 - config.alpha) * affinity  # eq. 5
            log |= {"affinity": affinity.detach() * config.accumulate}
        return config.beta * loss + (1 - config.beta) * image, {**log, "keys": (k, batch.ok)}

    def contrast(self, p: Tensor, p2: Tensor, points: common.Points) -> Tensor:
        """Eq. 2 [B], on points or on the means of each slot's points."""
        config, (ids, ids2) = self.config, (points.ids, points.ids2)
        if config.level == "region":
            p, p2 = (x.unflatten(1, (config.slots, config.points)).mean(dim=2) for x in (p, p2))
            ids, ids2 = (x[:, :: config.points] for x in (ids, ids2))
        first = 0
        if config.negatives == "global":
            first = common.rank() * len(p2)
            p2, ids2 = common.gathered(p2), common.gathered(ids2)
        return losses.point_region_contrast(
            p, ids, p2, ids2, temperature=config.temperature, first=first, chunk=config.chunk,
            negatives="image" if config.negatives == "image" else "batch",
        )  # fmt: skip

    def affinity(self, p: Tensor, p2: Tensor, twins: Tensor, points: common.Points) -> Tensor:
        """Eq. 4 [B, N * P] by the strategy: p and twins are the student's and teacher's points of v, p2 those of v'."""
        keys, teacher, teacher_keys, valid = {
            1: (p2, twins, p2, points.ids2 >= 0),
            2: (p, p, twins, points.distilled),
            3: (p, twins, twins, points.distilled),
        }[self.config.affinity]
        return losses.affinity_distillation(
            p, keys, teacher, teacher_keys, valid, temperature=self.config.student_temperature,
            teacher_temperature=self.config.teacher_temperature, across=self.config.affinity_keys,
            chunk=self.config.chunk,
        )  # fmt: skip

    def of_teacher(self, images: Tensor, points: Tensor, key: geoaug.Key) -> tuple[Tensor, Tensor]:
        """The teacher's vectors of images and points, its batch shuffled over the processes where asked for."""
        shuffle = self.config.norm == "shuffle"
        return common.shuffled(self.teacher, key, images, points) if shuffle else self.teacher(images, points)


def warmup_of(config: Config) -> float:
    """Epochs without distillation: the paper's 30 of 200, or as many of a shorter run."""
    return min(30.0, 0.15 * config.epochs) if config.affinity_warmup is None else config.affinity_warmup


def open_data(config: Config, accelerator: Any) -> Any:
    """The loader, after what is particular to this method's arguments."""
    common.side_of(config.regions)
    for name in ("alpha", "beta"):
        if not 0 <= getattr(config, name) <= 1:
            raise common.UsageError(f"--{name} must be in [0, 1], got {getattr(config, name)}")
    if not config.teacher_temperature >= 1e-6:
        raise common.UsageError(f"--teacher-temperature must be at least 1e-06, got {config.teacher_temperature}")
    if config.queue % config.batch_size:
        raise common.UsageError(f"--queue must be a multiple of --batch-size {config.batch_size}, got {config.queue}")
    common.need_sources(config.regions, config.data, config.proposals)
    specs = geoaug.recipes.recipe("plrc").at(config.size).views
    masks: Any = "instance" if config.regions == "masks" else None
    loader = common.open_data(config, specs, accelerator, proposals=config.proposals, label_map=masks)
    common.need_regions(loader, config.regions)
    return loader


def main(config: Config) -> None:
    """Train."""
    accelerator = common.start(config)
    loader = open_data(config, accelerator)
    model = common.prepare_model(Model(config), config, accelerator.device)
    groups = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(groups, config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    model, optimizer = accelerator.prepare(model, optimizer)
    bare, peak = accelerator.unwrap_model(model), config.lr * config.batch_size / 256
    run = common.Run(config, accelerator, loader, model=model, optimizer=optimizer, backbone="student.trunk.")
    warmup = int(config.warmup_epochs * len(loader))
    start = warmup_of(config) * len(loader)
    with loader, run:
        for step, batch in run.batches():
            lr = common.set_lr(optimizer, step, run.total, peak=peak, warmup=warmup)
            points = find_points(batch, config)
            terms = torch.stack((batch.ok.sum(), points.shared.sum(), points.distilled.any(dim=1).sum())).float()
            counts = run.sum_over_ranks(terms) / accelerator.num_processes
            total, keys, logs = torch.zeros((), device=accelerator.device), [], []
            parts = zip(batch.split(config.accumulate), points.split(config.accumulate), strict=True)
            for part, its_points in parts:
                with accelerator.accumulate(model):
                    loss, log = model(part, its_points, counts, step >= start)
                    keys.append(log.pop("keys"))
                    logs.append(log)
                    accelerator.backward(loss * config.accumulate)  # which divides by it
                    optimizer.step()
                    optimizer.zero_grad()
                total = total + loss.detach()
            common.move_teacher(bare.teacher, bare.student, config.ema)
            k, ok = (accelerator.gather(torch.cat(column)) for column in zip(*keys, strict=True))
            bare.queue.enqueue(functional.normalize(k.float(), dim=1), ok)
            run.end_step(batch.names, total, logs, lr=lr)


if __name__ == "__main__":
    common.launch(main, Config, PRESETS)

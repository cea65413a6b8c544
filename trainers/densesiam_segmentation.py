"""DenseSiam's unsupervised segmentation (Zhang et al., ECCV 2022, section 4), a task of `trainers/densesiam.py`.

    accelerate launch trainers/densesiam.py --task segmentation --data train2017 --list curated.txt --init resnet18.pth
    python trainers/densesiam.py --task segmentation --data runs/demo/scenes --preset demo --output runs/s
    python trainers/evaluate.py unsupervised-segmentation --weights runs/s --data runs/demo/scenes/instances.json

A ResNet-18 that has learnt ImageNet's labels (--init) with a light pyramid names each pixel one of 27 categories, from
the agreement of two views alone: the largest square in the image's middle, and a square inside it (recipe
`densesiam_segmentation`, cut from the stored pixels). To expect: 16.4 mIoU on COCO-Stuff's 27 coarse classes after 10
epochs (the paper's Table 3; we have not run it). `categories` falling to a few is collapse, of which the run warns.

The paper is silent on nearly all of this task's numbers, so the defaults are the public code's: RegionSim in the last
fifth (--region-start 0.5 is pre-training's), the other view read before the projector (--order), cross-entropy towards
the other view (--target p: as eq. 3 is printed), softmaxed masks (--masks raw), an auxiliary head of 128 categories
(--aux 0: none), and a loss of each pixel's own label that weighs frequent categories more (--class-weight inverse |
none). Colours and crops are drawn once per image and replayed (--replay off). Where a step has micro-batches, the
categories' weights are of each one's pixels. docs/choices.md has the reasons.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import geoaug
from geoaug import losses
from trainers import common

ClassWeight = Literal["code", "inverse", "none"]


@dataclass
class Config(common.RunConfig):
    """The published recipe."""

    output: Path = Path("runs/densesiam-segmentation")
    task: Literal["segmentation"] = "segmentation"
    """Which of densesiam.py's tasks this is."""
    list: Path | None = None
    """Train on these images of --data alone: a name or stem a line, such as the curated 49,629 of COCO."""
    replay: common.OnOff = "on"
    """Draw each image's colours and crops once, and replay them every epoch; off: anew."""
    classes: int = 27
    """Pseudo-categories, N."""
    aux: int = 128
    """Pseudo-categories of the auxiliary head, for over-clustering; 0: no such head (Table 5)."""
    hidden: int = 128
    """Channels of the pyramid and of the hidden layers."""
    order: Literal["before", "between", "after"] = "before"
    """Where the other view's map is read at this view's cells: before projector and predictor, between, after."""
    target: Literal["z", "p"] = "z"
    """Whose softmax is the target of the cross-entropy: the projection's, or as eq. 3 is printed."""
    class_weight: ClassWeight = "code"
    """A pixel's weight in the loss of its own label: its category's share, one over it, or 1."""
    seg_weight: float = 1.0
    """Of that loss, lambda 3; 0: without it (Table 5)."""
    region_weight: float = 0.1
    """Of RegionSim, lambda 2; 0: never (Table 5)."""
    region_start: float = 0.8
    """Share of the training before RegionSim sets in."""
    masks: Literal["softmax", "raw"] = "softmax"
    """What weighs a region's features: the categories' shares, or the projection as eq. 4 is printed."""
    temperature: float = 0.1
    """Of RegionSim."""
    arch: str = "resnet18"
    """resnet10-narrow, resnet10, 18, 34, 50 or 101."""
    size: int = 320
    """Side of both views."""
    epochs: int = 10
    """Passes over the data; the schedules end with them."""
    lr: float = 0.05
    """Learning rate per 256 images."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Of the learning rate, after the warm-up."""
    momentum: float = 0.9
    """Momentum of SGD."""


PRESETS = {
    "coco-10ep": Config(),
    "coco-10ep-pixsim": Config(aux=0, seg_weight=0.0, region_weight=0.0, output=Path("runs/densesiam-pixsim")),
    "demo": Config(
        output=Path("runs/demo/segmentation"), classes=17, aux=64, hidden=64, epochs=10, batch_size=32,
        arch="resnet10-narrow", size=96, lr=0.2, log_every=5, save_every=200,
    ),
}  # fmt: skip


def recipe(config: Config) -> geoaug.recipes.Recipe:
    """The centre, and a square inside it, at the run's size; the recipe's third view shows the first one's pixels."""
    return geoaug.recipes.recipe("densesiam_segmentation").at(config.size)


def pixel_weights(classes: int, aux: int) -> tuple[float, float]:
    """Lambda 1 of the head proper and lambda 4 of the auxiliary one (eq. 8): the other's log over the sum of both."""
    if aux == 0:
        return 1.0, 0.0
    total = math.log(classes) + math.log(aux)
    return math.log(aux) / total, math.log(classes) / total


def own_labels_loss(z: Tensor, ok: Tensor, law: ClassWeight) -> tuple[Tensor, Tensor]:
    """L_seg: the cross-entropy of each pixel's scores [B, P, N] with their largest, weighted by its category [B, P].

    `code` weighs by the category's share of all pixels of the step, over all processes, as the public code does, though
    it is named balancing; `inverse` gives each category in use the same weight in all. Also the shares [N].
    """
    labels = z.detach().argmax(dim=-1)  # [B, P]
    counts = torch.zeros(z.shape[-1], dtype=torch.int64, device=z.device)
    counts.scatter_add_(0, labels.flatten(), ok[:, None].expand_as(labels).flatten().long())
    counts = common.summed(counts)
    shares = counts / counts.sum().clamp(min=1)
    used = (counts > 0).sum()
    inverse = torch.where(counts > 0, 1 / (shares * used).clamp(min=1e-12), 0)
    weights = {"code": shares, "inverse": inverse, "none": torch.ones_like(shares)}[law]
    with torch.autocast(z.device.type, enabled=False):
        z = z if z.dtype == torch.float64 else z.float()
        return (z.logsumexp(dim=-1) - z.amax(dim=-1)) * weights[labels], shares


class Model(nn.Module):
    """The segmenter, its predictor, the auxiliary head and the heads of RegionSim."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        width, classes, aux = config.hidden, config.classes, config.aux
        self.net = common.SegmentationNet(config.arch, classes, width=width, init=config.init)
        self.predictor = common.conv_head(classes, width, classes)
        self.aux_projector = (
            common.conv_head(width, width, width, aux, last_bias=False, last_norm=True) if aux else None
        )
        self.aux_predictor = common.conv_head(aux, width, aux) if aux else None
        self.region_projector = common.mlp(width, width, width, width, last_bias=False, last_norm=True)
        self.region_predictor = common.mlp(width, width, width)

    def forward(self, batch: geoaug.Batch, count: Tensor, region_weight: float) -> tuple[Tensor, dict[str, Any]]:
        """Eq. 8; `count` is the step's readable images. Both views are read at the inner one's cells."""
        config, views = self.config, recipe(self.config)
        # Of the epoch the crops were drawn in, so that colours are replayed with them.
        key = (batch.plan if batch.host is None else batch.host).key
        inner = geoaug.color(batch.images[1], views.colors[1], key.fold(views.draws[1]))
        centre = geoaug.color(batch.images[0], views.colors[2], key.fold(views.draws[2]))
        f1, whole = self.net.features(inner), self.net.features(centre)  # [B, C, h, w]
        maps = batch.plan.view_from_source
        at, _ = geoaug.correspond(maps[:, 1], maps[:, 0], (f1.shape[-2], f1.shape[-1]))  # [B, P, 2]
        f2 = geoaug.sample_points(whole, at)  # [B, P, C]

        def mean(values: Tensor) -> Tensor:  # [B, P]
            return losses.mean(values.mean(1), batch.ok, count=count)

        z1, z2, each = self.pixels(self.net.projector, self.predictor, f1, whole, f2, at)
        dense_weight, aux_weight = pixel_weights(config.classes, config.aux)
        log = {"dense": mean(each), "spread": common.spread(z1)}
        loss = dense_weight * log["dense"]
        if self.aux_projector is not None and self.aux_predictor is not None:
            log["aux"] = mean(self.pixels(self.aux_projector, self.aux_predictor, f1, whole, f2, at)[2])
            loss = loss + aux_weight * log["aux"]
        one, shares = own_labels_loss(z1, batch.ok, config.class_weight)
        log["own_labels"] = mean(one + own_labels_loss(z2, batch.ok, config.class_weight)[0]) / 2
        loss = loss + config.seg_weight * log["own_labels"]
        log |= {"categories": (shares > 0).sum(), "largest": shares.max()}
        if region_weight > 0:
            (u1, v1), (u2, v2) = self.regions(z1, f1.flatten(2).mT), self.regions(z2, f2)
            options = {"temperature": config.temperature}
            each = losses.region_contrast(u1, v2, **options) + losses.region_contrast(u2, v1, **options)  # [B, N]
            log["region"] = mean(each) / 2  # eq. 5
        else:  # in the graph all the same, as DDP wants each weight in each step
            log["region"] = torch.stack([p.sum() * 0 for p in self.of_regions()]).sum()
        loss = loss + region_weight * log["region"]
        return loss, {n: x.detach() * (config.accumulate if n in _TERMS else 1) for n, x in log.items()}

    def of_regions(self) -> list[nn.Parameter]:
        """The weights of g' and h'."""
        return [*self.region_projector.parameters(), *self.region_predictor.parameters()]

    def pixels(
        self, projector: nn.Module, predictor: nn.Module, f1: Tensor, whole: Tensor, f2: Tensor, at: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Projections [B, P, N] of both views at the inner one's cells, and how far predictions are from them."""
        config = self.config
        z1 = projector(f1)  # [B, N, h, w]
        z1, p1 = (x.flatten(2).mT for x in (z1, predictor(z1)))
        if config.order == "before":
            z2 = common.at_points(projector, f2)
            p2 = common.at_points(predictor, z2)
        else:
            z = projector(whole)
            z2 = geoaug.sample_points(z, at)
            p2 = (
                common.at_points(predictor, z2) if config.order == "between" else geoaug.sample_points(predictor(z), at)
            )
        return z1, z2, common.symmetrised(p1, p2, z1, z2, "cross_entropy", config.target)

    def regions(self, masks: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """u and v [B, N, C] of the regions that the masks [B, P, N] make of the features [B, P, C] (eq. 4)."""
        embeddings = losses.region_embeddings(masks, features, softmax=self.config.masks == "softmax")  # [B, N, C]
        v = self.region_projector(embeddings.flatten(0, 1))
        return self.region_predictor(v).view_as(embeddings), v.view_as(embeddings)


_TERMS = {"dense", "aux", "own_labels", "region"}


def main(config: Config) -> None:
    """Train."""
    accelerator = common.start(config)
    common.check_norm(config, accelerator)
    if config.aux == 1:
        raise common.UsageError("--aux must be 0 or at least 2, got 1")
    specs, replay = recipe(config).views[:2], config.replay == "on"
    loader = common.open_data(config, specs, accelerator, only=config.list, replay=replay)
    model = common.prepare_model(Model(config), config, accelerator.device)
    optimizer = torch.optim.SGD(
        [{"params": list(model.parameters())}], config.lr, momentum=config.momentum, weight_decay=config.weight_decay
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    bare = accelerator.unwrap_model(model)
    floors = {"spread": 0.1, "categories": max(2, config.classes // 4)}
    run = common.Run(
        config, accelerator, loader, model=model, optimizer=optimizer, backbone="net.trunk.", floors=floors
    )
    peak, warmup = config.lr * config.batch_size / 256, int(config.warmup_epochs * len(loader))
    end = 1.0 if config.schedule == "constant" else 0.0
    with loader, run:
        for step, batch in run.batches():
            lr = common.set_lr(optimizer, step, run.total, peak=peak, warmup=warmup, end=end * peak)
            region_weight = config.region_weight if step >= config.region_start * run.total else 0.0
            count = run.sum_over_ranks(batch.ok.sum().float()) / accelerator.num_processes
            total, logs = torch.zeros((), device=accelerator.device), []
            for part in batch.split(config.accumulate):
                with accelerator.accumulate(model):
                    loss, log = model(part, count, region_weight)
                    logs.append(log)
                    accelerator.backward(loss * config.accumulate)  # which divides by it
                    if not region_weight:  # so that no weight decay wears them away before they are used
                        for p in bare.of_regions():
                            p.grad = None
                    optimizer.step()
                    optimizer.zero_grad()
                total = total + loss.detach()
            run.end_step(batch.names, total, logs, lr=lr, region_weight=region_weight)

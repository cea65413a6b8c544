"""MoCo v2: Improved Baselines with Momentum Contrastive Learning (Chen et al., 2020); D3SSL's and PLRC's baseline.

    accelerate launch trainers/moco_v2.py --data coco.beton --preset coco-800ep --output runs/moco_v2
    python trainers/moco_v2.py --data runs/demo/scenes.beton --preset demo --output runs/m  # minutes on two cores

To expect: VOC07+12 54.7 AP, COCO box 38.5 AP after 800 epochs of COCO (D3SSL's Table 1; we have not run them). The loss
first rises while the queue fills. Ours: `--norm sync` by default, since shuffled batch norm needs several processes;
`--norm shuffle` is the paper's.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import geoaug
from geoaug import losses
from trainers import common


@dataclass
class Config(common.RunConfig):
    """The paper's recipe at COCO's length."""

    output: Path = Path("runs/moco_v2")
    lr: float = 0.03
    """Learning rate per 256 images; DenseCL's recipe for COCO takes 0.3."""
    queue: int = 65536
    temperature: float = 0.2
    dim: int = 128
    """Width of the projector's output."""
    hidden: int = 2048
    """Width of its hidden layer."""
    ema: float = 0.999
    """Momentum of the teacher."""
    momentum: float = 0.9
    """Momentum of SGD."""


PRESETS = {
    "coco-800ep": Config(lr=0.3),
    "openimage-mini-800ep": Config(lr=0.3, output=Path("runs/moco_v2-openimage-mini")),
    "imagenet-200ep": Config(epochs=200, output=Path("runs/moco_v2-imagenet")),
    "demo": Config(
        output=Path("runs/demo/moco_v2"), epochs=8, batch_size=32, arch="resnet10-tiny", size=64, hidden=256,
        queue=1024, ema=0.99, lr=0.4, warmup_epochs=0.5, log_every=5, save_every=200,
    ),
}  # fmt: skip


class Encoder(nn.Module):
    """ResNet, average pooling, two-layer projector."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.trunk = common.make_trunk(config.arch, config.init)
        self.projector = common.mlp(self.trunk.channels["c5"], config.hidden, config.dim, norm=False)

    def forward(self, images: Tensor) -> Tensor:
        """Vectors [B, D] of images [B, 3, h, w]."""
        return self.projector(self.trunk(images).mean((2, 3)))


class Model(nn.Module):
    """Student, teacher and the queue of images."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.student = Encoder(config)
        self.teacher = common.frozen(copy.deepcopy(self.student))
        self.queue = common.Queue(config.queue, config.dim)

    def forward(self, batch: geoaug.Batch, count: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """InfoNCE of each image's query with its key and the queue; `count` is the step's readable images."""
        (query, key), config = batch.images, self.config
        colors = geoaug.recipes.recipe("moco_v2").at(config.size).colors
        with torch.no_grad():  # first, while nothing is kept for the way back
            shown = geoaug.color(key, colors[1], batch.key.fold("key"))
            shuffle = config.norm == "shuffle"
            k = common.shuffled(self.teacher, batch.key.fold("k"), shown) if shuffle else self.teacher(shown)
        q = self.student(geoaug.color(query, colors[0], batch.key.fold("query")))  # [B, D]
        each = losses.info_nce(q, k, self.queue.vectors, self.queue.valid, temperature=config.temperature)  # [B]
        log = {"spread": common.spread(q), "spread_teacher": common.spread(k), "keys": (k, batch.ok)}
        return losses.mean(each, batch.ok, count=count), log


def main(config: Config) -> None:
    """Train."""
    accelerator = common.start(config)
    if config.queue % config.batch_size:
        raise common.UsageError(f"--queue must be a multiple of --batch-size {config.batch_size}, got {config.queue}")
    loader = common.open_data(config, geoaug.recipes.recipe("moco_v2").at(config.size).views, accelerator)
    model = common.prepare_model(Model(config), config, accelerator.device)
    groups = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(groups, config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    model, optimizer = accelerator.prepare(model, optimizer)
    bare, peak = accelerator.unwrap_model(model), config.lr * config.batch_size / 256
    run = common.Run(config, accelerator, loader, model=model, optimizer=optimizer, backbone="student.trunk.")
    warmup = int(config.warmup_epochs * len(loader))
    with loader, run:
        for step, batch in run.batches():
            lr = common.set_lr(optimizer, step, run.total, peak=peak, warmup=warmup)
            count = run.sum_over_ranks(batch.ok.sum().float()) / accelerator.num_processes
            total, keys, logs = torch.zeros((), device=accelerator.device), [], []
            for part in batch.split(config.accumulate):
                with accelerator.accumulate(model):
                    loss, log = model(part, count)
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

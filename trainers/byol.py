"""BYOL: Bootstrap Your Own Latent (Grill et al., NeurIPS 2020); the base of SCRL and LC-loss, and their baseline.

    accelerate launch trainers/byol.py --data imagenet.beton --output runs/byol        # 1000 epochs, the paper's
    python trainers/byol.py --data scenes/instances.json --preset demo --output runs/b  # minutes on two cores

To expect: COCO box 40.0 AP after 1000 epochs of ImageNet (SCRL's Table 2), 38.3 after 200 (its Table 6); we have not
run them. As in BYOL's code: the target starts from weights of its own (--target), the two views are forwarded one after
the other, each with statistics of its own (--forward), the target moves after the optimiser's step, parameters only,
and biases and norms have no decay and no adaptation in LARS. Ours: crops are resized bilinearly, not bicubically.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import geoaug
from geoaug import losses
from trainers import common


@dataclass
class Config(common.RunConfig):
    """The paper's recipe of 1000 epochs."""

    output: Path = Path("runs/byol")
    crop: float = 0.08
    """Smallest share of the image that a view shows."""
    target: common.Target = "random"
    """First weights of the target network: its own, or a copy of the online network's."""
    forward: common.Forward = "apart"
    """Views pass one after the other, each with its own statistics, or as one batch."""
    hidden: int = 4096
    """Width of projector and predictor."""
    dim: int = 256
    """Width of their output."""
    epochs: int = 1000
    lr: float = 0.2
    """LARS learning rate per 256 images."""
    weight_decay: float = 1.5e-6
    warmup_epochs: float = 10.0
    """Epochs of linear warm-up."""
    batch_size: int = 4096
    """Images per optimiser step, over all processes."""
    ema: float = 0.996
    """Momentum of the target at first; 1 at last."""
    monitor: common.OnOff = "off"
    """Log linear and k-NN accuracy on the images' labels; nothing is trained by them."""


_SCRL: dict[str, Any] = {"lr": 0.45, "weight_decay": 1e-6, "ema": 0.97, "batch_size": 8192, "crop": 0.2}
PRESETS = {
    "imagenet-1000ep": Config(),
    "imagenet-300ep": Config(epochs=300, lr=0.3, weight_decay=1e-6, ema=0.99, output=Path("runs/byol-300ep")),
    "imagenet-100ep": Config(epochs=100, lr=0.45, weight_decay=1e-6, ema=0.99, output=Path("runs/byol-100ep")),
    # The baselines of LC-loss, and of SCRL on ImageNet and on as many steps of COCO.
    "imagenet-400ep": Config(epochs=400, lr=0.3, weight_decay=1e-6, output=Path("runs/byol-400ep")),
    "imagenet-200ep": Config(epochs=200, output=Path("runs/byol-200ep"), **_SCRL),
    "coco-as-imagenet-200ep": Config(epochs=2229, warmup_epochs=111, output=Path("runs/byol-coco"), **_SCRL),
    "demo": Config(
        output=Path("runs/demo/byol"), epochs=12, batch_size=64, arch="resnet10-narrow", size=96, crop=0.2, hidden=512,
        lr=1.0, warmup_epochs=1.0, ema=0.97, log_every=5, save_every=200,
    ),
}  # fmt: skip


def recipe(config: Config) -> geoaug.recipes.Recipe:
    """Two crops at the run's size."""
    made = geoaug.recipes.recipe("byol").at(config.size)
    return replace(made, views=tuple(replace(view, scale=(config.crop, 1.0)) for view in made.views))


class Encoder(nn.Module):
    """ResNet, average pooling, projector: vectors [B, D] of images, and the pooled features [B, C]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.trunk = common.make_trunk(config.arch, config.init)
        self.projector = common.byol_head(self.trunk.channels["c5"], config.hidden, config.dim)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors and features of images [B, 3, h, w]."""
        features = self.trunk(images).mean((2, 3))
        return self.projector(features), features


class Model(nn.Module):
    """Online network with its predictor, and target network."""

    def __init__(self, config: Config, classes: int = 0) -> None:
        super().__init__()
        self.config = config
        self.student = Encoder(config)
        self.predictor = common.byol_head(config.dim, config.hidden, config.dim)
        self.teacher = common.target_of(self.student, lambda: Encoder(config), config.target)
        self.monitor = common.Monitor(self.student.trunk.channels["c5"], classes) if classes else None

    def online(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Predictions [B, D] and features [B, C]."""
        z, features = self.student(images)
        return self.predictor(z), features

    def forward(self, batch: geoaug.Batch, count: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """2 - 2 cos of each view's prediction and the other's projection; `count` is the step's readable images."""
        config, colors = self.config, recipe(self.config).colors
        with torch.no_grad():
            x = [geoaug.color(batch.images[v], colors[v], batch.key.fold(f"v{v + 1}")) for v in (0, 1)]
            shuffle = batch.key.fold("z") if config.norm == "shuffle" else None
            (z1, _), (z2, _) = common.of_views(self.teacher, config.forward, x, shuffle=shuffle)
        (p1, f1), (p2, f2) = common.of_views(self.online, config.forward, x)
        each = common.both_ways(p1, p2, z1, z2)  # [B]
        log = {"spread": common.spread(p1), "spread_teacher": common.spread(z1)}
        if self.monitor is not None:
            log["features"] = common.watched(f1, f2)
        return losses.mean(each, batch.ok, count=count), log


def main(config: Config) -> None:
    """Train."""
    accelerator = common.start(config)
    if not 0 < config.crop <= 1:
        raise common.UsageError(f"--crop must be in (0, 1], got {config.crop}")
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
            count = run.sum_over_ranks(batch.ok.sum().float()) / accelerator.num_processes
            total, logs = torch.zeros((), device=accelerator.device), []
            for part in batch.split(config.accumulate):
                with accelerator.accumulate(model):
                    loss, log = model(part, count)
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

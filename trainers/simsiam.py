"""SimSiam: Exploring Simple Siamese Representation Learning (Chen and He, CVPR 2021); DenseSiam's base and baseline.

    accelerate launch trainers/simsiam.py --data coco.beton --output runs/simsiam           # 800 epochs on COCO
    python trainers/simsiam.py --data runs/demo/scenes.beton --preset demo --output runs/s  # minutes on two cores

To expect: VOC07+12 53.5 AP after 800 epochs of COCO, COCO box 40.4 AP after 200 of ImageNet (DenseSiam's Tables 4 and
2; we have not run them). The loss goes from 0 to -1; one that is at -1 with a `spread` near 0 has collapsed, of which
the run warns. The predictor's learning rate stays at its peak (--predictor-lr), residual blocks start at zero, weight
decay is on all weights, and there is no warm-up, as in the public code. Antialiased bilinear crops are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import geoaug
from geoaug import losses
from trainers import common


@dataclass
class Config(common.RunConfig):
    """The paper's recipe at COCO's length."""

    output: Path = Path("runs/simsiam")
    batch_size: int = 512
    """Images per optimiser step, over all processes."""
    lr: float = 0.05
    """Learning rate per 256 images."""
    predictor_lr: common.PredictorLR = "constant"
    """The predictor's learning rate: at its peak throughout, or along the cosine of the others."""
    hidden: int = 2048
    """Width of the projector's hidden layers."""
    dim: int = 2048
    """Width of its output."""
    bottleneck: int = 512
    """Width of the predictor's hidden layer."""
    momentum: float = 0.9
    """Momentum of SGD."""


PRESETS = {
    "coco-800ep": Config(),
    "imagenet-200ep": Config(epochs=200, output=Path("runs/simsiam-imagenet")),
    "demo": Config(
        output=Path("runs/demo/simsiam"), epochs=8, batch_size=64, arch="resnet10", size=96, hidden=512, dim=512,
        bottleneck=128, lr=0.2, log_every=5, save_every=200,
    ),
}  # fmt: skip


class Model(nn.Module):
    """Trunk, projector and predictor; both views go through them."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.trunk = common.make_trunk(config.arch, config.init, zero_init=True)
        wide = self.trunk.channels["c5"]
        self.projector = common.mlp(wide, config.hidden, config.hidden, config.dim, last_bias=False, last_norm=True)
        self.predictor = common.mlp(config.dim, config.bottleneck, config.dim)

    def forward(self, batch: geoaug.Batch, count: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """The symmetrised negative cosine; `count` is the step's readable images."""
        recipe = geoaug.recipes.recipe("simsiam").at(self.config.size)
        x1, x2 = (
            geoaug.color(image, spec, batch.key.fold(draw))
            for image, spec, draw in zip(batch.images, recipe.colors, recipe.draws, strict=True)
        )
        z1, z2 = (self.projector(self.trunk(x).mean((2, 3))) for x in (x1, x2))  # [B, D]
        p1, p2 = self.predictor(z1), self.predictor(z2)
        loss = losses.mean(common.symmetrised(p1, p2, z1, z2), batch.ok, count=count)
        return loss, {"spread": common.spread(z1), "spread_predictor": common.spread(p1)}


def main(config: Config) -> None:
    """Train."""
    accelerator = common.start(config)
    common.check_norm(config, accelerator)
    loader = common.open_data(config, geoaug.recipes.recipe("simsiam").at(config.size).views, accelerator)
    model = common.prepare_model(Model(config), config, accelerator.device)
    groups = common.siamese_groups(model, model.predictor, predictor_lr=config.predictor_lr)
    optimizer = torch.optim.SGD(groups, config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    model, optimizer = accelerator.prepare(model, optimizer)
    run = common.Run(
        config, accelerator, loader, model=model, optimizer=optimizer, backbone="trunk.", floors=common.SPREAD_FLOORS
    )
    peak, warmup = config.lr * config.batch_size / 256, int(config.warmup_epochs * len(loader))
    with loader, run:
        for step, batch in run.batches():
            lr = common.set_lr(optimizer, step, run.total, peak=peak, warmup=warmup)
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
            run.end_step(batch.names, total, logs, lr=lr)


if __name__ == "__main__":
    common.launch(main, Config, PRESETS)

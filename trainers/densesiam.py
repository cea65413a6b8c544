"""DenseSiam: Dense Siamese Network for Dense Unsupervised Learning (Zhang et al., ECCV 2022).

    accelerate launch trainers/densesiam.py --data coco.beton --output runs/densesiam         # 800 epochs on COCO
    python trainers/densesiam.py --data runs/demo/scenes.beton --preset demo --output runs/d  # minutes on two cores
    accelerate launch trainers/densesiam.py --task segmentation ...        # its flags: see densesiam_segmentation.py

To expect: VOC07+12 55.5 AP after 800 epochs of COCO, COCO box 40.8 AP after 200 of ImageNet (the paper's Tables 4 and
2; we have not run them). The loss falls from log N = 6.2; a `spread` near 0 or one category in use is collapse, of
which the run warns.

The code of this half was never released; where the paper is silent the choices are ours, each with its switch, and why
is in docs/choices.md. Where the published segmentation code differs from the paper, the code's is the default:
cross-entropy towards the other view (--target p: as printed), softmaxed masks (--masks raw), cosines over 0.1 between
regions (--region-unit off, --temperature 1), gradients on both sides (--region-stop). Points are cell centres
(--points corners: to the overlap's edges), and an overlap under a cell is left to the global term alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import geoaug
from geoaug import losses
from trainers import common


@dataclass
class Config(common.RunConfig):
    """The paper's recipe on COCO; what it leaves open is ours."""

    output: Path = Path("runs/densesiam")
    task: Literal["pretrain", "segmentation"] = "pretrain"
    """Pre-training, or unsupervised segmentation, which has flags of its own."""
    similarity: common.Similarity = "cross_entropy"
    """PixSim's distance, eq. 3 or eq. 2; cross-entropy makes the pseudo-categories that RegionSim goes by."""
    target: Literal["z", "p"] = "z"
    """Whose softmax is the target of the cross-entropy: the projection's, or as eq. 3 is printed."""
    order: Literal["after", "between", "before"] = "after"
    """Where the grid is read: after projector and predictor, between them, or before both (Table 4d)."""
    grid: int = 7
    """Points a side of the overlap, K (Table 4a)."""
    points: common.PointLaw = "regular"
    """Cell centres, a grid to the edges, or drawn: anywhere, mildly or heavily biased to what is hard (Table A2)."""
    dense_weight: float = 1.0
    """Of PixSim, lambda 1 (Table 4b)."""
    region_weight: float = 0.1
    """Of RegionSim, lambda 2 (Table 4c); 0: never."""
    region_start: float = 0.5
    """Share of the training before RegionSim sets in (Table 4f)."""
    masks: Literal["softmax", "raw"] = "softmax"
    """What weighs a region's features: the categories' shares, or the projection as eq. 4 is printed."""
    region_mass: common.OnOff = "off"
    """Divide a region's embedding by its masks' sum."""
    region_unit: common.OnOff = "on"
    """Compare regions by cosines; off: by products, as eq. 6 is printed."""
    region_stop: Literal["none", "target", "masks"] = "none"
    """Where RegionSim's gradient ends: nowhere, at the other view's regions, or at the masks."""
    temperature: float = 0.1
    """Of RegionSim."""
    channels: int = 512
    """Categories N, and the width of the heads of PixSim and RegionSim."""
    hidden: int = 2048
    """Width of the global projector's hidden layers."""
    dim: int = 2048
    """Width of its output; the global predictor narrows to a quarter of it."""
    batch_size: int = 512
    """Images per optimiser step, over all processes."""
    lr: float = 0.05
    """Learning rate per 256 images."""
    predictor_lr: common.PredictorLR = "constant"
    """The learning rate of the global and the dense predictor: at its peak throughout, or along the cosine."""
    momentum: float = 0.9
    """Momentum of SGD."""


PRESETS = {
    "coco-800ep": Config(),
    "imagenet-200ep": Config(epochs=200, output=Path("runs/densesiam-imagenet")),
    "demo": Config(
        output=Path("runs/demo/densesiam"), epochs=8, batch_size=64, arch="resnet10", size=96, hidden=512, dim=512,
        channels=64, grid=5, lr=0.2, log_every=5, save_every=200,
    ),
}  # fmt: skip


class Model(nn.Module):
    """Trunk f, and projectors and predictors of the image, of its points (g, h) and of its regions (g', h')."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.trunk = common.make_trunk(config.arch, config.init, zero_init=True)
        wide, n = self.trunk.channels["c5"], config.channels
        no_bias: dict[str, Any] = {"last_bias": False, "last_norm": True}
        self.projector = common.mlp(wide, config.hidden, config.hidden, config.dim, **no_bias)
        self.predictor = common.mlp(config.dim, max(1, config.dim // 4), config.dim)
        self.dense_projector = common.conv_head(wide, n, n, n, **no_bias)
        self.dense_predictor = common.conv_head(n, max(1, n // 4), n)
        if config.region_weight > 0:
            self.region_projector = common.mlp(wide, n, n, n, **no_bias)
            self.region_predictor = common.mlp(n, max(1, n // 4), n)

    def forward(
        self, batch: geoaug.Batch, points: common.SharedPoints, counts: Tensor, region_weight: float
    ) -> tuple[Tensor, dict[str, Any]]:
        """Eq. 7; `counts` [2] are the readable images of the step and those of them whose views overlap."""
        config = self.config
        recipe = geoaug.recipes.recipe("densesiam").at(config.size)
        colored = [
            geoaug.color(image, spec, batch.key.fold(draw))
            for image, spec, draw in zip(batch.images, recipe.colors, recipe.draws, strict=True)
        ]
        maps = [self.trunk(x) for x in colored]  # [B, C, h, w]
        z1, z2 = (self.projector(x.mean((2, 3))) for x in maps)  # [B, D] of the whole views, always (Table 4e)
        p1, p2 = self.predictor(z1), self.predictor(z2)
        whole = losses.mean(common.symmetrised(p1, p2, z1, z2), batch.ok, count=counts[0])
        log = {"global": whole, "spread": common.spread(z1), "spread_predictor": common.spread(p1)}

        dense_maps = [self.dense_maps(x) for x in maps]
        points = self.chosen(dense_maps, points)
        (z1, p1), (z2, p2) = self.read(dense_maps, points)  # [B, P, N]
        each = common.symmetrised(p1, p2, z1, z2, config.similarity, config.target).mean(1)  # [B]
        dense = losses.mean(each, points.valid, count=counts[1])
        log |= {"dense": dense, "spread_dense": common.spread(z1), "overlap": points.valid.float().mean()}
        log["categories"] = common.categories_in_use(z1, batch.ok[:, None].expand(z1.shape[:2]))
        loss = whole + config.dense_weight * dense
        if region_weight > 0:
            sides = zip(maps, (points.in_x1, points.in_x2), (z1, z2), strict=True)
            (u1, v1), (u2, v2) = (self.regions(x, at, masks) for x, at, masks in sides)
            options: dict[str, Any] = {"temperature": config.temperature, "unit": config.region_unit == "on",
                                       "stop_gradient": config.region_stop == "target"}  # fmt: skip
            each = losses.region_contrast(u1, v2, **options) + losses.region_contrast(u2, v1, **options)  # [B, N]
            region = losses.mean(each.mean(1) / 2, points.valid, count=counts[1])  # eq. 5
        else:  # in the graph all the same, as DDP wants each weight in each step
            region = torch.stack([dense.detach() * 0, *(p.sum() * 0 for p in self.of_regions())]).sum()
        log["region"] = region
        logged = {name: x.detach() * (config.accumulate if name in _TERMS else 1) for name, x in log.items()}
        return loss + region_weight * region, logged

    def of_regions(self) -> list[nn.Parameter]:
        """The weights of g' and h', if there are any."""
        return [p for name, p in self.named_parameters() if name.startswith("region_")]

    def dense_maps(self, features: Tensor) -> list[Tensor]:
        """The maps that points are read from: projection and prediction, the projection, or the features."""
        if self.config.order == "before":
            return [features]
        z = self.dense_projector(features)  # [B, N, h, w]
        return [z] if self.config.order == "between" else [z, self.dense_predictor(z)]

    def read(self, dense_maps: list[list[Tensor]], points: common.SharedPoints) -> list[list[Tensor]]:
        """Projection and prediction [B, P, N] at the points of each view."""
        both = []
        for maps, at in zip(dense_maps, (points.in_x1, points.in_x2), strict=True):
            values = [geoaug.sample_points(x, at) for x in maps]
            if self.config.order == "before":
                values = [common.at_points(self.dense_projector, values[0])]
            if len(values) == 1:
                values.append(common.at_points(self.dense_predictor, values[0]))
            both.append(values)
        return both

    @torch.no_grad()
    def chosen(self, dense_maps: list[list[Tensor]], points: common.SharedPoints) -> common.SharedPoints:
        """The points without the easy ones among their candidates (Table A2)."""
        if not points.candidates:
            return points
        (z1, p1), (z2, p2) = self.read(dense_maps, points)
        distances = common.symmetrised(p1, p2, z1, z2, self.config.similarity, self.config.target)
        return points.hardest(distances[:, : points.candidates])

    def regions(self, features: Tensor, at: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """u and v [B, N, D] of the regions that the masks [B, P, N] make of the features (eq. 4)."""
        config = self.config
        masks = masks.detach() if config.region_stop == "masks" else masks
        read = geoaug.sample_points(features, at)  # [B, P, C]
        options = {"softmax": config.masks == "softmax", "by_mass": config.region_mass == "on"}
        embeddings = losses.region_embeddings(masks, read, **options)  # [B, N, C]
        v = self.region_projector(embeddings.flatten(0, 1))
        return self.region_predictor(v).view(*embeddings.shape[:2], -1), v.view(*embeddings.shape[:2], -1)


_TERMS = {"global", "dense", "region"}


def main(config: Config) -> None:
    """Pre-train."""
    accelerator = common.start(config)
    common.check_norm(config, accelerator)
    if config.masks == "raw" and config.region_mass == "on":
        raise common.UsageError("--region-mass must be off with --masks raw, whose sums may be anything, got on")
    if config.target == "p" and config.similarity == "cosine":
        raise common.UsageError("--target must be z with --similarity cosine, got p")
    loader = common.open_data(config, geoaug.recipes.recipe("densesiam").at(config.size).views, accelerator)
    model = common.prepare_model(Model(config), config, accelerator.device)
    predictors = (model.predictor, model.dense_predictor)
    groups = common.siamese_groups(model, *predictors, predictor_lr=config.predictor_lr)
    optimizer = torch.optim.SGD(groups, config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    model, optimizer = accelerator.prepare(model, optimizer)
    bare = accelerator.unwrap_model(model)
    cells = -(-config.size // common.stride(config.arch, "c5"))
    floors = common.SPREAD_FLOORS | {"categories": 2}
    run = common.Run(config, accelerator, loader, model=model, optimizer=optimizer, backbone="trunk.", floors=floors)
    peak, warmup = config.lr * config.batch_size / 256, int(config.warmup_epochs * len(loader))
    with loader, run:
        for step, batch in run.batches():
            lr = common.set_lr(optimizer, step, run.total, peak=peak, warmup=warmup)
            region_weight = config.region_weight if step >= config.region_start * run.total else 0.0
            points = common.share_points(batch, config.grid, config.points, cells=cells)
            counts = torch.stack((batch.ok.sum(), points.valid.sum())).float()
            counts = run.sum_over_ranks(counts) / accelerator.num_processes
            total, logs = torch.zeros((), device=accelerator.device), []
            parts = zip(batch.split(config.accumulate), points.split(config.accumulate), strict=True)
            for part, its_points in parts:
                with accelerator.accumulate(model):
                    loss, log = model(part, its_points, counts, region_weight)
                    logs.append(log)
                    accelerator.backward(loss * config.accumulate)  # which divides by it
                    if not region_weight:  # so that no weight decay wears them away before they are used
                        for p in bare.of_regions():
                            p.grad = None
                    optimizer.step()
                    optimizer.zero_grad()
                total = total + loss.detach()
            run.end_step(batch.names, total, logs, lr=lr, region_weight=region_weight)


if __name__ == "__main__":
    if common.flag("task") == "segmentation":  # which has a Config of its own
        from trainers import densesiam_segmentation as segmentation

        common.launch(segmentation.main, segmentation.Config, segmentation.PRESETS)
    else:
        common.launch(main, Config, PRESETS)

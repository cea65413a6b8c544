"""SoCo: Aligning Pretraining for Detection via Object-Level Contrastive Learning (Wei et al., NeurIPS 2021).

    accelerate launch trainers/soco.py --data coco.beton --output runs/soco                       # C4, 800 epochs
    accelerate launch trainers/soco.py --data coco.beton --preset fpn-400ep --output runs/soco-fpn
    accelerate launch trainers/soco.py --data mini.beton --preset openimage-mini-200ep-d3ssl      # D3SSL's Table 6

D3SSL's base and baseline: VOC07+12 56.8 AP, COCO box 39.6 AP after 800 epochs of COCO (D3SSL's Table 1; we have not run
them). Not reproduced: SoCo crops an image anew when too few boxes fall into the crop; here views are planned before
boxes are looked at, so boxes repeat instead, and an image without any is read as a whole view. The small view is the
second one at half the size, as the paper says; the public code crops it independently: `--v3 crop`. The teacher moves
after the optimiser's step, in the public code before its own forward. Boxes are continuous, not inclusive.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
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
    """The paper's recipe, in its C4 form."""

    output: Path = Path("runs/soco")
    proposals: Path | None = None
    """A store of proposals; by default those of the .beton, or a json's objects."""
    regions: common.RegionLaw = "proposals"
    """Boxes of the data, or laid into the crop: one in each cell of a 3 x 3 grid, or eight anywhere."""
    form: Literal["c4", "fpn"] = "c4"
    """Read boxes from C4 through the C5 block, or from the pyramid's level of their size."""
    boxes: int = 4
    """Boxes an image and step, K."""
    min_side: float = 1.0
    """Pixels that a box must show in every view; SoCo asks for any overlap."""
    min_visible: float = 0.0
    """Share of a box that every view must show."""
    crop: float = 0.6
    """Smallest share of the image that the second view shows; 0.5 with fpn."""
    v3: Literal["copy", "crop"] = "copy"
    """The small view: a copy of the second, or a crop of its own."""
    cutout: common.Cutout = "none"
    """What is cut out of boxes: nothing, SoCo's squares in views 2 and 3, or D3SSL's PRC in views 1 and 3."""
    window: common.OnOff = "off"
    """D3SSL's PRM in views 1 and 3."""
    jitter: common.Jitter = "soco"
    """How boxes are jittered: not, SoCo's law in view 1, or D3SSL's RBJ in all views."""
    hidden: int = 4096
    """Width of projector and predictor."""
    dim: int = 256
    """Width of their output."""
    roi_size: int = 14
    """Cells a side that are read per box with c4; 7 with fpn."""
    lr: float = 1.0
    """LARS learning rate per 256 images."""
    weight_decay: float = 1e-5
    warmup_epochs: float = 10.0
    """Epochs of linear warm-up."""
    batch_size: int = 2048
    """Images per optimiser step, over all processes."""
    ema: float = 0.99
    """Momentum of the teacher at first; 1 at last."""


_FPN: dict[str, Any] = {"form": "fpn", "crop": 0.5, "roi_size": 7}
_D3SSL: dict[str, Any] = {"cutout": "prc", "window": "on", "jitter": "rbj"}
PRESETS = {
    "coco-800ep": Config(),
    "openimage-mini-800ep": Config(output=Path("runs/soco-openimage-mini")),
    "openimage-mini-200ep": Config(epochs=200, output=Path("runs/soco-200ep")),
    "openimage-mini-200ep-d3ssl": Config(epochs=200, output=Path("runs/soco-200ep-d3ssl"), **_D3SSL),
    "fpn-100ep": Config(epochs=100, cutout="square", output=Path("runs/soco-fpn"), **_FPN),
    "fpn-400ep": Config(epochs=400, output=Path("runs/soco-fpn"), **_FPN),
    "demo": Config(
        output=Path("runs/demo/soco"), epochs=8, batch_size=32, arch="resnet10-tiny", size=64, hidden=256, roi_size=4,
        min_side=4.0, lr=4.0, warmup_epochs=1.0, log_every=5, save_every=200,
    ),
}  # fmt: skip


def views_of(config: Config) -> tuple[geoaug.ViewSpec, ...]:
    """The whole image, a crop, and the small view."""
    whole, crop, small = geoaug.recipes.recipe("soco").at(config.size).views
    crop = geoaug.ViewSpec(crop.size, scale=(config.crop, 1.0))
    return whole, crop, small if config.v3 == "copy" else geoaug.ViewSpec(small.size, scale=(config.crop, 1.0))


class Encoder(nn.Module):
    """Trunk, region head and projector: vectors [B, K, D] of the boxes [B, K, 4] of images."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.trunk = common.make_trunk(config.arch, config.init, zero_init=True)
        self.form, self.roi_size = config.form, config.roi_size
        wide = self.trunk.channels["c5"]
        if self.form == "fpn":
            self.pyramid = common.Pyramid([self.trunk.channels[c] for c in ("c2", "c3", "c4", "c5")])
            self.edges = tuple(edge * config.size / 224 for edge in (48, 96, 192))  # the paper's, for views of 224
            self.head = common.region_head(256, config.roi_size, wide := 1024)
        self.projector = common.mlp(wide, config.hidden, config.dim)

    def forward(self, images: Tensor, boxes: Tensor) -> Tensor:
        """Read the boxes: from C4 through the C5 block, or from their level of the pyramid."""
        every = torch.ones(boxes.shape[:2], dtype=torch.bool, device=boxes.device)
        if self.form == "c4":
            cells = geoaug.roi_features(self.trunk.maps(images, "c4")[-1], boxes, every, self.roi_size)
            vectors = self.trunk.layer4(cells.flatten(0, 1)).mean((2, 3))  # [B * K, C5]
        else:
            level = geoaug.fpn_level(boxes, (images.shape[-2], images.shape[-1]), self.edges)
            maps = self.pyramid(self.trunk.maps(images)[1:])
            cells = geoaug.roi_features(maps, boxes, every, self.roi_size, level=level)  # [B, K, 256, 7, 7]
            vectors = self.head(cells.flatten(0, 1))  # [B * K, 1024]
        return self.projector(vectors).view(*boxes.shape[:2], -1)


class Model(nn.Module):
    """Student with its predictor, and teacher."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.student = Encoder(config)
        self.teacher = common.frozen(copy.deepcopy(self.student))
        self.predictor = common.mlp(config.dim, config.hidden, config.dim)

    @torch.no_grad()
    def augment(self, batch: geoaug.Batch) -> tuple[list[Tensor], list[Tensor]]:
        """Coloured and cut views, and the boxes [B, K, 4] that are read in each."""
        config, maps = self.config, batch.plan.view_from_source
        recipe = geoaug.recipes.recipe("soco").at(config.size)
        chosen, _ = common.choose_boxes(
            batch, (0, 2, 1), config.boxes, law=config.regions, min_side=config.min_side, min_visible=config.min_visible
        )
        usable = batch.ok[:, None].expand(-1, config.boxes)
        images, reads = [], []
        for v, name in enumerate(("v1", "v2", "v3")):
            draw = "v2" if v == 2 and config.v3 == "copy" else name  # a copy has the colours of its original
            image = geoaug.color(batch.images[v], recipe.colors[v], batch.key.fold(draw))
            boxes = box_algebra.clip(maps[:, v].boxes(chosen))
            cut = config.cutout if v in {"square": (1, 2), "prc": (0, 2), "none": ()}[config.cutout] else "none"
            window = config.window if v in (0, 2) else "off"
            size = (image.shape[-2], image.shape[-1])
            images.append(
                image * common.kept_pixels(boxes, usable, size, batch.key.fold(name), cutout=cut, window=window)
            )
            here = config.jitter if v == 0 or config.jitter == "rbj" else "none"
            reads.append(common.jittered(boxes, batch.key.fold(name), here))
        return images, reads

    def forward(self, batch: geoaug.Batch, count: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """2 - 2 cos between views 1 and 2 and views 1 and 3, both ways; `count` is the step's readable images."""
        images, boxes = self.augment(batch)
        with torch.no_grad():
            z = [
                self.of_teacher(x, b, batch.key.fold(f"z{v}"))
                for v, (x, b) in enumerate(zip(images, boxes, strict=True))
            ]
        p = [self.predictor_of(self.student(x, b)) for x, b in zip(images, boxes, strict=True)]
        valid = batch.ok[:, None].expand(-1, self.config.boxes)
        pairs = ((0, 1), (1, 0), (0, 2), (2, 0))
        each = [losses.regression(p[a], z[b]) for a, b in pairs]  # 4 x [B, K]
        loss = torch.stack([losses.mean(x, valid, per_image=True, count=count) for x in each]).sum()
        return loss, {"spread": common.spread(p[0]), "spread_teacher": common.spread(z[1])}

    def predictor_of(self, vectors: Tensor) -> Tensor:
        """The predictor on [B, K, D]."""
        return self.predictor(vectors.flatten(0, 1)).view_as(vectors)

    def of_teacher(self, images: Tensor, boxes: Tensor, key: geoaug.Key) -> Tensor:
        """The teacher's vectors, its batch shuffled over the processes where asked for."""
        shuffle = self.config.norm == "shuffle"
        return common.shuffled(self.teacher, key, images, boxes) if shuffle else self.teacher(images, boxes)


def main(config: Config) -> None:
    """Train."""
    accelerator = common.start(config)
    loader = common.open_data(config, views_of(config), accelerator, proposals=config.proposals)
    common.need_boxes(loader, config.regions)
    model = common.prepare_model(Model(config), config, accelerator.device)
    groups = common.weights_and_vectors(model.parameters(), weight_decay=config.weight_decay)
    model, optimizer = accelerator.prepare(model, common.LARS(groups, config.lr))
    bare, peak = accelerator.unwrap_model(model), config.lr * config.batch_size / 256
    run = common.Run(config, accelerator, loader, model=model, optimizer=optimizer, backbone="student.trunk.")
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
            run.end_step(batch.names, total, logs, lr=lr, ema=ema)


if __name__ == "__main__":
    common.launch(main, Config, PRESETS)

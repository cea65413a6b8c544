"""D3SSL: De-coupling and De-positioning Dense Self-supervised Learning (Qiu et al., ICCV 2023).

    accelerate launch trainers/d3ssl.py --data coco.beton --output runs/d3ssl             # 800 epochs, the paper's
    python trainers/d3ssl.py --data runs/demo/scenes.beton --preset demo --output runs/d  # minutes on two cores

Proposals come with the .beton or from `--proposals STORE`; an image without any is read as one whole view. Data without
proposals at all is refused, unless `--regions grid | free` lays boxes of its own.
To expect: VOC07+12 57.8 AP, COCO box 40.3 AP after 800 epochs of COCO (the paper's Table 1; we have not run them).

The paper's supplement, and so every number of its optimisation, was never published, and nor was its code. Our choices,
each with its switch, and why, are in docs/choices.md: SGD with MoCo's recipe (--lr, --weight-decay, --ema), temperature
(--temperature), 65,536 regions in the queue, of both teacher views (--queue, --enqueue), 4 boxes an image (--boxes)
that keep 16 pixels and 0.3 of their area in x1 and x2 (--min-side, --min-visible), colours of BYOL, independent flips,
x2-small made from the coloured x2 (--x2s), x3's pixels coloured anew (--fresh), one mask window a view (--window-mode),
room for the shift (--room). Batch norm is over all processes; `--norm shuffle` shuffles before the teacher, as MoCo.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

import geoaug
from geoaug import boxes as box_algebra
from geoaug import losses
from trainers import common

GROUP = 4  # backgrounds are exchanged inside blocks of so many neighbours of the global batch


@dataclass
class Config(common.RunConfig):
    """The paper's recipe; what it leaves open is ours."""

    output: Path = Path("runs/d3ssl")
    proposals: Path | None = None
    """A store of proposals; by default those of the .beton, or a json's objects."""
    regions: common.RegionLaw = "proposals"
    """Boxes of the data, or laid into the crop: one in each cell of a 3 x 3 grid, or eight anywhere."""
    boxes: int = 4
    """Proposals an image and step, K."""
    min_side: float = 16.0
    """Pixels of x1 and x2 that a box must show on each side."""
    min_visible: float = 0.3
    """Share of a box that x1 and x2 must show."""
    cutout: common.Cutout = "prc"
    """What is cut out of boxes: nothing, SoCo's squares, or PRC (Table 5)."""
    window: common.OnOff = "on"
    """PRM: hide the background but for a window (Table 5)."""
    window_mode: Literal["masked", "visible"] = "masked"
    """Whether the share of 0.2 to 0.6 is what PRM hides or what it shows."""
    jitter: common.Jitter = "rbj"
    """How the boxes that are read are jittered (Table 5)."""
    depositioning: common.OnOff = "on"
    """The composite x3 and its loss, eq. 8 and 9 (Table 7)."""
    room: float = 0.25
    """Share of each side the boxes of x3 must leave free for their shift; 0 is the paper's literal law."""
    fresh: common.OnOff = "on"
    """Colour x3's pixels anew instead of showing those the teacher sees."""
    x2s: Literal["down", "render"] = "down"
    """Make x2-small from the coloured x2, or from the source with colours of its own."""
    enqueue: Literal["t1", "t2", "both"] = "both"
    """Whose regions the queue stores: the teacher's of x1, of x2, or both."""
    queue: int = 65536
    temperature: float = 0.2
    dim: int = 128
    """Width of the projector's output."""
    hidden: int = 2048
    """Width of its hidden layer."""
    roi_size: int = 14
    """Cells a side that are read of C4 per box, before the C5 block halves them."""
    ema: float = 0.999
    """Momentum of the teacher."""
    momentum: float = 0.9
    """Momentum of SGD."""


PRESETS = {
    "coco-800ep": Config(),
    "openimage-mini-800ep": Config(output=Path("runs/d3ssl-openimage-mini")),
    "coco-200ep-ablation": Config(epochs=200, output=Path("runs/d3ssl-200ep")),
    "demo": Config(
        output=Path("runs/demo/d3ssl"), epochs=8, batch_size=32, arch="resnet10-tiny", size=64, min_side=8.0,
        hidden=256, roi_size=4, queue=2048, ema=0.99, lr=0.4, warmup_epochs=0.5, log_every=5, save_every=200,
        workers=1,
    ),
}  # fmt: skip


def recipe(config: Config) -> geoaug.recipes.Recipe:
    """Views x1 (whole), x2 (crop) and x2-small at the run's size."""
    return geoaug.recipes.recipe("d3ssl").at(config.size)


@dataclass(frozen=True)
class Regions:
    """Where the K boxes of each image lie: in x1 and x2 [B, K, 4], unit coordinates, clipped to the view."""

    in_x1: Tensor
    in_x2: Tensor
    valid: Tensor  # [B, K]
    movable: Tensor  # [B, K]: may be part of x3
    fallback: Tensor  # [B]: no proposal was seen by both views

    def split(self, parts: int) -> list[Regions]:
        """The same in so many parts of equal size."""
        columns = [getattr(self, f.name).chunk(parts) for f in dataclasses.fields(self)]
        return [Regions(*part) for part in zip(*columns, strict=True)]


@torch.no_grad()
def find_regions(batch: geoaug.Batch, config: Config) -> Regions:
    """Choose the step's boxes; geometry alone, so the valid terms of a step are known before its first forward."""
    maps = batch.plan.view_from_source
    chosen, fallback = common.choose_boxes(
        batch, (0, 1), config.boxes, law=config.regions, min_side=config.min_side, min_visible=config.min_visible
    )
    in_x1, in_x2 = box_algebra.clip(maps[:, :2].boxes(chosen[:, None])).unbind(1)
    usable = batch.ok[:, None].expand(-1, config.boxes)
    mine = usable & ~fallback[:, None]
    room = geoaug.boxes_with_room(in_x2, mine, batch.plan.view_sizes[1], config.room)
    movable = room if config.depositioning == "on" else torch.zeros_like(mine)
    return Regions(in_x1, in_x2, usable, movable, fallback)


@dataclass(frozen=True)
class Views:
    """What the networks see, float [B, 3, h, w], and the boxes they are read in, [B, K, 4]."""

    x1: Tensor  # after PRC and PRM
    x2: Tensor  # clean, for the teacher
    x2s: Tensor  # after PRC and PRM
    x3: Tensor | None
    boxes: dict[str, Tensor]
    log: dict[str, Tensor]


@torch.no_grad()
def augment(batch: geoaug.Batch, regions: Regions, config: Config) -> Views:
    """Colours, cutouts, windows, jitter and the composite (section 4.1, eq. 2 and 8), each under a key of its own."""
    settings, key = recipe(config), batch.key
    colors = settings.colors
    x1 = geoaug.color(batch.images[0], colors[0], key.fold("x1"))
    x2 = geoaug.color(batch.images[1], colors[1], key.fold("x2"))
    if config.x2s == "render":
        x2s = geoaug.color(batch.images[2], colors[2], key.fold("x2s"))
    else:
        half = settings.views[2].height_width
        x2s = functional.interpolate(x2, half, mode="bilinear", antialias=True, align_corners=False)
    masks = {"cutout": config.cutout, "window": config.window, "window_mode": config.window_mode}
    for_x1, for_x2s = ((x.shape[-2], x.shape[-1]) for x in (x1, x2s))
    x1 = x1 * common.kept_pixels(regions.in_x1, regions.valid, for_x1, key.fold("x1"), **masks)
    x2s = x2s * common.kept_pixels(regions.in_x2, regions.valid, for_x2s, key.fold("x2s"), **masks)
    reads = {"x1": regions.in_x1, "x2": regions.in_x2, "x2s": regions.in_x2}
    x3, log = None, {"whole_view": regions.fallback.float().mean()}
    if config.depositioning == "on":
        front = geoaug.color(batch.images[1], colors[0], key.fold("x3 front")) if config.fresh == "on" else x2
        back = geoaug.color(batch.images[1], colors[0], key.fold("x3 back"))
        made = geoaug.shift_composite(
            front, regions.in_x2, regions.movable, back, key=key.fold("x3"), room=config.room,
            rows=geoaug.block_derangement(key.fold("x3"), GROUP, ok=batch.ok), cut=config.cutout == "prc",
            out=front if config.fresh == "on" else None,  # nobody else looks at a fresh draw
        )  # fmt: skip
        # A slot that is not in x3 is masked in the loss; it reads another one's place, to leave batch norm in peace.
        slots = torch.arange(config.boxes, device=made.boxes.device).expand_as(made.valid)
        slots = torch.where(made.valid, slots, made.valid.int().argmax(1, keepdim=True))
        x3, reads["x3"] = made.images, made.boxes.gather(1, slots[..., None].expand(-1, -1, 4))
        cell = common.stride(config.arch, "c4")
        moved = regions.movable.any(1)
        farthest = made.shift.abs().amax(1)
        share = moved.float().sum().clamp_min(1)
        log |= {"shift_below_cell": ((farthest < cell) & moved).sum() / share,
                "shift_px": torch.where(moved, farthest, 0).sum() / share}  # fmt: skip
    reads = {name: common.jittered(boxes, key.fold(name), config.jitter) for name, boxes in reads.items()}
    return Views(x1, x2, x2s, x3, reads, log)


class Encoder(nn.Module):
    """f(x, b): RoIAlign on C4, the C5 block per region, average pooling, projector (eq. 1)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.trunk = common.make_trunk(config.arch, config.init)
        self.projector = common.mlp(self.trunk.channels["c5"], config.hidden, config.dim, norm=False)
        self.roi_size = config.roi_size

    def forward(self, images: Tensor, boxes: Tensor) -> Tensor:
        """Vectors [B, K, D] of the boxes [B, K, 4] of images [B, 3, h, w]."""
        c4 = self.trunk.maps(images, "c4")[-1]  # [B, C, h/16, w/16]
        every = torch.ones(boxes.shape[:2], dtype=torch.bool, device=boxes.device)
        cells = geoaug.roi_features(c4, boxes, every, self.roi_size)  # [B, K, C, o, o]
        c5 = self.trunk.layer4(cells.flatten(0, 1))  # [B * K, C5, o/2, o/2]
        return self.projector(c5.mean((2, 3))).view(*boxes.shape[:2], -1)


class Model(nn.Module):
    """Student, teacher and the queue of regions."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.student = Encoder(config)
        self.teacher = common.frozen(copy.deepcopy(self.student))
        self.queue = common.Queue(config.queue, config.dim)

    def forward(self, batch: geoaug.Batch, regions: Regions, counts: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """The loss of eq. 10; `counts` [2] are the valid terms of de-coupling and de-positioning, over all ranks."""
        views = augment(batch, regions, self.config)
        negatives = {"queue": self.queue.vectors, "queue_valid": self.queue.valid}
        with torch.no_grad():
            t1 = self.of_teacher(views.x1, views.boxes["x1"], batch.key.fold("t1"))  # [B, K, D]
            t2 = self.of_teacher(views.x2, views.boxes["x2"], batch.key.fold("t2"))

        def nce(z: Tensor, positives: tuple[Tensor, ...], valid: Tensor, count: Tensor) -> Tensor:
            """Eq. 5 with each of the positives, added up; the queue is compared with z once."""
            each = losses.info_nce(z, torch.stack(positives), **negatives, temperature=self.config.temperature)
            return losses.mean(each, valid.expand_as(each), count=count)  # each: [positives, B, K]

        s1 = self.student(views.x1, views.boxes["x1"])
        s2 = self.student(views.x2s, views.boxes["x2s"])
        loss = nce(s1, (t2,), regions.valid, counts[0]) + nce(s2, (t1,), regions.valid, counts[0])  # eq. 4
        log = {
            **views.log,
            "decoupling": loss.detach() * self.config.accumulate,
            "spread": common.spread(s1),
            "spread_teacher": common.spread(t2),
        }
        if views.x3 is not None:
            s3 = self.student(views.x3, views.boxes["x3"])
            apart = nce(s3, (t2, t1), regions.movable, counts[1])  # eq. 9
            loss, log["depositioning"] = loss + apart, apart.detach() * self.config.accumulate
        return loss, {**log, "keys": (t1, t2, regions.valid)}

    def of_teacher(self, images: Tensor, boxes: Tensor, key: geoaug.Key) -> Tensor:
        """The teacher's vectors, its batch shuffled over the processes where asked for."""
        shuffle = self.config.norm == "shuffle"
        return common.shuffled(self.teacher, key, images, boxes) if shuffle else self.teacher(images, boxes)


def main(config: Config) -> None:
    """Train."""
    accelerator = common.start(config, rows=GROUP if config.depositioning == "on" else 1)
    stored = config.batch_size * config.boxes * (2 if config.enqueue == "both" else 1)
    if config.queue % stored:
        raise common.UsageError(f"--queue must be a multiple of the {stored} regions of a step, got {config.queue}")
    specs = recipe(config).views[: 3 if config.x2s == "render" else 2]
    loader = common.open_data(config, specs, accelerator, proposals=config.proposals)
    common.need_boxes(loader, config.regions)
    model = common.prepare_model(Model(config), config, accelerator.device)
    groups = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(groups, config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    model, optimizer = accelerator.prepare(model, optimizer)
    bare = accelerator.unwrap_model(model)
    run = common.Run(config, accelerator, loader, model=model, optimizer=optimizer, backbone="student.trunk.")
    peak = config.lr * config.batch_size / 256
    with loader, run:
        for step, batch in run.batches():
            lr = common.set_lr(optimizer, step, run.total, peak=peak, warmup=int(config.warmup_epochs * len(loader)))
            regions = find_regions(batch, config)
            terms = torch.stack((regions.valid.sum(), regions.movable.sum())).float()
            counts = run.sum_over_ranks(terms) / accelerator.num_processes
            total, stored_keys, logs = torch.zeros((), device=accelerator.device), [], []
            parts = zip(batch.split(config.accumulate), regions.split(config.accumulate), strict=True)
            for part, its_regions in parts:
                with accelerator.accumulate(model):
                    loss, log = model(part, its_regions, counts)
                    stored_keys.append(log.pop("keys"))
                    logs.append(log)
                    accelerator.backward(loss * config.accumulate)  # which divides by it
                    optimizer.step()
                    optimizer.zero_grad()
                total = total + loss.detach()
            common.move_teacher(bare.teacher, bare.student, config.ema)
            t1, t2, valid = (accelerator.gather(torch.cat(column)) for column in zip(*stored_keys, strict=True))
            stored = {"t1": (t1,), "t2": (t2,), "both": (t1, t2)}[config.enqueue]
            unit = functional.normalize(torch.cat(stored).flatten(0, 1).float(), dim=1)
            bare.queue.enqueue(unit, valid.repeat(len(stored), 1).flatten())
            run.end_step(batch.names, total, logs, lr=lr, ema=config.ema)


if __name__ == "__main__":
    common.launch(main, Config, PRESETS)

"""LC-loss: Self-supervised Learning with Local Contrastive Loss for Detection and Semantic Segmentation (Islam et al.).

    accelerate launch trainers/lc_loss.py --data imagenet.beton --output runs/lc_loss      # on BYOL, 400 epochs
    accelerate launch trainers/lc_loss.py --data imagenet.beton --base dino --arch swin_t  # on DINO, 300 (appendix B)
    python trainers/lc_loss.py --data scenes/instances.json --preset demo --output runs/l  # minutes on two cores

To expect: COCO box 42.5 AP (Mask R-CNN FPN), VOC 60.1 AP after 400 epochs of ImageNet; Swin-T on DINO COCO box 41.0 AP
after 300 (Tables 1, 2 and 14; we have not run them). No code was ever published. Our choices, each with its switch, and
why, are in docs/choices.md: the temperature, which the paper does not give (--temperature), the whole image to the
target and the crop to the online network for the local loss, both ways for the global one (--symmetric-global,
--symmetric-local), a ReLU between the convolutions of the branch (--local-relu), BYOL's first colours for the whole
image and its second ones for the crop (--swap-colors), cell centres with the border's value beyond them, the mean of an
image's cells, then of images. DINO's recipe is its own but for two whole-sized views and no stochastic depth.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import geoaug
from geoaug import losses
from geoaug.pixels.color import ColorTable, draw_colors, paint
from trainers import common


@dataclass
class Config(common.DinoFlags, common.RunConfig):
    """The paper's recipe on BYOL, or on DINO; where a number is none, the base decides (see BASES)."""

    output: Path = Path("runs/lc_loss")
    base: Literal["byol", "dino"] = "byol"
    """The global loss and its recipe."""
    arch: str = "resnet50"
    """resnet10-tiny, resnet10-narrow, resnet10, 18, 34, 50, 101 or swin_t."""
    alpha: float | None = None
    """Weight of the local loss, the global one's is 1 - alpha: 0.1, with dino 0.5."""
    temperature: float = 0.1
    """Of the local loss; the paper does not give it."""
    local: Literal["contrast", "mse"] = "contrast"
    """The local loss: among all places of the crop, or 2 - 2 cos of what corresponds (Table 6)."""
    symmetric_global: common.OnOff = "on"
    """Both networks see both views; off: the target the whole image, the online network the crop."""
    symmetric_local: common.OnOff = "off"
    """Add the local loss of the crop's cells in the whole image."""
    local_relu: common.OnOff = "on"
    """A ReLU behind the batch norm of the local branch."""
    local_dim: int = 256
    """Width of the local branch's output."""
    swap_colors: common.OnOff = "off"
    """Exchange the colours of whole image and crop in every other image, by chance."""
    crop: float = 0.08
    """Smallest share of the image that the crop shows."""
    target: common.Target | None = None
    """First weights of the target network: its own (byol), or a copy of the online network's (dino)."""
    forward: common.Forward = "apart"
    """Views pass one after the other, each with its own statistics, or as one batch."""
    hidden: int | None = None
    """Width of projector and predictor, 4096, or of DINO's head, 2048."""
    dim: int | None = None
    """Width of their output, 256; with dino the number of prototypes, 65536."""
    epochs: int | None = None  # type: ignore[assignment]
    """400, with dino 300."""
    batch_size: int | None = None  # type: ignore[assignment]
    """Images per optimiser step, over all processes: 4096, with dino 1024."""
    lr: float | None = None  # type: ignore[assignment]
    """Learning rate per 256 images: of LARS 0.3, of AdamW with dino 0.0005."""
    weight_decay: float | None = None  # type: ignore[assignment]
    """1e-6, with dino 0.04."""
    warmup_epochs: float = 10.0
    """Epochs of linear warm-up."""
    ema: float = 0.996
    """Momentum of the target at first; 1 at last."""
    monitor: common.OnOff = "off"
    """Log linear and k-NN accuracy on the images' labels; nothing is trained by them."""

    def filled(self) -> Config:
        """The base's numbers in the place of what no flag gave."""
        return replace(self, **{name: value for name, value in BASES[self.base].items() if getattr(self, name) is None})


BASES: dict[str, dict[str, Any]] = {
    "byol": {"alpha": 0.1, "target": "random", "hidden": 4096, "dim": 256, "epochs": 400, "batch_size": 4096, "lr": 0.3,
             "weight_decay": 1e-6},
    "dino": {"alpha": 0.5, "target": "copy", "hidden": 2048, "dim": 65536, "epochs": 300, "batch_size": 1024,
             "lr": 5e-4, "weight_decay": 0.04},
}  # fmt: skip
_DEMO: dict[str, Any] = {
    "epochs": 12, "batch_size": 64, "arch": "resnet10-narrow", "size": 160, "crop": 0.2, "hidden": 512,
    "warmup_epochs": 1.0, "log_every": 5, "save_every": 200,
}  # fmt: skip
PRESETS = {
    "imagenet-400ep": Config(),
    "imagenet-100ep": Config(epochs=100, output=Path("runs/lc_loss-100ep")),
    "imagenet-200ep": Config(epochs=200, output=Path("runs/lc_loss-200ep")),
    "imagenet-600ep": Config(epochs=600, output=Path("runs/lc_loss-600ep")),
    "imagenet-200ep-160": Config(epochs=200, size=160, output=Path("runs/lc_loss-160")),  # Table 5, and Figure 3b
    "imagenet-200ep-mse": Config(epochs=200, local="mse", output=Path("runs/lc_loss-mse")),  # Table 6
    # As many steps as the run of 200 epochs of ImageNet; and the length of the others' runs on COCO.
    "coco-as-imagenet-200ep": Config(epochs=2229, warmup_epochs=111.0, output=Path("runs/lc_loss-coco")),
    "coco-800ep": Config(epochs=800, batch_size=512, output=Path("runs/lc_loss-coco-800ep")),
    "swin-t-300ep": Config(base="dino", arch="swin_t", output=Path("runs/lc_loss-swin-t")),  # appendix B
    "demo": Config(output=Path("runs/demo/lc_loss"), lr=1.0, ema=0.97, **_DEMO),
    "demo-dino": Config(output=Path("runs/demo/lc_loss-dino"), base="dino", dim=1024, ema=0.97, clip=1.0, **_DEMO),
}


def recipe(config: Config) -> geoaug.recipes.Recipe:
    """The whole image and a crop at the run's size."""
    made = geoaug.recipes.recipe("lc_loss").at(config.size)
    whole, crop = made.views
    return replace(made, views=(whole, replace(crop, scale=(config.crop, 1.0))))


@torch.no_grad()
def find_cells(batch: geoaug.Batch, config: Config) -> tuple[Tensor, Tensor]:
    """Where the cells of the whole image lie in the crop, [1, B, cells, 2], and which do, [1, B, cells].

    With --symmetric-local [2, ...]: then where the crop's cells lie in the whole image. Geometry alone, so the valid
    terms of a step are known before its first forward.
    """
    whole, crop = (batch.plan.view_from_source[:, v] for v in (0, 1))
    pairs = [(whole, crop), (crop, whole)][: 2 if config.symmetric_local == "on" else 1]
    side = config.size // common.stride(config.arch, "c5")
    found = [geoaug.correspond(a, b, (side, side)) for a, b in pairs]
    return torch.stack([points for points, _ in found]), torch.stack([valid & batch.ok[:, None] for _, valid in found])


def exchanged(mine: ColorTable, other: ColorTable, swap: Tensor) -> ColorTable:
    """The colours with those rows taken from the other table."""
    pairs = zip(mine.columns, other.columns, strict=True)
    return ColorTable(*(torch.where(swap[:, None] if a.ndim == 2 else swap, b, a) for a, b in pairs))


def local_branch(wide: int, out: int, *, relu: bool = True) -> nn.Sequential:
    """Two 1x1 convolutions on C5 with batch norm between (section 4.1)."""
    layers: list[nn.Module] = [nn.Conv2d(wide, wide, 1, bias=False), nn.BatchNorm2d(wide)]
    return nn.Sequential(*layers, *([nn.ReLU(inplace=True)] if relu else []), nn.Conv2d(wide, out, 1))


class Network(nn.Module):
    """Trunk, the base's head on its mean, and the local branch: what online and target network have alike."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.trunk = common.make_trunk(config.arch, config.init)
        wide, head = self.trunk.channels["c5"], common.byol_head if config.base == "byol" else common.DinoHead
        self.head = head(wide, config.hidden, config.dim)
        self.local = local_branch(wide, config.local_dim, relu=config.local_relu == "on")

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The head's outputs [B, D] and the map C5 [B, C, h, w]; the branch is for maps that a loss asks for."""
        c5 = self.trunk(images)
        return self.head(c5.mean((2, 3))), c5


class Model(nn.Module):
    """Online network (with BYOL's predictor) and target network (with DINO's centre)."""

    def __init__(self, config: Config, classes: int = 0) -> None:
        super().__init__()
        self.config = config
        self.student = Network(config)
        self.teacher = common.target_of(self.student, lambda: Network(config), config.target)
        byol = config.base == "byol"
        self.predictor = common.byol_head(config.dim, config.hidden, config.dim) if byol else nn.Identity()
        self.centre = None if byol else common.Centre(config.dim, config.centre_momentum)
        self.monitor = common.Monitor(self.student.trunk.channels["c5"], classes) if classes else None

    def online(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Predictions [B, D] and C5."""
        outputs, c5 = self.student(images)
        return self.predictor(outputs), c5

    @torch.no_grad()
    def colored(self, batch: geoaug.Batch) -> list[Tensor]:
        """Whole image and crop, each by a draw of its own."""
        colors, key = recipe(self.config).colors, batch.key.host
        whole, crop = (draw_colors(spec, key.fold(f"v{v + 1}")) for v, spec in enumerate(colors))
        if self.config.swap_colors == "on":
            swap = key.fold("swap").uniform("swap", 1)[:, 0] < 0.5
            whole, crop = exchanged(whole, crop, swap), exchanged(crop, whole, swap)
        return [paint(batch.images[v], colors[v], table) for v, table in enumerate((whole, crop))]

    def global_loss(self, online: list[Tensor], target: list[Tensor], sharp: float) -> Tensor:
        """The base's loss of each image [B]: of the crop with the target's whole image, and the other way round."""
        pairs = [(online[-1], target[0])] + ([(online[0], target[1])] if len(online) == 2 else [])
        if self.centre is None:
            return torch.stack([losses.regression(p, z) for p, z in pairs]).sum(0)  # eq. 1
        temperatures = {"student_temperature": self.config.student_temperature, "teacher_temperature": sharp}
        each = [common.self_distillation(s, t, self.centre.mean, **temperatures) for s, t in pairs]
        return torch.stack(each).mean(0)

    def forward(
        self, batch: geoaug.Batch, points: Tensor, valid: Tensor, counts: Tensor, sharp: float
    ) -> tuple[Tensor, dict[str, Any]]:
        """Eq. 5 at `find_cells`' points. `counts`: the step's readable images, then those with a valid cell, each way.

        `sharp` is the temperature of DINO's teacher.
        """
        config, images = self.config, self.colored(batch)
        both, shuffle = config.symmetric_global == "on", batch.key.fold("z") if config.norm == "shuffle" else None
        with torch.no_grad():
            seen = common.of_views(self.teacher, config.forward, images if both else images[:1], shuffle=shuffle)
            queries = [self.teacher.local(c5) for _, c5 in seen[: len(points)]]  # of the whole image, of the crop
        found = common.of_views(self.online, config.forward, images if both else images[1:])
        keys = [self.student.local(c5) for _, c5 in found[::-1][: len(points)]]  # of the crop, of the whole image

        each = self.global_loss([p for p, _ in found], [z for z, _ in seen], sharp)
        whole = losses.mean(each, batch.ok, count=counts[0])
        local = torch.zeros_like(whole)
        for query, key, at, inside, count in zip(queries, keys, points, valid, counts[1:], strict=True):
            if config.local == "contrast":
                cells = losses.local_contrastive(query, key, at, temperature=config.temperature)  # [B, cells]
            else:
                cells = losses.local_regression(query, key, at)
            local = local + losses.mean(cells, inside, per_image=True, count=count)
        loss = (1 - config.alpha) * whole + config.alpha * local
        log: dict[str, Any] = {
            "global": whole.detach() * config.accumulate, "local": local.detach() * config.accumulate,
            "inside": valid[0].float().mean(), "spread": common.spread(found[-1][0]),
            "spread_teacher": common.spread(seen[0][0]),
        }  # fmt: skip
        if self.centre is not None:
            log["outputs"] = sum(torch.where(batch.ok[:, None], z, 0).sum(0) for z, _ in seen)
        if self.monitor is not None:
            log["features"] = common.watched(*(c5.mean((2, 3)) for _, c5 in found))
        return loss, log


def check(config: Config) -> None:
    """Refuse what no run could mean."""
    cell = common.stride(config.arch, "c5")
    if config.size % cell:
        raise common.UsageError(f"--size must be a multiple of the {cell} pixels of a cell, got {config.size}")
    for name, least in (("alpha", 0.0), ("centre_momentum", 0.0), ("crop", 1e-6)):
        if not least <= getattr(config, name) <= 1:
            raise common.UsageError(f"--{name.replace('_', '-')} must be in [{least}, 1], got {getattr(config, name)}")
    if config.symmetric_local == "on" and config.symmetric_global == "off":
        raise common.UsageError("--symmetric-local on needs --symmetric-global on, for both networks to see both views")
    useless = common.dino_flags(config) if config.base == "byol" else []
    if useless:
        raise common.UsageError(f"{useless[0]} is DINO's and needs --base dino")


def main(config: Config) -> None:
    """Train."""
    accelerator = common.start(config, arches=(*common.ARCHES, *common.SWINS))
    check(config)
    loader = common.open_data(config, recipe(config).views, accelerator)
    classes = common.classes_of(loader, config.monitor)
    model = common.prepare_model(Model(config, classes), config, accelerator.device)
    groups = common.weights_and_vectors(model.parameters(), weight_decay=config.weight_decay)
    dino = config.base == "dino"
    model, optimizer = accelerator.prepare(
        model, torch.optim.AdamW(groups, config.lr) if dino else common.LARS(groups, config.lr)
    )
    bare, peak, end = accelerator.unwrap_model(model), config.lr * config.batch_size / 256, 1e-6 if dino else 0.0
    run = common.Run(
        config, accelerator, loader, model=model, optimizer=optimizer, backbone="student.trunk.",
        floors=common.SPREAD_FLOORS,
    )  # fmt: skip
    warmup = int(config.warmup_epochs * len(loader))
    with loader, run:
        for step, batch in run.batches():
            lr = common.set_lr(optimizer, step, run.total, peak=peak, warmup=warmup, end=end)
            ema = common.cosine_momentum(step, run.total, base=config.ema)
            sharp = common.ramp(step, int(config.teacher_epochs * len(loader)), *config.teacher_temperature)
            points, valid = find_cells(batch, config)
            terms = torch.cat((batch.ok.sum()[None], valid.any(2).sum(1))).float()
            counts = run.sum_over_ranks(terms) / accelerator.num_processes
            total, logs = torch.zeros((), device=accelerator.device), []
            parts = zip(*(x.chunk(config.accumulate, 1) for x in (points, valid)), strict=True)
            for part, its_cells in zip(batch.split(config.accumulate), parts, strict=True):
                with accelerator.accumulate(model):
                    loss, log = model(part, *its_cells, counts, sharp)
                    logs.append(log)
                    accelerator.backward(loss * config.accumulate)  # which divides by it
                    if dino and accelerator.sync_gradients:
                        accelerator.unscale_gradients()
                        common.clip_each(bare.student.parameters(), config.clip)
                        if step < config.frozen_epochs * len(loader):
                            bare.student.head.prototypes.grad = None
                    optimizer.step()
                    optimizer.zero_grad()
                total = total + loss.detach()
            common.move_teacher(bare.teacher, bare.student, ema)
            if dino:
                outputs = torch.stack([log.pop("outputs") for log in logs]).sum(0)
                views = 2 if config.symmetric_global == "on" else 1
                bare.centre.move(run.sum_over_ranks(outputs), counts[0] * accelerator.num_processes * views)
            logs = common.monitored(bare.monitor, accelerator, batch, logs)
            run.end_step(batch.names, total, logs, lr=lr, ema=ema)


if __name__ == "__main__":
    common.launch(main, Config, PRESETS)

"""The arguments of a trainer and what must be right before it starts; the command line's errors."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import tyro
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import GradientAccumulationPlugin

import geoaug
from geoaug.loading.loader import Loader

# resnet10 is ours: one basic block a stage; resnet10-narrow has half the channels, for runs on a laptop, and -tiny a
# quarter at half the strides, for small pictures.
ARCHES = ("resnet10-tiny", "resnet10-narrow", "resnet10", "resnet18", "resnet34", "resnet50", "resnet101")
Norm = Literal["sync", "batch", "shuffle"]

# The least value of each number that a run or a trainer may have.
_LEAST = {
    "epochs": 1, "max_steps": 0, "batch_size": 1, "accumulate": 1, "log_every": 1, "save_every": 1, "size": 1,
    "lr": 0.0, "weight_decay": 0.0, "warmup_epochs": 0.0, "ema": 0.0, "momentum": 0.0, "temperature": 1e-6,
    "queue": 1, "dim": 1, "hidden": 1, "boxes": 1, "roi_size": 1, "bottleneck": 1, "grid": 1, "channels": 2,
    "classes": 2, "aux": 0, "seg_weight": 0.0,
    "dense_weight": 0.0, "region_weight": 0.0, "region_start": 0.0, "local_dim": 1, "student_temperature": 1e-6,
    "teacher_epochs": 0.0, "frozen_epochs": 0.0, "clip": 1e-6,
    "slots": 1, "points": 1, "upsample": 1, "chunk": 1, "affinity_warmup": 0.0,
}  # fmt: skip
_TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}

REQUEUE = 75  # exit status of a run that was told to stop and can go on: EX_TEMPFAIL, for Slurm's RequeueExit


class UsageError(Exception):
    """A mistake of the caller's, told in one line before any training."""


@dataclasses.dataclass
class RunConfig:
    """What every trainer takes; a trainer's own `Config` adds its method and its defaults."""

    data: Path | None = None
    """A .beton, a folder of images, a list of paths, or a COCO json."""
    images: Path | None = None
    """Where a list's or json's photographs lie."""
    output: Path = Path("runs/run")
    """The run folder: config.json, metrics.jsonl, checkpoints."""
    preset: str = ""
    """Named settings to start from; other flags override them."""
    epochs: int = 800
    """Passes over the data; the schedules end with them."""
    max_steps: int | None = None
    """Stop after so many optimiser steps, leaving the schedules as they are."""
    batch_size: int = 256
    """Images per optimiser step, over all processes."""
    accumulate: int = 1
    """Micro-batches per step. Batch norm's statistics are per micro-batch."""
    arch: str = "resnet50"
    """resnet10-tiny, resnet10-narrow, resnet10, 18, 34, 50 or 101."""
    init: str = "none"
    """Backbone to start from: a run folder, a .pth or .safetensors with torchvision's names, or none."""
    size: int = 224
    """Side of the largest view; the others in proportion."""
    norm: Norm = "sync"
    """Batch norm over all processes, over each, or shuffled before the teacher."""
    lr: float = 0.3
    """Learning rate per 256 images."""
    weight_decay: float = 1e-4
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up from 0."""
    precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Mixed precision; auto: bf16 on a GPU that has it, else none."""
    compile: bool = False
    """Compile trunks and heads with torch.compile."""
    channels_last: bool = True
    """Keep maps in channels-last order on a GPU."""
    resume: str = "auto"
    """auto: go on with what the run folder holds; a checkpoint or run folder; none: start anew."""
    seed: int = 0
    tracker: Literal["none", "tensorboard", "wandb"] = "none"
    """Where curves go besides metrics.jsonl."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    save_every: int = 1000
    """Steps between checkpoints; there is always one at the end."""
    workers: int | None = None
    """Threads or processes that load, per process; by default the cores there are."""
    render: Literal["cpu", "device"] = "cpu"
    """Where views are cropped and resized."""
    cpu: bool = False
    """Train on the CPU even where there is a GPU."""

    def filled(self) -> Any:
        """The same with the numbers that follow from others, for trainers that have such."""
        return self


C = TypeVar("C", bound=RunConfig)


def flag(name: str, arguments: Sequence[str] | None = None) -> str:
    """What a flag of the command line is given, the last time it is, before anything else is known; or nothing.

    >>> flag("preset", ["--preset", "demo", "--lr=1"]), flag("lr", ["--preset", "demo", "--lr=1"]), flag("task", [])
    ('demo', '1', '')
    """
    arguments, value = sys.argv[1:] if arguments is None else arguments, ""
    for i, word in enumerate(arguments):
        if word == f"--{name}":
            value = arguments[i + 1] if i + 1 < len(arguments) else ""
        elif word.startswith(f"--{name}="):
            value = word.removeprefix(f"--{name}=")
    return value


def parse(kind: type[C], presets: dict[str, C], arguments: list[str] | None = None) -> C:
    """The command line as a config: the preset's values, or the paper's defaults, overridden by the flags given."""
    arguments = sys.argv[1:] if arguments is None else arguments
    name = flag("preset", arguments)
    if name and name not in presets:
        raise UsageError(f"--preset must be one of {', '.join(presets)}, got {name}")
    default = dataclasses.replace(presets[name], preset=name) if name else kind()
    config = tyro.cli(kind, args=arguments, default=default, description=sys.modules[kind.__module__].__doc__)
    return config.filled()


def launch(main: Callable[[C], None], kind: type[C], presets: dict[str, C]) -> None:
    """Run a trainer's main and exit: 0 done, 2 wrong usage, 75 told to stop (run again to go on), 1 otherwise."""
    try:
        main(parse(kind, presets))
    except UsageError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except TrainingError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


class TrainingError(Exception):
    """What ended a run while it trained."""


def start(config: RunConfig, *, rows: int = 1, arches: Sequence[str] = ARCHES) -> Accelerator:
    """The accelerator of a run, after all that can be wrong in the arguments; `rows` must divide each micro-batch."""
    if config.data is None:
        raise UsageError("--data must name a .beton, a folder of images, a list or a COCO json, got none")
    if not config.data.exists():
        raise UsageError(f"--data must exist, got {config.data}")
    for name, low in _LEAST.items():
        value = getattr(config, name, None)
        if isinstance(value, (int, float)) and not value >= low:  # so that a NaN is refused too; --points may be a word
            raise UsageError(f"--{name.replace('_', '-')} must be at least {low}, got {value}")
    if config.arch not in arches:
        raise UsageError(f"--arch must be one of {', '.join(arches)}, got {config.arch}")
    on_gpu = not config.cpu and torch.cuda.is_available()
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if on_gpu and torch.cuda.is_bf16_supported() else "no"
    if precision == "fp16" and not on_gpu:
        raise UsageError("--precision fp16 needs a GPU; bf16 works on a CPU too")
    if config.tracker != "none" and not any(find_spec(name) for name in _TRACKERS[config.tracker]):
        raise UsageError(f"--tracker {config.tracker} needs its package: pip install {config.tracker}")
    # torch 2.15 has another name for it, which earlier ones lack and Accelerate does not pass on.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    accelerator = Accelerator(
        cpu=not on_gpu,
        mixed_precision=precision,
        # As a plugin, since Accelerate lets an environment variable override the plain number.
        gradient_accumulation_plugin=GradientAccumulationPlugin(config.accumulate, sync_with_dataloader=False),
        log_with=None if config.tracker == "none" else config.tracker,
        project_dir=config.output,
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )
    world = accelerator.num_processes
    parts = world * config.accumulate
    if config.batch_size % (parts * rows):
        raise UsageError(
            f"--batch-size must divide by {parts * rows} ({world} processes x {config.accumulate} micro-batches"
            f"{f' x {rows}' if rows > 1 else ''}), got {config.batch_size}"
        )
    if config.norm == "shuffle" and world == 1:
        raise UsageError("--norm shuffle needs at least 2 processes, got 1; --norm batch is plain batch norm")
    torch.manual_seed(config.seed)  # for the networks' first weights alone; every draw of a step has a Key
    return accelerator


def open_data(
    config: RunConfig, specs: Sequence[geoaug.ViewSpec], accelerator: Accelerator, *, proposals: Path | None = None,
    only: Path | None = None, replay: bool = False,
    label_map: Literal["instance", "semantic"] | None = None,
) -> Loader:  # fmt: skip
    """The loader of a run: this process's part of each batch, its views on the run's device."""
    try:
        return geoaug.open_loader(
            config.data or "", specs, batch_size=config.batch_size, seed=config.seed, images=config.images,
            rank=accelerator.process_index, world=accelerator.num_processes, proposals=proposals,
            workers=config.workers, device=accelerator.device, render=config.render, on_error="mask",
            only=only, replay=replay,
            label_map=label_map,
        )  # fmt: skip
    except (ValueError, OSError, ImportError, geoaug.LoadError) as error:
        raise UsageError(f"--data {config.data}: {error}") from None

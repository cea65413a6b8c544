"""What PixSim and RegionSim add to a step of SimSiam, in time and memory.

python benchmarks/densesiam.py [--arch resnet50] [--size 224] [--batch-size 64] [--precision no|bf16] [--runs 7]

Steps (colours, points, forward, backward, SGD) alternate on one made batch. Memory is the peak of a step in a process
of its own, less what it held before the model was made: the allocator's on a GPU, the resident set on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import geoaug
from benchmarks.record import alternate, save, spread
from trainers import common, densesiam, simsiam

METHODS = ("SimSiam", "PixSim", "PixSim and RegionSim")


@dataclass(frozen=True)
class Setting:
    """What is measured, and where."""

    arch: str
    size: int
    batch_size: int
    precision: str
    device: str


def made_batch(setting: Setting) -> geoaug.Batch:
    """A batch of noise, with a plan as of photographs."""
    count, size = setting.batch_size, setting.size
    specs = geoaug.recipes.recipe("densesiam").at(size).views
    sizes = torch.tensor([[480, 640]]).expand(count, 2)
    plan = geoaug.plan_views(specs, sizes, torch.arange(count), seed=0, epoch=0)
    images = [torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8) for _ in specs]
    boxes, ok = torch.zeros(count, 1, 4), torch.ones(count, dtype=torch.bool)
    labels = torch.full((count,), -1)
    names = [str(i) for i in range(count)]
    batch = geoaug.Batch(images, plan, plan.key, ok, names, boxes, boxes[..., 0] > 0, labels[:, None], labels)
    return batch.to(setting.device)


def step_of(method: str, setting: Setting, batch: geoaug.Batch) -> Callable[[], None]:
    """One training step of a method on the batch."""
    device = torch.device(setting.device)
    mixed = torch.autocast(device.type, torch.bfloat16, enabled=setting.precision == "bf16")
    settings: dict[str, Any] = {"arch": setting.arch, "size": setting.size, "batch_size": setting.batch_size}
    torch.manual_seed(0)
    weight = 0.1 if method == "PixSim and RegionSim" else 0.0
    config = densesiam.Config(**settings, region_weight=weight)
    plain = method == "SimSiam"
    model: nn.Module = simsiam.Model(simsiam.Config(**settings)) if plain else densesiam.Model(config)
    model = common.prepare_model(model, config, device)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)

    def inputs() -> tuple[Any, ...]:
        if plain:
            return batch, batch.ok.sum().float()
        points = common.share_points(
            batch, config.grid, config.points, cells=-(-setting.size // common.stride(setting.arch, "c5"))
        )
        return batch, points, torch.stack((batch.ok.sum(), points.valid.sum())).float(), weight

    def step() -> None:
        with mixed:
            loss, _ = model(*inputs())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def peak(method: str, setting: Setting) -> float:
    """Bytes of three steps in a process of its own."""
    command = [sys.executable, __file__, "--peak-of", method, "--setting", json.dumps(vars(setting))]
    # What is freed goes back at once, so that the resident set is what is in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    out = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    return float(out.split()[-1])


def own_peak(method: str, setting: Setting) -> float:
    """The same in this process."""
    batch = made_batch(setting)
    before = resident()
    step = step_of(method, setting, batch)
    for _ in range(3):
        step()
    if setting.device == "cuda":
        return float(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0 - before


def resident() -> float:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return float(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="resnet50", choices=common.ARCHES)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=None, help="64, as a GPU of the paper has; 8 on a CPU")
    parser.add_argument("--precision", default="no", choices=["no", "bf16"])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--peak-of", default="", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--setting", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of:
        print(own_peak(args.peak_of, Setting(**json.loads(args.setting))))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch_size = args.batch_size or (64 if device == "cuda" else 8)
    setting = Setting(args.arch, args.size, batch_size, args.precision, device)
    held = {method: peak(method, setting) for method in METHODS}
    batch = made_batch(setting)
    seconds = alternate({method: step_of(method, setting, batch) for method in METHODS}, args.runs)
    rows = []
    for method in METHODS:
        more = [a / b - 1 for a, b in zip(seconds[method], seconds["SimSiam"], strict=True)]
        added = held[method] / held["SimSiam"] - 1
        rows.append(
            (
                method,
                spread(seconds[method]),
                "" if method == "SimSiam" else f"{statistics.median(more):+.1%} ({min(more):+.1%} to {max(more):+.1%})",
                f"{held[method] / 2**20:.0f}",
                "" if method == "SimSiam" else f"{added:+.1%}",
            )
        )
    columns = ("step of", "time (ms)", "over SimSiam, in each round", "peak memory (MiB)", "over SimSiam")
    about = f"{setting.arch}, views of {setting.size}, batch {batch_size}, precision {setting.precision}, {device}."
    save(
        "densesiam",
        "What DenseSiam adds to SimSiam",
        rows,
        {"seconds": seconds, "bytes": held},
        columns=columns,
        notes=[about],
    )


if __name__ == "__main__":
    main()

"""What PLRC's point losses cost: memory, share of a training step, and a whole step's memory against MoCo v2's.

    python benchmarks/point_losses.py [--arch resnet50] [--size 224] [--images 32] [--memory-images 64]
                                       [--runs 3]

The losses alone run on random points: 16 slots x 16 points of each image, forward and backward. Their peak is what they
allocate beyond their inputs, by the profiler on a CPU and by the allocator on a GPU. The step is PLRC's own on images
of noise, with the point losses switched on and off (their share is the difference), beside MoCo v2's.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from benchmarks.record import save, spread
from geoaug import Batch, ViewSpec, losses, plan_views
from trainers import common, moco_v2, plrc

MB = 1e6


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """The most memory that was allocated at a time, beyond what was there before."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = torch.tensor([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).cumsum(0)
    return int(held.max())


def seconds(function: Callable[[], object], device: torch.device, runs: int) -> list[float]:
    """Of each run, the device waited for, after one that warms up."""
    function()
    taken = []
    for _ in range(runs):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return taken


def losses_of(images: int, device: torch.device) -> Callable[[], None]:
    """Both point losses at the paper's numbers, forward and backward."""
    p, p2, twins = (torch.randn(images, 256, 128, device=device) for _ in range(3))
    p.requires_grad_()
    ids = torch.arange(16, device=device).repeat_interleave(16).expand(images, 256)
    every = torch.ones(images, 256, dtype=torch.bool, device=device)

    def step() -> None:
        p.grad = None
        contrast = losses.point_region_contrast(p, ids, p2, ids, temperature=0.2)
        affinity = losses.affinity_distillation(
            p, p2, twins, p2, every, temperature=0.1, teacher_temperature=0.07
        )  # fmt: skip
        (contrast.mean() + affinity.mean()).backward()

    return step


def batch_of(images: int, size: int, device: torch.device) -> Batch:
    """Two planned views of noise."""
    plan: Plan = plan_views(
        [ViewSpec(size, scale=(0.2, 1.0))] * 2, [[size, size]] * images, range(images), seed=0, epoch=0
    )
    noise = [torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8, device=device) for _ in range(2)]
    plan = plan.to(device)
    return Batch(
        noise, plan, plan.key, torch.ones(images, dtype=torch.bool, device=device), [str(i) for i in range(images)],
        torch.zeros(images, 1, 4, device=device), torch.zeros(images, 1, dtype=torch.bool, device=device),
        torch.zeros(images, 1, dtype=torch.int64, device=device), torch.zeros(images, dtype=torch.int64, device=device),
    )  # fmt: skip


@contextlib.contextmanager
def without_point_losses() -> Iterator[None]:
    """PLRC's step with its points read, but with means in the place of both losses."""
    contrast, affinity = plrc.Model.contrast, plrc.Model.affinity
    plrc.Model.contrast = lambda self, p, p2, points: p.mean(dim=(1, 2))  # type: ignore[method-assign]
    plrc.Model.affinity = lambda self, p, p2, twins, points: p.mean(dim=2)  # type: ignore[method-assign]
    try:
        yield
    finally:
        plrc.Model.contrast, plrc.Model.affinity = contrast, affinity  # type: ignore[method-assign]


def step_of(method: str, arch: str, size: int, batch: Batch, device: torch.device) -> Callable[[], None]:
    """A whole training step but for its data: colours, both networks, losses, backward, optimiser, teacher."""
    module = {"plrc": plrc, "moco_v2": moco_v2}[method]
    config = replace(module.Config(), arch=arch, size=size, batch_size=len(batch))
    torch.manual_seed(0)
    model = common.prepare_model(module.Model(config), config, device)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01, momentum=0.9)
    mixed = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    count = batch.ok.sum().float()

    def step() -> None:
        with mixed:
            if method == "plrc":
                points = plrc.find_points(batch, config)
                counts = torch.stack((count, points.shared.sum(), points.distilled.any(dim=1).sum()))
                loss, log = model(batch, points, counts, True)
            else:
                loss, log = model(batch, count)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        common.move_teacher(model.teacher, model.student, config.ema)
        model.queue.enqueue(torch.nn.functional.normalize(log["keys"][0].float(), dim=1), log["keys"][1])

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--images", type=int, default=32, help="of the losses alone, and of the step that is timed")
    parser.add_argument("--memory-images", type=int, default=64, help="of the step whose memory is taken")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    alone = losses_of(args.images, device)
    rows: list[tuple[str, str]] = []
    raw: dict[str, object] = {}
    alone()
    peak = raw["peak"] = peak_bytes(alone, device)
    taken = raw["losses"] = seconds(alone, device, args.runs)
    what = f"point losses of {args.images} images, forward and backward"
    rows += [(f"{what}: peak (MB)", f"{peak / MB:.1f}"), (f"{what} (ms)", spread(taken))]

    batch = batch_of(args.images, args.size, device)
    step = step_of("plrc", args.arch, args.size, batch, device)
    with_losses = raw["step"] = seconds(step, device, args.runs)
    with without_point_losses():
        bare = raw["step without"] = seconds(step, device, args.runs)
    moco = raw["moco_v2"] = seconds(step_of("moco_v2", args.arch, args.size, batch, device), device, args.runs)
    name = f"step of {args.images} images, {args.arch} at {args.size}, {device.type}"
    share = statistics.median(taken) / statistics.median(with_losses)
    rows += [
        (f"PLRC, {name} (ms)", spread(with_losses)),
        (f"the same without its point losses, {name} (ms)", spread(bare)),
        (f"MoCo v2, {name} (ms)", spread(moco)),
        ("point losses alone, share of PLRC's step", f"{100 * share:.1f} %"),
        ("step with them over step without", f"{statistics.median(with_losses) / statistics.median(bare):.3f}"),
    ]  # fmt: skip
    del step, batch
    batch = batch_of(args.memory_images, args.size, device)
    peaks = {}
    for method in ("plrc", "moco_v2"):
        one = step_of(method, args.arch, args.size, batch, device)
        one()
        peaks[method] = peak_bytes(one, device)
        del one
    raw["step peaks"] = peaks
    rows += [
        (f"peak of a step's own memory, {args.memory_images} images: {method} (MB)", f"{value / MB:.0f}")
        for method, value in peaks.items()
    ]
    rows.append(("PLRC over MoCo v2", f"{peaks['plrc'] / peaks['moco_v2']:.3f}"))
    save("point_losses", "PLRC's point losses", rows, raw)


if __name__ == "__main__":
    main()

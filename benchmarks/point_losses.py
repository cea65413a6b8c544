"""What PLRC's point losses cost: memory, share of a training step, and a whole step's memory against MoCo v2's.

    python benchmarks/point_losses.py [--arch resnet50] [--size 224] [--images 32] [--memory-images 64]
                                       [--runs 7]

The losses alone run on random points: 16 slots x 16 points of each image, forward and backward. Their peak is what they
allocate beyond their inputs, by the profiler on a CPU and by the allocator on a GPU. The step is PLRC's own on images
of noise, with the point losses and with means in their place, beside MoCo v2's; rounds of all of them alternate, and
what the losses add is taken inside a round.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks.record import alternate, save, spread
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


def waited_for(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """The step, to the end of what it sent to the device."""

    def whole() -> None:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return whole


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
    plan = plan_views([ViewSpec(size, scale=(0.2, 1.0))] * 2, [[size, size]] * images, range(images), seed=0, epoch=0)
    noise = [torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8, device=device) for _ in range(2)]
    plan = plan.to(device)
    return Batch(
        noise, plan, plan.key, torch.ones(images, dtype=torch.bool, device=device), [str(i) for i in range(images)],
        torch.zeros(images, 1, 4, device=device), torch.zeros(images, 1, dtype=torch.bool, device=device),
        torch.zeros(images, 1, dtype=torch.int64, device=device), torch.zeros(images, dtype=torch.int64, device=device),
    )  # fmt: skip


class WithoutPointLosses(plrc.Model):
    """PLRC with its points read, but with means in the place of both losses."""

    def contrast(self, p: torch.Tensor, p2: torch.Tensor, points: common.Points) -> torch.Tensor:
        """Costs nothing."""
        return p.mean(dim=(1, 2)) + p2.mean(dim=(1, 2))

    def affinity(self, p: torch.Tensor, p2: torch.Tensor, twins: torch.Tensor, points: common.Points) -> torch.Tensor:
        """Costs nothing."""
        return p.mean(dim=2)


METHODS: dict[str, tuple[Any, Any]] = {
    "PLRC": (plrc.Model, plrc.Config), "PLRC without its point losses": (WithoutPointLosses, plrc.Config),
    "MoCo v2": (moco_v2.Model, moco_v2.Config),
}  # fmt: skip
GATES = {"peak": 200.0, "share": 0.08, "memory": 1.15}


def step_of(method: str, arch: str, size: int, batch: Batch, device: torch.device) -> Callable[[], None]:
    """A whole training step but for its data: colours, both networks, losses, backward, optimiser, teacher."""
    network, settings = METHODS[method]
    config = replace(settings(), arch=arch, size=size, batch_size=len(batch))
    torch.manual_seed(0)
    model = common.prepare_model(network(config), config, device)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01, momentum=0.9)
    mixed = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    count = batch.ok.sum().float()

    def step() -> None:
        with mixed:
            if method != "MoCo v2":
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
    parser.add_argument("--runs", type=int, default=7, help="rounds")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    alone = losses_of(args.images, device)
    alone()
    peak = peak_bytes(alone, device) / MB
    batch = batch_of(args.images, args.size, device)
    steps = {method: step_of(method, args.arch, args.size, batch, device) for method in METHODS}
    timed = {name: waited_for(step, device) for name, step in {"point losses": alone, **steps}.items()}
    taken = alternate(timed, args.runs)
    with_losses, without, moco = (taken[method] for method in METHODS)
    added = [(a - b) / b for a, b in zip(with_losses, without, strict=True)]
    name = f"step of {args.images} images, {args.arch} at {args.size}, {device.type}"
    rows = [
        (f"point losses of {args.images} images, both ways: peak (MB, gate {GATES['peak']:g})", f"{peak:.1f}"),
        ("the same, time (ms)", spread(taken["point losses"])),
        *((f"{method}, {name} (ms)", spread(taken[method])) for method in METHODS),
        (f"what the point losses add to the step (gate {100 * GATES['share']:g} %)", percent(added)),
        ("PLRC over MoCo v2, time", percent([a / b - 1 for a, b in zip(with_losses, moco, strict=True)])),
    ]  # fmt: skip
    del steps, timed, batch
    batch = batch_of(args.memory_images, args.size, device)
    peaks = {}
    for method in ("PLRC", "MoCo v2"):
        one = step_of(method, args.arch, args.size, batch, device)
        one()
        peaks[method] = peak_bytes(one, device) / MB
        del one
        rows.append(
            (f"peak of a step's own memory, {args.memory_images} images: {method} (MB)", f"{peaks[method]:.0f}")
        )
    memory = peaks["PLRC"] / peaks["MoCo v2"]
    rows.append((f"PLRC over MoCo v2, memory (gate {GATES['memory']:g})", f"{memory:.3f}"))
    save("point_losses", "PLRC's point losses", rows, {"seconds": taken, "added": added, "peak": peak, "peaks": peaks})
    found = {"peak": peak, "share": statistics.median(added), "memory": memory}
    missed = [name for name, value in found.items() if value > GATES[name]]
    if missed:
        raise SystemExit(f"benchmarks/point_losses.py: over its gate: {', '.join(missed)}")


def percent(shares: list[float]) -> str:
    """Median and range."""
    low, middle, high = min(shares), statistics.median(shares), max(shares)
    return f"{100 * middle:+.1f} % ({100 * low:+.1f} to {100 * high:+.1f})"


if __name__ == "__main__":
    main()

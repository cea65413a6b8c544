"""What a dense loss costs over BYOL: whole steps of both in turn, from the stored views to the moved target.

    python benchmarks/dense_losses.py [--papers scrl] [--arch resnet50] [--batch-size 8] [--runs 7] [--steps 1]

A step is colours, boxes, both networks, backward, LARS and the moving average; loading is left out, since it is the
same. Each paper is compared with BYOL on the same views with the same passes; the first figure is the median over
alternating runs of its time over BYOL's in the same round. With a GPU, the batch is 64, bf16 is on, and a run is ten
steps before the GPU is waited for, since a trainer gives it the next step while it works on this one.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks.record import alternate, save, spread
from geoaug import Batch, open_loader
from trainers import byol, common, lc_loss, scrl

# Of each paper: its trainer, what its forward takes beside the batch, and the passes of the BYOL it is compared with.
PAPERS: dict[str, tuple[ModuleType, Callable[[Batch, Any], tuple[Any, ...]], dict[str, Any]]] = {
    "scrl": (scrl, lambda batch, config: _with_count(scrl.find_pairs(batch, config)), {"forward": "joint"}),
    "lc": (lc_loss, lambda batch, config: _with_counts(batch, *lc_loss.find_cells(batch, config)), {}),
}


def _with_count(pairs: scrl.Pairs) -> tuple[scrl.Pairs, torch.Tensor]:
    return pairs, pairs.valid.sum().float()


def _with_counts(batch: Batch, points: torch.Tensor, valid: torch.Tensor) -> tuple[Any, ...]:
    return points, valid, torch.cat((batch.ok.sum()[None], valid.any(2).sum(1))).float(), 0.0


def steps_of(
    trainer: ModuleType, config: Any, batch: Batch, inputs: Callable[[Batch, Any], tuple[Any, ...]], count: int
) -> Callable[[], None]:
    """So many whole steps of a trainer on the batch, as its loop does them."""
    device = batch.ok.device
    torch.manual_seed(0)
    model = common.prepare_model(trainer.Model(config), config, device)
    optimizer = common.LARS(common.weights_and_vectors(model.parameters(), weight_decay=1e-6), 0.1)
    mixed = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    def step() -> None:
        with mixed:
            loss, _ = model(batch, *inputs(batch, config))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        common.move_teacher(model.teacher, model.student, 0.99)

    def steps() -> None:
        for _ in range(count):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return steps


def views(trainer: ModuleType, config: Any, device: torch.device) -> Batch:
    """One batch of scenes as the trainer sees it."""
    with tempfile.TemporaryDirectory() as made:
        script = Path(__file__).resolve().parent.parent / "data_prep" / "make_scenes.py"
        command = [sys.executable, str(script), "--out", made, "--images", str(config.batch_size)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        data = Path(made) / "instances.json"
        with open_loader(
            data, trainer.recipe(config).views, batch_size=config.batch_size, seed=0, workers=0, device=device
        ) as loader:
            return next(iter(loader))


def measure(paper: str, args: argparse.Namespace, device: torch.device) -> dict[str, list[float]]:
    """Seconds of a step of the paper and of BYOL in turn."""
    trainer, inputs, passes = PAPERS[paper]
    shape = {"arch": args.arch, "size": args.size, "batch_size": args.batch_size}
    ours, theirs = trainer.Config(**shape).filled(), byol.Config(**shape, **passes)
    batch = views(trainer, ours, device)
    steps = {
        paper: steps_of(trainer, ours, batch, inputs, args.steps),
        "byol": steps_of(byol, theirs, batch, lambda batch, _: (batch.ok.sum().float(),), args.steps),
    }
    return {name: [x / args.steps for x in taken] for name, taken in alternate(steps, args.runs).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--papers", default=",".join(PAPERS), help=f"of {', '.join(PAPERS)}, with commas between")
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=64 if device.type == "cuda" else 8)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10 if device.type == "cuda" else 1, help="steps of a run")
    args = parser.parse_args()
    rows, raw = [], {}
    for paper in args.papers.split(","):
        seconds = measure(paper, args, device)
        over = [100 * (a / b - 1) for a, b in zip(seconds[paper], seconds["byol"], strict=True)]
        rows += [
            (f"{paper} over BYOL: median (range) of a round (%)",
             f"{statistics.median(over):+.1f} ({min(over):+.1f} to {max(over):+.1f})"),
            (f"a step of {paper} (ms)", spread(seconds[paper])),
            ("a step of BYOL (ms)", spread(seconds["byol"])),
        ]  # fmt: skip
        raw[paper] = seconds
    setting = (args.arch, args.size, args.batch_size, args.steps, device.type)
    rows.append(("arch, size, batch, steps of a run, device", ", ".join(map(str, setting))))
    save("dense_losses", "What a dense loss costs over BYOL", rows, {"seconds": raw})


if __name__ == "__main__":
    main()

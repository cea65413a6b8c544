"""Which of the papers' claims hold on scenes: trains the variants, measures them, and says so claim by claim.

    python benchmarks/claims.py --papers lc,scrl,pace,plrc,densesiam,segmentation [--seeds 3] [--device cpu|cuda]
                                [--size cpu|gpu|tiny] [--jobs 2] [--work runs/claims] [--out benchmarks/results]

Each paper has a `claims_<paper>.py` with one function `claims(lab) -> list[Claim]`; how to write one stands at the head
of `experiments.py`. Results go to claims_<paper>.md and .json, also where a claim does not hold. Every variant is
trained once a seed; differences are taken inside a seed. A claim holds ("yes") if every seed says so and the mean
difference is at least two standard errors; "no" is the same on the other side; all else is "unclear". Scenes are no
photographs and a run here is far shorter than a paper's, so a claim that fails here is not refuted: it is not shown.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import time
from pathlib import Path

from benchmarks import record
from benchmarks.experiments import SCALES, Lab

NAMES = {
    "lc": "LC-loss",
    "scrl": "SCRL",
    "pace": "SCRL, with the target at the paper's pace,",
    "plrc": "PLRC",
    "densesiam": "DenseSiam",
    "segmentation": "DenseSiam's segmentation",
}
COLUMNS = ("claim", "paper", "measured: mean ± deviation over seeds", "paired difference", "holds here")


def write(paper: str, lab: Lab, size: str, out: Path) -> None:
    """Run a paper's claims and write its table."""
    module = importlib.import_module(f"benchmarks.claims_{paper}")
    scale = getattr(module, "SCALES", SCALES)[size]
    began = time.perf_counter()
    found = module.claims(dataclasses.replace(lab, scale=scale))
    minutes = (time.perf_counter() - began) / 60
    setting = (
        f"Seeds {', '.join(map(str, lab.seeds))}; {scale.images} scenes (`{' '.join(scale.scene_flags)}`),"
        f" {scale.epochs} epochs of batch {scale.batch_size}, {scale.arch}, views of {scale.size} px;"
        f" measured on {scale.held_out} other scenes; {lab.device}; {minutes:.1f} minutes, less what was cached."
    )
    setting += getattr(module, "NOTE", "")
    raw = {
        "size": size,
        "scale": scale._asdict(),
        "seeds": lab.seeds,
        "claims": [
            dataclasses.asdict(each) | {"differences": each.differences(), "holds": each.holds()} for each in found
        ],
    }
    rows = [each.row() for each in found]
    name = f"claims_{paper}" + ("" if size == "cpu" else f"_{size}")
    record.save(name, f"Claims of {NAMES[paper]} on scenes", rows, raw, columns=COLUMNS, notes=[setting], where=out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--papers", default=",".join(NAMES), help=f"of {', '.join(NAMES)}, with commas between")
    parser.add_argument("--seeds", type=int, default=3, help="how many (3)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=tuple(SCALES), default="cpu", help="of data and runs; tiny learns nothing")
    parser.add_argument("--jobs", type=int, help="runs at a time (on a CPU as many as cores, else 1)")
    parser.add_argument("--work", type=Path, default=Path("runs/claims"), help="scenes, runs and scores; goes on there")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    args = parser.parse_args()
    if args.jobs is None:
        args.jobs = (os.cpu_count() or 1) if args.device == "cpu" else 1
    papers = args.papers.split(",")
    unknown = [paper for paper in papers if paper not in NAMES]
    if unknown or args.seeds < 1 or args.jobs < 1:
        parser.error(f"--papers must be of {', '.join(NAMES)}, --seeds and --jobs at least 1, got {args.papers}")
    work = args.work.resolve() / args.size
    lab = Lab(work, tuple(range(args.seeds)), args.device, SCALES[args.size], args.jobs)
    for paper in papers:
        write(paper, lab, args.size, args.out)


if __name__ == "__main__":
    main()

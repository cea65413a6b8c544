"""What every `claims_<paper>.py` uses: a laboratory that trains, measures and remembers, and the form of a claim.

A paper's file has one function, which `claims.py` calls once:

    def claims(lab: Lab) -> list[Claim]:
        byol = lab.each_seed(lambda seed: score(lab, lab.train("byol", seed, "--lr", "0.4")))
        scrl = lab.each_seed(lambda seed: score(lab, lab.train("scrl", seed, "--lr", "0.4")))
        return [Claim("SCRL's features name objects better.", "yes: Table 10, 74.8 against 71.5",
                      "top-1 of object k-NN (%)", {"SCRL": scrl, "BYOL": byol})]

`lab.train(trainer, seed, *flags)` gives the run folder; `lab.measure(task, run, *flags)` what `evaluate.py` writes, on
held-out scenes. Both run in processes of their own and are cached by their flags, so that a killed benchmark goes on
where it was; runs resume from their checkpoints. The cache does not know the code: after a change, give another
`--work`. `lab.scale` says how large everything is; its flags go to every trainer first, so that `flags` win. A paper
that wants other sizes or scenes has `SCALES` of its own in its file, one for each name here; `NOTE` stands under its
table.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
_making = threading.Lock()  # two runs at a time may want the same scenes


class Scale(NamedTuple):
    """How large a claim's runs are."""

    images: int  # to train on
    held_out: int  # to measure on
    scene: int  # longer side of a scene (px)
    scene_flags: tuple[str, ...]  # of make_scenes.py
    size: int  # side of a view (px)
    batch_size: int
    epochs: int
    arch: str


# On many small objects without a usual colour not even labels teach anything in minutes: few, large ones here.
_EASY = ("--objects", "1", "3", "--radius", "0.13", "0.26", "--usual-colors")
SCALES = {
    "cpu": Scale(2000, 600, 128, _EASY, 64, 32, 4, "resnet10-tiny"),  # 248 steps
    "gpu": Scale(20000, 2000, 256, ("--objects", "2", "6", "--usual-colors"), 160, 256, 60, "resnet18"),
    "tiny": Scale(32, 32, 96, _EASY, 64, 8, 1, "resnet10-tiny"),  # to see that everything runs
}


@dataclass(frozen=True)
class Claim:
    """One sentence of a paper, and what the variants it compares measured here, one value a seed.

    `values` goes from the variant that should be best to the one that should be worst.
    """

    says: str
    paper: str  # its direction and its figures
    measure: str
    values: Mapping[str, list[float]]
    higher: bool = True  # whether more is better

    def differences(self) -> list[list[float]]:
        """How much better each variant is than the next one, seed by seed."""
        sign = 1 if self.higher else -1
        rows = list(self.values.values())
        return [[sign * (a - b) for a, b in zip(*pair, strict=True)] for pair in itertools.pairwise(rows)]

    def holds(self) -> Literal["yes", "no", "unclear"]:
        """Every difference has to be clear of zero for "yes"; one on the wrong side is enough for "no"."""
        sides = [side(each) for each in self.differences()]
        return "no" if -1 in sides else "yes" if all(sides) else "unclear"

    def row(self) -> tuple[str, str, str, str, str]:
        """Its line of the table."""
        measured = "; ".join(f"{name} {mean_and_spread(each)}" for name, each in self.values.items())
        apart = "; ".join(mean_and_spread(each, "+") for each in self.differences())
        return self.says, self.paper, f"{self.measure}: {measured}", apart, self.holds()


def side(differences: list[float]) -> int:
    """1 or -1 where all paired differences have one sign and their mean is two standard errors from 0, else 0."""
    mean = statistics.fmean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.inf
    alike = all(d * mean > 0 for d in differences)
    return int(math.copysign(1, mean)) if alike and abs(mean) >= 2 * error else 0


def mean_and_spread(values: list[float], sign: str = "") -> str:
    """Mean and standard deviation."""
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    return f"{statistics.fmean(values):{sign}.4g} ± {spread:.2g}"


@dataclass(frozen=True)
class Lab:
    """Where runs and scores lie, and how large they are."""

    work: Path
    seeds: tuple[int, ...] = (0, 1, 2)
    device: Literal["cpu", "cuda"] = "cpu"
    scale: Scale = SCALES["cpu"]
    jobs: int = 1  # runs at a time

    def each_seed(self, function: Callable[[int], Any]) -> list[Any]:
        """What the function gives for each seed."""
        return self.each_variant({"": function})[""]

    def each_variant(self, functions: Mapping[str, Callable[[int], Any]]) -> dict[str, list[Any]]:
        """What each function gives for each seed; all at once, so that no job waits for a variant's last seed."""
        with ThreadPoolExecutor(self.jobs) as pool:
            found = {name: [pool.submit(function, seed) for seed in self.seeds] for name, function in functions.items()}
            try:
                return {name: [each.result() for each in every] for name, every in found.items()}
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # what has not begun
                raise

    def scenes(self, *, held_out: bool = False, flags: tuple[str, ...] = ()) -> Path:
        """Scenes to train on, or to measure on: a COCO json. `flags` of make_scenes.py make other ones."""
        scale = self.scale
        count, seed = (scale.held_out, 1) if held_out else (scale.images, 0)
        shape = ["--size", scale.scene, *scale.scene_flags, "--seed", seed, "--images", count, *flags]
        out = self.work / f"{'held-out' if held_out else 'scenes'}-{digest(shape)}"
        with _making:
            if not (out / "instances.json").exists():
                self._run("data_prep/make_scenes.py", ["--out", out, *shape], out.with_suffix(".log"))
        return out / "instances.json"

    def train(self, trainer: str, seed: int, *flags: str, data: Path | None = None) -> Path:
        """The folder of a whole run of trainers/<trainer>.py with that seed and those flags."""
        scale = self.scale
        every = ["--data", str(data or self.scenes()), "--arch", scale.arch, "--size", str(scale.size)]
        every += ["--batch-size", str(scale.batch_size), "--epochs", str(scale.epochs), *flags, "--seed", str(seed)]
        every += ["--cpu"] if self.device == "cpu" else []
        run = self.work / "runs" / f"{trainer}-{seed}-{digest(every)}"
        if not (run / "done.json").exists():
            saved = ["--output", run, "--log-every", 10, "--save-every", 100]
            self._run(f"trainers/{trainer}.py", [*every, *saved], run.with_suffix(".log"))
            (run / "done.json").write_text(json.dumps({"trainer": trainer, "flags": every}, indent=1) + "\n")
        return run

    def measure(self, task: str, weights: Path | str, *flags: str, data: Path | None = None) -> dict[str, Any]:
        """What evaluate.py says of a run's backbone, or of one that never saw an image: `random`."""
        every = [task, "--weights", str(weights), "--data", str(data or self.scenes(held_out=True))]
        every += ["--arch", self.scale.arch, *flags, "--device", self.device]
        out = self.work / "scores" / f"{task}-{digest(every)}.json"
        if not out.exists():
            self._run("trainers/evaluate.py", [*every, "--out", out], out.with_suffix(".log"))
        scores: dict[str, Any] = json.loads(out.read_text())
        return scores

    def logged(self, run: Path) -> list[dict[str, float]]:
        """The lines of a run's metrics.jsonl."""
        return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]

    def _run(self, script: str, arguments: list[Any], log: Path) -> None:
        command = [sys.executable, str(ROOT / script), *map(str, arguments)]
        log.parent.mkdir(parents=True, exist_ok=True)
        inherited = [path for path in (os.environ.get("PYTHONPATH"),) if path]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *inherited])}
        if self.jobs > 1:
            environment["OMP_NUM_THREADS"] = "1"
        print(f"{script} {log.stem}", file=sys.stderr, flush=True)
        with log.open("w") as file:
            code = subprocess.run(command, stdout=file, stderr=file, env=environment, check=False).returncode
        if code:
            raise SystemExit(f"claims: {' '.join(command)} ended with {code}:\n{log.read_text()[-2000:]}")


def digest(words: Any) -> str:
    """A short name for a list of flags."""
    return hashlib.blake2b(json.dumps(list(words)).encode(), digest_size=4).hexdigest()

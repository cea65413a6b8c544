"""Alternating runs, and a record of them with machine, versions, date and command."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "numba",
    "ffcv",
    "opencv-python",
    "selectivesearch",
    "scikit-image",
    "accelerate",
    "pyarrow",
    "pandas",
)


def alternate(functions: Mapping[str, Callable[[], object]], runs: int = 7) -> dict[str, list[float]]:
    """Seconds of each function in turn, `runs` times over, after one unmeasured round that compiles and warms up."""
    for function in functions.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    gc.collect()
    gc.disable()  # a collection in the middle of one contender would be charged to it
    try:
        for _ in range(runs):
            for name, function in functions.items():
                start = time.perf_counter()
                function()
                seconds[name].append(time.perf_counter() - start)
    finally:
        gc.enable()
    return seconds


def ratio(seconds: Mapping[str, list[float]], slow: str, fast: str) -> str:
    """How many times `fast` is faster, taken inside each round: median (lowest to highest)."""
    rounds = [a / b for a, b in zip(seconds[slow], seconds[fast], strict=True)]
    return f"{statistics.median(rounds):.2f} ({min(rounds):.2f} to {max(rounds):.2f})"


def spread(values: list[float], unit: float = 1e3) -> str:
    """Median (lowest to highest), by default in milliseconds."""
    return f"{statistics.median(values) * unit:.4g} ({min(values) * unit:.4g} to {max(values) * unit:.4g})"


def processor() -> str:
    """The CPU's own name for itself."""
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _short(argument: str) -> str:
    """The last two parts of a path: where a folder lies on this machine is nobody's business."""
    return "/".join(Path(argument).parts[-2:]) if "/" in argument else argument


def _commit() -> str:
    command = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def machine() -> dict[str, object]:
    """What the figures depend on."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "avx512": "avx512" in Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": versions,
        "date": time.strftime("%Y-%m-%d"),
        "commit": _commit(),
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *map(_short, sys.argv[1:])]),
    }


def save(
    name: str, title: str, rows: Sequence[tuple[str, ...]], raw: Mapping[str, object], *,
    columns: tuple[str, ...] = ("what", "figure"), notes: Sequence[str] = (), where: Path = RESULTS,
) -> None:  # fmt: skip
    """Print a table and write it to results/<name>.md, with every number in .json; <name>_cuda where there is a GPU."""
    about = machine()
    name += "_cuda" if about["gpu"] else ""
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items())  # type: ignore[attr-defined]
    lines = [
        f"# {title}",
        "",
        f"| {' | '.join(columns)} |",
        f"| {' | '.join('---' for _ in columns)} |",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    lines += ["", *notes] if notes else []
    lines += ["", f"{about['cpu']}, {about['cores']} cores, AVX-512 {about['avx512']}, GPU {about['gpu']};"]
    lines += [
        f"Python {about['python']}, {versions}; {about['date']},",
        f"commit {about['commit']}.",
        "",
        f"`{about['command']}`",
        "",
    ]
    where.mkdir(parents=True, exist_ok=True)
    (where / f"{name}.md").write_text("\n".join(lines))
    (where / f"{name}.json").write_text(json.dumps({"machine": about, **raw}, indent=1) + "\n")
    print("\n".join(lines))

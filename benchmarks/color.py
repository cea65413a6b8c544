"""BYOL's colour on a batch: `geoaug.pixels.color` against torchvision v2 applied sample by sample, in alternating runs.

Torchvision gets the better of uint8 and float32 input, and its samples are shared out to as many single-threaded
processes as we have threads, which read and write shared memory: nothing is sent.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
import torchvision
from torchvision.transforms import v2

from geoaug import Key
from geoaug.pixels.color import BYOL_1, BYOL_2, color

RESULTS = Path(__file__).resolve().parent / "results"
shared = {}  # of a worker: the batch and its result


def torchvision_pipeline(spec, dtype, size):
    """The same recipe in torchvision's words, with the same kernel."""
    kernel = 2 * spec.radius(size, size) + 1
    jitter = v2.ColorJitter(spec.brightness, spec.contrast, spec.saturation, spec.hue)
    return v2.Compose([
        v2.ToDtype(dtype, scale=True), v2.RandomApply([jitter], p=spec.jitter),
        v2.RandomGrayscale(spec.gray), v2.RandomApply([v2.GaussianBlur(kernel, spec.sigma)], p=spec.blur),
        v2.RandomSolarize(128 if dtype == torch.uint8 else 0.5, p=spec.solarize),
        v2.ToDtype(torch.float32, scale=True), v2.Normalize(spec.channels("mean"), spec.channels("std")),
    ])  # fmt: skip


def start_worker(batch):
    torch.set_num_threads(1)
    shared.update(batch)


def work(rows, pipeline):
    for i in rows:
        shared["out"][i] = pipeline(shared["images"][i])


def contestants(spec, images, pool):
    """Name -> a function of the run's number that colours the batch."""
    found = {"geoaug": lambda run: color(images, spec, Key(0, run, range(len(images))))}
    for dtype in (torch.uint8, torch.float32):
        pipeline = torchvision_pipeline(spec, dtype, images.shape[-1])
        parts = [(range(i, min(i + 4, len(images))), pipeline) for i in range(0, len(images), 4)]
        found[f"torchvision {str(dtype)[6:]}"] = lambda run, parts=parts: pool.starmap(work, parts, chunksize=1)
    return found


def measure(functions, runs):
    """Name -> seconds of each run; the contestants alternate, after one run each that is not counted."""
    seconds = {name: [] for name in functions}
    for run in range(runs + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function(run)
            if run:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(theirs, ours):
    """The median of the ratios inside each run, since a shared machine drifts from run to run."""
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


def machine():
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else [platform.processor()]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__}
    about = {"cpu": f"{models[0]}, {os.cpu_count()} cores", "commit": commit.stdout.strip() or "unknown", **versions}
    return {**about, "command": " ".join(["python", *sys.argv])}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {"batch": 64, "size": 224, "runs": 11, "threads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    coarse = torch.rand(args.batch, 3, 14, 14, generator=torch.Generator().manual_seed(0))
    images = (torch.nn.functional.interpolate(coarse, args.size, mode="bilinear") * 255).to(torch.uint8)
    torch.set_num_threads(args.threads)
    rows = []
    batch = {"images": images.share_memory_(), "out": torch.zeros(images.shape).share_memory_()}
    with torch.multiprocessing.get_context("spawn").Pool(args.threads, start_worker, (batch,)) as pool:
        for recipe, spec in {"BYOL_1": BYOL_1, "BYOL_2": BYOL_2}.items():
            seconds = measure(contestants(spec, images, pool), args.runs)
            _, best = min((statistics.median(s), name) for name, s in seconds.items() if name != "geoaug")
            for name, s in seconds.items():
                ms = [round(1e3 * f(s), 1) for f in (statistics.median, min, max)]
                rows.append({"recipe": recipe, "what": name, "median_ms": ms[0], "min_ms": ms[1], "max_ms": ms[2],
                             "times_ours": round(ratio(s, seconds["geoaug"]), 2)})  # fmt: skip
            print(f"{recipe}: {ratio(seconds[best], seconds['geoaug']):.1f} times faster than {best}")
    about = {**machine(), "date": datetime.now(UTC).date().isoformat(), **vars(args)}
    lines = ["# BYOL's colour on a batch", "", "| recipe | | median ms | range | times ours |", "|---|---|---|---|---|"]
    lines += [f"| {r['recipe']} | {r['what']} | {r['median_ms']} | {r['min_ms']}-{r['max_ms']} | {r['times_ours']} |"
              for r in rows]  # fmt: skip
    lines += ["", *(f"* {name}: {value}" for name, value in about.items())]
    print("\n".join(lines))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "color.md").write_text("\n".join(lines) + "\n")
    (RESULTS / "color.json").write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()

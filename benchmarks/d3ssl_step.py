"""What a D3SSL step costs, and how much of it is not the network: data, choice of boxes, colours, composites.

python benchmarks/d3ssl_step.py [--data PATH] [--arch resnet50] [--size 224] [--batch-size 256] [--precision bf16]

Without --data, scenes are made, with their own objects as boxes. Steps run one after the other on one device; each part
is timed with the device waited for, so the parts add up to a little more than a step does.
"""

from __future__ import annotations

import argparse
import contextlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.record import save, spread
from geoaug import open_loader
from trainers import common, d3ssl

PARTS = ("data", "boxes", "views", "network", "update")


class Clock:
    """Seconds of each part of each step."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, {part: [0.0] for part in PARTS}

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Time what is done inside."""
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[part][-1] += time.perf_counter() - start


def measure(config: d3ssl.Config, data: Path, device: torch.device, steps: int) -> Clock:
    torch.manual_seed(0)
    model = common.prepare_model(d3ssl.Model(config), config, device)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01, momentum=0.9)
    mixed = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")
    clock, done = Clock(device), 0
    made, augment = [], d3ssl.augment
    d3ssl.augment = lambda *_: made[0]  # made outside of the forward, so that it can be timed apart
    try:
        with open_loader(
            data,
            d3ssl.recipe(config).views[:2],
            batch_size=config.batch_size,
            seed=0,
            device=device,
            workers=config.workers,
        ) as loader:
            while done < steps + 2:  # the first two compile and warm up
                iterator = iter(loader)
                while done < steps + 2:
                    for values in clock.seconds.values():
                        values.append(0.0)
                    with clock("data"):
                        batch = next(iterator, None)
                    if batch is None:
                        break
                    with clock("boxes"):
                        regions = d3ssl.find_regions(batch, config)
                        counts = torch.stack((regions.valid.sum(), regions.movable.sum())).float()
                    with clock("views"):
                        made[:] = [augment(batch, regions, config)]
                    with clock("network"):
                        with mixed:
                            loss, log = model(batch, regions, counts)
                        loss.backward()
                    with clock("update"):
                        optimizer.step()
                        optimizer.zero_grad()
                        common.move_teacher(model.teacher, model.student, config.ema)
                        keys = torch.cat(log["keys"][:2]).flatten(0, 1).float()
                        model.queue.enqueue(keys, log["keys"][2].repeat(2, 1).flatten())
                    done += 1
    finally:
        d3ssl.augment = augment
    clock.seconds = {part: [s for s in values if s > 0][2:] for part, values in clock.seconds.items()}
    return clock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=None, help="a .beton or json with boxes; scenes without it")
    parser.add_argument("--preset", default="demo", choices=list(d3ssl.PRESETS))
    parser.add_argument("--arch", default=None)
    parser.add_argument("--size", type=int, default=None)
    parser.add_argument("--batch-size", type=int, default=None)
    parser.add_argument("--precision", default=None, choices=["no", "bf16"])
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    names = ("arch", "size", "batch_size", "precision")
    config = replace(d3ssl.PRESETS[args.preset], **{n: getattr(args, n) for n in names if getattr(args, n) is not None})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as made:
        data = args.data
        if data is None:
            script = Path(__file__).resolve().parent.parent / "data_prep" / "make_scenes.py"
            count = str(max(256, 2 * config.batch_size))
            subprocess.run([sys.executable, str(script), "--out", made, "--images", count], check=True)
            data = Path(made) / "instances.json"
        clock = measure(config, data, device, args.steps)
    middle = {part: statistics.median(values) for part, values in clock.seconds.items()}
    whole = sum(middle.values())
    rows = [(f"{part} (ms)", spread([1000 * s for s in values], 1)) for part, values in clock.seconds.items()]
    rows += [
        ("step (ms), sum of the medians", f"{1000 * whole:.1f}"),
        ("images a second", f"{config.batch_size / whole:.1f}"),
        ("waiting for data, share of a step", f"{100 * middle['data'] / whole:.1f} %"),
        ("boxes and views, share of a step", f"{100 * (middle['boxes'] + middle['views']) / whole:.1f} %"),
        ("all but network and update, share of a step",
         f"{100 * (whole - middle['network'] - middle['update']) / whole:.1f} %"),
        ("arch, size, batch, precision, device",
         f"{config.arch}, {config.size}, {config.batch_size}, {config.precision}, {device.type}"),
    ]  # fmt: skip
    on_cpu = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    held = torch.cuda.max_memory_allocated() if device.type == "cuda" else on_cpu
    rows.append(("memory at the most (GB)", f"{held / 1e9:.2f}"))
    name = "d3ssl_step" if config == d3ssl.PRESETS["demo"] else f"d3ssl_step_{config.arch}_{config.size}"
    save(name, "A step of D3SSL", rows, {"seconds": clock.seconds})


if __name__ == "__main__":
    main()

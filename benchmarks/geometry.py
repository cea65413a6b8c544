"""Planning, matched boxes, correspondence and import time: `python benchmarks/geometry.py`."""

from __future__ import annotations

import argparse
import subprocess
import sys

import numpy as np
import torch
import torchvision

from benchmarks.record import alternate, ratio, save, spread
from geoaug import ViewSpec, correspond, matched_boxes, overlap_grid, plan_views, regions


def seconds_to_import(module: str) -> float:
    """Wall time of an import beyond torch's, in a fresh interpreter."""
    script = f"import torch, time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
    return float(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1_280_000, help="images of the large plan")
    parser.add_argument("--batch", type=int, default=4096, help="images of a batch of pairs")
    parser.add_argument("--runs", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)

    g = np.random.default_rng(0)
    sizes, ids = g.integers(300, 500, (args.images, 2)), g.integers(0, 2**62, args.images)
    specs = [ViewSpec(224, (0.2, 1.0)), ViewSpec(224, (0.2, 1.0))]
    loops = 2000
    image = torch.empty(1, 400, 400)
    get_params = torchvision.transforms.RandomResizedCrop.get_params

    def torchvision_loop() -> None:
        for _ in range(loops):
            get_params(image, [0.2, 1.0], [3 / 4, 4 / 3])

    planning = alternate(
        {
            "plan": lambda: plan_views(specs, sizes, ids, seed=0, epoch=0),
            "plan of 256": lambda: plan_views(specs, sizes[:256], ids[:256], seed=0, epoch=0),
            "get_params": torchvision_loop,
        },
        args.runs,
    )
    views = 2 * args.images
    per_view = {
        "plan": [s / views for s in planning["plan"]],
        "get_params": [s / loops for s in planning["get_params"]],
    }

    plan = plan_views(specs, sizes[: args.batch], ids[: args.batch], seed=0, epoch=0)
    stored = sum(t.numel() * t.element_size() for t in (plan.crop, plan.flipped, plan.source_size, plan.ids))
    a, b = plan.view_from_source[:, 0], plan.view_from_source[:, 1]
    both = (224, 224)
    pairs = alternate(
        {
            "matched_boxes, law=grid": lambda: matched_boxes(a, b, 10, sizes=both, key=plan.key),
            "matched_boxes, law=uniform": lambda: matched_boxes(a, b, 10, sizes=both, key=plan.key, law="uniform"),
            "overlap_grid, 7 x 7": lambda: overlap_grid(a, b, 7),
            "correspond, 7 x 7": lambda: correspond(a, b, (7, 7)),
            "draw_points, 4 x 4 grid, 16 x 16": lambda: regions.draw_points(a, 4, 16, 16, key=plan.key),
        },
        args.runs,
    )
    imports = [seconds_to_import("geoaug") for _ in range(5)]

    rows = [
        (f"plan of {args.images:,} images x 2 views, one core (s)", spread(planning["plan"], 1)),
        ("the same per view (ns)", spread(per_view["plan"], 1e9)),
        ("torchvision get_params in a loop, per view (ns)", spread(per_view["get_params"], 1e9)),
        ("times faster than get_params", ratio(per_view, "get_params", "plan")),
        ("plan of 256 images x 2 views (ms)", spread(planning["plan of 256"])),
        ("bytes stored a view", f"{stored / (2 * args.batch):.0f} (and 16 more once its map is asked for)"),
    ]
    rows += [(f"{name}, B = {args.batch}, one core (ms)", spread(values)) for name, values in pairs.items()]
    rows += [("`import geoaug` beyond `import torch` (s)", spread(imports, 1))]
    save("geometry", "Geometry", rows, {"planning": planning, "pairs": pairs, "imports": imports})


if __name__ == "__main__":
    main()

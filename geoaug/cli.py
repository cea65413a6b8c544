"""`geoaug doctor | inspect | stats | export`: what is installed, what a recipe does to images, backbones for others."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from . import export, inspection, recipes, store_pages, weights

_APT = "sudo apt-get install --no-install-recommends libturbojpeg0-dev libopencv-dev pkg-config g++"
_CONDA = "conda install -c conda-forge libjpeg-turbo opencv pkg-config cxx-compiler"
# Package, what it is for, the line that brings it.
_EXTRAS = (
    ("ffcv", "FFCV loaders", f"{_APT} (or: {_CONDA}), then pip install 'geoaug[ffcv]'"),
    ("pyarrow", "stores of proposals", "pip install 'geoaug[prep]'"),
    ("pycocotools", "masks of a COCO json", "pip install 'geoaug[prep]'"),
    ("accelerate", "trainers", "pip install 'geoaug[train]'"),
    ("matplotlib", "curves in reports", "pip install 'geoaug[train]'"),
    ("dask", "jobs on a cluster", "pip install 'geoaug[cluster]'"),
)


def doctor() -> int:
    """Print what is there, what is missing, and the line that brings it; 1 if the core itself does not work."""
    print(f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {os.cpu_count()} cores")
    for package in ("geoaug", "torch", "torchvision", "numba", "numpy", "jaxtyping"):
        print(f"  {package} {importlib.metadata.version(package)}")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"GPUs: {', '.join(gpus) or 'none seen by torch'}")
    for package, use, line in _EXTRAS:
        problem = _problem(package)
        print(f"  {package}: {use}: " + ("there" if problem is None else f"{problem}. {line}"))
    if shutil.which("pkg-config") and importlib.util.find_spec("ffcv") is None:
        missing = [n for n in ("opencv4", "libturbojpeg") if subprocess.run(["pkg-config", "--exists", n]).returncode]
        print(f"  libraries FFCV is built from: {'missing ' + ', '.join(missing) if missing else 'there'}")
    try:
        broken = _self_test()
    except Exception as error:  # whatever it is, the user must see it here and not in a training run
        broken = f"{type(error).__name__}: {error}"
    print(f"core: {'plans, renders and agrees with torchvision' if broken is None else 'BROKEN: ' + broken}")
    return 0 if broken is None else 1


def _problem(package: str) -> str | None:
    if importlib.util.find_spec(package) is None:
        return "missing"
    try:
        importlib.import_module(package)
    except Exception as error:  # a package that is there and cannot be imported is what people need to know of
        return f"does not import ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
    return None


def _self_test() -> str | None:
    """One view against torchvision's own resize; what is wrong, or None."""
    from torchvision.transforms.v2.functional import resized_crop

    from .geometry.plan import plan_views
    from .geometry.views import ViewSpec
    from .pixels.render import render

    image = torch.arange(50 * 70 * 3, dtype=torch.int32).remainder(251).to(torch.uint8).reshape(50, 70, 3)
    plan = plan_views([ViewSpec(32)], [(50, 70)], [1], seed=0, epoch=0)
    x0, y0, x1, y1 = plan.crop[0, 0].tolist()
    expected = resized_crop(image.permute(2, 0, 1), y0, x0, y1 - y0, x1 - x0, [32, 32], antialias=True)
    expected = expected.flip(-1) if plan.flipped[0, 0] else expected
    return None if torch.equal(render(image, plan)[0], expected) else "a rendered view differs from torchvision's"


def inspect(args: argparse.Namespace) -> int:
    """Write pictures and a page of a recipe on the user's images, or of a store's boxes on them."""
    if store_pages.is_store(args.path):
        written = store_pages.make_store_pages(args.path, args.out, count=args.count, images=args.images)
        return _wrote(written, "boxes")
    recipe = recipes.recipe(args.preset)
    recipe = recipe if args.size is None else recipe.at(args.size)
    options = {"count": args.count, "seed": args.seed, "images": args.images, "proposals": args.proposals}
    return _wrote(inspection.make_pages(args.path, recipe, args.out, **options), args.preset)


def _wrote(written: inspection.Written, what: str) -> int:
    files = " and ".join(str(path) for path in written.paths)
    kinds = Counter(kind for kind, _ in written.failures.values())
    print(f"inspect: wrote {files}: {what} on {written.images} images, {_failures(kinds)}")
    return 0


def _failures(kinds: Counter[str]) -> str:
    listed = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    return f"{kinds.total()} failures" + (f" ({listed})" if listed else "")


def stats(args: argparse.Namespace) -> int:
    """Print what the geometry of a recipe amounts to."""
    recipe = recipes.recipe(args.preset)
    boxes = valid = None
    failed: list[str] = []
    if args.data is None:
        sizes = np.tile([[480, 640], [480, 640], [640, 480]], (-(-args.count // 3), 1))[: args.count]
        print(f"{args.preset} on {len(sizes):,} made-up images, two of three 640 x 480 and one 480 x 640")
    else:
        sizes, failed, source = inspection.sizes_of(args.data, args.images)
        boxes, valid = inspection.boxes_of(source, args.proposals)
        known = sizes[:, 0] > 0
        sizes, boxes, valid = sizes[known][: args.count], boxes[known][: args.count], valid[known][: args.count]
        print(f"{args.preset} on the sizes of {len(sizes):,} images of {args.data}")
    rows = inspection.stats(recipe, sizes, seed=args.seed, boxes=boxes, valid=valid)
    width = max(len(what) for what, _ in rows)
    for what, figure in rows:
        print(f"{what:<{width}}  {figure}")
    for name in failed[:10]:
        print(f"not an image: {name}", file=sys.stderr)
    print(
        f"stats: {len(sizes):,} images planned, {_failures(Counter({'not an image': len(failed)} if failed else {}))}"
    )
    return 0


def write_export(args: argparse.Namespace) -> int:
    """Write a trained backbone for another tool."""
    count = export.write_backbone(weights.read_backbone(args.run), args.to, args.out, box_head=args.box_head)
    print(f"export: wrote {args.out}, {count} tensors for {args.to}, 0 failures")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0 on success, 2 on wrong usage, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="geoaug", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="what is installed, what is missing, and the line that brings it")
    look = commands.add_parser("inspect", help="pictures of what a recipe does to your images")
    look.add_argument("path", type=Path, help="a folder of images, a list of paths, a COCO json, or a store")
    look.add_argument("--out", type=Path, default=Path("runs/inspect"), help="folder for the page and the sheet")
    look.add_argument("--size", type=int, default=None, help="size of the largest view, instead of the recipe's")
    numbers = commands.add_parser("stats", help="overlaps, valid cells and box sizes of a recipe; touches no pixel")
    numbers.add_argument("--data", type=Path, default=None, help="take the images' sizes from here")
    for command, count in ((look, 4), (numbers, 30_000)):
        command.add_argument("--preset", default="scrl", choices=list(recipes.RECIPES), help="whose recipe")
        command.add_argument("--count", type=int, default=count, help="at most so many images")
        command.add_argument(
            "--images", type=Path, default=None, help="where a list's, json's or store's photographs lie"
        )
        command.add_argument(
            "--proposals", type=Path, default=None, help="a store of proposals to show instead of objects"
        )
        command.add_argument("--seed", type=int, default=0, help="another seed, other views")
    give = commands.add_parser("export", help="a trained backbone for another tool")
    give.add_argument("run", type=Path, help="a run folder, a checkpoint, a .pth or a .safetensors")
    give.add_argument("--to", required=True, choices=get_args(export.Format), help="whose names")
    give.add_argument("--out", type=Path, required=True, help="the file to write")
    give.add_argument("--box-head", action="store_true", help="detectron2: C5 as the box head of a C4 model alone")
    args = parser.parse_args(arguments)
    try:
        if args.command in ("inspect", "stats") and args.count < 1:
            raise ValueError(f"--count must be at least 1, got {args.count}")
        run = {"doctor": lambda _: doctor(), "inspect": inspect, "stats": stats, "export": write_export}
        return run[args.command](args)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print(f"geoaug {args.command}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

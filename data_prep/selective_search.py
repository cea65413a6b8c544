"""Region proposals of many images into a store, by selective search; it may be stopped at any moment and started again.

    python data_prep/selective_search.py IMAGES --out STORE [--preset d3ssl|soco|strategies] [--workers N] [--limit N]
        [--images DIR] [--repair] [--cluster ADDRESS|local] [--timeout S] [--from-soco FILE.json]

IMAGES is a folder, a list, a COCO json or a .beton; boxes are in pixels of the source, also where a .beton holds it
made smaller. Presets: `d3ssl` and `soco` are the regions of the package `selectivesearch` at 300 / 0.9 / 100 (`soco`
with its texture repaired), duplicates dropped and SoCo's filter applied with its fallbacks; `strategies` is the paper's
method with several colours and scales, ranked and unfiltered. An image that cannot be read, crashes its process or
takes too long is recorded in the manifest and left out. The same images and parameters give the same bytes for any
number of workers, here or on a cluster. `--from-soco` writes no new boxes but those of SoCo's own file.
"""

import argparse
import os
import sys
import time
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import geoaug
from data_prep.proposal_work import PRESETS, encode, open_images, sizes_by_name, work_of
from data_prep.shard_crew import CrewError
from data_prep.shards import Job, JobError, Made, hash_of, run
from geoaug import ProposalStore, selective_search
from geoaug.proposals.shard_files import write_manifest

_COCO = 118_287  # images of train2017, the yardstick of how long a run takes
_ENGINES = {
    "geoaug": ("numba",),
    "selectivesearch": ("selectivesearch", "scikit-image"),
    "opencv": ("opencv-contrib-python",),
}


def _versions(engine: str) -> dict[str, str]:
    """What the boxes may depend on besides the parameters."""
    versions = {"geoaug": geoaug.__version__}
    for package in ("numpy", "torchvision", "pyarrow", *_ENGINES[engine]):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # OpenCV's wheels have several names
            versions[package] = "unknown"
    return versions


def _number(kind: type, least: float, most: float) -> Any:
    def parse(text: str) -> Any:
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"expected {least:g} to {most:g}, got {text}")
        return value

    parse.__name__ = "whole number" if kind is int else "number"  # argparse names it in "invalid ... value"
    return parse


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="selective_search.py", description=__doc__.split("\n")[0])
    what = "a folder of images, a list of paths, a COCO json or a .beton"
    parser.add_argument("source", metavar="IMAGES", type=Path, help=what)
    parser.add_argument("--out", type=Path, required=True, help="the store, a folder")
    parser.add_argument("--preset", choices=list(PRESETS), default="d3ssl", help="whose boxes (d3ssl)")
    parser.add_argument("--workers", type=_number(int, 1, 1024), help="processes (one a core)")
    parser.add_argument("--limit", type=_number(int, 1, 2**40), help="only the first N images")
    parser.add_argument("--images", type=Path, help="where a list's or json's images lie")
    parser.add_argument(
        "--timeout", type=_number(float, 0.1, 1e6), default=120.0, help="seconds an image may take (120)"
    )
    parser.add_argument("--repair", action="store_true", help="make shards anew that are damaged")
    parser.add_argument("--cluster", metavar="ADDRESS", help="a Dask scheduler to run on, or `local` for one here")
    parser.add_argument("--shard-size", type=_number(int, 1, 10**6), default=1000, help="images a shard (1000)")
    parser.add_argument("--engine", choices=list(_ENGINES), default="geoaug", help="what searches (geoaug)")
    parser.add_argument("--strategies", choices=("single", "fast", "quality"), help="of --preset strategies (fast)")
    parser.add_argument(
        "--scale", type=_number(float, 1e-6, 1e9), help="of the first segmentation, instead of the preset's"
    )
    parser.add_argument("--sigma", type=_number(float, 0, 100), help="of its Gaussian")
    parser.add_argument("--min-size", type=_number(int, 0, 2**31 - 1), help="pixels a first region has at least")
    parser.add_argument("--max-side", type=_number(int, 1, 8192), help="longer images are shrunk to it for the search")
    parser.add_argument("--from-soco", metavar="FILE", type=Path, help="take the boxes of SoCo's json instead")
    return parser


def _search(args: argparse.Namespace, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The arguments of `selective_search`, tried once, so that what cannot work is told before anything starts."""
    search = {**PRESETS[args.preset][0], "engine": args.engine}
    for name in ("strategies", "scale", "sigma", "min_size", "max_side"):
        value = getattr(args, name)
        if value is not None and (name != "strategies" or args.preset == "strategies"):
            search[name] = value
        elif value is not None:
            parser.error(f"--strategies is of --preset strategies, not of {args.preset}")
    try:
        selective_search(np.zeros((9, 9, 3), dtype=np.uint8), **search)
    except (ValueError, ImportError) as error:
        parser.error(str(error))
    return search


def _write(args: argparse.Namespace, images: Any, search: dict[str, Any], workers: int) -> tuple[ProposalStore, Made]:
    filtered = PRESETS[args.preset][1]
    about = {
        "made_by": "selective_search", "preset": args.preset, "engine": args.engine, "parameters": search,
        "filter": "ratio3size0308" if filtered else "none", "duplicates": "dropped, the first kept",
    }  # fmt: skip
    names, items = images.names[: args.limit], images.items[: args.limit]
    job = Job(args.out, names, items, work_of(search, filtered), encode, about, _versions(args.engine), args.shard_size)
    made = run(job, workers=workers, timeout=args.timeout, repair=args.repair, cluster=args.cluster)
    failures: dict[str, list[list[str]]] = {}
    for entry in made.entries:
        for name, kind, reason in entry["failures"]:
            failures.setdefault(kind, []).append([name, reason])
    shards = [{key: value for key, value in entry.items() if key != "failures"} for entry in made.entries]
    if not any(shard["images"] for shard in shards):
        first = next(([kind, *found[0]] for kind, found in failures.items()), None)
        raise JobError(f"no image could be searched, such as {first}")
    images_facts = {"count": len(names), "hash": hash_of(names)}
    manifest = {**about, "versions": made.versions, "images": images_facts, "failures": failures}
    write_manifest(args.out, shards, manifest)
    return ProposalStore.open(args.out), made


def _import(args: argparse.Namespace) -> ProposalStore:
    sizes, failed = sizes_by_name(args.source, args.images)
    if failed:
        print(f"selective_search: {len(failed)} images cannot be read, such as {failed[:3]}", file=sys.stderr)
    return ProposalStore.from_soco(args.from_soco, args.out, sizes, shard_size=args.shard_size)


def _told(store: ProposalStore, out: Path) -> str:
    """The last line: what was written, how many of what, and how many failures of which kind."""
    images, boxes = store.manifest["counts"]["images"], store.manifest["counts"]["boxes"]
    size = sum(shard["bytes"] for shard in store.manifest["shards"])
    empty = int((np.diff(store.offsets) == 0).sum())
    kinds = Counter({kind: len(found) for kind, found in store.manifest["failures"].items()})
    failures = ", ".join(f"{number} failed: {kind}" for kind, number in sorted(kinds.items())) or "0 failures"
    return (
        f"selective_search: wrote {out}: {images:,} images, {boxes:,} boxes, {boxes / max(images, 1):.1f} an image and "
        f"{size / max(boxes, 1):.2f} bytes each, {empty:,} images without a box, {failures}"
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command line; its exit status: 0 where a store was written, 2 wrong usage, 130 Ctrl-C, 1 otherwise."""
    parser = _parser()
    args = parser.parse_args(argv)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = args.workers or cores
    try:
        if args.from_soco is not None:
            print(_told(_import(args), args.out))
            return 0
        search = _search(args, parser)
        images = open_images(args.source, args.images)
    except (OSError, ImportError, ValueError) as error:
        parser.error(str(error).removeprefix("open_loader: "))
    for kind, names in images.problems.items():
        print(f"selective_search: {len(names)} x {kind}, such as {names[:3]}", file=sys.stderr)
    started = time.monotonic()
    try:
        store, made = _write(args, images, search, workers)
    except (JobError, CrewError, OSError, ImportError, RuntimeError, MemoryError, ValueError) as error:
        print(f"selective_search: stopped, {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("selective_search: stopped by the keyboard; the same command goes on from here", file=sys.stderr)
        return 130
    seconds = time.monotonic() - started
    if made.fresh:
        rate = made.fresh / seconds
        print(
            f"{made.fresh:,} images in {seconds:,.0f} s, {rate:.1f} a second with {workers} workers; at that rate COCO "
            f"train2017 ({_COCO:,} images) takes {_COCO / rate / 3600:.1f} hours"
        )
    print(_told(store, args.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())

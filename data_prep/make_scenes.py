"""A procedural multi-object data set in COCO's format: many shapes, exact boxes and masks, no download.

    python data_prep/make_scenes.py --out DIR [--images 5000] [--size 320] [--seed 0]

writes DIR/images/000000.jpg ... and DIR/instances.json (16 classes, 3 to 12 objects an image, boxes and masks of what
is visible). The same arguments give the same bytes for any number of workers. DIR/manifest.json holds the arguments;
instances.json is written last, so a folder that has it is whole.
"""

import argparse
import functools
import io
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from data_prep.coco_rle import rle_of
from data_prep.scene_layout import LARGEST, NAMES, SMALLEST, SceneSpec, make_scene

VERSION = 2  # raised when the same arguments start to give other bytes
OUR_IMAGE = re.compile(r"\d{6}\.jpg(\.part)?")  # the names this script gives, and so the only ones it deletes


class Made(NamedTuple):
    """What a worker says of one image: its entry, its annotations (ids to come), or why it failed."""

    image: dict[str, Any]
    annotations: list[dict[str, Any]]
    failure: str | None


def annotate(labels: np.ndarray, classes: list[int], image_id: int) -> list[dict[str, Any]]:
    """COCO annotations, without ids, of the visible pixels of each object of a label map int16 [h, w]."""
    annotations = []
    for label, chosen in enumerate(classes, 1):
        mask = labels == label
        columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
        x, y = int(columns[0]), int(rows[0])
        annotations.append(
            {
                "image_id": image_id,
                "category_id": chosen + 1,
                "bbox": [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y],
                "area": int(np.count_nonzero(mask)),
                "iscrowd": 0,
                "segmentation": rle_of(mask),
            }
        )
    return annotations


def write_whole(path: Path, data: bytes) -> None:
    """Write `path` in one step: it is absent or whole, never half."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def write_image(index: int, *, spec: SceneSpec, quality: int, folder: Path) -> Made:
    """Make scene `index` and write its JPEG into `folder`; a write that fails is told, not raised."""
    scene = make_scene(index, spec)
    height, width = scene.labels.shape
    entry = {"id": index, "file_name": f"{index:06d}.jpg", "width": width, "height": height}
    jpeg = io.BytesIO()
    Image.fromarray(scene.image).save(jpeg, "JPEG", quality=quality)
    try:
        write_whole(folder / entry["file_name"], jpeg.getvalue())
    except OSError as error:
        return Made(entry, [], error.strerror or str(error))
    return Made(entry, annotate(scene.labels, scene.classes, index), None)


def _all_images(count: int, workers: int, task: functools.partial[Made]) -> Iterator[Made]:
    """The images in order, made in this process (workers=1) or in shards of 16 by `workers` processes."""
    if workers == 1:
        yield from map(task, range(count))
        return
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(["data_prep.make_scenes"])  # imports once, not once a worker
    with ProcessPoolExecutor(workers, context) as pool:
        yield from pool.map(task, range(count), chunksize=16)


def _with_progress(made: Iterator[Made], total: int) -> Iterable[Made]:
    if not sys.stderr.isatty():
        return made
    try:
        from tqdm import tqdm
    except ImportError:
        return made
    return tqdm(made, total=total, unit="image")


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _clear(out: Path) -> None:
    """Delete what an earlier run wrote, the mark of completeness first."""
    (out / "instances.json").unlink(missing_ok=True)
    for image in (out / "images").glob("*.jpg*"):
        if OUR_IMAGE.fullmatch(image.name):
            image.unlink()
    (out / "manifest.json").unlink(missing_ok=True)


def _read_manifest(out: Path) -> Any:
    """What the manifest says, None where there is none of this script's."""
    try:
        manifest = json.loads((out / "manifest.json").read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and manifest.get("made_by") == "make_scenes" else None


def _is_whole(out: Path, count: int) -> bool:
    names = {file.name for file in (out / "images").glob("*.jpg")}
    return (out / "instances.json").is_file() and all(f"{index:06d}.jpg" in names for index in range(count))


def make_scenes(out: Path, count: int, spec: SceneSpec, *, quality: int, workers: int) -> tuple[int, dict[str, int]]:
    """Write the data set to `out`; the number of objects, and how many images failed for which reason."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    images, annotations, failures = [], [], {}
    annotate(*make_scene(0, spec)[1:], 0)  # compiles once, into numba's cache, before workers read it
    task = functools.partial(write_image, spec=spec, quality=quality, folder=out / "images")
    for made in _with_progress(_all_images(count, workers, task), count):
        if made.failure is not None:
            failures[made.failure] = failures.get(made.failure, 0) + 1
        images.append(made.image)
        annotations += [{"id": len(annotations) + i, **entry} for i, entry in enumerate(made.annotations, 1)]
    if not failures:
        categories = [{"id": i, "name": name} for i, name in enumerate(NAMES, 1)]
        info = {"description": "procedural scenes", "version": VERSION, **asdict(spec)}
        coco = {"info": info, "images": images, "categories": categories, "annotations": annotations}
        write_whole(out / "instances.json", _json(coco))
    return len(annotations), failures


def _whole_number(least: int, most: int) -> Any:
    def parse(text: str) -> int:
        value = int(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"expected {least} to {most}, got {value}")
        return value

    parse.__name__ = "whole number"  # argparse names it in "invalid ... value"
    return parse


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make_scenes.py", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write, made where it is missing")
    parser.add_argument("--images", type=_whole_number(1, 10**6), default=5000, help="number of images (5000)")
    parser.add_argument(
        "--size", type=_whole_number(96, 2048), default=320, help="longer side in pixels (320); ratios are 3:4 to 4:3"
    )
    parser.add_argument(
        "--usual-colors",
        action="store_true",
        help="give each class a hue of its own, an easier set; else colours tell nothing",
    )
    parser.add_argument("--seed", type=_whole_number(0, 2**32 - 1), default=0, help="another seed, other scenes (0)")
    parser.add_argument("--quality", type=_whole_number(50, 100), default=90, help="JPEG quality (90)")
    parser.add_argument("--no-cooccurrence", action="store_true", help="draw every object's class alike")
    parser.add_argument("--no-position-prior", action="store_true", help="put the objects of every class anywhere")
    parser.add_argument(
        "--objects",
        type=_whole_number(1, 12),
        nargs=2,
        default=(3, 12),
        metavar=("FEWEST", "MOST"),
        help="objects of an image (3 12); fewer are larger",
    )
    parser.add_argument(
        "--radius", type=float, nargs=2, default=(SMALLEST, LARGEST), metavar=("SMALLEST", "LARGEST"),
        help="of an object, in shares of the longer side (0.065 0.21)",
    )  # fmt: skip
    parser.add_argument("--workers", type=_whole_number(1, 256), default=None, help="processes (one a core)")
    parser.add_argument("--overwrite", action="store_true", help="replace what other arguments wrote to --out")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; its exit status: 0 success, 2 wrong usage, 1 otherwise."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.objects[0] > args.objects[1]:
        parser.error(f"--objects must be FEWEST and MOST, got {args.objects[0]} {args.objects[1]}")
    if not 0.01 <= args.radius[0] <= args.radius[1] <= 0.5:
        parser.error(
            f"--radius must be SMALLEST and LARGEST within 0.01 and 0.5, got {args.radius[0]} {args.radius[1]}"
        )
    spec = SceneSpec(
        args.seed,
        args.size,
        not args.no_cooccurrence,
        not args.no_position_prior,
        *args.objects,
        *args.radius,
        args.usual_colors,
    )
    manifest = {
        "made_by": "make_scenes",
        "version": VERSION,
        "images": args.images,
        "quality": args.quality,
        **asdict(spec),
    }
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(args.workers or cores, -(-args.images // 16))
    try:
        if args.out.exists() and not args.out.is_dir():
            parser.error(f"--out {args.out} is not a folder")
        before = _read_manifest(args.out)
        if before == manifest and _is_whole(args.out, args.images):
            print(f"make_scenes: nothing to do, {args.out} already holds {args.images} images of these arguments")
            return 0
        if before is None and args.out.exists() and any(args.out.iterdir()):
            parser.error(f"--out {args.out} holds files but no manifest.json of this script: choose another folder")
        if before is not None and before != manifest:
            if not args.overwrite:
                parser.error(f"--out {args.out} was made with other arguments: add --overwrite or choose another")
            _clear(args.out)
        args.out.mkdir(parents=True, exist_ok=True)
        write_whole(args.out / "manifest.json", _json(manifest))
        objects, failures = make_scenes(args.out, args.images, spec, quality=args.quality, workers=workers)
    except (OSError, BrokenExecutor) as error:
        print(f"make_scenes: stopped, {error}", file=sys.stderr)
        return 1
    reasons = "".join(f", {number} failed: {reason}" for reason, number in failures.items()) or ", 0 failures"
    made = args.images - sum(failures.values())
    print(f"make_scenes: wrote {args.out}: {made} images, {objects} objects of {len(NAMES)} classes{reasons}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

"""OpenImage-MINI, the data set of D3SSL: the images of Open Images whose objects follow COCO's, chosen and downloaded.

    python data_prep/build_openimage_mini.py --boxes oidv6-train-annotations-bbox.csv --out DIR
        --classes class-descriptions-boxable.csv [--coco instances_train2017.json] [--images 146000] [--seed 0]
        [--download DIR] [--max-side 500] [--strict] ...

The paper's two rules (section 5.1): a chosen image has an object of a class that COCO has as well, and at no moment
have the chosen images more objects of such a class than COCO. Images come in an order made of the seed and their ids.
Files of boxes of any version (V4 to V7, also gzipped) and split will do; without --coco the limits are the counts of
train2017, which ship with the tool. DIR gets image_ids.txt (for Open Images' own downloader), instances.json (COCO),
statistics.json, statistics.html and manifest.json, the same bytes for the same inputs. --download gets the images
from the public bucket, or what is missing of them, and fills the sizes into instances.json.
"""

import argparse
import sys
import threading
import time
from collections import Counter
from importlib import metadata
from typing import Any

from data_prep.image_download import QUALITY, Downloaded, Wanted, download
from data_prep.image_server import check_address
from data_prep.openimages_arguments import arguments, prepared
from data_prep.openimages_boxes import CsvError, Read, read_boxes
from data_prep.openimages_choice import Choice, Rules, choose, compile_kernels, without_repeats
from data_prep.openimages_classes import Classes, Shared
from data_prep.openimages_outputs import fingerprint, hex_ids, image_ids, instances, write_json, write_parts
from data_prep.openimages_statistics import page, statistics
from data_prep.shards import JobError, alone


def _tell_problems(read: Read, strict: bool) -> None:
    """The first bad rows by line, and how many of which kind."""
    problems = read.problems
    for line, reason in problems.first:
        print(f"build_openimage_mini: line {line}: {reason}", file=sys.stderr)
    total, kinds = problems.kinds.total(), ", ".join(f"{n:,} x {kind}" for kind, n in sorted(problems.kinds.items()))
    if total:
        more = f"and {total - len(problems.first):,} more; " if total > len(problems.first) else ""
        print(f"build_openimage_mini: {more}{total:,} bad rows: {kinds}", file=sys.stderr)
    if total and strict:
        raise CsvError(f"{total:,} bad rows under --strict")


def _parameters(args: argparse.Namespace, split: str) -> dict[str, Any]:
    """What the outputs depend on besides the files, without where anything lies."""
    names = ("images", "seed", "match", "group_of", "depictions", "min_side")
    parameters = {"split": split, **{name: getattr(args, name) for name in names}}
    if args.download is not None:
        parameters |= {"address": args.address.rstrip("/"), "max_side": args.max_side}
        parameters |= {} if args.max_side is None else {"jpeg_quality": args.jpeg_quality or QUALITY}
    return parameters


def _manifest(args: argparse.Namespace, read: Read, choice: Choice, shared: Shared, split: str) -> dict[str, Any]:
    versions = {}
    for package in ("geoaug", "numpy", "numba", "pyarrow"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "unknown"
    inputs = {"boxes": {"name": args.boxes.name, "bytes": read.bytes, "sha256": read.sha256}}
    for name in ("classes", "coco", "table", "exclude"):
        file = getattr(args, name)
        if file is not None:
            inputs[name] = {"name": file.name, **fingerprint(file)}
    return {
        "made_by": "build_openimage_mini",
        "versions": versions,
        "parameters": _parameters(args, split),
        "inputs": inputs,
        "rows": {"good": int(choice.kept.sum()), "bad": dict(sorted(read.problems.kinds.items()))},
        "images_by_fate": choice.fates,
        "categories_without_a_class": shared.unmatched,
        "rows_of_the_table_without_use": shared.ignored,
    }


def _build(args: argparse.Namespace, classes: Classes, shared: Shared, rules: Rules, split: str) -> int:
    """Read, choose, write, download: the exit status."""
    started = time.monotonic()
    threading.Thread(target=compile_kernels, daemon=True).start()
    read = read_boxes(args.boxes, classes)
    kept = without_repeats(read.boxes, read.problems)
    _tell_problems(read, args.strict)
    choice = choose(read.boxes, kept, shared, rules, args.images, args.seed)
    if not len(choice.images):
        raise CsvError(f"no image can be chosen: {', '.join(f'{n:,} {fate}' for fate, n in choice.fates.items())}")
    rows, seconds = len(kept), time.monotonic() - started
    print(f"{rows:,} rows of {len(read.boxes.ids):,} images read and chosen from in {seconds:.1f} s")
    found, ids = statistics(read.boxes, choice, classes, shared), hex_ids(read.boxes.ids[choice.images])
    args.out.mkdir(parents=True, exist_ok=True)
    with alone(args.out):
        (args.out / "manifest.json").unlink(missing_ok=True)  # it is written last: where it is, all is there
        outputs = {
            "image_ids.txt": write_parts(args.out / "image_ids.txt", image_ids(ids, split)),
            "statistics.json": write_json(args.out / "statistics.json", found),
            "statistics.html": write_parts(args.out / "statistics.html", [page(found)]),
        }
        got: Downloaded | None = None
        if args.download is not None:
            address = check_address(args.address)
            pace = args.connections, args.retries, args.timeout
            got = download(
                Wanted(ids, split, args.download, address, *pace, args.max_side, args.jpeg_quality or QUALITY)
            )
        sizes = None if got is None else got.images
        parts = instances(read.boxes, choice, classes, shared, ids, sizes)
        outputs["instances.json"] = write_parts(args.out / "instances.json", parts)
        manifest = {**_manifest(args, read, choice, shared, split), "outputs": outputs}
        if got is not None:
            manifest["download"] = {
                "images": {identity: got.images[identity]._asdict() for identity in sorted(got.images)},
                "missing": got.missing,
                "failures": {kind: got.failures[kind] for kind in sorted(got.failures)},
            }
        write_json(args.out / "manifest.json", manifest)
    bad = read.problems.kinds.total()
    told = (
        f"build_openimage_mini: wrote {args.out}: {len(ids):,} images of {args.images:,}, {found['objects']:,} "
        f"objects, {found['objects_per_image']:.1f} and {found['classes_per_image']:.2f} classes an image, "
        f"{found['classes']} classes, {bad:,} bad rows left out"
    )
    return _tell_images(args, got, told)


def _tell_images(args: argparse.Namespace, got: Downloaded | None, told: str) -> int:
    """The last lines and the exit status: 1 where images may still be had."""
    if got is None:
        print(told)
        return 0
    if got.stopped:
        print(f"build_openimage_mini: stopped, {got.stopped}; the same command goes on from here", file=sys.stderr)
    for kind, found in [
        ("missing", [(identity, "not on the server") for identity in got.missing]),
        *got.failures.items(),
    ]:
        for identity, reason in found[:10]:
            print(f"build_openimage_mini: {identity}: {kind}: {reason}", file=sys.stderr)
    json, images, store = args.out / "instances.json", args.download / "images", args.out / "proposals"
    print(
        f"next: python data_prep/selective_search.py {json} --images {images} --out {store} && python data_prep/"
        f"write_beton.py {json} --images {images} --proposals {store} --out {args.out / 'openimage_mini.beton'}"
    )
    kinds = Counter({kind: len(found) for kind, found in got.failures.items()})
    failures = ", ".join(f"{number:,} failed: {kind}" for kind, number in sorted(kinds.items())) or "0 failures"
    print(
        f"{told}; {args.download}: {len(got.images):,} images, {got.fetched:,} of them new, "
        f"{len(got.missing):,} not on the server, {failures}"
    )
    return 1 if got.failures or got.stopped else 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line; its exit status: 0 where all was written, 2 wrong usage, 130 Ctrl-C, 1 otherwise."""
    parser = arguments(__doc__.split("\n")[0])
    args = parser.parse_args(argv)
    try:
        what = prepared(args)
    except (OSError, ImportError, ValueError) as error:
        parser.error(str(error))
    for names, kind in ((what[1].unmatched, "categories without a class"), (what[1].ignored, "unused rows of --table")):
        if names:
            told = ", ".join(names[:10]) + (" ..." if len(names) > 10 else "")
            print(f"build_openimage_mini: {len(names)} {kind}: {told}", file=sys.stderr)
    try:
        return _build(args, *what)
    except (ImportError, ValueError) as error:
        parser.error(str(error))
    except (CsvError, JobError, OSError, RuntimeError, MemoryError) as error:
        print(f"build_openimage_mini: stopped, {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("build_openimage_mini: stopped by the keyboard; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

"""Parts of COCO: 1, 5 and 10 % of the images, and the 27 coarse classes of COCO-Stuff.

    python data_prep/coco_subsets.py subsets instances_train2017.json --out DIR [--shares 1 5 10]
    python data_prep/coco_subsets.py coarse instances_val2017.json --stuff stuff_val2017.json --out DIR [--list FILE]
    python data_prep/coco_subsets.py coarse instances_val2017.json --pixelmaps stuffthingmaps/val2017 --out DIR

`subsets` takes the images whose ids have the smallest hashes (BLAKE2b of the id in decimals), so that a smaller share
lies inside a larger one and anyone can say who belongs to it. For each share it writes NAME-1pct.txt, the file names,
fit for `--data` and `--list`; NAME-1pct.ids.txt, COCO's ids; and NAME-1pct.json, the annotations of those images.

`coarse` writes NAME-coarse27.json: every labelled pixel under one of 27 classes (data_prep/coco_coarse.py), in COCO's
format, for `evaluate.py unsupervised-segmentation`. Crowds are areas of their class like others. `--list` keeps the
images a file names, one a line, by file name, stem or id. DIR/manifest.json holds the arguments and is written last.
"""

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_prep.coco_coarse import FINE, NAMES, THINGS, categories
from data_prep.coco_rle import rle_of
from data_prep.shards import write_atomically

VERSION = 1  # raised when the same arguments start to give other files
NO_STUFF = "has no labels of stuff (categories 92 to 182): give --stuff stuff_*.json or --pixelmaps DIR of COCO-Stuff"
Record = dict[str, Any]


class InputError(Exception):
    """What makes an input no input; told in one line."""


def read(file: Path) -> Record:
    """A COCO json."""
    try:
        record = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} is no COCO json: {error}") from None
    lists = [record.get(kind) for kind in ("images", "annotations", "categories")] if isinstance(record, dict) else []
    if not lists or not all(isinstance(x, list) and all(isinstance(y, dict) for y in x) for x in lists):
        raise InputError(f"{file} is no COCO json: it must have lists of images, annotations and categories")
    needed = {"images": ("id", "file_name", "height", "width"), "annotations": ("image_id", "category_id")}
    for kind, names in needed.items():
        for at, entry in enumerate(record[kind]):
            missing = [name for name in names if name not in entry]
            if missing:
                raise InputError(f"{file} is no COCO json: {kind}[{at}] has no {missing[0]!r}")
    if not record["images"]:
        raise InputError(f"{file} lists no images")
    return record


def hash_of(image_id: Any) -> bytes:
    """What images are sorted by: BLAKE2b of the id as text."""
    return hashlib.blake2b(str(image_id).encode(), digest_size=8).digest()


def chosen(images: list[Record], share: float) -> list[Record]:
    """The share (%) of the images with the smallest hashes, at least one, in the json's order."""
    count = max(1, round(len(images) * share / 100))
    kept = {image["id"] for image in sorted(images, key=lambda image: hash_of(image["id"]))[:count]}
    return [image for image in images if image["id"] in kept]


def listed(images: list[Record], file: Path) -> list[Record]:
    """The images that the lines of a file name, by file name, stem or id; a line that names none is an error."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--list {file}: {error}") from None
    wanted = {line for line in lines if line}
    names = [{image["file_name"], Path(image["file_name"]).stem, str(image["id"])} for image in images]
    unknown = sorted(wanted - set().union(*names))
    if unknown or not wanted:
        raise InputError(
            f"--list {file} must name images, got {len(unknown)} lines that name none, such as {unknown[:2]}"
        )
    return [image for image, mine in zip(images, names, strict=True) if mine & wanted]


def check_categories(file: Path, record: Record) -> None:
    """COCO's own ids are taken for granted, so a json with others (1 to 80, say) is told."""
    for entry in record["categories"]:
        fine = FINE.get(entry.get("id"))  # 183, what COCO's stuff json calls other, is of no coarse class
        said = (entry.get("supercategory"), entry.get("name"))
        if fine is not None and NAMES[fine.coarse] != said[0] and fine.name != said[1]:
            raise InputError(f"{file}: category {entry['id']} must be COCO's {fine.name!r}, got {said[1]!r}")


def of_jsons(images: list[Record], records: list[Record]) -> list[Record]:
    """Annotations under coarse classes, those of the images kept."""
    kept = {image["id"] for image in images}
    made = []
    for entry in (entry for record in records for entry in record["annotations"]):
        fine = FINE.get(entry["category_id"])
        if fine is not None and entry["image_id"] in kept and entry.get("segmentation"):
            area = {name: entry[name] for name in ("bbox", "area") if name in entry}
            made.append({"image_id": entry["image_id"], "category_id": fine.coarse + 1, "iscrowd": 0,
                         "segmentation": entry["segmentation"], **area})  # fmt: skip
    return made


def of_pixelmap(image: Record, folder: Path) -> list[Record] | str:
    """One annotation for each coarse class of a map of fine ids less 1 (255: unlabelled), or why there is none."""
    file = folder / f"{Path(image['file_name']).stem}.png"
    try:
        with Image.open(file) as picture:
            fine = np.asarray(picture)
    except FileNotFoundError:
        return "pixelmap missing"
    except (OSError, SyntaxError, ValueError):
        return "pixelmap unreadable"
    if fine.shape != (image["height"], image["width"]):
        return "pixelmap of another size"
    coarse_of = np.zeros(256, dtype=np.uint8)
    for number, member in FINE.items():
        coarse_of[number - 1] = member.coarse + 1
    coarse, made = coarse_of[fine.astype(np.uint8)], []
    for category in np.unique(coarse[coarse > 0]).tolist():
        mask = coarse == category
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        x, y = int(columns[0]), int(rows[0])
        made.append({"image_id": image["id"], "category_id": category, "iscrowd": 0, "segmentation": rle_of(mask),
                     "bbox": [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y],
                     "area": int(mask.sum())})  # fmt: skip
    return made


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def subsets(args: argparse.Namespace, things: Record) -> Iterator[tuple[str, bytes, str]]:
    """Files of each share: name, bytes, and what to say of it."""
    for share in sorted(set(args.shares)):
        images = chosen(things["images"], share)
        ids = {image["id"] for image in images}
        annotations = [entry for entry in things["annotations"] if entry["image_id"] in ids]
        stem = f"{args.annotations.stem}-{share:g}pct"
        yield f"{stem}.txt", "".join(f"{image['file_name']}\n" for image in images).encode(), f"{len(images)} images"
        yield f"{stem}.ids.txt", "".join(f"{image['id']}\n" for image in images).encode(), ""
        yield f"{stem}.json", _json({**things, "images": images, "annotations": annotations}), ""


def coarse(args: argparse.Namespace, things: Record, failures: Counter[str]) -> Iterator[tuple[str, bytes, str]]:
    """The json of coarse classes; `failures` counts images that are left out."""
    images = things["images"] if args.list is None else listed(things["images"], args.list)
    if args.pixelmaps is not None:
        found = [(image, of_pixelmap(image, args.pixelmaps)) for image in images]
        failures.update(made for _, made in found if isinstance(made, str))
        images = [image for image, made in found if not isinstance(made, str)]
        annotations = [entry for _, made in found if not isinstance(made, str) for entry in made]
        if not images:
            raise InputError(f"--pixelmaps {args.pixelmaps} has a map of none of the images: {dict(failures)}")
    else:
        records = [things] if args.stuff is None else [things, read(args.stuff)]
        for file, record in zip((args.annotations, args.stuff), records, strict=False):
            check_categories(file, record)
        annotations = of_jsons(images, records)
    if not any(entry["category_id"] > THINGS for entry in annotations):
        raise InputError(f"{args.pixelmaps or args.stuff or args.annotations} {NO_STUFF}")
    annotations = [{"id": i, **entry} for i, entry in enumerate(annotations, 1)]
    whole = {"info": {"description": "COCO-Stuff, 27 coarse classes", "version": VERSION}, "images": images,
             "categories": categories(), "annotations": annotations}  # fmt: skip
    there = len({entry["category_id"] for entry in annotations})
    said = f"{len(images)} images, {len(annotations)} areas of {there} classes"
    yield f"{args.annotations.stem}-coarse27.json", _json(whole), said


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 100:
        raise argparse.ArgumentTypeError(f"expected a share in (0, 100] %, got {text}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="coco_subsets.py", description=__doc__.split("\n")[0])
    tasks = parser.add_subparsers(dest="task", required=True)
    one = tasks.add_parser("subsets", help="1, 5 and 10 % of the images, by hash of their ids")
    two = tasks.add_parser("coarse", help="27 coarse classes of things and stuff")
    for each in (one, two):
        each.add_argument("annotations", type=Path, help="COCO's instances_*.json")
        each.add_argument("--out", type=Path, required=True, help="folder to write, made where it is missing")
        each.add_argument("--overwrite", action="store_true", help="make anew, in place of what --out holds")
    one.add_argument("--shares", type=_share, nargs="+", default=[1.0, 5.0, 10.0], help="in %% (1 5 10)")
    two.add_argument("--stuff", type=Path, help="COCO-Stuff's stuff_*.json")
    two.add_argument("--pixelmaps", type=Path, help="COCO-Stuff's maps of things and stuff, PNG, in place of --stuff")
    two.add_argument("--list", type=Path, help="keep the images of this file: a name, stem or id a line")
    return parser


def _about(args: argparse.Namespace) -> Record:
    """The arguments, files by name and content."""
    facts: Record = {"made_by": "coco_subsets", "version": VERSION}
    for name, value in sorted(vars(args).items()):
        if isinstance(value, Path) and name != "out":
            sha = hashlib.sha256(value.read_bytes()).hexdigest() if value.is_file() else None
            facts[name] = {"name": value.name, "sha256": sha}
        elif name not in ("out", "overwrite"):
            facts[name] = value
    return facts


def main(argv: list[str] | None = None) -> int:
    """Run the command line; its exit status: 0 success, 2 wrong usage, 1 otherwise."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.task == "coarse" and args.stuff is not None and args.pixelmaps is not None:
        parser.error("--stuff and --pixelmaps exclude each other: the maps hold things and stuff")
    mark, failures = args.out / "manifest.json", Counter[str]()
    try:
        for file in (args.annotations, getattr(args, "stuff", None), getattr(args, "list", None)):
            if file is not None and not file.is_file():
                parser.error(f"{file} is no file")
        about = _about(args)
        before = json.loads(mark.read_bytes()) if mark.is_file() else None
        if before is not None and not args.overwrite:
            if {k: v for k, v in before.items() if k not in ("files", "failures")} == about:
                print(f"coco_subsets: nothing to do, {args.out} already holds {', '.join(before['files'])}")
                return 0
            parser.error(f"--out {args.out} was made with other arguments: add --overwrite or choose another")
        things = read(args.annotations)
        files = list(subsets(args, things) if args.task == "subsets" else coarse(args, things, failures))
        args.out.mkdir(parents=True, exist_ok=True)
        mark.unlink(missing_ok=True)
        for name in before["files"] if before is not None else []:
            (args.out / Path(name).name).unlink(missing_ok=True)
        for name, data, _ in files:
            write_atomically(args.out / name, data)
        write_atomically(mark, _json({**about, "files": [name for name, _, _ in files], "failures": dict(failures)}))
    except InputError as error:
        parser.error(str(error))
    except (OSError, ValueError) as error:
        print(f"coco_subsets: stopped, {error}", file=sys.stderr)
        return 1
    told = ", ".join(f"{name}: {said}" for name, _, said in files if said)
    lost = "".join(f", {count} failed: {kind}" for kind, count in sorted(failures.items())) or ", 0 failures"
    print(f"coco_subsets: wrote {args.out}: {told}{lost}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

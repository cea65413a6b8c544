"""The arguments of build_openimage_mini.py, checked before the large file is read."""

import argparse
import re
from pathlib import Path
from typing import Any

from data_prep.image_server import check_address
from data_prep.openimages_choice import Rules
from data_prep.openimages_classes import (
    MATCHES,
    TABLE,
    Classes,
    Shared,
    published,
    read_classes,
    read_shared,
    read_target,
)

ADDRESS = "https://open-images-dataset.s3.amazonaws.com"
SPLITS = ("train", "validation", "test")
_LISTED = re.compile(r"(?:(?:train|validation|test)/)?([0-9a-f]{16})(?:\.jpg)?")


def _number(kind: type, least: float, most: float) -> Any:
    def parse(text: str) -> Any:
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"expected {least:g} to {most:g}, got {text}")
        return value

    parse.__name__ = "whole number" if kind is int else "number"  # argparse names it in "invalid ... value"
    return parse


def arguments(about: str) -> argparse.ArgumentParser:
    """The options of the command line."""
    parser = argparse.ArgumentParser(prog="build_openimage_mini.py", description=about)
    add = parser.add_argument
    add("--boxes", type=Path, required=True, help="Open Images' CSV of boxes, such as oidv6-train-annotations-bbox.csv")
    add("--classes", type=Path, required=True, help="class-descriptions-boxable.csv")
    add("--coco", type=Path, help="the target, a COCO json (the published counts of train2017)")
    add("--out", type=Path, required=True, help="folder for what is written")
    add("--images", type=_number(int, 1, 2**31), default=146_000, help="how many to choose at most (146000)")
    add("--seed", type=_number(int, 0, 2**32 - 1), default=0, help="of the order of the images (0)")
    add("--split", choices=SPLITS, help="which the file of boxes is of (told by its name)")
    add("--table", type=Path, default=TABLE, help="which class is which category (openimages_coco.csv, here)")
    add("--match", choices=list(MATCHES), default="kinds", help="rows of the table that count: also kinds of a thing")
    count = ("count", "skip")
    add("--group-of", choices=count, default="count", help="boxes around a group as an object, crowds too (count)")
    add("--depictions", choices=count, default="count", help="drawings, statues and the like as objects (count)")
    side = "least width and height of a box that counts, as a share of its image's (0)"
    add("--min-side", type=_number(float, 0, 1), default=0.0, help=side)
    add("--exclude", type=Path, help="a list of image ids that may not be chosen")
    add("--strict", action="store_true", help="stop where a row of --boxes is bad, instead of leaving it out")
    add("--download", metavar="DIR", type=Path, help="get the images into DIR/images")
    add("--address", default=ADDRESS, help=f"where from ({ADDRESS})")
    add("--connections", type=_number(int, 1, 512), default=64, help="at a time (64)")
    add("--retries", type=_number(int, 0, 100), default=5, help="more tries for an image after a failed one (5)")
    add("--timeout", type=_number(float, 0.1, 3600), default=60.0, help="seconds an image may take (60)")
    add("--max-side", type=_number(int, 16, 65500), help="make longer images smaller as they come")
    add("--jpeg-quality", type=_number(int, 1, 100), help="of those (90)")
    return parser


def _split(args: argparse.Namespace) -> str:
    found = [split for split in SPLITS if split in args.boxes.name]
    if args.split is None and len(found) != 1:
        raise ValueError(f"--split must be given, {args.boxes.name} says none of {', '.join(SPLITS)}")
    return args.split or found[0]


def _excluded(file: Path | None) -> frozenset[int]:
    if file is None:
        return frozenset()
    ids = set()
    for number, line in enumerate(file.read_text(encoding="utf-8-sig", errors="backslashreplace").split("\n"), 1):
        if line.strip():
            found = _LISTED.fullmatch(line.strip())
            if not found:
                raise ValueError(f"--exclude must list ids of 16 hex digits, got {file} line {number}: {line[:60]!r}")
            ids.add(int(found[1], 16))
    return frozenset(ids)


def prepared(args: argparse.Namespace) -> tuple[Classes, Shared, Rules, str]:
    """All that is wrong with the arguments is told here, before the large file is read."""
    check_address(args.address)
    for given in (args.out, args.download):
        if given is not None and given.exists() and not given.is_dir():
            raise ValueError(f"--out and --download must be folders, {given} is none")
    if args.max_side is not None and args.download is None:
        raise ValueError("--max-side is of --download, which is not given")
    if args.jpeg_quality is not None and args.max_side is None:
        raise ValueError("--jpeg-quality is of --max-side, which is not given")
    if not args.boxes.is_file():
        raise FileNotFoundError(f"--boxes must be a CSV, got {args.boxes}: no such file")
    crowds = args.group_of == "count"
    rules = Rules(crowds, args.depictions == "count", args.min_side, _excluded(args.exclude))
    classes = read_classes(args.classes)
    target = published(crowds=crowds) if args.coco is None else read_target(args.coco, crowds=crowds)
    return classes, read_shared(args.table, classes, target, args.match), rules, _split(args)

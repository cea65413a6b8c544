"""Photographs into one .beton, FFCV's file format: decoded once while writing, so that what is stored can be read.

    python data_prep/write_beton.py IMAGES --out FILE.beton [--proposals STORE] [--slots N] [--max-resolution 500]
        [--jpeg-quality 90] [--workers N] [--images DIR] [--overwrite]

IMAGES is a folder, a list or a COCO json. A JPEG that fits is stored byte for byte; everything else is decoded,
made smaller where its longer side exceeds --max-resolution, and encoded. Boxes are those of --proposals, else the
json's objects without crowds, else none. Images that cannot be read are left out, counted, and named in the file's
manifest. The same arguments give the same bytes for any number of workers.
"""

import argparse
import functools
import multiprocessing
import os
import signal
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch

import geoaug
from data_prep.beton_file import BetonFile, Sample
from data_prep.beton_samples import Boxes, Job, Prepared, Proposals, prepare
from geoaug.loading.beton_format import MOST_SLOTS
from geoaug.loading.folder import failure_text
from geoaug.loading.source import Source, open_source

_SHARD = 16  # images a worker is given at a time
_PAGE, _LARGE_PAGE = 2**23, 2**25  # bytes; large ones where images keep their size


class Written(NamedTuple):
    """How many of what a file was given."""

    samples: int
    notes: Counter[str]  # of conversions, by kind
    dropped: int  # boxes beyond the slots
    lacking: int  # images that the store of proposals does not have
    failures: list[tuple[str, str, str]]  # name, kind, reason


def _shard(jobs: list[Job], *, max_resolution: int | None, quality: int) -> list[Prepared]:
    return [prepare(job, max_resolution=max_resolution, quality=quality) for job in jobs]


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends them
    torch.set_num_threads(1)


def _in_order(jobs: list[Job], workers: int, task: functools.partial[list[Prepared]]) -> Iterator[Prepared]:
    """What comes of the jobs, in their order; workers stay a bounded number of shards ahead of the consumer."""
    shards = (jobs[i : i + _SHARD] for i in range(0, len(jobs), _SHARD))
    if workers == 1:
        for shard in shards:
            yield from task(shard)
        return
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(["data_prep.write_beton"])  # imports once, not once a worker
    ahead: deque[Future[list[Prepared]]] = deque()
    with ProcessPoolExecutor(workers, context, _start_worker) as pool:
        try:
            for shard in shards:
                ahead.append(pool.submit(task, shard))
                if len(ahead) > 3 * workers:
                    yield from ahead.popleft().result()
            while ahead:
                yield from ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _with_progress(prepared: Iterator[Prepared], total: int) -> Iterable[Prepared]:
    if not sys.stderr.isatty():
        return prepared
    try:
        from tqdm import tqdm
    except ImportError:
        return prepared
    return tqdm(prepared, total=total, unit="image")


def write_beton(
    source: Source,
    out: Path,
    *,
    proposals: Proposals | None = None,
    slots: int | None = None,
    max_resolution: int | None = 500,
    quality: int = 90,
    workers: int = 1,
    page_size: int | None = None,
) -> Written:
    """Write the images of a source to `out`; nothing is left there where it stops half-way or no image can be read."""
    boxes = Boxes(source, proposals)
    room = slots or max([1, *boxes.counts])
    if room > MOST_SLOTS:
        raise ValueError(f"slots must be at most {MOST_SLOTS}, got an image with {room} boxes: choose --slots")
    jobs = [Job(source.root / name, size) for name, size in zip(source.names, boxes.sizes, strict=True)]
    task = functools.partial(_shard, max_resolution=max_resolution, quality=quality)
    page = page_size or (_LARGE_PAGE if max_resolution is None else _PAGE)
    notes, dropped, failures = Counter[str](), 0, list[tuple[str, str, str]]()
    with BetonFile(out, len(source), room, page) as file, closing(_in_order(jobs, workers, task)) as results:
        for row, made in enumerate(_with_progress(results, len(jobs))):
            name = source.names[row]
            if made.failure is not None:
                failures.append((name, *made.failure))
                continue
            filled, classes, count = boxes.padded(row, room)
            identity, label = int(source.ids[row]), int(source.labels[row])
            sample = Sample(name, identity, label, made.jpeg, made.stored, made.source, filled, classes, count)
            if not file.add(sample):
                failures.append(
                    (name, "too large", f"{len(made.jpeg):,} bytes and its boxes exceed a page of {page:,}")
                )
                continue
            notes.update(made.notes)
            dropped += boxes.counts[row] - count
        if not len(file):
            raise ValueError(f"no image could be stored:\n{failure_text(failures)}")
        by_kind: dict[str, list[tuple[str, str]]] = {}
        for name, kind, reason in failures:
            by_kind.setdefault(kind, []).append((name, reason))
        manifest = {
            "made_by": "write_beton",
            "geoaug": geoaug.__version__,
            "samples": len(file),
            "slots": room,
            "max_resolution": max_resolution,
            "jpeg_quality": quality,
            "boxes": boxes.kind,
            "boxes_dropped": dropped,
            "store": None if proposals is None else proposals.manifest,
            "images_without_proposals": boxes.lacking,
            "classes": source.classes,
            "categories": source.objects.categories if source.objects and boxes.kind == "objects" else (),
            "conversions": dict(sorted(notes.items())),
            "failures": by_kind,
            "problems": source.problems,
        }
        file.finish(manifest)
        return Written(len(file), notes, dropped, len(boxes.lacking), failures)


def _whole_number(least: int, most: int) -> Any:
    def parse(text: str) -> int:
        value = int(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"expected {least} to {most}, got {value}")
        return value

    parse.__name__ = "whole number"  # argparse names it in "invalid ... value"
    return parse


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="write_beton.py", description=__doc__.split("\n")[0])
    parser.add_argument(
        "source", metavar="IMAGES", type=Path, help="a folder of images, a list of paths, or a COCO json"
    )
    parser.add_argument("--out", type=Path, required=True, help="the .beton to write")
    parser.add_argument("--proposals", type=Path, default=None, help="a store whose boxes to write with the images")
    parser.add_argument(
        "--slots", type=_whole_number(1, MOST_SLOTS), help="boxes an image may have (as many as any has)"
    )
    side = "longer side of what is stored (500); 0: as it is"
    parser.add_argument("--max-resolution", type=_whole_number(0, 65500), default=500, help=side)
    parser.add_argument("--jpeg-quality", type=_whole_number(1, 100), default=90, help="of what is encoded (90)")
    parser.add_argument("--workers", type=_whole_number(1, 256), default=None, help="processes (one a core)")
    parser.add_argument("--images", type=Path, default=None, help="where a list's or json's images lie")
    parser.add_argument("--overwrite", action="store_true", help="replace --out where it exists")
    return parser


def _open_proposals(path: Path, source: Source) -> Proposals:
    try:
        from geoaug.proposals.store import ProposalStore
    except ImportError as error:
        raise ValueError(f"--proposals cannot be read: {error}") from None
    store = ProposalStore.open(path)
    store.check_covers(source.ids, source.names)
    return store


def main(argv: list[str] | None = None) -> int:
    """Run the command line; its exit status: 0 where a file was written, 2 wrong usage, 1 otherwise."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.out.suffix != ".beton" or args.out.is_dir():
        parser.error(f"--out must be a file that ends in .beton, got {args.out}")
    if args.out.exists() and not args.overwrite:
        parser.error(f"--out {args.out} exists: add --overwrite or choose another")
    try:
        source = open_source(args.source, args.images)
        proposals = None if args.proposals is None else _open_proposals(args.proposals, source)
    except (OSError, ImportError, ValueError) as error:
        parser.error(str(error).removeprefix("open_loader: "))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for kind, names in source.problems.items():
        print(f"write_beton: {len(names)} x {kind}, such as {names[:3]}", file=sys.stderr)
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        written = write_beton(
            source, args.out, proposals=proposals, slots=args.slots, max_resolution=args.max_resolution or None,
            quality=args.jpeg_quality, workers=min(args.workers or cores, -(-len(source) // _SHARD)),
        )  # fmt: skip
    except (OSError, BrokenExecutor, RuntimeError, MemoryError, ValueError) as error:
        print(f"write_beton: stopped, {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("write_beton: stopped by the keyboard", file=sys.stderr)
        return 1
    if written.failures:
        print(f"write_beton: left out:\n{failure_text(written.failures)}", file=sys.stderr)
    kinds = Counter(kind for _, kind, _ in written.failures)
    reasons = ", ".join(f"{number} failed: {kind}" for kind, number in kinds.items()) or "0 failures"
    lacking = f", {written.lacking} images without proposals" if written.lacking else ""
    print(
        f"write_beton: wrote {args.out}: {written.samples} samples, {written.notes['re-encoded']} re-encoded, "
        f"{written.dropped} boxes dropped{lacking}, {reasons}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Selective search on one core: geoaug against the PyPI package `selectivesearch` and OpenCV, alternating in one run.

    python benchmarks/proposals.py --images IMAGES [--coco JSON] [--opencv-python PYTHON]

OpenCV's contrib wheel replaces the one other packages need, so it is asked through its own Python: a virtual
environment with opencv-contrib-python. Its times are measured inside that process, on the same pixels.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import record
import torch
from torch.nn.functional import interpolate
from torchvision.io import ImageReadMode, read_image

from geoaug.proposals.selective_search import selective_search

TRAIN2017 = 118_287
MODES = ("single", "fast")
AT = (100, 500, 1000)  # numbers of boxes to compare at
GATES = {"selectivesearch": 20.0, "single": 4.0, "fast": 4.0}
PEER = """
import sys, time, cv2, numpy
cv2.setNumThreads(1)
folder = sys.argv[1]
for line in sys.stdin:
    name, mode = line.split()
    image = numpy.load(f"{folder}/{name}.npy")
    start = time.perf_counter()
    search = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
    search.setBaseImage(numpy.ascontiguousarray(image[:, :, ::-1]))
    search.switchToSingleStrategy(200, 0.8) if mode == "single" else search.switchToSelectiveSearchFast(150, 150, 0.8)
    rects = numpy.asarray(search.process())
    seconds = time.perf_counter() - start
    rects[:, 2:] += rects[:, :2]
    numpy.save(f"{folder}/boxes.npy", rects)
    print(seconds, flush=True)
"""


def load(files, side=None):
    """uint8 [H, W, 3] of each file, the longer side brought to `side`."""
    images = []
    for file in files:
        image = read_image(str(file), ImageReadMode.RGB)
        share = side / max(image.shape[1:]) if side else 1.0
        if share != 1.0:
            size = [max(1, round(length * share)) for length in image.shape[1:]]
            image = interpolate(image[None], size, mode="bilinear", antialias=True)[0]
        images.append(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    return images


@contextlib.contextmanager
def opencv(python):
    """A function (image, mode) -> (boxes, seconds), answered by OpenCV in its own process; None without a Python."""
    if python is None:
        print("benchmarks/proposals.py: no --opencv-python, so OpenCV is not measured")
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [python, "-c", PEER, folder]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

            def ask(image, mode):
                np.save(f"{folder}/image.npy", image)
                process.stdin.write(f"image {mode}\n")
                process.stdin.flush()
                line = process.stdout.readline()
                if not line:
                    sys.exit("benchmarks/proposals.py: OpenCV's process ended; has its Python opencv-contrib-python?")
                return np.load(f"{folder}/boxes.npy"), float(line)

            yield ask
            process.stdin.close()


def clocked(function, *args, **options):
    start = time.perf_counter()
    function(*args, **options)
    return time.perf_counter() - start


def compare_package(images, runs):
    """Name -> seconds an image, of each run; nothing is timed that is not the same, rectangle for rectangle."""
    seconds = {"selectivesearch": [], "geoaug": []}
    for image in images:
        assert np.array_equal(selective_search(image), selective_search(image, engine="selectivesearch"))
    for _ in range(runs):
        spent = {"selectivesearch": [], "geoaug": []}
        for image in images:
            spent["selectivesearch"].append(clocked(selective_search, image, engine="selectivesearch"))
            selective_search(image)  # the package has emptied the caches; a run over a folder has not
            spent["geoaug"].append(statistics.median(clocked(selective_search, image) for _ in range(3)))
        for name, values in spent.items():
            seconds[name].append(statistics.fmean(values))
    return seconds


def ours(image, mode):
    return selective_search(image, sigma=0.8, mode="strategies", strategies=mode)


def compare_opencv(images, ask, mode, runs):
    seconds = {"OpenCV": [], "geoaug": []}
    ours(images[0], mode)
    for _ in range(runs):
        spent = {"OpenCV": [], "geoaug": []}
        for image in images:
            spent["OpenCV"].append(ask(image, mode)[1])
            ours(image, mode)
            spent["geoaug"].append(statistics.median(clocked(ours, image, mode) for _ in range(3)))
        for name, values in spent.items():
            seconds[name].append(statistics.fmean(values))
    return seconds


def best_overlaps(boxes, objects):
    """[n, G]: the best overlap (intersection over union) of each object with the first 1, 2, ... n boxes."""
    a, b = boxes.astype(float)[:, None], objects[None]
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    common = sides.clip(0).prod(axis=-1)
    areas = [(x[..., 2:] - x[..., :2]).prod(axis=-1) for x in (a, b)]
    return np.maximum.accumulate(common / (areas[0] + areas[1] - common), axis=0)


def truth(file):
    """File name -> (boxes [G, 4], categories [G]) of a COCO json without crowds, and the mean area of the originals."""
    content = json.loads(file.read_text())
    found = {}
    for thing in content["annotations"]:
        x, y, w, h = thing["bbox"]
        if not thing.get("iscrowd") and min(w, h) >= 1:
            found.setdefault(thing["image_id"], []).append((x, y, x + w, y + h, thing["category_id"]))
    entries = content["images"]
    areas = [e.get("orig_width", e["width"]) * e.get("orig_height", e["height"]) for e in entries]
    rows = {entry["file_name"]: np.array(found[entry["id"]]) for entry in entries if entry["id"] in found}
    return {name: (r[:, :4], r[:, 4]) for name, r in rows.items()}, statistics.fmean(areas)


def compare_overlap(folder, objects, ask, mode, count):
    """Number of boxes -> engine -> (mean best overlap over objects, mean over classes), in points."""
    names = sorted(objects)
    names = names[:: max(1, len(names) // count)][:count]
    overlaps, numbers, labels = {}, {"OpenCV": [], "geoaug": []}, []
    for name, image in zip(names, load([folder / name for name in names]), strict=True):
        found = {"OpenCV": ask(image, mode)[0], "geoaug": ours(image, mode)}
        fewest = min(map(len, found.values()))
        labels.append(objects[name][1])
        for engine, boxes in found.items():
            numbers[engine].append(len(boxes))
            best = best_overlaps(boxes, objects[name][0])
            for at in (*AT, "the fewer"):
                last = (fewest if at == "the fewer" else min(at, len(boxes))) - 1
                overlaps.setdefault(at, {}).setdefault(engine, []).append(best[last])
    labels = np.concatenate(labels)

    def means(parts):
        values = 100 * np.concatenate(parts)
        return float(values.mean()), float(np.mean([values[labels == label].mean() for label in np.unique(labels)]))

    figures = {at: {engine: means(parts) for engine, parts in of.items()} for at, of in overlaps.items()}
    return figures, {engine: statistics.fmean(values) for engine, values in numbers.items()}, len(names)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--coco", type=Path, help="COCO json of those photographs, for the overlap with its boxes")
    parser.add_argument("--opencv-python", help="a Python that has opencv-contrib-python")
    parser.add_argument("--runs", type=int, default=5, help="alternating runs")
    parser.add_argument("--count", type=int, default=8, help="photographs to time")
    parser.add_argument("--overlap-count", type=int, default=150, help="photographs to compare boxes on")
    args = parser.parse_args()
    torch.set_num_threads(1)
    files = sorted(args.images.rglob("*.jpg"))
    files = files[:: max(1, len(files) // args.count)][: args.count]
    if not files:
        sys.exit(f"benchmarks/proposals.py: no .jpg under {args.images}")
    table, raw, missed = [], {}, []
    objects, area = truth(args.coco) if args.coco else (None, 0.0)

    def note(what, seconds, peer, gate):
        raw[what] = seconds
        reached = statistics.median(a / b for a, b in zip(seconds[peer], seconds["geoaug"], strict=True))
        for name, values in seconds.items():
            table.append((f"{what}, {name}", f"{record.spread(values)} ms"))
        table.append((f"{what}, {peer} / geoaug (gate {gate:g})", record.ratio(seconds, peer, "geoaug")))
        missed.extend([what] if reached < gate else [])

    for side in (224, 300, 500):
        images = load(files, side)
        seconds = compare_package(images, args.runs)
        note(f"compat 300/.9/100, {side} px", seconds, "selectivesearch", GATES["selectivesearch"])
    pixels = statistics.fmean(image.shape[0] * image.shape[1] for image in images)
    each = statistics.median(seconds["geoaug"])
    table.append((f"COCO train2017 at 500 px, {TRAIN2017:,} images, compat", f"{each * TRAIN2017 / 60:.0f} min a core"))
    if area:
        minutes = each * area / pixels * TRAIN2017 / 60
        table.append((f"the same at the originals' {area / 1e6:.2f} million pixels", f"{minutes:.0f} min a core"))
    with opencv(args.opencv_python) as ask:
        for mode in MODES if ask else ():
            note(f"strategies={mode}, 500 px", compare_opencv(images, ask, mode, args.runs), "OpenCV", GATES[mode])
            if objects is None:
                continue
            figures, numbers, count = compare_overlap(args.images, objects, ask, mode, args.overlap_count)
            raw[f"overlap {mode}"] = {"points": {str(k): v for k, v in figures.items()}, "boxes": numbers}
            for at, of in figures.items():
                shown = "; ".join(f"{engine} {a:.2f} ({c:.2f} over classes)" for engine, (a, c) in of.items())
                table.append((f"strategies={mode}, mean best overlap, {at} boxes, {count} photographs", shown))
                if of["geoaug"][0] < of["OpenCV"][0] - 0.5:
                    missed.append(f"overlap {mode} at {at}")
            table.append((f"strategies={mode}, boxes", "; ".join(f"{k} {v:.0f}" for k, v in numbers.items())))
    record.save("proposals", f"Selective search of {len(files)} photographs on one core", table, raw)
    if missed:
        sys.exit(f"benchmarks/proposals.py: below its gate: {', '.join(missed)}")


if __name__ == "__main__":
    main()

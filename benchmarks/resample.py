"""Crop and antialiased resize of uint8 images on one core: geoaug against torch and OpenCV, alternating in one process.

Hot, as when an image has just been decoded: every view is made four times in a row, and the first is not timed.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import record
import torch
from torch.nn.functional import interpolate

from geoaug import ViewSpec, plan_views
from geoaug.pixels.render import render
from geoaug.pixels.resample import VECTOR, resample, scratch_bytes

try:
    import cv2

    cv2.setNumThreads(1)
except ImportError:
    cv2 = None

CASES = {
    "random crop to 224": ViewSpec(224),
    "whole image to 224": ViewSpec.whole(224, flip=0.5),
    "random crop to 112": ViewSpec(112),
    "local crop to 96": ViewSpec(96, scale=(0.05, 0.14)),
    "whole image to 48": ViewSpec.whole(48),
}


def load(folder, count):
    """Photographs of side 500 at most, or smooth noise of their usual size where there is no folder."""
    if folder is None:
        generator = torch.Generator().manual_seed(0)
        coarse = torch.randint(0, 256, (count, 3, 40, 50), dtype=torch.uint8, generator=generator)
        fine = interpolate(coarse, (396, 462), mode="bilinear", antialias=True)
        return list(fine.permute(0, 2, 3, 1).contiguous().numpy())
    if cv2 is None:
        sys.exit("benchmarks/resample.py: --images is read by OpenCV: pip install opencv-python-headless")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in (".jpg", ".jpeg", ".png"))
    images = []
    for file in files[:: max(1, len(files) // count)][:count]:
        image = cv2.cvtColor(cv2.imread(str(file)), cv2.COLOR_BGR2RGB)
        share = min(1.0, 500 / max(image.shape))
        images.append(cv2.resize(image, None, fx=share, fy=share, interpolation=cv2.INTER_AREA) if share < 1 else image)
    if not images:
        sys.exit(f"benchmarks/resample.py: no .jpg or .png under {folder}")
    return images


def contenders(images, spec):
    """Name -> function that makes the view of image n."""
    plan = plan_views([spec], [x.shape[:2] for x in images], range(len(images)), seed=0, epoch=0)
    rows, (h, w) = list(plan), plan.view_sizes[0]
    crops, flips = plan.crop[:, 0].tolist(), plan.flipped[:, 0].int().tolist()
    tensors = [torch.from_numpy(x).permute(2, 0, 1)[None] for x in images]  # channels last, torch's fastest
    scratch = np.empty(max(scratch_bytes(*x.shape[:2], h, w) for x in images), np.uint8)
    out = np.empty((3, h, w), np.uint8)

    def kernel(n):
        memory, target, (height, width, _) = scratch.ctypes.data, out.ctypes.data, images[n].shape
        resample(images[n].ctypes.data, height, width, *crops[n], flips[n], memory, target, h, w, int(VECTOR))
        return out

    def torchs(n):
        x0, y0, x1, y1 = crops[n]
        return interpolate(tensors[n][:, :, y0:y1, x0:x1], (h, w), mode="bilinear", antialias=True)

    def opencv(n):
        x0, y0, x1, y1 = crops[n]
        return cv2.resize(images[n][y0:y1, x0:x1], (w, h), interpolation=cv2.INTER_AREA)

    for n in range(len(images)):  # nothing is timed that is not right: 0 levels
        expected = torchs(n)[0].numpy()
        assert np.array_equal(kernel(n), expected[:, :, ::-1] if flips[n] else expected)
    ours = {"kernel": kernel, "render": lambda n: render(images[n], rows[n])}
    return {"torch": torchs} | ours | ({"cv2 INTER_AREA": opencv} if cv2 else {})


def measure(functions, count, runs):
    """Name -> seconds a view, of each run (the median over its images, since others use this machine too)."""
    seconds = {name: [] for name in functions}
    for _ in range(runs):
        spent = {name: [] for name in functions}
        for n in range(count):
            for name, function in functions.items():
                function(n)
                start = time.perf_counter()
                for _ in range(3):
                    function(n)
                spent[name].append((time.perf_counter() - start) / 3)
        for name, values in spent.items():
            seconds[name].append(statistics.median(values))
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, help="folder of photographs; default: 128 images made here")
    parser.add_argument("--runs", type=int, default=7, help="alternating runs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    images, table, raw = load(args.images, 128), [], {}
    for case, spec in CASES.items():
        raw[case] = seconds = measure(contenders(images, spec), len(images), args.runs)
        for name, values in seconds.items():
            faster = "" if name == "torch" else f"; {record.ratio(seconds, 'torch', name)} times as fast as torch"
            table.append((f"{case}, {name}", f"{record.spread(values)} ms{faster}"))
    kind = "photographs" if args.images else "images made here"
    record.save("resample", f"Resampling {len(images)} {kind} on one core", table, {"seconds a view": raw})


if __name__ == "__main__":
    main()

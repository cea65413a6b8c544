"""Region composites: time of a batch, and how far de-positioning moves boxes: `python benchmarks/composites.py`.

With GEOAUG_DATA, the folder of real photographs, it also measures the shifts of their objects and proposals.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.record import alternate, ratio, save, spread
from geoaug import Key, boxes, open_loader, read_image, recipes
from geoaug.pixels.composites import (
    block_derangement,
    cutout_masks,
    free_boxes,
    jitter_boxes,
    shift_composite,
    window_masks,
)
from geoaug.proposals import select
from tests import reference

SIZE, K, CELL = (224, 224), 4, 16
DTYPES = {"uint8": torch.uint8, "float16": torch.float16, "float32": torch.float32}


def operators(images: Tensor, given: Tensor, valid: Tensor, key: Key) -> dict[str, Callable[[], object]]:
    """What D3SSL does to a batch, one by one and together; draws come from a key on the CPU.

    The composite is written to fresh memory, and to a buffer that the caller keeps from step to step.
    """
    rows, kept = block_derangement(key).to(images.device), torch.empty_like(images)
    masks = {
        "PRC": lambda: cutout_masks(given, valid, SIZE, key=key.fold("a")),
        "PRM": lambda: window_masks(given, valid, SIZE, key=key.fold("b")),
        "RBJ": lambda: jitter_boxes(given, key=key.fold("c")),
    }
    pasted = {
        "composite": lambda: shift_composite(images, given, valid, rows, key=key.fold("d")),
        "composite, out=": lambda: shift_composite(images, given, valid, rows, key=key.fold("d"), out=kept),
    }
    together = {name.replace("composite", "together"): partial(_all, [*masks.values(), last])
                for name, last in pasted.items()}  # fmt: skip
    return {**masks, **pasted, **together}


def _all(functions: list[Callable[[], object]]) -> None:
    for function in functions:
        function()


def loop(image: list, given: list, key: Key) -> None:
    """The same of one image, by the tests' reference loops; draws come from the key, as floats."""
    pixels = [reference.box_pixels(box, True, SIZE) for box in given]
    u = key.uniform("u", 3 * K).view(K, 3).tolist()
    for _ in range(2):  # for the view and for the composite
        cut = reference.cutout(pixels, SIZE, u, (0.2, 0.5), "image", "tolerance")[-1][-1]
    kept = reference.window(SIZE, key.uniform("v", 4)[0].tolist(), (0.2, 0.6), (3 / 4, 4 / 3), "masked")
    kept.union(*pixels)
    for box, v in zip(given, key.uniform("w", 5 * K).view(K, 5).tolist(), strict=True):
        reference.jitter(box, v, 0.5, (0.8, 1.0), 0.1, corner=False)
    stay = reference.make_room(given, pixels, SIZE, 0.25)
    (_, x), (_, y) = reference.feasible(given, stay, SIZE)
    shown = set().union(*(pixels[k] for k in stay)) - cut
    mask = [[(i, j) in shown for j in range(SIZE[1])] for i in range(SIZE[0])]
    for channel in image:
        reference.compose(channel, mask, channel, (x, y))


def timings(batch: int, runs: int, device: str) -> tuple[list[tuple[str, str]], dict[str, dict[str, list[float]]]]:
    """Rows and seconds of every operator for each number type."""
    key = Key(0, 0, torch.arange(batch))
    given, valid = free_boxes(K, key=key, share=(0.05, 0.4)).to(device), torch.ones(batch, K, device=device).bool()
    rows, raw = [], {}
    for name, dtype in DTYPES.items():
        images = torch.randint(0, 256, (batch, 3, *SIZE), device=device).to(dtype)
        found = operators(images, given, valid, key)
        if device != "cpu":
            found = {n: lambda f=f: (f(), torch.cuda.synchronize()) for n, f in found.items()}
        seconds = raw[f"{device} {name}"] = alternate(found, runs)
        own = {n: s for n, s in seconds.items() if name == "uint8" or n.startswith(("composite", "together"))}
        rows += [(f"{n}, B = {batch}, {name}, {device} (ms)", spread(values)) for n, values in own.items()]
    return rows, raw


def against_loops(batch: int, runs: int) -> tuple[list[tuple[str, str]], dict[str, list[float]]]:
    """How much faster a batch is than images one by one: by these functions, and by the tests' loops."""
    key = Key(0, 0, torch.arange(batch))
    given, valid = free_boxes(K, key=key, share=(0.05, 0.4)), torch.ones(batch, K, dtype=torch.bool)
    images = torch.randint(0, 256, (batch, 3, *SIZE)).to(torch.uint8)
    each = [operators(images[[i]], given[[i]], valid[[i]], key[i])["together"] for i in range(batch)]
    image, first = images[0].tolist(), given[0].tolist()
    seconds = alternate(
        {
            "batch": operators(images, given, valid, key)["together"],
            "one by one": lambda: [f() for f in each],
            "loop": lambda: loop(image, first, key[0]),
        },
        runs,
    )
    seconds["loop"] = [batch * s for s in seconds["loop"]]  # one image was measured
    rows = [
        (f"times faster than {batch} calls of one image", ratio(seconds, "one by one", "batch")),
        ("times faster than the reference loop of the tests", ratio(seconds, "loop", "batch")),
    ]
    return rows, seconds


def shifts(name: str, in_view: Tensor, valid: Tensor, ids: Tensor) -> list[tuple[str, str]]:
    """How far composites move the boxes of x2, with room and without."""
    images, rows = torch.zeros(len(ids), 0, *SIZE), []
    for room in (0.0, 0.25):
        moves, kept = [], []
        for epoch in range(5):
            key = Key(0, epoch, ids).fold("x3")
            made = shift_composite(images, in_view, valid, images, key=key, room=room)
            some = made.valid.any(1)
            moves.append(made.shift[some].double())
            kept.append((made.valid.sum() / valid.sum()).item())
        shift = torch.cat(moves)
        length = shift.norm(dim=1)
        rows.append((
            f"{name}, room {room:g}: mean shift (px), share below one C4 cell ({CELL} px), boxes kept",
            f"{length.mean():.1f} (median {length.median():.1f}), {(length < CELL).double().mean():.0%}, "
            f"{statistics.mean(kept):.0%}",
        ))  # fmt: skip
    return rows


def on_photographs(data: Path, limit: int) -> list[tuple[str, str]]:
    """Shifts of objects and of proposals in x2 of D3SSL's recipe, as `select.choose` takes them."""
    recipe, folder = recipes.recipe("d3ssl"), data / "coco_mini"
    batches, found = [], []
    try:
        from geoaug.proposals.selective_search import selective_search
    except ImportError:
        selective_search = None
    path = folder / "annotations" / "instances_train.json"
    with open_loader(path, recipe.views, batch_size=1, seed=0, workers=0, order="file",
                     images=folder / "images" / "train") as loader:  # fmt: skip
        for batch, _ in zip(loader, range(limit), strict=False):
            batches.append(batch)
            if selective_search is not None:
                image, _ = read_image(loader.source.root / batch.names[0])
                kept = select.soco_filter(select.distinct(selective_search(image)), image.shape[:2])
                edges = torch.from_numpy(kept.astype(np.float32))[None]
                found.append(boxes.from_pixels(edges, image.shape[:2]))
    rows = []
    kinds = {"COCO objects": [(b.boxes, b.box_valid) for b in batches]}
    kinds |= {"selective search": [(x, torch.ones(x.shape[:2], dtype=torch.bool)) for x in found]} if found else {}
    for name, pairs in kinds.items():
        in_view, usable, ids = [], [], []
        for batch, (given, valid) in zip(batches, pairs, strict=True):
            maps = [batch.plan.view_from_source[:, v] for v in (0, 1)]
            chosen, _, none = select.choose(given, valid, K, maps, batch.plan.view_sizes[:2], key=batch.key)
            in_view.append(maps[1].boxes(chosen))
            usable.append(~none[:, None].expand(1, K))
            ids.append(batch.key.ids)
        usable = torch.cat(usable)
        rows += shifts(f"{name} of {int(usable.any(1).sum())} photographs", torch.cat(in_view), usable, torch.cat(ids))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=64, help="images of a batch on the CPU")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--photographs", type=int, default=300, help="at most so many real photographs")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows, raw = timings(args.batch, args.runs, "cpu")
    more, seconds = against_loops(args.batch, 3)
    rows += more
    if torch.cuda.is_available():
        more, own = timings(256, args.runs, "cuda")
        rows, raw = rows + more, {**raw, **own}
    data = Path(os.environ.get("GEOAUG_DATA") or "no photographs")
    if data.is_dir():
        rows += on_photographs(data, args.photographs)
    rows.append(("threads, and load average of the machine at the end", f"{args.threads}, {os.getloadavg()[0]:.1f}"))
    save("composites", "Region composites", rows, {"seconds": raw, "loops": seconds})


if __name__ == "__main__":
    main()

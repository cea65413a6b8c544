"""What `geoaug inspect STORE` shows: what a store of proposals says of itself, and its boxes on the images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import viz
from .geometry import boxes as box_algebra
from .inspection import Written, quantiles
from .loading.decode import ReadError, read_image
from .loading.source import open_source
from .proposals.store import ProposalStore

_MOST = 40  # boxes drawn on one picture, beyond which nothing is seen
_SHOWN = 448  # pixels a picture is enlarged to, at least


def is_store(path: Path) -> bool:
    """Whether a folder holds a store rather than images."""
    return (path / "manifest.json").is_file()


def describe_store(store: ProposalStore) -> str:
    """What made a store, what could not be made, and how many boxes of what size it has."""
    manifest = store.manifest
    lines = [f"{key}: {manifest[key]}" for key in ("preset", "engine", "filter") if key in manifest]
    lines += [f"{name} = {value}" for name, value in manifest.get("parameters", {}).items()]
    made = (", ".join(f"{name} {number}" for name, number in used.items()) for used in manifest.get("versions", []))
    lines += [f"made with {versions}" for versions in made]
    lines += [f"{len(found)} failed: {kind}" for kind, found in manifest.get("failures", {}).items()]
    counts = np.diff(store.offsets)
    lines.append(f"{len(store):,} images, {int((counts == 0).sum()):,} of them without a box")
    lines.append(f"boxes an image, median and the range of nine tenths: {quantiles(torch.from_numpy(counts).float())}")
    some = np.linspace(0, max(len(store) - 1, 0), min(len(store), 1000)).astype(np.int64)  # of a large store a sample
    ids = torch.from_numpy(np.array(store.ids[some]))
    boxes, valid = store.padded(ids, 64)
    sides = box_algebra.area(boxes).sqrt()[valid]
    lines.append(f"side of a box (the root of its area) as a share of the image's: {quantiles(sides)}")
    return "\n".join(lines)


def make_store_pages(path: Path, out: Path, *, count: int, images: Path | None) -> Written:
    """Write `inspect.html` and a contact sheet of a store's boxes on the first readable images it has entries of."""
    store = ProposalStore.open(path)
    if images is None:
        raise ValueError(f"{path} is a store, which holds no images: say where they lie with --images")
    source = open_source(images)
    rows = np.flatnonzero(store.rows(source.ids) >= 0).tolist()
    if not rows:
        names = list(source.names[:2])
        raise ValueError(f"{path} has no entry of any image of {images}: images are {names}, its own {store.names(2)}")
    sections: list[tuple[str, str, Tensor | None]] = [("", describe_store(store), None)]
    sheet: list[Tensor] = []
    failures: dict[str, tuple[str, str]] = {}
    for row in rows:
        name = source.names[row]
        try:
            picture = read_image(source.root / name)[0].permute(2, 0, 1)
        except ReadError as error:
            failures[name] = (error.kind, error.reason)
            continue
        title, drawn = _drawn(store, int(source.ids[row]), picture)
        sections.append((name, title, drawn))
        sheet.append(drawn)
        if len(sheet) == count:
            break
    if not sheet:
        raise ValueError(f"none of the images of {images} could be read, such as {next(iter(failures.items()))}")
    paths = [viz.page(f"geoaug inspect: {path.name}", sections, out / "inspect.html")]
    return Written([*paths, viz.save(viz.below(sheet), out / "inspect.png")], len(sheet), failures)


def _drawn(store: ProposalStore, identity: int, picture: Tensor) -> tuple[str, Tensor]:
    """A title, and an image beside the same with its first boxes."""
    height, width = store.sizes[store.rows(np.array([identity]))[0]].tolist()
    pixels = store.boxes(identity)
    boxes = box_algebra.from_pixels(torch.from_numpy(pixels[:_MOST].astype(np.float32)), (height, width))
    title = f"{len(pixels)} boxes of {width} x {height} pixels"
    title += f", the first {_MOST} drawn" if len(pixels) > _MOST else ""
    large = viz.enlarge(picture, max(1, -(-_SHOWN // max(picture.shape[1:]))))
    return title, viz.beside([large, viz.boxes(large, boxes)])

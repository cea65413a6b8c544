"""`open_loader`: one call from files to batches of tracked views."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from ..geometry import checks
from ..geometry.views import ViewSpec
from ..proposals.store import ProposalStore
from .folder import LoadError, Tasks
from .listed import only_listed
from .loader import Loader, Proposals
from .order import steps_of
from .source import MISSING, open_source

log = logging.getLogger("geoaug")


def open_loader(
    path: Path | str,
    specs: Sequence[ViewSpec],
    *,
    batch_size: int,
    seed: int,
    rank: int = 0,
    world: int = 1,
    proposals: Proposals | Path | str | None = None,
    max_boxes: int = 64,
    render: Literal["cpu", "device"] = "cpu",
    workers: int | None = None,
    device: torch.device | str | int | None = None,
    order: Literal["shuffle", "file"] = "shuffle",
    last: Literal["drop", "keep"] = "drop",
    replay: bool = False,
    on_error: Literal["raise", "mask"] = "raise",
    images: Path | str | None = None,
    only: Path | str | None = None,
    verify: bool = True,
    label_map: Literal["instance", "semantic"] | None = None,
    label_map_size: tuple[int, int] = (160, 160),
    prefetch: int = 2,
) -> Loader:
    """A loader of `specs` views of a folder of images, a list, a COCO json (photographs in `images`) or a .beton.

    `batch_size` is global: each of `world` ranks gets its part of it. Boxes are those of `proposals` (a store or its
    path), else a json's objects without crowds, else none; of more than `max_boxes` candidates a new draw is taken each
    epoch. `label` is the sorted index of the first-level subfolder. `render="device"` ships whole images and renders on
    `device`. `last="keep"` pads the last batch with ok = False. `replay` plans views as in epoch 0 while the order
    follows the epoch. `verify` refuses images that the decoder warns about; `on_error="mask"` gives what cannot be read
    ok = False and counts it in `loader.report`. `workers` are processes, of a .beton threads, one at least (None: one
    a core, 8 at most; 0: this one). `only` keeps the images whose names or stems are the lines of a text file.

        with open_loader("photographs", [ViewSpec(224), ViewSpec(224)], batch_size=256, seed=0) as loader:
            for epoch in range(100):
                loader.set_epoch(epoch)
                for batch in loader:
                    a, b = batch.plan.view_from_source[:, 0], batch.plan.view_from_source[:, 1]
    """
    where = "open_loader"
    batch_size = checks.index(batch_size, 1, 2**24, where, "batch_size")
    world = checks.index(world, 1, 2**20, where, "world")
    rank = checks.index(rank, 0, world - 1, where, "rank")
    checks.require(batch_size % world == 0, where, "batch_size", f"a multiple of world, {world}", batch_size)
    max_boxes = checks.index(max_boxes, 0, 2**16, where, "max_boxes")
    workers = min(os.cpu_count() or 1, 8) if workers is None else checks.index(workers, 0, 2**10, where, "workers")
    label_map_size = checks.pair_of_sizes(label_map_size, where, "label_map_size")
    checks.require(len(specs) > 0, where, "specs", "at least one ViewSpec", "none")
    checks.require(render in ("cpu", "device"), where, "render", "'cpu' or 'device'", repr(render))
    checks.require(on_error in ("raise", "mask"), where, "on_error", "'raise' or 'mask'", repr(on_error))
    known = label_map in (None, "instance", "semantic")
    checks.require(known, where, "label_map", "None, 'instance' or 'semantic'", repr(label_map))
    alone = batch_size == 1 or all(spec.kind != "short_side" for spec in specs)
    checks.require(alone, where, "batch_size", "1 with ViewSpec.short_side", batch_size)

    if Path(path).suffix == ".beton":
        from .ffcv import BetonLoader, open_beton  # needs FFCV, which no other source does

        checks.require(
            label_map is None, where, "label_map", "None for a .beton, which holds no masks", repr(label_map)
        )
        checks.require(images is None, where, "images", "None for a .beton: it holds its images", repr(images))
        checks.require(only is None, where, "only", "None for a .beton, which can be written of a list", repr(only))
        beton, source = open_beton(path, verify=verify)
    else:
        source = open_source(path, images, masks=label_map is not None)
        source = source if only is None else only_listed(source, Path(only))
        has_masks = label_map is None or source.objects is not None
        checks.require(has_masks, where, "label_map", "left out without a COCO json", repr(label_map))
    missing = source.problems.get(MISSING, [])
    if missing and on_error == "raise":
        raise LoadError(f"open_loader: {len(missing)} images are missing under {source.root}, such as {missing[:3]}")
    for kind, names in source.problems.items():
        log.warning("%s: %d x %s, such as %s", path, len(names), kind, names[:3])
    if isinstance(proposals, (str, Path)):
        proposals = ProposalStore.open(proposals)
    if isinstance(proposals, ProposalStore):
        proposals.check_covers(source.ids, source.names)
    steps = steps_of(len(source), batch_size, last)
    checks.require(steps > 0, where, "batch_size", f"at most the {len(source)} images with last='drop'", batch_size)
    dataset = Tasks(
        source.root, specs, seed, on_device=render == "device", verify=verify,
        label_map=label_map, label_map_size=label_map_size,
    )  # fmt: skip
    options: dict[str, Any] = {
        "batch_size": batch_size, "rank": rank, "world": world, "steps": steps, "order": order, "replay": replay,
        "proposals": proposals, "max_boxes": max_boxes, "workers": workers, "on_error": on_error,
        "prefetch": checks.index(prefetch, 1, 2**10, where, "prefetch"),
        "device": torch.device("cpu" if device is None else device),
    }  # fmt: skip
    if Path(path).suffix == ".beton":
        return BetonLoader(source, dataset, beton=beton, **options)
    return Loader(source, dataset, **options)

"""The loader that runs anywhere: files, decoded and rendered in the workers of a torch DataLoader.

The main process plans what each step needs and sends it to a worker as a task; the worker decodes, plans the views
from the size it finds, renders and sends a Batch. No worker holds state, so any number of them gives the same batches.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..geometry.plan import Plan, plan_views
from ..geometry.rng import Key
from ..geometry.views import ViewSpec
from ..pixels.render import render_rows
from .batch import Batch, pad_boxes
from .decode import ReadError, read_image
from .label_maps import MaskError, label_map_of
from .order import PADDING


class LoadError(RuntimeError):
    """Samples that could not be read, under on_error="raise"."""


@dataclass(frozen=True)
class Task:
    """Everything a worker needs to make one rank's part of one batch."""

    epoch: int  # of the order and the key
    planned: int  # of the views: 0 when they are replayed
    names: list[str]
    ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    boxes: list[npt.NDArray[np.float32]]
    box_labels: list[npt.NDArray[np.int64]]
    slots: int
    masks: list[list[Any]] | None
    sizes: npt.NDArray[np.int32] | None  # what a json says of the images


@dataclass(frozen=True)
class Worked:
    """What a worker sends back: the batch, what could not be read, and notes to count."""

    batch: Batch
    padded: Tensor | None  # whole images [B, 3, H, W], for rendering on a device
    failures: list[tuple[str, str, str]]  # (name, kind, reason)
    notes: dict[str, int]


class Tasks(torch.utils.data.Dataset[Worked]):
    """Makes a batch of a task; the DataLoader's `dataset`, so it is what workers run."""

    def __init__(
        self,
        root: Path,
        specs: Sequence[ViewSpec],
        seed: int,
        *,
        on_device: bool,
        verify: bool,
        label_map: Literal["instance", "semantic"] | None,
        label_map_size: tuple[int, int],
    ) -> None:
        self.root, self.specs, self.seed = root, list(specs), seed
        self.on_device, self.verify = on_device, verify
        self.label_map, self.label_map_size = label_map, label_map_size

    def __getitem__(self, task: Task) -> Worked:
        failures: list[tuple[str, str, str]] = []
        notes: Counter[str] = Counter()
        images: list[Tensor | None] = [None] * len(task.names)
        maps = None
        if self.label_map is not None:
            maps = np.full((len(task.names), *self.label_map_size), -1, dtype=np.int64)
        for row, name in enumerate(task.names):
            if task.ids[row] == PADDING:
                continue
            try:
                image, found = self._read(task, row)
                if maps is not None:
                    maps[row] = self._label_map(task, row)
            except ReadError as error:
                failures.append((name, error.kind, error.reason))
            else:
                images[row] = image
                notes.update(found)
        ok = torch.tensor([image is not None for image in images])
        sizes = np.array([(1, 1) if image is None else image.shape[:2] for image in images]).reshape(-1, 2)
        plan = plan_views(self.specs, sizes, task.ids, seed=self.seed, epoch=task.planned)
        views, padded = ([], self._pad(images)) if self.on_device else (self._render(images, plan), None)
        key = Key(self.seed, task.epoch, plan.ids)
        boxes, box_valid, box_labels = pad_boxes(task.boxes, task.box_labels, task.slots, key)
        box_valid &= ok[:, None]
        batch = Batch(
            images=views,
            plan=plan,
            key=key,
            ok=ok,
            names=task.names,
            boxes=boxes,
            box_valid=box_valid,
            box_labels=box_labels,
            label=torch.from_numpy(task.labels),
            label_map=None if maps is None else torch.from_numpy(maps),
        )
        return Worked(batch, padded, failures, dict(notes))

    def _read(self, task: Task, row: int) -> tuple[Tensor, list[str]]:
        image, notes = read_image(self.root / task.names[row], verify=self.verify)
        if task.sizes is not None:
            said, found = task.sizes[row].tolist(), list(image.shape[:2])
            # A dataset resized as a whole keeps its boxes; another aspect means that they refer to another picture.
            if abs(found[0] * said[1] - found[1] * said[0]) > max(*said, *found):
                raise ReadError("size", f"is {found[1]} x {found[0]}, the json says {said[1]} x {said[0]}")
        return image, notes

    def _render(self, images: list[Tensor | None], plan: Plan) -> list[Tensor]:
        views = [_shared((len(images), 3, h, w)) for h, w in plan.view_sizes]
        render_rows(images, plan, views)
        return views

    def _pad(self, images: list[Tensor | None]) -> Tensor:
        height = max([image.shape[0] for image in images if image is not None], default=1)
        width = max([image.shape[1] for image in images if image is not None], default=1)
        padded = _shared((len(images), 3, height, width)).zero_()
        for row, image in enumerate(images):
            if image is not None:
                padded[row, :, : image.shape[0], : image.shape[1]] = image.permute(2, 0, 1)
        return padded

    def _label_map(self, task: Task, row: int) -> npt.NDArray[np.int64]:
        assert task.masks is not None
        assert task.sizes is not None
        masks = task.masks[row]
        labels = task.box_labels[row] if self.label_map == "semantic" else np.arange(len(masks))
        height, width = task.sizes[row].tolist()
        try:
            return label_map_of(masks, labels, self.label_map_size, (height, width))
        except MaskError as error:
            raise ReadError("mask", str(error)) from None


def _shared(shape: tuple[int, ...]) -> Tensor:
    """An uninitialised uint8 tensor; in a worker in the memory it is sent through, so that it is not copied there."""
    if torch.utils.data.get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape))
    empty: Tensor = torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape)  # type: ignore[call-overload]
    return empty


def failure_text(failures: Sequence[tuple[str, str, str]], most: int = 10) -> str:
    """The failures of a step in a few lines."""
    lines = [f"  {name}: {kind}: {reason}" for name, kind, reason in failures[:most]]
    lines += [f"  and {len(failures) - most} more"] if len(failures) > most else []
    return "\n".join(lines)

"""Linear and k-NN accuracy on the images' labels while a run trains: detached, off by default, for any trainer.

    monitor: common.OnOff = "off"                                               # in Config
    self.monitor = common.Monitor(width, classes) if classes else None          # in Model, `classes` an argument
    if self.monitor is not None:                                                # in its forward; [B, width]
        log["features"] = common.watched(f1, f2)
    classes = common.classes_of(loader, config.monitor)                         # in main: 0 where it is off
    logs = common.monitored(bare.monitor, accelerator, batch, logs)             # after the step's last micro-batch

It has no parameter, only buffers, which it moves itself: no gradient, no optimiser and no other weight can tell whether
it is there. Every process sees the whole batch, so all keep the same buffers. Accuracies are of images before they are
learnt from in that step; over many epochs the linear one is an accuracy in training.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional

import geoaug

from .arguments import UsageError
from .region_views import OnOff


class Monitor(nn.Module):
    """Softmax regression by its own gradient, and a vote of the nearest of the last features, on detached features.

    >>> monitor = Monitor(16, 3, bank=32)
    >>> found = monitor.update(torch.randn(8, 16), torch.arange(8) % 3, torch.arange(8))
    >>> sorted(found)
    ['knn', 'linear']
    """

    def __init__(
        self, width: int, classes: int, *, bank: int = 4096, k: int = 20, temperature: float = 0.07, lr: float = 2.0,
        momentum: float = 0.9,
    ) -> None:  # fmt: skip
        super().__init__()
        self.k, self.temperature, self.lr, self.momentum = min(k, bank), temperature, lr, momentum
        self.register_buffer("weight", torch.zeros(classes, width + 1))  # the last column is the bias
        self.register_buffer("velocity", torch.zeros(classes, width + 1))
        self.register_buffer("bank", torch.zeros(bank, width))
        self.register_buffer("labels", torch.full((bank,), -1))
        self.register_buffer("ids", torch.full((bank,), -1))
        self.register_buffer("at", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor, ids: Tensor) -> dict[str, Tensor]:
        """Accuracies of features [N, width] with labels [N], -1 unknown, of images `ids`; then learn from them."""
        with torch.autocast(features.device.type, enabled=False):
            features, known = features.detach().float(), labels >= 0
            right = {"linear": self._linear(features, labels, known), "knn": self._nearest(features, labels, ids)}
            self._store(features, labels, ids)
        return {name: (hits & known).sum() / known.sum().clamp_min(1) for name, hits in right.items()}

    def _linear(self, features: Tensor, labels: Tensor, known: Tensor) -> Tensor:
        """Whether each is named rightly; then one step of gradient descent with momentum on the mean of the known."""
        x = functional.normalize(features - features.mean(0), dim=1)
        x = torch.cat((x, torch.ones_like(x[:, :1])), 1)  # of length sqrt(2): rates under 3.8 are stable
        logits = x @ self.weight.mT
        error = logits.softmax(1) - functional.one_hot(labels.clamp_min(0), len(self.weight))
        error = torch.where(known[:, None], error, 0) / known.sum().clamp_min(1)
        self.velocity.mul_(self.momentum).add_(error.mT @ x)
        self.weight.sub_(self.velocity, alpha=self.lr)
        return logits.argmax(1) == labels

    def _nearest(self, features: Tensor, labels: Tensor, ids: Tensor) -> Tensor:
        """Whether a vote of the k nearest names each rightly; an image's own earlier views have no vote."""
        cosines = functional.normalize(features, dim=1) @ self.bank.mT
        voting = (self.labels >= 0) & (self.ids != ids[:, None])
        near, rows = torch.where(voting, cosines, -torch.inf).topk(self.k, dim=1)
        weights = ((near - near[:, :1]) / self.temperature).exp().nan_to_num(0.0)  # none votes: -inf less -inf
        votes = weights.new_zeros(len(features), len(self.weight))
        votes.scatter_add_(1, self.labels[rows].clamp_min(0), weights)
        return (votes.argmax(1) == labels) & (votes.amax(1) > 0)

    def _store(self, features: Tensor, labels: Tensor, ids: Tensor) -> None:
        kept = slice(max(0, len(features) - len(self.bank)), None)
        stored = functional.normalize(features[kept], dim=1)
        rows = (self.at + torch.arange(len(stored), device=self.at.device)) % len(self.bank)
        for buffer, new in ((self.bank, stored), (self.labels, labels[kept]), (self.ids, ids[kept])):
            buffer.index_copy_(0, rows, new)
        self.at.copy_((self.at + len(stored)) % len(self.bank))


def classes_of(loader: geoaug.loading.loader.Loader, monitor: OnOff) -> int:
    """The number of classes of the images' labels, or 0 where nothing is monitored."""
    if monitor == "off":
        return 0
    classes = max(len(loader.source.classes), int(loader.source.labels.max(initial=-1)) + 1)
    if classes < 2:
        raise UsageError(f"--monitor on needs labels: images in subfolders of two classes at least, got {classes}")
    return classes


def watched(*views: Tensor) -> Tensor:
    """The features of the views, detached and averaged: [B, D]."""
    return torch.stack([view.detach().float() for view in views]).mean(0)


def monitored(
    monitor: Monitor | None, accelerator: Accelerator, batch: geoaug.Batch, logs: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The logs of a step with the accuracies of its images in the place of their features."""
    if monitor is None:
        return logs
    features = torch.cat([log.pop("features") for log in logs])
    labels = torch.where(batch.ok, batch.label, -1)
    found = monitor.update(*(accelerator.gather(x) for x in (features, labels, batch.key.ids)))
    return [{**log, **found} for log in logs]

"""Heads of 1x1 convolutions, on maps and at points, and what of their categories is in use."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn


def conv_head(*widths: int, last_bias: bool = True, last_norm: bool = False) -> nn.Sequential:
    """1x1 convolutions with batch norm and ReLU between; `last_norm` puts a batch norm without scale and shift last.

    >>> conv_head(2048, 512, 512, 512, last_bias=False, last_norm=True)(torch.zeros(2, 2048, 7, 7)).shape
    torch.Size([2, 512, 7, 7])
    """
    layers: list[nn.Module] = []
    for i, (wide, out) in enumerate(itertools.pairwise(widths)):
        last = i == len(widths) - 2
        layers.append(nn.Conv2d(wide, out, 1, bias=last and last_bias))
        if not last:
            layers += [nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
        elif last_norm:
            layers.append(nn.BatchNorm2d(out, affine=False))
    return nn.Sequential(*layers)


def at_points(head: nn.Module, vectors: Tensor) -> Tensor:
    """A head of convolutions on the vectors [B, P, C] of points, as on a map: [B, P, D]."""
    out: Tensor = head(vectors.mT[..., None])  # [B, D, P, 1]
    return out[..., 0].mT


@torch.no_grad()
def categories_in_use(values: Tensor, valid: Tensor) -> Tensor:
    """How many of the N categories are the largest of some valid element; values [*batch, N], valid [*batch]."""
    largest = values.detach().argmax(dim=-1).flatten()
    used = torch.zeros(values.shape[-1], device=values.device)
    return used.scatter_reduce_(0, largest, valid.flatten().to(used.dtype), "amax").sum()

"""A segmenter without labels: a trunk, a light pyramid and a projector to pseudo-categories; read again from a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from geoaug.weights import latest

from .dense_heads import conv_head
from .networks import make_trunk

METHOD = "densesiam_segmentation"  # of the runs whose segmenter can be read
_PREFIX = "net."


class LightPyramid(nn.Module):
    """1x1 convolutions of C2 to C5 to one width, added up from the coarsest map down, bilinear; one map comes out.

    >>> maps = [torch.zeros(2, 64 * 2**i, 56 // 2**i, 56 // 2**i) for i in range(4)]
    >>> LightPyramid([64, 128, 256, 512])(maps).shape
    torch.Size([2, 128, 56, 56])
    """

    def __init__(self, channels: Sequence[int], width: int = 128) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """The finest map's size, [B, width, h, w]."""
        laterals = [conv(x) for conv, x in zip(self.lateral, maps, strict=True)]
        total = laterals.pop()
        for finer in reversed(laterals):
            total = finer + functional.interpolate(total, finer.shape[-2:], mode="bilinear", align_corners=False)
        return total


class SegmentationNet(nn.Module):
    """Scores [B, classes, h, w] of each pixel's pseudo-category; h and w are a quarter of the image's sides."""

    def __init__(self, arch: str, classes: int, *, width: int = 128, init: str = "none") -> None:
        super().__init__()
        self.trunk = make_trunk(arch, init)
        self.pyramid = LightPyramid([self.trunk.channels[stage] for stage in ("c2", "c3", "c4", "c5")], width)
        self.projector = conv_head(width, width, width, classes, last_bias=False, last_norm=True)

    def features(self, images: Tensor) -> Tensor:
        """What the projector reads, [B, width, h, w]."""
        return self.pyramid(self.trunk.maps(images)[1:])

    def forward(self, images: Tensor) -> Tensor:
        """The scores."""
        return self.projector(self.features(images))


def read_segmenter(path: Path | str) -> SegmentationNet | None:
    """The segmenter of a run, or of its checkpoint, in eval mode; None where `path` holds something else."""
    file = latest(Path(path))
    if file is None or file.suffix == ".safetensors":
        return None
    try:
        state: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # another kind of file; whoever reads it as a backbone will say what is wrong with it
        return None
    if not isinstance(state, dict) or state.get("method") != METHOD:
        return None
    config = state["config"]
    net = SegmentationNet(config["arch"], config["classes"], width=config["hidden"])
    weights = {name.removeprefix(_PREFIX): x for name, x in state["model"].items() if name.startswith(_PREFIX)}
    net.load_state_dict(weights)
    return net.eval()

"""Swin Transformer as a trunk (LC-loss, appendix B): torchvision's, cut at its stages like a ResNet."""

from __future__ import annotations

import torchvision
from torch import Tensor, nn

SWINS = ("swin_t",)


class SwinTrunk(nn.Module):
    """Swin-T without its classifier: `stem`, C2 to C5 at strides 4, 4, 8, 16 and 32; torchvision's names.

    Without stochastic depth: torchvision draws it from the global generator, which a resumed run could not repeat.

    >>> import torch
    >>> SwinTrunk("swin_t")(torch.zeros(2, 3, 64, 96)).shape
    torch.Size([2, 768, 2, 3])
    """

    stages = ("stem", "c2", "c3", "c4", "c5")
    stride = 32  # pixels a cell of C5

    def __init__(self, arch: str = "swin_t") -> None:
        super().__init__()
        net = getattr(torchvision.models, arch)(weights=None)
        for module in net.modules():
            if isinstance(module, torchvision.ops.StochasticDepth):
                module.p = 0.0
        self.features, self.norm = net.features, net.norm
        wide = net.norm.normalized_shape[0]
        self.channels = dict(zip(self.stages, (wide // 8, wide // 8, wide // 4, wide // 2, wide), strict=True))

    def maps(self, images: Tensor, upto: str = "c5") -> list[Tensor]:
        """The maps of the stages from the stem to `upto`; C5 is normalised, as the classifier would see it."""
        last = self.stages.index(upto)
        maps, x = [], images
        # Patches, then a stage and a merging in turn: the stages end at 0, 1, 3, 5 and 7.
        for i, layer in enumerate(self.features[: max(1, 2 * last)]):
            x = layer(x)
            if i == 0 or i % 2 == 1:
                maps.append(x)
        if last == len(self.stages) - 1:
            maps[-1] = self.norm(maps[-1])
        return [each.permute(0, 3, 1, 2) for each in maps]  # from [B, h, w, C]

    def forward(self, images: Tensor) -> Tensor:
        """The last map C5 [B, C, h/32, w/32]."""
        return self.maps(images)[-1]

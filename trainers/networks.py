"""Trunks, heads and batch norm of all trainers. State dicts of a trunk carry torchvision's names."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from geoaug import Key
from geoaug.weights import read_backbone

from .arguments import ARCHES, Norm, RunConfig, UsageError
from .swin import SWINS, SwinTrunk


class _Narrow(ResNet):
    """A ResNet whose stages have half their channels."""

    share = 2

    def _make_layer(self, block: Any, planes: int, *others: Any, **more: Any) -> nn.Sequential:
        return super()._make_layer(block, planes // self.share, *others, **more)


class _Tiny(_Narrow):
    """A quarter of the channels and, for small pictures, a 3x3 stem without pooling: every stage at half the stride."""

    share = 4

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.conv1 = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.bn1, self.maxpool = nn.BatchNorm2d(16), nn.Identity()

    def _make_layer(self, block: Any, planes: int, *others: Any, **more: Any) -> nn.Sequential:
        if planes == 64:
            self.inplanes = 16
        return super()._make_layer(block, planes, *others, **more)


def stride(arch: str, stage: str) -> int:
    """Pixels of a view per cell of a stage's map.

    >>> stride("resnet50", "c5"), stride("resnet10-tiny", "c5")
    (32, 16)
    """
    whole = dict(zip(Trunk.stages, (4, 4, 8, 16, 32), strict=True))[stage]
    return whole // 2 if arch == "resnet10-tiny" else whole


class Trunk(nn.Module):
    """A ResNet without its classifier, cut at its stages: `stem` and C2 to C5, at the strides that `stride` tells.

    >>> c2, c3, c4 = Trunk("resnet18").maps(torch.zeros(2, 3, 64, 64), "c4")[-3:]
    >>> c4.shape
    torch.Size([2, 256, 4, 4])
    """

    stages = ("stem", "c2", "c3", "c4", "c5")

    def __init__(self, arch: str = "resnet50", *, zero_init: bool = False) -> None:
        super().__init__()
        if arch not in ARCHES:
            raise ValueError(f"Trunk: arch must be one of {', '.join(ARCHES)}, got {arch!r}")
        if arch in ("resnet10", "resnet10-narrow", "resnet10-tiny"):
            kind = {"resnet10": ResNet, "resnet10-narrow": _Narrow, "resnet10-tiny": _Tiny}[arch]
            net = kind(BasicBlock, [1] * 4, zero_init_residual=zero_init)
        else:
            net = getattr(torchvision.models, arch)(weights=None, zero_init_residual=zero_init)
        self.conv1, self.bn1, self.relu, self.maxpool = net.conv1, net.bn1, net.relu, net.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = net.layer1, net.layer2, net.layer3, net.layer4
        last = [layer[-1] for layer in (net.layer1, net.layer2, net.layer3, net.layer4)]
        wide = [(block.bn3 if isinstance(block, Bottleneck) else block.bn2).num_features for block in last]
        self.channels = dict(zip(self.stages, (net.conv1.out_channels, *wide), strict=True))

    def maps(self, images: Tensor, upto: str = "c5") -> list[Tensor]:
        """The maps of the stages from the stem to `upto`."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))  # [B, 64, h/4, w/4]
        maps = [x]
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4)[: self.stages.index(upto)]:
            x = layer(x)
            maps.append(x)
        return maps

    def forward(self, images: Tensor) -> Tensor:
        """The last map C5 [B, C, h/32, w/32]."""
        return self.maps(images)[-1]


def make_trunk(arch: str, init: str = "none", *, zero_init: bool = False) -> Trunk | SwinTrunk:
    """A trunk from scratch, or from the weights of `init`: a run, a .pth or a .safetensors."""
    trunk = SwinTrunk(arch) if arch in SWINS else Trunk(arch, zero_init=zero_init)
    if init != "none":
        try:
            weights = read_backbone(init)
        except (ValueError, OSError, ImportError) as error:
            raise UsageError(f"--init: {error}") from None
        ours = {name: x.shape for name, x in trunk.state_dict().items()}
        for name in ours:
            if name.endswith("num_batches_tracked"):  # files older than PyTorch 0.4.1 lack it, torchvision's among them
                weights.setdefault(name, torch.zeros((), dtype=torch.int64))
        other = [n for n in sorted(ours.keys() | weights.keys()) if n not in weights or ours.get(n) != weights[n].shape]
        if other:
            raise UsageError(
                f"--init must fit --arch {arch}, got {init}: {len(other)} tensors differ, {other[0]} first"
            )
        trunk.load_state_dict(weights)
    return trunk


class Pyramid(nn.Module):
    """A feature pyramid over C2 to C5: P2 to P5 of one width, the nearest upsampling and 3x3 smoothing of FPN."""

    def __init__(self, channels: Sequence[int], width: int = 256) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.smooth = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in channels)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """P maps in the order of the maps given, finest first."""
        laterals = [conv(x) for conv, x in zip(self.lateral, maps, strict=True)]
        for fine in range(len(laterals) - 2, -1, -1):
            size = laterals[fine].shape[-2:]
            laterals[fine] = laterals[fine] + nn.functional.interpolate(laterals[fine + 1], size=size, mode="nearest")
        return [conv(x) for conv, x in zip(self.smooth, laterals, strict=True)]


def mlp(*widths: int, norm: bool = True, last_bias: bool = True, last_norm: bool = False) -> nn.Sequential:
    """A head of linear layers with ReLU between: `mlp(2048, 4096, 256, last_bias=False)` is BYOL's projector.

    `norm` puts a batch norm before each ReLU; `last_norm` one without scale and shift behind the last layer (SimSiam).
    """
    layers: list[nn.Module] = []
    for i, (wide, out) in enumerate(itertools.pairwise(widths)):
        last = i == len(widths) - 2
        layers.append(nn.Linear(wide, out, bias=last_bias if last else True))
        if not last:
            layers += [nn.BatchNorm1d(out), nn.ReLU(inplace=True)] if norm else [nn.ReLU(inplace=True)]
        elif last_norm:
            layers.append(nn.BatchNorm1d(out, affine=False))
    return nn.Sequential(*layers)


def region_head(channels: int, size: int, out: int, *, convs: int = 4) -> nn.Sequential:
    """Four 3x3 convolutions with batch norm and one linear layer on cells [N, C, size, size]: SoCo's head on FPN."""
    layers: list[nn.Module] = []
    for _ in range(convs):
        layers += [nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(True)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * size * size, out), nn.ReLU(True))


class _Total(torch.autograd.Function):
    """The sum of a tensor over all ranks. Each rank's loss depends on it, so its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Total.forward(ctx, gradient)


class AllReduceBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm with the statistics of all ranks, where `nn.SyncBatchNorm` has no kernel (CPU)."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"AllReduceBatchNorm: input must be [N, C, ...], got {list(input.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [N, C, ...] by the mean and variance over N and all ranks."""
        if not self.training:
            return super().forward(x)
        dims = [d for d in range(x.ndim) if d != 1]
        wide = x if x.dtype == torch.float64 else x.float()
        ones = wide.new_full((1,), x.numel() / x.shape[1])
        # Two rounds, so that the variance is taken around the mean of all: E[x^2] - E[x]^2 loses its digits in float32.
        total = _Total.apply(torch.cat((wide.sum(dims), ones)))
        count = total[-1]
        mean = total[:-1] / count
        shape = [1, -1, *[1] * (x.ndim - 2)]
        centred = wide - mean.view(shape)
        variance = _Total.apply((centred * centred).sum(dims)) / count
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean.detach(), self.momentum)
                self.running_var.lerp_(variance.detach() * (count / (count - 1)), self.momentum)
        normal = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            normal = normal * self.weight.view(shape) + self.bias.view(shape)
        return normal.to(x.dtype)


def with_norm(model: nn.Module, norm: Norm, device: torch.device) -> nn.Module:
    """The model with the batch norm asked for; with one process all kinds are plain batch norm."""
    if norm != "sync" or not dist.is_initialized() or dist.get_world_size() == 1:
        return model
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.__class__ = AllReduceBatchNorm  # the same weights, statistics and mode; only `forward` is another
    return model


def prepare_model(model: nn.Module, config: RunConfig, device: torch.device) -> nn.Module:
    """Norm, memory order and compilation as the config asks, on the device; before the optimiser is made."""
    model = with_norm(model, config.norm, device).to(device)
    if config.channels_last and device.type == "cuda":  # on a CPU, maps in two orders make a step many times slower
        model = model.to(memory_format=torch.channels_last)
    if config.compile:
        for child in model.children():  # in place, so that the state dict keeps its names
            child.compile()
    return model


@torch.no_grad()
def summed(x: Tensor) -> Tensor:
    """A tensor added up over all processes, inside a model's forward; no gradient."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total


@torch.no_grad()
def shuffled(encoder: Callable[..., Any], key: Key, *inputs: Tensor) -> Any:
    """encoder(*inputs) with the rows of all processes dealt anew, so that no batch norm sees a query with its key.

    The deal is drawn from the key. What belongs to a row, as its boxes or points do, is an input and goes with it;
    every output, be it one tensor or a tuple, comes back in the rows' own order.
    """
    rank, size = dist.get_rank(), len(inputs[0])
    deal = torch.argsort(gathered(key.uniform("shuffle", 1)[:, 0]), stable=True)
    mine = deal[rank * size : (rank + 1) * size]
    back = torch.argsort(deal)[rank * size : (rank + 1) * size]
    outputs = encoder(*(gathered(x)[mine] for x in inputs))
    return gathered(outputs)[back] if isinstance(outputs, Tensor) else tuple(gathered(x)[back] for x in outputs)


def rank() -> int:
    """Which of the processes this one is."""
    return dist.get_rank() if dist.is_initialized() else 0


@torch.no_grad()
def gathered(x: Tensor) -> Tensor:
    """The rows of all processes, in their order; no gradient."""
    if not dist.is_initialized():
        return x.detach()
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


@torch.no_grad()
def spread(vectors: Tensor) -> Tensor:
    """Standard deviation of unit vectors [..., D] times sqrt(D): about 1 when they fill the sphere, 0 at collapse."""
    unit = nn.functional.normalize(vectors.flatten(0, -2).float(), dim=1)
    return unit.std(0, correction=0).mean() * unit.shape[1] ** 0.5

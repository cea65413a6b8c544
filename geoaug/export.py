"""A trained backbone in the files that other libraries load: torchvision, timm, detectron2, mmdet, safetensors.

Everything starts from a ResNet's tensors under torchvision's names, as `read_backbone` gives them; a Swin Transformer's
can be written under these names alone. What a name does not say, and the other side must be told:

* the stride of a bottleneck is in its 3x3 convolution: detectron2 `MODEL.RESNETS.STRIDE_IN_1X1 False`, mmdet
  `style="pytorch"`; timm and torchvision have it there;
* images are RGB, with ImageNet's mean and deviation: detectron2 `INPUT.FORMAT "RGB"`, `MODEL.PIXEL_MEAN
  [123.675, 116.28, 103.53]`, `MODEL.PIXEL_STD [58.395, 57.12, 57.375]`; mmdet `bgr_to_rgb=True` and the same numbers.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from .geometry import checks
from .weights import SWIN

Format = Literal["torchvision", "timm", "detectron2", "mmdet", "safetensors"]

_SUFFIX = {"detectron2": ".pkl", "safetensors": ".safetensors"}  # by which the readers know them; else .pth
_NORM = ("weight", "bias", "running_mean", "running_var")
_NAME = re.compile(r"(?:(layer[1-4])\.(\d+)\.)?(?:(conv|bn)([1-3])|downsample\.([01]))\.(\w+)")


def trunk(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a ResNet's trunk, checked to be all there: torchvision's names, without the classifier `fc`.

    A Swin-T's go as they are, without its classifier `head`.

    >>> import torchvision
    >>> len(trunk(torchvision.models.resnet18().state_dict()))
    120
    """
    if SWIN in state:
        return _swin(state)
    kept = {name: x for name, x in state.items() if not name.startswith("fc.")}
    for name, x in kept.items():
        match = _NAME.fullmatch(name)
        known = match is not None and (match[1] is not None or name.startswith(("conv1.", "bn1.")))
        checks.require(known, "trunk", "state", "a ResNet's, under torchvision's names", f"one with {name!r}")
        checks.require(isinstance(x, Tensor), "trunk", f"state[{name!r}]", "a tensor", type(x).__name__)
    missing = [name for name in _needed(kept) if name not in kept]
    checks.require(not missing, "trunk", "state", "whole", f"one without {', '.join(missing[:3])}")
    return kept


def _swin(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A Swin-T's tensors, checked to be all there."""
    from torchvision.models import swin_t  # here, since torchvision takes a second to import

    with torch.device("meta"):
        names = [name for name in swin_t(weights=None).state_dict() if not name.startswith("head.")]
    missing = [name for name in names if name not in state]
    checks.require(not missing, "trunk", "state", "whole", f"one without {', '.join(missing[:3])}")
    return {name: state[name] for name in names}


def _needed(state: Mapping[str, Tensor]) -> list[str]:
    """The names that a ResNet of these blocks has."""
    deep = "layer1.0.conv3.weight" in state
    names = ["conv1.weight", *(f"bn1.{part}" for part in _NORM)]
    for stage in range(1, 5):
        blocks = {int(name.split(".")[1]) for name in state if name.startswith(f"layer{stage}.")}
        for block in range(max(blocks, default=0) + 1):
            prefix = f"layer{stage}.{block}"
            for i in range(1, 4 if deep else 3):
                names += [f"{prefix}.conv{i}.weight", *(f"{prefix}.bn{i}.{part}" for part in _NORM)]
            if block == 0 and (stage > 1 or deep):
                names += [f"{prefix}.downsample.0.weight", *(f"{prefix}.downsample.1.{part}" for part in _NORM)]
    return names


def _plain(x: Tensor) -> Tensor:
    """A tensor of its own, contiguous, on the CPU, so that a file holds it alone."""
    return x.detach().to("cpu", copy=True).contiguous()


def to_torchvision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The trunk for `torchvision.models.resnet50().load_state_dict(..., strict=False)`; timm has the same names."""
    return {name: _plain(x) for name, x in trunk(state).items()}


def to_mmdet(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The trunk for a backbone's `init_cfg=dict(type="Pretrained", checkpoint=FILE)`, without a prefix."""
    return {"meta": {"author": "geoaug"}, "state_dict": to_torchvision(state)}


def detectron2_name(name: str, *, box_head: bool = False) -> str | None:
    """detectron2's name for one of torchvision's; None for a counter of batches, which it does not have.

    >>> detectron2_name("layer1.0.downsample.1.running_var"), detectron2_name("bn1.bias")
    ('res2.0.shortcut.norm.running_var', 'stem.conv1.norm.bias')
    >>> detectron2_name("layer4.2.conv3.weight", box_head=True)
    'roi_heads.res5.2.conv3.weight'
    """
    match = _NAME.fullmatch(name)
    checks.require(match is not None, "detectron2_name", "name", "torchvision's for a part of a ResNet", repr(name))
    assert match is not None
    layer, block, kind, number, shortcut, part = match.groups()
    if part == "num_batches_tracked":
        return None
    norm = ".norm" if kind == "bn" or shortcut == "1" else ""
    unit = f"conv{number}" if number else "shortcut"
    if layer is None:
        return f"stem.{unit}{norm}.{part}"
    stage = int(layer.removeprefix("layer")) + 1
    return f"{'roi_heads.' if box_head and stage == 5 else ''}res{stage}.{block}.{unit}{norm}.{part}"


def to_detectron2(state: Mapping[str, Tensor], *, box_head: bool = False) -> dict[str, Any]:
    """The trunk as arrays under detectron2's names, for `MODEL.WEIGHTS FILE.pkl`.

    detectron2 matches names by their ends, so `res5` finds its place in a C5 or FPN backbone and in the box head of an
    R50-C4 detector alike. `box_head=True` names the latter in full, `roi_heads.res5`, and so fits R50-C4 alone. The
    extra norm behind res5 that MoCo's protocol adds there is trained from scratch.
    """
    named = {detectron2_name(name, box_head=box_head): x for name, x in trunk(state).items()}
    arrays: dict[str, np.ndarray[Any, Any]] = {
        name: _plain(x).float().numpy() for name, x in named.items() if name is not None
    }
    return {"model": arrays, "__author__": "geoaug", "matching_heuristics": True}


class _ArrayPickler(pickle.Pickler):
    """Writes an array as a call of `numpy.ndarray`; numpy 2's own way names a module that older ones lack.

    detectron2 reads pickles alone, so this is the one that geoaug writes; it reads none.
    """

    def reducer_override(self, obj: object) -> Any:
        if type(obj) is not np.ndarray:
            return NotImplemented
        return np.ndarray, (obj.shape, obj.dtype.str, bytearray(obj.tobytes()))


def write_backbone(state: Mapping[str, Tensor], to: Format, out: Path | str, *, box_head: bool = False) -> int:
    """Write a backbone for another library, whole or not at all; gives the number of tensors written.

    Suffixes are those the readers know: .pkl for detectron2, .safetensors, else .pth.

    >>> write_backbone(read_backbone("runs/d3ssl"), "detectron2", "d3ssl.pkl")           # doctest: +SKIP
    265
    """
    where, out = "write_backbone", Path(out)
    checks.require(to in get_args(Format), where, "to", f"one of {', '.join(get_args(Format))}", repr(to))
    suffix = _SUFFIX.get(to, ".pth")
    checks.require(out.suffix == suffix, where, "out", f"a {suffix} file for {to}", str(out))
    checks.require(to == "detectron2" or not box_head, where, "box_head", "False but for detectron2", box_head)
    known = SWIN not in state or to in ("torchvision", "safetensors")
    checks.require(known, where, "to", "torchvision or safetensors for a Swin Transformer", repr(to))
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(out.name + ".part")
    try:
        if to == "detectron2":
            arrays = to_detectron2(state, box_head=box_head)
            with part.open("wb") as file:
                _ArrayPickler(file, protocol=4).dump(arrays)
            count = len(arrays["model"])
        elif to == "safetensors":
            count = _write_safetensors(to_torchvision(state), part)
        else:
            tensors = to_torchvision(state)
            torch.save(to_mmdet(state) if to == "mmdet" else tensors, part)
            count = len(tensors)
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)
    return count


def _write_safetensors(tensors: dict[str, Tensor], file: Path) -> int:
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise ImportError("write_backbone needs safetensors: pip install 'geoaug[train]'") from None
    save_file(tensors, file, metadata={"format": "pt"})
    return len(tensors)

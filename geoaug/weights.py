"""Backbones on the disk: a run's newest checkpoint, a .pth, a .safetensors; read without pickles."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .geometry import checks

CHECKPOINT = 1  # format of a trainer's checkpoint
SWIN = "features.0.0.weight"  # torchvision's name for a Swin Transformer's first weights, which no ResNet has
_WRAPPERS = ("state_dict", "model")  # where other tools put the weights inside their files


def latest(path: Path) -> Path | None:
    """The newest whole checkpoint of a run folder, or the file itself; None where there is none."""
    if path.is_file():
        return path
    files = sorted((path / "checkpoints").glob("step-*.pt")) if path.is_dir() else []
    return files[-1] if files else None


def read_backbone(path: Path | str) -> dict[str, Tensor]:
    """The weights of a ResNet, or of a Swin Transformer, under torchvision's names, without the classifier.

    `path` is a run folder or checkpoint of a trainer (its student's trunk), or a .pth or .safetensors of torchvision's
    names, bare or under "state_dict" or "model".

    >>> read_backbone("runs/d3ssl")["conv1.weight"].shape                                 # doctest: +SKIP
    torch.Size([64, 3, 7, 7])
    """
    where = "read_backbone"
    file = latest(Path(path))
    checks.require(file is not None, where, "path", "a file, or a run folder with a checkpoint", str(path))
    assert file is not None
    state = _read(file)
    if "backbone" in state and isinstance(state.get("model"), Mapping):
        prefix = state["backbone"]
        weights = {n.removeprefix(prefix): x for n, x in state["model"].items() if n.startswith(prefix)}
    else:
        inner = next((state[name] for name in _WRAPPERS if isinstance(state.get(name), Mapping)), state)
        classifier = "head." if SWIN in inner else "fc."
        weights = {name: x for name, x in inner.items() if isinstance(x, Tensor) and not name.startswith(classifier)}
    needed = ("norm.weight",) if SWIN in weights else ("conv1.weight", "bn1.weight", "layer4.0.conv1.weight")
    missing = [name for name in needed if name not in weights]
    got = f"{file.name} without {', '.join(missing)}"
    checks.require(not missing, where, "path", "a ResNet under torchvision's names", got)
    wrong = [name for name, x in weights.items() if not bool(x.isfinite().all())]
    checks.require(not wrong, where, "path", "finite weights", f"{file.name}, whose {', '.join(wrong[:1])} is not")
    return weights


def _read(file: Path) -> Mapping[str, Any]:
    expected = "a checkpoint that holds tensors alone"
    if file.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise ImportError("read_backbone needs safetensors: pip install 'geoaug[train]'") from None
        read: Any = load_file
    else:
        read = _load
    try:
        state = read(file)
    except Exception as error:  # a truncated zip, a pickle with code in it, another kind of file
        raise ValueError(f"read_backbone: path must be {expected}, got {file} ({type(error).__name__})") from None
    checks.require(isinstance(state, Mapping), "read_backbone", "path", expected, file)
    return dict(state)


def _load(file: Path) -> Any:
    return torch.load(file, map_location="cpu", weights_only=True)

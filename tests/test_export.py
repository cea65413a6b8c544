"""Every format is proved by a forward pass that reads the file by the other library's names, not by names alone."""

import pickle

import numpy as np
import pytest
import torch
import torchvision
from torch.nn import functional
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from geoaug import export
from geoaug.weights import read_backbone

ARCHES = ("basic", "bottleneck")


def make(arch):
    """A ResNet of few and narrow blocks, of both kinds and with every kind of shortcut; or one of torchvision's own."""
    if arch == "basic":
        return ResNet(BasicBlock, [2, 1, 1, 2]).eval()
    if arch == "bottleneck":
        return ResNet(Bottleneck, [1, 2, 1, 2], width_per_group=8).eval()
    return getattr(torchvision.models, arch)(weights=None).eval()


def trained(arch, seed=0):
    """A network whose norms have all moved, so that a tensor in the wrong place shows."""
    torch.manual_seed(seed)
    net = make(arch)
    for name, x in net.state_dict().items():
        if name.endswith(("running_mean", "bias")):
            x.normal_(0, 0.1)
        elif name.endswith("running_var") or x.ndim == 1:
            x.uniform_(0.5, 1.5)
        elif name.endswith("num_batches_tracked"):
            x.fill_(7)
    return net


@torch.no_grad()
def stages(net, images):
    """C2 to C5 of torchvision's own network."""
    x = net.maxpool(net.relu(net.bn1(net.conv1(images))))
    maps = []
    for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
        x = layer(x)
        maps.append(x)
    return maps


IMAGES = torch.rand(2, 3, 48, 64, generator=torch.Generator().manual_seed(0))


def unit(arrays, x, conv, norm, stride=1, padding=0):
    """A convolution and its norm, read from arrays by their names."""
    weight, gain, bias, mean, var = (
        torch.as_tensor(arrays[name])
        for name in (
            conv + ".weight",
            *(f"{norm}.{part}" for part in ("weight", "bias", "running_mean", "running_var")),
        )
    )
    x = functional.conv2d(x, weight, stride=stride, padding=padding)
    shape = (1, -1, 1, 1)
    return (x - mean.view(shape)) * (gain / (var + 1e-5).sqrt()).view(shape) + bias.view(shape)


def block(arrays, x, units, shortcut, stride):
    """A residual block of 3x3, 3x3 or of 1x1, 3x3, 1x1; the stride is in the first 3x3 (STRIDE_IN_1X1 False)."""
    identity = unit(arrays, x, *shortcut, stride=stride) if shortcut[0] + ".weight" in arrays else x
    for i, (conv, norm) in enumerate(units):
        side = arrays[conv + ".weight"].shape[-1]
        strides = stride if i == (len(units) == 3) else 1
        x = unit(arrays, x, conv, norm, strides, side // 2)
        x = x if i == len(units) - 1 else x.relu()
    return (x + identity).relu()


def detectron2_stage(arrays, x, prefix, stride):
    """One of res2 to res5."""
    i = 0
    while f"{prefix}.{i}.conv1.weight" in arrays:
        names = [f"{prefix}.{i}.conv{j}" for j in (1, 2, 3) if f"{prefix}.{i}.conv{j}.weight" in arrays]
        shortcut = f"{prefix}.{i}.shortcut"
        units = [(name, name + ".norm") for name in names]
        x = block(arrays, x, units, (shortcut, shortcut + ".norm"), stride if i == 0 else 1)
        i += 1
    assert i > 0
    return x


def detectron2_maps(arrays, x, res5="res5"):
    x = unit(arrays, x, "stem.conv1", "stem.conv1.norm", 2, 3).relu()
    x = functional.max_pool2d(x, 3, 2, 1)
    maps = []
    for prefix, stride in (("res2", 1), ("res3", 2), ("res4", 2), (res5, 2)):
        x = detectron2_stage(arrays, x, prefix, stride)
        maps.append(x)
    return maps


def mmdet_maps(arrays, x):
    x = functional.max_pool2d(unit(arrays, x, "conv1", "bn1", 2, 3).relu(), 3, 2, 1)
    maps = []
    for stage in (1, 2, 3, 4):
        for i in range(sum(name.startswith(f"layer{stage}.") and name.endswith("conv1.weight") for name in arrays)):
            prefix = f"layer{stage}.{i}"
            units = [(f"{prefix}.conv{j}", f"{prefix}.bn{j}") for j in (1, 2, 3) if f"{prefix}.bn{j}.weight" in arrays]
            shortcut = (f"{prefix}.downsample.0", f"{prefix}.downsample.1")
            x = block(arrays, x, units, shortcut, 2 if stage > 1 and i == 0 else 1)
        maps.append(x)
    return maps


def assert_same(found, expected):
    assert len(found) == len(expected) == 4
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))
    assert float(expected[-1].std()) > 1e-3


class ArraysAlone(pickle.Unpickler):
    """Reads our own file in this test as a careful reader would: arrays and plain values, nothing that runs code."""

    def find_class(self, module, name):
        assert (module, name) in {("numpy", "ndarray"), ("builtins", "bytearray")}
        return super().find_class(module, name)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("box_head", [False, True])
def test_detectron2(tmp_path, arch, box_head):
    net = trained(arch)
    count = export.write_backbone(net.state_dict(), "detectron2", tmp_path / "b.pkl", box_head=box_head)
    with (tmp_path / "b.pkl").open("rb") as file:
        written = ArraysAlone(file).load()
    assert written["__author__"] == "geoaug"
    assert written["matching_heuristics"] is True
    arrays = written["model"]
    assert count == len(arrays)
    assert all(type(x) is np.ndarray and x.dtype == np.float32 and x.flags.writeable for x in arrays.values())
    res5 = "roi_heads.res5" if box_head else "res5"
    assert_same(detectron2_maps(arrays, IMAGES, res5), stages(net, IMAGES))
    assert not any("num_batches" in name for name in arrays)


@pytest.mark.parametrize("arch", ARCHES)
def test_torchvision_and_safetensors(tmp_path, arch):
    net = trained(arch)
    for to, name in (("torchvision", "b.pth"), ("safetensors", "b.safetensors")):
        count = export.write_backbone(net.state_dict(), to, tmp_path / name)
        weights = read_backbone(tmp_path / name)
        other = make(arch)
        missing, unexpected = other.load_state_dict(weights, strict=False)
        assert (sorted(missing), unexpected, count) == (["fc.bias", "fc.weight"], [], len(weights))
        assert_same(stages(other, IMAGES), stages(net, IMAGES))
        assert_same(mmdet_maps(weights, IMAGES), stages(net, IMAGES))


@pytest.mark.parametrize("arch", ARCHES)
def test_mmdet(tmp_path, arch):
    net = trained(arch)
    export.write_backbone(net.state_dict(), "mmdet", tmp_path / "b.pth")
    written = torch.load(tmp_path / "b.pth", weights_only=True)
    assert sorted(written) == ["meta", "state_dict"]
    assert_same(mmdet_maps(written["state_dict"], IMAGES), stages(net, IMAGES))


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_timm(tmp_path, arch):
    timm = pytest.importorskip("timm")
    net = trained(arch)
    export.write_backbone(net.state_dict(), "timm", tmp_path / "b.pth")
    other = timm.create_model(arch, pretrained=False, num_classes=0).eval()
    other.load_state_dict(torch.load(tmp_path / "b.pth", weights_only=True))
    with torch.no_grad():
        x = other.maxpool(other.act1(other.bn1(other.conv1(IMAGES))))
        maps = []
        for layer in (other.layer1, other.layer2, other.layer3, other.layer4):
            x = layer(x)
            maps.append(x)
        assert torch.allclose(other.forward_features(IMAGES), x)
    assert_same(maps, stages(net, IMAGES))


def test_names_of_a_resnet50():
    arrays = export.to_detectron2(torchvision.models.resnet50(weights=None).state_dict())["model"]
    assert len(arrays) == 53 * 5
    assert arrays["res4.5.conv2.norm.running_var"].shape == (256,)
    assert arrays["res5.0.shortcut.weight"].shape == (2048, 1024, 1, 1)


def test_files_hold_the_trunk_alone(tmp_path):
    """Views into larger tensors, parameters, half precision and another memory order are written as plain tensors."""
    net = trained("basic").to(memory_format=torch.channels_last)
    state = {name: torch.stack((x, x))[1] for name, x in net.state_dict().items()}
    state["conv1.weight"] = torch.nn.Parameter(net.conv1.weight.half())
    export.write_backbone(state, "torchvision", tmp_path / "b.pth")
    written = torch.load(tmp_path / "b.pth", weights_only=True)
    assert written["conv1.weight"].dtype == torch.float16
    assert not any(isinstance(x, torch.nn.Parameter) or not x.is_contiguous() for x in written.values())
    assert (tmp_path / "b.pth").stat().st_size < 1.05 * sum(x.nbytes for x in written.values())
    assert export.to_detectron2(state)["model"]["stem.conv1.weight"].dtype == np.float32
    assert state["conv1.weight"].requires_grad


def test_nothing_is_left_of_a_write_that_fails(tmp_path, monkeypatch):
    state = trained("basic").state_dict()
    (tmp_path / "b.pth").write_text("before")

    def full(obj, file):
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        export.write_backbone(state, "torchvision", tmp_path / "b.pth")
    assert [file.name for file in tmp_path.iterdir()] == ["b.pth"]
    assert (tmp_path / "b.pth").read_text() == "before"


@pytest.mark.usefixtures("our_errors")
def test_bad_input_is_named(tmp_path):
    state = trained("basic").state_dict()
    without = {name: x for name, x in state.items() if name != "layer3.0.downsample.1.bias"}
    shallow = {name: x for name, x in state.items() if not name.startswith("layer4.")}
    deep = {name: x for name, x in make("bottleneck").state_dict().items() if "layer1.0.downsample" not in name}
    bad = [
        (lambda: export.trunk(deep), "trunk: state must be whole, got one without layer1.0.downsample.0.weight"),
        (lambda: export.trunk(without), "trunk: state must be whole, got one without layer3.0.downsample.1.bias"),
        (lambda: export.trunk(shallow), "trunk: state must be whole, got one without layer4.0.conv1.weight"),
        (lambda: export.trunk({}), "trunk: state must be whole, got one without conv1.weight"),
        (lambda: export.trunk({"backbone." + n: x for n, x in state.items()}), "trunk: state must be a ResNet's"),
        (lambda: export.trunk(state | {"conv2.weight": state["conv1.weight"]}), "got one with 'conv2.weight'"),
        (lambda: export.trunk(state | {"bn1.bias": 1.0}), r"trunk: state\['bn1.bias'\] must be a tensor"),
        (lambda: export.write_backbone(state, "keras", tmp_path / "b.pth"), "to must be one of torchvision, timm"),
        (lambda: export.write_backbone(state, "detectron2", tmp_path / "b.pth"), "out must be a .pkl file"),
        (lambda: export.write_backbone(state, "timm", tmp_path / "b.pth", box_head=True), "box_head must be False"),
        (lambda: export.detectron2_name("fc.weight"), "detectron2_name: name must be"),
    ]
    for call, message in bad:
        with pytest.raises(ValueError, match=message):
            call()
    assert list(tmp_path.iterdir()) == []

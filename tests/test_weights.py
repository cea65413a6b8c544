import pickle

import pytest
import torch
from torch import nn

from geoaug.weights import latest, read_backbone
from trainers import common


@pytest.fixture(scope="module")
def trunk():
    torch.manual_seed(0)
    return common.Trunk("resnet10")


class Two(nn.Module):
    def __init__(self, trunk):
        super().__init__()
        self.student = nn.ModuleDict({"trunk": trunk, "head": nn.Linear(3, 2)})
        self.teacher = nn.ModuleDict({"trunk": common.Trunk("resnet10")})


def same(found, trunk):
    weights = trunk.state_dict()
    return list(found) == list(weights) and all(torch.equal(found[name], weights[name]) for name in weights)


def test_a_run_gives_its_students_trunk_of_its_newest_checkpoint(trunk, tmp_path):
    model = Two(trunk)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    about = {"method": "m", "config": {}, "backbone": "student.trunk.", "loader": {}}
    with torch.no_grad():
        keep = trunk.conv1.weight.clone()
        trunk.conv1.weight.zero_()
        common.save_checkpoint(tmp_path, {**about, "step": 9}, model, optimizer, None)
        trunk.conv1.weight.copy_(keep)
        file = common.save_checkpoint(tmp_path, {**about, "step": 10}, model, optimizer, None)
    (tmp_path / "checkpoints" / "step-00000011.pt.part").write_bytes(b"half")
    assert latest(tmp_path) == file
    assert same(read_backbone(tmp_path), trunk)
    assert same(read_backbone(str(file)), trunk)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_a_file_of_torchvisions_names_is_read_bare_or_wrapped_and_loses_its_classifier(wrapper, trunk, tmp_path):
    weights = {**trunk.state_dict(), "fc.weight": torch.zeros(10, 512), "fc.bias": torch.zeros(10)}
    torch.save(weights if wrapper is None else {wrapper: weights, "epoch": 3}, tmp_path / "a.pth")
    assert same(read_backbone(tmp_path / "a.pth"), trunk)


def test_safetensors(trunk, tmp_path):
    from safetensors.torch import save_file

    save_file(trunk.state_dict(), tmp_path / "a.safetensors")
    found = read_backbone(tmp_path / "a.safetensors")
    assert found.keys() == trunk.state_dict().keys()
    assert all(torch.equal(found[name], x) for name, x in trunk.state_dict().items())
    (tmp_path / "a.safetensors").write_bytes(b"half a file")
    with pytest.raises(ValueError, match="read_backbone: path must be"):
        read_backbone(tmp_path / "a.safetensors")


class Code:
    def __reduce__(self):
        return (open, ("executed", "w"))


@pytest.mark.parametrize("kind", ["pickle", "text", "truncated", "other names", "list", "nan", "nothing", "no run"])
def test_what_is_no_backbone_is_told_in_one_line(kind, trunk, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "a.pth"
    torch.save(trunk.state_dict(), file)
    if kind == "pickle":
        file.write_bytes(pickle.dumps({"conv1.weight": Code()}))
    elif kind == "text":
        file.write_text("hello")
    elif kind == "truncated":
        file.write_bytes(file.read_bytes()[:10_000])
    elif kind == "other names":
        torch.save({"encoder." + name: x for name, x in trunk.state_dict().items()}, file)
    elif kind == "list":
        torch.save([torch.zeros(3)], file)
    elif kind == "nan":
        torch.save({**trunk.state_dict(), "bn1.bias": torch.full((64,), torch.nan)}, file)
    elif kind == "nothing":
        file.unlink()
    elif kind == "no run":
        file = tmp_path
    with pytest.raises(ValueError, match="read_backbone: path must be") as told:
        read_backbone(file)
    assert len(str(told.value).splitlines()) == 1
    assert not (tmp_path / "executed").exists()


def test_the_newest_checkpoint(tmp_path):
    assert latest(tmp_path) is None
    assert latest(tmp_path / "none") is None
    (tmp_path / "checkpoints").mkdir()
    assert latest(tmp_path) is None
    for step in (9, 10, 2):
        (tmp_path / "checkpoints" / f"step-{step:08d}.pt").touch()
    assert latest(tmp_path).name == "step-00000010.pt"

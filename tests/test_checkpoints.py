import os
import pickle
import resource
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from trainers import common
from trainers.checkpoints import FREE, KEPT


def about(method="m", **config):
    return {"method": method, "backbone": "0.", "geoaug": "1", "config": {"size": 32, "data": "here", **config}}


def trained(steps=2, kind="lars", width=7):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, width), nn.BatchNorm1d(width))
    if kind == "lars":
        optimizer = common.LARS(common.weights_and_vectors(model.parameters(), weight_decay=1e-3), lr=0.1)
    else:
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for step in range(steps):
        one_step(model, optimizer, step)
    return model, optimizer


def one_step(model, optimizer, step):
    optimizer.zero_grad()
    model(torch.randn(4, 5, generator=torch.Generator().manual_seed(step))).sin().sum().backward()
    optimizer.step()


def saved(folder, step=2, model_of=trained, **config):
    model, optimizer = model_of()
    state = {**about(**config), "step": step, "loader": {"epoch": 1, "step": 3}}
    return common.save_checkpoint(folder, state, model, optimizer, None)


@pytest.mark.parametrize("kind", ["lars", "sgd"])
def test_what_is_saved_goes_on_as_if_nothing_had_been(kind, tmp_path):
    model, optimizer = trained(kind=kind)
    state = {**about(), "step": 2, "loader": {"epoch": 1, "step": 3}}
    file = common.save_checkpoint(tmp_path, state, model, optimizer, None)
    assert file == tmp_path / "checkpoints" / "step-00000002.pt"
    other, its = trained(0, kind)
    assert common.load_checkpoint(file, other, its, None, about=about()) == {
        "step": 2, "loader": {"epoch": 1, "step": 3},
    }  # fmt: skip
    for m, o in ((model, optimizer), (other, its)):
        one_step(m, o, 9)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_the_scaler_goes_on_too(tmp_path):
    model, optimizer = trained()
    state = {**about(), "step": 2, "loader": {}}
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    scaler.scale(torch.ones(()))  # its scale is made at the first use
    file = common.save_checkpoint(tmp_path, state, model, optimizer, scaler)
    other = torch.amp.GradScaler("cpu")
    common.load_checkpoint(file, *trained(0), other, about=about())
    assert other.get_scale() == 512.0


def test_the_last_ones_are_kept_and_no_part_is_left(tmp_path):
    for step in (2, 10, 9, 100):
        saved(tmp_path, step)
    names = sorted(f.name for f in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000010.pt", "step-00000100.pt"]
    assert len(names) == KEPT


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)  # no test pulls the plug


class Code:
    def __reduce__(self):
        return (open, ("executed", "w"))


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


def with_code(file):
    file.write_bytes(pickle.dumps({"format": 1, "model": Code()}))


def with_code_in_a_zip(file):
    torch.save({"format": 1, "model": Code()}, file)


BAD = {
    "truncated": cut,
    "empty": lambda file: file.write_bytes(b""),
    "text": lambda file: file.write_text("hello\n"),
    "pickle": with_code,
    "zip with a pickle": with_code_in_a_zip,
    "tensors alone": lambda file: torch.save({"conv1.weight": torch.zeros(3)}, file),
    "a list": lambda file: torch.save([1, 2], file),
    "half of it": lambda file: torch.save({"format": 1, "method": "m"}, file),
    "another format": lambda file: torch.save({**torch.load(file), "format": 2}, file),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_checkpoint_is_told_in_one_line(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = saved(tmp_path)
    BAD[kind](file)
    model, optimizer = trained(0)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="checkpoint") as told:
        common.load_checkpoint(file, model, optimizer, None, about=about())
    assert len(str(told.value).splitlines()) == 1
    assert not (tmp_path / "executed").exists()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_another_method_other_settings_and_other_shapes_are_told(tmp_path):
    file = saved(tmp_path, queue=64)
    for wrong, message in (
        (about("n", queue=64), "must be of method n, got one of m"),
        (about(queue=128, size=64), "--queue 64 there, 128 here, --size 32 there, 64 here"),
        (about(), "--queue 64 there, None here"),
    ):
        with pytest.raises(ValueError, match=message):
            common.load_checkpoint(file, *trained(0), None, about=wrong)
    with pytest.raises(ValueError, match=r"0.bias is \[7\] there, \[6\] here"):
        common.load_checkpoint(file, *trained(0, width=6), None, about=about(queue=64))


def test_settings_that_train_nothing_else_may_change(tmp_path):
    file = saved(tmp_path)
    model, optimizer = trained(0)
    changed = about(**dict.fromkeys(FREE, "other"))
    assert common.load_checkpoint(file, model, optimizer, None, about=changed)["step"] == 2
    assert not FREE & {"seed", "batch_size", "accumulate", "epochs", "lr", "size", "arch", "norm", "precision"}


@contextmanager
def full_disk(size):
    """No file may grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def wide():
    return trained(width=20_000)


@pytest.mark.parametrize("size", [0, 1000, 300_000])
def test_a_full_disk_leaves_the_checkpoint_before(size, tmp_path):
    first = saved(tmp_path, 2, wide)
    bytes_before = first.read_bytes()
    with full_disk(size), pytest.raises(OSError, match=r".") as told:
        saved(tmp_path, 3, wide)
    assert len(str(told.value).splitlines()) == 1
    assert [f.name for f in (tmp_path / "checkpoints").iterdir()] == [first.name]
    assert first.read_bytes() == bytes_before
    saved(tmp_path, 3, wide)  # and when there is room again it is written
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_a_disk_that_fails_when_the_file_ends_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    first = saved(tmp_path)
    for error in (RuntimeError("unexpected pos 64\nand a trace"), OSError(28, "No space left on device"), OSError()):

        def half(whole, out, error=error):
            out.write(b"half")
            raise error

        monkeypatch.setattr(torch, "save", half)
        with pytest.raises(OSError, match=r"^(unexpected pos 64|.*No space left on device|OSError)$"):
            saved(tmp_path, 3)
        assert [f.name for f in (tmp_path / "checkpoints").iterdir()] == [first.name]


def test_a_kill_while_saving_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    first = saved(tmp_path)

    def killed(whole, out):
        out.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        saved(tmp_path, 3)
    assert list((tmp_path / "checkpoints").glob("step-*.pt")) == [first]

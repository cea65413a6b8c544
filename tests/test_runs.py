import json
import os
import resource
import signal
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from torch import nn

from trainers import common


@dataclass
class Config(common.RunConfig):
    epochs: int = 3
    batch_size: int = 2
    log_every: int = 1
    save_every: int = 4
    cpu: bool = True
    width: int = 3


class Loader:
    """Five steps an epoch of numbers that depend on epoch and place alone; no images."""

    failures: dict = {}  # noqa: RUF012
    masks: list = []  # noqa: RUF012  the signals kept away while each batch was made

    def __init__(self):
        self.epoch, self.position = 0, 0

    def __len__(self):
        return 5

    def __iter__(self):
        epoch = self.epoch
        for step in range(self.position, 5):
            self.position = step + 1
            Loader.masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
            x = torch.randn(2, 3, generator=torch.Generator().manual_seed(100 * epoch + step))
            yield SimpleNamespace(x=x, names=[f"{epoch}/{step}a.jpg", f"{epoch}/{step}b.jpg"])
        self.epoch, self.position = epoch + 1, 0

    def state_dict(self):
        return {"epoch": self.epoch, "step": self.position, "images": "these"}

    def load_state_dict(self, state):
        if state["images"] != "these":
            raise ValueError("Loader.load_state_dict: images must be these")
        self.epoch, self.position = state["epoch"], state["step"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Threads that wait for each other on shared cores make these small steps many times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _fresh_accelerate(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)  # no test pulls the plug
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def config(tmp_path):
    return Config(data=tmp_path, output=tmp_path / "run")


def train(config, each=lambda step, loss, model: loss):
    """A trainer's loop; `each` may change the loss of a step, the model, or send a signal."""
    accelerator = common.start(config)
    model = nn.Sequential(nn.Linear(3, config.width), nn.BatchNorm1d(config.width))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model, optimizer = accelerator.prepare(model, optimizer)
    with common.Run(config, accelerator, Loader(), model=model, optimizer=optimizer, backbone="0.") as run:
        for step, batch in run.batches():
            lr = common.set_lr(optimizer, step, run.total, peak=0.1)
            loss = each(step, model(batch.x).sin().sum() + 9, model)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            run.end_step(batch.names, loss, [{"spread": loss * 0 + 1}], lr=lr)
    return run


def lines(config):
    if not (config.output / "metrics.jsonl").exists():
        return []
    return [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()]


def checkpoints(config):
    return [f.name for f in sorted((config.output / "checkpoints").iterdir())]


def final(config):
    return torch.load(config.output / "checkpoints" / "step-00000015.pt", weights_only=True)


def same(a, b):
    pairs = zip(a["model"].values(), b["model"].values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs) and a["loader"] == b["loader"]


def test_a_run_leaves_its_config_its_metrics_and_its_checkpoints(config, capsys):
    train(config)
    about = json.loads((config.output / "config.json").read_text())
    assert about["method"] == "test_runs"
    assert about["config"]["output"] == str(config.output)
    assert about["config"]["epochs"] == 3
    assert [line["step"] for line in lines(config)] == list(range(1, 16))
    assert lines(config)[4]["epoch"] == 1
    keys = {"step", "epoch", "loss", "lr", "spread", "step_s", "data_s", "images_per_s", "memory_mb"}
    assert set(lines(config)[0]) == keys
    assert checkpoints(config) == ["step-00000012.pt", "step-00000015.pt"]
    state = final(config)
    assert state["step"] == 15
    assert state["optimizer"]["state"]
    out = capsys.readouterr()
    assert out.out.splitlines() == [
        f"wrote {config.output}/checkpoints/step-00000015.pt: 15 steps of 15, 0 images not read"
    ]
    assert out.err == ""


@pytest.mark.parametrize("stops", [(3,), (5, 6), (4, 10, 14)])
def test_a_run_that_is_resumed_is_the_run_without_a_stop(stops, config, tmp_path):
    train(config)
    parts = replace(config, output=tmp_path / "parts")
    for stop in stops:
        assert train(replace(parts, max_steps=stop)).step == stop
    with (parts.output / "metrics.jsonl").open("a") as file:  # a run that was killed two steps after its checkpoint
        file.write(json.dumps({"step": stops[-1] + 1, "loss": 7.0}) + "\n" + '{"step": 1')
    train(parts)
    assert same(final(parts), final(config))
    numbers = [(line["step"], line["loss"], line["lr"]) for line in lines(parts)]
    assert numbers == [(line["step"], line["loss"], line["lr"]) for line in lines(config)]


def test_a_run_that_has_ended_does_nothing_more(config):
    train(config)
    before = (config.output / "metrics.jsonl").read_text()
    assert train(config).step == 15
    assert (config.output / "metrics.jsonl").read_text() == before
    assert train(replace(config, output=config.output.parent / "none", max_steps=0)).step == 0


@pytest.mark.parametrize(
    ("bad", "value"), [(0, torch.nan), (3, torch.nan), (4, torch.inf), (6, torch.nan), (7, torch.inf), (14, torch.nan)]
)
def test_a_loss_that_is_no_number_ends_the_run_and_is_never_saved(bad, value, config):
    def each(step, loss, model):
        return loss * value if step == bad else loss

    with pytest.raises(common.TrainingError) as told:
        train(config, each)
    good = bad // 4 * 4
    place = f"{config.output}/checkpoints/step-{good:08d}.pt" if good else "None"
    epoch, step = divmod(bad, 5)
    assert str(told.value) == (
        f"the loss of step {bad + 1} is {float(value)}; the images of that step here: {epoch}/{step}a.jpg, "
        f"{epoch}/{step}b.jpg; the last good checkpoint is {place}"
    )
    names = checkpoints(config) if good else []
    assert names == [f"step-{s:08d}.pt" for s in (good - 4, good) if s > 0]
    assert [line["step"] for line in lines(config)] == list(range(1, bad + 1))
    train(config)  # the run goes on from the last good one
    assert [line["step"] for line in lines(config)] == list(range(1, 16))


def test_weights_that_are_not_finite_are_never_saved(config):
    def each(step, loss, model):
        if step == 7:
            model[0].weight.register_hook(lambda g: g * torch.nan)
        return loss

    with pytest.raises(common.TrainingError, match=r"after step 8 0.weight is not finite; .*step-00000004.pt"):
        train(config, each)
    assert checkpoints(config) == ["step-00000004.pt"]


@contextmanager
def full_disk(size):
    """No file may grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_names_the_last_good_checkpoint_and_the_run_goes_on_from_it(config):
    wide = replace(config, width=50_000)
    train(replace(wide, max_steps=4))
    good = (wide.output / "checkpoints" / "step-00000004.pt").read_bytes()
    with full_disk(200_000), pytest.raises(common.TrainingError) as told:
        train(wide)
    assert str(told.value).startswith("step 8 could not be saved: ")
    assert str(told.value).endswith(f"the last good checkpoint is {wide.output}/checkpoints/step-00000004.pt")
    assert len(str(told.value).splitlines()) == 1
    assert checkpoints(wide) == ["step-00000004.pt"]
    assert (wide.output / "checkpoints" / "step-00000004.pt").read_bytes() == good
    train(wide)
    assert [line["step"] for line in lines(wide)] == list(range(1, 16))


@pytest.mark.parametrize(("number", "at"), [(signal.SIGTERM, 0), (signal.SIGUSR1, 6)])
def test_a_signal_saves_and_leaves_with_a_mark(number, at, config, tmp_path, capsys):
    def each(step, loss, model):
        if step == at:
            os.kill(os.getpid(), number)
        return loss

    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stop:
        train(config, each)
    assert stop.value.code == common.REQUEUE == 75
    assert signal.getsignal(number) is before
    assert (config.output / "requeue").exists()
    assert len(capsys.readouterr().err.splitlines()) == 1
    step = torch.load(config.output / "checkpoints" / checkpoints(config)[-1], weights_only=True)["step"]
    assert step == at + 2  # a signal is seen by all ranks at once, one step later
    assert [line["step"] for line in lines(config)] == list(range(1, step + 1))
    train(config)
    assert not (config.output / "requeue").exists()
    whole = replace(config, output=tmp_path / "whole")
    train(whole)
    assert same(final(config), final(whole))


def test_the_loaders_processes_inherit_that_signals_are_kept_away(config):
    """They start with the first batch of an epoch; one that dies of the signal would end the run without a save."""
    Loader.masks.clear()
    train(replace(config, max_steps=10))
    both = {signal.SIGTERM, signal.SIGUSR1}
    assert [both <= mask for mask in Loader.masks] == [True, False, False, False, False] * 2
    assert not any(both & mask for mask in Loader.masks[1:5])
    assert not both & signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_a_signal_in_the_last_steps_lets_the_run_end(config):
    def each(step, loss, model):
        if step == 13:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    assert train(config, each).step == 15
    assert not (config.output / "requeue").exists()


def test_what_a_killed_save_left_is_removed(config):
    train(replace(config, max_steps=4))
    part = config.output / "checkpoints" / "step-00000008.pt.part"
    part.write_bytes(b"half")
    train(replace(config, max_steps=5))
    assert not part.exists()


def refused(config, message):
    with pytest.raises(common.UsageError, match=message) as told:
        train(config)
    assert len(str(told.value).splitlines()) == 1


def test_resume_takes_what_it_is_told_and_overwrites_nothing(config, tmp_path):
    train(config)
    refused(replace(config, resume="none"), "--output must be a new folder with --resume none")
    refused(replace(config, resume=str(tmp_path / "nothing")), "--resume must be auto, none, a checkpoint or a run")
    earlier = str(config.output / "checkpoints" / "step-00000012.pt")
    refused(replace(config, resume=earlier), "--output must not hold newer checkpoints than --resume")
    other = replace(config, output=tmp_path / "other")
    train(replace(other, max_steps=5))
    refused(replace(other, resume=str(config.output)), "--output must not hold newer checkpoints than --resume")

    new = replace(config, output=tmp_path / "new", resume=earlier)
    train(new)
    assert same(final(new), final(config))
    assert [line["step"] for line in lines(new)] == [13, 14, 15]
    ended = replace(config, output=tmp_path / "ended", resume=str(config.output))
    train(ended)
    assert checkpoints(ended) == ["step-00000015.pt"]
    assert train(replace(config, resume=str(config.output))).step == 15


def test_a_checkpoint_that_does_not_fit_is_told_before_training(config, tmp_path):
    train(replace(config, max_steps=4))
    before = (config.output / "config.json").read_text()
    refused(replace(config, lr=9.0), "--resume: .*was made with other settings: --lr 0.3 there, 9.0 here")
    file = config.output / "checkpoints" / "step-00000004.pt"
    state = torch.load(file, weights_only=True)
    torch.save({**state, "loader": {**state["loader"], "images": "others"}}, file)
    refused(config, "--resume: .*images must be these")
    torch.save({**state, "method": "soco"}, file)
    refused(config, "must be of method test_runs, got one of soco")
    file.write_bytes(file.read_bytes()[:500])
    refused(config, "not a checkpoint")
    assert (config.output / "config.json").read_text() == before


def test_arguments_out_of_range_are_refused(config, tmp_path):
    for name, value in (
        ("epochs", 0), ("batch_size", 0), ("accumulate", 0), ("log_every", 0), ("save_every", -1), ("max_steps", -1),
        ("size", 0), ("lr", float("nan")), ("warmup_epochs", -0.5),
    ):  # fmt: skip
        refused(replace(config, **{name: value}), f"--{name.replace('_', '-')} must be at least")
    refused(replace(config, data=None), "--data must name a .beton, a folder")
    refused(replace(config, data=Path("/no/such/place")), "--data must exist, got /no/such/place")
    refused(replace(config, arch="vgg"), "--arch must be one of resnet10")
    refused(replace(config, norm="shuffle"), "--norm shuffle needs at least 2 processes")
    refused(replace(config, precision="fp16"), "--precision fp16 needs a GPU")
    refused(replace(config, accumulate=4), r"--batch-size must divide by 4 \(1 processes x 4 micro-batches\), got 2")
    with pytest.raises(common.UsageError, match=r"divide by 8 \(1 processes x 2 micro-batches x 4\), got 2"):
        common.start(replace(config, accumulate=2), rows=4)
    assert not config.output.exists()


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_told(tracker, config, monkeypatch):
    monkeypatch.setattr("trainers.arguments.find_spec", lambda name: None)
    refused(replace(config, tracker=tracker), f"--tracker {tracker} needs its package")


def test_tensorboard_gets_what_the_log_gets(config):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(replace(config, tracker="tensorboard", max_steps=3, log_every=1))
    files = config.output.rglob("events.out.tfevents.*")  # one is of the settings
    read = [event_accumulator.EventAccumulator(str(file)).Reload() for file in files]
    (events,) = [each for each in read if "loss" in each.Tags()["scalars"]]
    told = [(event.step, pytest.approx(event.value)) for event in events.Scalars("loss")]
    assert told == [(line["step"], line["loss"]) for line in lines(config)]
    assert len(told) == 3


def test_micro_batches_are_those_of_the_config_whatever_the_environment_says(config, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    accelerator = common.start(replace(config, accumulate=2))
    assert accelerator.gradient_accumulation_steps == 2

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from torch import nn

import geoaug
from data_prep import make_scenes
from tests import training
from trainers import byol, common, d3ssl, densesiam, lc_loss, moco_v2, plrc, scrl, simsiam, soco

TRAINERS = {
    "moco_v2": moco_v2,
    "soco": soco,
    "d3ssl": d3ssl,
    "byol": byol,
    "scrl": scrl,
    "lc_loss": lc_loss,
    "plrc": plrc,
    "simsiam": simsiam,
    "densesiam": densesiam,
}
FPN = ("--form", "fpn", "--roi-size", "7", "--arch", "resnet10-narrow")  # -tiny has maps of four times the cells
BIG = ("--size", "64", "--min-side", "4")  # views in which some proposals are seen
DINO = ("--preset", "demo-dino", "--dim", "64")


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Threads that wait for each other on shared cores make these small steps many times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    assert make_scenes.main(["--out", str(folder), "--images", "24", "--size", "96", "--workers", "1"]) == 0
    return folder / "instances.json"


@pytest.fixture(scope="module")
def broken(scenes, tmp_path_factory):
    """The same scenes with two that cannot be read, so that no part of a batch has as many terms as another."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "images").mkdir()
    for i, file in enumerate(sorted((scenes.parent / "images").iterdir())):
        (folder / "images" / file.name).write_bytes(b"no picture" if i in (3, 17) else file.read_bytes())
    (folder / "instances.json").write_bytes(scenes.read_bytes())
    return folder / "instances.json"


@pytest.fixture
def _fresh_accelerate(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)  # no test pulls the plug
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def big(method):
    return BIG if hasattr(TRAINERS[method].Config, "min_side") else BIG[:2]


def config_of(method, data, output, *more):
    trainer = TRAINERS[method]
    return common.parse(trainer.Config, trainer.PRESETS, training.command(method, data, output, *more))


def here(method, data, output, *more):
    """Train in this process."""
    TRAINERS[method].main(config_of(method, data, output, *more))
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return training.logged(output)


def same(a, b):
    """Bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def farthest(a, b):
    """The largest difference of two runs' weights, statistics and queues."""
    ours, theirs = a["model"], b["model"]
    assert ours.keys() == theirs.keys()
    return max(float((ours[name].double() - theirs[name].double()).abs().max()) for name in ours)


# -- whole runs -------------------------------------------------------------------------------------------------------


def near(run, other, tolerance=1e-5, gradients_of=None, gradients=1e-5):
    """Losses, weights and gradients of two runs, up to rounding.

    Gradients are those of the step `gradients_of`, by default the last one; after a few steps a unit in the last place
    is enough to send one past a kink of ReLU or another maximum of the pool, in one process too.
    """
    losses = [[line["loss"] for line in training.logged(r)] for r in (run, other)]
    assert len(losses[0]) > 1
    assert losses[0] == pytest.approx(losses[1], rel=tolerance, abs=tolerance)
    assert farthest(training.newest(run), training.newest(other)) < tolerance
    if gradients_of is None:
        first, second = training.newest(run), training.newest(other)
    else:
        name = f"checkpoints/step-{gradients_of:08}.pt"
        first, second = (torch.load(r / name, weights_only=True) for r in (run, other))
    assert farthest_gradients(first, second) < gradients


def farthest_gradients(a, b):
    """The largest difference of two runs' momenta, sums of gradients, as a share of the largest entry of all."""
    ours, theirs = (
        {(i, name): x.double() for i, state in each["optimizer"]["state"].items() for name, x in state.items()
         if name in ("momentum_buffer", "velocity", "exp_avg")}
        for each in (a, b)
    )  # fmt: skip
    assert ours.keys() == theirs.keys()
    assert ours
    apart = max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
    return apart / max(float(x.abs().max()) for x in ours.values())


def test_two_processes_of_torchrun_are_one(broken, tmp_path):
    more = ("--max-steps", "3", "--lr", "0.02")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, moco_v2.__file__, *training.command("moco_v2", broken, tmp_path / "two", *more)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            code = process.wait(training.PATIENCE)
        finally:
            process.terminate()  # which ends its processes too
    assert code == 0, (tmp_path / "log").read_text()
    one = training.command("moco_v2", broken, tmp_path / "one", *more)
    assert training.train("moco_v2", one, tmp_path / "log") == [0]
    near(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("soco", ("--lr", "0.1")),
        ("soco", ("--lr", "0.1", *FPN)),
        ("d3ssl", ()),
        ("byol", ("--lr", "0.1")),
        ("scrl", ("--lr", "0.1")),
        ("scrl", ("--lr", "0.1", "--on-fail", "drop", "--mean", "images")),
        ("lc_loss", ("--lr", "0.1", "--symmetric-local", "on")),
        ("lc_loss", DINO),
        ("plrc", ("--lr", "0.1", "--negatives", "global")),
        ("simsiam", ()),
        ("densesiam", ("--region-start", "0", "--points", "mild")),
    ],
)
def test_two_processes_are_one(method, more, broken, tmp_path):
    more = (*big(method), "--max-steps", "2", "--save-every", "1", *more)
    for world in (1, 2):
        command = training.command(method, broken, tmp_path / str(world), *more)
        assert training.train(method, command, tmp_path / "log", world=world) == [0] * world
    # D3SSL's first loss is 0: its queue is empty. The gradients of the pyramid's maps of 2 x 2 cells move by 2e-3 when
    # the weights move by a unit in the last place, on one process; a wrong weight of a process would be far more.
    gradients = 5e-3 if "fpn" in more else 1e-5
    near(tmp_path / "1", tmp_path / "2", gradients_of=2 if method == "d3ssl" else 1, gradients=gradients)


@pytest.mark.usefixtures("_fresh_accelerate")
def test_a_beton_trains_as_its_json_does_and_goes_on(scenes, tmp_path):
    pytest.importorskip("ffcv")
    from data_prep import write_beton

    file = tmp_path / "scenes.beton"
    assert write_beton.main([str(scenes), "--out", str(file), "--workers", "1"]) == 0
    json, beton = (here("d3ssl", data, tmp_path / data.suffix[1:], "--max-steps", "3") for data in (scenes, file))
    assert [line["loss"] for line in json] == [line["loss"] for line in beton]
    here("d3ssl", file, tmp_path / "stopped", "--max-steps", "2")
    here("d3ssl", file, tmp_path / "stopped", "--max-steps", "3")
    for other in ("json", "stopped"):
        assert same(training.newest(tmp_path / "beton")["model"], training.newest(tmp_path / other)["model"])


@pytest.mark.parametrize("method", [name for name, trainer in TRAINERS.items() if hasattr(trainer.Config, "ema")])
def test_shuffled_batch_norm_runs_on_two_processes(method, scenes, tmp_path):
    command = training.command(method, scenes, tmp_path / "run", "--max-steps", "2", "--norm", "shuffle")
    assert training.train(method, command, tmp_path / "log", world=2) == [0, 0], (tmp_path / "log.0").read_text()
    assert all(math.isfinite(line["loss"]) for line in training.logged(tmp_path / "run"))


@pytest.mark.usefixtures("_fresh_accelerate")
@pytest.mark.parametrize("method", TRAINERS)
def test_micro_batches_are_the_batch_where_the_norm_is_fixed(method, broken, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "prepare_model", lambda model, config, device: model.eval())
    more = (*big(method), *(("--negatives", "image") if method == "plrc" else ()))
    for parts in (1, 2):
        here(method, broken, tmp_path / str(parts), *more, "--max-steps", "3", "--accumulate", str(parts))
    near(tmp_path / "1", tmp_path / "2")


SWITCHES = {
    "moco_v2": [
        "--norm batch --no-channels-last",
        "--precision bf16 --render device --accumulate 2",
    ],
    "soco": [
        "--v3 crop --cutout square --jitter none",
        "--form fpn --roi-size 7 --arch resnet10-narrow --cutout prc --window on --jitter rbj",
        "--regions grid --accumulate 2 --precision bf16",
        "--regions free --norm batch --render device",
    ],
    "d3ssl": [
        "--cutout none --jitter none --window off --depositioning off --enqueue t1",
        "--cutout square --jitter soco --window-mode visible --enqueue t2 --room 0",
        "--x2s render --fresh off --norm batch --accumulate 2",
        "--cutout none --regions grid --no-channels-last",
        "--regions free --precision bf16 --render device",
    ],
    "byol": [
        "--target copy --forward joint --accumulate 2",
        "--crop 1 --norm batch --render device",
    ],
    "scrl": [
        "--law uniform --jitter 0.2 --aligned off --mean images --accumulate 2",
        "--max-iou 1 --on-fail drop --jitter inf --target copy --forward apart --precision bf16",
        "--boxes 1 --crop 0.5 --norm batch --render device",
    ],
    "lc_loss": [
        "--local mse --symmetric-global off --local-relu off --accumulate 2",
        "--symmetric-local on --swap-colors on --target copy --forward joint --precision bf16",
        "--alpha 1 --crop 0.5 --temperature 1 --arch resnet10-tiny --norm batch --render device",
        "--preset demo-dino --dim 64 --clip 0.1 --frozen-epochs 0 --teacher-epochs 0 --target random --accumulate 2",
        "--preset demo-dino --dim 64 --student-temperature 0.2 --teacher-temperature 0.1 0.1 --centre-momentum 0"
        " --symmetric-global off --alpha 0 --precision bf16",
    ],
    "plrc": [
        "--level region --regions boxes --negatives global --norm batch",
        "--regions masks --affinity 2 --teacher-points slot --affinity-keys batch --precision bf16",
        "--regions grid:2 --affinity 3 --teacher-points extra --upsample None --negatives image --render device",
        "--affinity-warmup 2 --warmup-weight one --slots 4 --points 2 --chunk 100 --accumulate 2",
        "--alpha 1 --beta 0.5 --temperature 0.1 --student-temperature 0.2 --teacher-temperature 0.15",
    ],
    "simsiam": [
        "--predictor-lr cosine --accumulate 2",
        "--norm batch --precision bf16 --render device",
    ],
    "densesiam": [
        "--similarity cosine --order between --points corners --region-start 0",
        "--target p --order before --points random --masks raw --region-unit off --temperature 1 --region-start 0 "
        "--accumulate 2",
        "--points mild --region-mass on --region-stop target --region-start 0 --precision bf16",
        "--points heavy --region-stop masks --region-start 0 --norm batch --render device --predictor-lr cosine",
        "--region-weight 0 --dense-weight 0 --no-channels-last",
    ],
}


@pytest.mark.usefixtures("_fresh_accelerate")
def test_heads_of_regionsim_stay_as_they_are_until_it_starts(scenes, tmp_path):
    found = {}
    for start in ("1", "0"):
        for lr in ("0.1", "0.4"):
            output = tmp_path / f"{start}-{lr}"
            more = ("--max-steps", "2", "--warmup-epochs", "0", "--region-start", start, "--lr", lr)
            here("densesiam", scenes, output, *big("densesiam"), *more)
            found[start, lr] = training.newest(output)["model"]
    weights = [name for name in found["1", "0.1"] if name.startswith("region_") and name.endswith("weight")]
    assert weights
    assert all(torch.equal(found["1", "0.1"][name], found["1", "0.4"][name]) for name in weights)
    assert not any(torch.equal(found["0", "0.1"][name], found["0", "0.4"][name]) for name in weights)
    assert not torch.equal(*(found["1", lr]["trunk.conv1.weight"] for lr in ("0.1", "0.4")))


@pytest.mark.usefixtures("_fresh_accelerate")
@pytest.mark.parametrize(("method", "switches"), [(m, each) for m, every in SWITCHES.items() for each in every])
def test_every_switch_runs_two_steps(method, switches, scenes, tmp_path):
    more = big(method)
    lines = here(method, scenes, tmp_path / "run", *more, "--max-steps", "2", *switches.split())
    assert [line["step"] for line in lines] == [1, 2]
    assert all(math.isfinite(value) for line in lines for value in line.values())
    least = {"simsiam": -1.0, "densesiam": -2.0}.get(method, 0.0)  # of negative cosines
    assert all(line["loss"] > least for line in lines[1:])
    assert all(0.1 < line["spread"] < 1.5 for line in lines)
    about = json.loads((tmp_path / "run" / "config.json").read_text())
    assert about["method"] == method
    weights = geoaug.weights.read_backbone(tmp_path / "run")
    assert common.make_trunk(about["config"]["arch"], str(tmp_path / "run")).state_dict().keys() == weights.keys()


@pytest.mark.usefixtures("_fresh_accelerate")
@pytest.mark.skipif(not os.environ.get("GEOAUG_SLOW"), reason="compiles for a minute (set GEOAUG_SLOW=1)")
def test_compiled_is_the_same(scenes, tmp_path):
    for name in ("--compile", "--no-compile"):
        here("moco_v2", scenes, tmp_path / name[2:], "--max-steps", "3", name)
    near(tmp_path / "compile", tmp_path / "no-compile", 1e-4)


# -- the models -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batches(scenes):
    """One batch of eight for each trainer's views of 64 pixels."""
    made = {}
    for method in TRAINERS:
        specs = geoaug.recipes.recipe(method).at(64).views
        with geoaug.open_loader(scenes, specs, batch_size=8, seed=0, workers=0) as loader:
            made[method] = next(iter(loader))
    return made


MODELS = [("moco_v2", ()), ("soco", ()), ("soco", FPN), ("d3ssl", ()), ("byol", ()), ("scrl", ()), ("lc_loss", ())]
MODELS += [("lc_loss", ("--local", "mse", "--symmetric-local", "on")), ("lc_loss", DINO), ("plrc", ())]


def model_and_inputs(method, batch, more=()):
    config = config_of(method, Path("x"), Path("x"), *big(method), *more)
    torch.manual_seed(0)
    model = TRAINERS[method].Model(config)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # SoCo's residual blocks begin at zero, and pass no gradient then
            nn.init.uniform_(module.weight, 0.5, 1.5)
    for p in model.teacher.parameters():
        nn.init.normal_(p, std=0.05)
    if hasattr(model, "queue"):
        capacity, dim = model.queue.vectors.shape
        model.queue.enqueue(nn.functional.normalize(torch.randn(capacity, dim), dim=1), torch.ones(capacity).bool())
    if method == "d3ssl":
        regions = d3ssl.find_regions(batch, config)
        counts = torch.stack((regions.valid.sum(), regions.movable.sum())).float()
        return model, (batch, regions, counts)
    if method == "scrl":
        pairs = scrl.find_pairs(batch, config)
        return model, (batch, pairs, pairs.valid.sum().float())
    if method == "lc_loss":
        points, valid = lc_loss.find_cells(batch, config)
        return model, (batch, points, valid, torch.cat((batch.ok.sum()[None], valid.any(2).sum(1))).float(), 0.07)
    if method == "plrc":
        points = plrc.find_points(batch, config)
        terms = (batch.ok, points.shared, points.distilled.any(dim=1))
        return model, (batch, points, torch.stack([x.sum() for x in terms]).float(), True)
    return model, (batch, batch.ok.sum().float())

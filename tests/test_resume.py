"""Runs that are killed or told to stop, and go on: every trainer, with one process and with two."""

import os
import random
import signal
import time

import pytest

from data_prep import make_scenes
from tests import training
from tests.test_trainers import DINO, same
from trainers import common

MORE = {
    "d3ssl": ("--min-side", "4"),
    "scrl": ("--size", "64", "--min-side", "16"),
    "densesiam": ("--size", "64"),
}
RUNS = [(method, MORE.get(method, ())) for method in training.OF] + [("lc_loss", DINO)]
KILLS = {"d3ssl": 3}  # else one: a start takes seconds
STEPS = {"d3ssl": 24}  # else 12: stop and kills come within three steps of a start


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    assert make_scenes.main(["--out", str(folder), "--images", "24", "--size", "96", "--workers", "1"]) == 0
    return folder


def same_runs(run, other, steps):
    ours, theirs = training.newest(run), training.newest(other)
    for name in ("step", "loader", "model", "optimizer"):
        assert same(ours[name], theirs[name]), name
    names = ("step", "loss", "lr", "spread")
    logs = [[[line[name] for name in names if name in line] for line in training.logged(r)] for r in (run, other)]
    assert [line[0] for line in logs[0]] == list(range(1, steps + 1))
    assert logs[0] == logs[1]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(("method", "more"), RUNS, ids=[f"{m}{'-dino' * (more == DINO)}" for m, more in RUNS])
def test_what_was_told_to_stop_and_then_killed_ends_bit_by_bit_the_same(method, more, world, scenes, tmp_path):
    """By a batch system's signal, which reaches the loader's processes too, and by kill -9, at random steps."""
    data = scenes / ("images" if method == "densesiam_segmentation" else "instances.json")
    steps = STEPS.get(method, 12)
    more = ("--epochs", "8", "--max-steps", str(steps), "--save-every", "2", *more)
    run, whole, log = tmp_path / "run", tmp_path / "whole", tmp_path / "log"

    assert training.train(method, training.command(method, data, whole, *more), log, world=world) == [0] * world
    # Nothing is printed but what was written: no warning either.
    said = [(tmp_path / f"log.{rank}").read_text().splitlines() for rank in range(world)]
    wrote = f"wrote {whole}/checkpoints/step-{steps:08}.pt: {steps} steps of 24, 0 images not read"
    assert said == [[wrote], *[[]] * (world - 1)]

    chance, command = random.Random(f"{method} {world}"), training.command(method, data, run, *more)
    ranks = training.start(method, [*command, "--workers", "1"], log, world=world)
    training.wait_for_step(run, chance.randint(1, 3), ranks)
    os.killpg(ranks[-1].pid, signal.SIGTERM)  # to one rank: all must stop
    assert training.finish(ranks) == [common.REQUEUE] * world
    assert (run / "requeue").read_text() == f"step {training.newest(run)['step']}\n"

    for _ in range(KILLS.get(method, 1)):
        step = int(training.logged(run)[-1]["step"]) + chance.randint(1, 2)
        ranks = training.start(method, command, log, world=world)
        training.wait_for_step(run, step, ranks)
        time.sleep(chance.random() * 0.05)
        ranks[-1].kill()  # of two, the other must find out and end by itself
        codes = training.finish(ranks)
        assert codes[-1] == -9
        assert all(codes)

    assert training.train(method, command, log, world=world) == [0] * world
    assert not (run / "requeue").exists()
    same_runs(run, whole, steps)
    assert not list((run / "checkpoints").glob("*.part"))

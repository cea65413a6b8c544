"""What the trainers say of arguments that cannot be right, in one line and before any training."""

import sys

import pytest

from tests import training
from trainers import common, d3ssl

from .test_trainers import TRAINERS, _fresh_accelerate, _one_thread, scenes  # noqa: F401  fixtures


def refused(method, arguments, monkeypatch, capsys):
    trainer = TRAINERS[method]
    monkeypatch.setattr(sys, "argv", [f"trainers/{method}.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        common.launch(trainer.main, trainer.Config, trainer.PRESETS)
    assert stop.value.code == 2
    out = capsys.readouterr()
    assert out.out == ""
    return out.err


WRONG = [
    ("moco_v2", "--data /no/such/place", "--data must exist, got /no/such/place"),
    ("moco_v2", "--preset none", "--preset must be one of coco-800ep, "),
    ("moco_v2", "--preset=none", "--preset must be one of coco-800ep, "),
    ("moco_v2", "--batch-size 25 --queue 50", "at most the 24 images"),
    ("moco_v2", "--queue 68", "--queue must be a multiple of --batch-size 8, got 68"),
    ("moco_v2", "--queue 0", "--queue must be at least 1, got 0"),
    ("moco_v2", "--batch-size 9 --accumulate 2", "--batch-size must divide by 2"),
    ("moco_v2", "--seed -1", "seed must be an integer in"),
    ("moco_v2", "--workers -1", "workers must be an integer in"),
    ("moco_v2", "--init /no/such/file", "--init: "),
    ("moco_v2", "--resume /no/such/file", "--resume must be auto, none"),
    ("d3ssl", "--batch-size 6", "--batch-size must divide by 4 (1 processes x 1 micro-batches x 4), got 6"),
    ("d3ssl", "--batch-size 12 --accumulate 2", "--batch-size must divide by 8"),
    ("d3ssl", "--queue 96", "--queue must be a multiple of the 64 regions of a step, got 96"),
    ("d3ssl", "--enqueue t1 --queue 48", "--queue must be a multiple of the 32 regions of a step, got 48"),
    ("d3ssl", "--proposals /no/such/store", "/no/such/store"),
    ("soco", "--boxes 0", "--boxes must be at least 1, got 0"),
    ("byol", "--crop 0", "--crop must be in (0, 1], got 0.0"),
    ("lc_loss", "--size 80", "--size must be a multiple of the 32 pixels of a cell, got 80"),
    ("lc_loss", "--alpha 1.5", "--alpha must be in [0.0, 1], got 1.5"),
    ("lc_loss", "--clip 1", "--clip is DINO's and needs --base dino"),
    ("lc_loss", "--symmetric-local on --symmetric-global off", "--symmetric-local on needs --symmetric-global on"),
    ("lc_loss", "--arch swin_b", "--arch must be one of resnet10-tiny, "),
    ("scrl", "--arch swin_t", "--arch must be one of resnet10-tiny, "),
    ("byol", "--monitor on", "--monitor on needs labels: images in subfolders of two classes at least, got 0"),
    ("scrl", "--size 80", "--size must be a multiple of the 32 pixels of a cell, got 80"),
    ("scrl", "--min-side 0", "--min-side must be over 0 and at most 31, got 0"),
    ("scrl", "--min-side 32", "--min-side must be over 0 and at most 31, got 32"),
    ("scrl", "--max-iou 1.5", "--max-iou must be over 0 and at most 1, got 1.5"),
    ("scrl", "--jitter 1", "--jitter must be in [0, 1) or inf, got 1.0"),
    ("plrc", "--regions grid", "--regions must be grid:N with N from 1 to 999, boxes or masks, got grid"),
    ("plrc", "--regions grid:0", "--regions must be grid:N with N from 1 to 999, boxes or masks, got grid:0"),
    ("plrc", "--alpha 1.5", "--alpha must be in [0, 1], got 1.5"),
    ("plrc", "--beta nan", "--beta must be in [0, 1], got nan"),
    ("plrc", "--queue 68", "--queue must be a multiple of --batch-size 8, got 68"),
    ("plrc", "--points 0", "--points must be at least 1, got 0"),
    ("plrc", "--teacher-temperature 0", "--teacher-temperature must be at least 1e-06, got 0.0"),
    ("plrc", "--affinity-warmup -1", "--affinity-warmup must be at least 0.0, got -1.0"),
    ("plrc", "--proposals x", "--proposals goes with --regions boxes, got --regions grid:4"),
]


@pytest.mark.usefixtures("_fresh_accelerate", "our_errors")
@pytest.mark.parametrize(("method", "wrong", "message"), WRONG)
def test_a_mistake_is_told_in_one_line(method, wrong, message, scenes, tmp_path, monkeypatch, capsys):  # noqa: F811
    arguments = training.command(method, scenes, tmp_path / "run", *wrong.split())
    told = refused(method, arguments, monkeypatch, capsys)
    assert message in told
    assert told.startswith(f"{method}.py: ")
    assert len(told.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("_fresh_accelerate")
@pytest.mark.parametrize("wrong", ["--colour red", "--batch 8", "--norm none", "--batch-size eight"])
def test_unknown_flags_and_values_are_refused(wrong, scenes, tmp_path, monkeypatch, capsys):  # noqa: F811
    arguments = training.command("moco_v2", scenes, tmp_path / "run", *wrong.split())
    assert wrong.split()[0] in refused("moco_v2", arguments, monkeypatch, capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("_fresh_accelerate")
@pytest.mark.parametrize("method", TRAINERS)
def test_data_that_is_missing_or_has_no_boxes_is_told(method, scenes, tmp_path, monkeypatch, capsys):  # noqa: F811
    assert "--data must name a .beton" in refused(method, ["--cpu"], monkeypatch, capsys)
    if hasattr(TRAINERS[method].Config, "proposals"):
        boxes = ("--regions", "boxes") if method == "plrc" else ()
        folder = training.command(method, scenes.parent / "images", tmp_path / "run", *boxes)
        assert "--data has no boxes: give --proposals STORE" in refused(method, folder, monkeypatch, capsys)


def test_a_batch_that_does_not_divide_by_the_processes_is_told_by_each(scenes, tmp_path):  # noqa: F811
    command = training.command("d3ssl", scenes, tmp_path / "run", "--batch-size", "4", "--queue", "320")
    assert training.train("d3ssl", command, tmp_path / "log", world=2) == [2, 2]
    for rank in (0, 1):
        assert (tmp_path / f"log.{rank}").read_text() == (
            "d3ssl.py: --batch-size must divide by 8 (2 processes x 1 micro-batches x 4), got 4\n"
        )


def test_a_preset_gives_the_values_that_no_flag_gives():
    config = common.parse(d3ssl.Config, d3ssl.PRESETS, ["--preset", "demo", "--lr", "0.5"])
    assert (config.preset, config.lr, config.queue) == ("demo", 0.5, d3ssl.PRESETS["demo"].queue)
    paper = common.parse(d3ssl.Config, d3ssl.PRESETS, [])
    assert paper == d3ssl.Config()
    for trainer in TRAINERS.values():
        for name in trainer.PRESETS:
            assert common.parse(trainer.Config, trainer.PRESETS, [f"--preset={name}"]).preset == name

"""Trainers and ranks in processes of their own, forked from one server that has imported what is slow to import."""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

TINY = ("--preset", "demo", "--cpu", "--size", "32", "--batch-size", "8", "--hidden", "32", "--log-every", "1",
        "--workers", "0")  # fmt: skip
OF = {
    "moco_v2": ("--queue", "64"),
    "soco": ("--roi-size", "4"),
    "d3ssl": ("--queue", "256", "--roi-size", "4"),
    "byol": (),
    "scrl": ("--min-side", "8"),
    "lc_loss": ("--size", "64", "--local-dim", "16"),  # at 32 a map is one cell
    "plrc": ("--queue", "64", "--points", "4", "--upsample", "16", "--affinity-warmup", "0"),
    "simsiam": ("--dim", "32", "--bottleneck", "8"),
    "densesiam_segmentation": ("--classes", "7", "--aux", "11", "--region-start", "0.5"),
    "densesiam": ("--dim", "32", "--channels", "8", "--grid", "3", "--region-start", "0.2"),
}
PATIENCE = 120  # seconds after which a process counts as hung

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload([f"trainers.{method}" for method in OF])


def command(method: str, data: Path, output: Path, *more: str) -> list[str]:
    """The tiny command line of a trainer; a flag in `more` wins over the same flag before it."""
    return [*TINY, *OF[method], "--data", str(data), "--output", str(output), *more]


def _forked(function: Callable[..., None], *arguments: Any) -> BaseProcess:
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # the server keeps what it was started with
    try:
        process = _server.Process(target=function, args=arguments)
        process.start()
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
    return process


def _train(method: str, arguments: list[str], environment: dict[str, str], log: Path) -> None:
    multiprocessing.set_start_method("fork", force=True)  # as in a trainer that nobody forked
    os.setsid()  # a group of its own, with what it starts
    os.environ.update(environment)
    with log.open("wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    trainer = importlib.import_module(f"trainers.{method}")
    sys.argv = [f"trainers/{method}.py", *arguments]
    trainer.common.launch(trainer.main, trainer.Config, trainer.PRESETS)


def start(method: str, arguments: list[str], log: Path, *, world: int = 1) -> list[BaseProcess]:
    """The processes of a trainer, under way; what they print goes to `log`.0, `log`.1, ..."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(world):
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world,
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if world > 1 else {}  # fmt: skip
        as_text = {name: str(value) for name, value in environment.items()}
        ranks.append(_forked(_train, method, arguments, as_text, Path(f"{log}.{rank}")))
    return ranks


def finish(ranks: list[BaseProcess]) -> list[int]:
    """Their exit codes; one that hangs is killed, and fails the test."""
    ends = time.monotonic() + PATIENCE
    for process in ranks:
        process.join(max(0.0, ends - time.monotonic()))
    hung = [process for process in ranks if process.is_alive()]
    for process in hung:
        process.kill()
        process.join()
    assert not hung, f"{len(hung)} of {len(ranks)} processes hung"
    return [process.exitcode or 0 for process in ranks]


def train(method: str, arguments: list[str], log: Path, *, world: int = 1) -> list[int]:
    """Run a trainer to its end."""
    return finish(start(method, arguments, log, world=world))


def wait_for_step(run: Path, step: int, ranks: list[BaseProcess]) -> None:
    """Until the run has logged that step, or has ended."""
    ends = time.monotonic() + PATIENCE
    while not any(line["step"] >= step for line in logged(run)):
        if time.monotonic() > ends or not any(process.is_alive() for process in ranks):
            return
        time.sleep(0.005)


def logged(run: Path) -> list[dict[str, float]]:
    """The whole lines of metrics.jsonl."""
    file = run / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def newest(run: Path) -> dict[str, Any]:
    """What the last checkpoint holds."""
    return torch.load(sorted((run / "checkpoints").glob("step-*.pt"))[-1], weights_only=True)


def _rank(function: Callable[..., Any], rank: int, world: int, folder: Path, arguments: tuple[Any, ...]) -> None:
    with (folder / f"log.{rank}").open("wb", buffering=0) as file:
        os.dup2(file.fileno(), 2)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    result = function(rank, *arguments)
    torch.save(result, folder / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def on_ranks(function: Callable[..., Any], folder: Path, *arguments: Any, world: int = 2) -> list[Any]:
    """What function(rank, *arguments) gives on each rank of a gloo group; it is a module's function."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        (folder / "meet").unlink()
    codes = finish([_forked(_rank, function, rank, world, folder, arguments) for rank in range(world)])
    assert codes == [0] * world, (folder / "log.0").read_text() + (folder / "log.1").read_text()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]

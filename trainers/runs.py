"""What surrounds a training loop: the run folder, checkpoints, logs, signals. The loop is the trainer's."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

import geoaug
from geoaug.loading.loader import Loader
from geoaug.weights import latest

from .arguments import REQUEUE, RunConfig, TrainingError, UsageError
from .checkpoints import load_checkpoint, save_checkpoint

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # by which a batch system tells a run to stop


class Run:
    """A run folder and where the run is in its steps.

    >>> with Run(config, accelerator, loader, model=model, optimizer=optimizer) as run:   # doctest: +SKIP
    ...     for step, batch in run.batches():
    ...         run.end_step(batch.names, loss, [log], lr=lr)
    """

    def __init__(
        self, config: RunConfig, accelerator: Accelerator, loader: Loader, *, model: nn.Module, optimizer: Any,
        backbone: str, floors: dict[str, float] | None = None,
    ) -> None:  # fmt: skip
        """`floors` are the least values of what is logged that a healthy run has; below one, it warns once."""
        self.config, self.accelerator, self.loader = config, accelerator, loader
        self._floors = dict(floors or {})
        self.model, self.optimizer = accelerator.unwrap_model(model), optimizer
        self.total = config.epochs * len(loader)
        self.last = self.total if config.max_steps is None else min(self.total, config.max_steps)
        self.step = 0
        method = Path(sys.modules[type(config).__module__].__file__ or "").stem
        self._about = {"method": method, "backbone": backbone, "config": _plain(config), "geoaug": geoaug.__version__}
        self._told = False
        self._stop = False
        self._watched: tuple[int, list[str], Tensor, torch.cuda.Event | None] | None = None
        self._saved: Path | None = None
        self._clock, self._data_time, self._since = time.perf_counter(), 0.0, 0
        self._resume()

    # -- the folder ---------------------------------------------------------------------------------------------------

    def _resume(self) -> None:
        config, folder = self.config, self.config.output
        path = latest(folder) if config.resume in ("auto", "none") else latest(Path(config.resume))
        if config.resume == "none" and path is not None:
            raise UsageError(f"--output must be a new folder with --resume none, got {folder}, which holds {path.name}")
        if config.resume not in ("auto", "none") and path is None:
            raise UsageError(f"--resume must be auto, none, a checkpoint or a run folder with one, got {config.resume}")
        newest = latest(folder)
        if path is not None and newest is not None and not path.samefile(newest):  # else it would win over what comes
            raise UsageError(f"--output must not hold newer checkpoints than --resume {path}, got {newest}")
        if path is not None:
            try:
                state = load_checkpoint(path, self.model, self.optimizer, self.accelerator.scaler, about=self._about)
                self.loader.load_state_dict(state["loader"])
            except ValueError as error:
                raise UsageError(f"--resume: {path}: {error}") from None
            self.step, self._saved = state["step"], path
        if self.accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            for left in (folder / "requeue", *(folder / "checkpoints").glob("step-*.pt.part")):  # killed while it saved
                left.unlink(missing_ok=True)
            (folder / "config.json").write_text(json.dumps(self._about, indent=1, sort_keys=True) + "\n")
            _cut_after(folder / "metrics.jsonl", self.step)
        if self.config.tracker != "none":
            self.accelerator.init_trackers("geoaug", config=_flat(self._about["config"]))

    def save(self) -> Path | None:
        """Write a checkpoint of the step just ended, on one process; the one before stays whole whatever happens."""
        watched, self._watched = self._watched, None
        self._look(watched)  # before a step is saved, its loss must be known to be a number
        spoilt = _not_finite(self.model)
        if spoilt:  # a gradient may overflow where the loss did not
            raise TrainingError(
                f"after step {self.step} {spoilt} is not finite; the last good checkpoint is {self._saved}"
            )
        here = self.config.output / "checkpoints" / f"step-{self.step:08d}.pt"
        if not self.accelerator.is_main_process or self._saved == here:
            return self._saved
        state = {**self._about, "step": self.step, "loader": self.loader.state_dict()}
        try:
            self._saved = save_checkpoint(
                self.config.output, state, self.model, self.optimizer, self.accelerator.scaler
            )
        except OSError as error:
            raise TrainingError(
                f"step {self.step} could not be saved: {error}; the last good checkpoint is {self._saved}"
            ) from None
        return self._saved

    # -- the steps ----------------------------------------------------------------------------------------------------

    def batches(self) -> Iterator[tuple[int, geoaug.Batch]]:
        """(step, batch) to the end of the run, over all epochs; checkpoints and signals are looked after between."""
        bar = tqdm(
            total=self.last, initial=self.step, disable=not (self.accelerator.is_main_process and sys.stderr.isatty()),
            unit="step", dynamic_ncols=True,
        )  # fmt: skip
        self._bar = bar
        with bar:
            while self.step < self.last:
                iterator, begun = iter(self.loader), False
                while self.step < self.last:
                    asked = time.perf_counter()
                    batch, begun = next(iterator, None) if begun else _first(iterator), True
                    self._data_time += time.perf_counter() - asked
                    if batch is None:
                        break
                    yield self.step, batch
                    bar.update()
                    if self._stop and self.step < self.last:
                        self._requeue()
                    if self.step % self.config.save_every == 0 and self.step < self.last:
                        self.save()
            self.save()

    def end_step(self, names: list[str], loss: Tensor, logs: list[dict[str, Tensor]], **numbers: float) -> None:
        """After the optimiser's step: watch the loss, log it with the means of what the micro-batches logged.

        The loss is looked at one step late, from a copy that was under way meanwhile, so that no step waits for it.
        """
        self.step += 1
        loss = loss.detach().float()
        status = torch.stack((loss, torch.full_like(loss, float(self._told))))
        if self.accelerator.num_processes > 1:
            status = self.accelerator.reduce(status, "sum")  # so that every rank stops at the same step
        before, self._watched = self._watched, (self.step, names, *_to_host(status))
        self._look(before)
        self._since += 1
        if self.step % self.config.log_every == 0 or self.step == self.last:
            self._log(loss, logs, numbers)

    def _look(self, watched: tuple[int, list[str], Tensor, torch.cuda.Event | None] | None) -> None:
        """Raise where the loss of a step was no number; note whether some rank was told to stop."""
        if watched is None:
            return
        step, names, status, copied = watched
        if copied is not None:
            copied.synchronize()
        if not math.isfinite(float(status[0])):
            shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            raise TrainingError(
                f"the loss of step {step} is {float(status[0])}; the images of that step here: {shown}; "
                f"the last good checkpoint is {self._saved}"
            )
        self._stop = self._stop or float(status[1]) > 0

    def _requeue(self) -> None:
        """Save, leave a mark for the batch system and go."""
        saved = self.save()
        if self.accelerator.is_main_process:
            (self.config.output / "requeue").write_text(f"step {self.step}\n")
            print(f"told to stop: wrote {saved}; the same command goes on from there", file=sys.stderr)
        self.accelerator.wait_for_everyone()
        raise SystemExit(REQUEUE)

    def _log(self, loss: Tensor, logs: list[dict[str, Tensor]], numbers: dict[str, float]) -> None:
        now = time.perf_counter()
        names = sorted(logs[0])
        means = (torch.stack([log[name].detach().float() for log in logs]).mean() for name in names)
        values = torch.stack([loss.detach().float(), *means])
        if self.accelerator.num_processes > 1:
            values = self.accelerator.reduce(values, "mean")
        read = [float(value) for value in values.cpu()]
        if not math.isfinite(read[0]):
            return  # the next look at the loss ends the run
        seconds = (now - self._clock) / self._since
        line: dict[str, float] = {"step": self.step, "epoch": self.step / len(self.loader), "loss": read[0]}
        line |= dict(zip(names, read[1:], strict=True)) | numbers
        line |= {"step_s": seconds, "data_s": self._data_time / self._since}
        line |= {"images_per_s": self.config.batch_size / seconds, "memory_mb": _memory(self.accelerator.device)}
        self._clock, self._data_time, self._since = time.perf_counter(), 0.0, 0
        if self.accelerator.is_main_process:
            for name in [n for n, least in self._floors.items() if line.get(n, least) < least]:
                told = f"{name} is {line[name]:.3g}, under {self._floors.pop(name):g}: is it collapsing?"
                tqdm.write(f"warning: step {self.step}: {told}", sys.stderr)
            with (self.config.output / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            self._bar.set_postfix(loss=f"{read[0]:.3f}", data=f"{line['data_s'] / seconds:.0%}")
        if self.config.tracker != "none":
            self.accelerator.log({k: v for k, v in line.items() if k != "step"}, step=self.step)

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        """A tensor added up over all processes; no gradient."""
        return self.accelerator.reduce(value.detach(), "sum") if self.accelerator.num_processes > 1 else value.detach()

    # -- signals ------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Run:
        def told(number: int, frame: Any) -> None:
            self._told = True

        self._before = {sign: signal.signal(sign, told) for sign in _SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for sign, handler in self._before.items():
            signal.signal(sign, handler)
        if self.config.tracker != "none":
            self.accelerator.end_training()
        if error[0] is None and self.accelerator.is_main_process:
            print(
                f"wrote {self._saved}: {self.step} steps of {self.total}, {len(self.loader.failures)} images not read"
            )


def _first(iterator: Iterator[geoaug.Batch]) -> geoaug.Batch | None:
    """The first batch, with which the loader's processes start.

    A batch system tells every process of a job to stop; these inherit that it is kept from them, so that the step is
    finished and saved.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        return next(iterator, None)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def _to_host(values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy on the host, under way, and the event that ends it."""
    if values.device.type != "cuda":
        return values.cpu(), None
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return host, copied


def _not_finite(model: nn.Module) -> str:
    """The name of a weight that is not finite, or nothing."""
    every = [(name, x) for name, x in model.state_dict().items() if x.is_floating_point()]
    return next((name for name, x in every if not bool(x.isfinite().all())), "")


def _plain(config: RunConfig) -> dict[str, Any]:
    every = dataclasses.asdict(config)
    return {k: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v for k, v in every.items()}


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    return {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in config.items()}


def _memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _cut_after(file: Path, step: int) -> None:
    """Drop what was logged after the checkpoint that the run goes on from, so that no step is told twice."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):  # half a line of a run that was killed
            break
    part = file.with_name(file.name + ".part")
    part.write_text("".join(kept))
    os.replace(part, file)

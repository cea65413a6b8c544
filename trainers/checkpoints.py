"""Checkpoints: one file a step, written beside its place and moved there, read without pickles."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from geoaug.weights import CHECKPOINT

KEPT = 2  # a checkpoint that a dying disk spoils leaves the one before
# What a run may change when it goes on; all else decides what is trained.
FREE = {
    "data", "images", "proposals", "output", "preset", "max_steps", "init", "resume", "tracker", "log_every",
    "save_every", "workers", "render", "cpu", "compile", "channels_last",
}  # fmt: skip

_ENTRIES = {"method", "config", "step", "loader", "model", "optimizer", "scaler"}


def save_checkpoint(folder: Path, state: dict[str, Any], model: nn.Module, optimizer: Any, scaler: Any) -> Path:
    """Write folder/checkpoints/step-XXXXXXXX.pt; older ones but the last go once it is on the disk."""
    place = folder / "checkpoints"
    place.mkdir(parents=True, exist_ok=True)
    file = place / f"step-{state['step']:08d}.pt"
    part = file.with_name(file.name + ".part")
    whole = {
        "format": CHECKPOINT, **state, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict() if scaler is not None else None,
    }  # fmt: skip
    try:
        with part.open("wb") as out:
            torch.save(whole, out)
            out.flush()
            os.fsync(out.fileno())
        os.replace(part, file)
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        # torch's zip writer answers a full disk with a RuntimeError of its own.
        first = error.__context__ if isinstance(error.__context__, OSError) else error
        raise OSError((str(first) or type(first).__name__).splitlines()[0]) from error
    for old in sorted(place.glob("step-*.pt"))[:-KEPT]:
        old.unlink()
    return file


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: Any, scaler: Any, *, about: dict[str, Any]
) -> dict[str, Any]:
    """Restore model and optimiser; gives step and loader state. ValueError says in one line what does not fit."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a truncated zip, a pickle with code, another file: all are no checkpoint
        raise ValueError(f"not a checkpoint ({type(error).__name__})") from None
    if not isinstance(state, dict) or state.get("format") != CHECKPOINT or not state.keys() >= _ENTRIES:
        raise ValueError(f"must be a trainer's checkpoint of format {CHECKPOINT}")
    if state["method"] != about["method"]:
        raise ValueError(f"must be of method {about['method']}, got one of {state['method']}")
    ours, theirs = about["config"], state["config"]
    other = [k for k in sorted(ours.keys() | theirs.keys()) if k not in FREE and ours.get(k) != theirs.get(k)]
    if other:
        told = ", ".join(f"--{k.replace('_', '-')} {theirs.get(k)} there, {ours.get(k)} here" for k in other)
        raise ValueError(f"was made with other settings: {told}")
    mine = {name: list(x.shape) for name, x in model.state_dict().items()}
    found = {name: list(x.shape) for name, x in state["model"].items()}
    wrong = [name for name in sorted(mine.keys() | found.keys()) if mine.get(name) != found.get(name)]
    if wrong:
        raise ValueError(f"has other shapes: {wrong[0]} is {found.get(wrong[0])} there, {mine.get(wrong[0])} here")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if scaler is not None and state["scaler"] is not None:
        scaler.load_state_dict(state["scaler"])
    return {"step": state["step"], "loader": state["loader"]}

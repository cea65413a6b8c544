"""SCRL over BYOL on claims_scrl.py's scenes, with a target that moves at the paper's pace in so few steps, too."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.claims_scrl import SCALES, object_top1, train
from benchmarks.experiments import Claim, Lab

PACE = ("--ema", "0.97")
NOTE = " LARS at a rate of 2 a step; momentum of the target 0.97; crops of at least 20 %."

__all__ = ["NOTE", "SCALES", "claims"]


def claims(lab: Lab) -> list[Claim]:
    """Tables 2 and 10, as in claims_scrl.py."""

    def run(trainer: str, *flags: str) -> Callable[[int], float]:
        return lambda seed: object_top1(lab, train(lab, trainer, seed, *PACE, *flags), seed)

    scores = lab.each_variant({"SCRL": run("scrl"), "BYOL": run("byol")})
    return [
        Claim("Features of boxes matched in two views tell objects better than BYOL's of whole views.",
              "yes: linear on boxes 74.8 over 71.5 (Table 10), COCO 40.9 over 40.0 AP (Table 2)",
              "top-1 of object k-NN on C5 (%)", scores),
    ]  # fmt: skip

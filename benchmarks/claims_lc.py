"""LC-loss's claims: cells that find their place again (section 4.6), and Table 6 with object k-NN for detection.

On the scenes, at the pace and against the runs of BYOL that claims_scrl.py tells of.
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.claims_scrl import NOTE as SCRL_NOTE
from benchmarks.claims_scrl import SCALES, object_top1, train
from benchmarks.experiments import Claim, Lab

VARIANTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "LC-loss": ("lc_loss", ()),
    "local MSE": ("lc_loss", ("--local", "mse")),
    "BYOL": ("byol", ()),
}
ASKED = 300  # scenes whose cells are sought
NOTE = SCRL_NOTE + (
    f" Cells are sought in {ASKED} scenes. LC-loss sees the whole image and a crop, BYOL two crops; LC-loss's views"
    " without its loss are in the GPU's size."
)
LONG = {"BYOL on LC-loss's views": ("lc_loss", ("--alpha", "0"))}  # our own control: left out of the size for a CPU


def scores(lab: Lab, weights: str, seed: int) -> tuple[float, float]:
    """Correspondence accuracy and object k-NN of C5 (%)."""
    side = ("--tile", str(2 * lab.scale.size))  # so that a picture has more cells than a view
    flags = ("--count", str(ASKED), "--seed", str(seed), "--workers", "0")
    cells = lab.measure("correspondence", weights, *side, *flags)
    return 100 * float(cells["accuracy"]), object_top1(lab, weights, seed)


def claims(lab: Lab) -> list[Claim]:
    """Section 4.6, and the direction of Tables 2 and 6."""
    variants = VARIANTS if lab.scale == SCALES["cpu"] else VARIANTS | LONG

    def run(trainer: str, flags: tuple[str, ...]) -> Callable[[int], tuple[float, float]]:
        return lambda seed: scores(lab, train(lab, trainer, seed, *flags), seed)

    runs = {name: run(*variant) for name, variant in variants.items()}
    both = lab.each_variant(runs | {"untrained": lambda seed: scores(lab, "random", seed)})
    cells, objects = ({name: [each[i] for each in values] for name, values in both.items()} for i in (0, 1))

    def claim(says: str, paper: str, values: dict[str, list[float]], worse: str) -> Claim:
        places = "cells that find their place again, on C5 (%)"
        measure = places if values is cells else "top-1 of object k-NN on C5 (%)"
        return Claim(says, paper, measure, {name: values[name] for name in ("LC-loss", worse)})

    made = [
        claim("Cells find their place in a mirrored and coloured picture more often than BYOL's.",
              "yes: 96 over 33 % on COCO (section 4.6)", cells, "BYOL"),
        claim("Contrast finds places more often than the same loss without it.",
              "silent on places; VOC 59.6 over 58.7 AP (Table 6)", cells, "local MSE"),
        claim("Features of objects are better than BYOL's.",
              "yes: VOC 60.1 over 56.9 AP (section 4.2)", objects, "BYOL"),
        claim("Contrast is better than the same loss without it.",
              "yes: COCO 42.5 over 42.0, VOC 59.6 over 58.7 AP (Table 6)", objects, "local MSE"),
    ]  # fmt: skip
    for control in LONG.keys() & cells.keys():
        made.append(claim("It is the loss, not the views, that finds places.",
                          "silent; our control: alpha 0 on the same views", cells, control))  # fmt: skip
    made += [
        claim("Cells find their place more often than those of a net that never saw an image.",
              "silent; our control", cells, "untrained"),
        claim("Training gives better features of objects than such a net's.",
              "silent; our control", objects, "untrained"),
    ]  # fmt: skip
    return made

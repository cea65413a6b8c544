"""SCRL's claims: over BYOL, and its Tables 6 and 7. Detection is out of reach here; objects are named instead.

The CPU's runs are so short that a target which moves at the paper's pace (0.97) unlearns what it starts with, in every
method built on BYOL: there it hardly moves (0.9999), so what is compared is what boxes and whole views learn to see of
a random net's features. The last claim sets them beside a net that never saw an image.
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks import experiments
from benchmarks.experiments import Claim, Lab

# Objects that fill an image, so that a box is mostly of one of them and a view of several.
_FULL = ("--objects", "3", "5", "--radius", "0.25", "0.4", "--usual-colors")
SCALES = experiments.SCALES | {"cpu": experiments.SCALES["cpu"]._replace(scene_flags=_FULL)}
# All see crops of the same law in the same passes, so that boxes alone differ from BYOL.
SAME = ("--warmup-epochs", "1", "--hidden", "256", "--dim", "128", "--crop", "0.2", "--forward", "joint")
VARIANTS: dict[str, tuple[str, ...]] = {"SCRL": (), "one box": ("--boxes", "1")}
LONG = {"jitter 20 %": ("--jitter", "0.2"), "any IoU": ("--max-iou", "1")}  # small differences: not in the CPU's size


def train(lab: Lab, trainer: str, seed: int, *flags: str) -> str:
    """The run folder of BYOL or of a method on it; LC-loss's claims use the same runs of BYOL."""
    scale = lab.scale
    steps = scale.epochs * (scale.images // scale.batch_size)
    pace = ("--lr", str(2 * 256 / scale.batch_size), "--ema", "0.97" if steps > 1000 else "0.9999")  # 2 a step
    return str(lab.train(trainer, seed, *pace, *SAME, "--workers", "0", *flags))


def objects(lab: Lab, weights: str, *flags: str) -> float:
    """Top-1 of object k-NN on C5 (%), which is what SCRL reads and the paper measures."""
    score = lab.measure("object-knn", weights, "--size", str(lab.scale.scene), "--workers", "0", *flags)
    return 100 * float(next(iter(score["k"].values()))["top1"])  # the first k that the bank has enough objects for


def claims(lab: Lab) -> list[Claim]:
    """Tables 2, 6, 7 and 10 of the paper, with object k-NN in the place of detection and of a linear layer on boxes."""
    cell = "16" if lab.scale.arch == "resnet10-tiny" else "32"
    variants = VARIANTS if lab.scale == SCALES["cpu"] else VARIANTS | LONG

    def run(trainer: str, *flags: str) -> Callable[[int], float]:
        return lambda seed: objects(lab, train(lab, trainer, seed, *flags))

    runs = {name: run("scrl", "--min-side", cell, *flags) for name, flags in variants.items()}
    runs |= {"BYOL": run("byol"), "untrained": lambda seed: objects(lab, "random", "--seed", str(seed))}
    scores = lab.each_variant(runs)

    def claim(says: str, paper: str, better: str, worse: str) -> Claim:
        return Claim(says, paper, "top-1 of object k-NN on C5 (%)", {name: scores[name] for name in (better, worse)})

    found = [
        claim("Features of boxes matched in two views tell objects better than BYOL's of whole views.",
              "yes: linear on boxes 74.8 over 71.5 (Table 10), COCO 40.9 over 40.0 AP (Table 2)", "SCRL", "BYOL"),
        claim("One box an image is enough to be better than BYOL.",
              "yes: COCO 39.2 over 38.3 AP (Table 6)", "one box", "BYOL"),
        claim("Ten boxes an image are better than one.", "yes: COCO 40.2 over 39.2 AP (Table 6)", "SCRL", "one box"),
    ]  # fmt: skip
    if LONG.keys() <= scores.keys():
        found += [
            claim("Boxes that match exactly are better than boxes jittered by 20 %.",
                  "yes: COCO 40.2 over 39.6 AP (Table 7)", "SCRL", "jitter 20 %"),
            claim("Boxes of an IoU under 0.5 are better than boxes of any IoU.",
                  "yes: COCO 40.2 over 39.8 AP (Table 7)", "SCRL", "any IoU"),
        ]  # fmt: skip
    found.append(claim("So few steps make features better than a net's that never saw an image.",
                       "silent; our control", "SCRL", "untrained"))  # fmt: skip
    return found

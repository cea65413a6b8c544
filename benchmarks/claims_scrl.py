"""SCRL's claims: over BYOL, and its Tables 6 and 7. Detection is out of reach here; objects are named instead."""

from __future__ import annotations

from benchmarks.experiments import SCALES, Claim, Lab

# Both see the same crops in the same passes, so that boxes alone differ.
SHARED = ("--lr", "16", "--warmup-epochs", "1", "--hidden", "256", "--dim", "128", "--ema", "0.97", "--crop", "0.2")
SHARED += ("--forward", "joint", "--workers", "0")
VARIANTS = {"SCRL": (), "one box": ("--boxes", "1"), "jitter 20 %": ("--jitter", "0.2")}
LONG = {"any IoU": ("--max-iou", "1")}  # the smallest difference of the paper's: left out of the size for a CPU


def top1(lab: Lab, trainer: str, seed: int, *flags: str) -> float:
    """Object k-NN of a run's C5 (%)."""
    stride = "16" if lab.scale.arch == "resnet10-tiny" else "32"
    boxes = ("--min-side", stride) if trainer == "scrl" else ()
    run = lab.train(trainer, seed, *SHARED, *boxes, *flags)
    score = lab.measure("object-knn", run, "--size", str(lab.scale.scene), "--workers", "0")
    return 100 * next(iter(score["k"].values()))["top1"]  # the first k that the bank has enough objects for


def claims(lab: Lab) -> list[Claim]:
    """Tables 2, 6, 7 and 10 of the paper, with object k-NN in the place of detection and of a linear layer on boxes."""
    variants = VARIANTS if lab.scale == SCALES["cpu"] else VARIANTS | LONG
    byol = lab.each_seed(lambda seed: top1(lab, "byol", seed))
    scrl = {name: lab.each_seed(lambda seed, f=flags: top1(lab, "scrl", seed, *f)) for name, flags in variants.items()}
    measure = "top-1 of object k-NN on C5 (%)"

    def over(name: str) -> dict[str, list[float]]:
        return {"SCRL": scrl["SCRL"], name: scrl[name]}

    found = [
        Claim("Features of boxes matched in two views tell objects better than BYOL's of whole views.",
              "yes: linear on boxes 74.8 over 71.5 (Table 10), COCO 40.9 over 40.0 AP (Table 2)",
              measure, {"SCRL": scrl["SCRL"], "BYOL": byol}),
        Claim("One box an image is enough to be better than BYOL.",
              "yes: COCO 39.2 over 38.3 AP (Table 6)", measure, {"one box": scrl["one box"], "BYOL": byol}),
        Claim("Ten boxes an image are better than one.",
              "yes: COCO 40.2 over 39.2 AP (Table 6)", measure, over("one box")),
        Claim("Boxes that match exactly are better than boxes jittered by 20 %.",
              "yes: COCO 40.2 over 39.6 AP (Table 7)", measure, over("jitter 20 %")),
    ]  # fmt: skip
    if "any IoU" in scrl:
        found.append(
            Claim("Boxes of an IoU under 0.5 are better than boxes of any IoU.",
                  "yes: COCO 40.2 over 39.8 AP (Table 7)", measure, over("any IoU"))
        )  # fmt: skip
    return found

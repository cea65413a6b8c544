"""SCRL's claims: over BYOL, and its Tables 6 and 7. Detection is out of reach here; objects are named instead."""

from __future__ import annotations

from benchmarks.experiments import Claim, Lab

BYOL = ("--lr", "1.0", "--warmup-epochs", "2", "--hidden", "512")
VARIANTS = {
    "SCRL": (),
    "one box": ("--boxes", "1"),
    "jitter 20 %": ("--jitter", "0.2"),
    "any IoU": ("--max-iou", "1"),
}


def top1(lab: Lab, trainer: str, seed: int, *flags: str) -> float:
    """Object k-NN of a run's C5 (%)."""
    run = lab.train(trainer, seed, *BYOL, *flags)
    score = lab.measure("object-knn", run, "--size", str(lab.scale.scene), "--workers", "0")
    return 100 * float(score["k"]["20"]["top1"])


def claims(lab: Lab) -> list[Claim]:
    """Tables 2, 6, 7 and 10 of the paper, with object k-NN in the place of detection and of a linear layer on boxes."""
    scrl = {name: lab.each_seed(lambda seed, f=flags: top1(lab, "scrl", seed, *f)) for name, flags in VARIANTS.items()}
    byol = lab.each_seed(lambda seed: top1(lab, "byol", seed))
    measure = "top-1 of object k-NN on C5 (%)"

    def over(name: str) -> dict[str, list[float]]:
        return {"SCRL": scrl["SCRL"], name: scrl[name]}

    return [
        Claim("Features of boxes matched in two views tell objects better than BYOL's of whole views.",
              "yes: linear on boxes 74.8 over 71.5 (Table 10), COCO 40.9 over 40.0 AP (Table 2)",
              measure, {"SCRL": scrl["SCRL"], "BYOL": byol}),
        Claim("One box an image is enough to be better than BYOL.",
              "yes: COCO 39.2 over 38.3 AP (Table 6)", measure, {"one box": scrl["one box"], "BYOL": byol}),
        Claim("Ten boxes an image are better than one.",
              "yes: COCO 40.2 over 39.2 AP (Table 6)", measure, over("one box")),
        Claim("Boxes that match exactly are better than boxes jittered by 20 %.",
              "yes: COCO 40.2 over 39.6 AP (Table 7)", measure, over("jitter 20 %")),
        Claim("Boxes of an IoU under 0.5 are better than boxes of any IoU.",
              "yes: COCO 40.2 over 39.8 AP (Table 7)", measure, over("any IoU")),
    ]  # fmt: skip

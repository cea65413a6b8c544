"""SCRL's claims: over BYOL, and its Tables 6 and 7. Detection is out of reach here; objects are named instead."""

from __future__ import annotations

from benchmarks.experiments import SCALES, Claim, Lab

# Both see the same crops in the same passes, so that boxes alone differ.
SHARED = ("--lr", "16", "--warmup-epochs", "1", "--hidden", "256", "--dim", "128", "--ema", "0.97", "--crop", "0.2")
SHARED += ("--forward", "joint", "--workers", "0")
VARIANTS: dict[str, tuple[str, ...]] = {"SCRL": (), "one box": ("--boxes", "1")}
LONG = {"jitter 20 %": ("--jitter", "0.2"), "any IoU": ("--max-iou", "1")}  # small differences: not in the CPU's size
LAYERS = ("c5", "c4")  # C5 is what SCRL reads and the paper measures


def top1(lab: Lab, trainer: str, seed: int, *flags: str) -> dict[str, float]:
    """Object k-NN of each layer of a run (%)."""
    stride = "16" if lab.scale.arch == "resnet10-tiny" else "32"
    boxes = ("--min-side", stride) if trainer == "scrl" else ()
    run = lab.train(trainer, seed, *SHARED, *boxes, *flags)
    found = {}
    for layer in LAYERS:
        score = lab.measure("object-knn", run, "--layer", layer, "--size", str(lab.scale.scene), "--workers", "0")
        found[layer] = 100 * next(iter(score["k"].values()))["top1"]  # the first k that the bank has enough objects for
    return found


def claims(lab: Lab) -> list[Claim]:
    """Tables 2, 6, 7 and 10 of the paper, with object k-NN in the place of detection and of a linear layer on boxes."""
    variants = VARIANTS if lab.scale == SCALES["cpu"] else VARIANTS | LONG
    scores = {"BYOL": lab.each_seed(lambda seed: top1(lab, "byol", seed))}
    for name, flags in variants.items():
        scores[name] = lab.each_seed(lambda seed, f=flags: top1(lab, "scrl", seed, *f))

    def claim(says: str, paper: str, better: str, worse: str, layer: str = "c5") -> Claim:
        values = {name: [each[layer] for each in scores[name]] for name in (better, worse)}
        return Claim(says, paper, f"top-1 of object k-NN on {layer.upper()} (%)", values)

    found = [
        claim("Features of boxes matched in two views tell objects better than BYOL's of whole views.",
              "yes: linear on boxes 74.8 over 71.5 (Table 10), COCO 40.9 over 40.0 AP (Table 2)", "SCRL", "BYOL"),
        claim("So do those of the layer before.", "silent", "SCRL", "BYOL", "c4"),
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
    return found

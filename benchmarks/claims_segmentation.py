"""DenseSiam's claims on unsupervised segmentation (Tables 3 and 5), on scenes: `claims.py --papers segmentation`.

Every variant starts from one random backbone of its seed, so that k-means on it is the baseline; a layer is chosen for
k-means by the score itself, in its favour. What has no label, the background, is a class.
"""

from __future__ import annotations

from benchmarks.experiments import Claim, Lab

LAYERS = ("c2", "c3", "c4", "c5")
TRAIN = ("--task", "segmentation", "--classes", "17", "--aux", "64", "--hidden", "64", "--lr", "0.4")
PIXSIM = ("--aux", "0", "--seg-weight", "0", "--region-weight", "0")
VARIANTS = {"DenseSiam": (), "without RegionSim": ("--region-weight", "0"), "PixSim": PIXSIM}


def miou(lab: Lab, weights: object, *flags: str) -> float:
    """Of a run's head, or of k-means on a random backbone (%)."""
    view = ("--view", str(lab.scale.size), "--background", "--things", "16", "--workers", "0")
    return 100 * float(lab.measure("unsupervised-segmentation", str(weights), *view, *flags)["miou"])


def k_means(lab: Lab, seed: int) -> float:
    """The best layer's."""
    return max(miou(lab, "random", "--seed", str(seed), "--layer", layer) for layer in LAYERS)


def claims(lab: Lab) -> list[Claim]:
    """Mean IoU of one-to-one matching over the classes of scenes and their background."""
    found = {
        name: lab.each_seed(lambda seed, f=flags: miou(lab, lab.train("densesiam", seed, *TRAIN, *f)))
        for name, flags in VARIANTS.items()
    }
    clusters = lab.each_seed(lambda seed: k_means(lab, seed))
    measure = "mIoU (%)"
    return [
        Claim("DenseSiam segments better than k-means on the backbone it starts from.",
              "yes: 16.4 over 9.8 and 14.4 mIoU of clustering methods (Table 3)", measure,
              {"DenseSiam": found["DenseSiam"], "k-means": clusters}),
        Claim("The auxiliary head, the loss of own labels and RegionSim add to PixSim.",
              "yes: 16.4 over 10.1 mIoU (Table 5)", measure,
              {name: found[name] for name in ("DenseSiam", "PixSim")}),
        Claim("RegionSim adds to them.", "yes: 16.4 over 15.0 mIoU (Table 5)", measure,
              {name: found[name] for name in ("DenseSiam", "without RegionSim")}),
    ]  # fmt: skip

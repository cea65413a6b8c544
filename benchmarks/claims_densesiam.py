"""DenseSiam's claims: PixSim and RegionSim over SimSiam (Table 4). Detection is out of reach; objects are named."""

from __future__ import annotations

from benchmarks import claims_segmentation
from benchmarks.experiments import Claim, Lab

# Wider steps than the paper's 0.05: its runs have 185,000 of them, these 248.
BASE = ("--lr", "0.4", "--hidden", "512", "--dim", "512")
SIMSIAM = (*BASE, "--bottleneck", "128")
DENSE = (*BASE, "--channels", "128")
VARIANTS = {
    "PixSim and RegionSim": (),
    "PixSim": ("--region-weight", "0"),
    "one point": ("--region-weight", "0", "--grid", "1"),
}


def top1(lab: Lab, trainer: str, seed: int, *flags: str) -> float:
    """Object k-NN of a run's C5 (%)."""
    run = lab.train(trainer, seed, *flags)
    score = lab.measure("object-knn", run, "--size", str(lab.scale.scene), "--workers", "0")
    return 100 * float(next(iter(score["k"].values()))["top1"])  # the first k that the bank has enough objects for


def claims(lab: Lab) -> list[Claim]:
    """All of the paper's claims that can be measured here: those of segmentation are claims_segmentation.py's."""
    return pretraining(lab) + claims_segmentation.claims(lab)


def pretraining(lab: Lab) -> list[Claim]:
    """Tables 2, 4a and 4f, with object k-NN in the place of detection."""
    dense = {
        name: lab.each_seed(lambda seed, f=flags: top1(lab, "densesiam", seed, *DENSE, *f))
        for name, flags in VARIANTS.items()
    }
    simsiam = lab.each_seed(lambda seed: top1(lab, "simsiam", seed, *SIMSIAM))
    measure = "top-1 of object k-NN on C5 (%)"
    return [
        Claim("PixSim tells objects better than SimSiam alone.",
              "yes: VOC 54.9 over 53.5 AP (Table 4a)", measure, {"PixSim": dense["PixSim"], "SimSiam": simsiam}),
        Claim("PixSim with RegionSim tells objects better than SimSiam alone.",
              "yes: VOC 55.5 over 53.5 AP (Table 4c)", measure,
              {"PixSim and RegionSim": dense["PixSim and RegionSim"], "SimSiam": simsiam}),
        Claim("RegionSim in the second half of training adds to PixSim.",
              "yes: VOC 55.5 over 54.9 AP (Table 4f)", measure,
              {name: dense[name] for name in ("PixSim and RegionSim", "PixSim")}),
        Claim("A grid of 7 x 7 points is better than one point.",
              "yes: VOC 54.9 over 28.8 AP (Table 4a)", measure,
              {name: dense[name] for name in ("PixSim", "one point")}),
    ]  # fmt: skip

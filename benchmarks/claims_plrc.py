"""PLRC's claims: point over region over image level (Table 3), and worse and worse regions (Figure 7), by affinity.

Figure 7 measures detection, which is out of reach here; affinity takes its place. The image level is MoCo v2, the
region level `--level region`, the point level the whole method; a run at 4 x 4 serves Table 3 and Figure 7 alike.
"""

from __future__ import annotations

from benchmarks.experiments import SCALES, Claim, Lab

SCENES = ("--radius", "0.13", "0.26", "--usual-colors")  # on the default ones no small net learns in minutes
COMMON = ("--lr", "6", "--hidden", "256", "--queue", "1024", "--ema", "0.99", "--warmup-epochs", "0.5")
POINTS = ("--slots", "8", "--points", "4")
CPU = ("--arch", "resnet10-tiny", "--size", "64", "--batch-size", "32", "--epochs", "4")
QUALITY = {"masks": "masks", "boxes": "boxes", "4 x 4": "grid:4", "2 x 2": "grid:2"}  # from best to worst, Figure 7


def overlap(lab: Lab, seed: int, trainer: str, *flags: str) -> float:
    """Affinity overlap of a run's C5 (%)."""
    small = lab.scale == SCALES["cpu"]
    scenes = (*SCENES, "--size", "128") if small else SCENES
    run = lab.train(trainer, seed, *COMMON, *(CPU if small else ()), *flags, data=lab.scenes(flags=scenes))
    side = 4 * (64 if small else lab.scale.size)  # as 896 to 224
    measured = ("--arch", "resnet10-tiny") if small else ()
    shape = ("--side", str(side), "--map-size", str(side // 8), "--count", "200", "--workers", "0")
    score = lab.measure("affinity", run, *measured, *shape, data=lab.scenes(held_out=True, flags=scenes))
    return 100 * float(score["jaccard"])


def claims(lab: Lab) -> list[Claim]:
    """Table 3 and Figure 7 of the paper."""
    upsample = "16" if lab.scale == SCALES["cpu"] else str(lab.scale.size // 4)

    def plrc(level: str, regions: str, *flags: str) -> list[float]:
        own = ("--level", level, "--regions", regions, "--upsample", upsample, *POINTS, *flags)
        return lab.each_seed(lambda seed: overlap(lab, seed, "plrc", *own))

    image = lab.each_seed(lambda seed: overlap(lab, seed, "moco_v2"))
    point = {name: plrc("point", law) for name, law in QUALITY.items()}
    region = {name: plrc("region", law) for name, law in QUALITY.items()}
    bare = plrc("point", "grid:4", "--alpha", "1")
    measure = "affinity overlap on C5 (%)"

    def lost(level: dict[str, list[float]]) -> list[float]:
        """What is lost from masks to a 2 x 2 grid."""
        return [best - worst for best, worst in zip(level["masks"], level["2 x 2"], strict=True)]

    found = [
        Claim("Point level segments by affinity better than region level, and that better than image level.",
              "yes: 52.0 over 33.8 over 33.1 (Table 3)", measure,
              {"point": point["4 x 4"], "region": region["4 x 4"], "image": image}),
        Claim("Distillation of affinities helps.", "yes: boundaries in pictures (Figure 5)", measure,
              {"with": point["4 x 4"], "without": bare}),
        Claim("Point level loses less from masks to a 2 x 2 grid than region level.",
              "yes: the gap of VOC AP widens (Figure 7)", "points of affinity overlap lost from masks to 2 x 2",
              {"point": lost(point), "region": lost(region)}, higher=False),
    ]  # fmt: skip
    found += [
        Claim(f"Point level is better than region level with {name}.", "yes: VOC AP (Figure 7)", measure,
              {"point": point[name], "region": region[name]})
        for name in QUALITY if name != "4 x 4"
    ]  # fmt: skip
    return found

"""One page of a run: what the network was shown, its curves, and how its backbone compares with a random one.

python trainers/report.py --run runs/demo/d3ssl --scores runs/demo/scores --data runs/demo/scenes.beton
"""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor

import geoaug
from geoaug import composite_pages, recipes, viz
from trainers import common

MEANING = """\
object k-NN           Each object of new images, never trained on, is named by its 20 nearest objects of other new
                      images; labels serve for nothing else. Higher is better; always naming the largest class gives
                      its share. C3 is an earlier layer: more of it is there before any training.
disturbed k-NN        The same with everything outside the objects replaced by another image: what is lost here was
                      read off the surroundings.
coupling rate         How far an object's features change when another stands beside it. 1 is ideal.
position similarity   How alike one picture's features are in the middle of a 3 x 3 canvas and around it. 1 is ideal,
                      and a random network is near it: it has learnt nothing, position included."""
LOSS = """\
The loss is four terms of InfoNCE over the queue, so it starts near 0 with an empty queue, rises while the queue fills,
and can only then fall. A spread that goes to 0 is a collapse."""
SHOWN = "What the networks were shown"
COCO = """\
python data_prep/selective_search.py train2017 --out proposals --preset d3ssl
python data_prep/write_beton.py train2017 --out coco.beton --proposals proposals
accelerate launch trainers/d3ssl.py --data coco.beton --preset coco-800ep --output runs/d3ssl
for task in object-knn disturbed-knn coupling-rate position-similarity; do
    python trainers/evaluate.py $task --weights runs/d3ssl --data annotations/instances_val2017.json --images val2017 \\
        --bank annotations/instances_train2017.json --bank-images train2017 --out scores/d3ssl-$task.json
done
geoaug export runs/d3ssl --to detectron2 --out d3ssl.pkl"""


@dataclass
class Config:
    """What the page is made of."""

    run: Path
    """The run folder."""
    data: Path
    """The images the views are shown on."""
    scores: Path | None = None
    """A folder of evaluate.py's files trained-X.json and random-X.json, X each of the four tasks and object-knn-c3."""
    proposals: Path | None = None
    out: Path = Path("runs/demo/report.html")


def curves(lines: list[dict[str, float]]) -> Tensor:
    """Loss, spread and learning rate over the steps, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.6), dpi=90, constrained_layout=True)
    steps = [line["step"] for line in lines]
    shown = (
        ("loss", [name for name in ("loss", "decoupling", "depositioning") if name in lines[-1]]),
        ("spread of unit vectors (0: collapsed)", ["spread", "spread_teacher"]),
        ("share of step time spent waiting for data", ["wait"]),
    )
    for line in lines:
        line["wait"] = line["data_s"] / line["step_s"]
    for axis, (title, names) in zip(axes, shown, strict=True):
        for name in names:
            axis.plot(steps, [line[name] for line in lines], label=name)
        axis.set(title=title, xlabel="step", ylim=(0, None))
        axis.legend()
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()  # type: ignore[attr-defined]
    pyplot.close(figure)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def table(scores: dict[str, dict[str, Any]]) -> str:
    """The measures of the trained and of the random backbone, side by side."""
    columns = ("random", "trained")
    rows: list[tuple[str, list[str]]] = []
    knn_tasks = (
        ("object-knn", "object k-NN"),
        ("object-knn-c3", "object k-NN, C3"),
        ("disturbed-knn", "disturbed k-NN"),
    )
    for task, title in knn_tasks:
        for top in ("top1", "top5"):
            found = [next(iter(scores[f"{column}-{task}"]["k"].values()))[top] for column in columns]
            rows.append((f"{title}, Top-{top[-1]}", [f"{100 * x:.1f} %" for x in found]))
    for task, title in (("coupling-rate", "coupling rate"), ("position-similarity", "position similarity")):
        for layer in ("c4", "c5"):
            found = [scores[f"{column}-{task}"]["layers"][layer] for column in columns]
            values = [x["ratio_of_means"] if isinstance(x, dict) else x for x in found]
            rows.append((f"{title}, {layer.upper()}", [f"{x:.3f}" for x in values]))
    head = f"{'':<28}{columns[0]:>10}{columns[1]:>10}"
    knn = scores["trained-object-knn"]
    error = 100 * (0.25 / knn["queries"]) ** 0.5
    foot = (
        f"{knn['queries']} objects are named by {knn['bank']} others; a standard error is at most {error:.1f} points; "
        f"the largest class has {100 * knn['largest_class']:.1f} %."
    )
    return "\n".join([head, *(f"{name:<28}{a:>10}{b:>10}" for name, (a, b) in rows), "", foot])


def main(config: Config) -> None:
    """Write the page."""
    metrics = config.run / "metrics.jsonl"
    if not metrics.exists():
        raise common.UsageError(f"--run must hold metrics.jsonl, got {config.run}")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    about = json.loads((config.run / "config.json").read_text())
    files = sorted(config.scores.glob("*.json")) if config.scores else []
    scores = {file.stem: json.loads(file.read_text()) for file in files}
    settings, last = about["config"], lines[-1]
    recipe = recipes.recipe("d3ssl").at(settings["size"])
    with geoaug.open_loader(
        config.data, recipe.views, batch_size=1, seed=settings["seed"], workers=0, proposals=config.proposals
    ) as loader:
        pictures = composite_pages.rows_of(list(itertools.islice(loader, 4)), recipe)
    told = (
        f"{about['method']} of {settings['arch']} at {settings['size']} pixels, batch {settings['batch_size']}: "
        f"{last['step']:.0f} steps, {last['epoch']:.1f} epochs; "
        f"{np.median([line['images_per_s'] for line in lines]):.0f} images a second at the median, "
        f"{100 * np.median([line['data_s'] / line['step_s'] for line in lines]):.1f} % of it waiting for data."
    )
    sections: list[tuple[str, str, Tensor | None]] = [
        ("Curves", f"{told}\n\n{LOSS}", curves(lines)),
        *[(SHOWN if i == 0 else "", title, picture) for i, (title, picture) in enumerate(pictures)],
        ("The same on COCO", COCO, None),
    ]
    if scores:
        learnt = ("What the backbone has learnt", table(scores), None)
        sections = [learnt, ("What the numbers mean", MEANING, None), *sections]
    print(f"wrote {viz.page('geoaug: a small D3SSL run', sections, config.out)}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except common.UsageError as error:
        print(f"report.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None

"""The statistics of a choice beside the paper's Table 2, as numbers and as a page."""

import html
from typing import Any

import numpy as np

from data_prep.openimages_boxes import Boxes
from data_prep.openimages_choice import Choice
from data_prep.openimages_classes import Classes, Shared
from data_prep.openimages_outputs import rows_of

PAPER = {
    "OpenImage-MINI": {"images": 146_000, "objects_per_image": 9.1, "classes_per_image": 3.20, "classes": 569},
    "COCO": {"images": 118_000, "objects_per_image": 7.4, "classes_per_image": 2.95, "classes": 80},
}
_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse}td,th{padding:.2rem .8rem;text-align:right;border-bottom:1px solid #ddd}"
    "td:first-child,th:first-child{text-align:left}svg{width:100%;height:auto;font:11px system-ui,sans-serif}"
)
_ROW, _LEFT, _WIDE, _ALL = 16, 120, 620, 860  # of the plot, in its own units


def statistics(boxes: Boxes, choice: Choice, classes: Classes, shared: Shared) -> dict[str, Any]:
    """Counted objects of the chosen images: the four numbers of Table 2, by category and by class."""
    rows, image = rows_of(boxes, choice.images)
    objects = choice.counted[rows]
    labels, image = boxes.classes[rows[objects]].astype(np.int64), image[objects]
    pairs = np.unique(image * len(classes.mids) + labels)  # (image, class)
    by_class = np.bincount(labels, minlength=len(classes.mids))
    with_class = np.bincount(pairs % len(classes.mids), minlength=len(classes.mids))
    images = len(choice.images)
    categories = []
    for at, (name, limit) in enumerate(zip(shared.target.names, shared.target.objects.tolist(), strict=True)):
        own = np.flatnonzero(shared.category == at).tolist()
        entry = {"name": name, "objects": int(choice.running[at]), "limit": limit}
        categories.append({**entry, "classes": [classes.names[i] for i in own]})
    return {
        "images": images,
        "objects": len(labels),
        "objects_per_image": round(len(labels) / max(images, 1), 4),
        "classes_per_image": round(len(pairs) / max(images, 1), 4),
        "classes": int((by_class > 0).sum()),
        "shared_objects": int(choice.running.sum()),
        "paper": PAPER,
        "target": shared.target.about,
        "categories": categories,
        "categories_without_a_class": list(shared.unmatched),
        "images_by_fate": choice.fates,
        "by_class": {
            classes.names[i]: {"mid": classes.mids[i], "objects": int(by_class[i]), "images": int(with_class[i])}
            for i in np.flatnonzero(by_class).tolist()
        },
    }


def page(found: dict[str, Any]) -> str:
    """The statistics as one page of HTML without scripts."""
    head = ("", "images", "objects an image", "classes an image", "classes")
    keys = ("images", "objects_per_image", "classes_per_image", "classes")
    lines = {"this choice": found, **{f"{name}, the paper's Table 2": row for name, row in found["paper"].items()}}
    table = "".join(
        f"<tr><td>{html.escape(name)}</td>" + "".join(f"<td>{_shown(row[key])}</td>" for key in keys) + "</tr>"
        for name, row in lines.items()
    )
    fates = ", ".join(f"{number:,} {what}" for what, number in found["images_by_fate"].items())
    unmatched = ", ".join(found["categories_without_a_class"]) or "none"
    return "\n".join(
        [
            "<!doctype html><html lang='en'><meta charset='utf-8'><title>OpenImage-MINI</title>",
            f"<style>{_STYLE}</style><h1>OpenImage-MINI</h1>",
            f"<table><tr>{''.join(f'<th>{title}</th>' for title in head)}</tr>{table}</table>",
            f"<p>Images of the file of boxes: {fates}. {found['shared_objects']:,} of {found['objects']:,} objects are "
            f"of a class that is shared. Categories without a class: {html.escape(unmatched)}.</p>",
            f"<h2>Objects of each shared category, and of {html.escape(found['target'])}</h2>",
            _plot(found["categories"]),
            "</html>",
            "",
        ]
    )


def _shown(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.2f}"


def _plot(categories: list[dict[str, Any]]) -> str:
    """Bars on a scale of powers of ten: pale the target's objects, dark the chosen ones."""
    most = max([10, *(entry["limit"] for entry in categories)])
    decades = len(str(int(most)))

    def length(count: int) -> float:
        return round(_WIDE * float(np.log10(max(count, 1))) / decades, 1)

    tall = _ROW * len(categories)
    parts = [f"<svg viewBox='0 0 {_ALL} {tall + 24}' role='img' aria-label='objects of each category'>"]
    for power in range(decades + 1):
        x = _LEFT + length(10**power)
        parts.append(f"<path d='M{x} 0V{tall}' stroke='#ccc'/><text x='{x}' y='{tall + 16}'>{10**power:,}</text>")
    for i, entry in enumerate(sorted(categories, key=lambda entry: (-entry["limit"], entry["name"]))):
        y, name = _ROW * i, html.escape(entry["name"])
        kinds = html.escape(", ".join(entry["classes"]) or "no class")
        parts.append(
            f"<g><title>{name}: {kinds}</title><text x='{_LEFT - 6}' y='{y + 12}' text-anchor='end'>{name}</text>"
            f"<rect x='{_LEFT}' y='{y + 2}' width='{length(entry['limit'])}' height='12' fill='#cdd9ea'/>"
            f"<rect x='{_LEFT}' y='{y + 5}' width='{length(entry['objects'])}' height='6' fill='#1f4e8c'/>"
            f"<text x='{_LEFT + _WIDE + 8}' y='{y + 12}'>{entry['objects']:,} of {entry['limit']:,}</text></g>"
        )
    return "\n".join([*parts, "</svg>"])

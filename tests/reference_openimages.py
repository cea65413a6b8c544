"""OpenImage-MINI the slow, obvious way: rows one by one with the csv module, and the same once more with pandas."""

import csv
import io

import numpy as np

import geoaug

NEEDED = ("ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax", "IsGroupOf", "IsDepiction")


def read_rows(text, mids):
    """The good rows (image, class, box, group, depiction) of a CSV in file order, and (line, kind) of each bad one."""
    rows, bad, seen = [], [], set()
    lines = text.split("\n")
    titles = lines[0].split(",")
    for number, line in enumerate(lines[1:], 2):
        if line.strip() == "":
            continue
        (fields,) = csv.reader([line])
        if len(fields) != len(titles):
            bad.append((number, "row of too few or many fields"))
            continue
        entry = dict(zip(titles, fields, strict=True))
        identity, label = entry["ImageID"], entry["LabelName"]
        is_id = len(identity) == 16 and all(letter in "0123456789abcdef" for letter in identity)
        try:
            sides = [float(entry[name]) for name in ("XMin", "YMin", "XMax", "YMax")]
            group, depiction = int(entry["IsGroupOf"]), int(entry["IsDepiction"])
        except ValueError:
            bad.append((number, "bad number" if len(identity) == 16 else "bad image id"))
            continue
        box = tuple(float(np.float32(side)) for side in sides)
        if not is_id:
            bad.append((number, "bad image id"))
        elif label not in mids:
            bad.append((number, "unknown class"))
        elif not all(0 <= side <= 1 for side in sides):
            bad.append((number, "box outside [0, 1]"))
        elif sides[0] >= sides[2] or sides[1] >= sides[3]:
            bad.append((number, "box reversed or without area"))
        elif group not in (-1, 0, 1) or depiction not in (-1, 0, 1):
            bad.append((number, "bad flag"))
        elif (identity, label, box) in seen:
            bad.append((number, "duplicate row"))
        else:
            seen.add((identity, label, box))
            rows.append((identity, label, box, group == 1, depiction == 1))
    return rows, bad


def counts_as_object(row, *, group_of=True, depictions=True, min_side=0.0):
    """Whether the rules count a row."""
    _, _, (x0, y0, x1, y1), group, depiction = row
    if (group and not group_of) or (depiction and not depictions):
        return False
    return x1 - x0 >= min_side and y1 - y0 >= min_side


def in_order(ids, seed):
    """Image ids, hexadecimal, by the bits that geoaug's key draws for them."""
    ids = sorted(ids)
    numbers = np.array([int(identity, 16) for identity in ids], dtype=np.uint64).view(np.int64)
    words = geoaug.Key(seed, 0, numbers).fold("openimage_mini").words("order", 1).tolist()
    return [
        identity for _, _, identity in sorted((w[0], w[1], identity) for w, identity in zip(words, ids, strict=True))
    ]


def choose(rows, category_of, limits, most, seed, excluded=(), **rules):
    """The chosen ids in order, and the running counts by category."""
    objects = {}
    for row in rows:
        objects.setdefault(row[0], [])
        if counts_as_object(row, **rules) and row[1] in category_of:
            objects[row[0]].append(category_of[row[1]])
    running, chosen = dict.fromkeys(limits, 0), []
    for identity in in_order(objects, seed):
        own = objects[identity]
        if len(chosen) == most or identity in excluded or not own:
            continue
        if all(running[name] + own.count(name) <= limits[name] for name in set(own)):
            for name in own:
                running[name] += 1
            chosen.append(identity)
    return chosen, running


def four_statistics(rows, chosen, **rules):
    """Images, objects an image, classes an image, classes."""
    objects = [row for row in rows if row[0] in set(chosen) and counts_as_object(row, **rules)]
    classes_of = {(row[0], row[1]) for row in objects}
    classes = {row[1] for row in objects}
    return len(chosen), len(objects) / len(chosen), len(classes_of) / len(chosen), len(classes)


def choose_with_pandas(path, mids, category_of, limits, most, seed):
    """The same list by a straightforward program with pandas, for files without unreadable rows."""
    import pandas as pd

    table = pd.read_csv(path, usecols=list(NEEDED))
    sides = table[["XMin", "XMax", "YMin", "YMax"]]
    good = table.ImageID.str.fullmatch("[0-9a-f]{16}") & table.LabelName.isin(mids)
    good &= ((sides >= 0) & (sides <= 1)).all(axis=1) & (table.XMin < table.XMax) & (table.YMin < table.YMax)
    table = table[good]
    table = table.drop_duplicates(["ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax"])
    table = table.assign(category=table.LabelName.map(category_of))
    counts = table.dropna(subset=["category"]).groupby(["ImageID", "category"], observed=True).size()
    by_image = {}
    for (identity, name), number in counts.items():
        by_image.setdefault(identity, []).append((name, number))
    images = pd.Series(sorted(by_image))
    numbers = np.array([int(identity, 16) for identity in images], dtype=np.uint64).view(np.int64)
    words = geoaug.Key(seed, 0, numbers).fold("openimage_mini").words("order", 1).numpy()
    running, chosen = dict.fromkeys(limits, 0), []
    for identity in images[np.lexsort((words[:, 1], words[:, 0]))]:
        if len(chosen) == most:
            break
        if all(running[name] + number <= limits[name] for name, number in by_image[identity]):
            for name, number in by_image[identity]:
                running[name] += number
            chosen.append(identity)
    return chosen


def as_text(rows, titles):
    """A CSV of dictionaries."""
    text = io.StringIO()
    writer = csv.DictWriter(text, titles, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()

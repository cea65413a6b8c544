import csv
import gzip
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import build_openimage_mini as tool
from data_prep import openimages_boxes, openimages_classes
from data_prep.openimages_boxes import CsvError, read_boxes
from data_prep.openimages_choice import FATES, Rules, choose, seeded_order, without_repeats
from data_prep.openimages_classes import COUNTS, TABLE, Classes, Shared, Target, published, read_classes, read_shared
from data_prep.openimages_outputs import hex_ids
from data_prep.openimages_statistics import statistics

from . import reference_openimages as slow

pytest.importorskip("pyarrow")
ROOT = Path(__file__).resolve().parent.parent
TITLES = [
    "ImageID", "Source", "LabelName", "Confidence", "XMin", "XMax", "YMin", "YMax",
    "IsOccluded", "IsTruncated", "IsGroupOf", "IsDepiction", "IsInside",
]  # fmt: skip
CLICKS = [f"XClick{i}{axis}" for axis in "XY" for i in range(1, 5)]  # V6 and V7 have them as well
CLASSES = Classes(("/m/a", "/m/b", "/m/c", "/m/d"), ("A", "B", "C", "D"))
TARGET = Target(("thing", "beast"), np.array([4, 2]), "a target")
SHARED = Shared(TARGET, np.array([0, 1, -1, 0]), (), ())  # A and D are things, B is a beast
CATEGORY = {"/m/a": "thing", "/m/b": "beast", "/m/d": "thing"}
LIMITS = {"thing": 4, "beast": 2}
OUTPUTS = ("image_ids.txt", "instances.json", "manifest.json", "statistics.html", "statistics.json")


def row(image=1, label="/m/a", box=(0.1, 0.2, 0.5, 0.6), group=0, depiction=0, **more):
    """One row of a file of boxes."""
    x0, y0, x1, y1 = box
    entry = dict.fromkeys(TITLES, "0") | {"Source": "xclick", "LabelName": label, "Confidence": "1"}
    entry |= {"ImageID": image if isinstance(image, str) else f"{image:016x}", "IsGroupOf": group}
    entry |= {"XMin": x0, "XMax": x1, "YMin": y0, "YMax": y1, "IsDepiction": depiction}
    return entry | more


def write(path, rows, titles=TITLES):
    path.write_text(slow.as_text(rows, titles))
    return path


def classes_file(folder):
    path = folder / "class-descriptions-boxable.csv"
    path.write_text("".join(f"{mid},{name}\n" for mid, name in zip(*CLASSES, strict=True)))
    return path


def table_file(folder):
    path = folder / "table.csv"
    path.write_text("coco,name\nthing,A\nbeast,B\nthing,D\n")
    return path


def coco_file(folder, counts=(("thing", 4), ("beast", 2))):
    """A COCO json with so many objects of each category."""
    categories = [{"id": 10 + i, "name": name} for i, (name, _) in enumerate(counts)]
    annotations = [
        {"id": 1, "image_id": 1, "category_id": 10 + i, "iscrowd": 0, "bbox": [0, 0, 1, 1], "segmentation": [[0, 0]]}
        for i, (_, count) in enumerate(counts)
        for _ in range(count)
    ]
    path = folder / "coco.json"
    images = [{"id": 1, "file_name": "a.jpg", "height": 1, "width": 1}]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def run(folder, boxes, *more, out="out"):
    arguments = ["--boxes", boxes, "--classes", classes_file(folder), "--coco", coco_file(folder)]
    arguments += ["--table", table_file(folder), "--out", folder / out, "--split", "train", *more]
    return tool.main([str(argument) for argument in arguments])


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


NUMBERS = st.sampled_from(["0", "0.000000", "0.25", "0.5", "5e-1", "0.500000001", "0.75", "1", "1.000000", "0.1"])
BAD_NUMBERS = st.sampled_from(["", "x", "nan", "-0.1", "1.5", "inf", "0,5", "0.5.5"])
IDS = st.sampled_from([f"{i:016x}" for i in (1, 2, 3, 2**63, 2**64 - 1)])
BAD_IDS = st.sampled_from(["", "..", "../../etc/passwd", "http://x/a.jpg", "000000000000000G", "00000000000000AB", "1"])


@st.composite
def texts(draw):
    """A file of boxes, some rows of which are bad in every way there is; its rows need not be sorted by image."""
    lines = [",".join(TITLES)]
    for _ in range(draw(st.integers(0, 25))):
        odd = draw(st.integers(0, 11))
        low, high = sorted((draw(NUMBERS), draw(NUMBERS)), key=float)
        box = [low, draw(NUMBERS), high, draw(NUMBERS)]
        entry = row(draw(IDS), draw(st.sampled_from(CLASSES.mids)), box, *draw(st.tuples(*[st.integers(-1, 1)] * 2)))
        if odd == 0:
            entry["ImageID"] = draw(BAD_IDS)
        if odd == 1:
            entry[draw(st.sampled_from(TITLES[4:8]))] = draw(BAD_NUMBERS)
        if odd == 2:
            entry["LabelName"] = draw(st.sampled_from(["/m/z", "", "A"]))
        if odd == 3:
            entry[draw(st.sampled_from(["IsGroupOf", "IsDepiction"]))] = draw(
                st.sampled_from(["2", "x", "", "-2", "1.0"])
            )
        line = ",".join(str(entry[title]) for title in TITLES)
        if odd == 4:
            line = draw(st.sampled_from([line[:40], line + ",0", "", line.replace(",", ";")]))
        lines += [line] * draw(st.sampled_from([1, 1, 1, 2]))
    return "\n".join(lines) + draw(st.sampled_from(["", "\n", "\n\n"]))


@settings(max_examples=120, deadline=None)
@given(
    texts(), st.integers(0, 3), st.integers(1, 6), st.booleans(), st.booleans(), st.sampled_from([0.0, 0.25, 0.5]),
    st.sets(st.sampled_from([1, 2, 2**64 - 1])), st.sampled_from([80, 500, 2**20]),
)  # fmt: skip
def test_the_choice_is_that_of_the_slow_program(
    tmp_path_factory, text, seed, most, group_of, depictions, side, excluded, block
):
    path = tmp_path_factory.getbasetemp() / "random.csv"
    path.write_text(text)
    rows, bad = slow.read_rows(text, CLASSES.mids)
    rules = {"group_of": group_of, "depictions": depictions, "min_side": side}
    left_out = [f"{number:016x}" for number in excluded]
    expected, running = slow.choose(rows, CATEGORY, LIMITS, most, seed, left_out, **rules)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openimages_boxes, "_BLOCK", block)  # blocks that end anywhere
        read = read_boxes(path, CLASSES)
    kept = without_repeats(read.boxes, read.problems)
    assert read.problems.kinds == Counter(kind for _, kind in bad)
    assert [line for line, _ in read.problems.first] == [line for line, _ in bad][:10]
    choice = choose(read.boxes, kept, SHARED, Rules(**rules, excluded=frozenset(excluded)), most, seed)
    assert hex_ids(read.boxes.ids[choice.images]) == expected
    assert dict(zip(TARGET.names, choice.running.tolist(), strict=True)) == running
    assert sum(choice.fates.values()) == len(read.boxes.ids) == len({identity for identity, *_ in rows})
    if expected:
        found = statistics(read.boxes, choice, CLASSES, SHARED)
        four = [found[key] for key in ("images", "objects_per_image", "classes_per_image", "classes")]
        assert four == pytest.approx(slow.four_statistics(rows, expected, **rules), abs=1e-4)


def test_the_order_is_the_keys():
    ids = np.sort(np.random.default_rng(0).integers(0, 2**64, 999, dtype=np.uint64))
    assert hex_ids(ids[seeded_order(ids, 7)]) == slow.in_order(hex_ids(ids), 7)
    assert hex_ids(ids[seeded_order(ids, 8)]) != slow.in_order(hex_ids(ids), 7)
    assert len(seeded_order(ids[:0], 7)) == 0


def scene(images, seed=0, most=12):
    """Rows of random images, sorted by image as Open Images' are."""
    g = np.random.default_rng(seed)
    rows = []
    for image in np.sort(g.integers(0, 2**63, images)).tolist():
        for _ in range(g.integers(1, most)):
            x, y = (np.sort(g.choice(1001, 2, replace=False)) / 1000 for _ in range(2))
            rows.append(row(image, CLASSES.mids[g.integers(4)], (x[0], y[0], x[1], y[1]), int(g.random() < 0.1)))
    return rows


def test_pandas_gives_the_same_list(tmp_path):
    pytest.importorskip("pandas")
    path, limits = write(tmp_path / "boxes.csv", scene(400)), {"thing": 300, "beast": 111}
    target = Shared(TARGET._replace(objects=np.array([300, 111])), SHARED.category, (), ())
    read = read_boxes(path, CLASSES)
    choice = choose(read.boxes, without_repeats(read.boxes, read.problems), target, Rules(), 90, 3)
    expected = slow.choose_with_pandas(path, CLASSES.mids, CATEGORY, limits, 90, 3)
    assert hex_ids(read.boxes.ids[choice.images]) == expected
    assert 40 < len(expected) <= 90
    assert choice.fates["over a limit"] > 50


def test_copies_in_images_of_many_boxes(tmp_path):
    boxes = [(i / 100, 0.0, (i + 1) / 100, 0.5) for i in range(80)]
    copies = [row(box=boxes[i]) for i in (3, 70, 3)] + [row(box=(0.0, -0.0, 0.01, 0.5))]
    others = [row(2, "/m/b"), row(3, "/m/b"), row(3, "/m/b", group=1)]
    path = write(tmp_path / "boxes.csv", [row(box=box) for box in boxes] + copies + others)
    read = read_boxes(path, CLASSES)
    kept = without_repeats(read.boxes, read.problems)
    assert np.flatnonzero(~kept).tolist() == [80, 81, 82, 83, 86]
    assert read.problems.first == [
        (line, f"the same box as in line {first}") for line, first in ((82, 5), (83, 72), (84, 5), (85, 2), (88, 87))
    ]


@pytest.mark.parametrize("crlf", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("titles", [TITLES, TITLES + CLICKS, TITLES[::-1]], ids=["V4", "V6", "turned"])
def test_every_version_of_the_file_gives_the_same(tmp_path, titles, packed, crlf):
    rows = scene(30)
    plain = read_boxes(write(tmp_path / "plain.csv", rows), CLASSES).boxes
    text = slow.as_text([{**entry, **dict.fromkeys(set(titles) & set(CLICKS), "0.5")} for entry in rows], titles)
    if crlf:
        text = "\ufeff" + text.replace("\n", "\r\n").replace(",xclick,", ',"xclick",')
    data = text.encode()
    path = tmp_path / "other"
    path.write_bytes(gzip.compress(data[:900]) + gzip.compress(data[900:]) if packed else data)
    read = read_boxes(path, CLASSES)
    for name in ("ids", "starts", "ends", "classes", "corners", "flags", "lines"):
        assert np.array_equal(getattr(read.boxes, name), getattr(plain, name)), name
    assert read.problems.kinds == {}
    assert read.bytes == path.stat().st_size


def test_rows_in_another_order_give_the_same_choice(tmp_path):
    rows = scene(60)
    for name, seed in (("a", None), ("b", 1)):
        some = rows if seed is None else [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]
        assert run(tmp_path, write(tmp_path / f"{name}.csv", some), out=name) == 0
    assert (tmp_path / "a" / "image_ids.txt").read_bytes() == (tmp_path / "b" / "image_ids.txt").read_bytes()
    a, b = (json.loads((tmp_path / name / "statistics.json").read_bytes()) for name in "ab")
    assert a == b


def test_outputs(tmp_path, capsys):
    rows = [
        row(1, "/m/a", group=1), row(1, "/m/c", (0.0, 0.25, 1.0, 1.0)), row(2, "/m/b", depiction=1), row(3, "/m/c"),
        row(4, "/m/b"), row(4, "/m/b", (0.0, 0.0, 0.012500, 1.0)), row(4, "/m/a"),
    ]  # fmt: skip
    boxes = write(tmp_path / "boxes.csv", rows)
    assert run(tmp_path, boxes, "--seed", "5") == 0
    out = tmp_path / "out"
    last = capsys.readouterr().out.strip().split("\n")[-1]
    assert last == (
        f"build_openimage_mini: wrote {out}: 2 images of 146,000, 5 objects, 2.5 and 2.00 classes an image, 3 classes, "
        "0 bad rows left out"
    )
    assert sorted(bytes_of(out)) == sorted(OUTPUTS)
    assert (out / "image_ids.txt").read_text() == "train/0000000000000004\ntrain/0000000000000001\n"
    record = json.loads((out / "instances.json").read_bytes())
    assert record["info"]["boxes"] == "shares of width and height, which are not known"
    assert [(c["id"], c["name"], c["mid"], c["coco"]) for c in record["categories"]] == [
        (1, "A", "/m/a", "thing"), (2, "B", "/m/b", "beast"), (3, "C", "/m/c", None), (4, "D", "/m/d", "thing")
    ]  # fmt: skip
    assert record["images"] == [
        {"id": i + 1, "file_name": f"{image:016x}.jpg", "height": None, "width": None} for i, image in enumerate((4, 1))
    ]
    found = [(a["id"], a["image_id"], a["category_id"], a["bbox"], a["iscrowd"]) for a in record["annotations"]]
    assert found == [
        (1, 1, 2, [0.1, 0.2, 0.4, 0.4], 0), (2, 1, 2, [0.0, 0.0, 0.0125, 1.0], 0), (3, 1, 1, [0.1, 0.2, 0.4, 0.4], 0),
        (4, 2, 1, [0.1, 0.2, 0.4, 0.4], 1), (5, 2, 3, [0.0, 0.25, 1.0, 0.75], 0),
    ]  # fmt: skip
    assert [a["area"] for a in record["annotations"]] == [0.16, 0.0125, 0.16, 0.16, 0.75]
    told = json.loads((out / "statistics.json").read_bytes())
    assert [(c["name"], c["objects"], c["limit"], c["classes"]) for c in told["categories"]] == [
        ("thing", 2, 4, ["A", "D"]), ("beast", 2, 2, ["B"])
    ]  # fmt: skip
    assert told["by_class"]["C"] == {"mid": "/m/c", "objects": 1, "images": 1}
    assert told["images_by_fate"] == dict(zip(FATES, (1, 1, 2, 0, 0), strict=True))
    assert told["paper"]["OpenImage-MINI"] == {
        "images": 146_000, "objects_per_image": 9.1, "classes_per_image": 3.20, "classes": 569
    }  # fmt: skip
    page = (out / "statistics.html").read_text()
    assert "<td>this choice</td><td>2</td><td>2.50</td><td>2.00</td><td>3</td>" in page
    assert "2 of 4</text>" in page
    manifest = json.loads((out / "manifest.json").read_bytes())
    assert manifest["outputs"].keys() == set(OUTPUTS) - {"manifest.json"}
    for name, entry in manifest["outputs"].items():
        assert tool.fingerprint(out / name) == entry
    assert manifest["inputs"]["boxes"] == {"name": "boxes.csv", **tool.fingerprint(boxes)}
    assert manifest["versions"]["geoaug"]
    assert str(tmp_path) not in json.dumps(manifest)


def test_running_again_gives_the_same_bytes(tmp_path, capsys):
    boxes = write(tmp_path / "boxes.csv", scene(40))
    assert run(tmp_path, boxes) == 0
    first = bytes_of(tmp_path / "out")
    assert run(tmp_path, boxes) == 0
    assert bytes_of(tmp_path / "out") == first
    assert run(tmp_path, boxes, out="other") == 0
    assert bytes_of(tmp_path / "other") == first
    assert run(tmp_path, boxes, "--seed", "1", out="seeded") == 0
    assert bytes_of(tmp_path / "seeded")["image_ids.txt"] != first["image_ids.txt"]


def test_a_smaller_choice_is_the_beginning_of_a_larger_one(tmp_path):
    boxes = write(tmp_path / "boxes.csv", [row(image, "/m/a") for image in range(50)])
    lists = {}
    for most in (1, 3, 9):
        assert run(tmp_path, boxes, "--images", str(most)) == 0
        lists[most] = (tmp_path / "out" / "image_ids.txt").read_text().split()
    assert [len(found) for found in lists.values()] == [1, 3, 4]  # the limit is four things
    assert lists[9][:3] == lists[3]
    assert lists[3][:1] == lists[1]


def test_options_decide_what_counts(tmp_path):
    rows = [row(1, group=1), row(2, depiction=1), row(3, box=(0.0, 0.0, 0.05, 0.9)), row(4), row(5, group=-1)]
    boxes = write(tmp_path / "boxes.csv", rows)
    (tmp_path / "not.txt").write_text("train/0000000000000004\n\n0000000000000099\n0000000000000098.jpg\n")
    cases = {
        (): {1, 2, 3, 4, 5}, ("--group-of", "skip"): {2, 3, 4, 5}, ("--depictions", "skip"): {1, 3, 4, 5},
        ("--min-side", "0.06"): {1, 2, 4, 5}, ("--exclude", tmp_path / "not.txt"): {1, 2, 3, 5},
    }  # fmt: skip
    for more, expected in cases.items():
        coco_file_of_nine = coco_file(tmp_path, (("thing", 9), ("beast", 9)))
        arguments = ["--boxes", boxes, "--classes", classes_file(tmp_path), "--table", table_file(tmp_path), *more]
        arguments += ["--coco", coco_file_of_nine, "--out", tmp_path / "out", "--split", "test"]
        assert tool.main([str(argument) for argument in arguments]) == 0
        found = (tmp_path / "out" / "image_ids.txt").read_text().split()
        assert {int(line.removeprefix("test/"), 16) for line in found} == expected, more


BAD = [
    (row(".."), "line 3: image id '..' is not 16 hex digits"),
    (row("../../etc/passwd"), "line 3: image id '../../etc/passwd' is not 16 hex digits"),
    (row("http://a.b/c.jpg"), "line 3: image id 'http://a.b/c.jpg' is not 16 hex digits"),
    (row(label="/m/zz"), "line 3: unknown class '/m/zz'"),
    (row(XMin="abc"), "line 3: XMin is no number: 'abc'"),
    (row(IsGroupOf=""), "line 3: IsGroupOf is no number: ''"),
    (row(YMax="nan"), "line 3: box outside [0, 1]: XMin 0.1, XMax 0.5, YMin 0.2, YMax nan"),
    (row(box=(-0.1, 0.2, 0.5, 0.6)), "line 3: box outside [0, 1]: XMin -0.1, XMax 0.5, YMin 0.2, YMax 0.6"),
    (row(box=(0.5, 0.2, 0.1, 0.6)), "line 3: box reversed or without area: XMin 0.5, XMax 0.1, YMin 0.2, YMax 0.6"),
    (row(group=2), "line 3: bad flag: 2, 0"),
    (row(9), "line 3: the same box as in line 2"),
]


@pytest.mark.parametrize(("bad", "told"), BAD, ids=[told[8:30] for _, told in BAD])
def test_a_bad_row_is_told_and_left_out(tmp_path, capsys, bad, told):
    boxes = write(tmp_path / "boxes.csv", [row(9), bad, row(10, "/m/b")])
    assert run(tmp_path, boxes, out="good") == 0
    output = capsys.readouterr()
    assert output.err.split("\n")[0] == f"build_openimage_mini: {told}"
    assert "build_openimage_mini: 1 bad rows: 1 x " in output.err
    assert output.out.endswith("1 bad rows left out\n")
    assert len((tmp_path / "good" / "image_ids.txt").read_text().split()) == 2
    assert run(tmp_path, boxes, "--strict") == 1
    assert "stopped, 1 bad rows under --strict" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("0000000000000001,x,/m/a,1,0.1", "5 fields instead of 13"),
        ("0000000000000001,x,/m/a,1,0,1,0,1,0,0,0,0,0,0", "14 fields instead of 13"),
        ('"0000000000000001,x,/m/a,1,0,1,0,1,0,0,0,0,0', "cannot be read: "),
        ("\x00\xff", "1 fields instead of 13"),
    ],
)
def test_a_row_that_is_cut_or_torn_takes_no_other_with_it(tmp_path, capsys, line, told):
    text = slow.as_text([row(1), row(2, "/m/b")], TITLES)
    boxes = tmp_path / "boxes.csv"
    boxes.write_bytes(text.encode() + line.encode("latin-1") + b"\n" + text.split("\n", 1)[1].encode())
    assert run(tmp_path, boxes) == 0
    assert f"build_openimage_mini: line 4: {told}" in capsys.readouterr().err
    read = read_boxes(boxes, CLASSES)
    assert read.boxes.lines.tolist() == [2, 5, 3, 6]  # by image


def test_of_many_bad_rows_ten_are_told_and_the_rest_counted(tmp_path, capsys):
    rows = [row(i, "/m/zz" if i % 3 else "/m/a", box=(0.1, 0.2, 0.5, 0.6)) for i in range(1, 40)]
    rows[35]["XMin"] = "x"
    assert run(tmp_path, write(tmp_path / "boxes.csv", rows)) == 0
    lines = capsys.readouterr().err.strip().split("\n")
    assert len(lines) == 11
    assert lines[0] == "build_openimage_mini: line 2: unknown class '/m/zz'"
    assert lines[10] == "build_openimage_mini: and 17 more; 27 bad rows: 1 x bad number, 26 x unknown class"


def test_a_file_of_something_else_ends_the_reading(tmp_path, monkeypatch):
    monkeypatch.setattr(openimages_boxes, "_MOST_REFUSED", 50)
    monkeypatch.setattr(openimages_boxes, "_BLOCK", 2000)
    rows = [row(i, IsGroupOf="False") for i in range(500)]
    with pytest.raises(
        CsvError, match=r"too many rows cannot be read: \d+ x bad number, such as line 2: IsGroupOf is no"
    ):
        read_boxes(write(tmp_path / "boxes.csv", rows), CLASSES)
    monkeypatch.setattr(openimages_boxes, "_LONGEST", 5000)
    (tmp_path / "long.csv").write_bytes(",".join(TITLES).encode() + b"\n" + b"0" * 9000)
    with pytest.raises(CsvError, match="a line of more than 5,000 bytes: no CSV"):
        read_boxes(tmp_path / "long.csv", CLASSES)
    whole = gzip.compress(slow.as_text(scene(200), TITLES).encode())
    (tmp_path / "cut.csv.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CsvError, match="is damaged: "):
        read_boxes(tmp_path / "cut.csv.gz", CLASSES)


def without(title):
    return [name for name in TITLES if name != title]


USAGE = {
    "a missing column": ({"boxes": ",".join(without("XMin")) + "\n"}, [], "boxes, got .* without XMin"),
    "a column twice": ({"boxes": ",".join([*TITLES, "XMin"]) + "\n"}, [], "must have each column once"),
    "no bytes": ({"boxes": ""}, [], "without ImageID, LabelName"),
    "no file": ({}, ["--boxes", "nowhere.csv"], "--boxes must be a CSV, got nowhere.csv: no such file"),
    "no split": ({}, ["--split", "val"], "invalid choice: 'val'"),
    "an address without http": ({}, ["--address", "file:///etc"], r"--address must be http\(s\)://HOST"),
    "a size without a download": ({}, ["--max-side", "500"], "--max-side is of --download"),
    "no seed": ({}, ["--seed", "-1"], "argument --seed: expected 0 to"),
    "no such class row": ({"classes": "/m/a,A\n/m/b\n"}, [], "line 2: '/m/b'"),
    "classes twice": ({"classes": "/m/a,A\n/m/a,B\n"}, [], "line 2: /m/a again"),
    "classes without MIDs": ({"classes": "LabelName,DisplayName\nA,/m/a\n"}, [], "MIDs such as /m/01g317"),
    "no classes": ({"classes": "LabelName,DisplayName\n"}, [], "1 to 65,535 classes"),
    "a table without columns": ({"table": "a,b\n"}, [], "must have the columns coco and mid or name"),
    "a table of a short row": ({"table": "coco,name\nthing\n"}, [], "2 fields a line"),
    "a table with a class twice": ({"table": "coco,name\nthing,A\nbeast,A\n"}, [], "line 3: A again"),
    "a table of others": ({"table": "coco,name\nthing,Z\n"}, [], "must share a class"),
    "a target that is no json": ({"coco": "{"}, [], "--coco must be a COCO json with categories"),
    "a target of nothing": ({"coco": '{"categories": [], "annotations": []}'}, [], "no annotations"),
    "a target of unknown categories": (
        {"coco": '{"categories": [], "annotations": [{"image_id": 1, "category_id": 5}]}'}, [], "without the id 5"
    ),
    "a list of no ids": ({"exclude": "train/../../x\n"}, [], "--exclude must list ids of 16 hex digits, got .* line 1"),
}  # fmt: skip


@pytest.mark.parametrize(("files", "more", "told"), USAGE.values(), ids=USAGE)
def test_wrong_usage_is_one_line_and_status_two(tmp_path, capsys, files, more, told):
    given = {"classes": classes_file(tmp_path), "table": table_file(tmp_path), "coco": coco_file(tmp_path)}
    given["boxes"] = write(tmp_path / "boxes.csv", [row()])
    arguments = ["--out", str(tmp_path / "out"), "--split", "train"]
    for name, text in files.items():
        given[name] = tmp_path / f"{name}.given"
        given[name].write_text(text)
    for name, path in given.items():
        arguments += [f"--{name}", str(path)]
    with pytest.raises(SystemExit) as stop:
        tool.main([*arguments, *more])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert error.startswith("build_openimage_mini.py: error: ")
    assert re.search(told, error), error
    assert not (tmp_path / "out").exists()


def test_a_file_whose_name_tells_no_split(tmp_path, capsys):
    arguments = ["--boxes", str(write(tmp_path / "boxes.csv", [row()])), "--classes", str(classes_file(tmp_path))]
    with pytest.raises(SystemExit):
        tool.main(
            [
                *arguments,
                "--out",
                str(tmp_path / "out"),
                "--coco",
                str(coco_file(tmp_path)),
                "--table",
                str(table_file(tmp_path)),
            ]
        )
    assert "--split must be given, boxes.csv says none of train, validation, test" in capsys.readouterr().err


def test_where_no_image_can_be_chosen_nothing_is_written(tmp_path, capsys):
    assert run(tmp_path, write(tmp_path / "boxes.csv", [row(label="/m/c")])) == 1
    assert "no image can be chosen: 1 without a shared class" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_coco_counts_and_the_table_are_complete():
    with_crowds, without_crowds = published(crowds=True), published(crowds=False)
    assert (int(with_crowds.objects.sum()), int(without_crowds.objects.sum())) == (860_001, 849_949)
    assert len(with_crowds.names) == len(set(with_crowds.names)) == 80
    table = list(csv.DictReader(TABLE.read_text().splitlines()))
    assert {entry["coco"] for entry in table} == set(with_crowds.names)
    assert len({entry["mid"] for entry in table}) == len(table)
    same = Counter(entry["coco"] for entry in table if entry["match"] == "same")
    assert set(with_crowds.names) - set(same) == {"cup"}  # Open Images has mugs and coffee cups alone
    assert set(same.values()) == {1}
    assert {entry["match"] for entry in table} == {"same", "kind", "near"}
    counts = list(csv.DictReader(COUNTS.read_text().splitlines()))
    assert counts[0] == {"id": "1", "name": "person", "instances": "262465", "instances_not_crowd": "257253"}


@pytest.mark.parametrize("match", ["kinds", "same"])
def test_rows_of_the_table_that_count(tmp_path, match):
    path = tmp_path / "table.csv"
    path.write_text("coco,match,mid,name\nthing,same,/m/a,A\nthing,kind,/m/d,D\nbeast,near,/m/b,B\nbeast,same,/m/x,X\n")
    shared = read_shared(path, CLASSES, TARGET, match)
    assert shared.category.tolist() == [0, -1, -1, 0 if match == "kinds" else -1]
    assert (shared.unmatched, shared.ignored) == (("beast",), ("X = beast",))


def test_a_target_is_counted_without_or_with_crowds(tmp_path):
    entry = {"segmentation": {"counts": "abc", "size": [1, 1]}, "bbox": [0, 0, 1, 1], "image_id": 1}
    annotations = [{**entry, "category_id": 7, "iscrowd": crowd} for crowd in (0, 1, 0)]
    path = tmp_path / "coco.json"
    path.write_text(
        json.dumps({"annotations": annotations, "categories": [{"id": 7, "name": "a"}, {"id": 8, "name": "b"}]})
    )
    for crowds, expected in ((True, [3, 0]), (False, [2, 0])):
        target = openimages_classes.read_target(path, crowds=crowds)
        assert (target.names, target.objects.tolist()) == (("a", "b"), expected)


def descendants(node):
    """The MIDs of all subcategories of a node of the hierarchy."""
    for child in node.get("Subcategory", []):
        yield child["LabelName"]
        yield from descendants(child)


def test_the_table_agrees_with_open_images_own_files(data):
    meta = data / "openimages_mini" / "meta"
    old, new = (read_classes(meta / f"{name}class-descriptions-boxable.csv") for name in ("", "oidv6-"))
    names = dict(zip(old.mids, old.names, strict=True))
    table = list(csv.DictReader(TABLE.read_text().splitlines()))
    assert all(names[entry["mid"]] == entry["name"] for entry in table)
    assert set(old.mids) == set(new.mids)
    below, nodes = {}, [json.loads((meta / "bbox_labels_600_hierarchy.json").read_bytes())]
    while nodes:
        node = nodes.pop()
        below.setdefault(node["LabelName"], set()).update(descendants(node))
        nodes += node.get("Subcategory", [])
    same = {entry["coco"]: entry["mid"] for entry in table if entry["match"] == "same"}
    mine = {entry["mid"]: entry["coco"] for entry in table if entry["match"] != "near"}
    odd = {
        entry["name"] for entry in table
        if entry["match"] == "kind" and entry["mid"] not in below[same.get(entry["coco"], "/m/0bl9f")]
    }  # fmt: skip
    assert odd == {
        "Bull", "Computer monitor", "GolfBall", "Kitchen knife", "Mixing bowl", "Studio couch", "Taxi"
    }  # fmt: skip
    for coco, mid in same.items():  # what is below a shared class is shared, or another category's
        assert below[mid] <= set(mine), coco


@pytest.mark.parametrize("name", ["train", "validation", "bodyparts-train", "bodyparts-test", "roboflow"])
def test_real_rows(tmp_path, data, name):
    folder = data / "openimages_mini"
    boxes, classes = folder / "csv" / f"{name}-annotations-bbox.csv", folder / "meta" / "class-descriptions-boxable.csv"
    split = ["--split", "train"] if name == "roboflow" else []
    out = tmp_path / "out"
    read = read_classes(classes)
    shared = read_shared(TABLE, read, published(crowds=True), "kinds")
    category = {mid: shared.target.names[at] for mid, at in zip(read.mids, shared.category, strict=True) if at >= 0}
    limits = dict(zip(shared.target.names, shared.target.objects.tolist(), strict=True))
    rows, bad = slow.read_rows(boxes.read_text(), set(read.mids))
    expected, _ = slow.choose(rows, category, limits, 50, 0)
    status = tool.main(["--boxes", str(boxes), "--classes", str(classes), "--out", str(out), "--images", "50", *split])
    if not expected:  # human hands and heads are of no category
        assert (status, name[:9]) == (1, "bodyparts")
        return
    assert status == 0
    lines = (out / "image_ids.txt").read_text().split()
    where = "train" if split else name.removeprefix("bodyparts-")
    assert lines == [f"{where}/{identity}" for identity in expected]
    assert sum(json.loads((out / "manifest.json").read_bytes())["rows"]["bad"].values()) == len(bad)


def test_killed_while_it_writes_and_started_again(tmp_path):
    """A run without manifest.json is not whole; the next one makes it so, whatever it finds."""
    boxes = write(tmp_path / "boxes.csv", scene(20))
    assert run(tmp_path, boxes) == 0
    whole = bytes_of(tmp_path / "out")
    (tmp_path / "out" / "manifest.json").unlink()
    (tmp_path / "out" / "instances.json").write_text("half")
    (tmp_path / "out" / "image_ids.txt.part").write_text("half")
    assert run(tmp_path, boxes) == 0
    assert bytes_of(tmp_path / "out") | {"image_ids.txt.part": b""} == whole | {"image_ids.txt.part": b""}


def test_the_command_needs_no_torch(tmp_path):
    """It would take more memory than the rows of all of Open Images."""
    boxes = write(tmp_path / "train.csv", [row()])
    script = "import sys; from data_prep import build_openimage_mini as tool; tool.main(sys.argv[1:])"
    arguments = ["--boxes", boxes, "--classes", classes_file(tmp_path), "--out", tmp_path / "out"]
    arguments += ["--coco", coco_file(tmp_path), "--table", table_file(tmp_path)]
    command = [sys.executable, "-c", f"{script}; print('torch' in sys.modules)", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, check=True)
    assert done.stdout.strip().split("\n")[-1] == "False"

"""What there is to load: the same names, ids and labels from a folder, a list and a json, however they are written."""

import json
import os
import re

import numpy as np
import pytest

from geoaug import sample_id
from geoaug.loading.label_maps import MaskError, label_map_of, pack
from geoaug.loading.source import inside, open_source

NAMES = ["cats/a.jpg", "cats/b.png", "dogs/old/c.jpg", "d.jpg"]


def fill(root, names=NAMES):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def record_of(names, **more):
    images = [{"id": i, "file_name": name, "height": 30, "width": 40} for i, name in enumerate(names)]
    return {"images": images, "annotations": [], "categories": [], **more}


def write(path, record):
    path.write_text(json.dumps(record))
    return path


def box(*bbox, image=0, **more):
    return {"id": 5, "image_id": image, "category_id": 1, "bbox": list(bbox), **more}


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("child", ["", "images"])
def test_links_to_class_folders_change_neither_names_nor_ids(tmp_path, child):
    plain, linked, store = tmp_path / "plain", tmp_path / "linked", tmp_path / "store"
    fill(plain / child, NAMES[:3])
    fill(store, NAMES[:3])
    (linked / child).mkdir(parents=True)
    for name in ("cats", "dogs"):
        (linked / child / name).symlink_to(store / name)
    a, b = open_source(plain), open_source(linked)
    assert list(a.names) == list(b.names) == NAMES[:3]
    assert a.ids.tolist() == b.ids.tolist() == [sample_id(name) for name in NAMES[:3]]
    assert a.labels.tolist() == b.labels.tolist() == [0, 0, 1]
    assert a.root == plain / child
    assert b.root == linked / child
    assert a.problems == b.problems == {}


@pytest.mark.parametrize("child", ["", "images"])
def test_links_in_a_circle_give_every_image_once(tmp_path, child):
    root = fill(tmp_path / child)
    (root / "again").symlink_to(".")
    (root / "cats" / "up").symlink_to(root)
    (root / "a_second_name").symlink_to(root / "dogs")  # sorts before the folder itself, which keeps its name
    source = open_source(tmp_path)
    assert list(source.names) == sorted(NAMES)
    again = ["a_second_name", "again", "cats/up"]
    assert source.problems == {"folder already read under another name, ignored": again}


def test_links_that_lead_nowhere_do_not_stop_the_reading(tmp_path):
    fill(tmp_path)
    (tmp_path / "self").symlink_to("self")
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "gone.jpg").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.jpg")  # would be waited for
    source = open_source(tmp_path)
    assert list(source.names) == sorted([*NAMES, "gone.jpg"])  # fails by name when it is read
    assert source.problems == {
        "file that is no image, ignored": ["gone", "pipe.jpg"],
        "folder that cannot be read": ["self"],
    }


def test_folders_that_cannot_be_read_are_counted(tmp_path, monkeypatch):
    fill(tmp_path)
    scandir = os.scandir

    def closed(path):
        if os.path.basename(os.path.normpath(path)) in ("dogs", "only"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    source = open_source(tmp_path)
    assert list(source.names) == ["cats/a.jpg", "cats/b.png", "d.jpg"]
    assert source.problems == {"folder that cannot be read": ["dogs"]}
    (tmp_path / "only").mkdir()
    with pytest.raises(
        ValueError, match=r"must hold images \(.*\), got none in .*only, where 1 folders cannot be read"
    ):
        open_source(tmp_path / "only")


@pytest.mark.parametrize(
    ("beside", "named"),
    [("other/y.jpg", "other/y.jpg"), ("z.jpg", "z.jpg"), ("semantic/0.png", "semantic/0.png")],
)
def test_images_outside_the_images_folder_are_never_left_out_silently(tmp_path, beside, named):
    fill(tmp_path, ["images/x.jpg", beside])
    with pytest.raises(ValueError, match=rf"images/x\.jpg and {named}: name the one meant, such as .*/images,") as told:
        open_source(tmp_path)
    assert "\n" not in str(told.value)
    assert list(open_source(tmp_path / "images").names) == ["x.jpg"]


def test_what_is_no_image_may_lie_beside_the_images_folder(tmp_path):
    fill(tmp_path, ["images/cats/x.jpg", "images/notes.md", "instances.json", "meta/README.txt", "index.csv"])
    (tmp_path / "train").symlink_to("images")  # another name for the same place
    source = open_source(tmp_path)
    assert source.root == tmp_path / "images"
    assert list(source.names) == ["cats/x.jpg"]
    assert source.problems == {"file that is no image, ignored": ["notes.md"]}


def test_an_images_folder_without_images_is_not_the_root(tmp_path):
    fill(tmp_path, ["images/notes.md", "cats/x.jpg"])
    source = open_source(tmp_path)
    assert (source.root, list(source.names)) == (tmp_path, ["cats/x.jpg"])
    assert source.problems == {"file that is no image, ignored": ["images/notes.md"]}


# --- lists -----------------------------------------------------------------------------------------------------------


def test_a_folder_a_list_and_a_json_give_the_same_labels(tmp_path):
    fill(tmp_path / "images")
    (tmp_path / "list.txt").write_text("\n".join(["./d.jpg", *sorted(NAMES)[:2], sorted(NAMES)[3]]))
    json_ = write(tmp_path / "instances.json", record_of(NAMES))
    sources = [
        open_source(tmp_path),
        open_source(tmp_path / "list.txt", tmp_path / "images"),
        open_source(json_),
    ]
    for source in sources:
        assert source.classes == ("cats", "dogs")
        assert dict(zip(source.names, source.labels.tolist(), strict=True)) == dict(
            zip(NAMES, [0, 0, 1, -1], strict=True)
        )
        assert sorted(source.ids) == sorted(sources[0].ids)


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path):
    fill(tmp_path / "images")
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(NAMES).encode())
    (tmp_path / "instances.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(record_of(NAMES)).encode())
    assert list(open_source(tmp_path / "list.txt", tmp_path / "images").names) == NAMES
    assert list(open_source(tmp_path / "instances.json").names) == NAMES


def test_absolute_lines_are_under_the_root_however_it_is_written(tmp_path, monkeypatch):
    real = fill(tmp_path / "real")
    (tmp_path / "link").symlink_to(real)
    (tmp_path / "list.txt").write_text("\n".join(str(real / name) for name in NAMES))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for root in ("../real", "../link", tmp_path / "link", "../here/../real/"):
        assert list(open_source(tmp_path / "list.txt", root).names) == NAMES
    (tmp_path / "list.txt").write_text(str(tmp_path / "link" / "d.jpg"))
    assert list(open_source(tmp_path / "list.txt", "../link").names) == ["d.jpg"]


@pytest.mark.parametrize("name", ["../a.jpg", "a/../../b.jpg", "/etc/passwd", "{root}x/a.jpg", "", " ", ".", "a\0.jpg"])
def test_names_that_lead_out_of_the_root_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="list: names must lie under"):
        inside(tmp_path, name.format(root=tmp_path), "list")
    assert inside(tmp_path, "a/./b/../..c.jpg", "list") == "a/..c.jpg"


@pytest.mark.parametrize(
    ("name", "data"), [("a.jpg", b"\xff\xd8\xff\xe0"), ("a.bin", b"\0\1\2"), ("a.txt", b"\xff\xfea\0")]
)
def test_a_file_of_another_kind_is_told_what_is_taken(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    kinds = r"a folder, a list of paths \(.txt, UTF-8\) or a COCO .json, got .*: not text"
    with pytest.raises(ValueError, match=f"open_loader: path must be {kinds}"):
        open_source(tmp_path / name)


# --- jsons -----------------------------------------------------------------------------------------------------------

WITHOUT = [
    ("images", "width"),
    ("images", "height"),
    ("images", "file_name"),
    ("images", "id"),
    ("annotations", "image_id"),
    ("categories", "id"),
    ("categories", "name"),
]


def complete():
    second = {**box(3, 4, 5, 6, image=1), "id": 6}
    categories = [{"id": 1, "name": "one"}, {"id": 2, "name": "two"}]
    return record_of(NAMES, annotations=[box(1, 2, 3, 4), second], categories=categories)


@pytest.mark.parametrize(("kind", "key"), WITHOUT)
def test_what_a_json_lacks_is_told_by_place(tmp_path, kind, key):
    record = complete()
    del record[kind][1][key]
    fill(tmp_path / "images")
    where = re.escape(f"open_loader: path must be a COCO json, got {tmp_path / 'a.json'}: {kind}[1] has no '{key}'")
    with pytest.raises(ValueError, match=where):
        open_source(write(tmp_path / "a.json", record))


@pytest.mark.parametrize(
    ("kind", "key", "value", "message"),
    [
        ("images", None, 7, r"images\[1\] must be an object"),
        ("annotations", None, None, r"annotations\[1\] must be an object"),
        ("images", "width", None, r"images\[1\] must have a whole number of pixels as 'width', got None"),
        ("images", "height", 0, r"images\[1\] must have a whole number of pixels as 'height', got 0"),
        ("images", "height", "30", r"images\[1\] must have a whole number of pixels as 'height', got 30"),
        ("images", "file_name", 3, r"images\[1\] must have text as 'file_name', got 3"),
        ("images", "id", [1], r"images\[1\] must have a number or text as 'id', got \[1\]"),
        ("images", "id", 0, r"images\[1\] has the 'id' of images\[0\], 0"),
        ("annotations", "image_id", {}, r"annotations\[1\] must have a number or text as 'image_id', got {}"),
        ("categories", "id", 1, r"categories\[1\] has the 'id' of categories\[0\], 1"),
        ("categories", "id", "dog", r"categories must have numbers as 'id'"),
    ],
)
def test_what_a_json_has_wrong_is_told_by_place(tmp_path, kind, key, value, message):
    record = complete()
    if key is None:
        record[kind][1] = value
    else:
        record[kind][1][key] = value
    fill(tmp_path / "images")
    with pytest.raises(ValueError, match=f"open_loader: path must be a COCO json, got .*a.json: {message}"):
        open_source(write(tmp_path / "a.json", record))


@pytest.mark.parametrize("text", ["[" * 200_000, "{", '{"images": [{}], "annotations": {"a": 1}}'])
def test_what_is_no_coco_json_is_told(tmp_path, text):
    (tmp_path / "images").mkdir()
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match="open_loader: path must be a COCO json, got"):
        open_source(tmp_path / "a.json")


@pytest.mark.parametrize("change", [{"annotations": None, "categories": None}, None])
def test_a_json_of_images_alone(tmp_path, change):
    record = {"images": record_of(NAMES)["images"]} if change is None else record_of(NAMES, **change)
    fill(tmp_path / "images")
    source = open_source(write(tmp_path / "a.json", record))
    assert source.objects.boxes.shape == (0, 4)
    assert source.objects.offsets.tolist() == [0, 0, 0, 0, 0]
    assert source.objects.sizes.tolist() == [[30, 40]] * 4
    assert source.problems == {}


UNUSABLE = [None, [], [1, 2, 3], [1, 2, 3, "4"], [1, 2, 3, None], {"x": 1}, "1234", [[1], 2, 3, 4], [1, 2, 3, 10**400]]


@pytest.mark.parametrize("bbox", [*UNUSABLE, [1, 2, 3, float("nan")], [1, 2, float("inf"), 4], "left out"])
def test_a_box_that_is_not_four_numbers_is_dropped_and_counted(tmp_path, bbox):
    record = complete()
    record["annotations"] += [{**box(image=1), "id": 77, "bbox": bbox}, box(image=1, iscrowd=1)]
    if bbox == "left out":
        del record["annotations"][2]["bbox"]
    fill(tmp_path / "images")
    source = open_source(write(tmp_path / "a.json", record))
    assert source.objects.offsets.tolist() == [0, 1, 2, 2, 2]
    assert source.problems == {"box that is not four numbers, dropped": ["cats/b.png box 77"]}


def objects_one_by_one(record):
    """As `objects_of`, the slow and obvious way."""
    categories = sorted(record["categories"], key=lambda c: c["id"])
    boxes, labels, counts = [], [], []
    for image in record["images"]:
        count, (h, w) = len(boxes), (image["height"], image["width"])
        for entry in record["annotations"]:
            if entry["image_id"] != image["id"] or entry.get("iscrowd"):
                continue
            x, y, bw, bh = entry["bbox"]
            corners = [min(max(v, 0), side) for v, side in zip((x, y, x + bw, y + bh), (w, h, w, h), strict=True)]
            if corners[2] > corners[0] and corners[3] > corners[1]:
                boxes.append([v / side for v, side in zip(corners, (w, h, w, h), strict=True)])
                labels.append([c["id"] for c in categories].index(entry["category_id"]))
        counts.append(len(boxes) - count)
    return np.array(boxes, dtype=np.float32), labels, counts


def test_objects_are_those_of_a_loop_over_all(tmp_path):
    g = np.random.default_rng(0)
    names = [f"{i}.jpg" for i in range(9)]
    record = record_of(names, categories=[{"id": i, "name": f"n{i}"} for i in (7, 3, 11)])
    for i, image in enumerate(record["images"]):
        image["id"], image["width"] = 900 - i, 33 + i
    for i in range(200):
        x, y, w, h = g.uniform((-9, -9, -3, -3), (45, 35, 30, 30)).round(2).tolist()
        where = {"image_id": int(900 - g.integers(0, 9)), "category_id": int(g.choice([7, 3, 11]))}
        record["annotations"].append({"id": i, **where, "bbox": [x, y, w, h], "iscrowd": int(g.random() < 0.1)})
    fill(tmp_path / "images", names)
    source = open_source(write(tmp_path / "a.json", record))
    boxes, labels, counts = objects_one_by_one(record)
    assert len(boxes) > 80
    assert np.array_equal(source.objects.boxes, boxes)
    assert source.objects.labels.tolist() == labels
    assert np.diff(source.objects.offsets).tolist() == counts
    assert source.objects.categories == ("n3", "n7", "n11")
    assert {kind.split(",")[0] for kind in source.problems} == {"box without area", "box beyond its image"}


def test_boxes_of_an_unknown_image_or_category_are_counted(tmp_path):
    record = complete()
    record["annotations"] += [box(1, 2, 3, 4, image=99), box(1, 2, 3, 4, category_id=99)]
    del record["annotations"][2]["id"]
    fill(tmp_path / "images")
    source = open_source(write(tmp_path / "a.json", record))
    assert source.objects.labels.tolist() == [0, -1, 0]
    assert source.problems == {
        "box of an image that the json does not list, dropped": ["None"],
        "box of a category that the json does not list, label -1": ["cats/a.jpg box 5"],
    }


def test_a_box_thinner_than_its_coordinates_can_say_has_no_area(tmp_path):
    record = record_of(NAMES, annotations=[box(20, 3, 1e-7, 4)])
    fill(tmp_path / "images")
    source = open_source(write(tmp_path / "a.json", record))
    assert len(source.objects.boxes) == 0
    assert "box without area, dropped" in source.problems


# --- masks -----------------------------------------------------------------------------------------------------------

SQUARE = [10, 5, 30, 5, 30, 25, 10, 25]  # x 10 to 30, y 5 to 25 of 40 x 30


def drawn(*segmentations, size=(30, 40)):
    labels = np.arange(len(segmentations))
    return label_map_of([pack(s) for s in segmentations], labels, size, (30, 40))


def square():
    mask = np.full((30, 40), -1)
    mask[5:25, 10:30] = 0
    return mask


def runs_of(mask):
    flat = mask.T.ravel()
    edges = np.flatnonzero(np.diff(np.concatenate(([0], flat)))).tolist()
    return np.diff([0, *edges, flat.size]).tolist()


def test_masks_are_kept_where_they_are_asked_for_alone(tmp_path):
    record = complete()
    record["annotations"][1]["segmentation"] = [SQUARE]
    record["annotations"] += [box(1, 2, 3, 4, image=1, segmentation=[]), box(1, 1, 1, 1, iscrowd=1, segmentation=[[1]])]
    fill(tmp_path / "images")
    file = write(tmp_path / "a.json", record)
    assert open_source(file).objects.masks == []
    objects = open_source(file, masks=True).objects
    assert objects.masks == [b"", pack([SQUARE]), b""]
    own = slice(objects.offsets[1], objects.offsets[2])
    made = label_map_of(objects.masks[own], np.array([0, 1]), (30, 40), (30, 40))
    assert np.array_equal(made, square())


def test_a_packed_mask_is_exact_and_small():
    g = np.random.default_rng(0)
    polygon = g.uniform(0, 640, 60).tolist()
    assert len(pack([polygon])) < 10 * len(polygon) + 40
    assert np.array_equal(drawn({"counts": runs_of(square() == 0), "size": [30, 40]}), square())


def test_polygons_too_short_to_be_one_are_ignored_beside_others():
    pytest.importorskip("pycocotools")
    for polygons in ([SQUARE, [1, 2]], [[], SQUARE], [[1, 2, 3, 4], SQUARE]):
        assert np.array_equal(drawn(polygons), square())


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (70, 3), (300, 211)])
def test_run_lengths_are_read_as_pycocotools_reads_them(shape, share):
    coco = pytest.importorskip("pycocotools.mask")
    g = np.random.default_rng(0)
    blocks = np.kron(g.random((-(-shape[0] // 9), -(-shape[1] // 9))) < share, np.ones((9, 9), bool))
    for mask in (g.random(shape) < share, blocks[: shape[0], : shape[1]]):
        text = coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
        for counts in (text, runs_of(mask)):
            packed = pack({"counts": counts, "size": list(shape)})
            made = label_map_of([packed], np.array([0]), shape, shape)
            assert np.array_equal(made == 0, mask)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([[]], "no polygon of three corners"),
        ([[1, 2]], "no polygon of three corners"),
        ([[1, 2, 3, 4]], "no polygon of three corners"),
        (SQUARE, "no lists of numbers"),
        ([SQUARE, 3], "no lists of numbers"),
        ([[1, 2, 3, 4, 5, None]], "polygons that are no numbers"),
        ([[1, 2, 3, 4, 5, [6]]], "polygons that are no numbers"),
        ([[1, 2, 3, 4, 5, "x"]], "polygons that are no numbers"),
        ([[1, 2, 3, 4, 5, 10**400]], "polygons that are no numbers"),
        ([[1, 2, 3, 4, 5, float("inf")]], "polygons that are no numbers"),
        ([[1, 2, 3, 4, 5, 1e9]], "leave their image by more than 10 times"),
        (7, "neither polygons nor run lengths"),
        ({"size": [30, 40]}, "neither polygons nor run lengths"),
        ({"counts": [1200]}, r"is of \[30, 40\] by its image, of None by itself"),
        ({"counts": [1200], "size": [40, 30]}, r"is of \[30, 40\] by its image, of \[40, 30\] by itself"),
        ({"counts": [], "size": [30, 40]}, "do not add up"),
        ({"counts": [600, 601], "size": [30, 40]}, "do not add up"),
        ({"counts": [1201, -1], "size": [30, 40]}, "do not add up"),
        ({"counts": [599.5, 600.5], "size": [30, 40]}, "do not add up"),
        ({"counts": [1e300, 1e300], "size": [30, 40]}, "do not add up"),
        ({"counts": ["a"], "size": [30, 40]}, "run lengths that are no numbers"),
        ({"counts": None, "size": [30, 40]}, "run lengths that are no numbers"),
        ({"counts": "", "size": [30, 40]}, "no text of COCO's"),
        ({"counts": "garbage!", "size": [30, 40]}, "no text of COCO's"),
        ({"counts": "\ud800", "size": [30, 40]}, "no text of COCO's"),
        ({"counts": "o" * 40 + "0", "size": [30, 40]}, "no text of COCO's"),
        ({"counts": "12P", "size": [30, 40]}, "no text of COCO's"),  # cut in the middle of a number
        ({"counts": "1234", "size": [30, 40]}, "do not add up"),
    ],
)
def test_a_segmentation_that_is_no_mask_of_its_image_is_an_error_of_its_own(segmentation, message):
    pytest.importorskip("pycocotools")
    with pytest.raises(MaskError, match=message):
        drawn(segmentation)


def test_any_text_of_run_lengths_is_read_or_refused():
    g = np.random.default_rng(0)
    for _ in range(2000):
        text = bytes(g.integers(48, 112, g.integers(1, 30)).astype(np.uint8)).decode()
        try:
            drawn({"counts": text, "size": [30, 40]})
        except MaskError:
            continue

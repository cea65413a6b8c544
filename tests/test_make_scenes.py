import itertools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import make_scenes, scene_layout, scene_paint
from data_prep.scene_layout import CLASSES, NAMES, SceneSpec, make_scene

COUNT, SIZE = 20, 96


def _arguments(out: Path, *more: str) -> list[str]:
    return ["--out", str(out), "--images", str(COUNT), "--size", str(SIZE), "--seed", "5", *more]


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scenes") / "one"
    assert make_scenes.main(_arguments(out, "--workers", "1")) == 0
    return out


@pytest.fixture(scope="module")
def coco(made: Path) -> dict:
    return json.loads((made / "instances.json").read_text())


def test_two_workers_and_the_command_line_write_the_same_bytes(made: Path, tmp_path: Path) -> None:
    command = [sys.executable, make_scenes.__file__, *_arguments(tmp_path / "two", "--workers", "2")]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    assert len(run.stdout.splitlines()) == 1
    assert run.stdout.endswith("0 failures\n")
    assert _bytes(tmp_path / "two") == _bytes(made)


def test_seed_and_index_change_the_scene_and_the_number_of_images_does_not() -> None:
    scenes = [make_scene(i, SceneSpec(seed, SIZE)).image.tobytes() for seed in (0, 1) for i in (0, 1)]
    assert len(set(scenes)) == 4
    assert make_scene(1, SceneSpec(1, SIZE)).image.tobytes() == scenes[3]


def test_files_and_json_agree(made: Path, coco: dict) -> None:
    assert sorted(image["file_name"] for image in coco["images"]) == sorted(f.name for f in (made / "images").iterdir())
    sizes = set()
    for image in coco["images"]:
        with Image.open(made / "images" / image["file_name"]) as picture:
            assert np.asarray(picture).shape == (image["height"], image["width"], 3)
        assert max(image["height"], image["width"]) == SIZE
        assert min(image["height"], image["width"]) >= round(0.75 * SIZE)
        sizes.add((image["height"], image["width"]))
    assert len(sizes) > COUNT // 2
    assert [category["name"] for category in coco["categories"]] == list(NAMES)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools under NumPy 2
def test_masks_decode_to_the_boxes_and_areas(made: Path, coco: dict) -> None:
    tools = pytest.importorskip("pycocotools.coco")
    index = tools.COCO(str(made / "instances.json"))
    assert sorted(index.getImgIds()) == list(range(COUNT))
    assert [entry["id"] for entry in coco["annotations"]] == list(range(1, len(coco["annotations"]) + 1))
    for image in coco["images"]:
        entries = index.loadAnns(index.getAnnIds(imgIds=image["id"]))
        assert scene_layout.MIN_OBJECTS <= len(entries) <= scene_layout.MAX_OBJECTS
        covered = np.zeros((image["height"], image["width"]), int)
        for entry in entries:
            mask = index.annToMask(entry)
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            x, y, w, h = entry["bbox"]
            assert (x, y, x + w, y + h) == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            assert 0 <= x < x + w <= image["width"]
            assert 0 <= y < y + h <= image["height"]
            assert entry["area"] == mask.sum() > 0
            assert entry["iscrowd"] == 0
            assert entry["category_id"] in range(1, len(NAMES) + 1)
            covered += mask
        assert covered.max() == 1  # a pixel is of one object: the masks are of what is visible


def test_the_mask_says_who_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Objects painted in a plain colour that spells their label, without shade: label map and picture must agree."""
    paint = scene_paint.paint_object

    def plain(image, labels, label, distances, x0, y0, pose, surface, colors, light, shadow, table):
        if label == 1:
            image[:] = 0  # the background and the clutter end here
        code = np.array([200.0 * (label >> bit & 1) for bit in range(3)])
        light, shadow = np.array([0.0, 0.0, 1.0, 1.0]), np.zeros(2)
        paint(image, labels, label, distances, x0, y0, pose, surface, np.stack([code, code]), light, shadow, table)

    monkeypatch.setattr(scene_paint, "paint_object", plain)
    overlaps = 0
    for i in range(40):
        scene = make_scene(i, SceneSpec(0, 320))
        if len(scene.classes) > 7:  # three bits
            continue
        labels = scene.labels
        inner = np.zeros(labels.shape, bool)  # borders are mixtures of two colours
        windows = np.lib.stride_tricks.sliding_window_view(labels, (3, 3))
        inner[1:-1, 1:-1] = windows.min((2, 3)) == windows.max((2, 3))
        wrong = inner & ((scene.image > 60) @ (1, 2, 4) != labels)
        assert np.count_nonzero(wrong) <= 5  # a star's tip is thinner than a pixel
        pairs = set(zip(labels[:, 1:].ravel().tolist(), labels[:, :-1].ravel().tolist(), strict=True))
        overlaps += sum(0 < a < b for a, b in pairs)
    assert overlaps > 5  # objects do hide each other


def test_neither_silhouette_nor_texture_nor_bias_tells_the_class() -> None:
    parts = [name.split("_") for name in NAMES]
    assert len(NAMES) >= 12
    for part in (0, 1):
        assert set(Counter(p[part] for p in parts).values()) == {2}
        twins = [c for c in itertools.combinations(range(len(NAMES)), 2) if parts[c[0]][part] == parts[c[1]][part]]
        assert all(CLASSES[NAMES[i]][0] != CLASSES[NAMES[j]][0] for i, j in twins)
    assert len(set(CLASSES.values())) == len(NAMES)  # each context holds each place once


def _statistics(spec: SceneSpec, count: int = 150) -> tuple[float, float, float]:
    """Share of pairs of one context; how much lower `low` lies than `high`; how far left of the middle `left`."""
    pairs: list[bool] = []
    places: dict[str, list[tuple[float, float]]] = {place: [] for _, place in CLASSES.values()}
    for i in range(count):
        scene = make_scene(i, spec)
        height, width = scene.labels.shape
        groups = [CLASSES[NAMES[c]] for c in scene.classes]
        pairs += [a[0] == b[0] for a, b in itertools.combinations(groups, 2)]
        for label, (_, place) in enumerate(groups, 1):
            y, x = np.nonzero(scene.labels == label)
            places[place].append((x.mean() / width, y.mean() / height))
    x, y = ({place: np.mean([p[axis] for p in points]) for place, points in places.items()} for axis in (0, 1))
    return float(np.mean(pairs)), float(y["low"] - y["high"]), float(0.5 - x["left"])


@pytest.mark.parametrize("cooccurrence", [True, False])
@pytest.mark.parametrize("prior", [True, False])
def test_each_bias_is_there_when_on_and_gone_when_off(cooccurrence: bool, prior: bool) -> None:
    together, drop, left = _statistics(SceneSpec(0, SIZE, cooccurrence, prior))
    assert 0.6 < together < 0.85 if cooccurrence else abs(together - 0.25) < 0.05
    assert drop > 0.35 if prior else abs(drop) < 0.1
    assert left > 0.15 if prior else abs(left) < 0.1


def test_running_again_does_nothing(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {file: file.stat().st_mtime_ns for file in made.rglob("*")}
    assert make_scenes.main(_arguments(made)) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in made.rglob("*")} == before


def test_a_broken_off_run_is_completed(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "again"
    out.mkdir()
    (out / "manifest.json").write_bytes((made / "manifest.json").read_bytes())
    assert make_scenes.main(_arguments(out, "--workers", "1")) == 0
    (out / "images" / "000003.jpg").unlink()
    assert make_scenes.main(_arguments(out, "--workers", "1")) == 0
    assert _bytes(out) == _bytes(made)


def test_other_arguments_need_overwrite_which_deletes_only_our_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--out", str(tmp_path), "--size", "96", "--workers", "1", "--images"]
    assert make_scenes.main([*small, "4"]) == 0
    (tmp_path / "images" / "mine.jpg").write_bytes(b"x")
    with pytest.raises(SystemExit) as stop:
        make_scenes.main([*small, "2"])
    assert stop.value.code == 2
    assert "--overwrite" in capsys.readouterr().err
    assert len(list((tmp_path / "images").iterdir())) == 5
    assert make_scenes.main([*small, "2", "--overwrite"]) == 0
    assert sorted(f.name for f in (tmp_path / "images").iterdir()) == ["000000.jpg", "000001.jpg", "mine.jpg"]


def test_a_folder_of_someone_else_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"a store": 1}')
    with pytest.raises(SystemExit) as stop:
        make_scenes.main(_arguments(tmp_path, "--overwrite"))
    assert stop.value.code == 2
    assert _bytes(tmp_path) == {"manifest.json": b'{"a store": 1}'}


@pytest.mark.parametrize(
    "wrong",
    [
        ["--images", "0"],
        ["--size", "20"],
        ["--seed", "-1"],
        ["--workers", "none"],
        ["--colour", "red"],
        ["--quality", "7"],
    ],
)
def test_wrong_usage_exits_with_2_and_names_the_flag(
    wrong: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        make_scenes.main(["--out", str(tmp_path / "x"), *wrong])
    assert stop.value.code == 2
    assert wrong[0] in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_an_unwritable_place_exits_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert make_scenes.main(["--out", str(tmp_path / "file" / "x"), "--images", "1"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    with pytest.raises(SystemExit) as stop:
        make_scenes.main(["--out", str(tmp_path / "file"), "--images", "1"])
    assert stop.value.code == 2


def test_a_failed_image_is_counted_and_leaves_no_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--out", str(tmp_path), "--images", "3", "--size", "96", "--workers", "1"]
    assert make_scenes.main(arguments) == 0
    (tmp_path / "images" / "000001.jpg").unlink()
    (tmp_path / "images" / "000001.jpg").mkdir()
    (tmp_path / "instances.json").unlink()
    capsys.readouterr()
    assert make_scenes.main(arguments) == 1
    assert "2 images" in (line := capsys.readouterr().out)
    assert "1 failed" in line
    assert not (tmp_path / "instances.json").exists()
    assert not list((tmp_path / "images").glob("*.part"))


def _named_by_colour(spec: SceneSpec) -> tuple[float, np.ndarray]:
    """Share of objects named by the nearest class mean of their mean colour, over other images; objects a class."""
    colors, classes = [], []
    for i in range(150):
        scene = make_scene(i, spec)
        colors += [scene.image[scene.labels == label].mean(0) for label in range(1, len(scene.classes) + 1)]
        classes += scene.classes
    points, labels = np.stack(colors), np.array(classes)
    half = len(labels) // 2
    means = np.stack([points[:half][labels[:half] == c].mean(0) for c in range(len(NAMES))])
    guess = np.linalg.norm(points[half:, None] - means, axis=2).argmin(1)
    return (guess == labels[half:]).mean(), np.bincount(labels, minlength=len(NAMES))


def test_colours_tell_nothing_of_the_class_and_classes_are_equally_frequent() -> None:
    share, counts = _named_by_colour(SceneSpec(1, SIZE))
    assert share < 0.12  # near one in sixteen
    assert counts.min() > 0.5 * counts.sum() / len(NAMES)


def test_usual_colours_tell_much_of_the_class_and_change_nothing_else() -> None:
    usual = SceneSpec(1, SIZE, usual_colors=True)
    share, _ = _named_by_colour(usual)
    assert 0.3 < share < 0.9
    assert make_scene(0, usual).classes[:1] == make_scene(0, SceneSpec(1, SIZE)).classes[:1]


def test_objects_are_as_large_as_asked_for():
    def largest(*radius: float) -> float:
        areas = [np.bincount(make_scene(i, SceneSpec(0, SIZE, True, True, 1, 1, *radius)).labels.ravel())[1:].max()
                 for i in range(40)]  # fmt: skip
        return float(np.median(areas))

    assert 2 < largest(0.2, 0.25) / largest(0.1, 0.125) < 5  # 4, less what image borders cut off


def test_the_number_of_objects_is_as_asked_for():
    spec = SceneSpec(0, SIZE, fewest=1, most=3)
    counts = {len(make_scene(i, spec).classes) for i in range(24)}
    assert counts == {1, 2, 3}


@pytest.mark.parametrize("wrong", [("--objects", "3", "2"), ("--radius", "0.2", "0.1"), ("--radius", "nan", "0.1")])
def test_more_at_least_than_at_most_is_refused(wrong, tmp_path, capsys):
    with pytest.raises(SystemExit) as refused:
        make_scenes.main(["--out", str(tmp_path / "scenes"), "--images", "1", *wrong])
    assert refused.value.code == 2
    assert wrong[0] in capsys.readouterr().err
    assert not (tmp_path / "scenes").exists()

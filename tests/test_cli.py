import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from geoaug import ProposalStore, inspection, plan_views, recipes, viz
from geoaug.cli import main

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("look")
    (root / "images").mkdir()
    g = np.random.default_rng(0)
    annotations = []
    for i in range(3):
        Image.fromarray(g.integers(0, 256, (60, 80 + i, 3), dtype=np.uint8)).save(root / "images" / f"{i}.jpg")
        annotations.append({"id": i, "image_id": i, "category_id": 1, "bbox": [10, 10, 30, 20], "iscrowd": 0})
    images = [{"id": i, "file_name": f"{i}.jpg", "height": 60, "width": 80 + i} for i in range(3)]
    record = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (root / "instances.json").write_text(json.dumps(record))
    return root


@pytest.mark.parametrize("preset", recipes.RECIPES)
def test_inspect_writes_a_page_and_a_sheet(folder, tmp_path, capsys, preset):
    arguments = ["inspect", str(folder / "instances.json"), "--out", str(tmp_path), "--preset", preset]
    assert main([*arguments, "--count", "2", "--size", "64"]) == 0
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith("inspect: wrote ")
    page = (tmp_path / "inspect.html").read_text()
    assert page.count("data:image/png;base64,") >= 6
    assert "src='http" not in page
    assert "0.jpg" in page
    assert "2.jpg" not in page
    assert np.asarray(Image.open(tmp_path / "inspect.png")).std() > 5


@pytest.mark.parametrize("preset", recipes.RECIPES)
def test_stats_touch_no_pixel(folder, capsys, preset):
    assert main(["stats", "--preset", preset, "--count", "300"]) == 0
    assert main(["stats", "--preset", preset, "--data", str(folder / "instances.json")]) == 0
    out = capsys.readouterr().out
    assert "pairs without overlap" in out
    assert "stats: 300 images planned, 0 failures" in out
    assert "sides of boxes, in cells of" in out


def test_stats_count_what_is_there():
    sizes = np.tile([480, 640], (500, 1))
    rows = dict(inspection.stats(recipes.recipe("lc_loss"), sizes))
    assert rows["pairs without overlap"] == "0.00%"  # the whole image holds every crop
    crops = plan_views(recipes.recipe("lc_loss").views, sizes, np.arange(500), seed=0, epoch=0).crop[:, 1].double()
    share = ((crops[:, 2] - crops[:, 0]) * (crops[:, 3] - crops[:, 1])).mean() / (480 * 640)
    cells = float(rows["cells of a 7 x 7 map that lie in the other view"].split()[1].rstrip(","))
    assert cells == pytest.approx(49 * float(share), rel=0.05)
    rows = dict(inspection.stats(recipes.recipe("scrl"), sizes))
    assert "images without matched boxes" in rows


def test_sizes_come_from_headers(folder):
    for path in (folder, folder / "instances.json"):
        assert inspection.sizes_of(path)[0].tolist() == [[60, 80], [60, 81], [60, 82]]


def test_doctor_names_what_is_there_and_what_is_missing(capsys, monkeypatch):
    monkeypatch.setattr("geoaug.cli._EXTRAS", (("no_such_package", "nothing", "pip install it"), ("torch", "all", "")))
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "no_such_package: nothing: missing. pip install it" in out
    assert "torch: all: there" in out
    assert "core: plans, renders and agrees with torchvision" in out


def test_doctor_fails_when_the_core_is_broken(capsys, monkeypatch):
    monkeypatch.setattr("geoaug.cli._self_test", lambda: "a rendered view differs from torchvision's")
    assert main(["doctor"]) == 1
    assert "BROKEN: a rendered view differs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["inspect", "nowhere"], 1, "geoaug inspect: open_loader: path must be a folder"),
        (["stats", "--count", "0"], 1, "--count must be at least 1, got 0"),
        (["inspect", ".", "--size", "0"], 1, "Recipe.at: size must be an integer in [1, 65536], got 0"),
    ],
)
def test_failures_are_one_line(capsys, arguments, code, message):
    assert main(arguments) == code
    err = capsys.readouterr().err.strip()
    assert message in err
    assert "\n" not in err


@pytest.mark.parametrize("arguments", [[], ["look"], ["stats", "--preset", "nothing"], ["inspect"]])
def test_wrong_usage_exits_with_2(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_recipes_at_another_size():
    small = recipes.recipe("d3ssl").at(112)
    assert [v.height_width for v in small.views] == [(112, 112), (112, 112), (56, 56)]
    assert recipes.recipe("densesiam_segmentation").at(64).views[0].resize == 64
    with pytest.raises(ValueError, match=r"recipe: name must be one of byol, .*, got .dino."):
        recipes.recipe("dino")


def test_only_copies_of_a_view_share_its_colours():
    for recipe in recipes.RECIPES.values():
        assert len(set(recipe.names)) == len(recipe.names) == len(recipe.views) == len(recipe.colors)
        for i, view in enumerate(recipe.views):
            same = [j for j in range(i) if recipe.draws[j] == recipe.draws[i]]
            assert same in ([], [view.view])
    assert recipes.recipe("d3ssl").draws == ("x1", "x2", "x2")


@pytest.fixture
def spoiled(folder, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"no image")
    (tmp_path / "b.jpg").write_bytes((folder / "images" / "0.jpg").read_bytes())
    return tmp_path


def test_an_unreadable_image_is_counted_and_the_next_one_shown(spoiled, capsys):
    out = spoiled.with_name(f"{spoiled.name}_out")
    assert main(["inspect", str(spoiled), "--out", str(out), "--size", "32"]) == 0
    assert capsys.readouterr().out.strip().endswith("scrl on 1 images, 1 failures (1 undecodable)")
    assert main(["stats", "--data", str(spoiled)]) == 0
    told = capsys.readouterr()
    assert told.out.strip().endswith("stats: 1 images planned, 1 failures (1 not an image)")
    assert told.err.strip() == "not an image: a.jpg"


def test_proposals_are_shown_and_counted(folder, tmp_path, capsys):
    box = np.array([[8, 6, 40, 36]], dtype=np.uint16)
    records = [(f"{i}.jpg", (60, 80 + i), box) for i in range(3)]
    ProposalStore.write(tmp_path / "store", records)
    options = ["--proposals", str(tmp_path / "store"), "--preset", "soco"]
    assert main(["inspect", str(folder), "--out", str(tmp_path), "--size", "32", *options]) == 0
    assert "boxes of the source, followed" in (tmp_path / "inspect.html").read_text()
    assert main(["stats", "--data", str(folder), *options]) == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines() if "sides of boxes" in line)
    middle = float(lines["v1: sides of boxes, in cells of 32 px"].split()[0])
    assert middle == pytest.approx((32 / 81 * 7 + 30 / 60 * 7) / 2, rel=0.2)


def test_a_store_is_shown_on_its_images(folder, tmp_path, capsys):
    box = np.array([[8, 6, 40, 36]], dtype=np.uint16)
    records = [("0.jpg", (60, 80), box), ("1.jpg", (60, 81), np.repeat(box, 41, 0)), ("2.jpg", (60, 82), box[:0])]
    about = {"preset": "d3ssl", "failures": {"empty": [["x.jpg", "no bytes"]]}}
    ProposalStore.write(tmp_path / "store", records, about=about)
    look = ["inspect", str(tmp_path / "store"), "--out", str(tmp_path / "out")]
    assert main([*look, "--images", str(folder)]) == 0
    assert capsys.readouterr().out.strip().endswith("inspect.png: boxes on 3 images, 0 failures")
    page = (tmp_path / "out" / "inspect.html").read_text()
    for text in ("preset: d3ssl", "1 failed: empty", "3 images, 1 of them without a box", "1 boxes of 80 x 60 pixels",
                 "41 boxes of 81 x 60 pixels, the first 40 drawn", "0 boxes of 82 x 60 pixels"):  # fmt: skip
        assert text in page
    sheet = np.asarray(Image.open(tmp_path / "out" / "inspect.png")).astype(int)
    times = -(-448 // 80)
    left, right = sheet[: 60 * times, : 80 * times], sheet[: 60 * times, 80 * times + 8 : 160 * times + 8]
    changed = np.argwhere((left != right).any(-1)) // times
    assert (changed.min(0).tolist(), changed.max(0).tolist()) == ([6, 8], [35, 39])
    assert main(look) == 1
    assert "is a store, which holds no images: say where they lie with --images" in capsys.readouterr().err
    other = ProposalStore.write(tmp_path / "other", [("y/0.jpg", (60, 80), box)])
    assert main(["inspect", str(other.path), "--images", str(folder), "--out", str(tmp_path)]) == 1
    assert "has no entry of any image of" in capsys.readouterr().err


def test_boxes_are_drawn_where_they_are():
    picture = torch.zeros(3, 40, 60, dtype=torch.uint8)
    drawn = viz.boxes(
        picture, torch.tensor([[0.5, 0.25, 1.0, 0.75], [0.0, 0.0, 0.2, 0.2]]), torch.tensor([True, False])
    )
    lit = drawn.sum(0) > 0
    rows, columns = lit.any(1).nonzero().flatten(), lit.any(0).nonzero().flatten()
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (10, 29, 30, 59)
    assert not picture.any()


def test_pictures_stand_beside_and_below():
    a, b = torch.zeros(3, 10, 20, dtype=torch.uint8), torch.zeros(3, 14, 6, dtype=torch.uint8)
    assert viz.beside([a, b], gap=2).shape == (3, 14, 28)
    assert viz.below([a, b], gap=2).shape == (3, 26, 20)
    assert (viz.beside([a, b], gap=2)[:, :, 20:22] == 255).all()


def test_cells_that_are_not_valid_are_dark():
    picture = torch.full((3, 40, 60), 200, dtype=torch.uint8)
    celled = viz.cells(picture, (2, 3), torch.tensor([True, False, True, True, True, True]))
    assert celled[0, 10, 10] == 200
    assert celled[0, 10, 30] == 70


EXAMPLES = {
    "two_views.py": (),
    "boxes_and_regions.py": (),
    "region_composites.py": (),
    "in_your_own_code.py": ("--steps", "1"),
    "train_tiny.py": ("--steps", "1"),
    "add_lc_loss.py": ("--epochs", "1"),
}


@pytest.mark.parametrize("script", EXAMPLES)
def test_examples_run_as_a_user_runs_them(tmp_path, script):
    options = EXAMPLES[script] or ("--out", str(tmp_path))
    command = [sys.executable, str(ROOT / "examples" / script), *options]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert run.returncode == 0, run.stderr
    assert "loss" in run.stdout or len(list(tmp_path.glob("*.png"))) == 1

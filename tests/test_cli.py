import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from geoaug import inspection, plan_views, recipes, viz
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
    assert main([*arguments, "--images", "2", "--size", "64"]) == 0
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith("inspect: wrote ")
    page = (tmp_path / "inspect.html").read_text()
    assert page.count("data:image/png;base64,") >= 6
    assert "src='http" not in page
    assert "0.jpg" in page
    assert "2.jpg" not in page
    assert np.asarray(Image.open(tmp_path / "inspect.png")).std() > 5


@pytest.mark.parametrize("preset", recipes.RECIPES)
def test_stats_touch_no_pixel(folder, capsys, preset):
    assert main(["stats", "--preset", preset, "--images", "300"]) == 0
    assert (
        main(["stats", "--preset", preset, "--data", str(folder / "instances.json"), "--photographs", str(folder)]) != 2
    )
    out = capsys.readouterr().out
    assert "pairs without overlap" in out
    assert "stats: 300 images planned" in out


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
    assert inspection.sizes_of(folder).tolist() == [[60, 80], [60, 81], [60, 82]]
    assert inspection.sizes_of(folder / "instances.json").tolist() == [[60, 80], [60, 81], [60, 82]]


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
        (["stats", "--images", "0"], 1, "--images must be at least 1, got 0"),
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


def test_two_views_of_a_recipe_never_share_a_fold():
    for recipe in recipes.RECIPES.values():
        assert len(set(recipe.names)) == len(recipe.names) == len(recipe.views) == len(recipe.colors)


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


@pytest.mark.parametrize("script", ["two_views.py", "boxes_and_regions.py", "in_your_own_code.py"])
def test_examples_run_as_a_user_runs_them(tmp_path, script):
    options = ["--steps", "1"] if script == "in_your_own_code.py" else ["--out", str(tmp_path)]
    command = [sys.executable, str(ROOT / "examples" / script), *options]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert run.returncode == 0, run.stderr
    assert "loss" in run.stdout or len(list(tmp_path.glob("*.png"))) == 1

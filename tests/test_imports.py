"""The arrows between packages, and what `import geoaug` may load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import geoaug

ROOT = Path(geoaug.__file__).resolve().parent
# What each package may import of the others; top-level modules (testing, viz, cli, recipes) may use all of them.
ALLOWED = {
    "geometry": {"geometry"},
    "pixels": {"geometry", "pixels"},
    "proposals": {"geometry", "proposals"},
    "loading": {"geometry", "pixels", "proposals", "loading"},
    "objectives": {"geometry", "objectives"},
}
EXTRAS = {
    "ffcv",
    "cv2",
    "pyarrow",
    "pycocotools",
    "accelerate",
    "dask",
    "distributed",
    "selectivesearch",
    "skimage",
    "matplotlib",
    "safetensors",
    "timm",
    "tyro",
    "tqdm",
    "kornia",
    "lightly",
}


def imported(file):
    """Absolute dotted names of all imports of a file of geoaug, and whether each stands at module level."""
    package = ("geoaug", *file.relative_to(ROOT).parent.parts)
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((name.name, node in tree.body) for name in node.names)
        if isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            stem = ".".join(part for part in (base, node.module) if part)
            yield from ((f"{stem}.{name.name}", node in tree.body) for name in node.names)


FILES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_arrows_point_one_way(file):
    parts = file.relative_to(ROOT).parts
    for name, at_top in imported(file):
        words = name.split(".")
        assert words[0] not in {"trainers", "data_prep", "examples", "benchmarks", "tests"}
        assert not (at_top and words[0] in EXTRAS), f"{name} must be imported where it is used"
        if len(parts) > 1 and words[0] == "geoaug" and words[1] in ALLOWED:
            assert words[1] in ALLOWED[parts[0]], f"{parts[0]} must not import {name}"


def test_the_reader_of_imports_sees_relative_ones():
    names = {name for name, _ in imported(ROOT / "geometry" / "pairs.py")}
    assert "geoaug.geometry.affine.AxisAffine" in names
    assert "torch" in names


def test_import_loads_no_extra():
    # What torch itself loads (tqdm, say) is not ours to answer for.
    script = "import sys, torch, torchvision; before = set(sys.modules)"
    script += f"; import geoaug; print(*((set(sys.modules) - before) & {EXTRAS!r}))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert run.stdout.split() == []


def test_every_public_name_is_there_and_typed():
    for name in geoaug.__all__:
        assert getattr(geoaug, name) is not None
    assert (ROOT / "py.typed").is_file()

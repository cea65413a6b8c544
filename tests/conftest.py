"""Tests are stricter than use: every annotated shape is checked, and values are checked on devices too."""

import os
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest

from . import checker  # noqa: F401  the hook below looks it up by name

os.environ["GEOAUG_CHECK"] = "1"

_ROOT = Path(__file__).resolve().parent.parent / "geoaug"


def _checked_modules() -> list[str]:
    """All modules but those of jitted kernels: a checker between `njit` and its function would stop numba."""
    modules = []
    for file in sorted(_ROOT.rglob("*.py")):
        if "njit" not in file.read_text():
            parts = ("geoaug", *file.relative_to(_ROOT).with_suffix("").parts)
            modules.append(".".join(part for part in parts if part != "__init__"))
    # A name covers its submodules, so packages that hold kernels are left out and their modules named one by one.
    kernels = [".".join(("geoaug", *f.relative_to(_ROOT).with_suffix("").parts)) for f in _ROOT.rglob("*.py")
               if "njit" in f.read_text()]  # fmt: skip
    return [name for name in modules if not any(kernel.startswith(name + ".") for kernel in kernels)]


jaxtyping.install_import_hook(_checked_modules(), "tests.checker.checked")


@pytest.fixture
def our_errors() -> Iterator[None]:
    """Switches the shape checker off, so that a test of bad input meets the library's own message."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real photographs, named by GEOAUG_DATA; skips where there is none."""
    folder = Path(os.environ.get("GEOAUG_DATA") or "no photographs")
    if not folder.is_dir():
        pytest.skip("no real photographs at hand (set GEOAUG_DATA)")
    return folder

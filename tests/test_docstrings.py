"""Every example in a docstring is run, and the README's too."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import geoaug

MODULES = sorted(m.name for m in pkgutil.walk_packages(geoaug.__path__, "geoaug."))
PUBLIC = {name: getattr(geoaug, name) for name in geoaug.__all__} | {"torch": torch}


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for test in doctest.DocTestFinder().find(module, extraglobs=PUBLIC | vars(module)):
        runner.run(test)
    assert runner.failures == 0


def test_examples_are_found():
    found = doctest.DocTestFinder().find(importlib.import_module("geoaug.geometry.pairs"))
    assert sum(len(test.examples) for test in found) >= 8


def test_the_readmes_fifteen_lines():
    readme = (Path(__file__).resolve().parent.parent / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len(code.strip().splitlines()) <= 17
    names: dict[str, object] = {}
    exec(code, names)
    assert [tuple(x.shape) for x in (names["x1"], names["x2_small"])] == [(3, 224, 224), (3, 112, 112)]
    assert names["valid"].shape == (2, 10)
    assert torch.allclose((~names["b"]).boxes(names["boxes_b"]), names["back"], atol=1e-5)


@pytest.mark.parametrize("name", MODULES)
def test_every_public_function_says_what_it_does(name):
    module = importlib.import_module(name)
    for key, value in vars(module).items():
        if not key.startswith("_") and callable(value) and getattr(value, "__module__", None) == name:
            assert value.__doc__, f"{name}.{key}"

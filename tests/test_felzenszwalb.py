"""Segmentation gives scikit-image's labels, ties by edge index included."""

import types
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from scipy import ndimage

from geoaug.proposals.blurring import blur, gaussian, to_planes
from geoaug.proposals.felzenszwalb import segment, sort_edges

segmentation = pytest.importorskip("skimage.segmentation")
Image = npt.NDArray[np.uint8]
PARAMETERS = [(300, 0.9, 100), (500, 0.8, 10), (100, 0.5, 1), (1, 0.8, 20), (300, 0.0, 0), (1000, 3.0, 50)]


def labels_of(image: Image, scale: float, sigma: float, min_size: int) -> npt.NDArray[np.int32]:
    height, width, _ = image.shape
    planes, labels = np.empty((3, height, width)), np.empty((height, width), np.int32)
    floats, whole = np.full(8 * labels.size, np.nan), np.full(15 * labels.size, -7, np.int32)
    to_planes(image, planes)
    blur(planes, gaussian(sigma), np.full((height, width), np.nan))
    costs, names = sort_edges(planes, floats, whole[: 8 * labels.size])
    assert len(costs) == 4 * labels.size - 3 * (height + width) + 2
    assert segment(costs, names, scale / 255.0, min_size, labels, whole[8 * labels.size :]) == labels.max() + 1
    return labels


def synthetic() -> dict[str, Image]:
    """Noise, ramps, flat and blocky pictures, and every kind of thin one."""
    rng = np.random.default_rng(5)
    images = {
        f"noise {h} x {w}": rng.integers(0, 256, (h, w, 3), dtype=np.uint8)
        for h, w in [(1, 1), (1, 2), (2, 1), (1, 9), (9, 1), (2, 2), (5, 7), (7, 5), (40, 61), (9, 240), (130, 3)]
    }
    images |= {f"flat {v}": np.full((31, 43, 3), v, np.uint8) for v in (0, 200, 255)}
    ramp = np.arange(120, dtype=np.uint8)
    images |= {f"ramp / {n}": np.tile((ramp // n)[None, :, None], (50, 1, 3)) for n in (1, 3)}
    images["two ramps"] = np.stack(np.broadcast_arrays(ramp[:60, None], ramp[None, :50], np.uint8(9)), axis=-1)
    images["black or white"] = rng.integers(0, 2, (47, 59, 3), dtype=np.uint8) * np.uint8(255)
    images["gray noise"] = np.repeat(rng.integers(0, 256, (47, 59, 1), dtype=np.uint8), 3, axis=2)
    images["checks"] = np.repeat((np.indices((41, 53)).sum(axis=0) % 2 * 255).astype(np.uint8)[..., None], 3, axis=2)
    for levels, cell in ((256, 6), (3, 5), (4, 9)):
        small = rng.integers(0, levels, (9, 11, 3)) * (255 // (levels - 1))
        images[f"blocks {levels} {cell}"] = np.kron(small, np.ones((cell, cell, 1))).astype(np.uint8)
    soft = ndimage.gaussian_filter(rng.random((70, 90, 3)), (6, 6, 0))
    images["clouds"] = ((soft - soft.min()) / np.ptp(soft) * 255).astype(np.uint8)
    images["nearly flat"] = np.full((40, 50, 3), 90, np.uint8) + (rng.random((40, 50, 3)) < 0.02)
    return {name: np.ascontiguousarray(image.astype(np.uint8)) for name, image in images.items()}


def photographs(data: Path, count: int, side: int) -> list[Image]:
    """Every so many of the photographs, shrunk to `side`."""
    import PIL.Image

    files = sorted(data.rglob("*.jpg"))
    images = []
    for file in files[:: max(1, len(files) // count)][:count]:
        with PIL.Image.open(file) as image:
            image = image.convert("RGB")
            image.thumbnail((side, side))
            images.append(np.asarray(image))
    return images


@pytest.fixture
def stable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes scikit-image take edges of one cost by index: it takes what order numpy's fastest sort gives."""
    # numpy's own argsort is left alone, since numba looks it up while it compiles.
    module, numpy = pytest.importorskip("skimage.segmentation._felzenszwalb_cy"), types.ModuleType("numpy")
    numpy.__dict__.update(vars(np), argsort=lambda costs: np.argsort(costs, kind="stable"))
    monkeypatch.setattr(module, "np", numpy)


@pytest.mark.parametrize("sigma", [0.3, 0.8, 0.9, 3.0, 20.0])
@pytest.mark.parametrize("size", [(1, 1), (2, 9), (23, 37)])
def test_blur_is_scipys_to_the_last_bit(sigma: float, size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).random((*size, 3))
    planes = image.transpose(2, 0, 1).copy()
    blur(planes, gaussian(sigma), np.empty(size))
    assert np.array_equal(planes.transpose(1, 2, 0), ndimage.gaussian_filter(image, (sigma, sigma, 0)))


@pytest.mark.usefixtures("stable")
@pytest.mark.parametrize("name", synthetic())
def test_labels_are_scikit_images(name: str) -> None:
    image = synthetic()[name]
    for scale, sigma, min_size in PARAMETERS:
        expected = segmentation.felzenszwalb(image, scale=scale, sigma=sigma, min_size=min_size)
        assert np.array_equal(labels_of(image, scale, sigma, min_size), expected), (scale, sigma, min_size)


def test_labels_of_photographs_are_scikit_images_as_it_is(data: Path) -> None:
    for image in photographs(data, 40, 160):
        for scale, sigma, min_size in PARAMETERS[:3]:
            expected = segmentation.felzenszwalb(image, scale=scale, sigma=sigma, min_size=min_size)
            assert np.array_equal(labels_of(image, scale, sigma, min_size), expected)


@pytest.mark.usefixtures("stable")
def test_labels_of_photographs_without_blur_are_full_of_ties(data: Path) -> None:
    for image in photographs(data, 20, 160):
        expected = segmentation.felzenszwalb(image, scale=300, sigma=0, min_size=30)
        assert np.array_equal(labels_of(image, 300, 0, 30), expected)


@pytest.mark.usefixtures("stable")
def test_costs_that_differ_in_their_last_bits_only_are_told_apart() -> None:
    # All costs of one bucket and nearly all of one finer key: what the radix sort leaves to the merge sort.
    rng = np.random.default_rng(1)
    planes = np.tile(np.arange(60) / 64.0, (1, 50, 1)) + rng.random((1, 50, 60)) * 1e-13
    labels = np.empty((50, 60), np.int32)
    costs, names = sort_edges(planes, np.empty(8 * 3000), np.empty(8 * 3000, np.int32))
    assert (np.diff(costs) >= 0).all()
    assert len(np.unique(names)) == len(names)
    regions = segment(costs, names, 0.05, 5, labels, np.empty(7 * 3000, np.int32))
    expected = segmentation.felzenszwalb(planes[0], scale=0.05 * 255, sigma=0, min_size=5)
    assert regions == expected.max() + 1
    assert np.array_equal(labels, expected)

"""Selective search: the package's rectangles in its order, the paper's strategies, and any image at all."""

import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from geoaug.geometry.rng import philox_numpy
from geoaug.proposals import colour_spaces, region_features, uijlings
from geoaug.proposals.selective_search import selective_search
from geoaug.proposals.shrinking import shrink, shrunk_size

from .test_felzenszwalb import photographs, stable, synthetic  # noqa: F401  stable is a fixture

Image = npt.NDArray[np.uint8]
PARAMETERS = [(300, 0.9, 100), (500, 0.8, 10), (100, 0.5, 5)]


def packages(image: Image, scale: float, sigma: float, min_size: int) -> npt.NDArray[np.int64]:
    """The boxes of the PyPI package, read from its regions here once more."""
    package = pytest.importorskip("selectivesearch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, regions = package.selective_search(image, scale, sigma, min_size)
    return np.array([(x, y, x + w + 1, y + h + 1) for x, y, w, h in (region["rect"] for region in regions)])


@pytest.mark.parametrize("name", synthetic())
def test_compat_gives_the_packages_rectangles(name: str) -> None:
    image = synthetic()[name]
    for scale, sigma, min_size in PARAMETERS:
        boxes = selective_search(image, scale=scale, sigma=sigma, min_size=min_size)
        assert boxes.dtype == np.uint16
        assert np.array_equal(boxes, packages(image, scale, sigma, min_size)), (scale, sigma, min_size)


def test_compat_gives_the_packages_rectangles_of_photographs(data: Path) -> None:
    images = photographs(data, 84, 110)
    for n, image in enumerate(images):
        scale, sigma, min_size = PARAMETERS[n % 3]
        boxes = selective_search(image, scale=scale, sigma=sigma, min_size=min_size)
        assert np.array_equal(boxes, packages(image, scale, sigma, min_size)), n
    assert len(images) + len(synthetic()) >= 100


@pytest.mark.parametrize("name", ["noise 40 x 61", "clouds", "checks", "blocks 3 5", "nearly flat", "flat 200"])
def test_soco_texture_is_the_package_with_its_histogram_repaired(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("selectivesearch.selectivesearch")

    def repaired(codes: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.concatenate([np.histogram(codes[:, c], 10, (0.0, 255.0))[0] for c in range(3)]) / len(codes)

    image = synthetic()[name]
    monkeypatch.setattr(module, "_calc_texture_hist", repaired)
    soco = [selective_search(image, scale=s, sigma=g, min_size=m, texture="soco") for s, g, m in PARAMETERS]
    for boxes, (scale, sigma, min_size) in zip(soco, PARAMETERS, strict=True):
        assert np.array_equal(boxes, packages(image, scale, sigma, min_size))


def test_soco_texture_is_not_the_packages() -> None:
    rng = np.random.default_rng(9)
    image = np.kron(rng.integers(60, 190, (9, 11, 3)), np.ones((7, 7, 1))) + rng.integers(-40, 40, (63, 77, 3))
    image = np.ascontiguousarray(image.astype(np.uint8))
    both = [selective_search(image, sigma=0.8, min_size=20, texture=texture) for texture in ("package", "soco")]
    assert len(both[0]) == len(both[1]) > 40
    assert not np.array_equal(*both)


def test_bins_are_numpys() -> None:
    values = np.arange(256)
    for bins in (25, 10):
        expected = [np.histogram([float(v)], bins, (0.0, 255.0))[0].argmax() for v in values]
        assert np.array_equal(np.minimum(values * bins // 255, bins - 1), expected)


@pytest.mark.parametrize("kind", ["noise", "few levels", "flat"])
def test_binary_patterns_are_scikit_images(kind: str) -> None:
    texture = pytest.importorskip("skimage.feature")
    rng = np.random.default_rng(2)
    levels = {"noise": 256, "few levels": 3, "flat": 1}[kind]
    image = (rng.integers(0, levels, (45, 61)) + 7 * (kind == "flat")).astype(np.uint8)
    plane, codes, ties = np.pad(image, 1), np.empty(61, np.uint8), np.empty(61, np.uint8)
    expected = texture.local_binary_pattern(image, 8, 1.0)
    tied = 0
    for y in range(45):
        region_features._patterns(plane, y, codes, ties)
        tied += int((ties > 0).sum())
        whole = [int(codes[x]) | region_features._decide(plane, y, x, ties[x]) for x in range(61)]
        assert np.array_equal(whole, expected[y]), y
    assert tied > 0


@pytest.mark.parametrize("soco", [False, True])
@pytest.mark.parametrize("levels", [3, 256])
def test_features_are_the_histograms_of_the_package(levels: int, soco: bool) -> None:
    texture = pytest.importorskip("skimage.feature")
    rng = np.random.default_rng(10)
    # Of few levels many diagonals are tied, and rounding puts some above their pixel and some below.
    image = rng.integers(0, levels, (135, 181, 3), dtype=np.uint8) * np.uint8(77 if levels == 3 else 1)
    labels = np.kron(rng.permutation(15).reshape(3, 5), np.ones((45, 37), int))[:, :181].astype(np.int32)
    codes = [texture.local_binary_pattern(image[..., c], 8, 1.0) for c in range(3)]
    bins, top = (10, 255.0) if soco else (10, 1.0)
    padded, kind = np.empty((3, 137, 183), np.uint8), region_features.SOCO if soco else region_features.PACKAGE
    boxes, sizes, features = np.empty((15, 4), np.int32), np.empty(15, np.int64), np.empty((15, 55 if soco else 31))
    region_features.pad(image, padded)
    region_features.measure(padded, labels, kind, boxes, sizes, features)
    for label in range(15):
        inside = labels == label
        value = np.histogram(image.max(axis=2)[inside].astype(float), 25, (0.0, 255.0))[0]
        patterns = [np.histogram(code[inside], bins, (0.0, top))[0] for code in codes]
        kept = patterns if soco else [counts[[0, 9]] for counts in patterns]
        assert sizes[label] == inside.sum()
        assert np.array_equal(features[label], np.concatenate([value, *kept]) / inside.sum())
        ys, xs = np.nonzero(inside)
        assert boxes[label].tolist() == [xs.min(), ys.min(), xs.max(), ys.max()]


# ---- strategies: the slow, obvious way -----------------------------------------------------------------------------


def reference_features(colours: Image, planes: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Bin numbers [2 C, H, W]: of colour (25 of each channel), then of texture (80 of each channel)."""
    count, height, width = colours.shape
    out = np.empty((2 * count, height, width), np.int64)
    for c in range(count):
        wide = np.pad(planes[c], 1, mode="edge")
        across, along = wide[1:-1, 2:] - wide[1:-1, :-2], wide[2:, 1:-1] - wide[:-2, 1:-1]
        octant = (across < 0) + 2 * (along < 0) + 4 * (abs(across) < abs(along))
        strength = np.minimum((20 * np.sqrt(np.maximum(abs(across), abs(along)))).astype(int), 9)
        out[c] = 25 * c + colours[c].astype(int) * 25 // 256
        out[count + c] = 25 * count + 80 * c + 10 * octant + strength
    return out


def reference_hierarchy(labels, bins, terms):  # type: ignore[no-untyped-def]
    """Boxes of all regions of one hierarchy, in order, by dictionaries and loops."""
    (height, width), channels = labels.shape, len(bins) // 2
    whole, ys, xs = 2**20, *np.indices(labels.shape)
    regions = []
    for label in range(labels.max() + 1):
        inside = labels == label
        histogram = np.bincount(bins[:, inside].ravel(), minlength=105 * channels)
        shares = [int(n) * whole // (channels * int(inside.sum())) for n in histogram]
        box = [xs[inside].min(), ys[inside].min(), xs[inside].max() + 1, ys[inside].max() + 1]
        regions.append((int(inside.sum()), shares, [int(v) for v in box]))

    def union(a, b):  # type: ignore[no-untyped-def]
        return [min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])]

    def similarity(i, j):  # type: ignore[no-untyped-def]
        (m, f, a), (n, g, b) = regions[i], regions[j]
        x0, y0, x1, y1 = union(a, b)
        common = [min(p, q) for p, q in zip(f, g, strict=True)]
        total = sum(common[: 25 * channels]) / whole if terms & 1 else 0.0
        total += sum(common[25 * channels :]) / whole if terms & 2 else 0.0
        total += 1.0 - (m + n) / labels.size if terms & 4 else 0.0
        return total + (1.0 - ((x1 - x0) * (y1 - y0) - m - n) / labels.size if terms & 8 else 0.0)

    pairs = {}
    for y in range(height):
        for x in range(width):
            for v, u in ((y, x + 1), (y + 1, x)):
                if v < height and u < width and labels[y, x] != labels[v, u]:
                    i, j = sorted((int(labels[y, x]), int(labels[v, u])))
                    pairs.setdefault((i, j), similarity(i, j))
    while pairs:
        i, j = sorted(pairs.items(), key=lambda item: item[1])[-1][0]
        (m, f, a), (n, g, b) = regions[i], regions[j]
        regions.append((m + n, [(p * m + q * n) // (m + n) for p, q in zip(f, g, strict=True)], union(a, b)))
        gone = [pair for pair in pairs if i in pair or j in pair]
        for pair in gone:
            del pairs[pair]
        for pair in gone:
            if pair != (i, j):
                other = pair[1] if pair[0] in (i, j) else pair[0]
                pairs[len(regions) - 1, other] = similarity(len(regions) - 1, other)
    return [box for _, _, box in regions]


def reference_strategies(image: Image, scale: float, sigma: float, min_size: int, strategies: str) -> list[list[int]]:
    felzenszwalb = pytest.importorskip("skimage.segmentation").felzenszwalb
    ndimage = pytest.importorskip("scipy.ndimage")
    spaces, steps, term_sets = uijlings.STRATEGIES[strategies]
    ranked: list[tuple[float, int, list[int]]] = []
    hierarchy = 0
    for space in spaces:
        colours = np.empty((colour_spaces.channels(space), *image.shape[:2]), np.uint8)
        colour_spaces.convert(image, space, colours)
        planes = colours * (1.0 / 255.0)
        bins = reference_features(colours, np.stack([ndimage.gaussian_filter(plane, sigma) for plane in planes]))
        for step in steps:
            labels = felzenszwalb(planes.transpose(1, 2, 0), scale=scale * step, sigma=sigma, min_size=min_size)
            for terms in term_sets:
                boxes = reference_hierarchy(labels, bins, terms)
                for place, box in enumerate(boxes):
                    rank = len(boxes) - place
                    word = int(philox_numpy([rank, hierarchy, 0, 0], [0, 0])[0])
                    ranked.append((np.sqrt(np.sqrt(rank)) * np.float32((word >> 8) * 2.0**-24), len(ranked), box))
                hierarchy += 1
    out: list[list[int]] = []
    for _, _, box in sorted(ranked):
        if box not in out:
            out.append(box)
    return out


@pytest.mark.usefixtures("stable")
@pytest.mark.parametrize(
    ("name", "strategies"),
    [("clouds", "fast"), ("noise 40 x 61", "fast"), ("noise 9 x 240", "single"), ("blocks 3 5", "quality"),
     ("noise 5 x 7", "fast")],
)  # fmt: skip
def test_strategies_are_the_slow_obvious_ones(name: str, strategies: str) -> None:
    height, width = (25, 35) if strategies == "quality" else (44, 55)  # 100 hierarchies are slow by hand
    image, min_size = np.ascontiguousarray(synthetic()[name][:height, -width:]), 20
    boxes = selective_search(image, sigma=0.8, min_size=min_size, mode="strategies", strategies=strategies)
    assert boxes.tolist() == reference_strategies(image, 300, 0.8, min_size, strategies)


def test_colours_are_those_of_the_textbook() -> None:
    colorsys = pytest.importorskip("colorsys")
    color = pytest.importorskip("skimage.color")
    image = np.random.default_rng(3).integers(0, 256, (30, 31, 3), dtype=np.uint8)
    image[0, :5] = [[0, 0, 0], [255, 255, 255], [7, 7, 7], [255, 0, 0], [1, 0, 0]]
    hsv, lab, share, gray = (np.empty((c, 30, 31), np.uint8) for c in (3, 3, 3, 1))
    for space, out in zip((0, 1, 2, 4), (hsv, lab, share, gray), strict=True):
        colour_spaces.convert(image, space, out)
    for y in range(30):
        for x in range(31):
            h, s, v = colorsys.rgb_to_hsv(*(image[y, x] / 255.0))
            assert abs(s * 255 - hsv[1, y, x]) <= 0.5001
            assert abs(v * 255 - hsv[2, y, x]) <= 0.5001
            assert abs((h * 180 - hsv[0, y, x] + 90) % 180 - 90) <= 0.5001
    expected = color.rgb2lab(image).transpose(2, 0, 1) * [[[2.55]], [[1]], [[1]]] + [[[0]], [[128]], [[128]]]
    assert np.abs(lab - expected).max() <= 3  # near black a step of the table is a step of the byte
    assert np.abs(lab - expected).mean() <= 0.35
    total = np.maximum(image.sum(axis=2), 1)
    assert np.abs(share[0] - 255 * (image[..., 0] / total)).max() <= 0.5001
    assert np.abs(share[2] - total / 3).max() <= 0.6
    assert np.abs(gray[0] - image @ np.array([0.299, 0.587, 0.114])).max() <= 0.5001


# ---- any image -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["compat", "strategies"])
@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (2, 2), (1, 65535), (65535, 1), (3, 3000), (1500, 1100)])
def test_every_size_gives_boxes_inside_the_image(size: tuple[int, int], mode: str) -> None:
    height, width = size
    for image in (np.zeros(size, np.uint8), np.random.default_rng(4).integers(0, 256, size, dtype=np.uint8)):
        boxes = selective_search(image, mode=mode).astype(int)
        assert len(boxes) >= 1
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, :2] < boxes[:, 2:]).all()
        assert (boxes[:, 2:] <= [width, height]).all()
    if mode == "strategies":
        assert [0, 0, width, height] in boxes.tolist()
        assert len(np.unique(boxes, axis=0)) == len(boxes)


def test_gray_is_three_equal_colours_and_a_view_is_read_as_it_looks() -> None:
    image = synthetic()["clouds"]
    gray = np.ascontiguousarray(image[:, :, 0])
    colour = np.repeat(gray[:, :, None], 3, axis=2)
    assert np.array_equal(selective_search(gray), selective_search(colour))
    turned = np.ascontiguousarray(image[::-1, ::2])
    before = image.copy()
    assert np.array_equal(selective_search(image[::-1, ::2]), selective_search(turned))
    assert np.array_equal(selective_search(torch.from_numpy(turned)), selective_search(turned))
    read_only = turned.copy()
    read_only.flags.writeable = False
    assert np.array_equal(selective_search(read_only), selective_search(turned))
    assert np.array_equal(image, before)


@pytest.mark.parametrize(("height", "width", "h", "w"), [(7, 5, 3, 5), (12, 9, 5, 4), (9, 9, 1, 1), (8, 6, 4, 3)])
def test_shrinking_takes_area_means(height: int, width: int, h: int, w: int) -> None:
    image = np.random.default_rng(6).integers(0, 256, (height, width, 3), dtype=np.uint8)
    out = np.empty((h, w, 3), np.uint8)
    shrink(image, out)
    for i in range(h):
        for j in range(w):
            total = [Fraction(0)] * 3
            for y in range(height):
                for x in range(width):
                    tall = min(Fraction(y + 1, height), Fraction(i + 1, h)) - max(Fraction(y, height), Fraction(i, h))
                    wide = min(Fraction(x + 1, width), Fraction(j + 1, w)) - max(Fraction(x, width), Fraction(j, w))
                    for c in range(3):
                        total[c] += max(tall, Fraction(0)) * max(wide, Fraction(0)) * int(image[y, x, c]) * h * w
            assert out[i, j].tolist() == [int(t + Fraction(1, 2)) for t in total]


@pytest.mark.parametrize("mode", ["compat", "strategies"])
def test_a_long_image_is_searched_shrunk_and_boxes_are_rounded_outwards(mode: str) -> None:
    rng = np.random.default_rng(7)
    image = np.kron(rng.integers(0, 256, (15, 23, 3)), np.ones((10, 11, 1))).astype(np.uint8)  # 150 x 253
    assert shrunk_size(150, 253, 101) == (60, 101)
    small = np.empty((60, 101, 3), np.uint8)
    shrink(image, small)
    expected = [
        (x0 * 253 // 101, y0 * 150 // 60, -(-x1 * 253 // 101), -(-y1 * 150 // 60))
        for x0, y0, x1, y1 in selective_search(small, mode=mode, min_size=20).tolist()
    ]
    boxes = selective_search(image, mode=mode, min_size=20, max_side=101)
    assert len(boxes) > 10
    assert boxes.tolist() == [list(box) for box in expected]


@pytest.mark.parametrize("mode", ["compat", "strategies"])
def test_threads_do_not_disturb_each_other(mode: str) -> None:
    images = [image for image in synthetic().values() if image.size > 3000] * 3
    alone = [selective_search(image, mode=mode, min_size=20) for image in images]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda image: selective_search(image, mode=mode, min_size=20), images))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


# ---- engines and errors --------------------------------------------------------------------------------------------


def test_the_package_is_an_engine() -> None:
    image = synthetic()["clouds"]
    theirs = selective_search(image, scale=100, min_size=10, engine="selectivesearch")
    assert np.array_equal(theirs, packages(image, 100, 0.9, 10))
    assert theirs.dtype == np.uint16
    long = selective_search(image, min_size=10, engine="selectivesearch", max_side=40)
    assert np.array_equal(long, selective_search(image, min_size=10, max_side=40))


def test_opencv_is_an_engine() -> None:
    pytest.importorskip("cv2.ximgproc", reason="OpenCV without its contrib modules")
    image = synthetic()["clouds"]
    for strategies in ("single", "fast"):
        boxes = selective_search(image, mode="strategies", engine="opencv", strategies=strategies)
        assert [0, 0, 90, 70] in boxes.tolist()
        assert (boxes[:, 2:] <= [90, 70]).all()


@pytest.mark.parametrize(("engine", "module", "says"), [("selectivesearch", "selectivesearch", r"geoaug\[peers\]"),
                                                        ("opencv", "cv2", "opencv-contrib-python")])  # fmt: skip
def test_a_missing_engine_names_what_to_install(
    engine: str, module: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, "cv2.ximgproc", None)
    mode = "strategies" if engine == "opencv" else "compat"
    with pytest.raises(ImportError, match=f"selective_search: engine='{engine}'.*{says}"):
        selective_search(np.zeros((5, 7, 3), np.uint8), engine=engine, mode=mode)


@pytest.mark.usefixtures("our_errors")
@pytest.mark.parametrize(
    "bad",
    [np.zeros((5, 7, 3)), np.zeros((5, 7, 4), np.uint8), np.zeros((3, 0, 3), np.uint8), np.zeros(5, np.uint8),
     np.zeros((65536, 1), np.uint8), [[1]], None, torch.zeros(5, 7),
     torch.zeros(5, 7, dtype=torch.uint8, device="meta")],
    ids=str,
)  # fmt: skip
def test_what_is_no_image_is_named(bad: object) -> None:
    with pytest.raises(ValueError, match=r"selective_search: image must be uint8 \[H, W, 3\] or \[H, W\] on the CPU"):
        selective_search(bad)  # type: ignore[arg-type]


@pytest.mark.usefixtures("our_errors")
@pytest.mark.parametrize(
    ("argument", "value"),
    [("scale", 0), ("scale", float("nan")), ("scale", "300"), ("sigma", -1), ("sigma", 1000.0), ("min_size", -1),
     ("max_side", 0), ("max_side", 10**6), ("mode", "soco"), ("engine", "cv2"), ("texture", None),
     ("strategies", "slow")],
)  # fmt: skip
def test_what_is_no_parameter_is_named(argument: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"selective_search: {argument} must be"):
        selective_search(np.zeros((5, 7, 3), np.uint8), **{argument: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("engine", "options", "argument"),
    [("selectivesearch", {"mode": "strategies"}, "mode"), ("selectivesearch", {"texture": "soco"}, "texture"),
     ("opencv", {}, "mode"), ("opencv", {"mode": "strategies", "min_size": 20}, "min_size")],
)  # fmt: skip
def test_engines_say_what_they_cannot_do(engine: str, options: dict[str, object], argument: str) -> None:
    with pytest.raises(ValueError, match=f"selective_search: {argument} must be .* for engine='{engine}'"):
        selective_search(np.zeros((5, 7, 3), np.uint8), engine=engine, **options)  # type: ignore[arg-type]


def test_too_many_regions_are_refused_not_held() -> None:
    noise = np.random.default_rng(8).integers(0, 256, (140, 140, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match=r"selective_search: scale and min_size must be .* at most 16384 regions"):
        selective_search(noise, scale=1e-6, sigma=0, min_size=0, mode="strategies")

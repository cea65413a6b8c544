import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional

from geoaug import Key
from geoaug.pixels import color as module
from geoaug.pixels import color_ops
from geoaug.pixels.color import BYOL_1, BYOL_2, MOCO_V2, PICIE, ColorSpec, ColorTable, color, draw_colors, paint

RAW = ColorSpec(mean=0.0, std=1.0)  # the output stays in [0, 1]
ORDERS = list(itertools.permutations(range(4)))
RECIPES = {"BYOL_1": BYOL_1, "BYOL_2": BYOL_2, "MOCO_V2": MOCO_V2, "PICIE": PICIE}
OPS = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation, functional.adjust_hue)
VALUES = ((0.0, 0.37, 1.0, 1.9), (0.0, 0.55, 1.0, 1.7), (0.0, 0.62, 1.0, 2.5), (-0.5, -0.1, 0.04, 0.5))


def views(B=4, h=37, w=50, seed=0, dtype=torch.uint8):
    """Noise, a smooth picture, flat colours and the two extremes: what hue, clamps and solarize trip over."""
    draw = np.random.default_rng(seed)
    x = draw.integers(0, 256, (B, 3, h, w)).astype(np.uint8)
    y = np.linspace(0, 255, h)[:, None] * np.linspace(0.2, 1, w) * np.array([1, 0.8, 0.5])[:, None, None]
    x[1::4] = y.astype(np.uint8)
    x[2::4] = np.array([200, 60, 60])[:, None, None]
    x[3::4, :, : h // 2], x[3::4, :, h // 2 :] = 0, 255
    images = torch.from_numpy(x)
    return images if dtype == torch.uint8 else images.to(dtype) / 255


def table(B, factors=(1.0, 1.0, 1.0, 0.0), order=(0, 1, 2, 3), gray=False, sigma=0.0, solarize=False):
    return ColorTable(
        factors=torch.tensor(factors, dtype=torch.float32).expand(B, 4),
        order=torch.tensor(order).expand(B, 4),
        gray=torch.full((B,), gray),
        sigma=torch.full((B,), sigma),
        solarize=torch.full((B,), solarize),
    )


def on_torch(images, spec, rows):
    """The path of devices, on the CPU."""
    radius, mean, std = spec.radius(*images.shape[2:]), spec.channels("mean"), spec.channels("std")
    numbers = color_ops.rows_of(*rows.columns, radius=radius, mean=mean, std=std)
    return color_ops.paint(images, numbers, radius=radius, threshold=spec.threshold)


PATHS = pytest.mark.parametrize("run", [paint, on_torch], ids=["numba", "torch"])


@PATHS
@pytest.mark.parametrize(("op", "value"), [(i, v) for i, values in enumerate(VALUES) for v in values])
def test_each_jitter_is_torchvisions(run, op, value):
    images = views()
    factors = [1.0, 1.0, 1.0, 0.0]
    factors[op] = value
    expected = OPS[op](images / 255, value)
    torch.testing.assert_close(run(images, RAW, table(4, factors)), expected, rtol=0, atol=3e-6)


@PATHS
def test_gray_and_solarize_are_torchvisions(run):
    images = views()
    images[0, 0, 0, :3] = torch.tensor([127, 128, 129])
    gray = functional.rgb_to_grayscale(images / 255, num_output_channels=3)
    torch.testing.assert_close(run(images, RAW, table(4, gray=True)), gray, rtol=0, atol=1e-6)
    solarized = functional.solarize(images, 128) / 255  # the threshold of 0.5 is that of 128
    torch.testing.assert_close(run(images, RAW, table(4, solarize=True)), solarized, rtol=0, atol=1e-6)
    high = run(images, replace(RAW, threshold=0.9), table(4, solarize=True))
    torch.testing.assert_close(high, functional.solarize(images / 255, 0.9), rtol=0, atol=1e-6)


@PATHS
@pytest.mark.parametrize("sigma", [1e-4, 0.1, 0.35, 1.0, 2.0, 5.0])
@pytest.mark.parametrize(("size", "kernel"), [((61, 83), 23), ((5, 7), 9), ((224, 40), None), ((12, 5), 1)])
def test_blur_is_torchvisions(run, sigma, size, kernel):
    images, spec = views(4, *size), replace(RAW, kernel=kernel)
    width = 2 * spec.radius(*size) + 1
    expected = functional.gaussian_blur(images / 255, [width, width], [sigma, sigma])
    torch.testing.assert_close(run(images, spec, table(4, sigma=sigma)), expected, rtol=0, atol=5e-6)


@PATHS
@pytest.mark.parametrize("order", ORDERS)
def test_operators_come_in_each_samples_order(run, order):
    images, factors = views(), (1.4, 0.6, 1.3, 0.07)
    expected = images / 255
    for op in order:
        expected = OPS[op](expected, factors[op])
    torch.testing.assert_close(run(images, RAW, table(4, factors, order)), expected, rtol=0, atol=5e-6)


@PATHS
def test_a_whole_recipe_is_torchvisions_sample_by_sample(run):
    images, spec, key = views(24, 60, 44), replace(BYOL_2, kernel=7, blur=0.5, solarize=0.5), Key(3, 1, range(24))
    rows, expected = draw_colors(spec, key), []
    for x, factors, order, gray, sigma, solarize in zip(images / 255, *rows.columns, strict=True):
        for op in order:
            x = OPS[op](x, float(factors[op]))
        x = functional.rgb_to_grayscale(x, num_output_channels=3) if gray else x
        x = functional.gaussian_blur(x, [7, 7], [float(sigma)] * 2) if sigma > 0 else x
        x = functional.solarize(x, 0.5) if solarize else x
        expected.append(functional.normalize(x, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    torch.testing.assert_close(run(images, spec, rows), torch.stack(expected), rtol=0, atol=3e-5)  # divided by .22


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_the_two_paths_agree(name, dtype):
    spec, key = replace(RECIPES[name], mean=0.0, std=1.0), Key(0, 0, range(16))
    images = views(16, 80, 64, dtype=dtype)
    torch.testing.assert_close(
        color(images, spec, key), on_torch(images, spec, draw_colors(spec, key)), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("size", [(64, 48), (5, 7), (1, 1), (61, 29)])
def test_bits_do_not_depend_on_the_batch(name, size):
    spec, key, images = RECIPES[name], Key(0, 2, range(100, 137)).fold("x1"), views(37, *size)
    whole = color(images, spec, key)
    for b in (1, 8):
        parts = [color(images[i : i + b], spec, key[slice(i, i + b)]) for i in range(0, 37, b)]
        assert torch.equal(torch.cat(parts), whole)
    rows = torch.randperm(37, generator=torch.Generator().manual_seed(0))
    assert torch.equal(color(images[rows], spec, key[rows]), whole[rows])


def test_bits_do_not_depend_on_threads_or_strides(monkeypatch):
    monkeypatch.setattr(module, "_PER_THREAD", 1)  # so few pixels would have one thread
    images, key = views(9, 40, 30), Key(0, 0, range(9))
    whole, threads = color(images, BYOL_1, key), torch.get_num_threads()
    assert torch.equal(color(images.to(memory_format=torch.channels_last), BYOL_1, key), whole)
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            assert torch.equal(color(images, BYOL_1, key), whole)
    finally:
        torch.set_num_threads(threads)


@PATHS
@pytest.mark.parametrize("size", [(5, 7), (1, 1), (1, 40), (224, 224)])
def test_nothing_but_the_scale(run, size):
    images, spec = views(4, *size), ColorSpec()
    mean, std = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert torch.equal(run(images, spec, draw_colors(spec, Key(0, 0, range(4)))), (images / 255 - mean) / std)
    assert torch.equal(run(images / 255, RAW, table(4)), images / 255)
    own = ColorSpec(mean=(0.1, 0.2, 0.3), std=0.5)
    assert torch.equal(run(images, own, table(4)), (images / 255 - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / 0.5)


@PATHS
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.float16])
def test_input_is_kept_and_output_float32(run, dtype):
    images = views(8, dtype=dtype)
    before, rows = images.clone(), draw_colors(BYOL_2, Key(0, 0, range(8)))
    result = run(images, BYOL_2, rows)
    assert torch.equal(images, before)
    assert result.dtype == torch.float32
    assert result.shape == images.shape


def test_empty_batch():
    for run in (paint, on_torch):
        assert run(views(0), BYOL_2, draw_colors(BYOL_2, Key(0, 0, []))).shape == (0, 3, 37, 50)
    assert color(views(0), BYOL_1, Key(0, 0, [])).shape == (0, 3, 37, 50)


def test_two_folds_never_share_a_colour():
    key, images = Key(0, 0, range(1000)), views(1, 4, 4).expand(1000, -1, -1, -1)
    a, b = (draw_colors(BYOL_1, key.fold(name)) for name in ("x1", "x2"))
    assert not (a.sigma == b.sigma).any()
    both = (a.factors != table(1).factors).any(1) & (b.factors != table(1).factors).any(1)
    assert both.sum() > 550
    assert not (a.factors == b.factors)[both].any()
    raw = [key.fold(name).uniform("color", 16) for name in ("x1", "x2")]
    assert not (raw[0] == raw[1]).all(1).any()
    pixels = [color(images[:64], BYOL_1, key[:64].fold(name)) for name in ("x1", "x1", "x2")]
    assert torch.equal(pixels[0], pixels[1])
    assert not torch.equal(pixels[0], pixels[2])


def test_a_key_that_was_sent_away_draws_on_the_host():
    key, images = Key(0, 0, range(8)).fold("x1"), views(8)
    assert torch.equal(color(images, BYOL_1, key.to("meta")), color(images, BYOL_1, key))
    assert draw_colors(BYOL_1, key.to("meta")).sigma.device.type == "meta"


def test_a_draw_is_its_ids_own():
    key = Key(5, 1, range(50))
    whole, part = draw_colors(MOCO_V2, key), draw_colors(MOCO_V2, key[[7, 3]])
    for a, b in zip(whole.columns, part.columns, strict=True):
        assert torch.equal(a[[7, 3]], b)
    assert not torch.equal(whole.factors, draw_colors(MOCO_V2, key.at_epoch(2)).factors)


@pytest.mark.parametrize(
    ("name", "strength", "p_gray", "p_blur", "p_solarize"),
    [
        ("BYOL_1", (0.4, 0.4, 0.2, 0.1), 0.2, 1.0, 0.0),
        ("BYOL_2", (0.4, 0.4, 0.2, 0.1), 0.2, 0.1, 0.2),
        ("MOCO_V2", (0.4, 0.4, 0.4, 0.1), 0.2, 0.5, 0.0),
        ("PICIE", (0.3, 0.3, 0.3, 0.1), 0.2, 0.5, 0.0),
    ],
)
def test_recipes_have_the_numbers_of_the_papers(name, strength, p_gray, p_blur, p_solarize):
    spec, n = getattr(ColorSpec, name), 10_000
    rows = draw_colors(spec, Key(1, 0, range(n)))
    for chance, hits in ((p_gray, rows.gray), (p_blur, rows.sigma > 0), (p_solarize, rows.solarize)):
        assert abs(hits.double().mean() - chance) <= 4 * (chance * (1 - chance) / n) ** 0.5
    hit = rows.factors != torch.tensor([1.0, 1.0, 1.0, 0.0])
    assert (hit.double().mean(0) - 0.8).abs().max() < 0.016
    joint = (hit == hit[:, :1]).all(1).double().mean()  # one coin for all four, or one each
    assert joint == 1 if name != "PICIE" else abs(joint - (0.8**4 + 0.2**4)) < 0.02
    for i, s in enumerate(strength):
        centre, drawn = float(i < 3), rows.factors[:, i][hit[:, i]]
        assert drawn.min() >= centre - s - 1e-6
        assert drawn.max() <= centre + s + 1e-6
        assert drawn.min() < centre - 0.99 * s
        assert drawn.max() > centre + 0.99 * s
        assert abs(drawn.mean() - centre) < 4 * s / 3**0.5 / 8000**0.5
        assert abs(drawn.std() - s / 3**0.5) < 0.02 * s
    sigma = rows.sigma[rows.sigma > 0].double()
    if name == "PICIE":  # |U(-1.8, .1)|
        assert sigma.max() <= 1.8
        assert abs((sigma < 0.1).double().mean() - 0.2 / 1.9) < 0.02
        assert (rows.order == torch.arange(4)).all()
    else:
        assert 0.1 <= sigma.min() < 0.12
        assert 1.98 < sigma.max() <= 2.0
        assert abs(sigma.mean() - 1.05) < 4 * 1.9 / 12**0.5 / len(sigma) ** 0.5
        shares = np.unique(rows.order.numpy(), axis=0, return_counts=True)[1] / n
        assert len(shares) == 24
        assert abs(shares - 1 / 24).max() < 4 * (1 / 24 / n) ** 0.5
    rank = torch.corrcoef(torch.cat([rows.factors, rows.sigma[:, None], rows.gray[:, None]], 1).T)
    assert (rank - torch.eye(6)).abs().max() < 0.04  # independent of each other


def test_a_strength_over_one_starts_at_zero():
    drawn = draw_colors(ColorSpec(brightness=3.0), Key(0, 0, range(2000))).factors[:, 0]
    assert 0 <= drawn.min() < 0.02
    assert 3.98 < drawn.max() <= 4


def test_kernel_is_a_tenth_of_the_shorter_side():
    assert [BYOL_1.radius(*size) for size in ((224, 224), (224, 112), (96, 96), (5, 7))] == [11, 5, 4, 0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ColorSpec(brightness=-1), "ColorSpec: brightness must be a finite number of at least 0, got -1"),
        (lambda: ColorSpec(hue=0.6), r"ColorSpec: hue must be in \[0, 0.5\], got 0.6"),
        (lambda: ColorSpec(blur=float("nan")), r"ColorSpec: blur must be a chance in \[0, 1\], got nan"),
        (lambda: ColorSpec(sigma=(2.0, 1.0)), r"ColorSpec: sigma must be a finite pair .* got \(2.0, 1.0\)"),
        (lambda: ColorSpec(kernel=4), "ColorSpec: kernel must be odd"),
        (lambda: ColorSpec(std=(1.0, 0.0, 1.0)), "ColorSpec: std must be positive"),
        (lambda: ColorSpec(mean=(1.0, 0.0)), "ColorSpec: mean must be a finite number, or one for each of R, G, B"),
        (lambda: ColorSpec(order="bcsh"), "ColorSpec: order must be 'random' or 'fixed', got 'bcsh'"),
        (lambda: color(views()[0], BYOL_1, Key(0, 0, [1])), r"color: images must be uint8 .* got uint8 \[3, 37, 50\]"),
        (lambda: color(views().int(), BYOL_1, Key(0, 0, range(4))), "color: images must be .* got int32"),
        (lambda: color(views() * 1.0, BYOL_1, Key(0, 0, range(4))), "color: images must be .* got values outside"),
        (lambda: color(views() * float("nan"), BYOL_1, Key(0, 0, range(4))), "color: images must be .* or NaN"),
        (lambda: color(views(), BYOL_1, Key(0, 0, [1])), "color: key must be of the 4 images, got one of 1 ids"),
        (lambda: color(views(), BYOL_1, 7), "color: key must be a Key, got 7"),
        (lambda: color(views(), "BYOL_1", Key(0, 0, range(4))), "color: spec must be a ColorSpec, got 'BYOL_1'"),
        (lambda: color(views(), replace(RAW, kernel=75), Key(0, 0, range(4))), "kernel must be narrower than twice"),
        (lambda: paint(views(), RAW, table(3)), "paint: table must be of the 4 images, got one of 3 rows"),
        (lambda: table(4, order=(0, 1, 2, 2)), "ColorTable: order must be 0, 1, 2, 3 in some order"),
        (lambda: table(4, factors=(1.0, -1.0, 1.0, 0.0)), "ColorTable: factors must be three of at least 0"),
        (lambda: table(4, factors=(1.0, 1.0, 1.0, 0.7)), "ColorTable: factors must be three of at least 0"),
        (lambda: table(4, sigma=-1.0), "ColorTable: sigma must be finite and at least 0"),
        (lambda: replace(table(4), gray=torch.zeros(3, dtype=torch.bool)), r"ColorTable: gray must be bool \[B\]"),
    ],
)
def test_bad_input(our_errors, make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", RECIPES)
def test_on_a_gpu(name, monkeypatch):
    spec, key, images = RECIPES[name], Key(0, 0, range(37)), views(37, 112, 90)
    device, sent = images.cuda(), key.to("cuda")  # which draws on the host
    there = Key(0, 0, key.ids.cuda())
    torch.testing.assert_close(color(device, spec, there).cpu(), color(images, spec, key), rtol=0, atol=5e-5)
    monkeypatch.delenv("GEOAUG_CHECK")
    torch.cuda.set_sync_debug_mode("error")
    try:
        whole = color(device, spec, there)
        from_host = [color(device, spec, key), color(device, spec, sent)]
        alone = [color(device[i : i + 1], spec, there[slice(i, i + 1)]) for i in range(37)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(whole, from_host[0])
    assert torch.equal(whole, from_host[1])
    assert torch.equal(whole, torch.cat(alone))
    plain = color(device, ColorSpec(), there).cpu()
    assert torch.equal(plain, color(images, ColorSpec(), key))

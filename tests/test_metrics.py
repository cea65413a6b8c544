import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from geoaug import Key
from geoaug.objectives import metrics


def tensor(*shape, seed=0, dtype=torch.float32):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def blind(images):
    """Maps whose cells see their own pixels alone, at two resolutions."""
    return {"fine": functional.avg_pool2d(images, 2), "coarse": functional.avg_pool2d(images, 4)}


def mixed(images):
    """Every cell sees a share of the whole canvas: coupled, but the same everywhere."""
    return {"mixed": functional.avg_pool2d(images, 4) + 0.5 * images.mean(dim=(2, 3), keepdim=True)}


def net(padding_mode, seed=0):
    """A small random network; zero padding is how position leaks into features."""
    torch.manual_seed(seed)
    convs = [nn.Conv2d(a, 16, 3, padding=1, padding_mode=padding_mode) for a in (3, 16, 16)]
    model = nn.Sequential(*(layer for conv in convs for layer in (conv, nn.ReLU())))
    return lambda images: {"last": model(images)}


def cosine(a, b):
    dot, aa, bb = (sum(x * y for x, y in zip(u, v, strict=True)) for u, v in ((a, b), (a, a), (b, b)))
    return dot / math.sqrt(aa * bb)


def cell_mean(maps, top, bottom, left, right):
    """The mean of some cells of one map [C, h, w], as floats."""
    cells = [maps[:, y, x].double() for y in range(top, bottom) for x in range(left, right)]
    return (sum(cells) / len(cells)).tolist()


def test_tile_means_against_the_loop():
    for h, w, rows, columns in ((5, 7, 1, 2), (5, 7, 2, 3), (21, 6, 3, 3), (4, 4, 4, 4)):
        maps = tensor(2, 3, h, w)
        found = metrics.tile_means(maps, rows, columns)
        for i in range(rows):
            for j in range(columns):
                inside = [
                    (y, x)
                    for y in range(h)
                    for x in range(w)
                    if i * h <= y * rows and (y + 1) * rows <= (i + 1) * h
                    and j * w <= x * columns and (x + 1) * columns <= (j + 1) * w
                ]  # fmt: skip
                expected = torch.stack([maps[:, :, y, x] for y, x in inside]).mean(0)
                assert torch.allclose(found[:, i * columns + j], expected, atol=1e-6)


def test_published_vector_twelve():
    """A map blind to position and neighbours scores exactly 1, whatever the tile and however many a batch."""
    tiles = [tensor(7, 3, 8, 12, seed=s) for s in (0, 1)]
    for size in (1, 3, 7):
        assert set(metrics.coupling_rate(blind, *tiles, batch_size=size)) == {"fine", "coarse"}
        for rate in metrics.coupling_rate(blind, *tiles, batch_size=size).values():
            assert rate == (pytest.approx(1, abs=1e-6), pytest.approx(1, abs=1e-6), 7, 7)
        for found in metrics.position_similarity(blind, tiles[0], batch_size=size).values():
            assert found == pytest.approx(1, abs=1e-6)


def test_coupling_rate_against_the_loop():
    a, b = tensor(5, 3, 8, 8), tensor(5, 3, 8, 8, seed=1)
    rate = metrics.coupling_rate(mixed, a, b, batch_size=2)["mixed"]
    beside, alone = [], []
    for i in range(5):
        both, single = torch.zeros(3, 8, 16), torch.zeros(3, 8, 16)
        both[:, :, :8], both[:, :, 8:], single[:, :, :8] = a[i], b[i], a[i]
        both, single = (mixed(canvas[None])["mixed"][0] for canvas in (both, single))
        neighbour = cell_mean(both, 0, 2, 2, 4)
        beside.append(cosine(cell_mean(both, 0, 2, 0, 2), neighbour))
        alone.append(cosine(cell_mean(single, 0, 2, 0, 2), neighbour))
    assert rate.ratio_of_means == pytest.approx(sum(beside) / sum(alone), abs=1e-6)
    assert rate.mean_of_ratios == pytest.approx(sum(x / y for x, y in zip(beside, alone, strict=True)) / 5, abs=1e-6)
    assert rate.ratio_of_means > 1.001


def test_ratios_over_almost_nothing_are_left_out_and_counted():
    a, b = torch.zeros(3, 3, 4, 4), torch.zeros(3, 3, 4, 4)
    a[:, 0], b[:, 0] = 1, 1
    a[1], b[1, 0] = 0, 0.02
    b[1, 1] = 1  # cos(black, b) = 0
    rate = metrics.coupling_rate(lambda x: {"x": x}, a, b)["x"]
    assert (rate.kept, rate.pairs, rate.mean_of_ratios) == (2, 3, pytest.approx(1))
    rate = metrics.coupling_rate(lambda x: {"x": x}, torch.zeros_like(a), b)["x"]
    assert rate.kept == 0
    assert math.isnan(rate.mean_of_ratios)
    assert math.isnan(rate.ratio_of_means)


def test_position_similarity_against_the_loop():
    tiles, backbone = tensor(3, 3, 6, 9), net("zeros")
    found = metrics.position_similarity(backbone, tiles, batch_size=2)["last"]
    cosines = []
    for tile in tiles:
        maps = backbone(torch.cat([torch.cat([tile] * 3, dim=1)] * 3, dim=2)[None])["last"][0].detach()
        middle = cell_mean(maps, 6, 12, 9, 18)
        for i in range(3):
            for j in range(3):
                if (i, j) != (1, 1):
                    cosines.append(cosine(middle, cell_mean(maps, 6 * i, 6 * i + 6, 9 * j, 9 * j + 9)))
    assert len(cosines) == 24
    assert found == pytest.approx(sum(cosines) / 24, abs=1e-6)


def test_zero_padding_is_what_position_similarity_sees():
    tiles = tensor(4, 3, 8, 8)
    zeros, circular = (metrics.position_similarity(net(mode), tiles)["last"] for mode in ("zeros", "circular"))
    assert circular == pytest.approx(1, abs=1e-6)
    assert zeros < 0.9995


def test_pairs_are_uniform_over_different_classes():
    labels = torch.tensor([2, 0, 1, 0, 5, 0])
    pairs = metrics.different_pairs(labels, key=Key(0, 0, range(60_000)))
    assert (labels[pairs[:, 0]] != labels[pairs[:, 1]]).all()
    for first in range(6):
        seconds = pairs[pairs[:, 0] == first, 1]
        assert len(seconds) == pytest.approx(10_000, rel=0.05)
        others = [i for i in range(6) if labels[i] != labels[first]]
        shares = torch.bincount(seconds, minlength=6) / len(seconds)
        assert shares.tolist() == pytest.approx([1 / len(others) if i in others else 0 for i in range(6)], abs=0.02)
    assert torch.equal(metrics.different_pairs(labels, key=Key(0, 0, [7, 9])), pairs[[7, 9]])
    assert metrics.different_pairs(labels, key=Key(0, 0, [])).shape == (0, 2)


def knn_loop(bank, bank_labels, query, k, temperature):
    """Classes in order of their votes, the smaller label first, those without a vote left out."""
    cosines = sorted(((cosine(query, row), label) for row, label in zip(bank, bank_labels, strict=True)), reverse=True)
    votes = {}
    for similarity, label in cosines[:k]:
        votes[label] = votes.get(label, 0) + math.exp(similarity / temperature)
    return sorted(votes, key=lambda label: (-votes[label], label))


@pytest.mark.parametrize("k", [1, 3, 20, 40])
def test_object_knn_against_the_loop(k):
    g = torch.Generator().manual_seed(k)
    labels, queries_labels = (torch.randint(0, 9, (n,), generator=g) for n in (40, 25))
    centres = torch.randn(9, 5, generator=g)
    bank, queries = (centres[y] + 0.8 * torch.randn(len(y), 5, generator=g) for y in (labels, queries_labels))
    found = metrics.object_knn(bank, labels, queries, queries_labels, k=(k, 2))[k]
    guesses = [knn_loop(bank.tolist(), labels.tolist(), q, k, 0.07) for q in queries.tolist()]
    classes = sorted(set(queries_labels.tolist()))
    for top, share, by_class in ((1, found.top1, found.class_top1), (5, found.top5, found.class_top5)):
        hits = [y in guess[:top] for y, guess in zip(queries_labels.tolist(), guesses, strict=True)]
        assert share == pytest.approx(sum(hits) / 25)
        own = [[hit for hit, y in zip(hits, queries_labels.tolist(), strict=True) if y == c] for c in classes]
        assert by_class == pytest.approx(sum(sum(x) / len(x) for x in own) / len(classes))
    assert found.objects == 25
    assert 0.1 < found.top1 < 1


@pytest.mark.parametrize(("batch_size", "chunk"), [(1, 1), (7, 3), (100, 39), (25, 40)])
def test_object_knn_in_chunks_is_the_same(batch_size, chunk):
    bank, labels = tensor(40, 5) - 0.5, torch.arange(40) % 7
    queries, truth = tensor(25, 5, seed=1) - 0.5, torch.arange(25) % 8
    whole = metrics.object_knn(bank, labels, queries, truth, k=(1, 10))
    assert metrics.object_knn(bank, labels, queries, truth, k=(1, 10), batch_size=batch_size, chunk=chunk) == whole


def test_a_class_without_a_vote_is_no_guess():
    bank, labels = torch.eye(4), torch.tensor([1, 2, 3, 0])
    found = metrics.object_knn(bank, labels, torch.eye(4)[:2], torch.tensor([1, 0]), k=(1,))[1]
    assert found == (0.5, 0.5, 0.5, 0.5, 2)
    unseen = metrics.object_knn(bank, labels, torch.eye(4)[:1], torch.tensor([9]), k=(4,))[4]
    assert unseen.top5 == 0


def test_of_two_classes_with_the_same_votes_the_smaller_label_comes_first():
    bank, labels, query = torch.eye(2), torch.tensor([7, 3]), torch.ones(2, 2)
    found = metrics.object_knn(bank, labels, query, torch.tensor([3, 7]), k=(2,))[2]
    assert found == (0.5, 1, 0.5, 1, 2)
    found = metrics.object_knn(bank, labels, query[:1], torch.tensor([3]), k=(2,))[2]
    assert found.top1 == 1


def test_nothing_overflows_at_a_low_temperature():
    bank, labels = torch.tensor([[0.9, 0.4], [1.0, 0.0]]), torch.tensor([0, 1])
    found = metrics.object_knn(bank, labels, torch.tensor([[1.0, 0.0]]), torch.tensor([1]), k=(2,), temperature=1e-3)
    assert found[2].top1 == 1


def test_objects_are_chosen_by_the_key():
    valid = torch.tensor([[True] * 6 + [False], [False] * 7, [True, False] + [False] * 5])
    chosen = metrics.choose_objects(valid, 3, key=Key(0, 0, [5, 6, 7]))
    assert chosen.sum(1).tolist() == [3, 0, 1]
    assert not (chosen & ~valid).any()
    assert torch.equal(chosen[1:], metrics.choose_objects(valid[1:], 3, key=Key(0, 0, [6, 7])))
    assert torch.equal(metrics.choose_objects(valid, 9, key=Key(0, 0, [5, 6, 7])), valid)
    many = metrics.choose_objects(valid[:1].expand(20_000, -1), 2, key=Key(0, 0, range(20_000)))
    assert many.float().mean(0).tolist() == pytest.approx([1 / 3] * 6 + [0], abs=0.02)
    assert metrics.choose_objects(valid[:0], 3, key=Key(0, 0, [])).shape == (0, 7)
    assert metrics.choose_objects(valid[:, :0], 3, key=Key(0, 0, [5, 6, 7])).shape == (3, 0)


def test_another_image_is_never_the_same_one():
    rows = torch.arange(5).repeat(4000)
    others = metrics.other_images(rows, 5, key=Key(0, 0, range(len(rows))))
    assert (others != rows).all()
    for row in range(5):
        shares = torch.bincount(others[rows == row], minlength=5) / 4000
        assert shares.tolist() == pytest.approx([0 if i == row else 0.25 for i in range(5)], abs=0.03)


def test_object_features_are_the_mean_of_what_the_box_shows():
    images = tensor(2, 3, 20, 28)
    box = torch.tensor([[4, 8, 12, 16], [0, 0, 28, 20]]) / torch.tensor([28, 20] * 2)
    valid = torch.tensor([[True, True], [True, False]])
    found = metrics.object_features(blind, images, box.expand(2, -1, -1), valid, layer="coarse", output_size=4)
    assert torch.allclose(found[:, 0], images[:, :, 8:16, 4:12].mean((2, 3)), atol=0.1)
    assert torch.allclose(found[0, 1], images[0].mean((1, 2)), atol=0.05)
    assert not found[1, 1].any()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_disturbed_images_against_the_loop(dtype):
    images, others = (tensor(2, 3, h, w, seed=h).mul(255).to(dtype) for h, w in ((5, 7), (9, 4)))
    boxes = torch.tensor([[[0.1, 0.25, 0.5, 0.75], [0.4, 0.0, 1.0, 0.35]], [[-0.2, 0.45, 0.33, 1.2], [0, 0, 1, 1]]])
    valid = torch.tensor([[True, True], [True, False]])
    found = metrics.disturb(images, boxes, valid, others)
    resized = functional.interpolate(others.float(), (5, 7), mode="bilinear", align_corners=False, antialias=True)
    for i in range(2):
        kept = 0
        for y in range(5):
            for x in range(7):
                inside = any(
                    ok and b[0] <= (x + 0.5) / 7 < b[2] and b[1] <= (y + 0.5) / 5 < b[3]
                    for b, ok in zip(boxes[i].tolist(), valid[i].tolist(), strict=True)
                )
                kept += inside
                expected = images[i, :, y, x].float() if inside else resized[i, :, y, x]
                assert torch.allclose(found[i, :, y, x].float(), expected, atol=0.51 if dtype == torch.uint8 else 1e-6)
        assert 0 < kept < 35
    assert found.dtype == dtype
    nothing = metrics.disturb(images, boxes * math.nan, torch.zeros(2, 2).bool(), images.flip(0))
    assert torch.equal(nothing, images.flip(0))
    assert metrics.disturb(images, boxes[:, :0], valid[:, :0], images.flip(0)).shape == images.shape
    assert metrics.disturb(images[:0], boxes[:0], valid[:0], others[:0]).shape == (0, 3, 5, 7)


def test_object_tiles_are_the_boxes():
    image = (torch.arange(50 * 70) % 251).reshape(1, 50, 70).expand(3, -1, -1).to(torch.uint8)
    pixels = torch.tensor([[10, 20, 42, 36], [0, 0, 70, 50], [69, 49, 70, 50], [70, 50, 70, 50], [5.3, 5.3, 6.6, 5.4]])
    tiles = metrics.object_tiles(image, pixels / torch.tensor([70, 50] * 2), (16, 32))
    assert tiles.shape == (5, 3, 16, 32)
    assert torch.equal(tiles[0], image[:, 20:36, 10:42])
    assert torch.equal(tiles[1], metrics.resize(image[None], (16, 32))[0])
    assert (tiles[2:4] == image[0, -1, -1]).all()
    assert torch.equal(tiles[4], metrics.resize(image[None, :, 5:6, 5:7], (16, 32))[0])
    assert metrics.object_tiles(image, torch.zeros(0, 4), 8).shape == (0, 3, 8, 8)


def test_canvases():
    a, b = tensor(2, 3, 5, 7), tensor(2, 3, 5, 7, seed=1)
    both, alone = metrics.side_by_side(a, b)
    assert torch.equal(both[..., :7], a)
    assert torch.equal(both[..., 7:], b)
    assert torch.equal(alone[..., :7], a)
    assert not alone[..., 7:].any()
    nine = metrics.tiled(a)
    assert nine.shape == (2, 3, 15, 21)
    assert all(torch.equal(nine[:, :, 5 * i : 5 * i + 5, 7 * j : 7 * j + 7], a) for i in range(3) for j in range(3))
    assert metrics.tiled(a[:0]).shape == (0, 3, 15, 21)


@pytest.mark.usefixtures("our_errors")
def test_bad_input_is_named():
    tiles, bank, labels = tensor(2, 3, 8, 8), torch.eye(3), torch.arange(3)
    boxes, valid = torch.zeros(2, 1, 4), torch.ones(2, 1).bool()
    knn = lambda **changes: metrics.object_knn(  # noqa: E731
        **{"bank": bank, "bank_labels": labels, "queries": bank, "query_labels": labels, "k": (2,)} | changes
    )
    bad = [
        (lambda: metrics.coupling_rate(blind, tiles, tiles[:, :, 1:]), "side_by_side: second must be"),
        (lambda: metrics.coupling_rate(blind, tiles[:0], tiles[:0]), "coupling_rate: first must be one pair"),
        (lambda: metrics.coupling_rate(lambda x: x, tiles, tiles), "coupling_rate: backbone must be a callable"),
        (
            lambda: metrics.coupling_rate(lambda x: {"x": x.mean((2, 3))}, tiles, tiles),
            "backbone must be .*'x': float32",
        ),
        (lambda: metrics.coupling_rate(lambda x: {"x": x[..., :1]}, tiles, tiles), "tile_means: features must be"),
        (lambda: metrics.coupling_rate(blind, tiles, tiles, batch_size=0), "coupling_rate: batch_size must be"),
        (lambda: metrics.position_similarity(blind, tiles[:0]), "position_similarity: tiles must be one tile"),
        (lambda: metrics.different_pairs(labels * 0, key=Key(0, 0, [1])), "different_pairs: labels must be of two"),
        (lambda: metrics.choose_objects(valid, 2, key=Key(0, 0, [1])), "choose_objects: key must be a key of 2"),
        (lambda: metrics.other_images(labels, 1, key=Key(0, 0, [1, 2, 3])), "other_images: count must be"),
        (lambda: metrics.object_features(blind, tiles, boxes, valid, layer="c5"), "layer must be one of fine, coarse"),
        (lambda: metrics.disturb(tiles, boxes, valid, tiles[:1]), "disturb: others must be"),
        (lambda: metrics.disturb(tiles, boxes, valid, tiles.byte()), "disturb: others must be"),
        (lambda: metrics.object_tiles(tiles, boxes[0]), "object_tiles: image must be"),
        (lambda: knn(k=(4,)), r"object_knn: k must be an integer in \[1, 3\]"),
        (lambda: knn(k=()), "object_knn: k must be one number"),
        (lambda: knn(query_labels=labels - 1), "object_knn: the labels of queries must be"),
        (lambda: knn(queries=bank[:, :2]), "object_knn: queries must be"),
        (lambda: knn(bank=bank * math.nan), "object_knn: bank must be finite"),
        (lambda: knn(temperature=0), "object_knn: temperature must be"),
        (lambda: knn(bank=bank[:0], bank_labels=labels[:0]), "object_knn: bank must be"),
    ]
    for call, message in bad:
        with pytest.raises(ValueError, match=message):
            call()

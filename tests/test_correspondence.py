import json
import math

import pytest
import torch
from torch.nn import functional

from data_prep import make_scenes
from geoaug import metrics
from trainers import common, evaluate


def pictures(n=5, height=8, width=12, seed=0):
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(seed))


def blind(images):
    """Cells that see their own pixels alone, at two resolutions."""
    return {"fine": functional.avg_pool2d(images, 2), "coarse": functional.avg_pool2d(images, 4)}


def by_loops(backbone, images, mirrored, layer):
    """For each cell of an image its best in the other, cosine by cosine; correct is the mirrored column."""
    hits, count = 0, 0
    for image, other in zip(images, mirrored, strict=True):
        a, b = (backbone(x[None])[layer][0].double() for x in (image, other))
        height, width = a.shape[1:]
        for y in range(height):
            for x in range(width):
                best, where = -math.inf, None
                for v in range(height):
                    for u in range(width):
                        p, q = a[:, y, x], b[:, v, u]
                        cosine = float(p @ q / (p.norm() * q.norm()))
                        if cosine > best:
                            best, where = cosine, (u, v)
                hits += where == (width - 1 - x, y)
                count += 1
    return hits / count


def test_against_the_loop():
    images = pictures()
    other = images.flip(-1) + 0.4 * pictures(seed=1)  # so that some cells lose their way
    found = metrics.correspondence_accuracy(blind, images, other, batch_size=2)
    for layer, cells in (("fine", 24), ("coarse", 6)):
        expected = by_loops(blind, images, other, layer)
        assert 0.1 < expected < 1
        assert found[layer] == (pytest.approx(expected), cells)


@pytest.mark.parametrize("size", [1, 3, 7])
def test_the_mirror_is_ideal_and_nothing_else_is(size, monkeypatch):
    monkeypatch.setattr("geoaug.objectives.correspondence._PAIRS", 100)  # rows of cells come in parts, too
    images = pictures()
    score = lambda other: metrics.correspondence_accuracy(blind, images, other, batch_size=size)["fine"].accuracy  # noqa: E731
    assert score(images.flip(-1)) == 1
    assert score(images) < 0.2
    assert score(images.flip(-2)) < 0.2
    assert score(images.flip(-1).roll(2, -1)) < 0.2


def test_a_backbone_that_says_the_same_everywhere_is_at_chance():
    constant = lambda images: {"x": torch.ones(len(images), 4, 3, 5)}  # noqa: E731
    assert metrics.correspondence_accuracy(constant, pictures(), pictures(seed=1))["x"] == (1 / 15, 15)


@pytest.mark.usefixtures("our_errors")
def test_bad_input_is_named():
    images = pictures()
    bad = [
        (lambda: metrics.correspondence_accuracy(blind, images[:0], images[:0]), "images must be one image or more"),
        (lambda: metrics.correspondence_accuracy(blind, images, images[:2]), "mirrored must be of images' shape"),
        (lambda: metrics.correspondence_accuracy(blind, images, images, batch_size=0), "batch_size must be"),
        (lambda: metrics.correspondence_accuracy(lambda x: x, images, images), "backbone must be a callable"),
    ]
    for call, message in bad:
        with pytest.raises(ValueError, match=f"correspondence_accuracy: {message}"):
            call()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    assert make_scenes.main(["--out", str(folder), "--images", "6", "--size", "96", "--workers", "1"]) == 0
    return folder / "images"  # no labels: none are needed


def config(scenes, *more):
    return evaluate.Config(
        task="correspondence", weights="random", data=scenes, arch="resnet10-narrow", tile=96, device="cpu", workers=0,
        **dict(more),
    )  # fmt: skip


def test_the_task_measures_one_layer_of_images_without_labels(scenes, tmp_path, capsys):
    out = tmp_path / "scores" / "c.json"
    result = evaluate.main(config(scenes, ("layer", "c4"), ("out", out)))
    assert result == json.loads(out.read_text())
    assert (result["task"], result["layer"], result["cells"], result["images"]) == ("correspondence", "c4", 36, 6)
    assert 0 <= result["accuracy"] <= 1
    assert evaluate.main(config(scenes, ("layer", "c4")))["accuracy"] == result["accuracy"]
    assert evaluate.main(config(scenes, ("count", 3)))["images"] == 3
    capsys.readouterr()


def test_the_second_picture_is_mirrored_and_coloured(scenes, monkeypatch, capsys):
    seen = []

    def watched(backbone, images, mirrored, **more):
        seen.append((images, mirrored))
        return {"c5": metrics.Correspondence(1.0, 9)}

    monkeypatch.setattr(metrics, "correspondence_accuracy", watched)
    evaluate.main(config(scenes))
    capsys.readouterr()
    ((images, mirrored),) = seen
    assert images.dtype == mirrored.dtype == torch.uint8
    small = [functional.avg_pool2d(x.float().mean(1, keepdim=True), 8).flatten(1) for x in (images, mirrored.flip(-1))]
    alike = [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(*small, strict=True)]
    assert min(alike) > 0.9  # the same picture, once mirrored back
    assert all((a != b.flip(-1)).float().mean() > 0.5 for a, b in zip(images, mirrored, strict=True))


def test_a_wrong_layer_is_told(scenes):
    with pytest.raises(common.UsageError, match="--layer must be one of"):
        evaluate.main(config(scenes, ("layer", "c6")))

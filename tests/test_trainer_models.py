"""What every trainer's model owes its loss: gradients, rows that could not be read, colours of each view's own."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

import geoaug
from geoaug import Key
from trainers import d3ssl

from .test_trainers import BIG, MODELS, _one_thread, batches, config_of, model_and_inputs, scenes  # noqa: F401  fixtures


@pytest.mark.parametrize(("method", "more"), MODELS)
def test_gradient_reaches_the_student_and_never_the_teacher_and_the_teacher_counts(method, more, batches):  # noqa: F811
    batch = batches[method].split(1)[0]
    if "fpn" in more:  # a box for each level
        half = torch.tensor([0.07, 0.15, 0.3, 0.5])
        batch.boxes = torch.stack((0.5 - half, 0.5 - half, 0.5 + half, 0.5 + half), 1).expand(8, 4, 4)
        batch.box_valid = torch.ones(8, 4, dtype=torch.bool)
    model, inputs = model_and_inputs(method, batch, more)
    loss, _ = model(*inputs)
    loss.backward()
    student = [(n, p) for n, p in model.named_parameters() if not n.startswith("teacher.")]
    assert [n for n, p in student if p.grad is None or not p.grad.any()] == []
    assert all(p.grad is None and not p.requires_grad for p in model.teacher.parameters())
    before = loss.item()
    with torch.no_grad():
        assert model(*inputs)[0].item() == pytest.approx(before, rel=1e-4)
        for p in model.teacher.trunk.parameters():
            p.add_(0.05 * torch.randn_like(p))
        assert abs(model(*inputs)[0].item() - before) > 1e-3


@pytest.mark.parametrize(("method", "more"), MODELS)
def test_a_batch_that_could_not_be_read_gives_zero_inside_the_graph(method, more, batches):  # noqa: F811
    batch = batches[method].split(2)[0]
    batch.ok, batch.box_valid = torch.zeros_like(batch.ok), torch.zeros_like(batch.box_valid)
    model, inputs = model_and_inputs(method, batch, more)
    loss, log = model(*inputs)
    loss.backward()
    assert loss.item() == 0
    student = [(n, p) for n, p in model.named_parameters() if not n.startswith("teacher.")]
    assert [n for n, p in student if p.grad is None or p.grad.any()] == []
    assert all(bool(torch.isfinite(x).all()) for x in log.values() if isinstance(x, torch.Tensor))


@pytest.mark.parametrize("method", ["soco", "d3ssl"])
def test_images_without_a_box_are_read_whole(method, batches):  # noqa: F811
    batch = batches[method].split(2)[0]
    batch.box_valid = torch.zeros_like(batch.box_valid)
    model, inputs = model_and_inputs(method, batch)
    loss, log = model(*inputs)
    loss.backward()
    assert loss.item() > 0
    assert math.isfinite(loss.item())
    if method == "d3ssl":
        regions = inputs[1]
        assert regions.fallback.all()
        assert regions.valid.all()
        assert not regions.movable.any()
        assert torch.allclose(regions.in_x2, torch.tensor([0.0, 0, 1, 1]).expand(4, 4, 4), atol=1e-6)
        assert log["depositioning"].item() == 0
        assert log["whole_view"].item() == 1
        assert model.student.trunk.conv1.weight.grad.any()


def test_rows_that_could_not_be_read_change_nothing(batches):  # noqa: F811
    """With fixed statistics the others' loss is the same, whatever stands in those rows."""
    losses = []
    for junk in (0, 255):
        batch = batches["d3ssl"].split(1)[0]
        batch.ok = torch.tensor([True] * 6 + [False, True])
        batch.box_valid = batch.box_valid & batch.ok[:, None]
        batch.images = [image.clone() for image in batch.images]
        for image in batch.images:
            image[6] = junk
        model, inputs = model_and_inputs("d3ssl", batch)
        losses.append(model.eval()(*inputs)[0].item())
    assert losses[0] == losses[1] > 0


def test_every_view_of_a_step_has_colours_and_cuts_of_its_own(batches, monkeypatch):  # noqa: F811
    batch = batches["d3ssl"]
    config = config_of("d3ssl", Path("x"), Path("x"), *BIG)
    regions = d3ssl.find_regions(batch, config)
    draws, color = [], geoaug.color

    def watched(images, spec, key):
        draws.append(float(key.uniform("color", 1)[0]))
        return color(images, spec, key)

    monkeypatch.setattr(geoaug, "color", watched)
    views = d3ssl.augment(batch, regions, config)
    assert len(set(draws)) == len(draws) == 4  # x1, x2, and x3's front and back
    assert views.x1.shape == views.x2.shape == views.x3.shape == (8, 3, 64, 64)
    assert views.x2s.shape == (8, 3, 32, 32)
    half = nn.functional.interpolate(views.x2, (32, 32), mode="bilinear", antialias=True)
    kept = views.x2s.abs().sum(1, keepdim=True) > 0
    assert torch.allclose(views.x2s, half * kept)  # x2-small is x2 but for what is hidden
    assert 0.1 < kept.float().mean() < 0.95
    assert not torch.allclose(views.boxes["x1"], regions.in_x1)
    again = d3ssl.augment(batch, regions, config)
    assert torch.equal(views.x3, again.x3)
    batch = batch.split(1)[0]
    batch.key = Key(0, 1, batch.key.ids)
    assert not torch.equal(views.x3, d3ssl.augment(batch, regions, config).x3)

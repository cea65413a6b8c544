"""SCRL's boxes are drawn on the host, where the plan was made, and sent to the device."""

from dataclasses import replace

import pytest
import torch

from tests.test_scrl import config_of
from trainers import scrl

from .test_trainers import _one_thread, batches, scenes  # noqa: F401  fixtures


@pytest.mark.parametrize("jitter", ["0", "0.2", "inf"])
def test_boxes_are_drawn_where_the_plan_was_made(jitter, batches, our_errors):  # noqa: F811
    config, batch = config_of("--min-side", "16", "--jitter", jitter), batches["scrl"]
    batch = replace(batch, ok=batch.ok.clone())
    batch.ok[3] = False
    here = scrl.find_pairs(batch, config)
    assert here.valid.any()
    moved = batch.to("cpu")
    assert moved.host is batch.plan
    away = batch.to("meta").to("meta")  # wherever it is sent from there
    assert away.host is batch.plan
    assert torch.equal(away.key.host.ids, batch.key.ids)
    there = scrl.find_pairs(replace(moved, plan=None), config)
    parts = [scrl.find_pairs(replace(part, plan=None), config) for part in moved.split(2)]
    for name in ("in_v1", "in_v2", "reads_v1", "reads_v2", "valid"):
        assert torch.equal(getattr(there, name), getattr(here, name))
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(here, name))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("jitter", ["0", "0.2", "inf"])
def test_the_same_pairs_on_a_gpu_without_synchronising(jitter, batches, monkeypatch):  # noqa: F811
    monkeypatch.setenv("GEOAUG_CHECK", "0")
    config, batch = config_of("--min-side", "16", "--jitter", jitter), batches["scrl"]
    here, moved = scrl.find_pairs(batch, config), batch.to("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        there = scrl.find_pairs(moved, config)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name in ("in_v1", "in_v2", "reads_v1", "reads_v2", "valid"):
        assert torch.equal(getattr(there, name).cpu(), getattr(here, name))

import copy
import math

import pytest
import torch
import torchvision
from torch import nn

from geoaug import Key
from tests import training
from trainers import common
from trainers.networks import ARCHES

CHANNELS = {
    "resnet10-tiny": (16, 16, 32, 64, 128),
    "resnet10-narrow": (64, 32, 64, 128, 256),
    "resnet10": (64, 64, 128, 256, 512),
    "resnet18": (64, 64, 128, 256, 512),
    "resnet34": (64, 64, 128, 256, 512),
    "resnet50": (64, 256, 512, 1024, 2048),
    "resnet101": (64, 256, 512, 1024, 2048),
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Threads that wait for each other on shared cores make these small steps many times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rows(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("arch", ARCHES)
def test_stages_have_their_strides_and_widths(arch):
    with torch.device("meta"):  # shapes alone: nothing is drawn or computed
        trunk = common.Trunk(arch)
        assert tuple(trunk.channels.values()) == CHANNELS[arch]
        maps = trunk.maps(torch.zeros(2, 3, 64, 96))
        strides = [common.stride(arch, stage) for stage in trunk.stages]
        assert strides == ([2, 2, 4, 8, 16] if arch == "resnet10-tiny" else [4, 4, 8, 16, 32])
        assert [list(m.shape) for m in maps] == [
            [2, c, 64 // s, 96 // s] for c, s in zip(CHANNELS[arch], strides, strict=True)
        ]
        for i, stage in enumerate(trunk.stages):
            assert len(trunk.maps(torch.zeros(2, 3, 32, 32), stage)) == i + 1


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_a_trunk_is_torchvisions_network_without_its_classifier(arch):
    trunk, net = common.Trunk(arch), getattr(torchvision.models, arch)(weights=None)
    theirs = {name: x for name, x in net.state_dict().items() if not name.startswith("fc.")}
    assert {n: x.shape for n, x in trunk.state_dict().items()} == {n: x.shape for n, x in theirs.items()}
    trunk.load_state_dict(theirs)
    net.fc = nn.Identity()
    x = rows(2, 3, 64, 64).float()
    with torch.no_grad():
        assert torch.equal(trunk.eval()(x).mean((2, 3)), net.eval()(x))
        trunk.to(memory_format=torch.channels_last)
        assert torch.allclose(trunk(x).mean((2, 3)), net(x), rtol=1e-4, atol=1e-3)


def test_zero_init_makes_each_block_the_identity_at_first():
    weights = {zero: common.Trunk("resnet10", zero_init=zero).layer2[0].bn2.weight for zero in (True, False)}
    assert not weights[True].any()
    assert weights[False].all()


def test_a_trunk_starts_from_the_weights_of_a_file(tmp_path):
    torch.save(common.Trunk("resnet10").state_dict(), tmp_path / "a.pth")
    one, two = (common.make_trunk("resnet10", str(tmp_path / "a.pth")) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(common.make_trunk("resnet10").conv1.weight, one.conv1.weight)
    old = {name: x for name, x in one.state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "old.pth")
    assert torch.equal(common.make_trunk("resnet10", str(tmp_path / "old.pth")).conv1.weight, one.conv1.weight)
    for arch, file in (("resnet18", "a.pth"), ("resnet10", "none.pth")):
        with pytest.raises(common.UsageError, match="--init") as told:
            common.make_trunk(arch, str(tmp_path / file))
        assert len(str(told.value).splitlines()) == 1


def test_pyramid_adds_what_is_coarser():
    pyramid = common.Pyramid([3, 5, 7], width=4).double()
    maps = [rows(2, c, h, w, seed=c).requires_grad_() for c, h, w in ((3, 9, 11), (5, 5, 6), (7, 3, 3))]
    found = pyramid(maps)
    assert [list(x.shape) for x in found] == [[2, 4, 9, 11], [2, 4, 5, 6], [2, 4, 3, 3]]
    lateral = [conv(x) for conv, x in zip(pyramid.lateral, maps, strict=True)]
    up = torch.nn.functional.interpolate
    middle = lateral[1] + up(lateral[2], size=(5, 6))
    for i, merged in enumerate((lateral[0] + up(middle, size=(9, 11)), middle, lateral[2])):
        assert torch.allclose(found[i], pyramid.smooth[i](merged))
    found[0].sum().backward()
    assert all(x.grad.any() for x in maps)


def test_heads_have_the_layers_asked_for():
    assert [type(x).__name__ for x in common.mlp(4, 6, 2)] == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert [type(x).__name__ for x in common.mlp(4, 6, 2, norm=False)] == ["Linear", "ReLU", "Linear"]
    byol = common.mlp(4, 6, 2, last_bias=False)
    assert byol[0].bias is not None
    assert byol[-1].bias is None
    simsiam = common.mlp(4, 6, 6, 2, last_norm=True)
    assert [type(x).__name__ for x in simsiam] == [
        "Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d",
    ]  # fmt: skip
    assert simsiam[1].affine
    assert not simsiam[-1].affine
    assert simsiam(torch.randn(3, 4)).shape == (3, 2)
    head = common.region_head(8, 7, 5)
    assert sum(isinstance(x, nn.Conv2d) for x in head) == 4
    assert head(torch.randn(3, 8, 7, 7)).shape == (3, 5)


def test_spread_is_zero_at_collapse_and_one_on_the_sphere():
    assert common.spread(rows(1, 1, 16).expand(8, 4, 16)).item() == pytest.approx(0, abs=1e-6)
    assert common.spread(rows(1000, 4, 16)).item() == pytest.approx(1, abs=0.02)
    assert common.spread(3 * rows(1000, 4, 16)).item() == pytest.approx(1, abs=0.02)  # lengths do not count
    half = rows(4000, 16) + math.sqrt(16) * nn.functional.normalize(rows(16, seed=1), dim=0)
    assert common.spread(half).item() == pytest.approx(math.sqrt(0.5), abs=0.05)


def body(norm):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(2), nn.BatchNorm1d(4, momentum=0.3),
        nn.Linear(35, 6), nn.Flatten(), nn.BatchNorm1d(24, affine=False),
    )  # fmt: skip
    for x in (*net[1].parameters(), *net[4].parameters()):
        nn.init.normal_(x)
    return common.with_norm(net.double(), norm, torch.device("cpu"))


def normed(rank, cuts, norm):
    net, x = body(norm), (1000 + rows(9, 3, 5, 7))[cuts[rank] : cuts[rank + 1]].requires_grad_()
    y = net(x)
    (y.sin() * rows(9, 24, seed=1)[cuts[rank] : cuts[rank + 1]]).sum().backward()
    for p in net.parameters():
        torch.distributed.all_reduce(p.grad)
    kinds = [type(m).__name__ for m in net.modules()]
    return {"y": y.detach(), "x": x.grad, "p": [p.grad for p in net.parameters()], "b": list(net.buffers()),
            "names": list(net.state_dict()), "kinds": kinds}  # fmt: skip


@pytest.mark.parametrize("cuts", [(0, 5, 9), (0, 1, 9)])
def test_norm_over_ranks_is_the_norm_of_the_whole_batch(cuts, tmp_path):
    net, x = body("batch"), (1000 + rows(9, 3, 5, 7)).requires_grad_()
    y = net(x)
    (y.sin() * rows(9, 24, seed=1)).sum().backward()
    ranks = training.on_ranks(normed, tmp_path, cuts, "sync")
    assert torch.allclose(torch.cat([r["y"] for r in ranks]), y, rtol=1e-6, atol=1e-8)
    assert torch.allclose(torch.cat([r["x"] for r in ranks]), x.grad, rtol=1e-6, atol=1e-8)
    for rank in ranks:
        assert rank["kinds"].count("AllReduceBatchNorm") == 3
        assert rank["names"] == list(net.state_dict())
        for ours, theirs in zip(rank["p"], net.parameters(), strict=True):
            assert torch.allclose(ours, theirs.grad, rtol=1e-6, atol=1e-8)
        for ours, theirs in zip(rank["b"], net.buffers(), strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-6)


def alone(rank):
    net = body("sync").eval()
    kept = [type(m).__name__ for m in body("batch").modules()]
    frozen = common.with_norm(common.frozen(common.mlp(4, 6, 2)), "sync", torch.device("cpu"))
    half = common.AllReduceBatchNorm(4)(rows(3, 4, seed=rank).bfloat16())
    far = common.AllReduceBatchNorm(4)(1000 + rows(8, 4)[4 * rank : 4 * rank + 4].float())
    return {
        "y": net(rows(9, 3, 5, 7)).detach(), "kept": kept, "train": [m.training for m in net.modules()],
        "grad": [p.requires_grad for p in frozen.parameters()], "half": half.detach(), "far": far.detach(),
    }  # fmt: skip


def test_evaluation_other_norms_frozen_nets_and_half_precision(tmp_path):
    ranks = training.on_ranks(alone, tmp_path)
    for rank in ranks:
        assert torch.equal(rank["y"], body("batch").eval()(rows(9, 3, 5, 7)).detach())
        assert "AllReduceBatchNorm" not in rank["kept"]
        assert not any(rank["train"])
        assert not any(rank["grad"])
        assert rank["half"].dtype == torch.bfloat16
    far = torch.cat([rank["far"] for rank in ranks])  # E[x^2] - E[x]^2 would have lost its digits
    assert torch.allclose(far.double(), nn.BatchNorm1d(4).double()(rows(8, 4)).detach(), atol=2e-4)


def test_one_process_has_plain_batch_norm():
    net = common.mlp(4, 6, 2)
    before = copy.deepcopy(net.state_dict())
    assert common.with_norm(net, "sync", torch.device("cpu")) is net
    assert type(net[1]) is nn.BatchNorm1d
    assert list(net.state_dict()) == list(before)


def dealt(rank, ids):
    mine = slice(4 * rank, 4 * rank + 4)
    images, boxes = rows(8, 3, 5, 7), torch.arange(8 * 2 * 4).view(8, 2, 4)
    seen = []

    def encoder(x, box):
        seen.append(box[:, 0, 0] // 8)
        return torch.stack((x.sum((1, 2, 3)), box.sum((1, 2)).double()), 1)

    key = Key(0, 0, ids).fold("k")[mine]
    out = common.shuffled(encoder, key, images[mine], boxes[mine])
    net = nn.BatchNorm1d(1).double()
    return {"out": out, "seen": seen[0], "norm": common.shuffled(net, key, images[mine, 0, 0, :1])}


def test_shuffling_deals_the_rows_anew_and_puts_them_back(tmp_path):
    ids = [11, 5, 7, 3, 2, 13, 17, 19]
    ranks = training.on_ranks(dealt, tmp_path, ids)
    images, boxes = rows(8, 3, 5, 7), torch.arange(8 * 2 * 4).view(8, 2, 4)
    whole = torch.stack((images.sum((1, 2, 3)), boxes.sum((1, 2)).double()), 1)
    assert torch.equal(torch.cat([r["out"] for r in ranks]), whole)
    seen = [r["seen"].tolist() for r in ranks]
    assert sorted(seen[0] + seen[1]) == list(range(8))
    assert set(seen[0]) != {0, 1, 2, 3}  # some row has changed its rank
    deal = Key(0, 0, ids).fold("k").uniform("shuffle", 1)[:, 0].argsort().tolist()
    assert seen == [deal[:4], deal[4:]]
    for part in (deal[:4], deal[4:]):  # each part is normalised by itself
        values = torch.cat([r["norm"] for r in ranks])[part]
        assert values.mean().item() == pytest.approx(0, abs=1e-9)
        assert values.std(correction=0).item() == pytest.approx(1, abs=1e-3)


def test_the_checker_of_arches_names_them():
    with pytest.raises(ValueError, match="resnet10, resnet18"):
        common.Trunk("resnet9")

import hashlib

import numpy as np
import pytest
import torch
from scipy import stats

from geoaug import Key
from geoaug.geometry import kernels
from geoaug.geometry import rng as module
from geoaug.geometry.rng import philox_numpy, philox_torch, words_torch

from . import reference

ALL = 0xFFFFFFFF
# Random123's published known answers for philox4x32-10: counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ALL, ALL, ALL, ALL), (ALL, ALL), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
IDS = [0, 1, 7, 2**31, 2**32 + 5, 2**62 - 3, 2**63 - 1, -1]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_known_answers(counter, key, result):
    assert reference.philox(counter, key) == result
    assert tuple(philox_numpy(counter, key)) == result
    assert tuple(int(w) for w in kernels.philox4x32(*(np.uint64(x) for x in (*counter, *key)))) == result
    c0, c1, c2, c3 = (torch.tensor([x]) for x in counter)
    assert tuple(int(w) for w in philox_torch(c0, c1, c2, c3, *key)) == result


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (3, 9), (ALL, ALL)])
def test_the_same_bits_from_numpy_numba_and_torch(seed, epoch):
    key = Key(seed, epoch, IDS).fold("x1")
    tag = key.tag("hue")
    expected = torch.tensor([reference.stream(seed, epoch, i, tag, 12) for i in IDS])
    assert torch.equal(key.words("hue", 3), expected)  # numba
    assert torch.equal(words_torch(key.ids, tag, 0, 3, seed, epoch), expected)
    low, high = np.array(IDS) & ALL, (np.array(IDS) >> 32) & ALL
    counters = np.stack([np.stack(np.broadcast_arrays(low, high, tag, block), -1) for block in range(3)], 1)
    assert np.array_equal(philox_numpy(counters, [seed, epoch]).reshape(len(IDS), 12), expected.numpy())
    floats = key.uniform("hue", 11)
    assert floats.dtype == torch.float32
    assert torch.equal(floats, ((expected >> 8).double() / 2**24).float()[:, :11])


def test_tag_is_blake2b_of_path_and_stream():
    assert Key(0, 0, [1]).tag("order") == int.from_bytes(hashlib.blake2b(b"order").digest()[:4], "little")
    name = hashlib.blake2b(b"x1/blur/sigma").digest()[:4]
    assert Key(0, 0, [1]).fold("x1").fold("blur").tag("sigma") == int.from_bytes(name, "little")


def test_a_draw_depends_on_nothing_but_its_own_id():
    ids = torch.arange(100) * 977
    all_of_them = Key(5, 2, ids).uniform("s", 7)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Key(5, 2, ids[order]).uniform("s", 7), all_of_them[order])
    assert torch.equal(Key(5, 2, ids)[10:13].uniform("s", 7), all_of_them[10:13])
    assert torch.equal(Key(5, 2, ids)[4].uniform("s", 7), all_of_them[4:5])
    assert torch.equal(Key(5, 2, ids)[order].uniform("s", 7), all_of_them[order])


@pytest.mark.parametrize("n", range(10))
def test_fewer_numbers_are_a_prefix(n):
    key = Key(0, 1, IDS)
    assert torch.equal(key.uniform("s", n), key.uniform("s", 10)[:, :n])
    assert torch.equal(key.integers("s", n, 9), key.integers("s", 10, 9)[:, :n])


def test_later_blocks_continue_a_stream():
    key = Key(0, 1, IDS)
    assert torch.equal(key.words("s", 2, start=3), key.words("s", 5)[:, 12:])
    assert torch.equal(words_torch(key.ids, key.tag("s"), 3, 2, 0, 1), key.words("s", 5)[:, 12:])


def test_folds_nest_do_not_commute_and_survive_the_epoch():
    key = Key(0, 0, range(50))
    ab, ba = key.fold("a").fold("b"), key.fold("b").fold("a")
    assert not (ab.uniform("s", 4) == ba.uniform("s", 4)).any()
    assert torch.equal(ab.at_epoch(3).uniform("s", 4), Key(0, 3, range(50)).fold("a").fold("b").uniform("s", 4))
    assert torch.equal(ab.uniform("s", 4), key.fold("a").fold("b").uniform("s", 4))
    assert not (key.at_epoch(1).uniform("s", 4) == key.uniform("s", 4)).any()


def test_two_folds_are_uncorrelated_over_10000_ids():
    key = Key(1, 0, range(10_000))
    draws = [key.fold(name).uniform("s", 1)[:, 0].double() for name in ("x1", "x2", "x3")]
    draws += [key.uniform("s", 1)[:, 0].double(), key.at_epoch(1).uniform("s", 1)[:, 0].double()]
    correlation = torch.corrcoef(torch.stack(draws)) - torch.eye(5, dtype=torch.float64)
    assert correlation.abs().max() < 0.05  # five standard deviations


def test_uniform_is_uniform():
    draws = Key(2, 0, range(10_000)).uniform("s", 9)
    assert draws.min() >= 0
    assert draws.max() < 1
    assert stats.kstest(draws.flatten().numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("n", [1, 2, 3, 7, 1000])
def test_integers_favour_no_number(n):
    draws = Key(2, 0, range(5_000)).integers("s", 9, n)
    counts = torch.bincount(draws.flatten(), minlength=n)
    assert len(counts) == n
    assert n == 1 or stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_integers_have_no_modulo_bias_where_32_bits_would():
    n = 3 * 2**29  # 2^32 is no multiple: a remainder would put half of all draws into the lowest third
    draws = Key(2, 0, range(20_000)).integers("s", 3, n)
    share = (draws < 2**29).double().mean()
    assert abs(share - 1 / 3) < 0.01


def test_integers_take_a_bound_per_row_and_number():
    bounds = torch.tensor([[1], [5], [2**31]])
    key = Key(0, 0, [4, 5, 6])
    draws = key.integers("s", 50, bounds)
    assert (draws < bounds).all()
    assert draws[2].max() > 2**29
    assert torch.equal(draws[1:2], key[1].integers("s", 50, 5))


@pytest.mark.parametrize("n", [2**31 - 1, 2**31, 1000, 3])
def test_integers_use_all_64_bits(n):
    key = Key(0, 0, range(200))
    words = words_torch(key.ids, key.tag("s"), 0, 50, 0, 0)
    expected = [[reference.below(row[2 * i], row[2 * i + 1], n) for i in range(100)] for row in words.tolist()]
    assert key.integers("s", 100, n).tolist() == expected
    high, low = words[0, 0::2].tolist(), words[0, 1::2].tolist()
    jitted = [int(kernels.below(np.uint64(a), np.uint64(b), n)) for a, b in zip(high, low, strict=True)]
    assert jitted == expected[0]


def test_one_row_may_be_any_whole_number():
    key = Key(0, 0, [4, 5, 6])
    for row in (1, np.int64(1), torch.tensor(1), -2):
        assert key[row].ids.tolist() == [5]
    with pytest.raises(IndexError, match=r"Key: row must be in \[-3, 2\], got 3"):
        key[3]


def test_folds_cannot_be_mistaken_for_paths(our_errors):
    for name in ("a/b", ""):
        with pytest.raises(ValueError, match=r"Key\.fold: name must be not empty and without '/'"):
            Key(0, 0, [1]).fold(name)


def test_empty_batch():
    key = Key(0, 0, [])
    assert key.uniform("s", 3).shape == (0, 3)
    assert key.integers("s", 3, 4).shape == (0, 3)
    assert Key(0, 0, torch.zeros(0, dtype=torch.int64)).uniform("s", 0).shape == (0, 0)


@pytest.mark.parametrize("ids", [np.arange(3, dtype=np.int32), range(3), torch.arange(3), [0, 1, 2]])
def test_ids_may_be_any_integers(ids):
    assert torch.equal(Key(0, 0, ids).uniform("s", 2), Key(0, 0, [0, 1, 2]).uniform("s", 2))


@pytest.mark.parametrize("ids", [[0.5], torch.zeros(2), [True], np.zeros(2), np.zeros(2, dtype=np.uint64)])
def test_ids_that_are_not_integers(our_errors, ids):
    with pytest.raises(TypeError, match="Key: ids must"):
        Key(0, 0, ids)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Key(-1, 0, [1]), r"Key: seed must be an integer in \[0, 4294967295\], got -1"),
        (lambda: Key(0, 2**32, [1]), "Key: epoch must be"),
        (lambda: Key(0, 0, [[1]]), r"Key: ids must be one axis \[B\], got int64 \[1, 1\]"),
        (lambda: Key(0, 0, [1]).uniform("s", -1), "Key.uniform: n must"),
        (lambda: Key(0, 0, [1]).integers("s", 1, 0), "Key.integers: high must"),
        (lambda: Key(0, 0, [1]).integers("s", 1, torch.tensor([[0]])), "Key.integers: high must"),
    ],
)
def test_bad_input(our_errors, make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_types(our_errors):
    with pytest.raises(TypeError, match=r"Key: seed must be an integer, got 0\.5"):
        Key(0.5, 0, [1])
    with pytest.raises(TypeError, match=r"Key\.fold: name must be a string, got 3"):
        Key(0, 0, [1]).fold(3)


ROWS = [slice(1, 3), slice(None, None, 2), [2, 0], 1, torch.tensor([0, 2])]


@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_a_key_sent_away_remembers_the_host(rows):
    key = Key(7, 3, IDS)
    away = key.to("meta")
    assert away.ids.device.type == away.uniform("s", 9).device.type == away.words("s", 3).device.type == "meta"
    pairs = [(away, key), (away.fold("x"), key.fold("x")), (away.at_epoch(4), key.at_epoch(4)), (away[rows], key[rows])]
    pairs.append((away.fold("x")[rows].at_epoch(5).to("meta"), key.fold("x")[rows].at_epoch(5)))
    for there, here in pairs:
        assert there.ids.device.type == "meta"
        assert torch.equal(there.host.ids, here.ids)
        assert there.host.ids.is_contiguous()  # else numba would compile its kernels again
        assert torch.equal(there.host.uniform("s", 9), here.uniform("s", 9))
    assert key.host is key


def test_few_numbers_are_drawn_on_the_host_and_sent_and_many_where_the_key_is(monkeypatch):
    def drawn_there(*arguments):
        raise RuntimeError("drawn on the device")

    key = Key(7, 3, IDS).fold("x")
    away, most = key.to("meta"), module._FEW // len(IDS)
    monkeypatch.setattr(module.checks, "sent", lambda x, device: x)
    monkeypatch.setattr(module, "words_torch", drawn_there)
    assert torch.equal(away.uniform("s", 9), key.uniform("s", 9))
    assert torch.equal(away.words("s", 5, start=2), key.words("s", 5, start=2))
    assert torch.equal(away.integers("s", 9, 77), key.integers("s", 9, 77))
    assert torch.equal(away.uniform("s", most), key.uniform("s", most))
    for many in (lambda: away.uniform("s", most + 1), lambda: away.words("s", most // 4 + 1)):
        with pytest.raises(RuntimeError, match="drawn on the device"):
            many()
    with pytest.raises(RuntimeError, match="drawn on the device"):  # a key that was made there
        Key(7, 3, torch.empty(3, dtype=torch.int64, device="meta")).uniform("s", 9)


def test_a_key_comes_back_without_asking_the_device():
    key = Key(7, 3, IDS)
    back = key.to("meta").fold("x").to("cpu")  # whose ids cannot be copied from there
    assert torch.equal(back.uniform("s", 9), key.fold("x").uniform("s", 9))
    assert back.host is back


def test_rows_named_on_the_device_are_not_known_on_the_host():
    away = Key(7, 3, IDS).to("meta")
    some = away[torch.tensor([0, 2], device="meta")]
    assert some.host is some


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_same_bits_on_a_gpu():
    key = Key(7, 3, IDS)
    for there in (key.to("cuda"), Key(7, 3, key.ids.cuda())):  # drawn on the host and sent, and drawn there
        assert torch.equal(there.uniform("s", 9).cpu(), key.uniform("s", 9))
        assert torch.equal(there.integers("s", 9, 77).cpu(), key.integers("s", 9, 77))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_what_is_drawn_on_the_host_is_sent_without_waiting():
    there = Key(7, 3, IDS).to("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        there.uniform("s", 9)
        there.integers("s", 9, 77)
    finally:
        torch.cuda.set_sync_debug_mode("default")

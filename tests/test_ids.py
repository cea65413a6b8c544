import hashlib

import pytest

from geoaug import sample_id, sample_ids
from geoaug.geometry import ids as module


def test_an_id_is_eight_bytes_of_blake2b_without_the_sign():
    for name in ("a.jpg", "train/n01440764/n01440764_10026.JPEG", "ü.png"):
        digest = hashlib.blake2b(name.encode()).digest()
        assert sample_id(name) == int.from_bytes(digest[:8], "little") % 2**63


def test_ids_of_a_source_keep_its_order():
    names = [f"{i}.jpg" for i in range(1000)]
    ids = sample_ids(names)
    assert ids.tolist() == [sample_id(name) for name in names]
    assert (ids >= 0).all()
    assert sample_ids([]).shape == (0,)


def test_file_names_that_are_not_unicode_have_ids():
    assert sample_id(b"\xff.jpg".decode("utf-8", "surrogateescape")) >= 0


def test_two_names_with_one_id_are_refused(monkeypatch):
    monkeypatch.setattr(module, "sample_id", lambda name: 5)
    with pytest.raises(ValueError, match=r"different ids, got 'b\.jpg' and 'a\.jpg' with 5"):
        sample_ids(["a.jpg", "b.jpg"])


def test_a_name_listed_twice_is_refused():
    with pytest.raises(ValueError, match=r"names must differ, got 'a\.jpg' twice"):
        sample_ids(["a.jpg", "b.jpg", "a.jpg"])


@pytest.mark.parametrize("name", ["", 3, None])
def test_bad_names(our_errors, name):
    with pytest.raises(TypeError, match="sample_id: name must be a non-empty string"):
        sample_id(name)

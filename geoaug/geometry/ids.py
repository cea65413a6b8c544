"""Sample ids: one number per image, from its name alone, the same for every kind of source."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from jaxtyping import Int64
from torch import Tensor

_NON_NEGATIVE = 2**63 - 1


def sample_id(name: str) -> int:
    """The first 8 bytes (little-endian) of BLAKE2b of a file name relative to its root, without the sign bit.

    The name is in POSIX form and with its extension, as a folder, a list or a COCO json gives it.

    >>> sample_id("train/cat.jpg") == sample_id("train/cat.png")
    False
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"sample_id: name must be a non-empty string, got {name!r}")
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "little") & _NON_NEGATIVE


def sample_ids(names: Iterable[str]) -> Int64[Tensor, " N"]:
    """The ids of all images of a source; a name listed twice, or two names with one id, is refused.

    >>> sample_ids(["a.jpg", "b.jpg"]).shape
    torch.Size([2])
    """
    seen: dict[int, str] = {}
    for name in names:
        identity = sample_id(name)
        if identity in seen:
            other = seen[identity]
            if other == name:
                raise ValueError(f"sample_ids: names must differ, got {name!r} twice")
            raise ValueError(f"sample_ids: names must have different ids, got {name!r} and {other!r} with {identity}")
        seen[identity] = name
    return torch.tensor(list(seen), dtype=torch.int64)

"""What `selective_search.py` does with its images: find them, and read, search and filter each, in any process."""

import functools
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from geoaug.inspection import sizes_of
from geoaug.loading.beton import Beton
from geoaug.loading.decode import ReadError, decode_jpeg, read_image
from geoaug.loading.source import open_source
from geoaug.proposals import select
from geoaug.proposals.selective_search import selective_search
from geoaug.proposals.shard_files import encode_shard

Boxes = npt.NDArray[np.uint16]
Sized = tuple[tuple[int, int], Boxes]  # (height, width) of the source, boxes in its pixels

_COMPAT = {"mode": "compat", "scale": 300.0, "sigma": 0.9, "min_size": 100, "max_side": 1024}
# What each preset asks of `selective_search`, and whether SoCo's filter follows.
PRESETS: dict[str, tuple[dict[str, Any], bool]] = {
    "d3ssl": ({**_COMPAT, "texture": "package"}, True),
    "soco": ({**_COMPAT, "texture": "soco"}, True),
    "strategies": ({**_COMPAT, "mode": "strategies", "strategies": "fast"}, False),
}


class Images(NamedTuple):
    """Images by name, what a process needs to find each, and by kind what was wrong while listing them."""

    names: Sequence[str]
    items: Sequence[Any]  # a path, or (path of a .beton, row)
    problems: dict[str, list[str]]


def open_images(path: Path, images: Path | None) -> Images:
    """The images of a folder, a list, a COCO json or a .beton."""
    if path.suffix == ".beton":
        if images is not None:
            raise ValueError("--images is not for a .beton: it holds its images")
        beton = Beton.open(path)
        return Images(beton.names, [(str(path.absolute()), row) for row in range(len(beton))], {})
    source = open_source(path, images)
    root = source.root.absolute()
    return Images(source.names, [str(root / name) for name in source.names], source.problems)


def sizes_by_name(path: Path, images: Path | None) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """(height, width) of each image, from a .beton, a json or the files' headers; names that could not be read."""
    if path.suffix == ".beton":
        beton = Beton.open(path)
        names, sizes, failed = beton.names, beton.sizes, list[str]()
    else:
        found, failed, source = sizes_of(path, images)
        names, sizes = source.names, found
    by_name = {name: (height, width) for name, (height, width) in zip(names, sizes.tolist(), strict=True)}
    return {name: size for name, size in by_name.items() if size != (0, 0)}, failed


def propose(item: Any, *, search: dict[str, Any], soco_filter: bool) -> Sized:
    """Size and boxes of one image; a preset's boxes are distinct, the first of each kept, and then filtered."""
    pixels, size = _read(item)
    if max(size) >= 2**16:
        raise ReadError("too large", f"{size[1]} x {size[0]} pixels, boxes go up to 65535")
    boxes = in_source(selective_search(pixels, **search), (pixels.shape[0], pixels.shape[1]), size)
    boxes = select.distinct(boxes)
    return size, select.soco_filter(boxes, size) if soco_filter else boxes


def _read(item: Any) -> tuple[npt.NDArray[np.uint8], tuple[int, int]]:
    """Pixels to search, and the (height, width) of their source, which a .beton may hold made smaller."""
    if isinstance(item, str):
        pixels = read_image(Path(item))[0].numpy()
        return pixels, (pixels.shape[0], pixels.shape[1])
    path, row = item
    beton = _opened(path)
    jpeg = beton.jpeg(row).tobytes()
    if zlib.crc32(jpeg) != beton.crcs[row]:
        raise ReadError("crc", "its JPEG is not as it was written")
    height, width = beton.sizes[row].tolist()
    return decode_jpeg(jpeg, True).numpy(), (height, width)


@functools.lru_cache(maxsize=1)
def _opened(path: str) -> Beton:
    return Beton.open(path)


def in_source(boxes: Boxes, size: tuple[int, int], source: tuple[int, int]) -> Boxes:
    """Boxes of an image of `size` in pixels of the `source` it was resized from, rounded outwards.

    >>> in_source(np.array([[1, 1, 3, 2]], dtype=np.uint16), (2, 4), (3, 10)).tolist()
    [[2, 1, 8, 3]]
    """
    if size == source:
        return boxes
    edges = boxes.astype(np.int64) * [source[1], source[0], source[1], source[0]]
    sides = np.array([size[1], size[0]])
    return np.concatenate((edges[:, :2] // sides, -(-edges[:, 2:] // sides)), axis=1).astype(np.uint16)


def encode(rows: list[tuple[str, Sized]]) -> tuple[bytes, dict[str, Any]]:
    """A shard of a store, and its counts."""
    data, counts = encode_shard([(name, size, boxes) for name, (size, boxes) in rows])
    empty = sum(len(boxes) == 0 for _, (_, boxes) in rows)
    return data, {**counts, "without_boxes": empty}


def work_of(search: dict[str, Any], soco_filter: bool) -> Callable[[Any], Sized]:
    """`propose` with its parameters, as processes are sent it."""
    return functools.partial(propose, search=search, soco_filter=soco_filter)

"""COCO segmentations to label maps of the source frame, read at the cell centres of any size."""

from __future__ import annotations

import marshal
from typing import Any

import numpy as np
import numpy.typing as npt

_FAR = 10  # a polygon may leave its image by so many of its sides; tracing one that goes further takes the memory


class MaskError(ValueError):
    """A segmentation that is no mask of its image; the message says why."""


def pack(segmentation: Any) -> bytes:
    """A segmentation as it stands in a json in about a quarter of the memory, for `label_map_of`; b"" for none."""
    return marshal.dumps(segmentation, 2) if segmentation else b""


def label_map_of(
    segmentations: list[bytes], labels: npt.NDArray[np.int64], size: tuple[int, int], source_size: tuple[int, int]
) -> npt.NDArray[np.int64]:
    """Labels int64 [h, w] nearest to each cell centre of the source; -1 where no object lies.

    Where objects overlap the smaller one lies on top, since a part is smaller than what it is part of. Raises MaskError
    where a segmentation, packed by `pack`, is no mask of an image of source_size.
    """
    height, width = source_size
    rows = ((np.arange(size[0]) + 0.5) * height / size[0]).astype(np.int64)
    columns = ((np.arange(size[1]) + 0.5) * width / size[1]).astype(np.int64)
    drawn = [
        (mask.sum(), label, mask[rows[:, None], columns])
        for packed, label in zip(segmentations, labels.tolist(), strict=True)
        if packed
        for mask in [_mask(marshal.loads(packed), height, width)]
    ]
    result = np.full(size, -1, dtype=np.int64)
    for _, label, mask in sorted(drawn, key=lambda entry: -int(entry[0])):
        result[mask.astype(bool)] = label
    return result


def _mask(segmentation: Any, height: int, width: int) -> npt.NDArray[np.uint8]:
    if isinstance(segmentation, list):
        return _of_polygons(segmentation, height, width)
    if not isinstance(segmentation, dict) or "counts" not in segmentation:
        raise MaskError("mask is neither polygons nor run lengths")
    if segmentation.get("size") != [height, width]:
        raise MaskError(f"mask is of [{height}, {width}] by its image, of {segmentation.get('size')} by itself")
    counts = segmentation["counts"]
    runs = _runs_of_text(counts) if isinstance(counts, str) else _numbers(counts, "run lengths")
    pixels = height * width
    if not ((runs >= 0) & (runs <= pixels) & (runs % 1 == 0)).all() or runs.sum() != pixels:
        raise MaskError(f"mask has run lengths that do not add up to its {pixels} pixels")
    values = (np.arange(len(runs)) & 1).astype(np.uint8)  # columns first, and the first run is outside
    return np.repeat(values, runs.astype(np.int64)).reshape(width, height).T


def _numbers(values: Any, what: str) -> npt.NDArray[np.float64]:
    try:
        numbers = np.array(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise MaskError(f"mask has {what} that are no numbers") from None
    if numbers.ndim != 1 or not np.isfinite(numbers).all():
        raise MaskError(f"mask has {what} that are no numbers")
    return numbers


def _of_polygons(polygons: list[Any], height: int, width: int) -> npt.NDArray[np.uint8]:
    try:
        from pycocotools import mask as coco
    except ImportError:
        raise ImportError("open_loader: label_map needs pycocotools: pip install 'geoaug[prep]'") from None
    if not all(isinstance(polygon, list) for polygon in polygons):
        raise MaskError("mask has polygons that are no lists of numbers")
    corners = [_numbers(polygon, "polygons") for polygon in polygons if len(polygon) >= 6]
    if not corners:
        raise MaskError("mask has no polygon of three corners or more")
    if max(np.abs(polygon).max() for polygon in corners) > _FAR * max(height, width):
        raise MaskError(f"mask has polygons that leave their image by more than {_FAR} times its size")
    mask: npt.NDArray[np.uint8] = coco.decode(coco.merge(coco.frPyObjects(corners, height, width)))
    return mask


def _runs_of_text(text: str) -> npt.NDArray[np.int64]:
    """COCO's compressed run lengths: 5 bits a character, each run from the third on as the difference to two before.

    Not by pycocotools, which reads beyond the end of a text that was cut.
    """
    codes = np.frombuffer(text.encode("utf-8", "surrogatepass"), dtype=np.uint8).astype(np.int64) - 48
    if not len(codes) or ((codes < 0) | (codes > 63)).any() or codes[-1] & 32:
        raise MaskError("mask has run lengths that are no text of COCO's")
    last = (codes & 32) == 0  # of its run
    starts = np.concatenate(([0], np.flatnonzero(last)[:-1] + 1))
    lengths = np.diff(np.append(starts, len(codes)))
    if lengths.max() > 7:
        raise MaskError("mask has run lengths that are no text of COCO's")
    shifts = 5 * (np.arange(len(codes)) - np.repeat(starts, lengths))
    runs = np.add.reduceat((codes & 31) << shifts, starts)
    runs -= np.where(codes[last] & 16, np.int64(1) << (5 * lengths), 0)
    runs[1::2], runs[2::2] = np.cumsum(runs[1::2]), np.cumsum(runs[2::2])
    return runs

"""COCO segmentations to label maps of the source frame, read at the cell centres of any size."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def _mask(segmentation: Any, height: int, width: int) -> npt.NDArray[np.uint8]:
    try:
        from pycocotools import mask as coco
    except ImportError:
        raise ImportError("open_loader: label_map needs pycocotools: pip install 'geoaug[prep]'") from None
    if isinstance(segmentation, list):  # polygons
        rle = coco.merge(coco.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        rle = coco.frPyObjects(segmentation, height, width)
    else:
        rle = segmentation
    mask: npt.NDArray[np.uint8] = coco.decode(rle)
    return mask


def label_map_of(
    segmentations: list[Any], labels: npt.NDArray[np.int64], size: tuple[int, int], source_size: tuple[int, int]
) -> npt.NDArray[np.int64]:
    """Labels int64 [h, w] nearest to each cell centre of the source; -1 where no object lies.

    Where objects overlap the smaller one lies on top, since a part is smaller than what it is part of.
    """
    height, width = source_size
    rows = ((np.arange(size[0]) + 0.5) * height / size[0]).astype(np.int64)
    columns = ((np.arange(size[1]) + 0.5) * width / size[1]).astype(np.int64)
    drawn = [
        (mask.sum(), label, mask[rows[:, None], columns])
        for segmentation, label in zip(segmentations, labels.tolist(), strict=True)
        if segmentation
        for mask in [_mask(segmentation, height, width)]
    ]
    result = np.full(size, -1, dtype=np.int64)
    for _, label, mask in sorted(drawn, key=lambda entry: -int(entry[0])):
        result[mask.astype(bool)] = label
    return result

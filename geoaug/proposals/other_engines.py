"""Selective search by other packages, where they are installed: the PyPI package and OpenCV's contrib module."""

from __future__ import annotations

import warnings

import numpy as np
import numpy.typing as npt

from ..geometry import checks

Boxes = npt.NDArray[np.uint16]
Image = npt.NDArray[np.uint8]


def _edges(rects: npt.NDArray[np.int64], one: int) -> Boxes:
    """Boxes from (x, y, width, height) rects whose sides are `one` pixel short."""
    x, y, width, height = rects.reshape(-1, 4).T
    return np.stack((x, y, x + width + one, y + height + one), axis=1).astype(np.uint16)


def selectivesearch_boxes(image: Image, scale: float, sigma: float, min_size: int) -> Boxes:
    """Boxes uint16 [n, 4] of the PyPI package `selectivesearch`, in its order."""
    try:
        import selectivesearch
    except ImportError:
        message = "selective_search: engine='selectivesearch' needs that package: pip install 'geoaug[peers]'"
        raise ImportError(message) from None
    with warnings.catch_warnings():  # scikit-image warns of binary patterns of floats; the package's doing
        warnings.simplefilter("ignore")
        _, regions = selectivesearch.selective_search(image, scale=scale, sigma=sigma, min_size=min_size)
    return _edges(np.array([region["rect"] for region in regions], dtype=np.int64), 1)


def opencv_boxes(image: Image, scale: float, sigma: float, min_size: int, strategies: str) -> Boxes:
    """Boxes uint16 [n, 4] of OpenCV's contrib module, at its own scales where `scale` is 300: 200, or from 150 on."""
    checks.require(min_size == 100, "selective_search", "min_size", "100 for engine='opencv'", min_size)
    try:
        from cv2.ximgproc import segmentation
    except ImportError:
        message = "selective_search: engine='opencv' needs OpenCV's contrib wheel: pip install opencv-contrib-python"
        raise ImportError(message) from None
    search = segmentation.createSelectiveSearchSegmentation()
    search.setBaseImage(np.ascontiguousarray(image[:, :, ::-1]))
    if strategies == "single":
        search.switchToSingleStrategy(round(scale * 2 / 3), sigma)
    elif strategies == "fast":
        search.switchToSelectiveSearchFast(round(scale / 2), round(scale / 2), sigma)
    else:
        search.switchToSelectiveSearchQuality(round(scale / 2), round(scale / 2), sigma)
    return _edges(np.asarray(search.process(), dtype=np.int64), 0)

"""LC-loss: each cell of one view must find its place in the other view among all places there."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from ..geometry import checks
from .readout import sample_points
from .vectors import SHORT, unit, wide


def _check(target_map: object, online_map: object, points: object, where: str) -> tuple[Tensor, Tensor, Tensor]:
    ok = isinstance(target_map, Tensor) and target_map.ndim == 4 and target_map.is_floating_point()
    checks.require(ok, where, "target_map", "a floating map [B, D, h, w]", checks.shape_of(target_map))
    assert isinstance(target_map, Tensor)
    ok = isinstance(online_map, Tensor) and online_map.ndim == 4 and online_map.is_floating_point()
    ok = ok and online_map.shape[:2] == target_map.shape[:2] and min(online_map.shape[2:]) > 0  # type: ignore[attr-defined]
    expected = f"a floating map {list(target_map.shape[:2])} of one cell or more"
    checks.require(ok, where, "online_map", expected, checks.shape_of(online_map))
    assert isinstance(online_map, Tensor)
    batch, count = len(target_map), target_map.shape[2] * target_map.shape[3]
    expected = f"floating points [{batch}, {count}, 2], one for each cell of target_map"
    points = checks.floats(points, 2, where, "points", expected)
    checks.require(points.shape == (batch, count, 2), where, "points", expected, checks.shape_of(points))
    return target_map, online_map, points


def _corners(points: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Indices [B, P, 4] of the cells around each point, row by row, and their bilinear weights; the border's beyond."""
    u, v = ((points[..., i] * n - 0.5).clamp(0, n - 1) for i, n in enumerate((width, height)))
    left, top = u.long(), v.long()  # towards zero, and so downwards
    right, bottom = (left + 1).clamp(max=width - 1), (top + 1).clamp(max=height - 1)
    a, b = u - left, v - top
    cells = torch.stack((top * width + left, top * width + right, bottom * width + left, bottom * width + right), -1)
    return cells, torch.stack(((1 - a) * (1 - b), a * (1 - b), (1 - a) * b, a * b), -1)


def local_contrastive(
    target_map: Float[Tensor, "B D h w"],
    online_map: Float[Tensor, "B D _ _"],
    points: Float[Tensor, "B cells 2"],
    *,
    temperature: float,
) -> Float[Tensor, "B cells"]:
    """The negative log-likelihood of each target cell's place among all cells of the online map (LC-loss, eq. 2 to 4).

    `points`, in unit coordinates of the online view, say where the cells lie there, as `correspond` gives them with the
    valid ones. Between cell centres the map of negative log-likelihoods is read bilinearly, which is cross-entropy with
    four soft labels: no map is ever warped, and beside the maps (and, of half precision, their float32 copies) the
    largest tensor is [B, h*w, h*w]. target_map is detached. The least value is the labels' entropy, 0 to log 4.

    >>> target, online = torch.rand(2, 256, 7, 7), torch.rand(2, 256, 7, 7)
    >>> points, valid = correspond(AxisAffine.identity(2), AxisAffine.identity(2), (7, 7))
    >>> local_contrastive(target, online, points, temperature=0.1).shape
    torch.Size([2, 49])
    """
    where = "local_contrastive"
    target, online, points = _check(target_map, online_map, points, where)
    checks.require(0 < temperature < math.inf, where, "temperature", "positive and finite", temperature)
    height, width = online.shape[2:]
    with torch.autocast(online.device.type, enabled=False):
        t, o = (wide(x).flatten(2) for x in (target.detach(), online))  # [B, D, h*w]
        # Lengths are divided out of the products, not of the vectors, which are five times as many numbers.
        rows, columns = (torch.linalg.vector_norm(x, dim=1).clamp_min(SHORT) for x in (t, o))
        logits = (t.mT @ o) / (rows * temperature)[:, :, None] / columns[:, None, :]  # [B, cells, h*w]
        cells, weights = _corners(points.to(logits.dtype), height, width)
        values: Tensor = logits.logsumexp(-1) - (logits.gather(2, cells) * weights).sum(-1)
        return values


def local_regression(
    target_map: Float[Tensor, "B D h w"], online_map: Float[Tensor, "B D _ _"], points: Float[Tensor, "B cells 2"]
) -> Float[Tensor, "B cells"]:
    """2 - 2 cos of each target cell and the online vector at its point: the loss without contrast of LC-loss's Table 6.

    >>> local_regression(torch.rand(2, 256, 7, 7), torch.rand(2, 256, 7, 7), torch.rand(2, 49, 2)).shape
    torch.Size([2, 49])
    """
    target, online, points = _check(target_map, online_map, points, "local_regression")
    with torch.autocast(online.device.type, enabled=False):
        read = unit(sample_points(wide(online), points))  # [B, cells, D]
        return 2 - 2 * (read * unit(target.detach().flatten(2).mT)).sum(-1)

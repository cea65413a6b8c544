"""LC-loss in loops over float64 numbers, one image at a time: maps are nested lists [D][h][w], points (x, y)."""

import math


def unit(vector):
    length = math.sqrt(sum(v * v for v in vector))
    return [v / length for v in vector]


def cells(maps):
    """The vectors of a map, row by row."""
    return [[plane[y][x] for plane in maps] for y in range(len(maps[0])) for x in range(len(maps[0][0]))]


def bilinear(point, height, width):
    """Cell -> weight of the at most four cells around a point; beyond the outermost centres, the border's."""
    weights = {}
    u, v = (min(max(p * n - 0.5, 0.0), n - 1.0) for p, n in zip(point, (width, height), strict=True))
    for y in range(height):
        for x in range(width):
            share = max(0.0, 1 - abs(u - x)) * max(0.0, 1 - abs(v - y))
            if share > 0:
                weights[y * width + x] = share
    return weights


def nll_map(row, online, temperature):
    """-log softmax over the cells of the online map, of one cell of the target (eq. 2 and 3)."""
    a = unit(row)
    logits = [sum(x * y for x, y in zip(a, unit(b), strict=True)) / temperature for b in cells(online)]
    most = max(logits)
    total = most + math.log(sum(math.exp(x - most) for x in logits))
    return [total - x for x in logits]


def local_contrastive(target, online, points, temperature):
    """The NLL map of each target cell, read at the point where the cell lies in the online view."""
    height, width = len(online[0]), len(online[0][0])
    losses = []
    for row, point in zip(cells(target), points, strict=True):
        nll = nll_map(row, online, temperature)
        losses.append(sum(share * nll[cell] for cell, share in bilinear(point, height, width).items()))
    return losses


def local_regression(target, online, points):
    """2 - 2 cos of each target cell and of the online map's vector at its point."""
    height, width = len(online[0]), len(online[0][0])
    losses = []
    for row, point in zip(cells(target), points, strict=True):
        keys = cells(online)
        read = [0.0] * len(row)
        for cell, share in bilinear(point, height, width).items():
            read = [r + share * k for r, k in zip(read, keys[cell], strict=True)]
        losses.append(2 - 2 * sum(x * y for x, y in zip(unit(row), unit(read), strict=True)))
    return losses

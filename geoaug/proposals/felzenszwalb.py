"""Felzenszwalb and Huttenlocher's graph segmentation (IJCV 2004), with the labels of scikit-image's.

Every float operation is done in scikit-image's order and in float64, so that the costs are its costs to the last bit.
Edges of one cost are taken by edge index: horizontal, vertical, down-right, up-right, each in raster order.

No annotations here: numba reads the types, and a checker between `njit` and the function would stop it. Numba's cache
does not see a change in another file: after an edit here, delete `__pycache__`.
"""

import math

import numpy as np
from numba import njit

_BUCKETS = 2048  # 32 octaves of 64 steps: the upper bits of a cost's binary logarithm
_LOWEST = 992 << 6  # costs from 2^-31 on; smaller ones share the first bucket and are put right by the exact sort
_TWO, _THREE = np.uint32(2), np.uint32(3)
_BLOCK = 2048  # edges tested together for being inside one region already


@njit(cache=True, nogil=True)
def _distances(planes, y, x, by, bx, n, out):
    """out[i] <- distance of the colours of the i-th pixels from (y, x) and (by, bx) on."""
    if planes.shape[0] == 1:
        a, b = planes[0, y, x:], planes[0, by, bx:]
        for i in range(n):
            out[i] = math.sqrt((a[i] - b[i]) * (a[i] - b[i]))
        return
    a0, a1, a2 = planes[0, y, x:], planes[1, y, x:], planes[2, y, x:]
    b0, b1, b2 = planes[0, by, bx:], planes[1, by, bx:], planes[2, by, bx:]
    for i in range(n):
        d0, d1, d2 = a0[i] - b0[i], a1[i] - b1[i], a2[i] - b2[i]
        out[i] = math.sqrt(d0 * d0 + d1 * d1 + d2 * d2)


@njit(cache=True, nogil=True, inline="always")
def _bucket(bits):
    return min(max((bits >> 46) - _LOWEST, 0), _BUCKETS - 1)


@njit(cache=True, nogil=True)
def _deal(planes, costs, sorted_costs, sorted_names, starts):
    """Costs of the 8-neighbourhood, dealt into buckets; the number of edges.

    An edge's name is 4 * pixel + direction. `starts` int64 [2049] bounds the buckets; within one, edges lie by index.
    """
    _, height, width = planes.shape
    bits, counts = costs.view(np.int64), np.zeros(_BUCKETS, np.int64)
    for y in range(height):
        for direction in range(4):
            n, below = width - (direction != 1), direction > 0
            if y + below == height or n == 0:
                continue
            right, left = direction == 3, direction == 0 or direction == 2
            _distances(planes, y, int(right), y + below, int(left), n, costs[direction, y])
            row = bits[direction, y]
            for x in range(n):
                counts[_bucket(row[x])] += 1
    starts[0] = 0
    for b in range(_BUCKETS):
        starts[b + 1] = starts[b] + counts[b]
        counts[b] = starts[b]
    for direction in range(4):
        n = width - (direction != 1)
        for y in range(height - (direction > 0)):
            row, costs_row, name = bits[direction, y], costs[direction, y], 4 * y * width + direction
            for x in range(n):
                b = _bucket(row[x])
                at = counts[b]
                counts[b] = at + 1
                sorted_costs[at] = costs_row[x]
                sorted_names[at] = name + 4 * x
    return starts[_BUCKETS]


@njit(cache=True, nogil=True)
def _merge_sort(costs, names, spare_costs, spare_names):
    """Stable sort of costs and names [n]; the spare arrays are as long."""
    n, step = costs.shape[0], 1
    while step < n:
        for start in range(0, n, 2 * step):
            middle, end = min(start + step, n), min(start + 2 * step, n)
            i, j = start, middle
            for at in range(start, end):
                if j >= end or (i < middle and costs[i] <= costs[j]):
                    spare_costs[at], spare_names[at] = costs[i], names[i]
                    i += 1
                else:
                    spare_costs[at], spare_names[at] = costs[j], names[j]
                    j += 1
        costs[:] = spare_costs
        names[:] = spare_names
        step *= 2


@njit(cache=True, nogil=True)
def _sort(costs, names, out_costs, out_names, counts):
    """Stable sort of one bucket [n] into `out`: by the next bits first, then exactly; `counts` int64 [>= 2^14]."""
    n = costs.shape[0]
    width = 6
    while width < 14 and (1 << width) < 2 * n:
        width += 1
    bits, shift, mask = costs.view(np.int64), 46 - width, (1 << width) - 1
    counts[: mask + 1] = 0
    for i in range(n):
        counts[(bits[i] >> shift) & mask] += 1
    total = 0
    for k in range(mask + 1):
        count = counts[k]
        counts[k] = total
        total += count
    for i in range(n):
        k = (bits[i] >> shift) & mask
        at = counts[k]
        counts[k] = at + 1
        out_costs[at] = costs[i]
        out_names[at] = names[i]
    budget = 4 * n + 64  # long runs of nearly equal costs are left to the merge sort
    for i in range(1, n):
        cost = out_costs[i]
        if out_costs[i - 1] > cost:
            name, j = out_names[i], i
            while j > 0 and out_costs[j - 1] > cost:
                out_costs[j], out_names[j] = out_costs[j - 1], out_names[j - 1]
                j -= 1
            out_costs[j], out_names[j] = cost, name
            budget -= i - j
            if budget < 0:
                _merge_sort(out_costs, out_names, costs, names)
                return


@njit(cache=True, nogil=True)
def _ends(width):
    """What to add to an edge's pixel to get its two ends, by direction."""
    return np.array([0, 0, 0, 1], np.uint64), np.array([1, width, width + 1, width], np.uint64)


@njit(cache=True, nogil=True)
def _root(parent, i):
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = parent[i]
    return i


@njit(cache=True, nogil=True)
def _unite(costs, names, width, scale, parent, size, limit, rejected):
    """Join over edges in order of cost, where the cost is below both regions' limits; the number of rejected edges."""
    count, block = 0, np.empty((3, _BLOCK), np.uint32)
    a_from, b_from = _ends(width)
    for start in range(0, costs.shape[0], _BLOCK):
        kept = 0
        for e in range(start, min(start + _BLOCK, costs.shape[0])):  # without a branch: most edges lie inside a region
            pixel, direction = names[e] >> _TWO, names[e] & _THREE
            a, b = pixel + a_from[direction], pixel + b_from[direction]
            root_a, root_b = parent[parent[a]], parent[parent[b]]
            parent[a], parent[b] = root_a, root_b
            block[0, kept], block[1, kept], block[2, kept] = root_a, root_b, e
            kept += root_a != root_b
        for k in range(kept):
            a, b, e = _root(parent, block[0, k]), _root(parent, block[1, k]), block[2, k]
            if a == b:
                continue
            cost = costs[e]
            if cost < limit[a] and cost < limit[b]:
                if size[a] < size[b]:
                    a, b = b, a
                parent[b] = a
                size[a] += size[b]
                limit[a] = np.float32(cost + scale / size[a])
            else:
                rejected[count] = names[e]
                count += 1
    return count


@njit(cache=True, nogil=True)
def _absorb(rejected, width, min_size, parent, size):
    """Join regions under min_size to a neighbour, over the rejected edges in order of cost."""
    a_from, b_from = _ends(width)
    for k in range(rejected.shape[0]):
        pixel, direction = rejected[k] >> _TWO, rejected[k] & _THREE
        a, b = _root(parent, pixel + a_from[direction]), _root(parent, pixel + b_from[direction])
        if a != b and (size[a] < min_size or size[b] < min_size):
            if size[a] < size[b]:
                a, b = b, a
            parent[b] = a
            size[a] += size[b]


@njit(cache=True, nogil=True)
def sort_edges(planes, floats, whole):
    """Costs float64 [E] of the 8-neighbourhood of blurred colours float64 [C, H, W] in [0, 1], sorted; their names.

    `floats` float64 [8 * H * W] and `whole` int32 [8 * H * W] are spare memory; the second half of both is free after.
    """
    _, height, width = planes.shape
    many = 4 * height * width
    dealt, dealt_names = floats[many : 2 * many], whole[many : 2 * many]
    starts, counts = np.empty(_BUCKETS + 1, np.int64), np.empty(1 << 14, np.int64)
    total = _deal(planes, floats[:many].reshape(4, height, width), dealt, dealt_names, starts)
    for b in range(_BUCKETS):
        start, end = starts[b], starts[b + 1]
        if end > start:
            _sort(dealt[start:end], dealt_names[start:end], floats[start:end], whole[start:end], counts)
    return floats[:total], whole[:total]


@njit(cache=True, nogil=True)
def segment(costs, names, scale, min_size, labels, whole):
    """labels int32 [H, W] <- regions grown over sorted edges, in raster order of first pixels; the number of regions.

    `whole` int32 [7 * H * W] is spare memory.
    """
    height, width = labels.shape
    pixels, unsigned = height * width, whole.view(np.uint32)
    # Unsigned, since numba asks of every signed index whether it counts from the end.
    parent, size, rejected = unsigned[:pixels], whole[pixels : 2 * pixels], unsigned[3 * pixels : 7 * pixels]
    limit, number = whole[2 * pixels : 3 * pixels].view(np.float32), whole[2 * pixels : 3 * pixels]
    for i in range(pixels):
        parent[i], size[i], limit[i] = i, 1, np.float32(scale)
    count = _unite(costs, names.view(np.uint32), width, scale, parent, size, limit, rejected)
    _absorb(rejected[:count], width, min_size, parent, size)
    flat, regions = labels.reshape(pixels), 0
    number[:] = -1  # the limits are done with: from here on the label of each root
    for i in range(pixels):
        root = _root(parent, i)
        if number[root] < 0:
            number[root] = regions
            regions += 1
        flat[i] = number[root]
    return regions

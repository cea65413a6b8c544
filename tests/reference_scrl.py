"""SCRL's box pairs, step by step (section 3.1 and its public code), with random numbers of Python's own."""


def iou(a, b):
    wide = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    high = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - wide * high
    return wide * high / union if union > 0 else 0.0


def grid_side(size, least, chance):
    """One axis of a candidate: a cell of a random division, and a whole number of pixels inside of it."""
    cells = chance.randint(1, size // least)
    cell = size / cells
    start = int(chance.randint(0, cells - 1) * cell)
    length = chance.randint(least, int(cell))
    return start + chance.randint(0, int(cell) - length), length


def uniform_side(size, least, chance):
    """Eq. 1."""
    length = chance.uniform(least, size)
    return chance.uniform(0, size - length), length


def pairs(crops, flips, size, k, *, least, most, law, keep, chance):
    """k boxes in pixels of two views of one side `size`, None for a slot without one; crops (x0, y0, x1, y1)."""
    left, top = max(crops[0][0], crops[1][0]), max(crops[0][1], crops[1][1])
    right, bottom = min(crops[0][2], crops[1][2]), min(crops[0][3], crops[1][3])
    if left >= right or top >= bottom:
        return [None] * k
    across = min(size / (c[2] - c[0]) for c in crops)  # pixels of the coarser view per pixel of the source
    down = min(size / (c[3] - c[1]) for c in crops)
    width, height = round((right - left) * across), round((bottom - top) * down)
    if width <= least or height <= least:
        return [None] * k
    side = grid_side if law == "grid" else uniform_side
    taken, out = [], []
    for _ in range(k):
        for _ in range(50):
            (x, w), (y, h) = side(width, least, chance), side(height, least, chance)
            source = (left + x / across, top + y / down, left + (x + w) / across, top + (y + h) / down)
            views = [in_view(source, crop, flip, size) for crop, flip in zip(crops, flips, strict=True)]
            if all(iou(views[0], other[0]) < most for other in taken) or most == 1:
                break
        else:
            if not keep:
                out.append(None)
                continue
        taken.append(views)
        out.append(views)
    return out


def in_view(box, crop, flip, size):
    """A box of the source in a view, clipped to it."""
    x0, x1 = ((x - crop[0]) * size / (crop[2] - crop[0]) for x in (box[0], box[2]))
    y0, y1 = ((y - crop[1]) * size / (crop[3] - crop[1]) for y in (box[1], box[3]))
    if flip:
        x0, x1 = size - x1, size - x0
    return [min(max(v, 0.0), size) for v in (x0, y0, x1, y1)]


def jitter(box, r, size, chance):
    """The ablation: the corner moves by a share of the sides, then the sides are scaled from there."""
    w, h = box[2] - box[0], box[3] - box[1]
    x, y = box[0] + chance.uniform(-r, r) * w, box[1] + chance.uniform(-r, r) * h
    w, h = w * (1 + chance.uniform(-r, r)), h * (1 + chance.uniform(-r, r))
    return [min(max(v, 0.0), size) for v in (x, y, x + w, y + h)]

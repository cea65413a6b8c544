"""PLRC's losses as the paper writes them: loops over points in float64, one pair at a time."""

import math


def cosine(a, b):
    dot, aa, bb = (sum(x * y for x, y in zip(u, v, strict=True)) for u, v in ((a, b), (a, a), (b, b)))
    return dot / math.sqrt(aa * bb)


def affinities(point, keys, temperature):
    """Eq. 3: one point's row of A, over keys."""
    logits = [cosine(point, key) / temperature for key in keys]
    most = max(logits)
    exps = [math.exp(x - most) for x in logits]
    return [x / sum(exps) for x in exps]


def region_contrast(p, a, p2, a2, temperature, *, first=0, inter=True):
    """Eq. 2 for each image of p [B][M][D]: the mean over its positive pairs, 0 without one; and how many there are."""
    values, counts = [], []
    for b, (points, ids) in enumerate(zip(p, a, strict=True)):
        total, pairs = 0.0, 0
        for point, i in zip(points, ids, strict=True):
            if i < 0:
                continue
            among = [
                (row, k, key)
                for row, (keys, their) in enumerate(zip(p2, a2, strict=True))
                for key, k in zip(keys, their, strict=True)
                if k >= 0 and (inter or row == first + b)
            ]
            if not among:
                continue
            row = affinities(point, [key for _, _, key in among], temperature)
            for (image, k, _), share in zip(among, row, strict=True):
                if image == first + b and k == i:
                    total, pairs = total - math.log(share), pairs + 1
        values.append(total / pairs if pairs else 0.0)
        counts.append(pairs)
    return values, counts


def distillation(p, keys, teacher, teacher_keys, valid, temperature, teacher_temperature, *, inter=False):
    """Eq. 4 for each point of p [B][M][D]: the cross entropy of its row with the teacher's, over valid keys."""
    values = []
    for b, (points, theirs) in enumerate(zip(p, teacher, strict=True)):
        rows = [r for r in range(len(keys)) if inter or r == b]
        ours = [k for r in rows for k, ok in zip(keys[r], valid[r], strict=True) if ok]
        other = [k for r in rows for k, ok in zip(teacher_keys[r], valid[r], strict=True) if ok]
        values.append([])
        for point, twin in zip(points, theirs, strict=True):
            student = affinities(point, ours, temperature)
            target = affinities(twin, other, teacher_temperature)
            values[-1].append(-sum(t * math.log(s) for t, s in zip(target, student, strict=True)))
    return values


def painted(n, height, width):
    """A picture whose pixels hold the id of the cell of an n x n grid they lie in, None where they lie in several."""

    def cell(pixel, pixels):
        first, last = pixel * n // pixels, ((pixel + 1) * n - 1) // pixels
        return first if first == last else None

    rows, columns = [cell(y, height) for y in range(height)], [cell(x, width) for x in range(width)]
    return [[None if y is None or x is None else y * n + x for x in columns] for y in rows]


def cropped(picture, crop, flipped):
    """The pixels of a crop (x0, y0, x1, y1), mirrored or not."""
    x0, y0, x1, y1 = crop
    rows = [row[x0:x1] for row in picture[y0:y1]]
    return [row[::-1] for row in rows] if flipped else rows

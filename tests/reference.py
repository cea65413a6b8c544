"""Slow, obvious references: one image, one box, one point at a time, in Python floats (float64)."""

import math


def philox(counter, key):
    """Philox4x32-10 with Python integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 % 2**32, (p0 >> 32) ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def stream(seed, epoch, identity, tag, words):
    """The first words of a stream."""
    out = []
    for block in range((words + 3) // 4):
        out += philox((identity % 2**32, (identity >> 32) % 2**32, tag, block), (seed, epoch))
    return out[:words]


def unit(word):
    return (word >> 8) / 2**24


def below(high, low, n):
    return ((high << 32) + low) * n >> 64


def map_point(crop, flipped, source_size, point):
    """Unit source point -> unit view point of a crop (x0, y0, x1, y1) in pixels, by way of pixels."""
    x0, y0, x1, y1 = crop
    height, width = source_size
    u = (point[0] * width - x0) / (x1 - x0)
    v = (point[1] * height - y0) / (y1 - y0)
    return (1 - u if flipped else u), v


def unmap_point(crop, flipped, source_size, point):
    """Unit view point -> unit source point."""
    x0, y0, x1, y1 = crop
    height, width = source_size
    u = 1 - point[0] if flipped else point[0]
    return (x0 + u * (x1 - x0)) / width, (y0 + point[1] * (y1 - y0)) / height


def map_box(crop, flipped, source_size, box):
    (ax, ay), (bx, by) = (map_point(crop, flipped, source_size, p) for p in ((box[0], box[1]), (box[2], box[3])))
    return min(ax, bx), min(ay, by), max(ax, bx), max(ay, by)


def intersect_crops(crop_a, crop_b):
    """Common rectangle in source pixels, or None."""
    x0, y0 = max(crop_a[0], crop_b[0]), max(crop_a[1], crop_b[1])
    x1, y1 = min(crop_a[2], crop_b[2]), min(crop_a[3], crop_b[3])
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


def iou(a, b):
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    common = max(w, 0) * max(h, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common
    return common / union if union > 0 else 0.0


def crop_law(height, width, scale, ratio, words):
    """torchvision's random resized crop from a stream of words, as documented in kernels.draw_crops."""
    area = height * width
    for attempt in range(10):
        a, b = unit(words[2 * attempt]), unit(words[2 * attempt + 1])
        target = area * (scale[0] + (scale[1] - scale[0]) * a)
        low, high = math.log(ratio[0]), math.log(ratio[1])
        aspect = math.exp(low + (high - low) * b)
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            y0 = below(words[20], words[21], height - h + 1)
            x0 = below(words[22], words[23], width - w + 1)
            return x0, y0, x0 + w, y0 + h
    if width / height < ratio[0]:
        w, h = width, round(width / ratio[0])
    elif width / height > ratio[1]:
        w, h = round(height * ratio[1]), height
    else:
        w, h = width, height
    w, h = max(w, 1), max(h, 1)
    x0, y0 = (width - w) // 2, (height - h) // 2
    return x0, y0, x0 + w, y0 + h


def grid_boxes(width, height, k, least, most, keep, words_of):
    """SCRL's grid law in whole pixels of the overlap; words_of(block) gives four words. None marks a dropped slot."""
    boxes = []
    for slot in range(k):
        for attempt in range(50):
            block = 4 * (50 * slot + attempt)
            w = [word for b in range(4) for word in words_of(block + b)]
            sides = []
            for size, v in ((width, w[:8]), (height, w[8:])):
                divisions = 1 + below(v[0], v[1], size // least)
                cell = size // divisions
                start = below(v[2], v[3], divisions) * size // divisions
                length = least + below(v[4], v[5], cell - least + 1)
                start += below(v[6], v[7], cell - length + 1)
                sides.append((start, start + length))
            (x0, x1), (y0, y1) = sides
            box = (x0, y0, x1, y1)
            if all(other is None or iou(box, other) < most for other in boxes) or most >= 1:
                break
        else:
            box = box if keep else None
        boxes.append(box)
    return boxes

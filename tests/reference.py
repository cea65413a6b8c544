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


def box_pixels(box, valid, size):
    """The pixels (row, column) whose centre a unit box holds, one by one."""
    height, width = size
    x0, y0, x1, y1 = box[0] * width, box[1] * height, box[2] * width, box[3] * height
    return {(i, j) for i in range(height) for j in range(width)
            if valid and x0 <= j + 0.5 < x1 and y0 <= i + 0.5 < y1}  # fmt: skip


def frame(pixels):
    """The rectangle (x0, y0, x1, y1) around pixels."""
    rows, columns = [i for i, _ in pixels], [j for _, j in pixels]
    return min(columns), min(rows), max(columns) + 1, max(rows) + 1


def around(pixels, area, place, size):
    """The view's pixels of a rectangle with the aspect of a box, of `area`, centred at the share `place` of the box."""
    x0, y0, x1, y1 = frame(pixels)
    factor = 0.5 * math.sqrt(area / len(pixels))
    x, y = x0 + place[0] * (x1 - x0), y0 + place[1] * (y1 - y0)
    w, h = factor * (x1 - x0), factor * (y1 - y0)
    return {(i, j) for i in range(size[0]) for j in range(size[1])
            if x - w <= j + 0.5 < x + w and y - h <= i + 0.5 < y + h}  # fmt: skip


def inside(pixels, missing, place, cut):
    """The rectangle in a box that takes closest to `missing` pixels that are not cut, of a row growing line by line."""
    x0, y0, x1, y1 = frame(pixels)
    w, h = x1 - x0, y1 - y0
    best, found = None, set()
    for lines in range(w + h + 1):
        a = (2 * lines * w + w + h) // (2 * (w + h))
        b = lines - a
        x, y = x0 + math.floor(place[0] * (w - a + 1)), y0 + math.floor(place[1] * (h - b + 1))
        taken = {(i, j) for i in range(y, y + b) for j in range(x, x + a)}
        error = abs(len(taken - cut) - missing)
        if best is None or error < best:
            best, found = error, taken
    return found


def cutout(pixels, size, u, ratio, clip, restore):
    """PRC of one image: a list of turns (slot, share drawn, restored, own cut, all that is cut after it)."""
    cut, turns = set(), []
    for k in sorted(range(len(pixels)), key=lambda k: -len(pixels[k])):
        box, share, place = pixels[k], ratio[0] + (ratio[1] - ratio[0]) * u[k][0], u[k][1:]
        if not box:
            turns.append((k, share, False, set(), cut))
            continue
        target, taken = share * len(box), len(cut & box)
        if restore == "tolerance":
            leave = 0.8 * target < taken <= 1.2 * target
            again = not leave and taken > 0 and taken >= 0.5 * target
            missing = 0 if leave else target
        else:
            again = taken > target
            missing = target - (0 if again else taken)
        cut = cut - box if again else cut
        if restore == "threshold" and clip == "box":
            own = inside(box, missing, place, cut)
        else:
            own = around(box, missing, place, size)
            own = own & box if clip == "box" else own
        cut = cut | own
        turns.append((k, share, again, own, cut))
    return turns


def square_cutout(pixels, size, u, p, ratio):
    """SoCo's squares of one image: what is cut."""
    cut = set()
    for box, (coin, share, *place) in zip(pixels, u, strict=True):
        if box and coin < p:
            x0, y0, x1, y1 = frame(box)
            half = 0.5 * math.sqrt((ratio[0] + (ratio[1] - ratio[0]) * share) * len(box))
            x, y = x0 + place[0] * (x1 - x0), y0 + place[1] * (y1 - y0)
            cut |= {(i, j) for i in range(size[0]) for j in range(size[1])
                    if x - half <= j + 0.5 < x + half and y - half <= i + 0.5 < y + half}  # fmt: skip
    return cut


def window(size, u, share, ratio, mode):
    """PRM's window of one image, as unit box."""
    height, width = size
    drawn = share[0] + (share[1] - share[0]) * u[0]
    area = (1 - drawn if mode == "masked" else drawn) * (height * width)
    aspect = math.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * u[1])
    w, h = min(math.sqrt(area * aspect), width), min(math.sqrt(area / aspect), height)
    x, y = u[2] * (width - w), u[3] * (height - h)
    return {(i, j) for i in range(height) for j in range(width)
            if x <= j + 0.5 < x + w and y <= i + 0.5 < y + h}  # fmt: skip


def jitter(box, u, p, scale, shift, corner):
    """One unit box jittered, about its centre or from its top left corner, and clipped."""
    x0, y0, x1, y1 = (min(max(edge, 0.0), 1.0) for edge in box)
    if u[0] >= p:
        return x0, y0, x1, y1
    out = []
    for low, high, a, b in ((x0, x1, u[1], u[3]), (y0, y1, u[2], u[4])):
        side = high - low
        new = (scale[0] + (scale[1] - scale[0]) * a) * side
        move = (2 * shift * b - shift) * side
        start = low + move if corner else (low + high) / 2 + move - new / 2
        out.append((min(max(start, 0.0), 1.0), min(max(start + new, 0.0), 1.0)))
    (a0, a1), (b0, b1) = out
    return (a0, b0, a1, b1) if a0 < a1 and b0 < b1 else (x0, y0, x1, y1)


def make_room(boxes, pixels, size, room):
    """The slots that stay when the largest are dropped until the rest leave room, or one is left."""
    stay = sorted((k for k in range(len(boxes)) if pixels[k]), key=lambda k: (-len(pixels[k]), k))
    while len(stay) > 1:
        spans = [
            max(min(boxes[k][a + 2], 1.0) for k in stay) - min(max(boxes[k][a], 0.0) for k in stay) for a in (0, 1)
        ]
        if all(span * side <= (1 - room) * side + 1e-3 for span, side in zip(spans, size[::-1], strict=True)):
            break
        stay = stay[1:]
    return stay


def feasible(boxes, stay, size):
    """Per axis, x first, the lowest and highest whole shift that leaves the boxes' visible parts in the view."""
    ranges = []
    for axis, side in ((0, size[1]), (1, size[0])):
        low = min((max(boxes[k][axis], 0.0) * side for k in stay), default=0)
        high = max((min(boxes[k][axis + 2], 1.0) * side for k in stay), default=side)
        ranges.append((math.ceil(-low - 1e-3), math.floor(side - high + 1e-3)) if stay else (0, 0))
    return ranges


def compose(image, mask, background, shift):
    """Pixels [h][w] of an image under a mask, moved by (x, y), on a background."""
    height, width = len(image), len(image[0])
    out = [list(row) for row in background]
    for i in range(height):
        for j in range(width):
            y, x = i + shift[1], j + shift[0]
            if mask[i][j] and 0 <= y < height and 0 <= x < width:
                out[y][x] = image[i][j]
    return out


def derange(words, size):
    """A uniform derangement of `size` places (Martinez, Panholzer and Prodinger, 2008) from four words a place."""
    count = [1, 0]
    for u in range(2, size + 1):
        count.append((u - 1) * (count[-1] + count[-2]))
    place, free, left = list(range(size)), set(range(size)), size
    for i in range(size - 1, 0, -1):
        if i not in free or left < 2:
            continue
        high, low, coin = words[4 * i : 4 * i + 3]
        earlier = sorted(j for j in free if j < i)
        j = earlier[below(high, low, len(earlier))]
        place[i], place[j] = place[j], place[i]
        free.remove(i)
        left -= 1
        if coin < ((left) * count[left - 1] << 32) // count[left + 1]:
            free.remove(j)
            left -= 1
    return place

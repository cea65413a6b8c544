"""Slow, obvious versions of what segmentation is measured and trained by: loops over plain numbers."""

import itertools
import math

from tests.reference_densesiam import softmax


def confusion(labels, predictions, classes, categories):
    """How many pixels of each true class (rows) got each predicted category (columns); void pixels are left out."""
    table = [[0] * categories for _ in range(classes)]
    for truth, guess in zip(labels, predictions, strict=True):
        if truth >= 0:
            table[truth][guess] += 1
    return table


def best_matching(table):
    """The pairs (class, category), each used once, that share the most pixels in all: every way is tried."""
    classes, categories = len(table), len(table[0])
    best, most = [], -1
    if categories <= classes:
        ways = ([(row, column) for column, row in enumerate(rows)]
                for rows in itertools.permutations(range(classes), categories))  # fmt: skip
    else:
        ways = ([(row, column) for row, column in enumerate(columns)]
                for columns in itertools.permutations(range(categories), classes))  # fmt: skip
    for pairs in ways:
        shared = sum(table[row][column] for row, column in pairs)
        if shared > most:
            best, most = pairs, shared
    return best, most


def iou_of_classes(table, class_of):
    """IoU of each class when category j is read as class_of[j] (-1: none); nan for one neither there nor read."""
    result = []
    for c in range(len(table)):
        hit = read = there = 0
        for row in range(len(table)):
            for j, named in enumerate(class_of):
                count = table[row][j]
                hit += count if row == c and named == c else 0
                read += count if named == c else 0
                there += count if row == c else 0
        union = read + there - hit
        result.append(hit / union if union else math.nan)
    return result


def mean_of_numbers(values):
    kept = [value for value in values if not math.isnan(value)]
    return sum(kept) / len(kept) if kept else math.nan


def published_blocks(table, class_of, things):
    """The thing and stuff scores of the published evaluation, which puts each true class on the row of its category,
    cuts out the leading and the trailing block and scores each as if nothing else existed."""
    n = len(table)
    moved = [[0] * n for _ in range(n)]
    for category in range(n):
        moved[category] = list(table[class_of[category]])
    scores = []
    for block in (range(things), range(things, n)):
        values = []
        for i in block:
            row = sum(moved[i][j] for j in block)
            column = sum(moved[j][i] for j in block)
            union = row + column - moved[i][i]
            values.append(moved[i][i] / union if union else math.nan)
        scores.append(mean_of_numbers(values))
    return scores


def own_labels(scores, ok, law):
    """L_seg of each pixel, scores[image][pixel][category]: cross-entropy with its own largest score, weighted."""
    labels = [[row.index(max(row)) for row in image] for image in scores]
    seen = [label for image, there in zip(labels, ok, strict=True) if there for label in image]
    result = []
    for image, names in zip(scores, labels, strict=True):
        losses = []
        for row, label in zip(image, names, strict=True):
            share = seen.count(label) / len(seen) if seen else 0
            inverse = 1 / (share * len(set(seen))) if share else 0
            weight = {"code": share, "inverse": inverse, "none": 1}[law]
            losses.append(-weight * math.log(softmax(row)[label]))
        result.append(losses)
    return result

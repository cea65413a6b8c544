"""DenseSiam's equations, slow and obvious: one point and one region at a time, in Python floats (float64)."""

import math


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def softmax(logits):
    most = max(logits)
    powers = [math.exp(x - most) for x in logits]
    return [x / sum(powers) for x in powers]


def cosine_similarity(p, z):
    """Eq. 2, a distance: the negative cosine."""
    return -dot(p, z) / (math.sqrt(dot(p, p)) * math.sqrt(dot(z, z)))


def cross_entropy(target, other):
    """Eq. 3 with its arguments named: -softmax(target) . log softmax(other)."""
    return -dot(softmax(target), [math.log(x) for x in softmax(other)])


def region_embeddings(masks, features, softmaxed, by_mass):
    """Eq. 4 of one image: masks [P][N], features [P][C] -> [N][C]."""
    shares = [softmax(row) if softmaxed else row for row in masks]
    regions = []
    for n in range(len(masks[0])):
        total = [sum(shares[p][n] * features[p][c] for p in range(len(masks))) for c in range(len(features[0]))]
        mass = sum(row[n] for row in shares) if by_mass else 1.0
        regions.append([x / mass for x in total])
    return regions


def region_contrast(u, v, temperature, unit):
    """Eq. 6 of one image, a term per region: u, v [N][D] -> [N]."""
    if unit:
        u, v = ([[x / math.sqrt(dot(row, row)) for x in row] for row in rows] for rows in (u, v))
    terms = []
    for s, row in enumerate(u):
        logits = [dot(row, other) / temperature for other in v]
        terms.append(-math.log(softmax(logits)[s]))
    return terms

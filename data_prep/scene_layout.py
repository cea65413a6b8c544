"""One procedural scene from (seed, index): which objects, where, how large, turned, lit and coloured.

A class is a silhouette with a texture; each silhouette and each texture belongs to two classes, so neither alone tells
the class, and colours are drawn afresh for each object, so they tell nothing, or on demand around a hue of its class,
which makes an easier set. Two biases are laid in on purpose and can be switched off: classes of one context meet in one
image more often than chance, and classes have a usual place.
"""

import colorsys
import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data_prep import scene_paint, scene_shapes
from data_prep.scene_paint import PLAIN, TEXTURES
from data_prep.scene_shapes import BLOB, SILHOUETTES, TWIG

# Class -> its context and its usual place. Each context holds each place once, and the two classes that share a
# silhouette or a texture differ in context, so that neither bias can stand in for the other or for a shape.
CLASSES = {
    "striped_fish": (0, "high"),
    "ringed_fish": (2, "left"),
    "dotted_mug": (1, "low"),
    "blotched_mug": (3, "anywhere"),
    "checked_star": (2, "high"),
    "bricked_star": (0, "left"),
    "ringed_gear": (3, "low"),
    "zigzag_gear": (1, "anywhere"),
    "blotched_moon": (0, "low"),
    "scaled_moon": (2, "anywhere"),
    "bricked_mushroom": (1, "high"),
    "striped_mushroom": (3, "left"),
    "zigzag_bone": (2, "low"),
    "dotted_bone": (0, "anywhere"),
    "scaled_leaf": (3, "high"),
    "checked_leaf": (1, "left"),
}
NAMES = tuple(CLASSES)
_RINGED = TEXTURES.index("ringed")
CONTEXT_SHARE = 0.8  # share of an image's objects drawn from its context
PLACE_SHARE = 0.85  # share of a class's objects drawn around its usual place
PLACE_AT, PLACE_STD = 0.22, 0.1  # distance of a usual place from its image side and its spread, in shares of that side
MIN_VISIBLE = 0.35  # each object shows at least this share of its silhouette; nothing less is placed
MIN_INSIDE = 0.55  # and this share of it lies inside the image
MIN_PIXELS = 48  # at --size 320, scaled with the area
MIN_OBJECTS, MAX_OBJECTS = 3, 12
SMALLEST, LARGEST = 0.065, 0.21  # radius of an object in shares of the longer side, before its number is looked at
HUE_STD = 0.02  # of a usual colour, in turns of the hue circle
ATTEMPTS = 60  # places tried for one object, shrinking as they fail


@dataclass(frozen=True)
class SceneSpec:
    """What a scene depends on beside its index."""

    seed: int = 0
    size: int = 320  # longer side (px)
    cooccurrence: bool = True
    position_prior: bool = True
    fewest: int = MIN_OBJECTS  # objects of an image
    most: int = MAX_OBJECTS
    smallest: float = SMALLEST
    largest: float = LARGEST
    usual_colors: bool = False  # each class has a hue of its own, as lemons have


class Scene(NamedTuple):
    """`image` uint8 [h, w, 3]; `labels` int16 [h, w], 0 or 1 + the object's row; `classes`: an index of NAMES a row."""

    image: np.ndarray
    labels: np.ndarray
    classes: list[int]


@functools.cache
def _noise_table() -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=0)).random((256, 256), np.float32)


@functools.cache
def _class_parts(index: int) -> tuple[int, int]:
    texture, shape = NAMES[index].split("_")
    return SILHOUETTES.index(shape), TEXTURES.index(texture)


def _size_of(rng: np.random.Generator, longer: int) -> tuple[int, int]:
    """Height and width: the longer side as asked, the ratio between 3:4 and 4:3."""
    ratio = math.exp(rng.uniform(-math.log(4 / 3), math.log(4 / 3)))  # width over height
    shorter = max(round(longer * min(ratio, 1 / ratio)), 1)
    return (shorter, longer) if ratio > 1 else (longer, shorter)


def _draw_class(rng: np.random.Generator, context: int, biased: bool) -> int:
    follow, pick = rng.random(2)
    members = [i for i, (group, _) in enumerate(CLASSES.values()) if group == context]
    pool = members if biased and follow < CONTEXT_SHARE else range(len(NAMES))
    return pool[int(pick * len(pool))]


def _draw_place(rng: np.random.Generator, place: str, biased: bool) -> tuple[float, float]:
    """Centre of an object in shares of width and height."""
    x, y, follow = rng.random(3)
    x, y = 0.05 + 0.9 * x, 0.05 + 0.9 * y
    near = min(max(PLACE_AT + PLACE_STD * rng.standard_normal(), 0.05), 0.95)
    if biased and follow < PLACE_SHARE:
        x = near if place == "left" else x
        y = {"high": near, "low": 1.0 - near}.get(place, y)
    return x, y


def _two_colors(rng: np.random.Generator) -> np.ndarray:
    """Two colours float64 [2, 3] that differ in brightness, so that a texture can be seen."""
    colors = rng.uniform(20, 235, (2, 3))
    first, second = colors @ (0.3, 0.59, 0.11)
    if abs(second - first) < 55:
        colors[1] += 60 if first < 128 else -60
    return np.clip(colors, 10, 245)


def _usual_colors(rng: np.random.Generator, chosen: int) -> np.ndarray:
    """A dark and a bright colour float64 [2, 3] around a class's own hue; classes of one shape or texture lie apart."""
    hues, full = chosen * 7 / len(NAMES) + rng.normal(0, HUE_STD, 2), rng.uniform(0.45, 0.9, 2)
    bright = rng.uniform((0.2, 0.6), (0.5, 0.95))
    colors = [colorsys.hsv_to_rgb(hues[i] % 1.0, full[i], bright[i]) for i in rng.permutation(2)]
    return np.clip(255.0 * np.array(colors), 10, 245)


def _draw_pose(rng: np.random.Generator, x: float, y: float, radius: float, spread: float) -> np.ndarray:
    """Centre, matrix from pixels to the object's frame (turned, mirrored, foreshortened) and pixels per unit."""
    turn, axis, squeeze, mirror = rng.normal(0, spread), rng.uniform(0, math.pi), rng.uniform(0.68, 1), rng.random()
    along, across = math.cos(axis), math.sin(axis)
    stretch = np.eye(2) + (1 / squeeze - 1) * np.outer((along, across), (along, across))
    rotate = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    flip = np.diag([-1.0 if mirror < 0.5 else 1.0, 1.0])
    return np.array([x, y, *(flip @ rotate @ stretch / radius).ravel(), radius * math.sqrt(squeeze)])


def _draw_surface(rng: np.random.Generator, kind: int, radius: float) -> np.ndarray:
    """Texture kind, period, angle, shift x and y, bevel (px), seed: as `paint_object` wants them."""
    period = rng.uniform(0.34, 0.52) if kind != PLAIN else 0.4
    shift = rng.uniform(-1, 1, 2) * (0.35 if kind == _RINGED else 1.0)  # the middle of the rings is on the object
    return np.array([kind, period, rng.normal(0, 0.5), *shift, radius * rng.uniform(0.15, 0.5), rng.random()])


class _Canvas:
    """The picture under way: painted back to front, `labels` saying whose pixel is seen."""

    def __init__(self, rng: np.random.Generator, height: int, width: int) -> None:
        self.image = np.empty((height, width, 3), np.float32)
        self.labels = np.zeros((height, width), np.int16)
        turn, flat = rng.uniform(0, 2 * math.pi), rng.uniform(0.5, 0.85)
        self.light = np.array(
            [flat * math.cos(turn), flat * math.sin(turn), math.sqrt(1 - flat * flat), rng.uniform(0.3, 0.6)]
        )
        self.shadow = rng.uniform(0.15, 0.5)
        self.table = _noise_table()

    def background(self, rng: np.random.Generator) -> None:
        """Two materials with a horizon in six of ten pictures, one material in the others."""
        scale = max(self.image.shape) / 320
        periods = scale * np.exp(rng.uniform(math.log(14), math.log(90), 2))
        stretches, angles = np.exp(rng.uniform(0, 1.6, 2)), rng.uniform(0, math.pi, 2)
        forms = np.column_stack([periods, stretches, angles, rng.integers(3, 6, 2), rng.uniform(0, 256, (2, 2))])
        colors = rng.uniform(45, 210, (2, 1, 1)) + rng.normal(0, 32, (2, 1, 3)) + rng.normal(0, 38, (2, 3, 1))
        colors = np.clip(colors + rng.normal(0, 14, (2, 3, 3)), 5, 250)
        horizon = np.array([rng.uniform(0.2, 0.8), rng.normal(0, 0.25), scale * rng.uniform(0, 70)])
        if rng.random() < 0.4:
            horizon[0] = -5.0
        scene_paint.paint_background(self.image, colors, forms, horizon, self.light, self.table)

    def distances(
        self, kind: int, pose: np.ndarray, radius: float, proportions: np.ndarray
    ) -> tuple[np.ndarray, int, int]:
        """Signed distances of a silhouette over its patch and the patch's corner x, y, which may lie outside."""
        reach = math.ceil(1.5 * radius) + 3  # the silhouette with its shadow's blur
        x0, y0 = math.floor(pose[0]) - reach, math.floor(pose[1]) - reach
        patch = np.empty((2 * reach + 1, 2 * reach + 1), np.float32)
        scene_shapes.fill_distances(patch, x0, y0, kind, pose, proportions)
        return patch, x0, y0

    def paint(self, colors: np.ndarray, label: int, patch: tuple, pose: np.ndarray, surface: np.ndarray) -> None:
        """One object (label > 0) or piece of clutter (0) on top of what is there."""
        shadow = np.array([max(0.14 * pose[6], 1.5), self.shadow])
        scene_paint.paint_object(
            self.image, self.labels, label, *patch, pose, surface, colors, self.light, shadow, self.table
        )


def _paint_clutter(canvas: _Canvas, rng: np.random.Generator, longer: int) -> None:
    """Blobs, half of them under a texture of some class, and twigs: none is of a class, all lie behind the objects."""
    height, width = canvas.labels.shape
    kinds = [BLOB] * rng.integers(3, 8) + [TWIG] * rng.integers(3, 10)
    for kind in rng.permutation(kinds):
        radius = longer * math.exp(rng.uniform(math.log(0.05), math.log(0.2)))
        pose = _draw_pose(rng, rng.uniform(0, width), rng.uniform(0, height), radius, 3.0)
        textured = kind == BLOB and rng.random() < 0.5
        surface = _draw_surface(rng, int(rng.integers(len(TEXTURES))) if textured else PLAIN, radius)
        patch = canvas.distances(kind, pose, radius, np.array([*rng.random(2), 0.0]))
        canvas.paint(_two_colors(rng), 0, patch, pose, surface)


def make_scene(index: int, spec: SceneSpec) -> Scene:
    """Scene `index` of the data set `spec`; a pure function of its arguments."""
    rng = np.random.Generator(np.random.Philox(key=np.array([spec.seed, index], np.uint64)))
    height, width = _size_of(rng, spec.size)
    canvas = _Canvas(rng, height, width)
    canvas.background(rng)
    _paint_clutter(canvas, rng, spec.size)
    context, wanted = int(rng.integers(4)), int(rng.integers(spec.fewest, spec.most + 1))
    least = MIN_PIXELS * (spec.size / 320) ** 2
    classes: list[int] = []
    full, seen = np.zeros(spec.most + 1), np.zeros(spec.most + 1)  # pixels of each label: whole and visible
    counts = np.zeros(spec.most + 1, np.int64)
    for turn in range(wanted + 20):  # the turns beyond `wanted` are for pictures that had no room
        if turn >= wanted and len(classes) >= spec.fewest:
            break
        chosen, label = _draw_class(rng, context, spec.cooccurrence), len(classes) + 1
        shape, texture = _class_parts(chosen)
        radius = math.exp(rng.uniform(math.log(spec.smallest), math.log(spec.largest)))
        largest = spec.size * radius * (1.35 - 0.035 * wanted)
        proportions = np.array([*rng.random(2), rng.uniform(-0.3, 0.3)])
        for attempt in range(ATTEMPTS):
            radius = max(largest * min(1.0, 1.3 - 0.03 * attempt), 0.05 * spec.size)
            x, y = _draw_place(rng, CLASSES[NAMES[chosen]][1], spec.position_prior)
            pose = _draw_pose(rng, x * width, y * height, radius, 0.7)
            patch = canvas.distances(shape, pose, radius, proportions)
            total = scene_shapes.count_cover(*patch, canvas.labels, counts)
            left = seen - counts
            if counts.sum() < max(MIN_INSIDE * total, least):
                continue
            if np.all(left[1:label] >= np.maximum(MIN_VISIBLE * full[1:label], least)):
                surface = _draw_surface(rng, texture, radius)
                colors = _usual_colors(rng, chosen) if spec.usual_colors else _two_colors(rng)
                canvas.paint(colors, label, patch, pose, surface)
                full[label], seen[1:label] = total, left[1:label]
                seen[label] = counts.sum()
                classes.append(chosen)
                break
    if len(classes) < spec.fewest:
        raise RuntimeError(f"make_scene: image {index} of seed {spec.seed} has room for {len(classes)} objects only")
    image = np.empty((height, width, 3), np.uint8)
    gains = rng.uniform(0.75, 1.1) * (1 + rng.normal(0, 0.06, 3))
    scene_paint.develop(canvas.image, image, gains, rng.uniform(0, 14), int(rng.integers(256)), canvas.table)
    return Scene(image, canvas.labels, classes)

"""Per paper: its views, their colours, and which boxes, grids or regions it asks for.

Shared by the trainers, `geoaug inspect` and `geoaug stats`. Numbers are the papers'; where a paper is silent the
comment says whose choice it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .geometry import checks
from .geometry.views import ViewSpec
from .pixels.color_spec import ColorSpec

BYOL_1, BYOL_2, MOCO_V2, PICIE = ColorSpec.BYOL_1, ColorSpec.BYOL_2, ColorSpec.MOCO_V2, ColorSpec.PICIE


@dataclass(frozen=True)
class Recipe:
    """Views with their names and colours; `pair` are the two views that are compared; zeros are not asked for.

    `draws` names the colour draw of each view, the fold of its key: views of one draw share their colours.
    """

    about: str
    names: tuple[str, ...]
    views: tuple[ViewSpec, ...]
    colors: tuple[ColorSpec, ...]
    draws: tuple[str, ...] = ()  # left out: one of its own for each view
    pair: tuple[int, int] = (0, 1)
    stride: int = 32  # pixels of a view per cell of the feature map that is read
    matched: int = 0  # matched boxes per image (SCRL)
    proposals: int = 0  # proposals chosen per image (SoCo, D3SSL)
    grid: int = 0  # side of the common grid in the overlap (DenseSiam)
    cells: int = 0  # side of the dense correspondence (LC-loss)
    regions: int = 0  # side of the source's region grid (PLRC)
    slots: int = 0  # region slots per view
    points: int = 0  # points per slot

    def __post_init__(self) -> None:
        object.__setattr__(self, "draws", self.draws or self.names)

    def at(self, size: int) -> Recipe:
        """The same recipe with its largest views at another size, the others and the blur in proportion."""
        size = checks.index(size, 1, 2**16, "Recipe.at", "size")
        largest = max(side for view in self.views for side in view.height_width)

        def scaled(view: ViewSpec) -> ViewSpec:
            height, width = (max(1, round(side * size / largest)) for side in view.height_width)
            resize = None if view.resize is None else max(height, width, round(view.resize * size / largest))
            return replace(view, size=(height, width), resize=resize)

        colors = tuple(
            replace(paint, sigma=(paint.sigma[0] * size / largest, paint.sigma[1] * size / largest))
            for paint in self.colors
        )
        return replace(self, views=tuple(scaled(view) for view in self.views), colors=colors)


def _two(scale: tuple[float, float]) -> tuple[ViewSpec, ViewSpec]:
    return ViewSpec(224, scale=scale), ViewSpec(224, scale=scale)


RECIPES: dict[str, Recipe] = {
    "byol": Recipe("BYOL", ("v1", "v2"), _two((0.08, 1.0)), (BYOL_1, BYOL_2)),
    "moco_v2": Recipe("MoCo v2", ("query", "key"), _two((0.2, 1.0)), (MOCO_V2, MOCO_V2)),
    "simsiam": Recipe("SimSiam", ("x1", "x2"), _two((0.2, 1.0)), (MOCO_V2, MOCO_V2)),
    "scrl": Recipe(
        "SCRL: boxes matched in the overlap of two crops", ("v1", "v2"), _two((0.2, 1.0)), (BYOL_1, BYOL_2), matched=10
    ),
    "lc_loss": Recipe(  # which colours go to which view is our choice
        "LC-loss: every cell of the whole image, found in a crop",
        ("whole", "crop"),
        (ViewSpec.whole(224), ViewSpec(224, scale=(0.08, 1.0))),
        (BYOL_1, BYOL_2),
        cells=7,
    ),
    "soco": Recipe(  # the C4 form crops (0.6, 1)
        "SoCo: proposals in the whole image, a crop and its small copy",
        ("v1", "v2", "v3"),
        (ViewSpec.whole(224, flip=0.5), ViewSpec(224, scale=(0.5, 1.0)), ViewSpec.like(1, 112)),
        (BYOL_1, BYOL_2, BYOL_2),
        draws=("v1", "v2", "v2"),
        proposals=4,
    ),
    "d3ssl": Recipe(  # flips, colours and K are our choice
        "D3SSL: proposals in the whole image, a crop and its small copy, before any composite",
        ("x1", "x2", "x2 small"),
        (ViewSpec.whole(224, flip=0.5), ViewSpec(224, scale=(0.4, 1.0)), ViewSpec.like(1, 112)),
        (BYOL_1, BYOL_2, BYOL_2),
        draws=("x1", "x2", "x2"),  # the small copy is of the coloured view
        stride=16,
        proposals=4,
    ),
    "densesiam": Recipe(
        "DenseSiam: a 7 x 7 grid in the overlap of two crops", ("x1", "x2"), _two((0.2, 1.0)), (MOCO_V2, MOCO_V2),
        grid=7,
    ),
    "densesiam_segmentation": Recipe(
        "DenseSiam, segmentation: a square inside the centre of the image, against the whole centre",
        ("centre", "inner", "centre again"),
        (ViewSpec.center(320, 320), ViewSpec(320, scale=(0.5, 1.0), law="side", within=0), ViewSpec.like(0, 320)),
        (PICIE, PICIE, PICIE),
        pair=(1, 2),
        stride=4,
        cells=7,
    ),
    "plrc": Recipe(
        "PLRC: points in the regions of a 4 x 4 grid on the source", ("v", "v'"), _two((0.2, 1.0)), (MOCO_V2, MOCO_V2),
        regions=4, slots=16, points=16,
    ),
}  # fmt: skip


def recipe(name: str) -> Recipe:
    """A recipe by name; an unknown name is answered with the known ones."""
    if name not in RECIPES:
        raise ValueError(f"recipe: name must be one of {', '.join(RECIPES)}, got {name!r}")
    return RECIPES[name]

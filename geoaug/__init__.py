"""Correspondence-aware transforms for dense self-supervised learning: plan geometry, render, ask what matches."""

from . import recipes, testing, viz
from .geometry import boxes, grids, regions
from .geometry.adopt import from_ffcv_ssl, from_kornia, from_lightly, from_torchvision
from .geometry.affine import AxisAffine
from .geometry.ids import sample_id, sample_ids
from .geometry.pairs import Overlap, correspond, matched_boxes, overlap, overlap_grid
from .geometry.plan import Plan, plan_views
from .geometry.rng import Key
from .geometry.views import ViewSpec
from .loading.batch import Batch
from .loading.decode import ReadError, read_image
from .loading.folder import LoadError
from .loading.opening import open_loader
from .objectives import losses, metrics
from .objectives.cell_weights import roi_weights
from .objectives.readout import fpn_level, roi_features, sample_points
from .pixels.color import color
from .pixels.color_spec import ColorSpec
from .pixels.composites import (
    Composite,
    block_derangement,
    boxes_with_room,
    cutout_masks,
    draw_cutouts,
    draw_square_cutouts,
    draw_windows,
    free_boxes,
    grid_boxes,
    jitter_boxes,
    paste,
    shift_boxes,
    shift_composite,
    square_cutout_masks,
    window_masks,
)
from .pixels.render import render, render_batch
from .proposals import select
from .proposals.selective_search import selective_search
from .proposals.store import ProposalStore

__version__ = "0.1.0.dev0"

__all__ = [
    "AxisAffine",
    "Batch",
    "ColorSpec",
    "Composite",
    "Key",
    "LoadError",
    "Overlap",
    "Plan",
    "ProposalStore",
    "ReadError",
    "ViewSpec",
    "block_derangement",
    "boxes",
    "boxes_with_room",
    "color",
    "correspond",
    "cutout_masks",
    "draw_cutouts",
    "draw_square_cutouts",
    "draw_windows",
    "fpn_level",
    "free_boxes",
    "from_ffcv_ssl",
    "from_kornia",
    "from_lightly",
    "from_torchvision",
    "grid_boxes",
    "grids",
    "jitter_boxes",
    "losses",
    "matched_boxes",
    "metrics",
    "open_loader",
    "overlap",
    "overlap_grid",
    "paste",
    "plan_views",
    "read_image",
    "recipes",
    "regions",
    "render",
    "render_batch",
    "roi_features",
    "roi_weights",
    "sample_id",
    "sample_ids",
    "sample_points",
    "select",
    "selective_search",
    "shift_boxes",
    "shift_composite",
    "square_cutout_masks",
    "testing",
    "viz",
    "window_masks",
]

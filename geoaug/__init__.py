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
from .pixels.color import color
from .pixels.color_spec import ColorSpec
from .pixels.render import render, render_batch
from .proposals.store import ProposalStore

__version__ = "0.1.0.dev0"

__all__ = [
    "AxisAffine",
    "Batch",
    "ColorSpec",
    "Key",
    "LoadError",
    "Overlap",
    "Plan",
    "ProposalStore",
    "ReadError",
    "ViewSpec",
    "boxes",
    "color",
    "correspond",
    "from_ffcv_ssl",
    "from_kornia",
    "from_lightly",
    "from_torchvision",
    "grids",
    "matched_boxes",
    "open_loader",
    "overlap",
    "overlap_grid",
    "plan_views",
    "read_image",
    "recipes",
    "regions",
    "render",
    "render_batch",
    "sample_id",
    "sample_ids",
    "testing",
    "viz",
]

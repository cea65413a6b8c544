"""What a backbone has learnt, measured without training it: the table of all measures and of what they need."""

from .affinity import affinity_iou, affinity_maps
from .backbone import Backbone, tile_means
from .canvases import disturb, object_tiles, resize, side_by_side, tiled
from .correspondence import Correspondence, correspondence_accuracy
from .coupling import CouplingRate, coupling_rate, different_pairs, position_similarity
from .neighbours import Accuracy, choose_objects, object_features, object_knn, other_images
from .segmentation import SegmentationScore, confusion, hungarian_miou

__all__ = [
    "Accuracy",
    "Backbone",
    "Correspondence",
    "CouplingRate",
    "SegmentationScore",
    "affinity_iou",
    "affinity_maps",
    "choose_objects",
    "confusion",
    "correspondence_accuracy",
    "coupling_rate",
    "different_pairs",
    "disturb",
    "hungarian_miou",
    "object_features",
    "object_knn",
    "object_tiles",
    "other_images",
    "position_similarity",
    "resize",
    "side_by_side",
    "tile_means",
    "tiled",
]

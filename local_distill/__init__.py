"""Parts for local self-distillation in PyTorch: crop geometry, patch matching, losses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from local_distill._lazy import lazy_names
from local_distill.errors import (
    ConfigError,
    DataError,
    GeometryError,
    LocalDistillError,
    MissingExtraError,
    ShapeError,
)
from local_distill.footprints import footprint_areas, overlap_area, token_footprints
from local_distill.geometry import (
    cell_diagonals,
    compose,
    from_box,
    from_matrix,
    invert,
    source_valid,
    to_source,
    token_centers,
)
from local_distill.heads import ProjectionHead
from local_distill.layer_heads import LayerHeads
from local_distill.losses import (
    ByolObjective,
    DenseContrastiveLoss,
    DistillationMonitors,
    DistillationTerms,
    GlobalContrastiveLoss,
    GlobalDistillationLoss,
    GlobalLocalDistillationLoss,
    GramAnchoringLoss,
    IntermediateDistillationLoss,
    KoLeoLoss,
    LocalDistillationLoss,
    MaskedDistillationLoss,
    MocoV3Objective,
    NegativeQueue,
    PatchOrderLoss,
    PixelConsistencyLoss,
    PixelPropagation,
    SimclrObjective,
    VICRegLLoss,
    VICRegLoss,
    distillation_monitors,
    local_distillation_loss,
)
from local_distill.masking import random_block_mask
from local_distill.matching import (
    BilinearMatcher,
    Clusters,
    CrossImageQueue,
    GatedSimilarityMatcher,
    JointClusters,
    KeepBest,
    Mutual,
    NearestMatcher,
    OverlapMatcher,
    RadiusMatcher,
    RefinedJointClusters,
    SimilarityMatcher,
    SinkhornMatcher,
    SoftSimilarityMatcher,
    bilinear_matches,
    gated_similarity_matches,
    keep_best,
    match_views,
    mutual_matches,
    nearest_matches,
    overlap_matches,
    radius_matches,
    similarity_matches,
    sinkhorn_matches,
    soft_similarity_matches,
)
from local_distill.structures import (
    CropGeometry,
    Matcher,
    Matches,
    PrototypeLogits,
    Targets,
    TeacherTargets,
    TokenGrid,
    Tokens,
    ViewOutput,
)
from local_distill.targets import Centering, SinkhornKnopp
from local_distill.teacher import EmaTeacher
from local_distill.token_tap import TokenTap

if TYPE_CHECKING:
    from local_distill.backbones import TimmBackbone, measure_token_grid
    from local_distill.transforms import MultiCrop, MultiView, assert_tracks, track, upgrade

__version__ = "0.1.0"

__all__ = [
    "BilinearMatcher",
    "ByolObjective",
    "Centering",
    "Clusters",
    "ConfigError",
    "CropGeometry",
    "CrossImageQueue",
    "DataError",
    "DenseContrastiveLoss",
    "DistillationMonitors",
    "DistillationTerms",
    "EmaTeacher",
    "GatedSimilarityMatcher",
    "GeometryError",
    "GlobalContrastiveLoss",
    "GlobalDistillationLoss",
    "GlobalLocalDistillationLoss",
    "GramAnchoringLoss",
    "IntermediateDistillationLoss",
    "JointClusters",
    "KeepBest",
    "KoLeoLoss",
    "LayerHeads",
    "LocalDistillError",
    "LocalDistillationLoss",
    "MaskedDistillationLoss",
    "Matcher",
    "Matches",
    "MissingExtraError",
    "MocoV3Objective",
    "MultiCrop",
    "MultiView",
    "Mutual",
    "NearestMatcher",
    "NegativeQueue",
    "OverlapMatcher",
    "PatchOrderLoss",
    "PixelConsistencyLoss",
    "PixelPropagation",
    "ProjectionHead",
    "PrototypeLogits",
    "RadiusMatcher",
    "RefinedJointClusters",
    "ShapeError",
    "SimclrObjective",
    "SimilarityMatcher",
    "SinkhornKnopp",
    "SinkhornMatcher",
    "SoftSimilarityMatcher",
    "Targets",
    "TeacherTargets",
    "TimmBackbone",
    "TokenGrid",
    "TokenTap",
    "Tokens",
    "VICRegLLoss",
    "VICRegLoss",
    "ViewOutput",
    "assert_tracks",
    "bilinear_matches",
    "cell_diagonals",
    "compose",
    "distillation_monitors",
    "footprint_areas",
    "from_box",
    "from_matrix",
    "gated_similarity_matches",
    "invert",
    "keep_best",
    "local_distillation_loss",
    "match_views",
    "measure_token_grid",
    "mutual_matches",
    "nearest_matches",
    "overlap_area",
    "overlap_matches",
    "radius_matches",
    "random_block_mask",
    "similarity_matches",
    "sinkhorn_matches",
    "soft_similarity_matches",
    "source_valid",
    "to_source",
    "token_centers",
    "token_footprints",
    "track",
    "upgrade",
]

# Names that need an extra: imported when first asked for, so that the core needs torch, einops and
# numpy alone.
_LAZY = {
    "MultiCrop": "local_distill.transforms",
    "MultiView": "local_distill.transforms",
    "TimmBackbone": "local_distill.backbones",
    "assert_tracks": "local_distill.transforms",
    "measure_token_grid": "local_distill.backbones",
    "track": "local_distill.transforms",
    "upgrade": "local_distill.transforms",
}

if not TYPE_CHECKING:  # a type checker would take any name for one that is there
    __getattr__ = lazy_names(__name__, _LAZY)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

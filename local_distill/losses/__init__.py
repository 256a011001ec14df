"""Losses of self-distillation: whole views, patch tokens, intermediate layers, and monitors."""

from local_distill.losses.dense_contrastive import (
    DenseContrastiveLoss,
    dense_contrastive_loss,
)
from local_distill.losses.global_contrastive import (
    GlobalContrastiveLoss,
)
from local_distill.losses.global_distillation import (
    GlobalDistillationLoss,
)
from local_distill.losses.global_local import (
    DistillationTerms,
    GlobalLocalDistillationLoss,
)
from local_distill.losses.gram import (
    GramAnchoringLoss,
    gram_anchoring_loss,
)
from local_distill.losses.intermediate import (
    IntermediateDistillationLoss,
    IntermediateTerms,
)
from local_distill.losses.koleo import (
    KoLeoLoss,
    koleo_loss,
)
from local_distill.losses.local_distillation import (
    LocalDistillationLoss,
    local_distillation_loss,
)
from local_distill.losses.local_variance_covariance import (
    VICRegLLoss,
    VICRegLTerms,
)
from local_distill.losses.masked import (
    MaskedDistillationLoss,
)
from local_distill.losses.monitors import (
    DistillationMonitors,
    distillation_monitors,
)
from local_distill.losses.negative_queue import (
    NegativeQueue,
)
from local_distill.losses.pairwise_objective import (
    PairwiseObjective,
)
from local_distill.losses.patch_order import (
    PatchOrderLoss,
    soft_sort,
)
from local_distill.losses.pixel_propagation import (
    PixelConsistencyLoss,
    PixelPropagation,
    pixel_consistency_loss,
)
from local_distill.losses.variance_covariance import (
    VICRegLoss,
    covariance_loss,
    invariance_loss,
    variance_loss,
)
from local_distill.losses.view_objectives import (
    ByolObjective,
    MocoV3Objective,
    SimclrObjective,
)

__all__ = [
    "ByolObjective",
    "DenseContrastiveLoss",
    "DistillationMonitors",
    "DistillationTerms",
    "GlobalContrastiveLoss",
    "GlobalDistillationLoss",
    "GlobalLocalDistillationLoss",
    "GramAnchoringLoss",
    "IntermediateDistillationLoss",
    "IntermediateTerms",
    "KoLeoLoss",
    "LocalDistillationLoss",
    "MaskedDistillationLoss",
    "MocoV3Objective",
    "NegativeQueue",
    "PairwiseObjective",
    "PatchOrderLoss",
    "PixelConsistencyLoss",
    "PixelPropagation",
    "SimclrObjective",
    "VICRegLLoss",
    "VICRegLTerms",
    "VICRegLoss",
    "covariance_loss",
    "dense_contrastive_loss",
    "distillation_monitors",
    "gram_anchoring_loss",
    "invariance_loss",
    "koleo_loss",
    "local_distillation_loss",
    "pixel_consistency_loss",
    "soft_sort",
    "variance_loss",
]

"""The truth, worked out slowly: float64 numbers of Python in plain loops, no tensors, no tricks.

Nothing here is shared with the package's own maths, so that a fault there cannot hide itself. Use
them to test code of your own, such as a faster matcher or a loss in another framework.
"""

from __future__ import annotations

from local_distill.testing.oracles.clusters import (
    JointTokens,
    cluster_plans,
    hard_shares,
    joint_tokens,
    weighted_mean,
)
from local_distill.testing.oracles.combinators import kept_tokens, mutual_weights
from local_distill.testing.oracles.features import dot, unit_vector, usable_features
from local_distill.testing.oracles.geometric_matching import (
    NearestToken,
    bilinear_corners,
    distances_in_cells,
    nearest_teacher_tokens,
    radius_neighbours,
)
from local_distill.testing.oracles.geometry import (
    TokenPlace,
    cell_diagonal,
    is_inside_source,
    token_center,
    token_places,
)
from local_distill.testing.oracles.losses import (
    local_loss,
    log_softmax,
    normalized_loss,
    softmax,
    token_cross_entropies,
)
from local_distill.testing.oracles.overlap import cell_overlaps, covered_share
from local_distill.testing.oracles.similarity_matching import (
    feature_costs,
    gated_tokens,
    most_similar_tokens,
    soft_similarities,
)
from local_distill.testing.oracles.targets import (
    centered_probs,
    moved_center,
    sinkhorn_knopp_probs,
)
from local_distill.testing.oracles.token_match import TokenMatch
from local_distill.testing.oracles.transport import scaled_plan, transport_plan

__all__ = [
    "JointTokens",
    "NearestToken",
    "TokenMatch",
    "TokenPlace",
    "bilinear_corners",
    "cell_diagonal",
    "cell_overlaps",
    "centered_probs",
    "cluster_plans",
    "covered_share",
    "distances_in_cells",
    "dot",
    "feature_costs",
    "gated_tokens",
    "hard_shares",
    "is_inside_source",
    "joint_tokens",
    "kept_tokens",
    "local_loss",
    "log_softmax",
    "most_similar_tokens",
    "moved_center",
    "mutual_weights",
    "nearest_teacher_tokens",
    "normalized_loss",
    "radius_neighbours",
    "scaled_plan",
    "sinkhorn_knopp_probs",
    "soft_similarities",
    "softmax",
    "token_center",
    "token_cross_entropies",
    "token_places",
    "transport_plan",
    "unit_vector",
    "usable_features",
    "weighted_mean",
]

"""Which teacher token answers which student token."""

from local_distill.matching import diagnostics
from local_distill.matching.bilinear import BilinearMatcher, bilinear_matches
from local_distill.matching.check_pair import check_pair
from local_distill.matching.clusters import Clusters
from local_distill.matching.cross_image import CrossImageQueue
from local_distill.matching.gated_similarity import (
    GatedSimilarityMatcher,
    gated_similarity_matches,
)
from local_distill.matching.joint_clusters import JointClusters
from local_distill.matching.keep_best import KeepBest, keep_best
from local_distill.matching.match_views import cross_view_pairs, match_views
from local_distill.matching.mutual import Mutual, mutual_matches
from local_distill.matching.nearest import NearestMatcher, nearest_matches
from local_distill.matching.overlap import OverlapMatcher, overlap_matches
from local_distill.matching.radius import RadiusMatcher, radius_matches
from local_distill.matching.refined_clusters import RefinedJointClusters
from local_distill.matching.similarity import SimilarityMatcher, similarity_matches
from local_distill.matching.sinkhorn import SinkhornMatcher, sinkhorn_matches
from local_distill.matching.soft_similarity import (
    SoftSimilarityMatcher,
    soft_similarity_matches,
)

__all__ = [
    "BilinearMatcher",
    "Clusters",
    "CrossImageQueue",
    "GatedSimilarityMatcher",
    "JointClusters",
    "KeepBest",
    "Mutual",
    "NearestMatcher",
    "OverlapMatcher",
    "RadiusMatcher",
    "RefinedJointClusters",
    "SimilarityMatcher",
    "SinkhornMatcher",
    "SoftSimilarityMatcher",
    "bilinear_matches",
    "check_pair",
    "cross_view_pairs",
    "diagnostics",
    "gated_similarity_matches",
    "keep_best",
    "match_views",
    "mutual_matches",
    "nearest_matches",
    "overlap_matches",
    "radius_matches",
    "similarity_matches",
    "sinkhorn_matches",
    "soft_similarity_matches",
]

"""Which teacher token answers which student token."""

from local_distill.matching.match_views import cross_view_pairs, match_views
from local_distill.matching.nearest import NearestMatcher, nearest_matches
from local_distill.matching.similarity import SimilarityMatcher, similarity_matches

__all__ = [
    "NearestMatcher",
    "SimilarityMatcher",
    "cross_view_pairs",
    "match_views",
    "nearest_matches",
    "similarity_matches",
]

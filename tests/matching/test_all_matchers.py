"""The matchers under their own test kit; tests/testing has it on the plain ones.

Compiling is left to test_compile.py, where the same matchers go through inductor.
"""

import functools

from local_distill import (
    BilinearMatcher,
    GatedSimilarityMatcher,
    KeepBest,
    Mutual,
    NearestMatcher,
    OverlapMatcher,
    RadiusMatcher,
    SimilarityMatcher,
    SinkhornMatcher,
    SoftSimilarityMatcher,
    testing,
)

matcher_test = functools.partial(
    testing.matcher_test, max_examples=5, exclude=["compiles_without_graph_breaks"]
)

test_nearest_without_limit = matcher_test(
    NearestMatcher(max_distance=None),
    xfail={"views_far_apart_do_not_match": "without a limit the nearest matches, however far"},
)
test_bilinear_warped = matcher_test(BilinearMatcher(), views="warp")
test_radius_warped = matcher_test(RadiusMatcher(), views="warp")
test_overlap = matcher_test(OverlapMatcher())
test_overlap_clip = matcher_test(OverlapMatcher("clip"), views="similar")
test_soft_similarity = matcher_test(SoftSimilarityMatcher())
test_sinkhorn_with_distance = matcher_test(
    SinkhornMatcher(distance_weight=0.5),
    xfail={"views_far_apart_do_not_match": "transport always moves all of the mass"},
)
test_gated_similarity = matcher_test(GatedSimilarityMatcher())
test_mutual_similarity = matcher_test(Mutual(SimilarityMatcher()))
test_keep_best = matcher_test(KeepBest(SimilarityMatcher(), count=2))
test_keep_best_of_mutual = matcher_test(KeepBest(Mutual(NearestMatcher()), fraction=0.5))

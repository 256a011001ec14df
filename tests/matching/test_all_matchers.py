"""The matchers under their own test kit; tests/testing has it on the plain ones."""

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
)
from local_distill.testing import matcher_test

EXAMPLES = 5

test_nearest_without_limit = matcher_test(
    NearestMatcher(max_distance=None),
    xfail={"views_far_apart_do_not_match": "without a limit the nearest matches, however far"},
    max_examples=EXAMPLES,
)
test_bilinear_warped = matcher_test(BilinearMatcher(), views="warp", max_examples=EXAMPLES)
test_radius_warped = matcher_test(RadiusMatcher(), views="warp", max_examples=EXAMPLES)
test_overlap = matcher_test(OverlapMatcher(), max_examples=EXAMPLES)
test_overlap_clip = matcher_test(OverlapMatcher("clip"), views="similar", max_examples=EXAMPLES)
test_soft_similarity = matcher_test(SoftSimilarityMatcher(), max_examples=EXAMPLES)
test_sinkhorn_with_distance = matcher_test(
    SinkhornMatcher(distance_weight=0.5),
    xfail={"views_far_apart_do_not_match": "transport always moves all of the mass"},
    max_examples=EXAMPLES,
)
test_gated_similarity = matcher_test(GatedSimilarityMatcher(), max_examples=EXAMPLES)
test_mutual_similarity = matcher_test(Mutual(SimilarityMatcher()), max_examples=EXAMPLES)
test_keep_best = matcher_test(KeepBest(SimilarityMatcher(), count=2), max_examples=EXAMPLES)
test_keep_best_of_mutual = matcher_test(
    KeepBest(Mutual(NearestMatcher()), fraction=0.5), max_examples=EXAMPLES
)

"""Every matcher of the package under its own test kit."""

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

EXAMPLES = 8

L2 = "l2 compares places: zero is one, and a longer vector is another"
L2_FAILS = dict.fromkeys(
    (
        "features_may_be_scaled",
        "zero_student_tokens_are_unmatched",
        "zero_teacher_tokens_capture_nothing",
    ),
    L2,
)

test_nearest = matcher_test(NearestMatcher(), max_examples=EXAMPLES)
test_nearest_without_limit = matcher_test(
    NearestMatcher(max_distance=None),
    xfail={"views_far_apart_do_not_match": "without a limit the nearest matches, however far"},
    max_examples=EXAMPLES,
)
test_nearest_search = matcher_test(
    NearestMatcher(method="search"), views="warp", max_examples=EXAMPLES
)
test_nearest_turned = matcher_test(NearestMatcher(), views="similar", max_examples=EXAMPLES)
test_bilinear = matcher_test(BilinearMatcher(), max_examples=EXAMPLES)
test_bilinear_warped = matcher_test(BilinearMatcher(), views="warp", max_examples=EXAMPLES)
test_radius = matcher_test(RadiusMatcher(), max_examples=EXAMPLES)
test_radius_warped = matcher_test(RadiusMatcher(), views="warp", max_examples=EXAMPLES)
test_overlap = matcher_test(OverlapMatcher(), max_examples=EXAMPLES)
test_overlap_clip = matcher_test(OverlapMatcher("clip"), views="similar", max_examples=EXAMPLES)
test_similarity = matcher_test(SimilarityMatcher(), max_examples=EXAMPLES)
test_similarity_l2 = matcher_test(SimilarityMatcher("l2"), xfail=L2_FAILS, max_examples=EXAMPLES)
test_soft_similarity = matcher_test(SoftSimilarityMatcher(), max_examples=EXAMPLES)
test_sinkhorn = matcher_test(SinkhornMatcher(), max_examples=EXAMPLES)
test_sinkhorn_with_distance = matcher_test(
    SinkhornMatcher(distance_weight=0.5),
    xfail={"views_far_apart_do_not_match": "transport always moves all of the mass"},
    max_examples=EXAMPLES,
)
test_gated_similarity = matcher_test(GatedSimilarityMatcher(), max_examples=EXAMPLES)
test_gated_similarity_l2 = matcher_test(
    GatedSimilarityMatcher(metric="l2"), xfail=L2_FAILS, max_examples=EXAMPLES
)
test_mutual_nearest = matcher_test(Mutual(NearestMatcher()), max_examples=EXAMPLES)
test_mutual_similarity = matcher_test(Mutual(SimilarityMatcher()), max_examples=EXAMPLES)
test_keep_best = matcher_test(KeepBest(SimilarityMatcher(), count=2), max_examples=EXAMPLES)
test_keep_best_of_mutual = matcher_test(
    KeepBest(Mutual(NearestMatcher()), fraction=0.5), max_examples=EXAMPLES
)

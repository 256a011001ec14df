"""Prints the table of docs/matching/faults.md: python docs/matching/make_faults.py [NAME ...]."""

import sys

from local_distill import matching
from local_distill.testing import fault_table, matcher_faults

MATCHERS = {
    "Nearest": matching.NearestMatcher(),
    "Nearest, search": matching.NearestMatcher(method="search"),
    "Bilinear": matching.BilinearMatcher(),
    "Radius": matching.RadiusMatcher(),
    "Overlap": matching.OverlapMatcher(),
    "Overlap, clip": matching.OverlapMatcher(method="clip"),
    "Similarity": matching.SimilarityMatcher(),
    "Similarity, l2": matching.SimilarityMatcher("l2"),
    "Soft similarity": matching.SoftSimilarityMatcher(),
    "Sinkhorn": matching.SinkhornMatcher(),
    "Sinkhorn, distance": matching.SinkhornMatcher(distance_weight=0.5),
    "Gated similarity": matching.GatedSimilarityMatcher(),
    "Mutual(Similarity)": matching.Mutual(matching.SimilarityMatcher()),
    "KeepBest(Nearest)": matching.KeepBest(matching.NearestMatcher(), fraction=0.5),
}
PLACES = "l2 compares places, and zero is one"
NOT_APPLICABLE = {
    "Similarity, l2": {
        "student token of zero norm": PLACES,
        "teacher token of zero norm": PLACES,
    }
}


def main(names):
    results = {}
    for name in names or MATCHERS:
        without = NOT_APPLICABLE.get(name)
        results[name] = matcher_faults(MATCHERS[name], not_applicable=without)
        for result in results[name]:
            if result.outcome == "WRONG":
                print(f"{name}: {result}", file=sys.stderr)
    print(fault_table(results))


if __name__ == "__main__":
    main(sys.argv[1:])

"""Every matcher through inductor: one graph, kept over changing crops, and the eager answer.

The kit's property `compiles_without_graph_breaks` and the table of faults ask the same of any
matcher; this is the one place of the suite where the real back end builds ours.
"""

import pytest
import torch
from helpers.strategies import random_geometry
from torch._dynamo.testing import CompileCounterWithBackend

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
    TokenGrid,
    Tokens,
)

# Clipping is a long loop over edges, for which inductor takes a minute and a half: it is traced
# through autograd's tracer here, and built whole for the page of faults (docs/matching).
CASES = {
    "nearest": (NearestMatcher(), "inductor"),
    "nearest by search": (NearestMatcher(method="search"), "inductor"),
    "radius": (RadiusMatcher(), "inductor"),
    "bilinear": (BilinearMatcher(), "inductor"),
    "overlap": (OverlapMatcher(), "inductor"),
    "overlap clip": (OverlapMatcher("clip"), "aot_eager"),
    "similarity": (SimilarityMatcher(), "inductor"),
    "similarity l2": (SimilarityMatcher("l2"), "inductor"),
    "soft similarity": (SoftSimilarityMatcher(), "inductor"),
    "sinkhorn": (SinkhornMatcher(iterations=2, distance_weight=0.5), "inductor"),
    "gated": (GatedSimilarityMatcher(), "inductor"),
    "gated l2": (GatedSimilarityMatcher(metric="l2"), "aot_eager"),
    "mutual": (Mutual(SimilarityMatcher()), "inductor"),
    "keep best": (KeepBest(SimilarityMatcher(), count=2), "inductor"),
    "keep best of mutual": (KeepBest(Mutual(NearestMatcher()), fraction=0.5), "aot_eager"),
}


def view(rows, cols, size, seed):
    features = torch.randn(2, rows * cols, 4, generator=torch.Generator().manual_seed(seed))
    grid = TokenGrid.tiling(rows, cols, size)
    return Tokens(features, random_geometry(2, size, seed=seed), grid)


@pytest.mark.parametrize(("matcher", "backend"), list(CASES.values()), ids=list(CASES))
def test_compiles_to_one_graph_over_changing_crops(matcher, backend):
    torch.compiler.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(matcher, fullgraph=True, backend=counter)
    for seed in range(10):
        student, teacher = view(2, 2, (16, 16), seed), view(3, 5, (24, 40), seed + 50)
        found, plain = compiled(student, teacher), matcher(student, teacher)
        assert torch.equal(found.matched, plain.matched)
        matched = plain.matched
        assert torch.equal(found.teacher_index[matched], plain.teacher_index[matched])
        torch.testing.assert_close(found.weight, plain.weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.cost, plain.cost, rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 2

"""Mistakes that a type checker has to see; were one not an error, its comment would be.

Never run: each function is a mistake.
"""

from torch import Tensor

import local_distill as ld
from local_distill.recipes import glsd


class TwoResults:
    """Not a matcher: it returns something else."""

    def __call__(self, student: ld.Tokens, teacher: ld.Tokens) -> Tensor:
        """A tensor in place of `Matches`."""
        raise NotImplementedError


def mistakes(tokens: ld.Tokens, matches: ld.Matches, logits: Tensor) -> None:
    """One mistake a line."""
    from local_distill import NearstMatcher  # type: ignore[attr-defined]
    from local_distill.training import trian  # type: ignore[attr-defined]

    print(NearstMatcher, trian)
    ld.TokenGrid.tiling(14, 14, 224)  # type: ignore[arg-type]
    ld.TokenGrid.tiling(14, 14)  # type: ignore[call-arg]
    ld.from_box("0 0 4 4", 8)  # type: ignore[call-arg, arg-type]
    ld.match_views(TwoResults(), [tokens], [tokens])  # type: ignore[arg-type]
    ld.match_views(ld.NearestMatcher(), tokens.features, [tokens])  # type: ignore[arg-type]
    print(tokens.features.shape)  # type: ignore[union-attr]
    ld.SimilarityMatcher(metric="dot")  # type: ignore[arg-type]
    ld.NearestMatcher(distance=0.5)  # type: ignore[call-arg]
    glsd(matching="nearest")  # type: ignore[arg-type]
    ld.LocalDistillationLoss(ld.Centering(8)).forward([logits], [logits], {})  # type: ignore[call-arg]
    ld.MultiCrop(sizes=(224, 96))  # type: ignore[call-arg]

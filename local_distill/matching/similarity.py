"""The similarity match: the teacher token of most similar features."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from local_distill._check import check_sequence, check_view_pairs
from local_distill.kernels.most_similar import Metric, most_similar
from local_distill.matching._inputs import (
    FeatureSide,
    check_metric,
    check_same_axes,
    common_dtype,
    feature_side,
)
from local_distill.matching._results import hard_matches, no_matches
from local_distill.structures import Matches, Tokens

__all__ = ["SimilarityMatcher", "similarity_matches"]

Pair = tuple[int, int]


def similarity_matches(student: Tokens, teacher: Tokens, *, metric: Metric = "cosine") -> Matches:
    """Match each student token to the teacher token whose features are most similar.

    .. math:: j(i) = argmax_j cos(f_i, g_j), cost_i = 1 - cos(f_i, g_{j(i)})

    or, with ``metric="l2"``, the least ‖f − g‖, which is then the cost.

    Convention: computed in at least float32, whatever the features' dtype and autocast say; where
    `torch.set_float32_matmul_precision` was lowered, float32 products are rounded as it says. Ties
    go to the lowest teacher index. No gradient flows through the match.

    Args:
        student: `Tokens` with features (b, s, d). Geometry and grid are looked at where both are
            given.
        teacher: `Tokens` with features (b, t, d); likewise.
        metric: ``"cosine"`` or ``"l2"``.

    Returns:
        `Matches` with k = 1 (k = 0 where t = 0). Tokens that are not finite, of zero norm under
        cosine, or (where geometry is given) centred outside the source are never matched and never
        capture a match.

    Raises:
        ConfigError: an unknown metric.
        ShapeError: no features, or axes b or d that differ.
        GeometryError: a singular, non-finite or half-precision geometry, where one is given.

    Example:
        >>> one = torch.tensor([[[2.0, 0.0], [0.0, 3.0], [0.0, 0.0]]])
        >>> two = torch.tensor([[[0.0, 1.0], [1.0, 1.0]]])
        >>> matches = similarity_matches(Tokens(one), Tokens(two))
        >>> matches.teacher_index[..., 0], matches.cost
        (tensor([[1, 0, 0]]), tensor([[0.2929, 0.0000,    inf]]))

    Source: EsViT (ICLR 2022), DenseCL (CVPR 2021), GLSD's "similarity"; VICRegL (NeurIPS 2022) for
    l2.

    Deviations from the authors' code: those compare in the dtype that autocast leaves, and let
    tokens of zero norm or outside the image take part. VICRegL takes distances by ``cdist``; here
    the common mean is taken off, the distances are compared by a product, and the chosen one is
    worked out anew.
    """
    check_metric(metric)
    one, two = feature_side("student", student), feature_side("teacher", teacher)
    check_same_axes("student", one.features, "teacher", two.features)
    return _match({0: one}, {0: two}, [(0, 0)], metric)[0, 0]


class SimilarityMatcher(nn.Module):
    """Module form of `similarity_matches`.

    Args:
        metric: ``"cosine"`` or ``"l2"``.

    Raises:
        ConfigError: an unknown metric.

    Example:
        >>> SimilarityMatcher()
        SimilarityMatcher(metric='cosine')
    """

    def __init__(self, metric: Metric = "cosine") -> None:
        super().__init__()
        self.metric: Metric = check_metric(metric)

    def forward(self, student: Tokens, teacher: Tokens) -> Matches:
        """See `similarity_matches`."""
        return similarity_matches(student, teacher, metric=self.metric)

    def match_views(
        self, student: Sequence[Tokens], teacher: Sequence[Tokens], pairs: Iterable[Pair]
    ) -> dict[Pair, Matches]:
        """All pairs of views, each view made ready once; see `match_views`."""
        check_sequence("student", student, "Tokens")
        check_sequence("teacher", teacher, "Tokens")
        pairs = list(dict.fromkeys(pairs))
        check_view_pairs(pairs, len(student), len(teacher))
        students = {v: feature_side(f"student[{v}]", student[v]) for v in {v for v, _ in pairs}}
        teachers = {q: feature_side(f"teacher[{q}]", teacher[q]) for q in {q for _, q in pairs}}
        for v, q in pairs:
            check_same_axes(
                f"student[{v}]", students[v].features, f"teacher[{q}]", teachers[q].features
            )
        return _match(students, teachers, pairs, self.metric)

    def extra_repr(self) -> str:
        """The settings, for print."""
        return f"metric={self.metric!r}"


def _match(
    students: dict[int, FeatureSide],
    teachers: dict[int, FeatureSide],
    pairs: list[Pair],
    metric: Metric,
) -> dict[Pair, Matches]:
    """Match pairs whose axes are known to fit."""
    result: dict[Pair, Matches] = {}
    # What goes through one product has one batch, one feature axis and one dtype.
    groups: dict[tuple[int, int, torch.dtype], list[Pair]] = {}
    for v, q in pairs:
        f, g = students[v].features, teachers[q].features
        dtype = common_dtype(f, g)
        if f.numel() == 0 or g.numel() == 0:
            k = min(1, g.shape[1])
            result[v, q] = no_matches(f.shape[0], f.shape[1], k, f.new_empty(0, dtype=dtype))
        else:
            groups.setdefault((f.shape[0], f.shape[2], dtype), []).append((v, q))
    for (_, _, dtype), group in groups.items():
        found = most_similar(
            {v: students[v].features for v, _ in group},
            {q: teachers[q].features for _, q in group},
            {q: teachers[q].inside for _, q in group},
            group,
            metric=metric,
            dtype=dtype,
        )
        for (v, q), best in found.items():
            keep = best.cost < torch.inf
            inside = students[v].inside
            if inside is not None:
                keep = keep & inside
            result[v, q] = hard_matches(best.teacher_index, keep, best.cost)
    return {pair: result[pair] for pair in pairs}

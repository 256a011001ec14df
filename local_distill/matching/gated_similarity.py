"""The gated similarity match: the most similar of the teacher tokens near in the source."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from local_distill._check import check_positive
from local_distill._geometric_inputs import geometric_inputs
from local_distill._precision import no_autocast
from local_distill.geometry import inside, wide_centers, wide_diagonals
from local_distill.kernels import block_length
from local_distill.kernels.most_similar import (
    Best,
    Metric,
    best_of_table,
    score_table,
    student_block,
    teacher_block,
)
from local_distill.matching._inputs import check_metric, check_same_axes, common_dtype, feature_side
from local_distill.matching._results import hard_matches, no_matches
from local_distill.structures import Matches, Tokens

__all__ = ["GatedSimilarityMatcher", "gated_similarity_matches"]

# Tables alive at once while a block is worked on, in bytes a pair of tokens: up to four of float64
# for the distance, and up to three for the scores.
_DISTANCE_BYTES, _SCORE_TABLES = 4 * 8, 3
# Copies of a student token's features meanwhile.
_STUDENT_COPIES = 6


def gated_similarity_matches(
    student: Tokens, teacher: Tokens, *, radius: float = 1.0, metric: Metric = "cosine"
) -> Matches:
    """Match each student token to the most similar of the teacher tokens nearer than a radius.

    .. math:: j(i) = argmax_{j: d_{ij} < r} cos(f_i, g_j), cost_i = 1 - cos(f_i, g_{j(i)})

    with d_ij = |p_i − p_j| / max(D_i, D_j), p the centres in source pixels and D the cells'
    diagonals there (`cell_diagonals`). With ``metric="l2"`` it is the least ‖f − g‖, which is then
    the cost.

    Convention: distances are in *larger cell diagonals*. The radius itself is excluded. Ties go to
    the lowest teacher index. Computed in at least float32, whatever the features' dtype and
    autocast say. No gradient flows through the match.

    Args:
        student: `Tokens` with features (b, s, d), geometry (b) and a grid of s tokens.
        teacher: `Tokens` with features (b, t, d), geometry (b) and a grid of t tokens.
        radius: in larger cell diagonals.
        metric: ``"cosine"`` or ``"l2"``.

    Returns:
        `Matches` with k = 1 (k = 0 where t = 0). Tokens without a candidate within the radius have
        no match. Tokens that are not finite, of zero norm under cosine, or centred outside the
        source are never matched and never capture a match.

    Raises:
        ConfigError: a radius that is not a finite number above 0, an unknown metric.
        ShapeError: no features, geometry or grid, or axes b or d that differ.
        GeometryError: a singular, non-finite or half-precision geometry, different source sizes.

    Example:
        >>> from local_distill import TokenGrid, from_box
        >>> grid = TokenGrid.tiling(1, 3, view_size=(16, 48))
        >>> view = from_box(torch.tensor([[0.0, 0, 48, 16]]), (16, 48), (16, 48))
        >>> one = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
        >>> two = torch.tensor([[[0.0, 1.0], [1.0, 1.0], [1.0, 0.0]]])
        >>> matches = gated_similarity_matches(Tokens(one, view, grid), Tokens(two, view, grid))
        >>> matches.teacher_index[..., 0]  # the first token's twin is two cells away
        tensor([[1, 2, 1]])
        >>> matches.cost
        tensor([[0.2929, 0.0000, 0.2929]])

    Source: new here: the similarity match of EsViT (ICLR 2022) among the candidates of PixPro's
    distance rule (CVPR 2021).
    """
    check_positive("radius", radius)
    check_metric(metric)
    one, two = feature_side("student", student), feature_side("teacher", teacher)
    f, g = one.features, two.features
    check_same_axes("student", f, "teacher", g)
    s_geometry, s_grid, t_geometry, t_grid = geometric_inputs(
        student, teacher, user="the gated similarity matcher"
    )
    dtype = common_dtype(f, g)
    (b, s, d), t = f.shape, g.shape[1]
    if f.numel() == 0 or g.numel() == 0:
        return no_matches(b, s, min(1, t), f.new_empty(0, dtype=dtype))
    p, q = wide_centers(s_geometry, s_grid).detach(), wide_centers(t_geometry, t_grid).detach()
    p_valid, q_valid = inside(p, s_geometry.source_size), inside(q, t_geometry.source_size)
    # An own reach for each token: the pair's is the larger one.
    p_size = wide_diagonals(s_geometry, s_grid).detach()
    q_size = wide_diagonals(t_geometry, t_grid).detach()
    item = torch.finfo(dtype).bits // 8
    token_bytes = item * (_STUDENT_COPIES * d + _SCORE_TABLES * t) + _DISTANCE_BYTES * t
    images = min(b, block_length(3 * item * t * d + s * token_bytes, f.device))
    tokens = min(s, block_length(images * token_bytes, f.device))
    blocks = []
    with no_autocast(f):
        for first in range(0, b, images):
            rows = slice(first, first + images)
            ready = teacher_block(g[rows].to(dtype), q_valid[rows], metric)
            parts = []
            for start in range(0, s, tokens):
                part = (rows, slice(start, start + tokens))
                near = _distances(p[part], p_size[part], q[rows], q_size[rows]) < radius
                raw = f[part].to(dtype)
                features, norm = student_block(raw, ready)
                table = torch.where(near, score_table(features, ready), -torch.inf)
                parts.append(best_of_table(table, raw, norm, ready))
            blocks.append(Best(*(torch.cat(pieces, 1) for pieces in zip(*parts, strict=True))))
    best = Best(*(torch.cat(pieces) for pieces in zip(*blocks, strict=True)))
    return hard_matches(best.teacher_index, (best.cost < torch.inf) & p_valid, best.cost)


class GatedSimilarityMatcher(nn.Module):
    """Module form of `gated_similarity_matches`.

    Args:
        radius: in larger cell diagonals; a token at or beyond it is no candidate.
        metric: ``"cosine"`` or ``"l2"``.

    Raises:
        ConfigError: a radius that is not a finite number above 0, an unknown metric.

    Example:
        >>> GatedSimilarityMatcher()
        GatedSimilarityMatcher(radius=1.0, metric='cosine')
    """

    def __init__(self, radius: float = 1.0, metric: Metric = "cosine") -> None:
        super().__init__()
        self.radius = check_positive("radius", radius)
        self.metric: Metric = check_metric(metric)

    def forward(self, student: Tokens, teacher: Tokens) -> Matches:
        """See `gated_similarity_matches`."""
        return gated_similarity_matches(student, teacher, radius=self.radius, metric=self.metric)

    def extra_repr(self) -> str:
        """The settings, for print."""
        return f"radius={self.radius}, metric={self.metric!r}"


def _distances(p: Tensor, p_size: Tensor, q: Tensor, q_size: Tensor) -> Tensor:
    """(n, s, t) of points (n, s, 2) and (n, t, 2), in larger cell diagonals; NaN stays NaN."""
    squared = (p[:, :, None, 0] - q[:, None, :, 0]).square()
    squared = squared + (p[:, :, None, 1] - q[:, None, :, 1]).square()
    return squared.sqrt() / torch.maximum(p_size[:, :, None], q_size[:, None])

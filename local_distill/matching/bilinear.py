"""The bilinear match: the four teacher tokens around the student token's centre."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from local_distill._geometric_inputs import geometric_inputs
from local_distill._precision import widest
from local_distill.geometry import inside, inverse_matrix, project, wide_centers, wide_diagonals
from local_distill.matching._results import no_matches
from local_distill.matching._stacked_pairs import match_stacked
from local_distill.structures import Matches, Tokens

__all__ = ["BilinearMatcher", "bilinear_matches"]


def bilinear_matches(student: Tokens, teacher: Tokens) -> Matches:
    """Match each student token to the four teacher tokens around its centre.

    .. math:: (u, v) = ((x, y) - o) / g, (x, y) = H_t^{-1}(p_i)

    .. math:: w_{ij} = max(0, 1 - |u - c_j|) · max(0, 1 - |v - r_j|)

    with p_i the student's centre in the source, H_t the teacher view's homography, o and g its
    grid's offset and stride, and (r_j, c_j) the row and column of token j: reading the teacher's
    values by bilinear interpolation at the place that the student token shows. With p also the
    teacher's centres and D the cells' diagonals in the source, the cost is

    .. math:: cost_i = Σ_j w_{ij} |p_i - p_j| / max(D_i, D_j) / Σ_j w_{ij}

    Convention: lengths are in *larger cell diagonals*. The weights are not made up to 1 where a
    neighbour is missing: the match fades to nothing over the cell around the outermost centres, as
    ``grid_sample`` with zeros for padding does.

    Args:
        student: `Tokens` with geometry (b) and grid of s tokens; features are not looked at.
        teacher: `Tokens` with geometry (b) and grid of t tokens, of any geometry.

    Returns:
        `Matches` with k = 4 (k = 0 where t = 0): top left, top right, bottom left, bottom right in
        the teacher's view. A neighbour beyond the grid has weight 0 and the index of the token
        next to it; one whose centre is outside the source has weight 0. Student tokens with centres
        outside the source are never matched. In the wider of the two matrices' dtypes.

    Raises:
        ShapeError: no geometry or grid, or batches that differ.
        GeometryError: a singular, non-finite or half-precision geometry, or different sources.

    Example:
        >>> from local_distill import TokenGrid, from_box
        >>> grid = TokenGrid.tiling(1, 3, view_size=(16, 48))
        >>> one = from_box(torch.tensor([[0.0, 0, 48, 16]]), (16, 48), (16, 64))
        >>> two = from_box(torch.tensor([[12.0, 0, 60, 16]]), (16, 48), (16, 64))
        >>> matches = bilinear_matches(Tokens(None, one, grid), Tokens(None, two, grid))
        >>> matches.weight[0, :, :2]  # 12 px are three quarters of a cell
        tensor([[0.0000, 0.2500],
                [0.7500, 0.2500],
                [0.7500, 0.2500]])
        >>> matches.teacher_index[0, :, :2]
        tensor([[0, 0],
                [0, 1],
                [1, 2]])

    Source: none; interpolation as in ``torch.nn.functional.grid_sample``.
    """
    s_geometry, s_grid, t_geometry, t_grid = geometric_inputs(
        student, teacher, user="the bilinear matcher"
    )
    b, s, t = s_geometry.matrix.shape[0], s_grid.num_tokens, t_grid.num_tokens
    dtype = torch.promote_types(s_geometry.matrix.dtype, t_geometry.matrix.dtype)
    with torch.no_grad():
        if s == 0 or t == 0:
            return no_matches(b, s, 4 if t else 0, s_geometry.matrix.to(dtype))
        p, q = wide_centers(s_geometry, s_grid), wide_centers(t_geometry, t_grid)
        p_valid, q_valid = inside(p, s_geometry.source_size), inside(q, t_geometry.source_size)
        # p is NaN beyond the student view's horizon, and this beyond the teacher view's as well.
        points = project(inverse_matrix(widest(t_geometry.matrix)), p)
        offset, stride = points.new_tensor(t_grid.offset), points.new_tensor(t_grid.stride)
        u, v = ((points - offset) / stride).unbind(-1)
        columns, along_u = _neighbours(u, t_grid.cols)
        rows, along_v = _neighbours(v, t_grid.rows)
        index = (rows[..., :, None] * t_grid.cols + columns[..., None, :]).flatten(2)
        weight = (along_v[..., :, None] * along_u[..., None, :]).flatten(2)
        usable = p_valid[..., None] & _take(q_valid, index)
        weight = torch.where(usable, weight, 0.0)
        chosen = torch.stack([_take(part, index) for part in q.unbind(-1)], -1)
        diagonal = torch.maximum(
            wide_diagonals(s_geometry, s_grid)[..., None],
            _take(wide_diagonals(t_geometry, t_grid), index),
        )
        distance = (p[:, :, None] - chosen).square().sum(-1).sqrt() / diagonal
        total = torch.where(weight > 0, weight * distance, 0.0).sum(-1)
        cost = (total / weight.sum(-1)).to(dtype)
        weight = weight.to(dtype)  # what is left of it after rounding says whether there is a match
        return Matches(index, weight, torch.where((weight > 0).any(-1), cost, torch.inf))


class BilinearMatcher(nn.Module):
    """Module form of `bilinear_matches`; it has no settings.

    Example:
        >>> BilinearMatcher()
        BilinearMatcher()
    """

    def forward(self, student: Tokens, teacher: Tokens) -> Matches:
        """See `bilinear_matches`."""
        return bilinear_matches(student, teacher)

    def match_views(
        self, student: Sequence[Tokens], teacher: Sequence[Tokens], pairs: Iterable[tuple[int, int]]
    ) -> dict[tuple[int, int], Matches]:
        """All pairs of views with the same grids in one go; see `match_views`."""
        return match_stacked(self, student, teacher, pairs, with_features=False)


def _neighbours(place: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The two whole numbers around places (b, s), and their shares.

    Returns:
        (b, s, 2) int64 in [0, count), and (b, s, 2) shares, 0 for a neighbour that was not there.
    """
    # Beyond one step from the ends nothing has a share, and no NaN or 1e30 becomes an index.
    place = place.nan_to_num(-1.0).clamp(-1, count)
    low = place.floor()
    above = place - low
    whole = torch.stack((low, low + 1), -1)
    share = torch.stack((1 - above, above), -1)
    share = torch.where((whole >= 0) & (whole < count), share, 0.0)
    return whole.clamp(0, count - 1).to(torch.int64), share


def _take(values: Tensor, index: Tensor) -> Tensor:
    """(b, s, k) of values (b, t) at index (b, s, k)."""
    return values.gather(1, index.flatten(1)).reshape(index.shape)

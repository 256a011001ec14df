"""The radius match: every teacher token whose centre is near enough in the source."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from local_distill._check import check_positive
from local_distill._geometric_inputs import geometric_inputs
from local_distill.geometry import inside, wide_centers, wide_diagonals
from local_distill.kernels import block_length
from local_distill.matching._results import dense_matches, no_matches
from local_distill.matching._stacked_pairs import match_stacked
from local_distill.structures import Matches, Tokens

__all__ = ["RadiusMatcher", "radius_matches"]

# Float64 numbers that one pair of tokens takes while a block is worked on.
_NUMBERS_PER_PAIR = 4


def radius_matches(student: Tokens, teacher: Tokens, *, radius: float = 0.7) -> Matches:
    """Match each student token to every teacher token that lies nearer than a radius.

    .. math:: w_{ij} = [d_{ij} < r] / t, d_{ij} = |p_i - p_j| / max(D_i, D_j)

    with p the centres in source pixels and D the cells' diagonals there (`cell_diagonals`). The
    cost of token i is the mean of d_ij over its matches.

    Each match weighs 1/t whatever the number of matches. A loss with ``normalize="image"`` then is
    Σ w·l / Σ w over all pairs of tokens of an image, in which 1/t cancels: the plain mean over the
    image's positive pairs, which is PixPro's.

    Convention: distances are in *larger cell diagonals*. The radius itself is excluded.

    Args:
        student: `Tokens` with geometry (b) and grid of s tokens; features are not looked at.
        teacher: `Tokens` with geometry (b) and grid of t tokens.
        radius: in larger cell diagonals.

    Returns:
        `Matches` with k = t: every teacher token in order, with weight 1/t or 0. Tokens with
        centres outside the source are never matched and never capture a match. In the wider of the
        two matrices' dtypes.

    Raises:
        ShapeError: no geometry or grid, or batches that differ.
        GeometryError: a singular, non-finite or half-precision geometry, or different sources.
        ConfigError: a radius that is not a finite number above 0.

    Example:
        >>> from local_distill import TokenGrid, from_box
        >>> grid = TokenGrid.tiling(1, 3, view_size=(16, 48))
        >>> one = from_box(torch.tensor([[0.0, 0, 48, 16]]), (16, 48), (16, 64))
        >>> two = from_box(torch.tensor([[8.0, 0, 56, 16]]), (16, 48), (16, 64))
        >>> matches = radius_matches(Tokens(None, one, grid), Tokens(None, two, grid))
        >>> matches.weight[0]  # half a cell to the right: each lies between two
        tensor([[0.3333, 0.0000, 0.0000],
                [0.3333, 0.3333, 0.0000],
                [0.0000, 0.3333, 0.3333]])
        >>> matches.cost  # half a cell of 16 × 16 is 8 / 22.6 of its diagonal
        tensor([[0.3536, 0.3536, 0.3536]])

    Source: "Propagate Yourself: Exploring Pixel-Level Consistency for Unsupervised Visual
    Representation Learning" (PixPro, CVPR 2021), equation 1 and threshold 0.7.

    Deviations from the authors' code: it divides x by the source's width − 1 and y by its height −
    1 before it measures, so that a distance across and one down count differently unless the source
    is square, and takes a crop of w pixels as w − 1 long; here both are source pixels. It knows one
    diagonal a view, here each token has its own, which is the same for crops. It adds 1e-6 to the
    number of positive pairs before it divides. As there, the limit is excluded, mirrored views are
    followed, and an image without a positive pair adds 0 to the mean.
    """
    check_positive("radius", radius)
    s_geometry, s_grid, t_geometry, t_grid = geometric_inputs(
        student, teacher, user="the radius matcher"
    )
    b, s, t = s_geometry.matrix.shape[0], s_grid.num_tokens, t_grid.num_tokens
    dtype = torch.promote_types(s_geometry.matrix.dtype, t_geometry.matrix.dtype)
    with torch.no_grad():
        if s == 0 or t == 0:
            return no_matches(b, s, t, s_geometry.matrix.to(dtype))
        p, q = wide_centers(s_geometry, s_grid), wide_centers(t_geometry, t_grid)
        p_valid, q_valid = inside(p, s_geometry.source_size), inside(q, t_geometry.source_size)
        p_diagonal = wide_diagonals(s_geometry, s_grid)
        q_diagonal = wide_diagonals(t_geometry, t_grid)
        # min: a batch of another size then asks for no other graph as long as one block is enough
        block = min(s, block_length(b * t * _NUMBERS_PER_PAIR * p.element_size(), p.device))
        near, cost = [], []
        for start in range(0, s, block):
            part = slice(start, start + block)
            distance = _distances(p[:, part], q)
            distance = distance / torch.maximum(p_diagonal[:, part, None], q_diagonal[:, None])
            positive = (distance < radius) & p_valid[:, part, None] & q_valid[:, None]
            total = torch.where(positive, distance, 0.0).sum(-1)
            cost.append(total / positive.sum(-1))
            near.append(positive)
        weight = torch.cat(near, 1).to(dtype) / q.shape[1]
        return dense_matches(weight, torch.cat(cost, 1).to(dtype))


class RadiusMatcher(nn.Module):
    """Module form of `radius_matches`.

    Args:
        radius: in larger cell diagonals; a token at or beyond it is no match.

    Raises:
        ConfigError: a radius that is not a finite number above 0.

    Example:
        >>> RadiusMatcher()
        RadiusMatcher(radius=0.7)
    """

    def __init__(self, radius: float = 0.7) -> None:
        super().__init__()
        self.radius = check_positive("radius", radius)

    def forward(self, student: Tokens, teacher: Tokens) -> Matches:
        """See `radius_matches`."""
        return radius_matches(student, teacher, radius=self.radius)

    def match_views(
        self, student: Sequence[Tokens], teacher: Sequence[Tokens], pairs: Iterable[tuple[int, int]]
    ) -> dict[tuple[int, int], Matches]:
        """All pairs of views with the same grids in one go; see `match_views`."""
        return match_stacked(self, student, teacher, pairs, with_features=False)

    def extra_repr(self) -> str:
        """The settings, for print."""
        return f"radius={self.radius}"


def _distances(p: Tensor, q: Tensor) -> Tensor:
    """(b, s, t) of points (b, s, 2) and (b, t, 2), without a (b, s, t, 2) table."""
    across = p[:, :, None, 0] - q[:, None, :, 0]
    down = p[:, :, None, 1] - q[:, None, :, 1]
    return (across.square() + down.square()).sqrt()

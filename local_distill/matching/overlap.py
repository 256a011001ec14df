"""The overlap match: teacher tokens by the share of the student's footprint that they cover."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from local_distill._geometric_inputs import geometric_inputs
from local_distill.errors import ConfigError
from local_distill.footprints import (
    clipped_areas,
    shared_lengths,
    signed_area,
    spans,
    upright_views,
    wide_footprints,
)
from local_distill.geometry import inside, wide_centers
from local_distill.kernels import block_length
from local_distill.matching._results import dense_matches, no_matches
from local_distill.matching._stacked_pairs import match_stacked
from local_distill.structures import CropGeometry, Matches, TokenGrid, Tokens

__all__ = ["OverlapMatcher", "overlap_matches"]

# Bytes that one pair of tokens takes while a block is worked on.
_BYTES_PER_PAIR = {"boxes": 32, "clip": 640}
# Rounding of float32 geometry lets cells overlap that only touch.
_SLIVER = 1e-6


def overlap_matches(
    student: Tokens, teacher: Tokens, *, method: Literal["boxes", "clip"] = "boxes"
) -> Matches:
    """Match each student token to the teacher tokens that cover its footprint, by their shares.

    .. math:: w_{ij} = |Q_i ∩ Q_j| / |Q_i|, cost_i = 1 - Σ_j w_{ij}

    with Q the tokens' footprints in the source (`token_footprints`). The cost is the share of the
    student's footprint that no teacher token covers.

    Convention: footprints are not clipped to the source, but a token whose centre lies outside it
    is left out on either side. A share of a millionth or less counts as none: cells that only touch
    share that much by rounding, and a match of no mass would still count as one.

    Args:
        student: `Tokens` with geometry (b) and grid of s tokens; features are not looked at.
        teacher: `Tokens` with geometry (b) and grid of t tokens.
        method: ``"boxes"`` multiplies what columns share by what rows share: quick, for crops and
            flips. ``"clip"`` cuts the footprints with each other and takes any geometry; it takes
            some twenty times the memory while it works, in blocks.

    Returns:
        `Matches` with k = t: every teacher token in order, of weights that sum to at most 1 (but
        for the rounding of each). In the wider of the two matrices' dtypes.

    Raises:
        ShapeError: no geometry or grid, or batches that differ.
        GeometryError: a singular, non-finite or half-precision geometry, or different sources; one
            that ``"boxes"`` cannot serve, where that can be seen without a device sync. Where it
            can't, that image's tokens stay unmatched: never a wrong match.
        ConfigError: an unknown method.

    Example:
        >>> from local_distill import TokenGrid, from_box
        >>> grid = TokenGrid.tiling(1, 3, view_size=(16, 48))
        >>> one = from_box(torch.tensor([[0.0, 0, 48, 16]]), (16, 48), (16, 64))
        >>> two = from_box(torch.tensor([[12.0, 0, 60, 16]]), (16, 48), (16, 64))
        >>> matches = overlap_matches(Tokens(None, one, grid), Tokens(None, two, grid))
        >>> matches.weight[0]  # 12 px are three quarters of a cell
        tensor([[0.2500, 0.0000, 0.0000],
                [0.7500, 0.2500, 0.0000],
                [0.0000, 0.7500, 0.2500]])
        >>> matches.cost
        tensor([[0.7500, 0.0000, 0.0000]])

    Source: none; `overlap_area` names that of the clipping.
    """
    _check_method(method)
    s_geometry, s_grid, t_geometry, t_grid = geometric_inputs(
        student, teacher, user="the overlap matcher"
    )
    b, s, t = s_geometry.matrix.shape[0], s_grid.num_tokens, t_grid.num_tokens
    dtype = torch.promote_types(s_geometry.matrix.dtype, t_geometry.matrix.dtype)
    with torch.no_grad():
        if s == 0 or t == 0:
            return no_matches(b, s, t, s_geometry.matrix.to(dtype))
        shares = (_BoxShares if method == "boxes" else _ClipShares)(
            s_geometry, s_grid, t_geometry, t_grid
        )
        s_valid = inside(wide_centers(s_geometry, s_grid), s_geometry.source_size)
        t_valid = inside(wide_centers(t_geometry, t_grid), t_geometry.source_size)
        # min: a batch of another size then asks for no other graph as long as one block is enough
        block = min(s, block_length(b * t * _BYTES_PER_PAIR[method], s_valid.device))
        weights, uncovered = [], []
        for start in range(0, s, block):
            stop = min(s, start + block)
            valid = s_valid[:, start:stop, None] & t_valid[:, None]
            share = shares.of(start, stop)
            share = torch.where(valid & (share > _SLIVER), share, 0.0)
            mass = share.sum(-1)
            # Cells that cover all of it may by rounding seem to cover more.
            weights.append((share / mass.clamp_min(1.0)[..., None]).to(dtype))
            uncovered.append((1 - mass).clamp_min(0.0))
        return dense_matches(torch.cat(weights, 1), torch.cat(uncovered, 1).to(dtype))


class OverlapMatcher(nn.Module):
    """Module form of `overlap_matches`.

    Args:
        method: ``"boxes"`` for crops and flips, ``"clip"`` for any geometry.

    Raises:
        ConfigError: an unknown method.

    Example:
        >>> OverlapMatcher()
        OverlapMatcher(method='boxes')
    """

    def __init__(self, method: Literal["boxes", "clip"] = "boxes") -> None:
        super().__init__()
        _check_method(method)
        self.method: Literal["boxes", "clip"] = method

    def forward(self, student: Tokens, teacher: Tokens) -> Matches:
        """See `overlap_matches`."""
        return overlap_matches(student, teacher, method=self.method)

    def match_views(
        self, student: Sequence[Tokens], teacher: Sequence[Tokens], pairs: Iterable[tuple[int, int]]
    ) -> dict[tuple[int, int], Matches]:
        """All pairs of views with the same grids in one go; see `match_views`."""
        return match_stacked(self, student, teacher, pairs, with_features=False)

    def extra_repr(self) -> str:
        """The settings, for print."""
        return f"method={self.method!r}"


def _check_method(method: str) -> None:
    if method not in ("boxes", "clip"):
        raise ConfigError(f'`method` must be "boxes" or "clip", got {method!r}')


class _BoxShares:
    """Shares of upright boxes: a column's times a row's."""

    def __init__(
        self,
        s_geometry: CropGeometry,
        s_grid: TokenGrid,
        t_geometry: CropGeometry,
        t_grid: TokenGrid,
    ) -> None:
        served = upright_views(
            s_geometry, s_grid, t_geometry, t_grid, use='OverlapMatcher(method="clip")'
        )
        shares = []
        for axis in (0, 1):
            own, other = spans(s_geometry, s_grid, axis), spans(t_geometry, t_grid, axis)
            length = own[1] - own[0]
            good = (length > 0) & served[:, None]  # a singular or NaN matrix that was not seen
            share = shared_lengths(own, other) / length[..., None]
            shares.append(torch.where(good[..., None], share, 0.0))
        self._columns, self._rows = shares  # (b, s's columns, t's columns), (b, s's rows, t's rows)

    def of(self, start: int, stop: int) -> Tensor:
        """(b, stop − start, t) shares of the student tokens [start, stop)."""
        cols = self._columns.shape[1]
        token = torch.arange(start, stop, device=self._columns.device)
        rows = self._rows.index_select(1, token.div(cols, rounding_mode="floor"))
        columns = self._columns.index_select(1, token % cols)
        return (rows[..., :, None] * columns[..., None, :]).flatten(2)


class _ClipShares:
    """Shares of footprints of any form."""

    def __init__(
        self,
        s_geometry: CropGeometry,
        s_grid: TokenGrid,
        t_geometry: CropGeometry,
        t_grid: TokenGrid,
    ) -> None:
        self._student = wide_footprints(s_geometry, s_grid)
        self._teacher = wide_footprints(t_geometry, t_grid)
        self._area = signed_area(self._student).abs()

    def of(self, start: int, stop: int) -> Tensor:
        """(b, stop − start, t) shares of the student tokens [start, stop)."""
        shared = clipped_areas(self._student[:, start:stop], self._teacher)
        area = self._area[:, start:stop, None]
        return torch.where(area > 0, shared / area, 0.0)  # NaN where it reaches the horizon

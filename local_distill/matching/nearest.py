"""The geometric match: the teacher token whose centre is nearest in the source."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from local_distill._check import check_positive, values_visible
from local_distill._geometric_inputs import geometric_inputs
from local_distill._precision import widest
from local_distill.errors import ConfigError, GeometryError
from local_distill.geometry import (
    grid_points,
    inside,
    inverse_matrix,
    project,
    wide_centers,
    wide_diagonals,
)
from local_distill.matching._results import hard_matches, no_matches
from local_distill.structures import CropGeometry, Matches, TokenGrid, Tokens

__all__ = ["NearestMatcher", "nearest_matches"]

# Bytes that one block of the search's (tokens × teacher tokens) table may take.
_SEARCH_BYTES = 64 * 2**20
# Cell axes count as orthogonal up to this cosine: float32 rounding of a rotation's entries is 1e-7.
_ORTHOGONAL = 1e-5


def nearest_matches(
    student: Tokens,
    teacher: Tokens,
    *,
    max_distance: float | None = 0.5,
    method: Literal["lattice", "search"] = "lattice",
) -> Matches:
    """Match each student token to the teacher token whose centre is nearest in the source.

    .. math:: j(i) = argmin_j |p_i - p_j|, cost_i = |p_i - p_{j(i)}| / max(D_i, D_{j(i)})

    with p the centres in source pixels and D the cells' diagonals there (`cell_diagonals`).

    Convention: distances are in *larger cell diagonals*, so that 0.5 means: the centre lies within
    about half a cell of the coarser grid. Ties go to the lowest teacher index.

    Args:
        student: `Tokens` with geometry (b) and grid of s tokens; features are not looked at.
        teacher: `Tokens` with geometry (b) and grid of t tokens.
        max_distance: a token whose nearest lies at or beyond it has no match; None: no limit.
        method: ``"lattice"`` rounds in the teacher's token coordinates and needs no s × t table. It
            serves teacher views whose cell axes are orthogonal in the source: crops, flips, quarter
            turns, similarity transforms. ``"search"`` takes any geometry.

    Returns:
        `Matches` with k = 1 (k = 0 where t = 0). Tokens with centres outside the source are never
        matched and never capture a match.

    Raises:
        ShapeError: no geometry or grid, or batches that differ.
        GeometryError: a singular, non-finite or half-precision geometry; one that the lattice
            cannot serve, where that can be seen without a device sync. Where it can't, the tokens
            concerned stay unmatched: never a wrong match.

    Example:
        >>> import torch
        >>> from local_distill import TokenGrid, from_box
        >>> grid = TokenGrid.tiling(2, 3, view_size=(32, 48))
        >>> one = from_box(torch.tensor([[0.0, 0, 48, 32], [0, 0, 48, 32]]), (32, 48), (32, 64))
        >>> two = from_box(torch.tensor([[16.0, 0, 64, 32], [0, 0, 48, 32]]), (32, 48), (32, 64),
        ...                hflip=torch.tensor([False, True]))
        >>> matches = nearest_matches(Tokens(None, one, grid), Tokens(None, two, grid))
        >>> matches.teacher_index[1, :, 0]  # mirrored
        tensor([2, 1, 0, 5, 4, 3])
        >>> matches.matched[0]  # the first column is not in the second view
        tensor([False,  True,  True, False,  True,  True])

    Source: "Global-Local Self-Distillation" (WACV 2023), its distance-based matching with a hinge.
    """
    s_geometry, s_grid, t_geometry, t_grid = geometric_inputs(student, teacher)
    if s_grid.num_tokens == 0 or t_grid.num_tokens == 0:
        matrix = s_geometry.matrix
        return no_matches(matrix.shape[0], s_grid.num_tokens, min(1, t_grid.num_tokens), matrix)
    source = _Side.of(s_geometry, s_grid)
    target = _Side.of(t_geometry, t_grid)
    if method == "lattice":
        index, found = _by_lattice(s_geometry, s_grid, t_geometry, t_grid, target)
    elif method == "search":
        index, found = _by_search(source, target)
    else:
        raise ConfigError(f'`method` must be "lattice" or "search", got {method!r}')
    chosen = target.centers.gather(1, index[..., None].expand(-1, -1, 2))
    diagonal = torch.maximum(source.diagonals, target.diagonals.gather(1, index))
    distance = (source.centers - chosen).square().sum(-1).sqrt() / diagonal
    keep = found & source.valid & target.valid.gather(1, index)
    if max_distance is not None:
        keep = keep & (distance < max_distance)
    dtype = s_geometry.matrix.dtype
    return hard_matches(index, keep, distance.to(dtype))


class NearestMatcher(nn.Module):
    """Module form of `nearest_matches`.

    Args:
        max_distance: limit in larger cell diagonals; a token at or beyond it has no match. None: no
            limit.
        method: ``"lattice"`` or ``"search"``, see `nearest_matches`.

    Raises:
        ConfigError: a limit that is not above 0, an unknown method.

    Example:
        >>> NearestMatcher(max_distance=None)
        NearestMatcher(max_distance=None, method='lattice')
    """

    def __init__(
        self,
        max_distance: float | None = 0.5,
        method: Literal["lattice", "search"] = "lattice",
    ) -> None:
        super().__init__()
        if max_distance is not None:
            check_positive("max_distance", max_distance)
        if method not in ("lattice", "search"):
            raise ConfigError(f'`method` must be "lattice" or "search", got {method!r}')
        self.max_distance = max_distance
        self.method: Literal["lattice", "search"] = method

    def forward(self, student: Tokens, teacher: Tokens) -> Matches:
        """See `nearest_matches`."""
        return nearest_matches(student, teacher, max_distance=self.max_distance, method=self.method)

    def extra_repr(self) -> str:
        """The settings, for print."""
        return f"max_distance={self.max_distance}, method={self.method!r}"


class _Side(NamedTuple):
    centers: Tensor  # (b, n, 2) source pixels
    diagonals: Tensor  # (b, n) source pixels
    valid: Tensor  # (b, n) centre inside the source

    @classmethod
    def of(cls, geometry: CropGeometry, grid: TokenGrid) -> _Side:
        centers = wide_centers(geometry, grid)
        return cls(centers, wide_diagonals(geometry, grid), inside(centers, geometry.source_size))


def _by_lattice(
    s_geometry: CropGeometry,
    s_grid: TokenGrid,
    t_geometry: CropGeometry,
    t_grid: TokenGrid,
    target: _Side,
) -> tuple[Tensor, Tensor]:
    """Round in teacher token coordinates: with orthogonal axes, x and y are decided apart."""
    s_matrix, t_matrix = widest(s_geometry.matrix), widest(t_geometry.matrix)
    valid = target.valid.reshape(-1, t_grid.rows, t_grid.cols)
    columns, rows = valid.any(1), valid.any(2)
    served = _is_orthogonal(t_matrix, t_grid)
    # The clamp below is exact only where the tokens inside the source form a rectangle of the grid.
    rectangular = (valid == (rows[:, :, None] & columns[:, None, :])).all((1, 2))
    if values_visible(s_matrix, t_matrix):
        _refuse_unless(served, "cell axes are not orthogonal in the source (shear, perspective)")
        _refuse_unless(
            rectangular,
            "turned view reaches out of the source, so that its inner tokens form no rectangle",
        )
    from_student = inverse_matrix(t_matrix) @ s_matrix
    points = project(from_student, grid_points(s_grid, s_matrix.device, s_matrix.dtype))
    offset = points.new_tensor(t_grid.offset)
    stride = points.new_tensor(t_grid.stride)
    column, row = ((points - offset) / stride).unbind(-1)
    column = _clamp_to(_round_down(column), columns)
    row = _clamp_to(_round_down(row), rows)
    index = row * t_grid.cols + column
    found = served & rectangular & valid.any((1, 2))
    return index, found[:, None].expand_as(index)


def _is_orthogonal(matrix: Tensor, grid: TokenGrid) -> Tensor:
    """(b,) whether the view is affine and its cell axes are orthogonal in the source."""
    across, down = matrix[:, :2, 0], matrix[:, :2, 1]
    cosine = (across * down).sum(-1).abs() / (across.norm(dim=-1) * down.norm(dim=-1))
    # Perspective: how much the third coordinate changes over the grid, relative to its constant.
    reach = max(grid.cols * grid.stride[0], grid.rows * grid.stride[1])
    bend = matrix[:, 2, :2].abs().amax(-1) * reach / matrix[:, 2, 2].abs()
    orthogonal: Tensor = (cosine < _ORTHOGONAL) & (bend < _ORTHOGONAL)
    return orthogonal


def _refuse_unless(good: Tensor, what: str) -> None:
    if not bool(good.all()):
        first = int((~good).nonzero()[0, 0])
        raise GeometryError(
            f"`teacher.geometry` of image {first}: the {what}; the lattice method cannot serve it, "
            'use NearestMatcher(method="search")'
        )


def _round_down(values: Tensor) -> Tensor:
    """Round to the nearest whole number, halves downwards: ties go to the lowest index."""
    return (values - 0.5).ceil()


def _clamp_to(values: Tensor, allowed: Tensor) -> Tensor:
    """Clamp (b, s) to the first and last allowed index of each image's (b, n); NaN becomes 0."""
    last = allowed.shape[1] - 1
    flags = allowed.to(torch.int64)
    low = flags.argmax(1)
    high = last - flags.flip(1).argmax(1)
    clamped = torch.minimum(torch.maximum(values, low[:, None]), high[:, None])
    return clamped.nan_to_num(0.0).to(torch.int64)


def _by_search(source: _Side, target: _Side) -> tuple[Tensor, Tensor]:
    """Look at every pair, in blocks; squared differences, never the matrix-product form."""
    b, s = source.valid.shape
    t = target.valid.shape[1]
    x, y = torch.where(target.valid[..., None], target.centers, torch.inf).unbind(-1)
    block = max(1, _SEARCH_BYTES // max(1, 3 * b * t * source.centers.element_size()))
    indices = []
    for start in range(0, s, block):
        points = source.centers[:, start : start + block]
        squared = (points[..., 0, None] - x[:, None]).square()
        squared = squared + (points[..., 1, None] - y[:, None]).square()
        # A NaN student point would make argmin return it; its match is dropped by `valid` anyway.
        indices.append(squared.argmin(-1))
    return torch.cat(indices, 1), target.valid.any(1, keepdim=True).expand(b, s)

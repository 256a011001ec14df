"""The nearest token of a lattice in closed form: no table of all pairs of tokens is ever made.

A teacher view is a *lattice* where its cell axes are orthogonal in the source (crops, flips,
quarter turns, similarity transforms). The nearest of its tokens is then found along x and along y
apart: bring the point into the lattice's token coordinates (column, row), round, clamp.

All pairs of views with the same two grids are worked on together, and what depends on one view
alone is worked out once a view: `cell_maps`, `placed_tokens`, `lattice_students`,
`lattice_teachers`. On a CPU the time goes into starting operations as much as into numbers; so
small tensors are worked on for all views at once, and large ones in place. On a GPU
`triton_lattice` does all of it in one launch.

Axes: n views, b images, p pairs of views, s student tokens, t teacher tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from local_distill._precision import no_autocast
from local_distill.kernels.byte_budget import block_length
from local_distill.structures import TokenGrid

__all__ = [
    "CellMaps",
    "LatticeStudents",
    "LatticeTeachers",
    "PlacedTokens",
    "cell_maps",
    "lattice_students",
    "lattice_teachers",
    "nearest_on_lattice",
    "placed_tokens",
    "snapping_origin",
]

# Cell axes count as orthogonal up to this cosine: float32 rounding of a rotation's entries is 1e-7.
_ORTHOGONAL = 1e-5
# Numbers of the widest type that one student token takes while a block of pairs is worked on.
_NUMBERS_PER_TOKEN = 8


class CellMaps(NamedTuple):
    """Of n views, of any grids, all that is worked out for all of them at once.

    Views and images are the last axes, so that every operation runs along a long row of numbers.
    """

    matrix: Tensor  # (3, 3, n, b) view → source px
    cells: Tensor  # (3, 3, n, b) token coordinates (column, row) → source px
    cofactors: Tensor  # (3, 3, n, b) of `cells`
    inverse: Tensor  # (3, 3, n, b) of `cells`
    limits: Tensor  # (2, n, b) width and height of the source, px
    sound: Tensor  # (1, n, b) bool: finite and not singular; else cells, inverse are the identity


class PlacedTokens(NamedTuple):
    """The tokens of n views of one grid in the source."""

    columns: Tensor  # (cols,) 0, 1, …
    rows: Tensor  # (rows,)
    third: Tensor  # (n, b, rows, cols) third coordinates of the centres
    inside: Tensor  # (n, b, rows, cols) bool, centre inside the source


class LatticeStudents(NamedTuple):
    """What a match needs of n student views of one grid."""

    cells: Tensor  # (n, b, 3, 3) token coordinates (column, row) → source px
    points: Tensor  # (3, s) homogeneous token coordinates
    squared_diagonals: Tensor  # (n, b, s) of the cells, source px²; NaN for a token of no match


class LatticeTeachers(NamedTuple):
    """What a match needs of n teacher views of one grid."""

    to_grid: Tensor  # (n, b, 3, 3) source px → (column, row)
    # (n, 6, b): along x and then along y, the first and the last index whose centre lies inside the
    # source, and the length of one cell in source px, NaN for an image that no lattice serves
    spans: Tensor
    orthogonal: Tensor  # (n, b) bool: affine, and the cell axes are orthogonal in the source
    rectangular: Tensor  # (n, b) bool: the tokens inside the source form a rectangle of the grid


def cell_maps(matrix: Tensor, source_size: Tensor, grids: Sequence[TokenGrid]) -> CellMaps:
    """Prepare n views of any grids.

    Args:
        matrix: (n, b, 3, 3) view → source px.
        source_size: (n, b, 2) (height, width).
        grids: n of them.
    """
    with no_autocast(matrix):
        cells = (matrix @ _grid_matrices(grids, matrix)).permute(2, 3, 0, 1).contiguous()
    matrix = matrix.permute(2, 3, 0, 1)
    cofactors = torch.linalg.cross(cells.roll(-1, 0), cells.roll(1, 0), dim=1)
    determinant = (cells[0] * cofactors[0]).sum(0)
    # As `sound_matrix`; and no numbers of which products might overflow. False for NaN.
    lengths = cells[:2, :2].square().sum(0).prod(0).sqrt()
    sound = determinant.abs() > 1e-7 * lengths * matrix[2, 2].abs().clamp_min(1e-30)
    sound = sound & (cells.abs().amax((0, 1)) < torch.finfo(cells.dtype).max ** 0.25)
    identity = torch.eye(3, dtype=cells.dtype, device=cells.device)[..., None, None]
    return CellMaps(
        matrix=matrix,
        cells=torch.where(sound, cells, identity),
        cofactors=cofactors,
        inverse=torch.where(sound, cofactors.transpose(0, 1) / determinant, identity),
        limits=source_size.permute(2, 0, 1).flip(0),
        sound=sound[None],
    )


def placed_tokens(maps: CellMaps, grid: TokenGrid) -> PlacedTokens:
    """Which tokens have their centre in the closed source rectangle.

    To the bit what `geometry.inside` says of `geometry.wide_centers`: the same sums in the same
    order. But the products are made once a row and once a column of tokens.

    Args:
        maps: of n views.
        grid: of all n views.
    """
    matrix = maps.matrix
    columns = torch.arange(grid.cols, device=matrix.device, dtype=matrix.dtype)
    rows = torch.arange(grid.rows, device=matrix.device, dtype=matrix.dtype)
    xs = grid.offset[0] + grid.stride[0] * columns
    ys = grid.offset[1] + grid.stride[1] * rows
    across, down, constant = matrix[..., None, None].unbind(1)
    points = across * xs + down * ys[:, None]
    points += constant
    third = points[2]
    places = points[:2].div_(third)
    within = (places >= 0) & (places <= maps.limits[..., None, None])
    return PlacedTokens(columns, rows, third, within[0] & within[1] & (third > 0))


def lattice_students(maps: CellMaps, tokens: PlacedTokens) -> LatticeStudents:
    """Prepare n student views of one grid, of any homography.

    With the cofactors C of `CellMaps.cells` the Jacobian at the token coordinates (c, r), of third
    coordinate w, is, for i = 0 and 1,

    .. math:: ∂_x = ±(C_{k2} r - C_{k1}) / w^2,  ∂_y = ±(C_{k0} - C_{k2} c) / w^2,  k = 1 - i

    so that D² = (P(r) + Q(c)) / w⁴: one small term per row of tokens, one per column.

    Args:
        maps: of n views.
        tokens: of `placed_tokens`.
    """
    columns, rows = tokens.columns, tokens.rows
    first, second, third = maps.cofactors[:2, ..., None].unbind(1)  # (2, n, b, 1) each
    per_row = (third * rows - second).square().sum(0)
    per_column = (first - third * columns).square().sum(0)
    squared = per_row[..., None] + per_column[..., None, :]
    fourth = tokens.third.square()
    squared /= fourth.mul_(fourth)
    valid = tokens.inside & maps.sound[0, ..., None, None]
    squared = torch.where(valid, squared, torch.nan).flatten(-2)
    x = columns.expand(len(rows), -1)
    points = torch.stack((x, rows[:, None].expand_as(x), torch.ones_like(x))).flatten(1)
    return LatticeStudents(maps.cells.permute(2, 3, 0, 1), points, squared)


def lattice_teachers(maps: CellMaps, tokens: PlacedTokens) -> LatticeTeachers:
    """Prepare n teacher views of one grid.

    What no lattice can serve is marked so, and gives no match.

    Args:
        maps: of n views.
        tokens: of `placed_tokens`.
    """
    linear, scale = maps.cells[:2, :2], maps.cells[2, 2].abs()
    # In squares: a norm costs ten times a product.
    squared_sides = linear.square().sum(0)  # (2, n, b)
    dot = linear.prod(1).sum(0)
    # Perspective: how much the third coordinate changes over the grid, relative to its constant.
    bend = maps.cells[2, :2].abs().amax(0) * max(len(tokens.columns), len(tokens.rows))
    orthogonal = dot.square() < _ORTHOGONAL**2 * squared_sides.prod(0)
    orthogonal = orthogonal & (bend < _ORTHOGONAL * scale) & maps.sound[0]

    per_column, per_row = tokens.inside.sum(-2), tokens.inside.sum(-1)
    columns, rows = (per_column > 0).sum(-1), (per_row > 0).sum(-1)
    # All tokens inside lie in those columns and rows; a rectangle fills them.
    count = columns * rows
    rectangular = per_row.sum(-1) == count
    # In a rectangle the counts are equal, so that the first of the largest is the first at all.
    first_x, first_y = per_column.argmax(-1), per_row.argmax(-1)
    last_x = (first_x + columns - 1).clamp(0, per_column.shape[-1] - 1)
    last_y = (first_y + rows - 1).clamp(0, per_row.shape[-1] - 1)
    sides = torch.where(orthogonal & rectangular & (count > 0), squared_sides.sqrt(), torch.nan)
    width, height = (sides / scale).unbind(0)
    spans = torch.stack((first_x, last_x, width, first_y, last_y, height), 1)
    return LatticeTeachers(maps.inverse.permute(2, 3, 0, 1), spans, orthogonal, rectangular)


def nearest_on_lattice(
    students: LatticeStudents,
    teachers: LatticeTeachers,
    pairs: Sequence[tuple[int, int]],
    teacher_grid: TokenGrid,
) -> list[tuple[Tensor, Tensor]]:
    """The nearest teacher token of every student token, for many pairs of views at once.

    .. math:: (c, r) = clamp(⌈(u, v) - 1/2⌉), cost² = ((u - c)² X² + (v - r)² Y²) / max(D_i², D_j²)

    with (u, v) the student centre in the teacher's token coordinates and X, Y the lengths of the
    teacher's cell axes. Halves are rounded down, so that ties go to the lowest index.

    Args:
        students: of `lattice_students`, with s > 0 tokens.
        teachers: of `lattice_teachers`, with t > 0 tokens.
        pairs: (student, teacher) as indices of ``students`` and ``teachers``.
        teacher_grid: grid of the teachers.

    Returns:
        Of every block of p pairs, in their order: the index (p, b, s), in [0, t) always, and the
        cost (p, b, s) in larger cell diagonals, NaN where there is no match. There is one block
        unless memory asks for more.
    """
    images, tokens = students.squared_diagonals.shape[1:]
    numbers = _NUMBERS_PER_TOKEN * tokens * max(1, images)
    points = students.points
    most = block_length(numbers * points.element_size(), points.device)
    blocks = -(-len(pairs) // most)
    block = -(-len(pairs) // blocks)  # all of about one length
    return [
        _nearest_of_block(students, teachers, pairs[start : start + block], teacher_grid)
        for start in range(0, len(pairs), block)
    ]


def snapping_origin(dtype: torch.dtype) -> float:
    """The number to add to token coordinates so that rounding errors fall away.

    What is far below a pixel but far above the rounding errors of the matrices' inverse and product
    is lost in the sum: 2⁻³⁶ of a cell in float64. A centre that lies on a token's, or half way
    between two, then does so exactly: no cost where there is no distance, and ties go to the lowest
    index.
    """
    return 1.5 * 2.0 ** (16 if dtype == torch.float64 else 8)


def _nearest_of_block(
    students: LatticeStudents,
    teachers: LatticeTeachers,
    pairs: Sequence[tuple[int, int]],
    teacher_grid: TokenGrid,
) -> tuple[Tensor, Tensor]:
    """`nearest_on_lattice` for as many pairs as one block holds."""
    ours, theirs = [v for v, _ in pairs], [q for _, q in pairs]
    composed = _taken(teachers.to_grid, theirs) @ _taken(students.cells, ours)
    spans = _taken(teachers.spans, theirs).movedim(1, 0)[..., None]  # (6, p, b, 1)
    first, last, length = spans[::3], spans[1::3], spans[2::3]
    with no_autocast(composed):
        # x, y and the third coordinate each in one piece of memory, for what follows.
        places = composed.movedim(-2, 0).flatten(0, -2) @ students.points
    places = places.reshape(3, *composed.shape[:2], students.points.shape[1])
    # At or beyond the horizon, which is outside the source; no 0/0 then.
    third = places[2].clamp_min_(torch.finfo(places.dtype).tiny)
    # From here on all places are counted from it.
    origin = snapping_origin(places.dtype)
    places = places[:2].div_(third).add_(origin)
    nearest = places.sub(0.5).ceil_().clamp_min_(first + origin).clamp_max_(last + origin)
    x, y = places.sub_(nearest).mul_(length)
    squared = x.mul_(x).add_(y.mul_(y))
    scale = torch.maximum(_taken(students.squared_diagonals, ours), length.square().sum(0))
    column, row = nearest
    index = column.add_(row, alpha=teacher_grid.cols).sub_(origin * (1 + teacher_grid.cols))
    return index.to(torch.int64), squared.div_(scale).sqrt_()


def _taken(values: Tensor, slots: Sequence[int]) -> Tensor:
    """Entries of the first axis, in the order of ``slots``; an index tensor would cost a sync."""
    if list(slots) == list(range(values.shape[0])):
        return values
    entries = values.unbind(0)
    return torch.stack([entries[slot] for slot in slots])


def _grid_matrices(grids: Sequence[TokenGrid], like: Tensor) -> Tensor:
    """(n, 1, 3, 3) token coordinates (column, row) → view px."""
    rows = [
        [[grid.stride[0], 0.0, grid.offset[0]], [0.0, grid.stride[1], grid.offset[1]], [0, 0, 1.0]]
        for grid in grids
    ]
    # By way of the CPU and not blocking: the host need not wait for the device to take the numbers.
    matrices = torch.tensor(rows, dtype=like.dtype, device="cpu")
    return matrices.to(like.device, non_blocking=True)[:, None]

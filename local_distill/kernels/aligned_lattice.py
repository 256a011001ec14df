"""The nearest token of a lattice where views are crops and flips: columns and rows apart.

A crop, flipped or not, keeps x and y apart: the source x of a token depends on its column alone,
and so does the column of the teacher token that is nearest. What `lattice` works out for every
token is then worked out for every column and every row; tokens only take the sum of two numbers.

Axes: n views, p pairs of views, b images, l tokens along the longest side of any grid. The axis of
2 is x and y. Where a grid is shorter than l, the numbers beyond its end mean nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from local_distill.kernels.byte_budget import block_length
from local_distill.kernels.lattice import snapping_origin
from local_distill.structures import TokenGrid

__all__ = ["AlignedPairs", "AlignedViews", "aligned_pairs", "aligned_views", "are_aligned"]

# Numbers of the widest type that one student token takes while a block of pairs is worked on.
_NUMBERS_PER_TOKEN = 4


class AlignedViews(NamedTuple):
    """What a match needs of n views of any grids, as a student's and as a teacher's."""

    centers: Tensor  # (n, 2, b, l) where the tokens' centres lie in the source, px
    # (n, 2, b, l) the cells' squared diagonals, NaN for a column or row without a match
    diagonals: Tensor
    # (5, n, 2, b): the centre of the first token and the way to the next, px; the first and the
    # last index whose centre lies inside the source, counted from the `snapping_origin`; the cells'
    # squared diagonal, NaN where no token lies inside
    teachers: Tensor


class AlignedPairs(NamedTuple):
    """The answer of p pairs, along x and along y."""

    nearest: Tensor  # (p, 2, b, l) int64, of the teacher's columns and rows
    squared: Tensor  # (p, 2, b, l) squared cost along the axis, NaN where there is no match

    def blocks(
        self, start: int, stop: int, student_grid: TokenGrid, teacher_grid: TokenGrid
    ) -> list[tuple[Tensor, Tensor]]:
        """Of the pairs from ``start`` to ``stop``: index and squared cost (p, b, s) of every block.

        There is one block unless memory asks for more. Costs are in larger cell diagonals, NaN
        where there is no match; an index lies in [0, t) always.
        """
        numbers = _NUMBERS_PER_TOKEN * student_grid.num_tokens * max(1, self.nearest.shape[2])
        squared = self.squared
        most = block_length(numbers * squared.element_size(), squared.device)
        blocks = -(-(stop - start) // most)
        block = -(-(stop - start) // blocks)  # all of about one length
        return [
            self._block(slice(first, min(first + block, stop)), student_grid, teacher_grid.cols)
            for first in range(start, stop, block)
        ]

    def _block(self, part: slice, grid: TokenGrid, teacher_cols: int) -> tuple[Tensor, Tensor]:
        rows, cols = grid.rows, grid.cols
        row = self.nearest[part, 1, :, :rows, None] * teacher_cols
        index = row + self.nearest[part, 0, :, None, :cols]
        squared = self.squared[part, 1, :, :rows, None] + self.squared[part, 0, :, None, :cols]
        return index.flatten(-2), squared.flatten(-2)


def are_aligned(matrix: Tensor) -> bool:
    """Whether all views are sound crops and flips: x and y apart, no perspective.

    It asks for values: of tensors only whose values can be looked at.

    Args:
        matrix: (n, b, 3, 3) view → source px.
    """
    if matrix.numel() == 0:
        return False
    numbers = matrix.flatten(-2).flatten(0, -2).T.contiguous()  # (9, n·b)
    low, high = (values.tolist() for values in torch.aminmax(numbers.abs(), dim=1))
    # As `sound_matrix` of a matrix such as these; and no numbers of which products might overflow.
    # Every comparison is false for NaN.
    sound = min(low[0], low[4]) > 0 and all(
        value < torch.finfo(matrix.dtype).max ** 0.25 for value in high
    )
    apart = high[1] == high[3] == high[6] == high[7] == 0
    return sound and apart and high[8] == 1 and float(numbers[8].min()) == 1


def aligned_views(matrix: Tensor, source_size: Tensor, grids: Sequence[TokenGrid]) -> AlignedViews:
    """Prepare n views.

    Which centres lie inside the source is to the bit what `geometry.inside` says of
    `geometry.wide_centers`: the same sums, in the same order.

    Args:
        matrix: (n, b, 3, 3) view → source px, of which `are_aligned` is true.
        source_size: (n, b, 2) (height, width).
        grids: n of them, with at least one token each.
    """
    origin = snapping_origin(matrix.dtype)
    scale = torch.stack((matrix[..., 0, 0], matrix[..., 1, 1]), 1)  # (n, 2, b)
    shift = matrix[..., :2, 2].movedim(-1, 1)
    limits = source_size.flip(-1).movedim(-1, 1)
    places, strides = _grid_places(tuple(grids), matrix.dtype)
    centers = scale[..., None] * places
    centers += shift[..., None]
    inside = (centers >= 0) & (centers <= limits[..., None])
    count = inside.sum(-1)
    first = inside.to(torch.uint8).argmax(-1)
    last = (first + count - 1).clamp_min(0)
    steps = scale * strides
    squared = steps.square().sum(1, keepdim=True).expand_as(steps)
    some = (count > 0).all(1, keepdim=True)
    diagonals = torch.where(inside, squared[..., None], torch.nan)
    teachers = (
        centers[..., 0],
        steps,
        first + origin,
        last + origin,
        torch.where(some, squared, torch.nan),
    )
    return AlignedViews(centers, diagonals, torch.stack(teachers))


def aligned_pairs(views: AlignedViews, pairs: Sequence[tuple[int, int]]) -> AlignedPairs:
    """The nearest column and row of every student column and row, for many pairs of views.

    `lattice.nearest_on_lattice` has the equation; this is the same along each axis.

    Args:
        views: of `aligned_views`.
        pairs: (student, teacher) as indices of the views.
    """
    device = views.centers.device
    ours = torch.tensor([v for v, _ in pairs], device=device)
    theirs = torch.tensor([q for _, q in pairs], device=device)
    places, diagonals = (part.index_select(0, ours) for part in views[:2])
    teachers = views.teachers.index_select(1, theirs)[..., None]
    start, step, first, last, teacher_diagonals = teachers.unbind(0)
    origin = snapping_origin(places.dtype)
    places.sub_(start).div_(step).add_(origin)
    nearest = places.sub(0.5).ceil_().clamp_(first, last)
    squared = places.sub_(nearest).mul_(step).square_()
    squared /= torch.maximum(diagonals, teacher_diagonals, out=diagonals)
    return AlignedPairs(nearest.sub_(origin).to(torch.int64), squared)


@functools.lru_cache(maxsize=64)  # a training has the same few lists of grids at every step
def _grid_places(grids: tuple[TokenGrid, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(n, 2, 1, l) view px of the tokens, inf beyond a grid's end, and (n, 2, 1) strides.

    On the CPU, where alone values can be looked at. Shared: not to be written to.
    """
    longest = max(max(grid.rows, grid.cols) for grid in grids)
    rows = [
        [
            [offset + stride * k if k < length else torch.inf for k in range(longest)]
            for offset, stride, length in zip(
                grid.offset, grid.stride, (grid.cols, grid.rows), strict=True
            )
        ]
        for grid in grids
    ]
    places = torch.tensor(rows, dtype=dtype, device="cpu")[:, :, None]
    strides = torch.tensor([grid.stride for grid in grids], dtype=dtype, device="cpu")[..., None]
    return places, strides

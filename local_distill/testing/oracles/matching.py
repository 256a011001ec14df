"""Matches by looking at every pair of tokens."""

from __future__ import annotations

import math
from typing import NamedTuple

from local_distill.errors import ShapeError
from local_distill.structures import CropGeometry, TokenGrid, Tokens
from local_distill.testing.oracles.geometry import (
    Point,
    cell_diagonal,
    is_inside_source,
    token_center,
)

__all__ = ["NearestToken", "nearest_teacher_tokens"]


class NearestToken(NamedTuple):
    """The teacher token nearest to a student token.

    Attributes:
        pixels: distance of the centres in source pixels.
        cells: the same in the larger of the two cell diagonals.
    """

    pixels: float
    cells: float


def nearest_teacher_tokens(student: Tokens, teacher: Tokens) -> list[list[NearestToken | None]]:
    """The nearest teacher token of every student token, by all pairs.

    Args:
        student: with geometry and grid.
        teacher: likewise, of the same images.

    Returns:
        [image][student token]; None where the student token's centre lies outside the source, or no
        teacher token's centre lies inside. Of equally near ones that of the smaller diagonal.

    Example:
        >>> from local_distill import TokenGrid, Tokens, from_box
        >>> crop = from_box([[0.0, 0.0, 8.0, 6.0]], view_size=(16, 16), source_size=(20, 30))
        >>> coarse = Tokens(None, crop, TokenGrid.tiling(1, 1, (16, 16)))
        >>> fine = Tokens(None, crop, TokenGrid.tiling(2, 2, (16, 16)))
        >>> nearest_teacher_tokens(coarse, fine)[0][0].pixels  # half of a 4 by 3 cell's diagonal
        2.5
    """
    result: list[list[NearestToken | None]] = []
    batch = _parts(student)[0].matrix.shape[0]
    for image in range(batch):
        size = _parts(teacher)[0].source_size[image].tolist()
        others = [each for each in _centers(teacher, image) if is_inside_source(each[0], size)]
        found: list[NearestToken | None] = []
        for point, own in _centers(student, image):
            if not is_inside_source(point, size) or not others:
                found.append(None)
                continue
            pixels, diagonal = min(
                (math.hypot(point[0] - q[0], point[1] - q[1]), d) for q, d in others
            )
            found.append(NearestToken(pixels, pixels / max(own, diagonal)))
        result.append(found)
    return result


def _centers(tokens: Tokens, image: int) -> list[tuple[Point, float]]:
    """Centre and cell diagonal of every token of one image, row by row."""
    geometry, grid = _parts(tokens)
    return [
        (token_center(geometry, grid, image, r, c), cell_diagonal(geometry, grid, image, r, c))
        for r in range(grid.rows)
        for c in range(grid.cols)
    ]


def _parts(tokens: Tokens) -> tuple[CropGeometry, TokenGrid]:
    if tokens.geometry is None or tokens.grid is None:
        raise ShapeError("`Tokens` need `geometry` and `grid` here; give both")
    return tokens.geometry, tokens.grid

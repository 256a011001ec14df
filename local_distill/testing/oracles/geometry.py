"""Where tokens lie in the source, by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from local_distill.errors import ShapeError
from local_distill.structures import CropGeometry, TokenGrid, Tokens

__all__ = ["TokenPlace", "cell_diagonal", "is_inside_source", "token_center", "token_places"]

Point = tuple[float, float]

# Half the step of the differences, in cells: rounding and curvature both stay below 1e-6 of a cell.
_STEP = 5e-4


class TokenPlace(NamedTuple):
    """Where a token lies in the source.

    Attributes:
        center: (x, y) in source pixels; NaN beyond the horizon of a perspective.
        diagonal: of its cell, in source pixels.
        inside: whether the centre lies in the source.
    """

    center: Point
    diagonal: float
    inside: bool


def token_center(
    geometry: CropGeometry, grid: TokenGrid, image: int, row: float, col: float
) -> Point:
    """The source point of a token's centre.

    Convention: (x, y) in source pixels, x right, y down; pixel i spans [i, i + 1].

    Args:
        geometry: of a batch of views.
        grid: of one view.
        image: which of the batch.
        row: of the token; fractions lie between tokens.
        col: likewise.

    Returns:
        (x, y); (NaN, NaN) for a point at or beyond the horizon of a perspective.

    Example:
        >>> from local_distill import TokenGrid, from_box
        >>> crop = from_box([[8.0, 4.0, 24.0, 12.0]], view_size=(16, 32), source_size=(20, 30))
        >>> token_center(crop, TokenGrid.tiling(2, 4, (16, 32)), 0, row=1, col=0)
        (10.0, 10.0)
    """
    x = grid.offset[0] + grid.stride[0] * col
    y = grid.offset[1] + grid.stride[1] * row
    m = geometry.matrix[image].double().tolist()
    u = m[0][0] * x + m[0][1] * y + m[0][2]
    v = m[1][0] * x + m[1][1] * y + m[1][2]
    w = m[2][0] * x + m[2][1] * y + m[2][2]
    return (u / w, v / w) if w > 0 else (math.nan, math.nan)


def cell_diagonal(
    geometry: CropGeometry, grid: TokenGrid, image: int, row: float, col: float
) -> float:
    """The diagonal of a token's cell in source pixels, by central differences of token centres.

    Args:
        geometry: see `token_center`.
        grid: see `token_center`.
        image: see `token_center`.
        row: see `token_center`.
        col: see `token_center`.

    Example:
        >>> from local_distill import TokenGrid, from_box
        >>> crop = from_box([[0.0, 0.0, 8.0, 6.0]], view_size=(16, 16), source_size=(20, 30))
        >>> round(cell_diagonal(crop, TokenGrid.tiling(2, 2, (16, 16)), 0, 0, 0), 6)  # 4 by 3
        5.0
    """
    total = 0.0
    for d_row, d_col in ((0.0, _STEP), (_STEP, 0.0)):
        a = token_center(geometry, grid, image, row + d_row, col + d_col)
        b = token_center(geometry, grid, image, row - d_row, col - d_col)
        total += ((a[0] - b[0]) / (2 * _STEP)) ** 2 + ((a[1] - b[1]) / (2 * _STEP)) ** 2
    return math.sqrt(total)


def is_inside_source(point: Point, source_size: Sequence[int]) -> bool:
    """Whether a point lies in the closed rectangle of the source; False for NaN.

    Args:
        point: (x, y) in source pixels.
        source_size: (height, width) in pixels.

    Example:
        >>> is_inside_source((30.0, 0.0), (20, 30)), is_inside_source((30.1, 0.0), (20, 30))
        (True, False)
    """
    return 0 <= point[0] <= source_size[1] and 0 <= point[1] <= source_size[0]


def token_places(tokens: Tokens, image: int) -> list[TokenPlace]:
    """The places of all tokens of one image, row by row.

    Args:
        tokens: with geometry (b) and grid.
        image: which of the batch.

    Raises:
        ShapeError: no geometry or no grid.

    Example:
        >>> from local_distill import TokenGrid, Tokens, from_box
        >>> crop = from_box([[-4.0, 0.0, 4.0, 3.0]], view_size=(16, 16), source_size=(20, 30))
        >>> places = token_places(Tokens(None, crop, TokenGrid.tiling(1, 2, (16, 16))), 0)
        >>> [(place.center, place.inside) for place in places]
        [((-2.0, 1.5), False), ((2.0, 1.5), True)]
    """
    geometry, grid = geometry_and_grid(tokens)
    size = geometry.source_size[image].tolist()
    places = []
    for row in range(grid.rows):
        for col in range(grid.cols):
            center = token_center(geometry, grid, image, row, col)
            diagonal = cell_diagonal(geometry, grid, image, row, col)
            places.append(TokenPlace(center, diagonal, is_inside_source(center, size)))
    return places


def geometry_and_grid(tokens: Tokens) -> tuple[CropGeometry, TokenGrid]:
    """Both, or an error that says what is missing."""
    if tokens.geometry is None or tokens.grid is None:
        raise ShapeError("`Tokens` need `geometry` and `grid` here; give both")
    return tokens.geometry, tokens.grid

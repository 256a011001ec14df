"""Matches by place, by looking at every pair of tokens."""

from __future__ import annotations

import math
from typing import NamedTuple

from local_distill.structures import CropGeometry, Tokens
from local_distill.testing.oracles.geometry import (
    Point,
    TokenPlace,
    geometry_and_grid,
    token_places,
)
from local_distill.testing.oracles.token_match import TokenMatch, weighted_match

__all__ = [
    "NearestToken",
    "bilinear_corners",
    "distances_in_cells",
    "nearest_teacher_tokens",
    "radius_neighbours",
]


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
    for image in range(_batch(student)):
        others = [place for place in token_places(teacher, image) if place.inside]
        found: list[NearestToken | None] = []
        for own in token_places(student, image):
            if not own.inside or not others:
                found.append(None)
                continue
            pixels, diagonal = min((_pixels(own, each), each.diagonal) for each in others)
            found.append(NearestToken(pixels, pixels / max(own.diagonal, diagonal)))
        result.append(found)
    return result


def distances_in_cells(student: Tokens, teacher: Tokens) -> list[list[list[float | None]]]:
    """How far apart all tokens are.

    Convention: in the larger of the two cells' diagonals.

    Args:
        student: with geometry and grid.
        teacher: likewise, of the same images.

    Returns:
        [image][student token][teacher token]; None where either centre lies outside the source.

    Example:
        >>> from local_distill import TokenGrid, Tokens, from_box
        >>> crop = from_box([[0.0, 0.0, 8.0, 6.0]], view_size=(16, 16), source_size=(20, 30))
        >>> coarse = Tokens(None, crop, TokenGrid.tiling(1, 1, (16, 16)))
        >>> fine = Tokens(None, crop, TokenGrid.tiling(1, 2, (16, 16)))
        >>> [round(far, 3) for far in distances_in_cells(coarse, fine)[0][0]]  # 2 px of 10
        [0.2, 0.2]
    """
    result = []
    for image in range(_batch(student)):
        places = token_places(student, image), token_places(teacher, image)
        result.append([[_cells(own, other) for other in places[1]] for own in places[0]])
    return result


def radius_neighbours(student: Tokens, teacher: Tokens, radius: float) -> list[list[TokenMatch]]:
    """The teacher tokens within a radius of every student token, by all pairs.

    Args:
        student: with geometry and grid.
        teacher: likewise, of the same images; t tokens.
        radius: in larger cell diagonals; a token exactly as far is not taken.

    Returns:
        [image][student token]: each one within reach has the weight 1/t; the cost is the mean of
        their distances in larger cell diagonals.

    Example:
        >>> from local_distill import TokenGrid, Tokens, from_box
        >>> crop = from_box([[0.0, 0.0, 9.0, 4.0]], view_size=(4, 9), source_size=(20, 30))
        >>> tokens = Tokens(None, crop, TokenGrid.tiling(1, 3, (4, 9)))  # 3 px apart, diagonal 5
        >>> [list(found.weights) for found in radius_neighbours(tokens, tokens, 0.7)[0]]
        [[0, 1], [0, 1, 2], [1, 2]]
    """
    result = []
    for table in distances_in_cells(student, teacher):
        found = []
        for row in table:
            near = {j: far for j, far in enumerate(row) if far is not None and far < radius}
            found.append(weighted_match(dict.fromkeys(near, 1 / len(row)), near))
        result.append(found)
    return result


def bilinear_corners(student: Tokens, teacher: Tokens) -> list[list[TokenMatch]]:
    """The teacher tokens around every student token in the teacher's view, by all pairs.

    .. math:: w_{ij} = max(0, 1 - |u_i - c_j|) · max(0, 1 - |v_i - r_j|)

    with (u, v) the student token's centre in columns and rows of the teacher's grid.

    Args:
        student: with geometry and grid.
        teacher: likewise, of the same images.

    Returns:
        [image][student token]: at most four weights, not made up to 1 where a neighbour is missing
        or its centre lies outside the source; the cost is the weighted mean of the distances in
        larger cell diagonals.

    Example:
        >>> from local_distill import TokenGrid, Tokens, from_box
        >>> grid = TokenGrid.tiling(1, 3, view_size=(16, 48))
        >>> one = from_box([[0.0, 0, 48, 16]], (16, 48), (16, 64))
        >>> two = from_box([[12.0, 0, 60, 16]], (16, 48), (16, 64))
        >>> corners = bilinear_corners(Tokens(None, one, grid), Tokens(None, two, grid))
        >>> [found.weights for found in corners[0]]  # 12 px are three quarters of a cell
        [{0: 0.25}, {0: 0.75, 1: 0.25}, {1: 0.75, 2: 0.25}]
    """
    geometry, grid = geometry_and_grid(teacher)
    result = []
    for image in range(_batch(student)):
        others = token_places(teacher, image)
        found = []
        for own in token_places(student, image):
            at = _in_the_view(geometry, image, own.center) if own.inside else None
            weights, costs = {}, {}
            for j, other in enumerate(others):
                far = _cells(own, other)
                if at is None or far is None:
                    continue
                row, col = divmod(j, grid.cols)
                u = (at[0] - grid.offset[0]) / grid.stride[0]
                v = (at[1] - grid.offset[1]) / grid.stride[1]
                weights[j] = max(0.0, 1 - abs(u - col)) * max(0.0, 1 - abs(v - row))
                costs[j] = far
            found.append(weighted_match(weights, costs))
        result.append(found)
    return result


def _in_the_view(geometry: CropGeometry, image: int, point: Point) -> Point | None:
    """A source point in view pixels, by Cramer's rule; None at or beyond the horizon."""
    (a, b, c), (d, e, f), (g, h, i) = geometry.matrix[image].double().tolist()
    x, y = point
    # u·(a - x·g) + v·(b - x·h) = x·i - c, and the like for y
    one, two = (a - x * g, b - x * h, x * i - c), (d - y * g, e - y * h, y * i - f)
    bottom = one[0] * two[1] - one[1] * two[0]
    if bottom == 0:
        return None
    u = (one[2] * two[1] - one[1] * two[2]) / bottom
    v = (one[0] * two[2] - one[2] * two[0]) / bottom
    return (u, v) if g * u + h * v + i > 0 else None


def _pixels(one: TokenPlace, two: TokenPlace) -> float:
    return math.hypot(one.center[0] - two.center[0], one.center[1] - two.center[1])


def _cells(one: TokenPlace, two: TokenPlace) -> float | None:
    """In larger cell diagonals; None where either is outside the source."""
    if not (one.inside and two.inside):
        return None
    return _pixels(one, two) / max(one.diagonal, two.diagonal)


def _batch(tokens: Tokens) -> int:
    return int(geometry_and_grid(tokens)[0].matrix.shape[0])

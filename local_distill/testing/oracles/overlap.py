"""What share of a token's cell other cells cover, by cutting polygons with each other."""

from __future__ import annotations

import math
from collections.abc import Sequence

from local_distill.structures import Tokens
from local_distill.testing.oracles.geometry import (
    Point,
    geometry_and_grid,
    token_center,
    token_places,
)
from local_distill.testing.oracles.token_match import TokenMatch

__all__ = ["cell_overlaps", "covered_share"]

# The corners of a cell, (row, col) from its centre, in the order of the view.
_CORNERS = ((-0.5, -0.5), (-0.5, 0.5), (0.5, 0.5), (0.5, -0.5))


def cell_overlaps(student: Tokens, teacher: Tokens) -> list[list[TokenMatch]]:
    """The shares of every student token's cell that lie in the teacher tokens' cells.

    .. math:: w_{ij} = |Q_i ∩ Q_j| / |Q_i|, cost_i = 1 - Σ_j w_{ij}

    Convention: cells are quadrilaterals in the source, not clipped to it; a token whose centre lies
    outside the source, or whose cell reaches beyond the horizon, is left out on either side.

    Args:
        student: with geometry and grid.
        teacher: likewise, of the same images.

    Returns:
        [image][student token]: every share above 0, however small. `overlap_matches` takes a share
        of a millionth or less for rounding.

    Example:
        >>> from local_distill import TokenGrid, Tokens, from_box
        >>> grid = TokenGrid.tiling(1, 3, view_size=(16, 48))
        >>> one = from_box([[0.0, 0, 48, 16]], (16, 48), (16, 64))
        >>> two = from_box([[12.0, 0, 60, 16]], (16, 48), (16, 64))
        >>> found = cell_overlaps(Tokens(None, one, grid), Tokens(None, two, grid))[0]
        >>> found[0], found[1].weights
        (TokenMatch(weights={0: 0.25}, cost=0.75), {0: 0.75, 1: 0.25})
    """
    result = []
    for image in range(geometry_and_grid(student)[0].matrix.shape[0]):
        others = _cells(teacher, image)
        found = []
        for own in _cells(student, image):
            weights = {}
            for j, other in enumerate(others):
                share = covered_share(own, other) if own and other else 0.0
                if share > 0:
                    weights[j] = share
            cost = max(0.0, 1 - sum(weights.values())) if weights else math.inf
            found.append(TokenMatch(weights, cost))
        result.append(found)
    return result


def covered_share(one: Sequence[Point], two: Sequence[Point]) -> float:
    """How much of one convex polygon lies in another: one is cut at every side of the other.

    Args:
        one: corners (x, y) in order, either way round; of an area above 0.
        two: likewise.

    Example:
        >>> covered_share([(0, 0), (2, 0), (2, 2), (0, 2)], [(1, 1), (1, 9), (9, 9), (9, 1)])
        0.25
    """
    home = one[0]  # near 0 the areas lose no digits
    left = [(x - home[0], y - home[1]) for x, y in one]
    cutter = [(x - home[0], y - home[1]) for x, y in two]
    whole = _area(left)
    if _area(cutter) < 0:
        cutter.reverse()
    for a, b in zip(cutter, cutter[1:] + cutter[:1], strict=True):
        depths = [(b[0] - a[0]) * (y - a[1]) - (b[1] - a[1]) * (x - a[0]) for x, y in left]
        cut = []
        for i, (p, depth) in enumerate(zip(left, depths, strict=True)):
            q, next_depth = left[(i + 1) % len(left)], depths[(i + 1) % len(left)]
            if depth >= 0:
                cut.append(p)
            if depth * next_depth < 0:
                part = depth / (depth - next_depth)
                cut.append((p[0] + part * (q[0] - p[0]), p[1] + part * (q[1] - p[1])))
        left = cut
        if not left:
            return 0.0
    return abs(_area(left) / whole)


def _cells(tokens: Tokens, image: int) -> list[list[Point] | None]:
    """Each token's corners, or None where the token takes no part."""
    geometry, grid = geometry_and_grid(tokens)
    cells: list[list[Point] | None] = []
    for i, place in enumerate(token_places(tokens, image)):
        row, col = divmod(i, grid.cols)
        corners = [token_center(geometry, grid, image, row + r, col + c) for r, c in _CORNERS]
        seen = all(math.isfinite(x) and math.isfinite(y) for x, y in corners)
        cells.append(corners if place.inside and seen else None)
    return cells


def _area(polygon: list[Point]) -> float:
    """Signed, by the shoelace formula."""
    ends = zip(polygon, polygon[1:] + polygon[:1], strict=True)
    return sum(p[0] * q[1] - q[0] * p[1] for p, q in ends) / 2

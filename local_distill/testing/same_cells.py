"""Hypothesis strategy of two views on whose answers all geometric matchers have to agree."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from local_distill.geometry import from_box
from local_distill.structures import TokenGrid, Tokens
from local_distill.testing.strategies import drawn_features

__all__ = ["same_cell_pairs"]

# By which part of a cell the views are shifted, the plainest first. At half a cell there are ties,
# at none the centres coincide, and near both there would be little to tell right from wrong by.
_SHIFTS = (0.25, -0.25, 0.375, -0.375, 0.4375, -0.4375, 0.125, -0.125)

Span = tuple[float, float]


class _Spans(NamedTuple):
    """From where to where in the source, along one axis, an image's two views reach."""

    student: Span
    teacher: Span


@st.composite
def same_cell_pairs(
    draw: DrawFn, *, max_side: int = 5, dim: int | None = None
) -> tuple[Tokens, Tokens]:
    """Student and teacher tokens whose cells are of one size in the source, and shifted.

    The views are crops that lie inside the source and overlap; either may be flipped. They differ
    in their numbers of tokens and in their resolution, and are shifted by no whole number of cells.
    So the teacher token of nearest centre is that of largest shared area and of heaviest bilinear
    weight as well; along either axis it is nearer than the second by an eighth of a cell and more.

    Convention: pixels are square, cells need not be. Every kind of views holds such crops.

    Args:
        draw: given by hypothesis.
        max_side: most rows and most columns of a grid.
        dim: number of features; None: none.

    Example:
        >>> from hypothesis import find
        >>> from local_distill import cell_diagonals
        >>> one, two = find(same_cell_pairs(), lambda pair: pair[0].num_tokens < pair[1].num_tokens)
        >>> bool((cell_diagonals(*one[1:])[:, 0] == cell_diagonals(*two[1:])[:, 0]).all())
        True
    """
    batch = draw(st.integers(2, 3))
    counts = st.tuples(st.integers(1, max_side), st.integers(1, max_side))
    grids = draw(counts), draw(counts)  # (rows, cols) of either view
    cell = draw(st.integers(4, 12)), draw(st.integers(4, 12))  # height and width of a cell
    zooms = [draw(st.sampled_from((1, 2))) for _ in range(batch)]  # of an image's source
    down, across = (
        [_spans(draw, grids[0][axis], grids[1][axis], cell[axis] * zoom) for zoom in zooms]
        for axis in range(2)
    )
    source = _end(down), _end(across)
    views = []
    for side, (rows, cols) in enumerate(grids):
        zoom = draw(st.sampled_from((1, 2)))
        size = rows * cell[0] * zoom, cols * cell[1] * zoom
        boxes = [
            [x[side][0], y[side][0], x[side][1], y[side][1]]
            for x, y in zip(across, down, strict=True)
        ]
        flips = [(draw(st.booleans()), draw(st.booleans())) for _ in range(batch)]
        geometry = from_box(
            torch.tensor(boxes, dtype=torch.float32),
            size,
            source,
            hflip=torch.tensor([flip[0] for flip in flips]),
            vflip=torch.tensor([flip[1] for flip in flips]),
        )
        features = None if dim is None else drawn_features(draw, (batch, rows * cols, dim), side)
        views.append(Tokens(features, geometry, TokenGrid.tiling(rows, cols, size)))
    return views[0], views[1]


def _spans(draw: DrawFn, student: int, teacher: int, cell: int) -> _Spans:
    """Where views of so many cells, of so many pixels, lie along an axis, so that they overlap."""
    shift = draw(st.integers(1 - student, teacher - 1)) + draw(st.sampled_from(_SHIFTS))
    first = math.ceil(max(0.0, -shift))  # of whole cells: the teacher lies on plain numbers
    begin = first + shift
    return _Spans(
        (begin * cell, (begin + student) * cell), (first * cell, (first + teacher) * cell)
    )


def _end(spans: list[_Spans]) -> int:
    """The whole pixel at or behind the last of them."""
    return math.ceil(max(span[1] for image in spans for span in image))

"""The nearest teacher token by looking at all of them, in blocks; it takes any geometry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from local_distill.geometry import inside, wide_centers, wide_diagonals
from local_distill.kernels.byte_budget import block_length
from local_distill.structures import CropGeometry, TokenGrid

__all__ = ["SearchViews", "nearest_by_search", "search_views"]

# Numbers that one pair of tokens takes while a block is worked on: its squares along x and along y.
_NUMBERS_PER_PAIR = 2


class SearchViews(NamedTuple):
    """What a search needs of n views of one grid."""

    centers: Tensor  # (n, b, tokens, 2) source px
    diagonals: Tensor  # (n, b, tokens) of the cells, source px
    inside: Tensor  # (n, b, tokens) bool, centre inside the source


def search_views(geometry: CropGeometry, grid: TokenGrid) -> SearchViews:
    """Prepare n views (n, b), for both sides of a search."""
    centers = wide_centers(geometry, grid)
    return SearchViews(
        centers, wide_diagonals(geometry, grid), inside(centers, geometry.source_size)
    )


def nearest_by_search(
    students: SearchViews, teachers: SearchViews, pairs: Sequence[tuple[int, int]]
) -> list[tuple[Tensor, Tensor]]:
    """The nearest teacher token of every student token, for many pairs of views.

    Distances are sums of squared differences, never ``|p|² + |q|² - 2 p·q``, which loses whole
    pixels on large sources.

    Args:
        students: of `search_views`, with s > 0 tokens.
        teachers: likewise, with t > 0 tokens.
        pairs: (student, teacher) as indices of ``students`` and ``teachers``.

    Returns:
        Of every pair the index (1, b, s), in [0, t) always, and the cost (1, b, s) in larger cell
        diagonals, NaN where there is no match.
    """
    return [_nearest_of_pair(students, v, teachers, q) for v, q in pairs]


def _nearest_of_pair(
    students: SearchViews, v: int, teachers: SearchViews, q: int
) -> tuple[Tensor, Tensor]:
    points, targets, allowed = students.centers[v], teachers.centers[q], teachers.inside[q]
    # Infinitely far, so that it is never the nearest; where all are, the first is taken.
    x, y = torch.where(allowed[..., None], targets, torch.inf)[:, None].unbind(-1)
    index = _argmin_in_blocks(points, x, y)
    chosen = targets.gather(1, index[..., None].expand(-1, -1, 2))
    diagonal = torch.maximum(students.diagonals[v], teachers.diagonals[q].gather(1, index))
    cost = (points - chosen).square().sum(-1).sqrt() / diagonal
    cost = torch.where(students.inside[v] & allowed.gather(1, index), cost, torch.nan)
    return index[None], cost[None]


def _argmin_in_blocks(points: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """(b, s) index of the nearest of (b, 1, t) places: blocks of images, or of one image's rows."""
    b, s, _ = points.shape
    row_bytes = _NUMBERS_PER_PAIR * x.shape[-1] * points.element_size()
    images = block_length(row_bytes * s, points.device)
    rows = block_length(row_bytes * min(images, max(1, b)), points.device)
    return torch.cat(
        [
            torch.cat(
                [
                    _argmin(
                        points[i : i + images, j : j + rows], x[i : i + images], y[i : i + images]
                    )
                    for j in range(0, s, rows)
                ],
                1,
            )
            for i in range(0, max(1, b), images)
        ]
    )


def _argmin(points: Tensor, x: Tensor, y: Tensor) -> Tensor:
    # mul_, as vmap knows no square_
    across, down = points[..., 0, None] - x, points[..., 1, None] - y
    # A NaN point makes argmin return that NaN's place; its match is dropped anyway.
    return across.mul_(across).add_(down.mul_(down)).argmin(-1)

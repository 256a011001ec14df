"""Where PixPro's published code believes that tokens lie."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from local_distill._check import values_visible
from local_distill.errors import GeometryError
from local_distill.matching.radius import RadiusMatcher
from local_distill.structures import CropGeometry, Matches, Tokens

__all__ = ["PublishedRadiusMatcher"]

Pair = tuple[int, int]

# The unit square in pixels of a source that is as large as a size can be.
_SIDE = 1 << 30


class PublishedRadiusMatcher(nn.Module):
    """`RadiusMatcher` in the coordinates of PixPro's code instead of source pixels.

    That code takes the box of a crop as its first and last pixel, and divides x by the source's
    width - 1 and y by its height - 1. Upright crops only, mirrored or not.
    """

    def __init__(self, radius: float) -> None:
        super().__init__()
        self.matcher = RadiusMatcher(radius)

    def forward(self, student: Tokens, teacher: Tokens) -> Matches:
        """See `RadiusMatcher`."""
        return self.match_views([student], [teacher], [(0, 0)])[0, 0]

    def match_views(
        self, student: Sequence[Tokens], teacher: Sequence[Tokens], pairs: Iterable[Pair]
    ) -> dict[Pair, Matches]:
        """All pairs of views; see `match_views`."""
        return self.matcher.match_views(
            [_published_place(tokens) for tokens in student],
            [_published_place(tokens) for tokens in teacher],
            pairs,
        )


@torch.no_grad()
def _published_place(tokens: Tokens) -> Tokens:
    geometry = tokens.geometry
    if geometry is None:
        return tokens
    matrix = geometry.matrix.double()
    scale = matrix[..., (0, 1), (0, 1)]
    if values_visible(matrix):
        upright = torch.zeros_like(matrix)
        upright[..., (0, 1), (0, 1)] = scale
        upright[..., :2, 2] = matrix[..., :2, 2]
        upright[..., 2, 2] = matrix[..., 2, 2]
        if not torch.equal(upright, matrix):
            raise GeometryError(
                "`legacy` knows upright crops, mirrored or not, as the published code does; got a "
                "geometry that is rotated, sheared or in perspective; use legacy=False"
            )
    view = geometry.view_size.flip(-1).double()
    source = geometry.source_size.flip(-1).double()
    begin = matrix[..., :2, 2] / matrix[..., 2:, 2]
    length = scale / matrix[..., 2:, 2] * view
    # The last pixel's own place is one less than where the crop ends.
    end = begin + length - length.sign()
    mirrored = (length < 0).double()
    begin, end = begin - mirrored, end - mirrored
    unit = _SIDE / (source - 1).clamp_min(1)
    placed = torch.zeros_like(matrix)
    placed[..., (0, 1), (0, 1)] = (end - begin) * unit / view
    placed[..., :2, 2] = begin * unit
    placed[..., 2, 2] = 1
    sides = torch.full_like(geometry.source_size, _SIDE)
    return tokens._replace(geometry=CropGeometry(placed, geometry.view_size, sides))

"""Nearest tokens by centres that are off by up to half a cell, on both sides alike.

As people write them: where both views are one crop, or are cut alike, the errors cancel.
"""

import torch

from local_distill import Matches, to_source


def nearest_by(axis):
    """A matcher of no limit; ``axis(n, size)`` places n centres along a view's side, in pixels."""

    def places(view):
        (height, width), grid = view.geometry.view_size[0].tolist(), view.grid
        down, across = axis(grid.rows, height), axis(grid.cols, width)
        points = torch.cartesian_prod(down, across).reshape(-1, 2).flip(-1).float()
        return to_source(view.geometry, points.expand(len(view.geometry.matrix), -1, -1))

    def nearest(student, teacher):
        distance, index = torch.cdist(places(student), places(teacher)).min(-1)
        return Matches(index[..., None], torch.ones_like(distance)[..., None], distance)

    return nearest


corners_aligned = nearest_by(lambda n, size: torch.linspace(0, size, n))
corner_pixels_aligned = nearest_by(lambda n, size: torch.linspace(0, size - 1, n))
half_a_cell_off = nearest_by(lambda n, size: torch.arange(n) * size / n)
half_a_pixel_off = nearest_by(lambda n, size: (torch.arange(n) + 0.5) * size / n - 0.5)
centred = nearest_by(lambda n, size: (torch.arange(n) + 0.5) * size / n)

HALF_PIXELS = {
    "corners aligned": corners_aligned,
    "corner pixels aligned": corner_pixels_aligned,
    "half a cell off": half_a_cell_off,
    "half a pixel off": half_a_pixel_off,
}

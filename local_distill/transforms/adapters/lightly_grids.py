"""VICRegL's grids of cell centres, lightly's and the authors' own, turned back into crop boxes."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from local_distill._check import values_visible
from local_distill.errors import GeometryError, ShapeError
from local_distill.geometry import Size, from_box
from local_distill.structures import CropGeometry

__all__ = ["LightlyLocation", "from_lightly_grid", "from_lightly_location", "from_vicregl_grid"]

# Boxes are whole pixels. float32 grids of a 65,535 px source are good to 0.03 px.
_ROUNDING = 0.1


class LightlyLocation(Protocol):
    """What `from_lightly_location` reads: lightly's ``Location`` has these."""

    top: float
    left: float
    height: float
    width: float
    image_height: float
    image_width: float
    horizontal_flip: bool
    vertical_flip: bool


def from_lightly_location(location: LightlyLocation, view_size: Size) -> CropGeometry:
    """Where a view of lightly's ``RandomResizedCropWithLocation`` and its flips lies in the image.

    Args:
        location: lightly's ``Location``, after the flips have noted themselves in it.
        view_size: (height, width) of the view.

    Returns:
        `CropGeometry` of one view: float32 matrix (3, 3).

    Example:
        >>> from lightly.transforms.random_crop_and_flip_with_grid import Location
        >>> location = Location(top=0, left=10, height=20, width=20, image_height=20,
        ...     image_width=60, horizontal_flip=True)
        >>> from_lightly_location(location, (40, 40)).matrix[0]
        tensor([-0.5000,  0.0000, 30.0000])
    """
    box = (
        float(location.left),
        float(location.top),
        float(location.left + location.width),
        float(location.top + location.height),
    )
    source_size = int(location.image_height), int(location.image_width)
    return from_box(
        box,
        view_size,
        source_size,
        hflip=bool(location.horizontal_flip),
        vflip=bool(location.vertical_flip),
    )


def from_lightly_grid(grid: Tensor, view_size: Size, source_size: Size) -> CropGeometry:
    """Where the views that lightly's ``VICRegLTransform`` returns with these grids lie.

    lightly spreads n centres over the crop's whole width w from its first cell's middle on:
    ``x_i = left + w/(2n) + i·w/(n − 1)``, where the middle of cell i is ``left + w/(2n) + i·w/n``.
    So cell i is put i/(n − 1) of a cell too far, and the last one whole cell. The crop and its
    flips are solved from that: ``w = |x_{n−1} − x_0|``, ``left = min(x_0, x_{n−1}) − w/(2n)``.

    Convention: the grid's points are (x, y) in source pixels.

    Args:
        grid: (…, rows, cols, 2) with at least two rows and columns; as the transform gives it, or
            as a loader has stacked it.
        view_size: (height, width) of the views, or an int tensor (…, 2).
        source_size: (height, width) of the images, or an int tensor (…, 2).

    Returns:
        `CropGeometry`: float32 matrix (…, 3, 3).

    Raises:
        ShapeError: not a grid of points, or fewer than 2 × 2.
        GeometryError: no grid of lightly's, or one whose crop reaches out of the source.

    Example:
        >>> grid = torch.tensor([[[3.0, 4], [7, 4]], [[3, 12], [7, 12]]])
        >>> from_lightly_grid(grid, (16, 8), (20, 30)).matrix
        tensor([[0.5000, 0.0000, 2.0000],
                [0.0000, 0.5000, 2.0000],
                [0.0000, 0.0000, 1.0000]])

    Source:
        ``location_to_NxN_grid`` in ``lightly/transforms/random_crop_and_flip_with_grid.py`` of
        lightly 1.6.

    Deviations: its grid steps too far; this does not.
    """
    points = _check_grid(grid)
    x, y = points[..., 0], points[..., 1]
    return _from_axes(x[..., 0, :], y[..., :, 0], x, y, view_size, source_size, too_far=True)


def from_vicregl_grid(grid: Tensor, view_size: Size, source_size: Size) -> CropGeometry:
    """Where the views of the VICRegL authors' ``MultiCropTrainDataTransform`` lie.

    Only from grids made with ``--no-flip-grid 0``. Their default, 1, flips half of the views and
    no grid: such a grid does not say whether its view was flipped, and nothing can.

    Convention: these grids hold (y, x), rows first, unlike lightly's.

    Args:
        grid: (…, rows, cols, 2), at least 2 × 2: one of the transform's ``locations``.
        view_size: (height, width) of the views, or an int tensor (…, 2).
        source_size: (height, width) of the images, or an int tensor (…, 2).

    Returns:
        `CropGeometry`: float32 matrix (…, 3, 3).

    Raises:
        ShapeError: not a grid of points, or fewer than 2 × 2.
        GeometryError: no grid of theirs, or one whose crop reaches out of the source.

    Example:
        >>> grid = torch.tensor([[[4.0, 3], [4, 5]], [[8, 3], [8, 5]]])
        >>> from_vicregl_grid(grid, (16, 8), (20, 30)).matrix
        tensor([[0.5000, 0.0000, 2.0000],
                [0.0000, 0.5000, 2.0000],
                [0.0000, 0.0000, 1.0000]])

    Source:
        ``_location_to_NxN_grid`` in ``transforms.py`` of facebookresearch/VICRegL.
    """
    points = _check_grid(grid)
    y, x = points[..., 0], points[..., 1]
    return _from_axes(x[..., 0, :], y[..., :, 0], x, y, view_size, source_size, too_far=False)


def _check_grid(grid: Tensor) -> Tensor:
    shape = tuple(grid.shape) if isinstance(grid, Tensor) else type(grid).__name__
    if not isinstance(grid, Tensor) or grid.dim() < 3 or grid.shape[-1] != 2:
        raise ShapeError(f"`grid` must be a tensor of shape (…, rows, cols, 2), got {shape}")
    if min(grid.shape[-3:-1]) < 2:
        raise ShapeError(
            f"`grid` must have at least 2 × 2 cells, got {shape}: one centre does not say how wide "
            "its cell is; use a larger grid_size, or from_lightly_location"
        )
    return grid.to(torch.float64)


def _from_axes(
    across: Tensor,
    down: Tensor,
    x: Tensor,
    y: Tensor,
    view_size: Size,
    source_size: Size,
    *,
    too_far: bool,
) -> CropGeometry:
    left, right, hflip, spread = _crop(across, too_far)
    top, bottom, vflip, drop = _crop(down, too_far)
    box = torch.stack((left, top, right, bottom), -1)
    if values_visible(box):
        rest = (box - box.round()).abs().amax(-1)
        off = torch.stack((x - spread[..., None, :], y - drop[..., :, None])).abs()
        if not bool((rest < _ROUNDING).all() & (off < _ROUNDING).all() & (right > left).all()):
            other = "from_vicregl_grid" if too_far else "from_lightly_grid"
            raise GeometryError(
                "`grid` is not one of this kind: its points are not evenly spread over a crop of "
                f"whole pixels; is it for {other}, normalised, or in half precision?"
            )
        size = torch.as_tensor(source_size)
        height, width = size.unbind(-1)
        inside = (box[..., :2].round() >= 0).all(-1)
        inside &= (right.round() <= width) & (bottom.round() <= height)
        if not bool(inside.all()):
            raise GeometryError(
                f"`grid` shows the crop {box.round().reshape(-1, 4)[0].tolist()} (x0, y0, x1, y1), "
                f"which reaches out of a source of (height, width) = {size.tolist()}; is "
                "`source_size` given as (width, height)?"
            )
    whole = box.round().to(torch.float32)
    return from_box(whole, view_size, source_size, hflip=hflip, vflip=vflip)


def _crop(centers: Tensor, too_far: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(start, end, flipped, the grid that these would have) along one axis."""
    cells = centers.shape[-1]
    first, last = centers[..., 0], centers[..., -1]
    between = (last - first).abs()
    length = between if too_far else between * cells / (cells - 1)
    start = torch.minimum(first, last) - length / (2 * cells)
    steps = torch.arange(cells, dtype=centers.dtype, device=centers.device) / (cells - 1)
    return start, start + length, last < first, first[..., None] + (last - first)[..., None] * steps

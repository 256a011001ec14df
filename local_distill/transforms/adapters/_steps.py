"""What several adapters share: sizes given by a user, and matrices of single steps, in float64."""

from __future__ import annotations

import operator

import torch
from torch import Tensor

from local_distill.errors import ShapeError
from local_distill.geometry import from_matrix
from local_distill.structures import CropGeometry

# Half a pixel: from coordinates that count pixel centres (first centre 0) to continuous ones (0.5).
_TO_CONTINUOUS = torch.tensor([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]], dtype=torch.float64)
_TO_CENTRES = torch.tensor([[1, 0, -0.5], [0, 1, -0.5], [0, 0, 1]], dtype=torch.float64)


def check_size(name: str, size: object) -> tuple[int, int]:
    """(height, width) as two whole numbers of at least 1."""
    try:
        height, width = (operator.index(side) for side in size)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise ShapeError(
            f"`{name}` must be two whole numbers (height, width), got {size!r}"
        ) from None
    if height < 1 or width < 1:
        raise ShapeError(f"`{name}` must be at least 1 × 1, got {(height, width)}")
    return height, width


def to_continuous(matrix: Tensor) -> Tensor:
    """The same map (…, 3, 3), whose points counted from pixel centres, in continuous pixels."""
    wide = matrix.to(torch.float64)
    return _TO_CONTINUOUS.to(wide.device) @ wide @ _TO_CENTRES.to(wide.device)


def scale_and_shift(scale_x: float, scale_y: float, shift_x: float, shift_y: float) -> Tensor:
    """(3, 3) float64: first scaled, then shifted."""
    rows = [[scale_x, 0, shift_x], [0, scale_y, shift_y], [0, 0, 1]]
    return torch.tensor(rows, dtype=torch.float64)


def resized(source: tuple[int, int], view: tuple[int, int]) -> Tensor:
    """Source → view of a resize that maps the image's edges onto the view's."""
    return scale_and_shift(view[1] / source[1], view[0] / source[0], 0, 0)


def view_geometry(matrix: Tensor, view: tuple[int, int], source: tuple[int, int]) -> CropGeometry:
    """The geometry (…) of views that (…, 3, 3) float64 source → view matrices lead to."""
    return from_matrix(torch.linalg.inv(matrix).to(torch.float32), view, source)

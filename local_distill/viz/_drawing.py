"""What several pictures share: inputs made plain, and artists in data units."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from local_distill.errors import DataError, GeometryError, ShapeError, require_extra
from local_distill.geometry import check_geometry, grid_points, to_source
from local_distill.structures import CropGeometry, TokenGrid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import LineCollection

# Bicubic resampling overshoots a little; a normalised image leaves [0, 1] by far more.
_OVERSHOOT = 0.25


def picture_array(name: str, image: Any, sample: int) -> np.ndarray:
    """(h, w, 3) float32 in [0, 1], from any of the forms in which callers hold an image."""
    if isinstance(image, np.ndarray):
        return image  # one of our own, already converted
    if hasattr(image, "convert"):  # a PIL image; PIL itself is optional
        return np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    if not isinstance(image, Tensor):
        raise ShapeError(f"`{name}` must be a tensor or a PIL image, got {type(image).__name__}")
    if image.dim() == 4:
        check_sample(name, sample, image.shape[0])
        image = image[sample]
    if image.dim() != 3 or image.shape[0] not in (1, 3) or 0 in image.shape:
        raise ShapeError(f"`{name}` must have shape (3, h, w), got {tuple(image.shape)}")
    values = image.detach().cpu().expand(3, -1, -1).permute(1, 2, 0)
    if not values.is_floating_point():
        if values.dtype != torch.uint8:
            raise ShapeError(f"`{name}` must be uint8, or float in [0, 1], got {values.dtype}")
        return _as_array(values.float().div(255))
    values = values.float()
    low, high = float(values.min()), float(values.max())
    if not (low >= -_OVERSHOOT and high <= 1 + _OVERSHOOT):
        raise DataError(
            f"`{name}` must hold values in [0, 1], got {low:.3g} to {high:.3g}; "
            "if it was normalised, pass denormalize(image, mean, std)"
        )
    return _as_array(values.clamp(0, 1))


def one_geometry(name: str, geometry: CropGeometry, sample: int) -> CropGeometry:
    check_geometry(name, geometry)
    if geometry.matrix.dim() == 3:
        check_sample(name, sample, geometry.matrix.shape[0])
        geometry = CropGeometry(*(part[sample] for part in geometry))
    if geometry.matrix.dim() != 2:
        raise ShapeError(
            f"`{name}` must have a matrix (3, 3) or (b, 3, 3), got {tuple(geometry.matrix.shape)}"
        )
    return geometry.to("cpu")


def outline(name: str, geometry: CropGeometry) -> np.ndarray:
    height, width = geometry.view_size.tolist()
    corners = torch.tensor([[0, 0], [width, 0], [width, height], [0, height]], dtype=torch.float64)
    source: np.ndarray = to_source(geometry, corners).double().numpy()
    if not np.isfinite(source).all():
        raise GeometryError(
            f"`{name}`: a corner of the view lies beyond the horizon of its perspective and has no "
            "place in the source"
        )
    return source


def check_sample(name: str, sample: int, batch: int) -> None:
    if not 0 <= sample < batch:
        raise ShapeError(f"`sample` is {sample}, but `{name}` holds {batch} images")


def check_count(name: str, values: Sequence[Any], wanted: int) -> None:
    if len(values) != wanted:
        raise ShapeError(
            f"`{name}` has {len(values)} entries for {wanted} views; give one per view"
        )


def token_points(grid: TokenGrid) -> np.ndarray:
    return _as_array(grid_points(grid, torch.device("cpu"), torch.float64))


def _as_array(values: Tensor) -> np.ndarray:
    array: np.ndarray = values.numpy()
    return array


def show(ax: Axes, picture: np.ndarray, extent: tuple[float, float, float, float]) -> None:
    # `extent` in continuous pixels: imshow's own default puts the centre of pixel 0 at 0
    ax.imshow(picture, extent=extent, interpolation="nearest")
    ax.set_xticks([])
    ax.set_yticks([])


def add_frame(ax: Axes, x: float, width: float, color: Any) -> None:
    patches = require_extra("matplotlib.patches", "train")
    ax.add_patch(patches.Rectangle((x, 0), width, 1, fill=False, ec=color, lw=2.5))


def add_lines(ax: Axes, segments: Sequence[Any], **look: Any) -> LineCollection:
    collections = require_extra("matplotlib.collections", "train")
    lines: LineCollection = collections.LineCollection(segments, **look)
    ax.add_collection(lines, autolim=False)
    return lines


def add_dots(ax: Axes, centers: np.ndarray, diameter: float, **look: Any) -> None:
    # sized in data units, so that a 37 × 37 grid stays as legible as a 3 × 3 one
    collections = require_extra("matplotlib.collections", "train")
    size = np.full(len(centers), diameter)
    dots = collections.EllipseCollection(
        size, size, np.zeros(len(centers)), units="xy",
        offsets=centers, offset_transform=ax.transData, zorder=3, **look,
    )  # fmt: skip
    ax.add_collection(dots, autolim=False)

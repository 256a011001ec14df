"""Which part of the source each token shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from local_distill.errors import ShapeError, require_extra
from local_distill.footprints import token_footprints
from local_distill.geometry import source_valid
from local_distill.structures import CropGeometry, TokenGrid
from local_distill.viz._drawing import one_geometry, picture_array, show

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import PolyCollection

__all__ = ["draw_footprints", "token_colors"]


def token_colors(grid: TokenGrid) -> np.ndarray:
    """One colour a token, that changes evenly over the view: hue by column, darker by row.

    Given to `draw_tokens` and to `draw_footprints`, they show which token lies where.

    Returns:
        (rows·cols, 3) red, green, blue in [0, 1], row-major.

    Example:
        >>> colors = token_colors(TokenGrid.tiling(2, 3, (32, 48)))
        >>> colors.shape, bool((colors[0] == colors[3]).all())
        ((6, 3), False)
    """
    hsv_to_rgb = require_extra("matplotlib.colors", "train").hsv_to_rgb
    # less than the whole circle: the last column would have the first one's hue
    hue = np.arange(grid.cols) / max(grid.cols, 1) * 0.85
    value = 1.0 - 0.55 * np.arange(grid.rows) / max(grid.rows - 1, 1)
    hsv = np.stack(np.broadcast_arrays(hue[None], 0.85, value[:, None]), axis=-1)
    colors: np.ndarray = hsv_to_rgb(hsv.reshape(-1, 3))
    return colors


def draw_footprints(
    ax: Axes,
    image: Any,
    geometry: CropGeometry,
    grid: TokenGrid,
    *,
    tokens: Sequence[int] | None = None,
    colors: Sequence[Any] | None = None,
    sample: int = 0,
) -> PolyCollection:
    """Draw the source image with the quadrilateral that each token of a view covers.

    A token whose centre lies in the source is filled, one that lies outside (padding, the corners
    of a rotation) is an empty dashed outline: it is never matched.

    Convention: axes coordinates are source pixels, x right, y down, pixel i spanning [i, i + 1].

    Args:
        ax: where to draw.
        image: the source: (3, h, w) uint8, or float in [0, 1], or a PIL image.
        geometry: the view's, (3, 3) or batched.
        grid: the view's tokens.
        tokens: which of them, row-major; all by default.
        colors: one matplotlib colour for each token that is drawn; `token_colors` by default.
        sample: which image of batched input to show.

    Returns:
        The filled quadrilaterals.

    Raises:
        ShapeError: a shape does not fit, a token that the grid lacks, or colours of another number.
        GeometryError: a geometry that cannot be.

    Example:
        >>> import torch
        >>> from local_distill import from_box
        >>> from local_distill.viz import new_figure
        >>> ax = new_figure(3, 3).add_subplot()
        >>> crop = from_box((0, 0, 20, 10), (32, 64), (10, 20))
        >>> grid = TokenGrid.tiling(1, 2, (32, 64))
        >>> filled = draw_footprints(ax, torch.zeros(3, 10, 20), crop, grid)
        >>> filled.get_paths()[1].vertices[:4].tolist()
        [[10.0, 0.0], [20.0, 0.0], [20.0, 10.0], [10.0, 10.0]]
    """
    collections = require_extra("matplotlib.collections", "train")
    picture = picture_array("image", image, sample)
    one = one_geometry("geometry", geometry, sample)
    chosen = list(range(grid.num_tokens)) if tokens is None else [int(token) for token in tokens]
    if not all(0 <= token < grid.num_tokens for token in chosen):
        raise ShapeError(
            f"`tokens` must be in 0 … {grid.num_tokens - 1}, the tokens of a grid of {grid.rows} × "
            f"{grid.cols}, got {chosen}"
        )
    shades = token_colors(grid)[chosen] if colors is None else list(colors)
    if len(shades) != len(chosen):
        raise ShapeError(f"`colors` has {len(shades)} entries for {len(chosen)} tokens")
    quads = token_footprints(one, grid).double().numpy()[chosen]
    inside = source_valid(one, grid).numpy()[chosen]
    seen = np.isfinite(quads).all((1, 2))  # a cell that reaches the horizon has no outline
    height, width = picture.shape[:2]
    show(ax, picture, (0, width, height, 0))
    keep = inside & seen
    filled: PolyCollection = collections.PolyCollection(
        quads[keep],
        facecolors=[shade for shade, kept in zip(shades, keep, strict=True) if kept],
        edgecolors="black",
        linewidths=0.5,
        alpha=0.6,
    )
    ax.add_collection(filled, autolim=False)
    hollow = ~inside & seen
    outlines = collections.PolyCollection(
        quads[hollow],
        facecolors="none",
        edgecolors=[shade for shade, kept in zip(shades, hollow, strict=True) if kept],
        linewidths=1.0,
        linestyles="dashed",
    )
    ax.add_collection(outlines, autolim=False)
    corners = np.concatenate([quads[seen].reshape(-1, 2), [[0, 0], [width, height]]])
    (left, top), (right, bottom) = corners.min(0), corners.max(0)
    ax.set_xlim(left, right)
    ax.set_ylim(bottom, top)
    return filled

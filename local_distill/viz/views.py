"""Views on their source, and the tokens of a view."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from local_distill.errors import ShapeError, require_extra
from local_distill.structures import CropGeometry, TokenGrid
from local_distill.viz._drawing import (
    add_dots,
    add_lines,
    check_count,
    one_geometry,
    outline,
    picture_array,
    show,
    token_points,
)
from local_distill.viz.figures import view_colors

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_tokens", "draw_views"]


def draw_views(
    ax: Axes,
    image: Any,
    geometries: Sequence[CropGeometry],
    *,
    labels: Sequence[str] | None = None,
    colors: Sequence[Any] | None = None,
    sample: int = 0,
) -> None:
    """Draw the source image with the outline of every view on it.

    A view's corners are mapped by its homography. A numbered dot marks the view's own top left
    corner, and an arrow runs from there along its top edge, so flips and turns show.

    Convention: axes coordinates are source pixels, x right, y down, pixel i spanning [i, i + 1].

    Args:
        ax: where to draw.
        image: the source: (3, h, w) uint8, or float in [0, 1], or a PIL image.
        geometries: one per view, (3, 3) or batched.
        labels: one short text per view; the view's number by default.
        colors: one matplotlib colour per view; `view_colors` by default.
        sample: which image of batched input to show.

    Raises:
        ShapeError: a shape does not fit.
        GeometryError: a geometry that cannot be, or a corner beyond the horizon.
        DataError: pixel values outside [0, 1], as those of a normalised image.

    Example:
        >>> import torch
        >>> from local_distill import from_box
        >>> from local_distill.viz import new_figure
        >>> ax = new_figure(3, 3).add_subplot()
        >>> crop = from_box((4, 2, 12, 6), (16, 32), (10, 20), hflip=True)
        >>> draw_views(ax, torch.zeros(3, 10, 20), [crop])
        >>> ax.patches[0].get_xy()[:2].tolist()  # mirrored: the view's left is the box's right
        [[12.0, 2.0], [4.0, 2.0]]
    """
    patches = require_extra("matplotlib.patches", "train")
    labels = labels or [str(view) for view in range(len(geometries))]
    colors = colors or view_colors(len(geometries))
    check_count("labels", labels, len(geometries))
    check_count("colors", colors, len(geometries))
    picture = picture_array("image", image, sample)
    height, width = picture.shape[:2]
    show(ax, picture, (0, width, height, 0))
    badges: list[np.ndarray] = []
    reach = math.hypot(width, height)
    left, right, top, bottom = 0.0, float(width), 0.0, float(height)
    for view, (label, color) in enumerate(zip(labels, colors, strict=True)):
        name = f"geometries[{view}]"
        corners = outline(name, one_geometry(name, geometries[view], sample))
        ax.add_patch(patches.Polygon(corners, closed=True, fill=False, ec="black", lw=2.6))
        ax.add_patch(patches.Polygon(corners, closed=True, fill=False, ec=color, lw=1.6))
        # drawn with annotate, whose head keeps its size in points whatever the image's resolution
        ax.annotate(
            "",
            xy=tuple(corners[1]),
            xytext=tuple(corners[0]),
            arrowprops={
                "arrowstyle": "-|>,head_width=0.3,head_length=0.6",
                "color": color,
                "lw": 3.2,
                "shrinkA": 0,
                "shrinkB": 0,
            },
            annotation_clip=False,
        )
        place = _free_place(corners, badges, 0.045 * reach)
        badges.append(place)
        ax.annotate(
            label,
            xy=tuple(place),
            ha="center",
            va="center",
            fontsize=8,
            fontweight="bold",
            color="white",
            bbox={"boxstyle": "circle,pad=0.25", "fc": color, "ec": "black", "lw": 0.8},
            annotation_clip=False,
            zorder=5,
        )
        left, right = min(left, corners[:, 0].min()), max(right, corners[:, 0].max())
        top, bottom = min(top, corners[:, 1].min()), max(bottom, corners[:, 1].max())
    # Views may reach out of the source (padding, rotation): that has to show.
    ax.set_xlim(left, right)
    ax.set_ylim(bottom, top)


def draw_tokens(
    ax: Axes,
    view: Any,
    grid: TokenGrid,
    *,
    color: Any = "white",
    token_colors: Sequence[Any] | None = None,
    sample: int = 0,
) -> None:
    """Draw a view with its tokens: the borders of their cells, and a dot at each centre.

    Convention: axes coordinates are view pixels; a cell reaches half a stride around its centre, so
    cells stand out of the view (and are cut) or leave a rest where the grid does not tile it.

    Args:
        ax: where to draw.
        view: (3, h, w) uint8, or float in [0, 1], or a PIL image.
        grid: the view's tokens.
        color: matplotlib colour of borders, dots and frame.
        token_colors: one matplotlib colour a token to fill its cell with, or None for no filling.
        sample: which image of batched input to show.

    Raises:
        ShapeError: a shape does not fit, or colours of another number.
        DataError: pixel values outside [0, 1].

    Example:
        >>> import torch
        >>> from local_distill.viz import new_figure
        >>> ax = new_figure(3, 3).add_subplot()
        >>> draw_tokens(ax, torch.zeros(3, 32, 48), TokenGrid.tiling(2, 3, (32, 48)))
        >>> [len(collection.get_offsets()) for collection in ax.collections][-1]
        6
    """
    picture = picture_array("view", view, sample)
    height, width = picture.shape[:2]
    show(ax, picture, (0, width, height, 0))
    x = grid.offset[0] + grid.stride[0] * (np.arange(grid.cols + 1) - 0.5)
    y = grid.offset[1] + grid.stride[1] * (np.arange(grid.rows + 1) - 0.5)
    borders = [[(at, y[0]), (at, y[-1])] for at in x] + [[(x[0], at), (x[-1], at)] for at in y]
    if token_colors is not None:
        _fill_cells(ax, grid, token_colors)
    # a thin line over a wider dark one is seen on any texture
    thin = min(1.0, 8 / max(grid.rows, grid.cols, 1))
    for shade, linewidth in (("black", 1.2 * thin), (color, 0.6 * thin)):
        add_lines(ax, borders, colors=shade, linewidths=linewidth, alpha=0.8)
    centers = token_points(grid)
    add_dots(ax, centers, 0.2 * min(grid.stride), facecolors=[color], edgecolors="none")
    for spine in ax.spines.values():
        spine.set(visible=True, edgecolor=color, linewidth=2.5)


def _fill_cells(ax: Axes, grid: TokenGrid, colors: Sequence[Any]) -> None:
    if len(colors) != grid.num_tokens:
        raise ShapeError(f"`token_colors` has {len(colors)} entries for {grid.num_tokens} tokens")
    collections = require_extra("matplotlib.collections", "train")
    half = np.array(grid.stride) / 2
    corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * half
    cells = token_points(grid)[:, None] + corners
    shades = require_extra("matplotlib.colors", "train").to_rgba_array(colors)
    shades[:, 3] *= 0.6  # the view stays visible, and a transparent colour transparent
    ax.add_collection(collections.PolyCollection(cells, facecolors=shades), autolim=False)


def _free_place(corners: np.ndarray, taken: Sequence[np.ndarray], distance: float) -> np.ndarray:
    """Where to label a view: its first corner, or as far towards its middle as others allow."""
    first: np.ndarray = corners[0]
    middle = corners.mean(0)
    for part in np.linspace(0, 1, 12):
        place: np.ndarray = first + part * (middle - first)
        if all(np.hypot(*(place - other)) >= distance for other in taken):
            return place
    return first

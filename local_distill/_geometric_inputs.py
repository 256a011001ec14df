"""What everything that works on two views' geometry asks of their tokens first."""

from __future__ import annotations

import torch

from local_distill._check import Axes, values_visible
from local_distill.errors import GeometryError, ShapeError
from local_distill.geometry import check_geometry, check_geometry_shapes
from local_distill.structures import CropGeometry, TokenGrid, Tokens

__all__ = ["geometric_inputs", "view_geometry"]


def geometric_inputs(
    student: Tokens, teacher: Tokens, *, user: str = "a geometric matcher"
) -> tuple[CropGeometry, TokenGrid, CropGeometry, TokenGrid]:
    """Geometry and grid of both sides, checked to be views of the same images.

    Args:
        student: with geometry (b) and grid.
        teacher: likewise.
        user: what asks for them, for the message.
    """
    axes = Axes()
    parts: list[tuple[CropGeometry, TokenGrid]] = []
    for name, tokens in (("student", student), ("teacher", teacher)):
        geometry, grid = view_geometry(name, tokens, axes, user=user)
        check_geometry(f"{name}.geometry", geometry, grid)
        parts.append((geometry, grid))
    s_size, t_size = parts[0][0].source_size, parts[1][0].source_size
    if values_visible(s_size, t_size) and not torch.equal(s_size, t_size):
        raise GeometryError(
            "`student.geometry` and `teacher.geometry` have different source sizes "
            f"(height, width), {s_size.tolist()} and {t_size.tolist()}: the views must show the "
            "same images, in the same order"
        )
    return *parts[0], *parts[1]


def view_geometry(
    name: str, tokens: Tokens, axes: Axes, *, user: str = "a geometric matcher"
) -> tuple[CropGeometry, TokenGrid]:
    """The geometry and grid of one view, whose shapes are checked but not yet the values.

    Args:
        name: the argument's name, for the messages.
        tokens: with geometry (b) and grid.
        axes: sizes known so far.
        user: what asks for them, for the message.
    """
    geometry, grid = tokens.geometry, tokens.grid
    if geometry is None or grid is None:
        missing = "geometry" if geometry is None else "grid"
        raise ShapeError(
            f"`{name}` has no {missing}, which {user} needs: Tokens(features, geometry, grid)"
        )
    check_geometry_shapes(f"{name}.geometry", geometry, grid)
    axes.bind(f"{name}.geometry.matrix", geometry.matrix, "b 3 3")
    if tokens.features is not None and tokens.features.shape[1] != grid.num_tokens:
        raise ShapeError(
            f"`{name}.features` holds {tokens.features.shape[1]} tokens (shape "
            f"{tuple(tokens.features.shape)}) but its grid has {grid.rows} × {grid.cols} = "
            f"{grid.num_tokens}; drop class and register tokens"
        )
    return geometry, grid

"""What everything that works on two views' geometry asks of their tokens first."""

from __future__ import annotations

import torch

from local_distill._check import Axes, values_visible
from local_distill.errors import GeometryError, ShapeError
from local_distill.geometry import check_geometry
from local_distill.structures import CropGeometry, TokenGrid, Tokens

__all__ = ["geometric_inputs"]


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
        if tokens.geometry is None or tokens.grid is None:
            missing = "geometry" if tokens.geometry is None else "grid"
            raise ShapeError(
                f"`{name}` has no {missing}, which {user} needs: Tokens(features, geometry, grid)"
            )
        check_geometry(f"{name}.geometry", tokens.geometry, tokens.grid)
        axes.bind(f"{name}.geometry.matrix", tokens.geometry.matrix, "b 3 3")
        if tokens.features is not None and tokens.features.shape[1] != tokens.grid.num_tokens:
            raise ShapeError(
                f"`{name}.features` holds {tokens.features.shape[1]} tokens (shape "
                f"{tuple(tokens.features.shape)}) but its grid has {tokens.grid.rows} × "
                f"{tokens.grid.cols} = {tokens.grid.num_tokens}; drop class and register tokens"
            )
        parts.append((tokens.geometry, tokens.grid))
    s_size, t_size = parts[0][0].source_size, parts[1][0].source_size
    if values_visible(s_size, t_size) and not torch.equal(s_size, t_size):
        raise GeometryError(
            "`student.geometry` and `teacher.geometry` have different source sizes "
            f"(height, width), {s_size.tolist()} and {t_size.tolist()}: the views must show the "
            "same images, in the same order"
        )
    return *parts[0], *parts[1]

"""What everything that works on views' tokens, or on two views' geometry, asks of them first."""

from __future__ import annotations

import torch
from torch import Tensor

from local_distill._check import Axes, values_visible
from local_distill.errors import GeometryError, ShapeError
from local_distill.geometry import check_geometry, check_geometry_shapes, check_grid
from local_distill.structures import CropGeometry, TokenGrid, Tokens, ViewOutput

__all__ = ["BATCH_IT", "check_token_parts", "check_tokens", "geometric_inputs", "view_geometry"]

# What to do with the geometry of one image where those of a batch are wanted.
BATCH_IT = (
    "that of one image is batched by torch.utils.data.default_collate([geometry]), as a loader's "
    "collate does it"
)

# Class and register tokens are no more than this; more tokens than the grid has are another fault.
_MOST_PREFIX_TOKENS = 16


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
    check_tokens(name, tokens)
    geometry, grid = tokens.geometry, tokens.grid
    if geometry is None or grid is None:
        missing = "geometry" if geometry is None else "grid"
        raise ShapeError(
            f"`{name}` has no {missing}, which {user} needs: Tokens(features, geometry, grid)"
        )
    axes.bind(f"{name}.geometry.matrix", geometry.matrix, "b 3 3")
    return geometry, grid


def check_tokens(name: str, tokens: object) -> None:
    """Refuse what is no `Tokens` of one view, or whose parts do not belong together.

    Looks at types and shapes alone: no value, so no device sync.

    Args:
        name: the argument's name, for the messages.
        tokens: with features (b, n, d), geometry (b) and grid, any of them None.
    """
    given = check_token_parts(name, tokens)
    features, geometry, grid = given.features, given.geometry, given.grid
    if geometry is not None:
        check_geometry_shapes(f"{name}.geometry", geometry, grid)
        if geometry.matrix.dim() != 3:
            _refuse_batch(name, geometry)
    if features is None:
        return
    if features.dim() != 3:
        _refuse_axes(name, features)
    if grid is not None and features.shape[1] != grid.num_tokens:
        _refuse_count(name, features, grid)
    if geometry is not None and features.shape[0] != geometry.matrix.shape[0]:
        raise ShapeError(
            f"axis `b` is {geometry.matrix.shape[0]} in `{name}.geometry.matrix` but "
            f"{features.shape[0]} in `{name}.features` (shape {tuple(features.shape)}, wanted "
            "`b n d`); give both of the same images, in the same order"
        )


def check_token_parts(name: str, tokens: object) -> Tokens:
    """The part of `check_tokens` that looks at types alone."""
    if not isinstance(tokens, Tokens):
        raise ShapeError(
            f"`{name}` must be Tokens(features, geometry, grid), got {type(tokens).__name__}"
            f"{_way_to_tokens(tokens)}"
        )
    features, geometry, grid = tokens.features, tokens.geometry, tokens.grid
    if features is not None and not isinstance(features, Tensor):
        raise ShapeError(
            f"`{name}.features` must be a tensor (b, n, d) or None, got {type(features).__name__}"
        )
    if geometry is not None and not isinstance(geometry, CropGeometry):
        raise ShapeError(
            f"`{name}.geometry` must be a CropGeometry or None, got {type(geometry).__name__}; "
            "build one with from_box, from_matrix or a tracking transform"
        )
    if grid is not None:
        check_grid(f"{name}.grid", grid)
    return tokens


def _way_to_tokens(value: object) -> str:
    if isinstance(value, Tensor):
        return (
            "; of features (b, n, d) make Tokens(features), and where places count "
            "Tokens(features, geometry, grid)"
        )
    if isinstance(value, CropGeometry):
        return "; make Tokens(None, geometry, grid)"
    if isinstance(value, ViewOutput):
        return "; give its .tokens"
    if isinstance(value, (list, tuple)):
        return "; lists of views go to match_views(matcher, student, teacher)"
    return ""


def _refuse_batch(name: str, geometry: CropGeometry) -> None:
    shape = tuple(geometry.matrix.shape)
    how = BATCH_IT if len(shape) == 2 else "the leading axes of a view must be its images alone"
    raise ShapeError(
        f"`{name}.geometry.matrix` must have 3 axes `b 3 3`, got {len(shape)}: shape {shape}; {how}"
    )


def _refuse_axes(name: str, features: Tensor) -> None:
    shape, how = tuple(features.shape), ""
    if len(shape) == 4:
        how = (
            "; of a map (b, d, rows, cols) give x.flatten(2).mT, of (b, rows, cols, d) "
            "x.flatten(1, 2)"
        )
    raise ShapeError(
        f"`{name}.features` must have 3 axes `b n d`, got {len(shape)}: shape {shape}{how}"
    )


def _refuse_count(name: str, features: Tensor, grid: TokenGrid) -> None:
    wanted = grid.num_tokens
    if 1 <= features.shape[1] - wanted <= _MOST_PREFIX_TOKENS:
        how = "drop class and register tokens"
    elif features.shape[2] == wanted:
        how = "axes are (b, n, d): give x.mT of (b, d, n)"
    else:
        how = "give features and grid of the same view"
    raise ShapeError(
        f"`{name}.features` holds {features.shape[1]} tokens (shape {tuple(features.shape)}) but "
        f"its grid has {grid.rows} × {grid.cols} = {wanted}; {how}"
    )

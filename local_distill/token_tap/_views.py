"""Cuts what the modules of a tapped backbone gave into the tokens of each view."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from local_distill._check import check_at_least, values_visible
from local_distill._geometric_inputs import BATCH_IT
from local_distill.errors import ShapeError
from local_distill.structures import CropGeometry, TokenGrid


def image_sizes(inputs: Sequence[Any]) -> list[tuple[int, int, int]]:
    for value in inputs:
        images = value if isinstance(value, (list, tuple)) else [value]
        if images and all(isinstance(image, Tensor) and image.dim() == 4 for image in images):
            # no int(): that would compile one graph for each size where shapes are dynamic
            return [(image.shape[0], image.shape[2], image.shape[3]) for image in images]
    raise ShapeError(
        "`backbone` was called without images: among its arguments must be a tensor (b, c, h, w) "
        f"or a list of such tensors, got {[type(value).__name__ for value in inputs]}"
    )


def tensor_of(output: Any, name: str) -> Tensor:
    found = getattr(output, "last_hidden_state", output)
    if isinstance(found, dict):
        found = found.get("last_hidden_state", found)
    if isinstance(found, (tuple, list)) and found:
        found = found[0]
    if not isinstance(found, Tensor) or found.dim() not in (3, 4):
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ShapeError(
            f"`module`: the output of {name!r} must be tokens (b, n, d) or a map "
            f"(b, d, rows, cols), got {got}"
        )
    return found


def split_tokens(
    values: Tensor, images: int, rows: slice, grid: TokenGrid, prefix: int, name: str
) -> tuple[Tensor, Tensor]:
    """What stands before the patch tokens, and these, of the images that ``rows`` says."""
    if values.shape[0] != images:
        raise ShapeError(
            f"`module`: the output of {name!r} is {tuple(values.shape)} for {images} images; its "
            "first axis must be the images: tap a module that keeps them apart"
        )
    values = values[rows]
    if values.dim() == 4:
        tokens = _tokens_of_map(values, grid, name)
        return tokens[:, :0], tokens
    if values.shape[1] != prefix + grid.num_tokens:
        raise ShapeError(
            f"`module`: {name!r} gives {values.shape[1]} tokens, but {prefix} before a grid of "
            f"{grid.rows} x {grid.cols} make {prefix + grid.num_tokens}; give the right "
            "`num_prefix_tokens`, `patch_size` or `grid`; a layer with another grid takes a tap "
            "of its own"
        )
    return values[:, :prefix], values[:, prefix:]


def _tokens_of_map(values: Tensor, grid: TokenGrid, name: str) -> Tensor:
    shape, cells = tuple(values.shape), (grid.rows, grid.cols)
    channels_first, channels_last = shape[2:] == cells, shape[1:3] == cells
    if channels_first == channels_last:
        why = (
            "may be (b, d, rows, cols) or (b, rows, cols, d); tap a module that gives tokens "
            "(b, n, d)"
            if channels_first
            else "is neither (b, d, rows, cols) nor (b, rows, cols, d) of them; give the right "
            "`patch_size` or `grid`; a layer with another grid takes a tap of its own"
        )
        raise ShapeError(
            f"`module`: the map of {name!r} has the shape {shape}, and with the grid's "
            f"{grid.rows} rows and {grid.cols} cols {why}"
        )
    return values.flatten(2).mT if channels_first else values.flatten(1, 2)


def given_views(
    views: int | Sequence[CropGeometry] | Sequence[Tensor],
) -> Sequence[CropGeometry | Tensor | None]:
    if isinstance(views, int):
        return [None] * check_at_least("views", views, 1)
    # a CropGeometry is a tuple of three tensors: it would pass for three views
    alone = isinstance(views, (CropGeometry, Tensor)) or not isinstance(views, Sequence)
    if alone or not views or not all(isinstance(view, (CropGeometry, Tensor)) for view in views):
        raise ShapeError(
            "`views` must be how many views there were, or a list with one CropGeometry or one "
            f"tensor (b, c, h, w) per view, got {type(views).__name__}"
        )
    return views


def check_numbers(given: Sequence[CropGeometry | Tensor | None], seen: int) -> None:
    """Refuse views whose images are not as many as the network saw; a count says nothing here."""
    images = [_images_of(place, view) for place, view in enumerate(given) if view is not None]
    total = sum(images)
    if not images or total == seen:
        return
    kind = "geometries" if all(isinstance(view, CropGeometry) for view in given) else "views"
    each = str(images[0]) if len(set(images)) == 1 else ", ".join(map(str, images))
    fitting = [end for end in range(1, len(images)) if sum(images[:end]) == seen]
    if total and seen > total and seen % total == 0:
        fix = (
            "was a step before this one not taken, or a view not given? `clear` where a step is "
            "left out"
        )
    elif fitting:
        fix = f"give those of the views that this network saw, such as {kind}[:{fitting[0]}]"
    else:
        fix = "give those of all views that this network saw, and of no other"
    raise ShapeError(
        f"`views`: {len(images)} {kind} of {each} images make {total}, but the forwards since the "
        f"last `take` had {seen}: {fix}"
    )


def _images_of(place: int, view: CropGeometry | Tensor) -> int:
    if isinstance(view, CropGeometry):
        shape, axes, wanted = view.matrix.shape, 3, "a matrix (b, 3, 3)"
    else:
        shape, axes, wanted = view.shape, 4, "the shape (b, c, height, width)"
    if len(shape) == axes:
        return int(shape[0])
    how = f"; {BATCH_IT}" if isinstance(view, CropGeometry) and len(shape) == 2 else ""
    raise ShapeError(f"`views`: entry {place} must have {wanted}, got {tuple(shape)}{how}")


def check_view(
    place: int, view: CropGeometry | Tensor | None, view_size: tuple[int, int], batch: int
) -> None:
    if view is None:
        return
    if isinstance(view, CropGeometry):
        images = view.matrix.shape[0]
        wanted, got = f"a matrix ({batch}, 3, 3)", tuple(view.matrix.shape)
        visible = values_visible(view.view_size)
        sizes = {tuple(size) for size in view.view_size.tolist()} if visible else None
    else:
        images = view.shape[0]
        wanted, got = f"the shape ({batch}, c, height, width)", tuple(view.shape)
        sizes = {tuple(view.shape[-2:])}
    if images != batch:
        raise ShapeError(
            f"`views`: entry {place} must have {wanted}, as the forwards since the last `take` had "
            f"{batch} images a view, got {got}; all views of a step have one batch"
        )
    if sizes is not None and sizes != {view_size}:
        raise ShapeError(
            f"`views`: entry {place} is that of views of {sorted(sizes)}, but the backbone was "
            f"given views of {view_size} (height, width); are they in the order in which the "
            "wrapper calls its backbone?"
        )

"""What every matcher that compares features asks of its tokens before it works."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from local_distill._check import Axes, check_floating
from local_distill._precision import at_least_float32
from local_distill.errors import ShapeError
from local_distill.geometry import check_geometry, inside, wide_centers
from local_distill.structures import Tokens


class FeatureSide(NamedTuple):
    """One side's features, of at least float32 and without gradient."""

    features: Tensor  # (b, n, d), the same dtype on both sides
    inside: Tensor | None  # (b, n) bool, centre inside the source; None where geometry is not known


def feature_inputs(student: Tokens, teacher: Tokens) -> tuple[FeatureSide, FeatureSide]:
    """Features of both sides, checked, in one dtype of at least float32, cut off from the graph."""
    axes = Axes()
    parts: list[Tensor] = []
    insides: list[Tensor | None] = []
    for name, tokens, count in (("student", student, "s"), ("teacher", teacher, "t")):
        if tokens.features is None:
            raise ShapeError(
                f"`{name}` has no features, which a similarity matcher needs: "
                "Tokens(features, geometry, grid)"
            )
        features = axes.bind(f"{name}.features", tokens.features, f"b {count} d")
        parts.append(check_floating(f"{name}.features", features).detach())
        if tokens.grid is not None and tokens.grid.num_tokens != features.shape[1]:
            raise ShapeError(
                f"`{name}.features` holds {features.shape[1]} tokens but its grid has "
                f"{tokens.grid.num_tokens}; drop class and register tokens"
            )
        insides.append(_inside(name, tokens, axes))
    f, g = (at_least_float32(part) for part in parts)
    dtype = torch.promote_types(f.dtype, g.dtype)
    return FeatureSide(f.to(dtype), insides[0]), FeatureSide(g.to(dtype), insides[1])


def _inside(name: str, tokens: Tokens, axes: Axes) -> Tensor | None:
    if tokens.geometry is None or tokens.grid is None:
        return None
    check_geometry(f"{name}.geometry", tokens.geometry, tokens.grid)
    axes.bind(f"{name}.geometry.matrix", tokens.geometry.matrix, "b 3 3")
    centers = wide_centers(tokens.geometry, tokens.grid)
    return inside(centers, tokens.geometry.source_size).detach()

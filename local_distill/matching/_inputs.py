"""What every matcher that compares features asks of its tokens before it works."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from local_distill._check import Axes, check_floating
from local_distill._geometric_inputs import check_tokens
from local_distill.errors import ConfigError, ShapeError
from local_distill.geometry import check_geometry, inside, wide_centers
from local_distill.kernels.most_similar import Metric
from local_distill.structures import Tokens


class FeatureSide(NamedTuple):
    """One side's features without gradient."""

    features: Tensor  # (b, n, d)
    inside: Tensor | None  # (b, n) bool, centre inside the source; None where geometry is not known


def check_metric(metric: Metric) -> Metric:
    """Return a metric that features can be compared by."""
    if metric not in ("cosine", "l2"):
        raise ConfigError(f'`metric` must be "cosine" or "l2", got {metric!r}')
    return metric


def feature_side(name: str, tokens: Tokens) -> FeatureSide:
    """One view's features, checked and cut off from the graph, in the dtype they came in.

    Args:
        name: the argument's name, for the messages.
        tokens: with features; geometry and grid are looked at where both are there.
    """
    check_tokens(name, tokens)
    if tokens.features is None:
        raise ShapeError(
            f"`{name}` has no features, which a similarity matcher needs: "
            "Tokens(features, geometry, grid)"
        )
    axes = Axes()
    features = check_floating(
        f"{name}.features", axes.bind(f"{name}.features", tokens.features, "b n d")
    ).detach()
    return FeatureSide(features, _inside(name, tokens, axes))


def check_same_axes(student_name: str, f: Tensor, teacher_name: str, g: Tensor) -> None:
    """Refuse features of two views whose batches or feature axes differ."""
    axes = Axes()
    axes.bind(f"{student_name}.features", f, "b s d")
    axes.bind(f"{teacher_name}.features", g, "b t d")


def common_dtype(f: Tensor, g: Tensor) -> torch.dtype:
    """What the features of two views are compared in: the wider of the two, float32 at least."""
    return torch.promote_types(torch.promote_types(f.dtype, g.dtype), torch.float32)


def feature_inputs(student: Tokens, teacher: Tokens) -> tuple[FeatureSide, FeatureSide]:
    """Features of both sides, checked, in one dtype of at least float32, cut off from the graph."""
    one, two = feature_side("student", student), feature_side("teacher", teacher)
    check_same_axes("student", one.features, "teacher", two.features)
    dtype = common_dtype(one.features, two.features)
    return (
        FeatureSide(one.features.to(dtype), one.inside),
        FeatureSide(two.features.to(dtype), two.inside),
    )


def _inside(name: str, tokens: Tokens, axes: Axes) -> Tensor | None:
    if tokens.geometry is None or tokens.grid is None:
        return None
    check_geometry(f"{name}.geometry", tokens.geometry, tokens.grid)
    axes.bind(f"{name}.geometry.matrix", tokens.geometry.matrix, "b 3 3")
    centers = wide_centers(tokens.geometry, tokens.grid)
    return inside(centers, tokens.geometry.source_size).detach()

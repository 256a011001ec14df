"""What every similarity matcher asks of its tokens before it works."""

from __future__ import annotations

from torch import Tensor

from local_distill._check import Axes, check_floating
from local_distill.errors import ShapeError
from local_distill.structures import Tokens


def feature_inputs(student: Tokens, teacher: Tokens) -> tuple[Tensor, Tensor]:
    """Features of both sides, checked and cut off from the graph."""
    axes = Axes()
    parts: list[Tensor] = []
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
    return parts[0], parts[1]

"""The features of tokens as lists of numbers, and which of them count."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from local_distill.errors import ShapeError
from local_distill.structures import Tokens
from local_distill.testing.oracles.geometry import token_places

__all__ = ["dot", "unit_vector", "usable_features"]

Row = list[float]


def dot(one: Sequence[float], two: Sequence[float]) -> float:
    """The inner product of two rows of numbers.

    Example:
        >>> dot([1.0, 2.0], [3.0, 4.0])
        11.0
    """
    return sum(x * y for x, y in zip(one, two, strict=True))


def unit_vector(row: Sequence[float]) -> Row | None:
    """A row of numbers scaled to length 1; None where it has no direction.

    Example:
        >>> unit_vector([3.0, 4.0]), unit_vector([0.0, 0.0])
        ([0.6, 0.8], None)
    """
    length = math.hypot(*row)
    return [value / length for value in row] if 0 < length < math.inf else None


def usable_features(tokens: Tokens, image: int) -> list[Row | None]:
    """The features of one image's tokens.

    Args:
        tokens: with features (b, n, d).
        image: which of the batch.

    Returns:
        n rows of d numbers; None for a token with NaN or infinity among them, or, where the tokens
        have geometry, with its centre outside the source.

    Raises:
        ShapeError: no features.

    Example:
        >>> import torch
        >>> usable_features(Tokens(torch.tensor([[[1.0, 2.0], [torch.nan, 0.0]]])), 0)
        [[1.0, 2.0], None]
    """
    rows: list[Row] = features_of(tokens)[image].double().tolist()
    inside = [True] * len(rows)
    if tokens.geometry is not None:
        inside = [place.inside for place in token_places(tokens, image)]
    return [
        row if there and all(map(math.isfinite, row)) else None
        for row, there in zip(rows, inside, strict=True)
    ]


def features_of(tokens: Tokens) -> Tensor:
    """They, or an error that says that they are missing."""
    if tokens.features is None:
        raise ShapeError("`Tokens` need `features` here; give them")
    return tokens.features

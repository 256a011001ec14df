"""Matches by likeness of features, by looking at every pair of tokens."""

from __future__ import annotations

import math
from typing import Literal

from local_distill.errors import ConfigError
from local_distill.structures import Tokens
from local_distill.testing.oracles.features import dot, features_of, unit_vector, usable_features
from local_distill.testing.oracles.geometric_matching import distances_in_cells
from local_distill.testing.oracles.token_match import TokenMatch, weighted_match

__all__ = ["feature_costs", "gated_tokens", "most_similar_tokens", "soft_similarities"]

CostTable = list[list[float | None]]


def feature_costs(
    student: Tokens, teacher: Tokens, metric: Literal["cosine", "l2"] = "cosine"
) -> list[CostTable]:
    """How unlike the features of all tokens are.

    Args:
        student: with features (b, s, d).
        teacher: with features (b, t, d).
        metric: ``"cosine"``: 1 - f·g / (‖f‖‖g‖); ``"l2"``: ‖f - g‖.

    Returns:
        [image][student token][teacher token]; None where either is not finite, lies outside the
        source (where its tokens have geometry), or, under cosine, is zero.

    Example:
        >>> import torch
        >>> f = Tokens(torch.tensor([[[3.0, 0.0], [0.0, 0.0]]]))
        >>> g = Tokens(torch.tensor([[[0.0, 4.0], [5.0, 0.0]]]))
        >>> feature_costs(f, g)
        [[[1.0, 0.0], [None, None]]]
        >>> feature_costs(f, g, "l2")
        [[[5.0, 2.0], [4.0, 5.0]]]
    """
    if metric not in ("cosine", "l2"):
        raise ConfigError(f'`metric` must be "cosine" or "l2", got {metric!r}')
    result = []
    for image in range(features_of(student).shape[0]):
        ours, theirs = usable_features(student, image), usable_features(teacher, image)
        if metric == "cosine":
            ours, theirs = (
                [None if row is None else unit_vector(row) for row in rows]
                for rows in (ours, theirs)
            )
        table: CostTable = []
        for f in ours:
            row: list[float | None] = []
            for g in theirs:
                if f is None or g is None:
                    row.append(None)
                else:
                    row.append(1 - dot(f, g) if metric == "cosine" else math.dist(f, g))
            table.append(row)
        result.append(table)
    return result


def most_similar_tokens(
    student: Tokens, teacher: Tokens, metric: Literal["cosine", "l2"] = "cosine"
) -> list[list[TokenMatch]]:
    """The teacher token most like every student token, by all pairs.

    Args:
        student: see `feature_costs`.
        teacher: see `feature_costs`.
        metric: see `feature_costs`.

    Returns:
        [image][student token]: one weight of 1; of equals the lowest index.

    Example:
        >>> import torch
        >>> f = Tokens(torch.tensor([[[0.0, 2.0]]]))
        >>> g = Tokens(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]))
        >>> most_similar_tokens(f, g)
        [[TokenMatch(weights={1: 1.0}, cost=0.0)]]
    """
    return [[_least(row) for row in table] for table in feature_costs(student, teacher, metric)]


def soft_similarities(
    student: Tokens, teacher: Tokens, temperature: float
) -> list[list[TokenMatch]]:
    """All teacher tokens by their likeness to every student token.

    .. math:: w_i = softmax_j(cos(f_i, g_j) / τ), cost_i = Σ_j w_{ij} (1 - cos(f_i, g_j))

    Args:
        student: see `feature_costs`.
        teacher: see `feature_costs`.
        temperature: τ.

    Returns:
        [image][student token].

    Example:
        >>> import torch
        >>> f = Tokens(torch.tensor([[[0.0, 2.0]]]))
        >>> g = Tokens(torch.tensor([[[1.0, 1.0], [-1.0, 1.0], [0.0, 0.0]]]))
        >>> soft_similarities(f, g, temperature=0.1)[0][0].weights
        {0: 0.5, 1: 0.5}
    """
    result = []
    for table in feature_costs(student, teacher):
        found = []
        for row in table:
            costs = {j: cost for j, cost in enumerate(row) if cost is not None}
            least = min(costs.values(), default=0.0)
            parts = {j: math.exp((least - cost) / temperature) for j, cost in costs.items()}
            total = sum(parts.values())
            found.append(weighted_match({j: part / total for j, part in parts.items()}, costs))
        result.append(found)
    return result


def gated_tokens(
    student: Tokens,
    teacher: Tokens,
    radius: float,
    metric: Literal["cosine", "l2"] = "cosine",
) -> list[list[TokenMatch]]:
    """Of the teacher tokens within a radius the one most like every student token, by all pairs.

    Args:
        student: with features, geometry and grid.
        teacher: likewise, of the same images.
        radius: in larger cell diagonals; a token exactly as far is not taken.
        metric: see `feature_costs`.

    Returns:
        [image][student token]: one weight of 1; of equals the lowest index.

    Example:
        >>> import torch
        >>> from local_distill import TokenGrid, from_box
        >>> crop = from_box([[0.0, 0.0, 9.0, 4.0]], view_size=(4, 9), source_size=(20, 30))
        >>> grid = TokenGrid.tiling(1, 3, (4, 9))  # 3 px apart, diagonal 5
        >>> f = Tokens(torch.tensor([[[1.0], [1.0], [1.0]]]), crop, grid)
        >>> g = Tokens(torch.tensor([[[-1.0], [-1.0], [1.0]]]), crop, grid)
        >>> [list(found.weights) for found in gated_tokens(f, g, radius=0.7)[0]]
        [[0], [2], [2]]
    """
    result = []
    tables = zip(
        feature_costs(student, teacher, metric), distances_in_cells(student, teacher), strict=True
    )
    for costs, distances in tables:
        found = []
        for row, away in zip(costs, distances, strict=True):
            near = [far is not None and far < radius for far in away]
            found.append(_least([cost if ok else None for cost, ok in zip(row, near, strict=True)]))
        result.append(found)
    return result


def _least(row: list[float | None]) -> TokenMatch:
    """The candidate of least cost, the first of equals."""
    known = [(cost, j) for j, cost in enumerate(row) if cost is not None]
    if not known:
        return TokenMatch({}, math.inf)
    cost, j = min(known)
    return TokenMatch({j: 1.0}, cost)

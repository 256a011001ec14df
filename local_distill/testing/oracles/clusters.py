"""The steps of clustering two views' tokens together by optimal transport, image by image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from local_distill.errors import ConfigError
from local_distill.structures import Tokens
from local_distill.testing.oracles.features import (
    dot,
    features_of,
    unit_vector,
    usable_features,
)
from local_distill.testing.oracles.geometry import Point, token_places
from local_distill.testing.oracles.transport import scaled_plan

__all__ = ["JointTokens", "cluster_plans", "hard_shares", "joint_tokens", "weighted_mean"]

Row = list[float]


class JointTokens(NamedTuple):
    """The tokens of both views of one image: the student's, then the teacher's.

    Attributes:
        units: features scaled to length 1; None for a token that takes no part.
        points: centres in source pixels; (0, 0) for tokens without geometry.
    """

    units: list[Row | None]
    points: list[Point]


def joint_tokens(student: Tokens, teacher: Tokens) -> list[JointTokens]:
    """The tokens of both views together.

    Args:
        student: with features (b, s, d).
        teacher: with features (b, t, d).

    Returns:
        [image]. A token whose features are not finite or zero, or whose centre lies outside the
        source (where its view has geometry), takes no part.

    Example:
        >>> import torch
        >>> one, two = torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[0.0, 0.0]]])
        >>> joint_tokens(Tokens(one), Tokens(two))[0].units
        [[0.6, 0.8], None]
    """
    images = []
    for image in range(features_of(student).shape[0]):
        joint = JointTokens([], [])
        for tokens in (student, teacher):
            rows = usable_features(tokens, image)
            joint.units.extend(None if row is None else unit_vector(row) for row in rows)
            if tokens.geometry is None:
                joint.points.extend((0.0, 0.0) for _ in rows)
            else:
                joint.points.extend(place.center for place in token_places(tokens, image))
        images.append(joint)
    return images


def weighted_mean(weights: Sequence[float], rows: Sequence[Sequence[float] | None]) -> Row | None:
    """The mean of rows of numbers; None where there is no weight.

    Args:
        weights: one a row, not negative.
        rows: all as long; one that is None or of weight 0 is not looked at.

    Example:
        >>> weighted_mean([1.0, 3.0, 0.0], [[4.0, 0.0], [0.0, 8.0], None])
        [1.0, 6.0]
    """
    taken = [(w, row) for w, row in zip(weights, rows, strict=True) if w > 0 and row is not None]
    if not taken:
        return None
    total = sum(w for w, _ in taken)
    return [sum(w * row[c] for w, row in taken) / total for c in range(len(taken[0][1]))]


def cluster_plans(
    units: Sequence[Sequence[Row | None]],
    centroids: Sequence[Sequence[Row | None]],
    distances: Sequence[Sequence[Sequence[float]]],
    rows: Sequence[Sequence[float]],
    cols: Sequence[Sequence[float]],
    *,
    position_weight: float,
    epsilon: float,
    iterations: int,
    cost_scale: Literal["image", "batch"],
) -> tuple[list[list[Row]], list[float]]:
    """The transport plans from tokens to clusters.

    The cost is -z_n · c_k + λ · d_nk / max d, brought to [0, 1] by its least and its largest value;
    rows are scaled before columns. A token or cluster that is None takes no part.

    Args:
        units: [image][n] features of length 1.
        centroids: [image][k] of the same length.
        distances: [image][n][k], in any unit.
        rows: [image][n] masses of the tokens.
        cols: [image][k] masses of the clusters.
        position_weight: λ.
        epsilon: the entropy's weight.
        iterations: how often rows and columns are scaled.
        cost_scale: whether the least and the largest cost are the image's or the batch's.

    Returns:
        [image] of plans [n][k], and [image] of the plans' costs.

    Example:
        >>> east, north = [1.0, 0.0], [0.0, 1.0]
        >>> plans, costs = cluster_plans(
        ...     [[east, north]], [[east, north]], [[[0.0, 0.0]] * 2], [[0.5] * 2], [[0.5] * 2],
        ...     position_weight=0.0, epsilon=0.5, iterations=3, cost_scale="image")
        >>> [[round(mass, 4) for mass in row] for row in plans[0]]  # e² to 1
        [[0.4404, 0.0596], [0.0596, 0.4404]]
        >>> round(costs[0], 4)
        0.1192
    """
    if cost_scale not in ("image", "batch"):
        raise ConfigError(f'`cost_scale` must be "image" or "batch", got {cost_scale!r}')
    tables = [
        _costs(z, c, d, position_weight)
        for z, c, d in zip(units, centroids, distances, strict=True)
    ]
    everything = [cost for table in tables for cost in _known(table)]
    plans, totals = [], []
    for table, row, col in zip(tables, rows, cols, strict=True):
        seen = _known(table) if cost_scale == "image" else everything
        low, high = min(seen, default=0.0), max(seen, default=1.0)
        span = (high - low) or 1.0
        scaled = [[None if v is None else (v - low) / span for v in line] for line in table]
        plan = scaled_plan(scaled, row, col, epsilon=epsilon, iterations=iterations, last="cols")
        plans.append(plan)
        totals.append(
            sum(
                mass * cost
                for masses, line in zip(plan, scaled, strict=True)
                for mass, cost in zip(masses, line, strict=True)
                if cost is not None
            )
        )
    return plans, totals


def hard_shares(plan: list[Row], first: int, last: int, *, by_share: bool) -> list[Row]:
    """Each cluster's tokens of one view with equal or shared parts, each token in one cluster only.

    Args:
        plan: [n][k] masses.
        first: the view's first token in the plan.
        last: and the one after its last.
        by_share: True: a token goes to the cluster of whose mass in this view it has the largest
            share, and counts by that share; False: to the cluster that it gives most, as one.

    Returns:
        [tokens of the view][k]: parts that sum to 1 over each cluster that has tokens.

    Example:
        >>> hard_shares([[0.3, 0.1], [0.1, 0.1], [0.0, 0.4]], 0, 3, by_share=False)
        [[0.5, 0.0], [0.5, 0.0], [0.0, 1.0]]
    """
    part, k = plan[first:last], len(plan[0])
    shares = _columns_to_one(part, k)
    judged = shares if by_share else part
    hard = [[0.0] * k for _ in part]
    for i, row in enumerate(judged):
        if max(row) > 0:
            best = row.index(max(row))
            hard[i][best] = shares[i][best] if by_share else 1.0
    return _columns_to_one(hard, k)


def _costs(
    units: Sequence[Row | None],
    centroids: Sequence[Row | None],
    distances: Sequence[Sequence[float]],
    weight: float,
) -> list[list[float | None]]:
    """[n][k], None where either takes no part."""
    largest = max(
        (
            d
            for z, away in zip(units, distances, strict=True)
            for c, d in zip(centroids, away, strict=True)
            if z is not None and c is not None
        ),
        default=0.0,
    )
    unit = largest if largest > 0 else 1.0
    return [
        [
            None if z is None or c is None else -dot(z, c) + weight * d / unit
            for c, d in zip(centroids, away, strict=True)
        ]
        for z, away in zip(units, distances, strict=True)
    ]


def _known(table: list[list[float | None]]) -> list[float]:
    return [cost for row in table for cost in row if cost is not None]


def _columns_to_one(table: list[Row], k: int) -> list[Row]:
    """Each column over its sum, where there is one."""
    sums = [sum(row[j] for row in table) for j in range(k)]
    return [[row[j] / sums[j] if sums[j] > 0 else 0.0 for j in range(k)] for row in table]

"""Entropic optimal transport, by scaling rows and columns in turn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from local_distill.structures import Tokens
from local_distill.testing.oracles.geometric_matching import distances_in_cells
from local_distill.testing.oracles.similarity_matching import feature_costs
from local_distill.testing.oracles.token_match import TokenMatch, weighted_match

__all__ = ["scaled_plan", "transport_plan"]


def scaled_plan(
    costs: Sequence[Sequence[float | None]],
    rows: Sequence[float],
    cols: Sequence[float],
    *,
    epsilon: float,
    iterations: int,
    last: Literal["rows", "cols"],
) -> list[list[float]]:
    """Sinkhorn's plan: exp(-cost / ε), its rows and columns scaled to their masses in turn.

    It works on logarithms, so that no far pair is lost to underflow on the way.

    Args:
        costs: [n][k]; None where nothing may flow.
        rows: n masses; a row without mass takes no part.
        cols: k masses, likewise.
        epsilon: ε, the entropy's weight.
        iterations: how often both are scaled.
        last: which of the two is scaled second, and so holds exactly.

    Returns:
        [n][k] masses.

    Example:
        >>> plan = scaled_plan([[0.0, 1.0], [1.0, 0.0]], [0.5, 0.5], [0.5, 0.5],
        ...                    epsilon=0.5, iterations=3, last="rows")
        >>> [[round(mass, 4) for mass in row] for row in plan]  # e² to 1
        [[0.4404, 0.0596], [0.0596, 0.4404]]
    """
    logs = {
        (n, k): -cost / epsilon
        for n, row in enumerate(costs)
        for k, cost in enumerate(row)
        if cost is not None and rows[n] > 0 and cols[k] > 0
    }
    order = ((1, cols), (0, rows)) if last == "rows" else ((0, rows), (1, cols))
    for _ in range(iterations):
        for axis, masses in order:
            lines: dict[int, list[float]] = {}
            for key, value in logs.items():
                lines.setdefault(key[axis], []).append(value)
            shift = {line: math.log(masses[line]) - _log_sum(lines[line]) for line in lines}
            logs = {key: value + shift[key[axis]] for key, value in logs.items()}
    plan = [[0.0] * len(row) for row in costs]
    for (n, k), value in logs.items():
        plan[n][k] = math.exp(value)
    return plan


def transport_plan(
    student: Tokens,
    teacher: Tokens,
    *,
    epsilon: float,
    iterations: int,
    distance_weight: float = 0.0,
) -> list[list[TokenMatch]]:
    """All teacher tokens by how much of them flows to every student token.

    The costs are 1 - cos(f_i, g_j), and `distance_weight` times the distance in larger cell
    diagonals. All usable tokens of a side have the same mass; columns are scaled before rows.

    Args:
        student: with features; with geometry and grid as well for a `distance_weight`.
        teacher: likewise, of the same images.
        epsilon: ε, the entropy's weight.
        iterations: how often columns and rows are scaled.
        distance_weight: what one larger cell diagonal costs.

    Returns:
        [image][student token]: its row of the plan, times the number of usable student tokens, so
        that it sums to 1.

    Example:
        >>> import torch
        >>> f = Tokens(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]))
        >>> found = transport_plan(f, f, epsilon=0.5, iterations=3)[0][0]
        >>> {j: round(weight, 4) for j, weight in found.weights.items()}  # e² to 1
        {0: 0.8808, 1: 0.1192}
    """
    tables = feature_costs(student, teacher)
    if distance_weight > 0:
        pairs = zip(tables, distances_in_cells(student, teacher), strict=True)
        tables = [_added(table, away, distance_weight) for table, away in pairs]
    result = []
    for table in tables:
        there = [any(cost is not None for cost in row) for row in table]
        answering = [any(cost is not None for cost in col) for col in zip(*table, strict=True)]
        n, k = sum(there), sum(answering)
        plan = scaled_plan(
            table,
            [1 / n if ok else 0.0 for ok in there],
            [1 / k if ok else 0.0 for ok in answering],
            epsilon=epsilon,
            iterations=iterations,
            last="rows",
        )
        found = []
        for row, masses in zip(table, plan, strict=True):
            costs = {j: cost for j, cost in enumerate(row) if cost is not None}
            found.append(weighted_match({j: n * masses[j] for j in costs}, costs))
        result.append(found)
    return result


def _added(
    costs: list[list[float | None]], distances: list[list[float | None]], weight: float
) -> list[list[float | None]]:
    return [
        [
            None if cost is None or far is None else cost + weight * far
            for cost, far in zip(row, away, strict=True)
        ]
        for row, away in zip(costs, distances, strict=True)
    ]


def _log_sum(values: list[float]) -> float:
    """The logarithm of the sum of exponentials."""
    top = max(values)
    return top + math.log(sum(math.exp(value - top) for value in values))

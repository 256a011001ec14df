"""Means over seeds with 95 % intervals, and differences between variants at equal seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

__all__ = ["Interval", "holm", "mean_interval", "paired_difference"]


class Interval(NamedTuple):
    """A mean with its interval.

    Attributes:
        mean: of the values.
        low: lower end; NaN for fewer than two values.
        high: upper end.
        p: two-sided, of a mean of 0.
        count: of the values.
    """

    mean: float
    low: float
    high: float
    p: float
    count: int


def mean_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Student's t interval of a mean over seeds.

    Example:
        >>> mean_interval([1.0, 2.0, 3.0])[:3]
        (2.0, -0.484..., 4.484...)
    """
    x = np.asarray(values, float)
    n, mean = len(x), float(x.mean())
    if n < 2:
        return Interval(mean, math.nan, math.nan, math.nan, n)
    error = float(x.std(ddof=1)) / math.sqrt(n)
    if error == 0:
        return Interval(mean, mean, mean, 1.0 if mean == 0 else 0.0, n)
    half = float(stats.t.ppf((1 + level) / 2, n - 1)) * error
    p = 2 * float(stats.t.sf(abs(mean) / error, n - 1))
    return Interval(mean, mean - half, mean + half, p, n)


def paired_difference(
    values: Sequence[float], others: Sequence[float], level: float = 0.95
) -> Interval:
    """Interval of the mean of ``values - others``, one pair a seed.

    Two variants with one seed have the same scenes, order, views and weights to begin with, so
    that most of what varies between seeds cancels.

    Example:
        >>> paired_difference([1.0, 2.0, 4.0], [0.0, 1.0, 2.0]).mean
        1.333...
    """
    pairs = zip(values, others, strict=True)
    return mean_interval([a - b for a, b in pairs], level)


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's correction of p-values for as many comparisons as there are.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    adjusted = [1.0] * len(ps)
    largest = 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = largest
    return adjusted

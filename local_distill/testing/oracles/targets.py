"""Teacher distributions: centred ones and how the center moves, and balanced ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from local_distill.testing.oracles.losses import softmax

__all__ = ["centered_probs", "moved_center", "sinkhorn_knopp_probs"]


def centered_probs(
    logits: Sequence[float], center: Sequence[float], teacher_temp: float
) -> list[float]:
    """One row's teacher distribution: softmax((t - center) / τ_t).

    Example:
        >>> [round(value, 4) for value in centered_probs([1.0, 3.0], [0.0, 2.0], 0.1)]
        [0.5, 0.5]
    """
    return softmax([(t - c) / teacher_temp for t, c in zip(logits, center, strict=True)])


def moved_center(
    center: Sequence[float], teacher_logits: Sequence[Tensor], momentum: float
) -> list[float]:
    """The center after one update: m·center + (1 - m)·mean over all rows of all views.

    Args:
        center: c numbers.
        teacher_logits: per view (b, c) or (b, t, c); without rows the center stays.
        momentum: m.

    Example:
        >>> import torch
        >>> moved_center([1.0], [torch.tensor([[3.0], [5.0]])], momentum=0.5)
        [2.5]
    """
    rows = [
        row
        for logits in teacher_logits
        for row in logits.double().reshape(-1, len(center)).tolist()
    ]
    if not rows:
        return list(center)
    return [
        momentum * old + (1 - momentum) * sum(row[j] for row in rows) / len(rows)
        for j, old in enumerate(center)
    ]


def sinkhorn_knopp_probs(
    teacher_logits: Sequence[Tensor],
    teacher_temp: float,
    *,
    iterations: int = 3,
    valid: Sequence[Tensor | None] | None = None,
) -> list[list[list[float]]]:
    """Distributions that spread all rows of all views evenly over the prototypes.

    The table exp(t / τ_t) has its columns, then its rows, brought to equal sums, in turn. Works on
    logarithms, so that no number is lost to underflow on the way.

    Args:
        teacher_logits: per view (b, c) or (b, t, c).
        teacher_temp: τ_t.
        iterations: how often both are scaled.
        valid: per view (b,) or (b, t) bool, or None. Rows that are not valid, or not finite, take
            no part; they get the columns' factors all the same.

    Returns:
        [view][row][prototype]; images and tokens of a view in one row of rows.

    Example:
        >>> import torch
        >>> probs = sinkhorn_knopp_probs([torch.tensor([[3.0, 0.0], [1.0, 0.0]])], 1.0)
        >>> [[round(value, 4) for value in row] for row in probs[0]]
        [[0.7272, 0.2728], [0.2651, 0.7349]]
    """
    views, taken = [], []
    for view, logits in enumerate(teacher_logits):
        c = logits.shape[-1]
        rows = [
            [value / teacher_temp for value in row]
            for row in logits.double().reshape(-1, c).tolist()
        ]
        keep = None if valid is None else valid[view]
        flags = [True] * len(rows) if keep is None else keep.reshape(-1).tolist()
        views.append(rows)
        taken += [
            row
            for row, flag in zip(rows, flags, strict=True)
            if flag and all(map(math.isfinite, row))
        ]
    of_columns = [0.0] * (len(taken[0]) if taken else 0)
    of_rows = [0.0] * len(taken)
    for _ in range(iterations):
        for j in range(len(of_columns)):
            column = [row[j] + factor for row, factor in zip(taken, of_rows, strict=True)]
            of_columns[j] = -_log_sum(column)
        for i, row in enumerate(taken):
            of_rows[i] = -_log_sum([v + g for v, g in zip(row, of_columns, strict=True)])
    return [
        [softmax([v + g for v, g in zip(row, of_columns or [0.0] * len(row), strict=True)])
         for row in rows]
        for rows in views
    ]  # fmt: skip


def _log_sum(values: Sequence[float]) -> float:
    top = max(values)
    return top + math.log(sum(math.exp(value - top) for value in values))

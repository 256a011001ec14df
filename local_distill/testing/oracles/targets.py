"""Centred teacher distributions, and how the center moves."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from local_distill.testing.oracles.losses import softmax

__all__ = ["centered_probs", "moved_center"]


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

"""Plain functions of the step: temperatures, momenta, learning rates, weight decays."""

from __future__ import annotations

import math

from local_distill.errors import ConfigError

__all__ = ["cosine", "linear", "warmup_cosine"]


def linear(step: float, *, start: float, end: float, total: float) -> float:
    """From ``start`` to ``end`` in a straight line over ``total`` steps, then ``end``.

    Args:
        step: 0 is the first step.
        start: value at step 0.
        end: value from step ``total`` on.
        total: length in steps; 0: at once at ``end``.

    Raises:
        ConfigError: a negative or non-finite step or total.

    Example:
        >>> [round(linear(s, start=0.04, end=0.07, total=30), 3) for s in (0, 15, 30, 99)]
        [0.04, 0.055, 0.07, 0.07]
    """
    return start + (end - start) * _progress(step, total)


def cosine(step: float, *, start: float, end: float, total: float) -> float:
    """From ``start`` to ``end`` along half a cosine over ``total`` steps, then ``end``.

    .. math:: end + (start - end)·(1 + cos(π·step / total)) / 2

    Args:
        step: 0 is the first step.
        start: value at step 0.
        end: value from step ``total`` on.
        total: length in steps; 0: at once at ``end``.

    Raises:
        ConfigError: a negative or non-finite step or total.

    Example:
        >>> [round(cosine(s, start=0.996, end=1.0, total=100), 4) for s in (0, 50, 100)]
        [0.996, 0.998, 1.0]
    """
    return end + (start - end) * (1 + math.cos(math.pi * _progress(step, total))) / 2


def warmup_cosine(
    step: float, *, peak: float, end: float, warmup: float, total: float, start: float = 0.0
) -> float:
    """Linear from ``start`` to ``peak`` over ``warmup`` steps, then a cosine to ``end``.

    Args:
        step: 0 is the first step.
        peak: value at step ``warmup``.
        end: value from step ``total`` on.
        warmup: length of the warm-up in steps, at most ``total``.
        total: length of the whole in steps.
        start: value at step 0, where there is a warm-up.

    Raises:
        ConfigError: a warm-up longer than the whole, a negative or non-finite number of steps.

    Example:
        >>> at = lambda step: warmup_cosine(step, peak=1.0, end=0.0, warmup=10, total=110)
        >>> [round(at(step), 2) for step in (0, 5, 10, 60, 110)]
        [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if not 0 <= warmup <= total:
        raise ConfigError(f"`warmup` must lie in [0, total] = [0, {total}], got {warmup}")
    if step < warmup:
        return linear(step, start=start, end=peak, total=warmup)
    return cosine(step - warmup, start=peak, end=end, total=total - warmup)


def _progress(step: float, total: float) -> float:
    if not (math.isfinite(step) and step >= 0):
        raise ConfigError(f"`step` must be a finite number of at least 0, got {step!r}")
    if not (math.isfinite(total) and total >= 0):
        raise ConfigError(f"`total` must be a finite number of at least 0, got {total!r}")
    return min(1.0, step / total) if total > 0 else 1.0

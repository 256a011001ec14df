"""Checks of what a view's settings can be; each returns the value in its plain form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from local_distill._check import check_at_least
from local_distill.errors import ConfigError

__all__ = ["check_jitter", "check_normalize", "check_numbers", "check_range", "check_size"]


def check_numbers(name: str, values: Any, count: int, meaning: str) -> tuple[float, ...]:
    """Return ``count`` finite numbers as floats."""
    if (
        not isinstance(values, Sequence)
        or len(values) != count
        or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in values)
    ):
        raise ConfigError(f"`{name}` must be {count} finite numbers {meaning}, got {values!r}")
    return tuple(float(value) for value in values)


def check_size(name: str, size: int | Sequence[int]) -> tuple[int, int]:
    """Return (height, width), of a square for one side."""
    sides = (size, size) if isinstance(size, int) else size
    if not isinstance(sides, Sequence) or len(sides) != 2:
        raise ConfigError(f"`{name}` must be a side or (height, width) in pixels, got {size!r}")
    return check_at_least(name, sides[0], 1), check_at_least(name, sides[1], 1)


def check_range(
    name: str, bounds: Sequence[float], *, high: float = math.inf
) -> tuple[float, float]:
    """Return (least, largest) with 0 < least ≤ largest ≤ high."""
    least, largest = check_numbers(name, bounds, 2, "(least, largest)")
    if not 0 < least <= largest <= high:
        limit = "" if high == math.inf else f" ≤ {high:g}"
        raise ConfigError(f"`{name}` must be 0 < least ≤ largest{limit}, got {tuple(bounds)}")
    return least, largest


def check_jitter(strengths: Sequence[float]) -> tuple[float, ...]:
    """Return the strengths of brightness, contrast, saturation and hue."""
    meaning = "(brightness, contrast, saturation, hue)"
    values = check_numbers("color_jitter", strengths, 4, meaning)
    if min(values) < 0 or values[3] > 0.5:
        raise ConfigError(
            f"`color_jitter` {meaning} must not be negative, and hue at most 0.5, got {values}"
        )
    return values


def check_normalize(normalize: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """Return (mean, std) per channel."""
    if not isinstance(normalize, Sequence) or len(normalize) != 2:
        raise ConfigError(f"`normalize` must be (mean, std) or None, got {normalize!r}")
    mean = check_numbers("normalize", normalize[0], 3, "as mean")
    std = check_numbers("normalize", normalize[1], 3, "as std")
    if min(std) <= 0:
        raise ConfigError(f"`normalize`: std must be above 0, got {std}")
    return list(mean), list(std)

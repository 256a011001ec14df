"""What everything that takes finished `Matches`, or wraps a matcher, asks of them first."""

from __future__ import annotations

import torch
from torch import Tensor

from local_distill._check import Axes, check_floating, values_visible
from local_distill.errors import ConfigError, ShapeError
from local_distill.structures import Matcher, Matches

__all__ = ["check_matcher", "check_matches", "check_targets"]


def check_matches(name: str, matches: Matches, axes: Axes, letters: str = "b s k") -> Matches:
    """The matches, their axes bound, cut off from the graph.

    Args:
        name: the argument's name, for the message.
        matches: what to look at.
        axes: sizes known so far; these matches' are bound as well.
        letters: what image, token and candidate axes are called.
    """
    if not isinstance(matches, Matches):
        raise ShapeError(
            f"`{name}` must be Matches(teacher_index, weight, cost), got {type(matches).__name__}"
        )
    index = axes.bind(f"{name}.teacher_index", matches.teacher_index, letters)
    weight = axes.bind(f"{name}.weight", matches.weight, letters)
    cost = axes.bind(f"{name}.cost", matches.cost, letters.rpartition(" ")[0])
    if index.dtype != torch.int64:
        raise ShapeError(f"`{name}.teacher_index` must be int64, got {index.dtype}; use .long()")
    check_floating(f"{name}.weight", weight)
    check_floating(f"{name}.cost", cost)
    return Matches(index, weight.detach(), cost.detach())


def check_targets(name: str, index: Tensor, count: int, counted: str) -> None:
    """Refuse an index outside [0, count), where that can be seen without a device sync.

    Args:
        name: the argument's name, for the message.
        index: `Matches.teacher_index`.
        count: how many tokens it may point at.
        counted: what ``count`` was read from, for the message.
    """
    if not values_visible(index) or index.numel() == 0:
        return
    low, high = (int(end) for end in index.aminmax())
    if low < 0 or high >= count:
        raise ShapeError(
            f"`{name}.teacher_index` must lie in [0, {count}), the tokens of {counted}, got values "
            f"from {low} to {high}: are these the matches of another pair of views?"
        )


def check_matcher(matcher: Matcher) -> Matcher:
    """Return what can be called as a matcher."""
    if isinstance(matcher, type):
        raise ConfigError(
            "`matcher` must be a callable (student, teacher) -> Matches, such as "
            f"NearestMatcher(), got the class {matcher.__name__}; make one: {matcher.__name__}()"
        )
    if not callable(matcher):
        raise ConfigError(
            "`matcher` must be a callable (student, teacher) -> Matches, such as "
            f"NearestMatcher(), got {matcher!r}"
        )
    return matcher

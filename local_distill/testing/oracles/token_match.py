"""What every matcher's oracle says of one student token."""

from __future__ import annotations

import math
from typing import NamedTuple

__all__ = ["TokenMatch"]


class TokenMatch(NamedTuple):
    """The teacher tokens that answer one student token.

    Attributes:
        weights: weight by teacher index, only where it is above 0; empty where there is no match.
        cost: of the match, in the matcher's unit; +inf where there is none.

    Example:
        >>> TokenMatch({2: 0.5}, cost=0.1).row(4)
        [0.0, 0.0, 0.5, 0.0]
    """

    weights: dict[int, float]
    cost: float

    def row(self, t: int) -> list[float]:
        """The weights of all ``t`` teacher tokens."""
        return [self.weights.get(j, 0.0) for j in range(t)]


def weighted_match(weights: dict[int, float], costs: dict[int, float]) -> TokenMatch:
    """A soft match, whose cost is the weighted mean of its candidates' costs."""
    weights = {j: weight for j, weight in weights.items() if weight > 0}
    if not weights:
        return TokenMatch({}, math.inf)
    total = sum(weight * costs[j] for j, weight in weights.items())
    return TokenMatch(weights, total / sum(weights.values()))

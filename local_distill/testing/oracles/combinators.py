"""What the matchers that sift other matchers' matches let through."""

from __future__ import annotations

import math
from fractions import Fraction

from local_distill.errors import ConfigError
from local_distill.structures import Matches

__all__ = ["kept_tokens", "mutual_weights"]


def mutual_weights(matches: Matches, reverse: Matches) -> list[list[list[float]]]:
    """The weights of the matches that are returned: j answers i and i answers j.

    Args:
        matches: from student tokens to teacher tokens, k candidates each.
        reverse: from the same teacher tokens to the student tokens.

    Returns:
        [image][student token][candidate]: the weight, or 0 where no candidate of that teacher token
        with a weight above 0 is the student token.

    Example:
        >>> import torch
        >>> one = Matches(torch.tensor([[[0], [0]]]), torch.ones(1, 2, 1), torch.zeros(1, 2))
        >>> back = Matches(torch.tensor([[[1]]]), torch.ones(1, 1, 1), torch.zeros(1, 1))
        >>> mutual_weights(one, back)
        [[[0.0], [1.0]]]
    """
    result = []
    for image in range(matches.weight.shape[0]):
        answers = [
            {i for i, weight in zip(indices, weights, strict=True) if weight > 0}
            for indices, weights in zip(
                reverse.teacher_index[image].tolist(), reverse.weight[image].tolist(), strict=True
            )
        ]
        table = []
        for i in range(matches.weight.shape[1]):
            indices = matches.teacher_index[image, i].tolist()
            weights = matches.weight[image, i].tolist()
            table.append(
                [w if i in answers[j] else 0.0 for j, w in zip(indices, weights, strict=True)]
            )
        result.append(table)
    return result


def kept_tokens(
    matches: Matches, *, count: int | None = None, fraction: float | None = None
) -> list[list[int]]:
    """Each image's student tokens of least cost, by sorting.

    Args:
        matches: of any matcher.
        count: how many tokens stay.
        fraction: or this part of the image's matched tokens, rounded up.

    Returns:
        [image]: student tokens, best first; of equal costs the lower index first. A token without
        weight or of a cost that is not finite is no match.

    Raises:
        ConfigError: not exactly one of the two.

    Example:
        >>> import torch
        >>> matches = Matches.identity(torch.ones(1, 4))._replace(
        ...     cost=torch.tensor([[0.4, 0.1, 0.1, 0.9]]))
        >>> kept_tokens(matches, count=2), kept_tokens(matches, fraction=0.7)
        ([[1, 2]], [[1, 2, 0]])
    """
    if (count is None) == (fraction is None):
        raise ConfigError("give exactly one of `count` and `fraction`")
    result = []
    for costs, weights in zip(matches.cost.tolist(), matches.weight.tolist(), strict=True):
        matched = [
            (cost, i)
            for i, (cost, row) in enumerate(zip(costs, weights, strict=True))
            if math.isfinite(cost) and any(weight > 0 for weight in row)
        ]
        # of the number as it is written: 0.07 of 100 is 7
        part = math.ceil(Fraction(str(fraction)) * len(matched)) if count is None else count
        result.append([i for _, i in sorted(matched)[:part]])
    return result

"""Matches compared as what they mean: a table of weights, whatever the candidates' order."""

from __future__ import annotations

import torch
from torch import Tensor

from local_distill.structures import Matcher, Matches, Tokens
from local_distill.testing.properties import ensure


def weight_table(matches: Matches, num_teacher_tokens: int) -> Tensor:
    """(b, s, t) float64: the weight that each teacher token has for each student token."""
    weight = matches.weight.detach().double()
    # where nothing is kept the index means nothing; a property of its own looks at its range
    index = torch.where(weight != 0, matches.teacher_index, 0)
    table = weight.new_zeros(*weight.shape[:2], max(num_teacher_tokens, 1))
    return table.scatter_add(2, index, weight)[..., :num_teacher_tokens]


def run(matcher: Matcher, student: Tokens, teacher: Tokens) -> tuple[Tensor, Tensor]:
    """The weights (b, s, t) and costs (b, s) in float64."""
    matches = matcher(student, teacher)
    return weight_table(matches, teacher.num_tokens), matches.cost.detach().double()


def ensure_same(
    found: tuple[Tensor, Tensor],
    wanted: tuple[Tensor, Tensor],
    what: str,
    *,
    atol: float = 1e-3,
    rtol: float = 1e-3,
) -> None:
    """Refuse weights or costs that differ by more than rounding, naming the first place.

    Args:
        found: weights (b, s, t) and costs (b, s).
        wanted: likewise.
        what: the comparison, for the message.
        atol: for both.
        rtol: for the costs.
    """
    weights, costs = found
    ensure(
        weights.shape == wanted[0].shape,
        f"{what}: weights of shape {tuple(weights.shape)} instead of {tuple(wanted[0].shape)}",
    )
    differs = ~torch.isclose(weights, wanted[0], rtol=0, atol=atol, equal_nan=False)
    if bool(differs.any()):
        image, i, j = differs.nonzero()[0].tolist()
        ensure(
            False,
            f"{what}: image {image}, student token {i}, teacher token {j} has weight "
            f"{float(weights[image, i, j]):.6g} instead of {float(wanted[0][image, i, j]):.6g}",
        )
    differs = ~torch.isclose(costs, wanted[1], rtol=rtol, atol=atol, equal_nan=False)
    if bool(differs.any()):
        image, i = differs.nonzero()[0].tolist()
        ensure(
            False,
            f"{what}: image {image}, student token {i} has cost {float(costs[image, i]):.6g} "
            f"instead of {float(wanted[1][image, i]):.6g}",
        )


def ensure_exact(found: Matches, wanted: Matches, num_teacher_tokens: int, what: str) -> None:
    """Refuse any difference, to the bit."""
    ensure_same(
        (weight_table(found, num_teacher_tokens), found.cost.detach().double()),
        (weight_table(wanted, num_teacher_tokens), wanted.cost.detach().double()),
        what,
        atol=0.0,
        rtol=0.0,
    )

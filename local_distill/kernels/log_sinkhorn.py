"""Sinkhorn's algorithm in the log domain: a table scaled until its rows and columns have a mass."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from local_distill._check import check_at_least
from local_distill.errors import ConfigError, ShapeError

__all__ = ["log_sinkhorn", "log_uniform"]

# Scores are clamped to this part of the dtype's range: sums of a score and both potentials, each of
# which can be as large as twice the largest score, must not overflow.
_RANGE = 2.0**-6


def log_sinkhorn(
    scores: Tensor,
    log_row: Tensor,
    log_col: Tensor,
    *,
    iterations: int,
    last: Literal["row", "column"] = "column",
) -> Tensor:
    """Scale the rows and columns of exp(scores) in turns until they have the masses asked for.

    .. math:: P = diag(e^f) e^{scores} diag(e^g), P 1 = e^{row}, P^T 1 = e^{col}

    with :math:`f ← row - LSE_j(scores + g)` and :math:`g ← col - LSE_i(scores + f)`, from g = 0.
    For an optimal transport of cost C with entropy weight ε, scores = -C / ε.

    Convention: one iteration is one step of each side, the side named by ``last`` second: its
    masses are then exact, the other's nearly. Rows and columns of mass 0 (log mass -inf) are empty
    in the result, and what stands in their scores, NaN included, is never read. Computed in the
    dtype of ``scores``; any finite scores give finite or -inf results (beyond 2⁻⁶ of the dtype's
    largest number they count as that). Where the live rows and columns have different total masses
    the steps still end with the masses of ``last``. All rows or all columns empty: all is empty.

    Args:
        scores: (…, s, t), of at least float32.
        log_row: (…, s) logarithm of the rows' masses, -inf for none; broadcasts.
        log_col: (…, t) logarithm of the columns' masses.
        iterations: how many times both sides are scaled; at least 1.
        last: whose masses are exact in the end: ``"row"`` or ``"column"``.

    Returns:
        (…, s, t) log P, -inf in empty rows and columns.

    Raises:
        ConfigError: iterations below 1, an unknown side.
        ShapeError: shapes that do not belong together.

    Example:
        >>> scores = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
        >>> half = log_uniform(torch.tensor([True, True]), scores.dtype)
        >>> log_sinkhorn(scores, half, half, iterations=20).exp()
        tensor([[0.3655, 0.1345],
                [0.1345, 0.3655]])

    Source: Cuturi, "Sinkhorn Distances" (NeurIPS 2013), algorithm 1, with the logarithms of its
    scalings.
    """
    check_at_least("iterations", iterations, 1)
    if last not in ("row", "column"):
        raise ConfigError(f'`last` must be "row" or "column", got {last!r}')
    _check_masses(scores, log_row, log_col)
    log_row, log_col = log_row.to(scores.dtype)[..., None], log_col.to(scores.dtype)[..., None, :]
    live = (log_row > -torch.inf) & (log_col > -torch.inf)
    bound = torch.finfo(scores.dtype).max * _RANGE
    scores = torch.where(live, scores.clamp(-bound, bound), -torch.inf)
    sides = ((log_row, -1), (log_col, -2))
    (first_mass, first_dim), (last_mass, last_dim) = sides if last == "column" else sides[::-1]
    table = scores
    for _ in range(iterations - 1):
        table = scores + _scaling(table, first_mass, first_dim)
        table = scores + _scaling(table, last_mass, last_dim)
    table = scores + _scaling(table, first_mass, first_dim)
    # The last step by a softmax: it takes the table's own largest away before it rounds, so that
    # its masses are exact however large the scores are.
    plan = torch.log_softmax(table, last_dim) + last_mass
    return torch.where(live & (table > -torch.inf), plan, -torch.inf)


def log_uniform(valid: Tensor, dtype: torch.dtype) -> Tensor:
    """Log masses that spread a total of 1 evenly over what is valid, -inf elsewhere.

    Args:
        valid: (…, n) bool.
        dtype: of the result.

    Example:
        >>> log_uniform(torch.tensor([True, False, True, True]), torch.float32).exp()
        tensor([0.3333, 0.0000, 0.3333, 0.3333])
    """
    count = valid.sum(-1, keepdim=True).to(dtype)
    return torch.where(valid, -count.log(), -torch.inf)


def _scaling(table: Tensor, log_mass: Tensor, dim: int) -> Tensor:
    """What has to be added along ``dim`` so that it has the log mass; 0 where there is nothing.

    Here and in the last softmax alone a sum runs over an axis: whoever splits that axis over
    processes has to join these two logarithms of sums, and nothing else.
    """
    total = torch.logsumexp(table, dim, keepdim=True)
    # Nothing there (-inf) stays nothing, whatever is added: 0 keeps inf - inf out of it.
    return torch.where((total > -torch.inf) & (log_mass > -torch.inf), log_mass - total, 0.0)


def _check_masses(scores: Tensor, log_row: Tensor, log_col: Tensor) -> None:
    if scores.dim() < 2 or scores.dtype not in (torch.float32, torch.float64):
        raise ShapeError(
            "`scores` must have shape (…, s, t) and be float32 or float64, got "
            f"{tuple(scores.shape)} of {scores.dtype}; convert with .float()"
        )
    for name, mass, axis in (("log_row", log_row, -2), ("log_col", log_col, -1)):
        if mass.dim() == 0 or mass.shape[-1] != scores.shape[axis]:
            raise ShapeError(
                f"`{name}` must have shape (…, {scores.shape[axis]}) to fit `scores` of shape "
                f"{tuple(scores.shape)}, got {tuple(mass.shape)}"
            )

"""Statistics over the whole batch of all processes, with a gradient.

Every rank brings its rows, gets the same totals, and goes on to compute the same value from them.
So the value's gradient to a total is known on every rank already and needs no message back: it is
the gradient to each rank's own share. Data-parallel wrappers then average over the W ranks what
would have to be summed, hence a factor W:

    (1/W) Σ_r J_rᵀ (W · dL/dx_r) = Σ_r J_rᵀ dL/dx_r, the gradient of one process with all rows.

It holds only where nothing but the totals goes into the value: what differs from rank to rank has
to be summed first, or gathered by `distributed.all_gather_with_gradient`, whose gradient is sent
back. Ranks may hold different numbers of rows, or none.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from local_distill._precision import at_least_float32, no_autocast
from local_distill.distributed import all_reduce_sum, world_size
from local_distill.losses._pairs import Processes


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.ranks = world_size(group)
        return all_reduce_sum(values, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        return gradients[0] * ctx.ranks, None


def all_reduce_sum_with_gradient(values: Tensor, processes: Processes) -> Tensor:
    """The sum over the processes, equal to the bit on all of them, with this rank's gradient."""
    if processes.size == 1:
        return values
    total: Tensor = _Sum.apply(values, processes.group)
    return total


def centered_rows(
    values: Tensor, valid: Tensor | None, processes: Processes
) -> tuple[Tensor, Tensor]:
    """Rows less their mean over the whole batch, at each position by itself.

    Args:
        values: (b, n, d), n positions of each image.
        valid: (b, n) bool or None: rows that count; the others may be NaN.
        processes: over which the batch is spread.

    Returns:
        (b, n, d) in at least float32, 0 where not valid, and (n,) how many rows count.
    """
    rows = at_least_float32(values)
    if valid is None:
        count = rows.new_full((rows.shape[1],), float(rows.shape[0]))
    else:
        rows = torch.where(valid[..., None], rows, 0.0)
        count = valid.sum(0).to(rows.dtype)
    total = rows.sum(0)
    if processes.size > 1:
        whole = processes.sum(torch.cat((total, count[:, None]), 1))
        # The mean goes without a gradient: Σ (x − mean) = 0 makes that of every centered second
        # moment vanish, and a rank alone would see only its share of it.
        total, count = whole[:, :-1], whole[:, -1]
    rows = rows - total / count.clamp_min(1.0)[:, None]
    return rows if valid is None else torch.where(valid[..., None], rows, 0.0), count


def batch_variance(
    values: Tensor, valid: Tensor | None, processes: Processes
) -> tuple[Tensor, Tensor]:
    """(n, d) unbiased variance over the batch, and (n,) bool: positions of two rows or more."""
    rows, count = centered_rows(values, valid, processes)
    total = all_reduce_sum_with_gradient(rows.square().sum(0), processes)
    return total / (count - 1.0).clamp_min(1.0)[:, None], count >= 2


def batch_covariance(
    values: Tensor, valid: Tensor | None, processes: Processes
) -> tuple[Tensor, Tensor]:
    """(n, d, d) unbiased covariance over the batch, and (n,) bool as `batch_variance`."""
    rows, count = centered_rows(values, valid, processes)
    with no_autocast(rows):
        product = torch.einsum("bnc,bnd->ncd", rows, rows)
    total = all_reduce_sum_with_gradient(product, processes)
    return total / (count - 1.0).clamp_min(1.0)[:, None, None], count >= 2

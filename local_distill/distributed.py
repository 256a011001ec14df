"""The few collectives the parts need; without a process group each does nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = [
    "all_gather_rows",
    "all_gather_with_gradient",
    "all_reduce_sum",
    "local_part",
    "process_rank",
    "row_counts",
    "world_size",
]


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Number of processes in the group; 1 without a process group.

    Example:
        >>> world_size()
        1
    """
    return dist.get_world_size(group) if _initialized() else 1


def process_rank(group: dist.ProcessGroup | None = None) -> int:
    """Which of the group's processes this is; 0 without a process group.

    Example:
        >>> process_rank()
        0
    """
    return dist.get_rank(group) if _initialized() else 0


def all_reduce_sum(values: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum over all processes, as a new tensor without gradient; equal to the bit on every rank.

    Example:
        >>> import torch
        >>> all_reduce_sum(torch.tensor([1.0, 2.0]))
        tensor([1., 2.])
    """
    total = values.detach().clone()
    if world_size(group) > 1:
        dist.all_reduce(total, group=group)
    return total


def local_part(value: Tensor) -> Tensor:
    """This process's share of a sharded tensor, which is another name for its memory; or itself.

    Example:
        >>> value = torch.zeros(2)
        >>> local_part(value) is value  # not sharded
        True
    """
    # Asked by name: to import DTensor takes as long as all of this package.
    to_local: Callable[[], Tensor] | None = getattr(value, "to_local", None)
    return value if to_local is None else to_local()


def row_counts(values: Tensor, group: dist.ProcessGroup | None = None) -> list[int]:
    """How many rows each process holds, in the order of ranks.

    With more than one process the numbers are looked at, which waits for the device.

    Example:
        >>> row_counts(torch.zeros(3, 2))
        [3]
    """
    ranks = world_size(group)
    if ranks == 1:
        return [values.shape[0]]
    own = torch.tensor([values.shape[0]], device=values.device)
    counts = [torch.empty_like(own) for _ in range(ranks)]
    dist.all_gather(counts, own, group=group)
    return [int(count) for count in counts]


def all_gather_rows(
    values: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    counts: Sequence[int] | None = None,
) -> Tensor:
    """The rows of all processes, in the order of ranks, without gradient; equal on every rank.

    Ranks may hold different numbers of rows, or none; the axes behind the first must agree.

    Args:
        values: (n, …) of any dtype; n may differ from rank to rank.
        group: the processes; None: all of them.
        counts: what `row_counts` says, to spare asking once more.

    Returns:
        (Σ n, …) on the device of ``values``.

    Example:
        >>> all_gather_rows(torch.tensor([[1.0], [2.0]]))
        tensor([[1.],
                [2.]])
    """
    values = values.detach()
    ranks = world_size(group)
    if ranks == 1:
        return values.clone()
    lengths = row_counts(values, group) if counts is None else counts
    # Collectives want one size for all: the shorter are filled up, and cut again.
    padded = values.new_zeros(max(lengths), *values.shape[1:])
    padded[: values.shape[0]] = values
    parts = [torch.empty_like(padded) for _ in range(ranks)]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])


def all_gather_with_gradient(
    values: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    counts: Sequence[int] | None = None,
) -> Tensor:
    """The rows of all processes, in the order of ranks; each rank gets its rows' gradient back.

    .. math:: ∂L/∂values_r = Σ_{r'} ∂L_{r'}/∂gathered[rows of r]

    Convention: L_r is what rank r goes backward from, and the gradients are *summed* over the
    processes, as the L of each depends on the rows of all; nothing is divided or multiplied by
    their number W. Where gradients of parameters are then averaged, as DDP does, the mean of the
    L_r is what is learnt from. So a rank's L_r is either its share of the whole batch's loss times
    W, or the whole batch's loss itself, worked out alike on every rank. Every process has to run
    the backward pass through the result, for that is a collective too; an empty share takes part.

    Args:
        values: (n, …); n may differ from rank to rank. On all ranks it requires a gradient, or on
            none.
        group: the processes; None: all of them.
        counts: what `row_counts` says, to spare asking once more.

    Returns:
        (Σ n, …) on the device of ``values``; ``values`` itself where there is one process.

    Example:
        >>> values = torch.tensor([[1.0], [2.0]], requires_grad=True)
        >>> all_gather_with_gradient(values).square().sum().backward()
        >>> values.grad
        tensor([[2.],
                [4.]])
    """
    if world_size(group) == 1:
        return values
    lengths = row_counts(values, group) if counts is None else list(counts)
    gathered: Tensor = _GatherRows.apply(values, group, lengths)
    return gathered


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, group: dist.ProcessGroup | None, counts: list[int]
    ) -> Tensor:
        ctx.group, ctx.counts = group, counts
        return all_gather_rows(values, group, counts=counts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        total = all_reduce_sum(gradient.contiguous(), ctx.group)
        rank = process_rank(ctx.group)
        start = sum(ctx.counts[:rank])
        return total[start : start + ctx.counts[rank]], None, None

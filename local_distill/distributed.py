"""The few collectives the parts need; without a process group each does nothing."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["all_gather_rows", "all_reduce_sum", "world_size"]


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Number of processes in the group; 1 without a process group.

    Example:
        >>> world_size()
        1
    """
    return dist.get_world_size(group) if _initialized() else 1


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


def all_gather_rows(values: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The rows of all processes, in the order of ranks, without gradient; equal on every rank.

    Ranks may hold different numbers of rows, or none; the axes behind the first must agree. With
    more than one process the numbers are looked at, which waits for the device.

    Args:
        values: (n, …) of any dtype; n may differ from rank to rank.
        group: the processes; None: all of them.

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
    own = torch.tensor([values.shape[0]], device=values.device)
    counts = [torch.empty_like(own) for _ in range(ranks)]
    dist.all_gather(counts, own, group=group)
    lengths = [int(count) for count in counts]
    # Collectives want one size for all: the shorter are filled up, and cut again.
    padded = values.new_zeros(max(lengths), *values.shape[1:])
    padded[: values.shape[0]] = values
    parts = [torch.empty_like(padded) for _ in range(ranks)]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

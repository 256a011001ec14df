"""The few collectives the parts need; without a process group each does nothing."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

__all__ = ["all_reduce_sum", "world_size"]


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

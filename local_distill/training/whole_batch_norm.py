"""BatchNorm over the images of all processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from local_distill.distributed import (
    all_gather_rows,
    all_gather_with_gradient,
    process_rank,
    row_counts,
    world_size,
)

__all__ = ["WholeBatchNorm", "whole_batch_norms"]


def whole_batch_norms(network: nn.Module, device: torch.device) -> nn.Module:
    """Let every BatchNorm take its statistics over all processes; parameters keep their names.

    On GPUs these are ``nn.SyncBatchNorm``; that one refuses a CPU, where `WholeBatchNorm` stands
    in. With a single process nothing changes.

    Args:
        network: changed in place.
        device: the one that it is to run on.

    Returns:
        The network.

    Example:
        >>> network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        >>> type(whole_batch_norms(network, torch.device("cpu"))[1]).__name__  # one process
        'BatchNorm1d'
    """
    if world_size() == 1:
        return network
    if device.type != "cpu":
        convert: Callable[[nn.Module], nn.Module] = nn.SyncBatchNorm.convert_sync_batchnorm
        return convert(network)
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, _BatchNorm) and not isinstance(child, WholeBatchNorm):
                setattr(module, name, WholeBatchNorm(child))
    return network


class WholeBatchNorm(_BatchNorm):
    """What ``nn.SyncBatchNorm`` does, for a CPU: it gathers all rows, which costs more to send.

    Args:
        norm: the one whose place it takes; its parameters and buffers are taken over.
    """

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__(
            norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats
        )
        for kind in ("_parameters", "_buffers"):
            getattr(self, kind).update(getattr(norm, kind))
        self.training = norm.training

    def _check_input_dim(self, input: Any) -> None:
        """Any number of axes, as SyncBatchNorm."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise the rows of all processes, and keep one's own."""
        if not self.training:
            return super().forward(input)
        counts = row_counts(input)
        gather = all_gather_with_gradient if input.requires_grad else all_gather_rows
        first = sum(counts[: process_rank()])
        return super().forward(gather(input, counts=counts))[first : first + len(input)]

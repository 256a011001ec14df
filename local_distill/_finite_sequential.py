"""Layers in a row whose BatchNorms never take in a NaN."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["FiniteSequential"]


class FiniteSequential(nn.Sequential):
    """`nn.Sequential`, but running statistics that are not finite are not kept.

    Convention: a forward pass in training updates all of its BatchNorms or none. Where a running
    mean or variance of any would not be finite, all keep what they had, ``num_batches_tracked``
    too, without a host sync, and ``skipped`` counts the pass. What comes out is as it was, NaN
    included. The guard is here and not in the BatchNorm, so
    ``nn.SyncBatchNorm.convert_sync_batchnorm`` leaves it in place; statistics are then those of all
    processes, so all skip the same passes. Names in the state are those of `nn.Sequential`, and
    ``skipped``, which may be missing.

    Example:
        >>> layers = FiniteSequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        >>> _ = layers(torch.full((4, 2), torch.nan))
        >>> layers[1].running_mean, layers[1].num_batches_tracked, layers.skipped
        (tensor([0., 0., 0.]), tensor(0), tensor(1))
    """

    skipped: Tensor

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.register_buffer("skipped", torch.zeros((), dtype=torch.int64))

    def forward(self, input: Tensor) -> Tensor:
        """What the layers make of `input`, one after the other."""
        updates: list[tuple[nn.Module, dict[str, Tensor]]] = []
        for layer in self:
            if isinstance(layer, _BatchNorm) and layer.training and layer.track_running_stats:
                # Statistics in place of its own ones: autograd saves those that it is given, and
                # would take a later write into them for an error.
                trial = {name: buffer.clone() for name, buffer in layer.named_buffers()}
                input = functional_call(layer, trial, (input,))
                updates.append((layer, trial))
            else:
                input = layer(input)
        self._keep(updates)
        return input

    @torch.no_grad()
    def _keep(self, updates: list[tuple[nn.Module, dict[str, Tensor]]]) -> None:
        if not updates:
            return
        finite = torch.ones((), dtype=torch.bool, device=self.skipped.device)
        for _, trial in updates:
            for value in trial.values():
                finite = finite & value.isfinite().all().to(finite.device)
        for layer, trial in updates:
            for name, buffer in layer.named_buffers():
                buffer.copy_(torch.where(finite.to(buffer.device), trial[name], buffer))
        self.skipped.add_((~finite).to(torch.int64))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        # Weights of a plain `nn.Sequential` load as well.
        state_dict.setdefault(prefix + "skipped", torch.zeros_like(self.skipped))
        super()._load_from_state_dict(state_dict, prefix, *rest)

"""FSDP2 under Fabric: each process holds a share of the network."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from local_distill.distributed import all_reduce_sum, local_part, world_size
from local_distill.heads import ProjectionHead

__all__ = [
    "ShardedStrategy",
    "can_shard",
    "device_mesh",
    "shard",
    "sharded_blocks",
    "whole_parameters",
]


class ShardedStrategy(DDPStrategy):
    """Fabric's processes as for DDP, but a network that is set up is sharded by FSDP2.

    Fabric's own ``ModelParallelStrategy`` refuses float64, and leaves to the caller what is not
    sharded: here the gradients of whole parameters are averaged after each backward pass.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._backward_sync_control: Any = self
        self._syncs = True
        self._networks: list[nn.Module] = []
        self.mesh: DeviceMesh | None = None

    def setup_environment(self) -> None:
        """Start the processes' group, and make one mesh of all of them."""
        super().setup_environment()
        self.mesh = init_device_mesh(self.root_device.type, (world_size(),))

    def setup_module(self, module: nn.Module) -> Any:
        """Shard a network in place."""
        assert self.mesh is not None
        # Views of one size go through together and are split: no loss writes into what it is given.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        self._networks.append(shard(module, self.mesh))
        return module

    @contextmanager
    def no_backward_sync(self, module: nn.Module, enabled: bool) -> Iterator[None]:
        """Within it gradients are only summed up, on each process by itself."""
        self._set_sync(not enabled)
        try:
            yield
        finally:
            self._set_sync(True)

    def backward(self, tensor: Tensor, module: nn.Module | None, *args: Any, **more: Any) -> None:
        """Go backward; gradients are then averages over the processes."""
        super().backward(tensor, module, *args, **more)
        if self._syncs:
            for network in self._networks:
                for parameter in network.parameters():
                    if parameter.grad is not None and local_part(parameter) is parameter:
                        parameter.grad.copy_(all_reduce_sum(parameter.grad) / world_size())

    def clip_gradients_norm(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
    ) -> Tensor:
        """Scale the gradient to a norm of at most ``max_norm``; torch's takes one kind alone."""
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        sharded = [g for g in gradients if local_part(g) is not g]
        total = all_reduce_sum(_squares([local_part(g) for g in sharded], self.root_device))
        total = total + _squares([g for g in gradients if local_part(g) is g], self.root_device)
        norm = total.sqrt()
        if max_norm < float("inf"):
            for gradient in gradients:
                # as torch's, and written so that NaN stays NaN
                local_part(gradient).mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def _set_sync(self, enabled: bool) -> None:
        self._syncs = enabled
        for network in self._networks:
            network.set_requires_gradient_sync(enabled)  # type: ignore[operator] # FSDPModule's


def shard(network: nn.Module, mesh: DeviceMesh, *, trained: bool = True) -> nn.Module:
    """Shard a network by FSDP2: each block of the backbone by itself, then what is left.

    Projection heads stay whole on every process, as losses use their prototypes after the
    network's pass is over.

    Args:
        network: has a ``backbone`` around a timm model.
        mesh: one-dimensional.
        trained: False for a teacher, whose shares have to be back in place without a backward pass.
    """
    from torch.distributed.fsdp import fully_shard

    for block in sharded_blocks(network):
        fully_shard(block, mesh=mesh)
    again = None if trained else True
    fully_shard(
        network, mesh=mesh, ignored_params=whole_parameters(network), reshard_after_forward=again
    )
    return network


def can_shard() -> bool:
    """Whether this torch's FSDP2 can leave parameters out, as it does from 2.7 on."""
    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError:
        return False
    return "ignored_params" in inspect.signature(fully_shard).parameters


def sharded_blocks(network: nn.Module) -> list[nn.Module]:
    """The backbone's blocks, which are gathered one at a time."""
    backbone: Any = dict(network.named_children()).get("backbone")
    model = getattr(backbone, "model", None)
    return [block for name in ("blocks", "layers", "stages") for block in getattr(model, name, ())]


def whole_parameters(network: nn.Module) -> set[nn.Parameter]:
    """The parameters of projection heads."""
    heads = [module for module in network.modules() if isinstance(module, ProjectionHead)]
    return {parameter for head in heads for parameter in head.parameters()}


def device_mesh(fabric: Fabric) -> DeviceMesh | None:
    """The processes that parameters are sharded over, or None where they are not."""
    strategy = fabric.strategy
    return strategy.mesh if isinstance(strategy, ShardedStrategy) else None


def _squares(tensors: list[Tensor], device: torch.device) -> Tensor:
    kind = tensors[0].dtype if tensors else torch.float32
    total = torch.zeros((), dtype=kind, device=device)
    for tensor in tensors:
        total = total + tensor.to(kind).square().sum()
    return total

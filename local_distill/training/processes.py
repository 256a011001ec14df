"""Devices, processes and precision: what Fabric is asked for."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any, Literal

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy

from local_distill._check import check_at_least
from local_distill.errors import ConfigError
from local_distill.training.sharding import ShardedStrategy, can_shard

__all__ = ["Precision", "Strategy", "agree", "launch", "make_fabric"]

Strategy = Literal["auto", "ddp", "fsdp"]
Precision = Literal["32-true", "bf16-mixed", "16-mixed", "64-true"]


def make_fabric(
    *,
    accelerator: str = "auto",
    devices: int = 1,
    num_nodes: int = 1,
    strategy: Strategy = "auto",
    precision: Precision = "32-true",
    timeout: float = 1800.0,
) -> Fabric:
    """Fabric for a run.

    Started by ``torchrun``, its number of processes holds, and by ``fabric run`` all that its flags
    say; otherwise Fabric starts ``devices`` processes itself.

    Args:
        accelerator: cpu, gpu, auto, ... as Fabric has them.
        devices: processes on each node, one device each.
        num_nodes: machines.
        strategy: "ddp": every process has the whole network; "fsdp": parameters, gradients and the
            optimiser's state are sharded (FSDP2); "auto": "ddp" on several processes.
        precision: of the networks; losses and matching are computed in at least float32.
        timeout: seconds after which a collective that other processes do not join fails.

    Raises:
        ConfigError: float16 on a CPU, or of sharded parameters; a torch that cannot shard.
    """
    if _started_by_fabric_run():
        return Fabric()  # it reads the flags by itself, and refuses others beside them
    check_at_least("devices", devices, 1)
    check_at_least("num_nodes", num_nodes, 1)
    if precision == "16-mixed" and not _has_gpu(accelerator):
        raise ConfigError("`precision` 16-mixed needs a GPU; on a CPU take bf16-mixed or 32-true")
    if precision == "16-mixed" and strategy == "fsdp":
        raise ConfigError(
            "`precision` 16-mixed: its loss scaler does not know of sharded parameters; with "
            "`strategy` fsdp take bf16-mixed or 32-true"
        )
    if strategy == "fsdp" and not can_shard():
        raise ConfigError(
            f"`strategy` fsdp needs torch 2.7, this is {torch.__version__}: update it, or take ddp"
        )
    launched = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1
    wait = timedelta(seconds=timeout)
    chosen: Any = strategy
    if strategy == "fsdp":
        chosen = ShardedStrategy(timeout=wait)
    elif strategy == "ddp" or devices * num_nodes > 1 or launched:
        chosen = DDPStrategy(timeout=wait)
    return Fabric(
        accelerator=accelerator,
        devices=devices,
        num_nodes=num_nodes,
        strategy=chosen,
        precision=precision,
    )


def launch(fabric: Fabric) -> None:
    """Start the processes, or join those that are there; again, it does nothing."""
    if not _started_by_fabric_run():  # whose Fabric is launched, and refuses to be asked
        fabric.launch()


def agree(fabric: Fabric, asked: bool) -> bool:
    """Whether any process was asked to stop: all have to stop after the same step."""
    if fabric.world_size == 1:
        return asked
    flag = torch.tensor(float(asked), device=fabric.device)
    return bool(fabric.all_reduce(flag, reduce_op="sum"))


def _has_gpu(accelerator: str) -> bool:
    return accelerator != "cpu" and torch.cuda.is_available()


def _started_by_fabric_run() -> bool:
    return os.environ.get("LT_CLI_USED") == "1"

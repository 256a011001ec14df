"""All that a run has to keep between two steps, as plain values and tensors, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from local_distill.distributed import all_gather_rows, process_rank, world_size
from local_distill.errors import ConfigError
from local_distill.teacher import EmaTeacher

__all__ = ["gather_state", "restore_state"]


def gather_state(
    network: nn.Module,
    teacher: EmaTeacher | None,
    criterion: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: Any = None,
) -> dict[str, Any]:
    """The whole state; every process has to ask, the first one gets it.

    It does not depend on the number of processes or on how parameters are kept: sharded ones are
    put together on the CPU, and the optimiser's state is by the parameters' names.

    Args:
        network: what the optimiser trains, without wrappers.
        teacher: its slow copy, or None.
        criterion: the loss.
        optimizer: of the network's parameters.
        scaler: of the loss in float16, or None.

    Returns:
        Values for a checkpoint; ``rng`` has the random state of every process.
    """
    return {
        "network": _whole(network.state_dict()),
        "teacher": None if teacher is None else _whole(teacher.state_dict()),
        "criterion": criterion.state_dict(),
        "optimizer": _optimizer_state(network, optimizer),
        "scaler": None if scaler is None else scaler.state_dict(),
        "rng": _all_rng_states(),
    }


def restore_state(
    saved: dict[str, Any],
    network: nn.Module,
    teacher: EmaTeacher | None,
    criterion: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: Any = None,
) -> None:
    """Put what `gather_state` gave back, on every process.

    With another number of processes than before, weights and state are what they were; random
    numbers of the network (dropout) then start anew on the processes that were not there.
    """
    _load(network, saved["network"])
    if teacher is not None:
        _load(teacher, saved["teacher"])
    criterion.load_state_dict(saved["criterion"])
    _load_optimizer(network, optimizer, saved["optimizer"])
    if scaler is not None and saved["scaler"] is not None:
        scaler.load_state_dict(saved["scaler"])
    states, rank = saved["rng"], process_rank()
    if rank < len(states["cpu"]):
        # Cloned: torch crashes at one that starts within another tensor's memory.
        torch.set_rng_state(states["cpu"][rank].clone())
        if torch.cuda.is_available() and rank < len(states["cuda"]):
            torch.cuda.set_rng_state(states["cuda"][rank].clone())


def _whole(state: Mapping[str, Any]) -> dict[str, Any]:
    """Values without shards: a collective where there are any, of which the first process keeps."""
    whole: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, DTensor):
            gathered = value.full_tensor()
            if process_rank() == 0:
                whole[name] = gathered.cpu()
        else:
            whole[name] = value
    return whole


def _like(value: Any, own: Any) -> Any:
    """Sharded as ``own`` is, where it is a tensor of its shape."""
    if isinstance(own, DTensor) and isinstance(value, Tensor) and value.shape == own.shape:
        return distribute_tensor(value.to(own.device), own.device_mesh, own.placements)
    return value


def _load(module: nn.Module, state: Mapping[str, Any]) -> None:
    own = module.state_dict()
    module.load_state_dict({name: _like(value, own.get(name)) for name, value in state.items()})


def _optimizer_state(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    groups = optimizer.param_groups
    held = [(names[id(p)], optimizer.state.get(p, {})) for group in groups for p in group["params"]]
    return {
        "state": {name: _whole(values) for name, values in held},
        "groups": [group | {"params": [names[id(p)] for p in group["params"]]} for group in groups],
    }


def _load_optimizer(
    network: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Any]
) -> None:
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    # A group may have been parted since: sharded parameters are kept apart from whole ones.
    settings = {name: group for group in saved["groups"] for name in group["params"]}
    now = optimizer.state_dict()
    groups, state = [], {}
    for group, numbered in zip(optimizer.param_groups, now["param_groups"], strict=True):
        for number, parameter in zip(numbered["params"], group["params"], strict=True):
            name = names[id(parameter)]
            if name not in settings:
                raise ConfigError(
                    f"`resume`: the checkpoint's optimiser does not know parameter `{name}`; go on "
                    "with the network that the run was started with"
                )
            held = saved["state"][name].items()
            values = {key: _like(value, parameter) for key, value in held}
            if values:
                state[number] = values
        first = settings[names[id(group["params"][0])]]
        groups.append(first | {"params": numbered["params"]})
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _all_rng_states() -> dict[str, list[Tensor]]:
    states = {"cpu": [torch.get_rng_state()], "cuda": []}
    if torch.cuda.is_available():
        states["cuda"] = [torch.cuda.get_rng_state()]
    if world_size() == 1:
        return states
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    return {
        kind: list(all_gather_rows(own[0].to(device)[None]).cpu().unbind()) if own else []
        for kind, own in states.items()
    }

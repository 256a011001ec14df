"""Runs a training script that asks for GPUs on the CPU, and writes down the terms of its loss.

    torchrun -m benchmarks.integrations.cuda_on_cpu RECORD LOSS,LOSS SCRIPT ARGUMENTS...

Nothing in here is part of an integration: with GPUs none of it is wanted. It makes ``.cuda()`` do
nothing, takes gloo for nccl, and keeps the script off the network. RECORD/rank0.json then has what
the modules of the named classes gave, step by step, and whether the processes ended with the same
parameters.
"""

from __future__ import annotations

import hashlib
import json
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # before anything of torch is replaced: it lists torch's functions
import torch.distributed as dist
from torch import nn

__all__ = ["finish", "record_losses", "same_on_all_ranks", "take_the_cpu"]

_wrapped: list[nn.Module] = []


def take_the_cpu() -> None:
    """What asks for CUDA, nccl or the network gets the CPU, gloo and nothing."""
    torch.Tensor.cuda = lambda value, *args, **kwargs: value
    nn.Module.cuda = lambda module, *args, **kwargs: module
    nn.Module.to = _stays(nn.Module.to)
    torch.cuda.set_device = lambda *args, **kwargs: None
    torch.cuda.synchronize = lambda *args, **kwargs: None
    torch.cuda.current_device = lambda: 0
    torch.tensor = _device_replaced(torch.tensor)
    torch.load = _whole_pickles(torch.load)
    torch.hub.list = lambda *args, **kwargs: []
    dist.init_process_group = _over_gloo(dist.init_process_group)
    nn.parallel.DistributedDataParallel = _OnCpu


def record_losses(names: list[str]) -> dict[str, list[float]]:
    """The outputs of every module whose class is named, as they come."""
    seen: dict[str, list[float]] = {name: [] for name in names}

    def see(module: nn.Module, args: Any, output: Any) -> None:
        name = type(module).__name__
        if name in seen and module.training and isinstance(output, torch.Tensor):
            seen[name].append(float(output.detach()))

    torch.nn.modules.module.register_module_forward_hook(see)
    return seen


def same_on_all_ranks(models: list[nn.Module]) -> bool | None:
    """Whether all processes have the same parameters, to the bit; None without a model."""
    if not models:
        return None
    digest = hashlib.sha256()
    for model in models:
        for _, parameter in sorted(model.named_parameters()):
            digest.update(parameter.detach().float().numpy().tobytes())
    digests: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, digest.hexdigest())
    return len(set(digests)) == 1


def finish(record: Path, losses: dict[str, list[float]], models: list[nn.Module]) -> None:
    """Write down this process's record, and leave the group of processes."""
    found = {"losses": losses, "ranks_agree": same_on_all_ranks(models)}
    rank = os.environ.get("RANK", "0")
    (record / f"rank{rank}.json").write_text(json.dumps(found))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


class _OnCpu(nn.parallel.DistributedDataParallel):
    def __init__(self, module: nn.Module, device_ids: Any = None, **kwargs: Any) -> None:
        super().__init__(module, **kwargs)
        _wrapped.append(self)


def _stays(move: Callable[..., Any]) -> Callable[..., Any]:
    def moved(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        kept = [arg for arg in args if not str(arg).startswith("cuda")]
        return move(module, *kept, **kwargs) if kept or kwargs else module

    return moved


def _device_replaced(make: Callable[..., Any]) -> Callable[..., Any]:
    def made(*args: Any, device: Any = None, **kwargs: Any) -> Any:
        return make(*args, device="cpu" if device == "cuda" else device, **kwargs)

    return made


def _whole_pickles(load: Callable[..., Any]) -> Callable[..., Any]:
    # Their checkpoints hold an argparse.Namespace, which torch >= 2.6 refuses unless told.
    return lambda *args, **kwargs: load(*args, **{"weights_only": False, **kwargs})


def _over_gloo(init: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: init(*args, **{**kwargs, "backend": "gloo"})


def main() -> None:
    """Run the script as if it had been called itself."""
    record, names, script, *arguments = sys.argv[1:]
    take_the_cpu()
    seen = record_losses(names.split(","))
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
    finish(Path(record), seen, _wrapped)


if __name__ == "__main__":
    main()

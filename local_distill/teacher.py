"""The slowly moving copy of the student."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from local_distill._check import check_fraction
from local_distill.distributed import all_reduce_sum, local_part
from local_distill.errors import ShapeError

__all__ = ["EmaTeacher"]


class EmaTeacher(nn.Module):
    """A copy of the student whose weights follow it as an exponential moving average.

    .. math:: θ_t ← m·θ_t + (1 - m)·θ_s

    Convention: the teacher's parameters never require a gradient, and calling it runs under
    ``no_grad``. Buffers (BatchNorm statistics) are copied from the student at each update. An
    update is taken whole or not at all: where any of the student's parameters or buffers is not
    finite, nothing moves, without a host sync, and ``skipped`` counts it. Sharded parameters
    (FSDP2) are moved share by share; copy the student before it is sharded, and shard both alike.

    Args:
        student: the module to copy; not changed, and not held.

    Example:
        >>> student = nn.Linear(1, 1, bias=False)
        >>> teacher = EmaTeacher(student)
        >>> with torch.no_grad():
        ...     _ = student.weight.fill_(1.0), teacher.module.weight.fill_(0.0)
        >>> teacher.update(student, momentum=0.75)
        >>> teacher(torch.ones(2, 1))
        tensor([[0.2500],
                [0.2500]])

    Source: "Mean teachers are better role models" (NeurIPS 2017); DINO (ICCV 2021).
    """

    skipped: Tensor

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(student)
        self.module.requires_grad_(False)
        self.register_buffer("skipped", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the copied module returns, without a graph."""
        return self.module(*args, **kwargs)

    @torch.no_grad()
    def update(self, student: nn.Module, momentum: float) -> None:
        """Move towards the student.

        Args:
            student: a module with the same parameters and buffers as the one copied. Wrappers such
                as DistributedDataParallel have to be taken off (``ddp.module``).
            momentum: m in [0, 1]; 1 leaves the teacher as it is.

        Raises:
            ConfigError: a momentum outside [0, 1].
            ShapeError: other parameters than the teacher's.
        """
        momentum = check_fraction("momentum", momentum)
        own, other = _state(self.module), _state(student)
        if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in other.items()}:
            differing = sorted(
                name
                for name in own.keys() | other.keys()
                if name not in own or name not in other or own[name].shape != other[name].shape
            )
            raise ShapeError(
                f"`student` does not have the teacher's parameters and buffers; {len(differing)} "
                f"differ, the first is `{differing[0]}`: pass the module that was copied, without "
                "wrappers"
            )
        sharded = any(local_part(value) is not value for value in own.values())
        own = {name: local_part(value) for name, value in own.items()}
        other = {name: local_part(value) for name, value in other.items()}
        floating = [name for name, value in own.items() if value.is_floating_point()]
        finite = torch.ones((), dtype=torch.bool, device=self.skipped.device)
        for name in floating:
            finite = finite & other[name].isfinite().all().to(finite.device)
        if sharded:  # each process sees its share alone, and all have to do the same
            finite = all_reduce_sum((~finite).to(torch.float32)) == 0
        parameters = dict(self.module.named_parameters(remove_duplicate=False))
        for name, value in own.items():
            good = finite.to(value.device)
            new = torch.where(good, other[name].to(value.dtype), value)
            if name in parameters and value.is_floating_point():
                value.lerp_(new, 1.0 - momentum)
            else:
                value.copy_(new)
        self.skipped.add_((~finite).to(torch.int64))


def _state(module: nn.Module) -> dict[str, Tensor]:
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: value.detach() for name, value in named}

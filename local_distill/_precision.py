"""Which floating-point type a computation is done in, whatever its inputs and autocast say."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

# Geometry is a few numbers per view: float64 costs nothing there and spares every later comparison
# a rounding. These back ends have no float64 at all.
_NO_FLOAT64 = frozenset({"mps", "xla"})


def at_least_float32(values: Tensor) -> Tensor:
    """Half-precision and integer values as float32; float32 and float64 as they are."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def widest(values: Tensor) -> Tensor:
    """Values in the widest floating-point type of their device."""
    return values.float() if values.device.type in _NO_FLOAT64 else values.double()


def no_autocast(values: Tensor) -> torch.autocast:
    """Context in which autocast does not round the products of float32 values."""
    return torch.autocast(device_type=values.device.type, enabled=False)


def undo_half_precision(module: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Give a module's own buffers back as they were, where they have become half precision.

    Args:
        module: after ``half()`` or ``to(bfloat16)``; its buffers stay on their new device.
        before: its buffers by name, from before that.
    """
    for name, old in before.items():
        new: Tensor = getattr(module, name)
        if new.dtype in (torch.float16, torch.bfloat16):
            setattr(module, name, old.to(new.device))

"""Rows brought to length 1 so that loss and gradient stay finite."""

from __future__ import annotations

import torch
from torch import Tensor

from local_distill._precision import at_least_float32

# Below it nothing tells a row from zero, in float32 and wider.
_NO_LENGTH = 1e-35


def unit_rows(values: Tensor, source: torch.dtype | None = None) -> Tensor:
    """Rows (…, d) of length 1; see `unit_directions`."""
    return unit_directions(values, source)[0]


def unit_directions(values: Tensor, source: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Rows (…, d) of length 1 in at least float32, and (…) bool: which have a direction.

    Differentiable. Rows of zero norm have none: they stay 0 and get no gradient. Rows so short that
    their gradient, about 1 / length, would not fit into a dtype (``source``, by default that of
    ``values``) are made longer by as much as fits, and stay shorter than 1. Rows that are not
    finite become NaN: whoever may leave them out does so before.
    """
    wide = at_least_float32(values)
    if wide.shape[-1] == 0:
        return wide, torch.zeros_like(wide.detach().sum(-1), dtype=torch.bool)
    # Two steps, as the square of 1e30 overflows and that of 1e-30 vanishes in float32. The first
    # is by a number that the result does not depend on, so it needs no gradient.
    largest = wide.detach().abs().amax(-1, keepdim=True)
    some = ~(largest < _NO_LENGTH)  # NaN is not hidden
    divisor = largest.clamp_min(4 / torch.finfo(source or values.dtype).max)
    scaled = torch.where(some, wide, 1.0) / torch.where(some, divisor, 1.0)
    length = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    # Not clamp_min, which has no gradient at 1: the length of a row with a single entry.
    length = torch.where(length < 1.0, 1.0, length)
    return torch.where(some, scaled / length, 0.0), some[..., 0]

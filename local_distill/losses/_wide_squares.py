"""Sums of squares whose value has room, and whose gradient does not pass through that room."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from local_distill._precision import widest
from local_distill.kernels.log_normalizer import runs_plainly


def sum_of_squares(values: Tensor, axes: int = 1) -> Tensor:
    """Σ v² over the last axes, in the widest type of the device.

    float32 holds a covariance of 1e20 and not its square. The largest number is divided out by a
    power of two, which rounds nothing, and multiplied back in float64, where 1e70 is no trouble.
    The gradient 2·v·g is worked out from the numbers themselves: it is right wherever it fits,
    although the value may be beyond float32.

    Args:
        values: (…, last axes).
        axes: how many of the last axes are summed.

    Example:
        >>> sum_of_squares(torch.tensor([3e20, 4e20]))
        tensor(2.5000e+41, dtype=torch.float64)
    """
    rows = values.flatten(values.dim() - axes)
    if not runs_plainly(rows):
        # A compiler fuses the wider numbers into the sum; here they would be a table, and kept.
        return widest(rows).square().sum(-1)
    total: Tensor = _SumOfSquares.apply(rows)
    return total


class _SumOfSquares(torch.autograd.Function):
    """Over the last axis."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        ctx.save_for_backward(values)
        if values.shape[-1] == 0:
            return widest(values.sum(-1))
        largest = torch.linalg.vector_norm(values, torch.inf, -1, keepdim=True)
        usual = (largest > 0) & (largest < torch.inf)
        # One less: 2¹²⁸ is not a float32 any more.
        exponent = torch.frexp(torch.where(usual, largest, 1.0)).exponent - 1
        scale = torch.ldexp(torch.ones_like(largest), exponent)
        total = widest((values / scale).square().sum(-1))
        factor = widest(scale[..., 0])
        return total * factor * factor

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Tensor:
        (values,) = ctx.saved_tensors
        slope: Tensor = 2 * values * gradients[0].to(values.dtype)[..., None]
        return slope

"""Backward passes whose slopes are numbers: a second derivative of them is an error."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["differentiable_once"]

Backward = Callable[..., tuple[Tensor | None, ...]]


def differentiable_once(backward: Backward) -> Backward:
    """``once_differentiable``, also where the factor that comes needs no gradient itself.

    Args:
        backward: of an autograd Function with one output: ``(ctx, factor)`` to gradients.
    """
    once = once_differentiable(backward)

    @functools.wraps(backward)
    def checked(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not factor.requires_grad:
            # Otherwise a second derivative would miss this part of it without a word.
            factor = factor.detach().requires_grad_()
        result: tuple[Tensor | None, ...] = once(ctx, factor)
        return result

    return checked

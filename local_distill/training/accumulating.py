"""State of losses that is to move once a step, however many micro-batches a step has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

__all__ = ["accumulating"]


@contextmanager
def accumulating(criterion: nn.Module, enabled: bool) -> Iterator[None]:
    """Within it the centers of a criterion only sum what they see, see `Centering.accumulate`.

    Args:
        criterion: all of its modules that have ``accumulate`` are asked.
        enabled: False for the last micro-batch of a step.

    Example:
        >>> import torch
        >>> from local_distill import Centering
        >>> criterion = nn.ModuleList([Centering(1, momentum=0.0)])
        >>> with accumulating(criterion, enabled=True):
        ...     criterion[0].update([torch.tensor([[1.0]])])
        >>> criterion[0].center
        tensor([0.])
    """
    with ExitStack() as stack:
        for module in criterion.modules():
            accumulate = getattr(module, "accumulate", None)
            if accumulate is not None:
                stack.enter_context(accumulate(enabled))
        yield

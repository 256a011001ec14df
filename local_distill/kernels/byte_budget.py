"""How much memory one block of a computation in blocks may take."""

from __future__ import annotations

from collections.abc import Iterator

import torch

__all__ = ["block_length", "byte_budget", "slices"]

# On a CPU a block that stays in the caches is also the fastest; a GPU wants few large launches.
_CPU_BYTES = 4 * 2**20
_DEVICE_BYTES = 128 * 2**20


def byte_budget(device: torch.device) -> int:
    """Bytes that the temporary tensors of one block may take on this device."""
    return _CPU_BYTES if device.type == "cpu" else _DEVICE_BYTES


def block_length(bytes_per_item: int, device: torch.device) -> int:
    """How many items one block may hold, at least one.

    Args:
        bytes_per_item: temporary memory that one item takes.
        device: where the block is worked on.

    Example:
        >>> block_length(2**20, torch.device("cpu"))
        4
    """
    return max(1, byte_budget(device) // max(1, bytes_per_item))


def slices(length: int, most: int) -> Iterator[slice]:
    """Of a length, of at most so many each and at least one.

    Example:
        >>> list(slices(5, 2))
        [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    step = max(1, most)
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))

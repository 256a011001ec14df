"""How much memory the fused prototype loss may take: one setting for all losses."""

from __future__ import annotations

from types import TracebackType

import torch

from local_distill._check import check_at_least

__all__ = ["most_prototype_bytes", "use_prototype_bytes"]

# Smaller products are slower: on a CPU those of fewer than some hundred rows.
_CPU_BYTES = 96 * 2**20
_DEVICE_BYTES = 512 * 2**20


class use_prototype_bytes:
    """Choose how many bytes of scores losses on `PrototypeLogits` work on at a time.

    Convention: from here on, or within a ``with`` block; the choice is the process's, not the
    thread's. Scores are those of all views of some images, student and teacher, with all
    prototypes. Where those of a single image need more, prototypes are taken in tiles, which is the
    mode of least memory: each score is then multiplied out twice, about half as much work again.
    What else is held does not grow with the number of tokens times prototypes: features,
    prototypes, and the gradients of both.

    Args:
        most: bytes, at least 1; None: 96 MiB on a CPU, 512 MiB elsewhere.

    Raises:
        ConfigError: less than a byte.

    Example:
        >>> from local_distill.kernels import use_prototype_bytes
        >>> with use_prototype_bytes(8 * 2**20):
        ...     pass  # losses and their backward
    """

    _most: int | None = None

    def __init__(self, most: int | None) -> None:
        chosen = None if most is None else check_at_least("most", most, 1)
        self._before = use_prototype_bytes._most
        use_prototype_bytes._most = chosen

    def __enter__(self) -> use_prototype_bytes:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        use_prototype_bytes._most = self._before


def most_prototype_bytes(device: torch.device) -> int:
    """What has been chosen, or what suits the device."""
    if use_prototype_bytes._most is not None:
        return use_prototype_bytes._most
    return _CPU_BYTES if device.type == "cpu" else _DEVICE_BYTES

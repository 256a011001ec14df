"""Many strings in two arrays, which worker processes share without copying."""

from __future__ import annotations

import os
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

__all__ = ["PackedNames"]


class PackedNames:
    """A sequence of file names in two arrays.

    A list of a million paths costs about 100 MB, and each worker that is forked ends up with a copy
    of its own, as reading an object writes its count of references. Arrays stay shared.

    Args:
        names: as `os.fsdecode` gives them, so that names that are not UTF-8 survive.

    Example:
        >>> names = PackedNames(["a.jpg", "b/ü.jpg"])
        >>> len(names), names[1]
        (2, 'b/ü.jpg')
    """

    def __init__(self, names: Iterable[str]) -> None:
        packed = bytearray()
        ends = [0]
        for name in names:
            packed += os.fsencode(name)
            ends.append(len(packed))
        self._bytes: NDArray[np.uint8] = np.frombuffer(bytes(packed), dtype=np.uint8)
        self._ends: NDArray[np.int64] = np.array(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        number = range(len(self))[index]
        return os.fsdecode(self._bytes[self._ends[number] : self._ends[number + 1]].tobytes())

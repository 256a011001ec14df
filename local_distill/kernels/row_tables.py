"""Rows of numbers, wherever they lie, as kernels find them: by where each starts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Rows"]

# Rows that start at multiples of it are read in pieces of 16 bytes.
_ALIGNED = 16


class Rows(NamedTuple):
    """Rows of c numbers, wherever they lie on one device."""

    tables: list[Tensor]  # where they lie; kept, so that the memory stays theirs
    base: Tensor  # that of the tables which comes first in memory
    start: Tensor  # (n,) int64, where each begins, counted in numbers from the base's first
    alignment: int  # what all starts can be seen to be multiples of
    length: int  # c

    @classmethod
    def of(cls, tables: list[Tensor]) -> Rows:
        """The rows of tables (b, s, c) of one dtype: those of image 0 of all tables, then of 1.

        Args:
            tables: each with its last axis in one piece, at least one.
        """
        base = min(tables, key=Tensor.data_ptr)
        starts, steps = [], []
        for table in tables:
            b, s, _ = table.shape
            images, tokens = (torch.arange(n, device=table.device) for n in (b, s))
            first = (table.data_ptr() - base.data_ptr()) // table.element_size()
            across, down = table.stride()[:2]
            starts.append(images[:, None] * across + tokens * down + first)
            steps += [first, across, down]
        aligned = base.data_ptr() % 16 == 0 and all(step % _ALIGNED == 0 for step in steps)
        start = torch.cat(starts, 1).flatten()
        return cls(tables, base, start, _ALIGNED if aligned else 1, tables[0].shape[2])

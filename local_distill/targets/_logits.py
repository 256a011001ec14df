"""What all targets ask of the teacher's logits, and how they are read a block at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from local_distill._check import Axes, check_floating, check_sequence
from local_distill._logits import Logits, stand_in
from local_distill._precision import at_least_float32
from local_distill.errors import ShapeError
from local_distill.kernels.byte_budget import block_length, slices
from local_distill.structures import PrototypeLogits

# Bytes of the scores that are multiplied out at a time: smaller products are slower.
_PRODUCT_BYTES = 64 * 2**20


def check_logits(
    teacher_logits: Sequence[Logits],
    valid: Sequence[Tensor | None] | None,
    num_prototypes: int,
) -> None:
    """Refuse logits, and `valid`, that do not fit each other or the targets."""
    check_sequence("teacher_logits", teacher_logits, "a tensor of logits")
    check_views("valid", valid, "teacher_logits", len(teacher_logits))
    for view, given in enumerate(teacher_logits):
        name = f"teacher_logits[{view}]"
        shaped = stand_in(name, given)
        local = isinstance(shaped, Tensor) and shaped.dim() == 3
        logits = check_floating(name, Axes().bind(name, shaped, "b t c" if local else "b c"))
        if logits.shape[-1] != num_prototypes:
            raise ShapeError(
                f"axis `c` is {logits.shape[-1]} in `{name}` (shape {tuple(logits.shape)}) but "
                f"these targets were made for num_prototypes={num_prototypes}"
            )
        if valid is not None:
            check_valid(f"valid[{view}]", valid[view], name, logits)


def check_views(name: str, values: Sequence[object] | None, of: str, views: int) -> None:
    """Refuse a list that has not one entry for every view of another."""
    if values is not None and len(values) != views:
        raise ShapeError(f"`{name}` has {len(values)} views but `{of}` has {views}")


def check_valid(name: str, keep: Tensor | None, of: str, values: Tensor) -> None:
    """Refuse what does not say, row by row, which of the values (…, n) count."""
    if keep is None:
        return
    if tuple(keep.shape) != tuple(values.shape[:-1]):
        raise ShapeError(
            f"`{name}` must have shape {tuple(values.shape[:-1])} as `{of}` "
            f"without its last axis, got {tuple(keep.shape)}"
        )
    if keep.dtype != torch.bool:
        raise ShapeError(f"`{name}` must be bool, got {keep.dtype}; convert with .bool()")


def row_blocks(
    values: Logits, keep: Tensor | None, *, tables: int
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Views of the rows (n, c), and of which count (n,), so few at a time that memory stays small.

    Args:
        values: (…, c), or as `PrototypeLogits`, which are multiplied out a part at a time.
        keep: (…,) bool, or None: all count.
        tables: how many tables of a block's size, in at least float32, are alive at once.
    """
    flags = None if keep is None else keep.reshape(-1)
    if isinstance(values, PrototypeLogits):
        features = values.features.reshape(-1, values.features.shape[-1])
        width = at_least_float32(values.weight.new_empty(0)).element_size()
        for part in _blocks(features.shape[0], _PRODUCT_BYTES // (width * values.weight.shape[0])):
            some = PrototypeLogits(features[part], values.weight, values.bias)
            counted = None if flags is None else flags[part]
            yield from row_blocks(some.logits(), counted, tables=tables)
        return
    rows = values.reshape(-1, values.shape[-1])
    width = at_least_float32(values.new_empty(0)).element_size()
    most = block_length(rows.shape[1] * width * tables, values.device)
    for part in _blocks(rows.shape[0], most):
        yield rows[part], None if flags is None else flags[part]


def _blocks(length: int, most: int) -> Iterator[slice]:
    # A graph with a node for every block would be one of this number of rows alone, and the
    # compiler fuses what the blocks are there to keep small.
    return slices(length, length if torch.compiler.is_compiling() else most)

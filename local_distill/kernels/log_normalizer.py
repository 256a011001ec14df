"""The normalizer of a contrast, Σ_r e^{x·n_r/τ}, without the table of all rows with all keys.

A block of rows meets a block of keys at a time; peaks, sums and the mean key that the softmax
weighs are carried along from block to block. That mean is the gradient, up to a factor a row: it is
known with the value, takes the place of a row each, and backward needs no table either.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from local_distill._precision import no_autocast
from local_distill.kernels.byte_budget import block_length, slices
from local_distill.kernels.differentiable_once import differentiable_once

__all__ = ["log_normalizer", "plain_log_normalizer", "runs_plainly"]

# Fewer keys a block and the product of matrices is slow; fewer rows, then.
_LEAST_KEYS = 1024
# Tables of (rows, keys) that are alive while a block is worked on.
_TABLES = 2
# Entries of the plain form's table that a graph being traced holds; a larger one is traced in
# blocks of rows, each worked out once more in the backward pass.
_TRACED_TABLE = 2**25


def log_normalizer(
    rows: Tensor,
    keys: Tensor,
    temp: float,
    *,
    valid: Tensor,
    row_image: Tensor | None = None,
    key_image: Tensor | None = None,
) -> Tensor:
    """Of each row the logsumexp of its products with the keys that count, over the temperature.

    .. math:: log Σ_{r valid, image_r ≠ image_i} e^{x_i·n_r/τ}

    Differentiable once, in ``rows`` and ``keys``. Rows without any key get a finite, huge negative
    number and no gradient worth the name: give them no weight. Without any key at all it is -inf.

    Args:
        rows: (n, d) in at least float32.
        keys: (r, d) in the same dtype; those that do not count must be finite.
        temp: τ, above 0.
        valid: (r,) bool.
        row_image: (n,) whose image a row is of, or None: every row sees every key.
        key_image: (r,) likewise; a key of the row's own image does not count.

    Returns:
        (n,).

    Example:
        >>> keys = torch.tensor([[0.0, 1.0], [0.0, -1.0], [7.0, 7.0]])
        >>> valid = torch.tensor([True, True, False])
        >>> log_normalizer(torch.tensor([[1.0, 0.0]]), keys, 1.0, valid=valid)  # ln 2
        tensor([0.6931])
    """
    if runs_plainly(rows) and runs_plainly(keys):
        learning = torch.is_grad_enabled()
        value: Tensor = _InBlocks.apply(rows, keys, temp, valid, row_image, key_image, learning)
        return value
    height = max(1, _TRACED_TABLE // max(1, keys.shape[0]))
    if rows.shape[0] <= height or not torch.compiler.is_compiling():
        return plain_log_normalizer(rows, keys, temp, valid, row_image, key_image)
    blocks = []
    for first in range(0, rows.shape[0], height):
        part = slice(first, first + height)
        image = None if row_image is None else row_image[part]
        blocks.append(
            checkpoint(
                plain_log_normalizer, rows[part], keys, temp, valid, image, key_image,
                use_reentrant=False, preserve_rng_state=False,
            )
        )  # fmt: skip
    return torch.cat(blocks)


def runs_plainly(values: Tensor) -> bool:
    """Whether operations run as they are written: not in a graph being traced, nor under vmap."""
    if torch.compiler.is_compiling():
        return False
    wrapped: bool = torch._C._functorch.is_functorch_wrapped_tensor(values)
    return not wrapped


def plain_log_normalizer(
    rows: Tensor,
    keys: Tensor,
    temp: float,
    valid: Tensor,
    row_image: Tensor | None = None,
    key_image: Tensor | None = None,
) -> Tensor:
    """`log_normalizer` by one table of all rows with all keys."""
    return _scores(rows, keys, temp, _bias(valid, rows), row_image, key_image).logsumexp(-1)


class _InBlocks(torch.autograd.Function):
    """Keeps a row's slope; for the keys' gradient, which only some losses need, goes twice."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        keys: Tensor,
        temp: float,
        valid: Tensor,
        row_image: Tensor | None,
        key_image: Tensor | None,
        learning: bool,
    ) -> Tensor:
        bias = _bias(valid, rows)
        for_rows, for_keys = (learning and ctx.needs_input_grad[i] for i in (0, 1))
        value = rows.new_empty(rows.shape[0])
        slope = torch.empty_like(rows) if for_rows else None
        for here, width in _row_blocks(rows, keys):
            image = None if row_image is None else row_image[here]
            peak = rows.new_full((rows[here].shape[0], 1), _never(rows))
            total, pull = torch.zeros_like(peak), torch.zeros_like(rows[here])
            for there in slices(keys.shape[0], width):
                other = None if key_image is None else key_image[there]
                scores = _scores(rows[here], keys[there], temp, bias[there], image, other)
                # NaN is handed on: the loss is to show it.
                top = torch.maximum(peak, scores.amax(-1, keepdim=True))
                shrink = (peak - top).exp_()
                scores.sub_(top).exp_()
                total.mul_(shrink).add_(scores.sum(-1, keepdim=True))
                if slope is not None:
                    with no_autocast(rows):
                        pull.mul_(shrink).addmm_(scores, keys[there])
                peak = top
            value[here] = (peak + total.log()).squeeze(-1)
            if slope is not None:
                # Not divided by 0 where there are no keys at all.
                slope[here] = pull.div_(torch.where(total == 0, 1.0, total)).div_(temp)
        # The keys only where they are needed: a queue's are overwritten before backward comes.
        ctx.save_for_backward(slope, *((rows, keys, value) if for_keys else ()))
        ctx.parts = temp, bias, row_image, key_image
        return value

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        slope, *more = ctx.saved_tensors
        for_rows = None if slope is None else slope * factor[:, None]
        for_keys = _gradient_of_keys(factor, *more, *ctx.parts) if more else None
        return for_rows, for_keys, None, None, None, None, None


def _gradient_of_keys(
    factor: Tensor,
    rows: Tensor,
    keys: Tensor,
    value: Tensor,
    temp: float,
    bias: Tensor,
    row_image: Tensor | None,
    key_image: Tensor | None,
) -> Tensor:
    gradient = torch.zeros_like(keys)
    for here, width in _row_blocks(rows, keys):
        image = None if row_image is None else row_image[here]
        scaled = rows[here] * (factor[here, None] / temp)
        for there in slices(keys.shape[0], width):
            other = None if key_image is None else key_image[there]
            scores = _scores(rows[here], keys[there], temp, bias[there], image, other)
            share = scores.sub_(value[here, None]).exp_()
            with no_autocast(rows):
                gradient[there].addmm_(share.mT, scaled)
    return gradient


def _scores(
    rows: Tensor,
    keys: Tensor,
    temp: float,
    bias: Tensor,
    row_image: Tensor | None,
    key_image: Tensor | None,
) -> Tensor:
    with no_autocast(rows):
        scores = torch.addmm(bias, rows, keys.mT, alpha=1 / temp)
    if row_image is None or key_image is None:
        return scores
    return scores.masked_fill(row_image[:, None] == key_image, _never(rows))


def _bias(valid: Tensor, like: Tensor) -> Tensor:
    """(r,) 0, or for a key that does not count what no exponential survives."""
    return torch.zeros_like(valid, dtype=like.dtype).masked_fill(~valid, _never(like))


def _never(like: Tensor) -> float:
    """Finite, so that a row without any key gives a gradient that is not NaN."""
    return torch.finfo(like.dtype).min / 2


def _row_blocks(rows: Tensor, keys: Tensor) -> Iterator[tuple[slice, int]]:
    """Blocks of rows, and how many keys each of them meets at a time."""
    n, r = rows.shape[0], keys.shape[0]
    entry = _TABLES * rows.element_size()
    height = min(n, block_length(entry * max(1, min(r, _LEAST_KEYS)), rows.device))
    width = block_length(entry * max(1, height), rows.device)
    for here in slices(n, height):
        yield here, width

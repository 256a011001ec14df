"""Prototypes' product and cross-entropy in one: the table of logits never exists as a whole.

Images are taken a few at a time, as a budget of bytes allows. Of those the student's and the
teacher's scores are multiplied out, the teacher's become distributions in place, and the student's
become their own gradient in place, a few rows at a time, which then goes back through the product.
What stays is the loss, the gradient of the features and that of the prototypes. Where the scores of
a single image are too many, prototypes are taken in tiles, and multiplied out twice: once for the
normalisers, once for the rest.

Rows that take no part are left out before the product where their number can be known without
waiting for the device, which is on a CPU.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from local_distill._precision import no_autocast, widest
from local_distill.kernels.byte_budget import slices
from local_distill.kernels.prototype_block import Product, loss_and_slope, rows_of
from local_distill.kernels.prototype_bytes import most_prototype_bytes

__all__ = ["prototype_cross_entropy"]


def prototype_cross_entropy(
    student: Tensor,
    student_weight: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor,
    offset: Tensor | None,
    index: Tensor,
    share: Tensor,
    *,
    student_scale: Tensor,
    teacher_scale: Tensor,
    max_bytes: int | None = None,
) -> Tensor:
    r"""The sum over student tokens of the cross-entropy with what answers them, from features.

    .. math:: \sum_i m_i·logsumexp(u_i) - p_i·u_i, \quad u_i = α W z_i, \quad
        p_i = \sum_k w_{ik} softmax(β W_t x_{j(i,k)} + g), \quad m_i = \sum_k w_{ik}

    Convention: computed and accumulated in at least float32. The gradient is worked out with the
    loss and kept unscaled in at least float32 until backward brings its factor, so that a loss
    scale keeps what float16 would lose. It can be differentiated once.

    Args:
        student: (b, s, d) features z of all student views, behind each other.
        student_weight: (c, d) prototypes W.
        teacher: (b, t, e) features x of all teacher views; no gradient.
        teacher_weight: (c, e) prototypes; no gradient.
        offset: (c,) g, or None.
        index: (b, s, k) int64, which of the t answers.
        share: (b, s, k) weights w; 0: no answer, whatever the index.
        student_scale: α, a number; 1 / student_temp.
        teacher_scale: β, a number; 1 / teacher_temp.
        max_bytes: what the scores of the images worked on at a time may take; by default as
            `use_prototype_bytes` says. Below what one image needs, prototypes come in tiles.

    Returns:
        A scalar, differentiable in ``student`` and ``student_weight``.
    """
    most = max_bytes or most_prototype_bytes(student.device)
    learning = torch.is_grad_enabled() and (student.requires_grad or student_weight.requires_grad)
    loss: Tensor = _fused(
        student,
        student_weight,
        teacher.detach(),
        teacher_weight.detach(),
        None if offset is None else offset.detach(),
        index,
        share.detach(),
        student_scale.detach(),
        teacher_scale.detach(),
        most,
        learning,
        learning and student_weight.requires_grad,
    )[0]
    return loss


def _loss_and_slopes(
    student: Tensor,
    student_weight: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor,
    offset: Tensor | None,
    index: Tensor,
    share: Tensor,
    student_scale: Tensor,
    teacher_scale: Tensor,
    max_bytes: int,
    learning: bool,
    weight_learning: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, its gradient in the features, its gradient in the prototypes."""
    dtype = _accumulator(student, student_weight, teacher, teacher_weight)
    slopes = _empty_slopes(student, student_weight, dtype, learning, weight_learning)
    slope, weight_slope = (one.zero_() for one in slopes)
    ours, theirs = (
        Product(weight.to(_product_dtype(features, dtype)), scale.to(dtype), extra, dtype)
        for features, weight, scale, extra in (
            (student, student_weight, student_scale, None),
            (teacher, teacher_weight, teacher_scale, offset),
        )
    )
    total = widest(student.new_zeros((), dtype=dtype))
    each = (student.shape[1] + teacher.shape[1] + 1) * student_weight.shape[0] * dtype.itemsize
    with no_autocast(student):
        for images in slices(student.shape[0], max_bytes // max(1, each)):
            rows = rows_of(student[images], teacher[images], index[images], share[images], dtype)
            found, row_slope = loss_and_slope(
                rows, ours, theirs, max_bytes, learning, weight_slope if weight_learning else None
            )
            total += found
            if row_slope is not None:
                place = slope[images].flatten(0, 1)
                place[slice(None) if rows.place is None else rows.place] = row_slope
    for one in (slope, weight_slope):
        one.mul_(ours.scale)
    return total.to(dtype), slope, weight_slope


_fused = torch.library.custom_op("local_distill::prototype_cross_entropy", mutates_args=())(
    _loss_and_slopes
)


@_fused.register_fake
def _(
    student: Tensor,
    student_weight: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor,
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _accumulator(student, student_weight, teacher, teacher_weight)
    slopes = _empty_slopes(student, student_weight, dtype, *others[-2:])
    return student.new_empty((), dtype=dtype), *slopes


def _keep_slopes(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype
    ctx.learning = inputs[-2:]
    # Handed out for backward alone. The loss can be differentiated once: they are its slopes here,
    # and would be constants to a second derivative.
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros as large as the prototypes


def _scale_slopes(ctx: Any, factor: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if factor is None:
        return (None,) * 12
    parts = zip(ctx.saved_tensors, ctx.dtypes, ctx.learning, strict=True)
    slopes = [(factor * one).to(dtype) if on else None for one, dtype, on in parts]
    if torch.is_grad_enabled():  # a graph of the gradient is asked for
        anchor = torch.zeros((), requires_grad=True)
        slopes = [None if one is None else _NoSecond.apply(one, anchor) for one in slopes]
    return *slopes, *[None] * 10


class _NoSecond(torch.autograd.Function):
    """The slopes are constants to autograd: without this, second derivatives would be wrong."""

    @staticmethod
    def forward(ctx: Any, slope: Tensor, anchor: Tensor) -> Tensor:
        return slope.view_as(slope)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, None]:
        raise NotImplementedError(
            "the loss on PrototypeLogits can be differentiated once, not twice: its gradient is "
            "worked out with the loss. Give it `logits.logits()` for second derivatives"
        )


_fused.register_autograd(_scale_slopes, setup_context=_keep_slopes)


def _accumulator(*values: Tensor) -> torch.dtype:
    return functools.reduce(torch.promote_types, (one.dtype for one in values), torch.float32)


def _product_dtype(features: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What numbers are rounded to before they are multiplied; sums are not.

    A GPU multiplies half precision many times as fast, a CPU does not.
    """
    half = features.dtype in (torch.float16, torch.bfloat16)
    return features.dtype if half and features.device.type != "cpu" else dtype


def _empty_slopes(
    student: Tensor, weight: Tensor, dtype: torch.dtype, learning: bool, weight_learning: bool
) -> tuple[Tensor, Tensor]:
    return (
        student.new_empty(student.shape if learning else (0,), dtype=dtype),
        weight.new_empty(weight.shape if weight_learning else (0,), dtype=dtype),
    )

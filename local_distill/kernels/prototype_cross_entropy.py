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
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from local_distill._precision import no_autocast, widest
from local_distill.kernels.byte_budget import block_length

__all__ = ["prototype_cross_entropy"]

# Bytes that the scores of the images worked on may take. Smaller products are slower.
_CPU_BYTES = 96 * 2**20
_DEVICE_BYTES = 512 * 2**20
# Above so many candidates a token, answers are a product of matrices.
_FEW_CANDIDATES = 8
# Tables of the size of a block of rows that are alive at once.
_TABLES = 2


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
        max_bytes: what the scores of the images worked on at a time may take; by default 96 MiB on
            a CPU and 512 MiB elsewhere. Below what one image needs, prototypes come in tiles.

    Returns:
        A scalar, differentiable in ``student`` and ``student_weight``.
    """
    most = max_bytes or (_CPU_BYTES if student.device.type == "cpu" else _DEVICE_BYTES)
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


class _Product(NamedTuple):
    """How scores come from features: scale · features · weightᵀ + offset."""

    weight: Tensor
    scale: Tensor
    offset: Tensor | None
    dtype: torch.dtype

    def scores(self, features: Tensor, columns: slice) -> Tensor:
        """(n, columns), a new table."""
        weight = self.weight[columns].to(self.dtype)
        scaled = features.to(self.dtype) * self.scale
        if self.offset is None:
            return scaled @ weight.T
        return torch.addmm(self.offset[columns].to(self.dtype), scaled, weight.T)


class _Norm(NamedTuple):
    """The logsumexp of rows, in two parts: together they would be rounded as their sum is."""

    peak: Tensor  # (n, 1)
    log_sum: Tensor  # (n, 1)

    def taken_from_(self, scores: Tensor, rows: slice) -> Tensor:
        """Log-probabilities, in place."""
        return scores.sub_(self.peak[rows]).sub_(self.log_sum[rows])


class _Rows(NamedTuple):
    """The tokens of some images that take part: n of the student's, m of the teacher's."""

    student: Tensor  # (n, d)
    teacher: Tensor  # (m, e)
    place: Tensor | None  # (n,) where they stand among all of the student's, None: all do
    mass: Tensor  # (n, 1)
    number: Tensor  # (n, k) row of the teacher's, m: none
    share: Tensor  # (n, k)

    def answer(self, probs: Tensor, rows: slice) -> Tensor:
        """(rows, columns) what the teacher's distributions (m + 1, columns) say of some rows."""
        number, share = self.number[rows], self.share[rows]
        if number.shape[1] > _FEW_CANDIDATES:
            table = share.new_zeros(number.shape[0], probs.shape[0])
            return table.scatter_add_(1, number, share) @ probs
        return nn.functional.embedding_bag(number, probs, mode="sum", per_sample_weights=share)


@torch.library.custom_op("local_distill::prototype_cross_entropy", mutates_args=())
def _fused(
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
    ours = _Product(student_weight, student_scale.to(dtype), None, dtype)
    theirs = _Product(teacher_weight, teacher_scale.to(dtype), offset, dtype)
    total = widest(student.new_zeros((), dtype=dtype))
    each = (student.shape[1] + teacher.shape[1] + 1) * student_weight.shape[0] * dtype.itemsize
    with no_autocast(student):
        for images in _slices(student.shape[0], max_bytes // max(1, each)):
            rows = _rows_of(student[images], teacher[images], index[images], share[images], dtype)
            found, row_slope = _walk(
                rows, ours, theirs, max_bytes, learning, weight_slope if weight_learning else None
            )
            total += found
            if row_slope is not None:
                place = slope[images].flatten(0, 1)
                place[slice(None) if rows.place is None else rows.place] = row_slope
    for one in (slope, weight_slope):
        one.mul_(ours.scale)
    return total.to(dtype), slope, weight_slope


@_fused.register_fake
def _(
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
    dtype = _accumulator(student, student_weight, teacher, teacher_weight)
    slopes = _empty_slopes(student, student_weight, dtype, learning, weight_learning)
    return student.new_empty((), dtype=dtype), *slopes


def _keep_slopes(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype
    ctx.learning = inputs[-2:]
    # Handed out for backward alone. The loss can be differentiated once: they are its slopes here,
    # and would be constants to a second derivative.
    ctx.mark_non_differentiable(*output[1:])


def _scale_slopes(ctx: Any, factor: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
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


def _empty_slopes(
    student: Tensor, weight: Tensor, dtype: torch.dtype, learning: bool, weight_learning: bool
) -> tuple[Tensor, Tensor]:
    return (
        student.new_empty(student.shape if learning else (0,), dtype=dtype),
        weight.new_empty(weight.shape if weight_learning else (0,), dtype=dtype),
    )


def _rows_of(
    student: Tensor, teacher: Tensor, index: Tensor, share: Tensor, dtype: torch.dtype
) -> _Rows:
    """The rows that take part, as far as their number can be known without waiting for a device."""
    numbered = _numbered(student, teacher, index, share, dtype)
    return _kept_rows(*numbered) if student.device.type == "cpu" else _all_rows(*numbered)


def _numbered(
    student: Tensor, teacher: Tensor, index: Tensor, share: Tensor, dtype: torch.dtype
) -> tuple[_Rows, Tensor, Tensor]:
    """All rows, those of all images numbered on; which (n,) are answered, which (m,) are read."""
    images, tokens = teacher.shape[:2]
    none = images * tokens
    first = tokens * torch.arange(images, device=index.device)[:, None, None]
    # != and not >: a weight of NaN is to be seen in the loss
    number = torch.where(share != 0, index + first, none).flatten(0, 1)
    shares = share.to(dtype).flatten(0, 1)
    mass = shares.sum(-1, keepdim=True)
    read = torch.zeros(none + 1, dtype=torch.bool, device=index.device)
    read.index_fill_(0, number.flatten(), True)
    rows = _Rows(student.flatten(0, 1), teacher.flatten(0, 1), None, mass, number, shares)
    return rows, mass[:, 0] != 0, read[:none]


def _all_rows(rows: _Rows, answered: Tensor, read: Tensor) -> _Rows:
    """All, those that take no part set to zero: 0 · NaN is NaN."""
    student = torch.where(answered[:, None], rows.student, 0.0)
    return rows._replace(student=student, teacher=torch.where(read[:, None], rows.teacher, 0.0))


def _kept_rows(rows: _Rows, answered: Tensor, read: Tensor) -> _Rows:
    """Those that take part; the teacher's are numbered anew."""
    place = answered.nonzero()[:, 0]
    anew = torch.cat((read.cumsum(0) - 1, read.sum()[None]))
    return _Rows(
        rows.student[place],
        rows.teacher[read],
        place,
        rows.mass[place],
        anew[rows.number[place]],
        rows.share[place],
    )


def _walk(
    rows: _Rows,
    ours: _Product,
    theirs: _Product,
    max_bytes: int,
    learning: bool,
    weight_slope: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The loss of some images, and its gradient in their rows; adds to the prototypes'."""
    n, c = rows.student.shape[0], ours.weight.shape[0]
    total = widest(rows.mass.new_zeros(()))
    slope = torch.zeros_like(rows.student, dtype=ours.dtype) if learning else None
    if n == 0:
        return total, slope
    column_bytes = (n + rows.teacher.shape[0] + 1) * ours.dtype.itemsize
    tiles = list(_slices(c, max_bytes // column_bytes))
    norm = teacher_norm = None
    if len(tiles) > 1:
        norm = _norm(ours, rows.student, tiles)
        teacher_norm = _norm(theirs, rows.teacher, tiles)
    features = rows.student.to(ours.dtype)
    for columns in tiles:
        probs = _distributions(theirs, rows.teacher, columns, teacher_norm)
        table = ours.scores(rows.student, columns)
        for block in _row_blocks(table):
            total += _slope_(table[block], rows.answer(probs, block), rows.mass[block], norm, block)
        if slope is not None:
            slope.addmm_(table, ours.weight[columns].to(ours.dtype))
        if weight_slope is not None:
            weight_slope[columns].addmm_(table.T, features)
    return total, slope


def _slope_(
    scores: Tensor, answer: Tensor, mass: Tensor, norm: _Norm | None, rows: slice
) -> Tensor:
    """Turn the scores of some rows into the gradient in them, in place; their part of the loss.

    With ``norm`` they may be a tile of the rows; without, they are the whole of them.
    """
    if norm is not None:
        gain = torch.dot(answer.flatten(), norm.taken_from_(scores, rows).flatten())
        _exp(scores).mul_(mass).sub_(answer)
        return -gain
    gain = torch.dot(answer.flatten(), scores.sub_(scores.amax(-1, keepdim=True)).flatten())
    total = _exp(scores).sum(-1, keepdim=True)
    scores.mul_(mass / total).sub_(answer)
    return (mass * total.log()).sum() - gain


def _distributions(
    product: _Product, features: Tensor, columns: slice, norm: _Norm | None
) -> Tensor:
    """(m + 1, columns) of the softmax; the last row is zero, for candidates of no weight."""
    m = features.shape[0]
    probs = product.scores(nn.functional.pad(features, (0, 0, 0, 1)), columns)
    for block in _row_blocks(probs[:m]) if m else ():
        rows = probs[:m][block]
        if norm is not None:
            _exp(norm.taken_from_(rows, block))
        else:
            _exp(rows.sub_(rows.amax(-1, keepdim=True)))
            rows.div_(rows.sum(-1, keepdim=True))
    probs[m:] = 0.0
    return probs


def _norm(product: _Product, features: Tensor, tiles: list[slice]) -> _Norm:
    """Of each row's scores over all tiles."""
    peak = features.new_full((features.shape[0], 1), -torch.inf, dtype=product.dtype)
    total = torch.zeros_like(peak)
    for columns in tiles:
        scores = product.scores(features, columns)
        for block in _row_blocks(scores):
            rows = scores[block]
            higher = torch.maximum(peak[block], rows.amax(-1, keepdim=True))
            part = _exp(rows.sub_(higher)).sum(-1, keepdim=True)
            total[block] = total[block] * (peak[block] - higher).exp() + part
            peak[block] = higher
    return _Norm(peak, total.log())


def _exp(scores: Tensor) -> Tensor:
    """Exp in place of scores that are at most about 0, none smaller than e⁻⁶⁰.

    What underflows takes a CPU fifty times as long, here and in every product that follows; and
    most of a sharp teacher's prototypes do. e⁻⁶⁰ is 10⁻²⁶: nothing beside the rounding of float32.
    """
    return scores.clamp_min_(-60.0 if scores.dtype == torch.float32 else -500.0).exp_()


def _row_blocks(table: Tensor) -> Iterator[slice]:
    """Rows so few at a time that what is done to them stays in the caches."""
    return _slices(table.shape[0], block_length(table[0].nbytes * _TABLES, table.device))


def _slices(length: int, most: int) -> Iterator[slice]:
    for start in range(0, length, max(1, most)):
        yield slice(start, min(start + max(1, most), length))

"""Kernels over rows of logits: their logsumexp, and the cross-entropy with what answers them.

A row is one token's logits. Rows are named by where they start, counted from one tensor's first
number, so that one launch serves the rows of many tensors and none is copied next to another.

Bytes moved by formula, for n student rows of c logits that are answered by k teacher rows each,
out of m: normalisers of the teacher m·c; loss and gradient n·c·(1 + k + 1), and n·c again where the
second reading of a student row finds it no longer in the cache. Nothing here was timed on a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from local_distill.kernels._triton_language import jit, tl
from local_distill.kernels.row_tables import Rows
from local_distill.kernels.triton_switch import launching_on

__all__ = ["RowNorms", "answered_rows", "row_norms", "scale_in_place", "slope_in_place"]

# Columns that one step of a kernel's loop takes, and the warps that share them.
_BLOCK = 4096
_WARPS = 8


class RowNorms(NamedTuple):
    """The logsumexp of rows, in two parts: together they would be rounded as their sum is."""

    peak: Tensor  # (n,) float32
    log_sum: Tensor  # (n,) float32


@jit
def _norm_of_row(
    row: tl.tensor,
    offset: tl.tensor,
    length: tl.tensor,
    scale: tl.tensor,
    HAS_OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """The largest of x, or of scale·x + offset, and the log of the sum of exponentials below it."""
    peak = tl.full((), -3.0e38, tl.float32)  # not -inf: the first step takes the difference
    sums = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, length, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < length
        score = tl.load(row + column, mask=inside, other=0.0).to(tl.float32)
        if HAS_OFFSET:
            score = score * scale + tl.load(offset + column, mask=inside, other=0.0).to(tl.float32)
        score = tl.where(inside, score, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 0))
        if HAS_OFFSET:
            sums = sums * tl.exp(peak - higher) + tl.exp(score - higher)
        else:  # the difference of what is given is exact, that of its multiples is not
            sums = sums * tl.exp((peak - higher) * scale) + tl.exp((score - higher) * scale)
        peak = higher
    return peak, tl.log(tl.sum(sums, 0))


@jit
def _norm_kernel(
    base: tl.tensor,
    starts: tl.tensor,
    offset: tl.tensor,
    offset_starts: tl.tensor,
    keep: tl.tensor,
    peaks: tl.tensor,
    log_sums: tl.tensor,
    length: tl.tensor,
    scale: tl.tensor,
    HAS_OFFSET: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One row a program."""
    number = tl.program_id(0)
    if tl.load(keep + number) != 0:
        row = base + tl.multiple_of(tl.load(starts + number), ALIGNED)
        shift = offset
        if HAS_OFFSET:
            shift = offset + tl.multiple_of(tl.load(offset_starts + number), ALIGNED)
        peak, log_sum = _norm_of_row(row, shift, length, scale, HAS_OFFSET, BLOCK)
        tl.store(peaks + number, peak)
        tl.store(log_sums + number, log_sum)


@jit
def _answered_kernel(
    student: tl.tensor,
    student_starts: tl.tensor,
    slope: tl.tensor,
    slope_starts: tl.tensor,
    teacher: tl.tensor,
    teacher_starts: tl.tensor,
    offset: tl.tensor,
    offset_starts: tl.tensor,
    peaks: tl.tensor,
    log_sums: tl.tensor,
    numbers: tl.tensor,
    shares: tl.tensor,
    factor: tl.tensor,
    losses: tl.tensor,
    length: tl.tensor,
    candidates: tl.tensor,
    student_scale: tl.tensor,
    teacher_scale: tl.tensor,
    HAS_OFFSET: tl.constexpr,
    HAS_SLOPE: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    ALIGNED: tl.constexpr,
    TEACHER_ALIGNED: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One student row a program: its loss, and where a slope is asked for its gradient."""
    i = tl.program_id(0).to(tl.int64)
    # What is known of the candidates, once a row.
    k = tl.arange(0, K)
    share = tl.load(shares + i * candidates + k, mask=k < candidates, other=0.0)
    answers = share != 0.0  # and not >: a weight of NaN is to be seen in the loss
    number = tl.load(numbers + i * candidates + k, mask=answers, other=0)
    begin = tl.multiple_of(tl.load(teacher_starts + number, mask=answers, other=0), TEACHER_ALIGNED)
    peak = tl.load(peaks + number, mask=answers, other=0.0)
    log_sum = tl.load(log_sums + number, mask=answers, other=0.0)
    if HAS_OFFSET:
        shift = tl.load(offset_starts + number, mask=answers, other=0)
        shift = tl.multiple_of(shift, TEACHER_ALIGNED)
    mass = tl.sum(share, 0)
    target = slope
    if HAS_SLOPE:
        target = slope + tl.multiple_of(tl.load(slope_starts + i), ALIGNED)
    if mass == 0.0:
        # Nothing of the row is read: it may hold NaN.
        tl.store(losses + i, 0.0)
        if HAS_SLOPE:
            for first in range(0, length, BLOCK):
                column = first + tl.arange(0, BLOCK)
                nothing = tl.zeros((BLOCK,), slope.dtype.element_ty)
                tl.store(target + column, nothing, mask=column < length)
    else:
        row = student + tl.multiple_of(tl.load(student_starts + i), ALIGNED)
        our_peak, our_log_sum = _norm_of_row(row, row, length, student_scale, False, BLOCK)
        steepness = student_scale
        if HAS_FACTOR:
            steepness = steepness * tl.load(factor)
        gain = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, length, BLOCK):
            column = first + tl.arange(0, BLOCK)
            inside = column < length
            score = tl.load(row + column, mask=inside, other=0.0).to(tl.float32)
            score = (score - our_peak) * student_scale - our_log_sum
            place = begin[:, None] + column[None, :]
            wanted = answers[:, None] & inside[None, :]
            prob = tl.load(teacher + place, mask=wanted, other=0.0).to(tl.float32)
            if HAS_OFFSET:
                place = shift[:, None] + column[None, :]
                more = tl.load(offset + place, mask=wanted, other=0.0).to(tl.float32)
                prob = tl.exp(prob * teacher_scale + more - peak[:, None] - log_sum[:, None])
            else:
                prob = tl.exp((prob - peak[:, None]) * teacher_scale - log_sum[:, None])
            answer = tl.sum(tl.where(wanted, prob * share[:, None], 0.0), 0)
            gain += tl.where(inside, answer * score, 0.0)
            if HAS_SLOPE:
                rise = (tl.exp(score) * mass - answer) * steepness
                tl.store(target + column, rise.to(slope.dtype.element_ty), mask=inside)
        tl.store(losses + i, -tl.sum(gain, 0))


@jit
def _scale_kernel(
    values: tl.tensor, factor: tl.tensor, length: tl.tensor, BLOCK: tl.constexpr
) -> None:
    """Values times a factor; nothing is read or written where it is 1."""
    by = tl.load(factor)
    if by != 1.0:
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = place < length
        value = tl.load(values + place, mask=inside, other=0.0)
        tl.store(values + place, (value.to(tl.float32) * by).to(value.dtype), mask=inside)


def row_norms(rows: Rows, temp: float, offset: Rows | None, keep: Tensor) -> RowNorms:
    """Of each row the logsumexp of x / temp + offset.

    Without an offset the peak is that of x, not divided yet.

    Args:
        rows: n of them.
        temp: the temperature.
        offset: n rows of offsets, most often one and the same; or None.
        keep: (n,) bool; the others are not read, and their norms mean nothing.
    """
    n = keep.shape[0]
    norms = RowNorms(*torch.zeros((2, n), device=keep.device).unbind())
    with launching_on(keep):
        _norm_kernel[n,](
            rows.base,
            rows.start,
            *_offset_or(offset, rows),
            keep.to(torch.int8),
            *norms,
            rows.length,
            1.0 / temp,
            HAS_OFFSET=offset is not None,
            ALIGNED=_alignment(rows, offset),
            BLOCK=_block(rows.length, 1),
            num_warps=_WARPS,
            enable_fp_fusion=True,
        )
    return norms


def answered_rows(
    student: Rows,
    student_temp: float,
    teacher: Rows,
    norms: RowNorms,
    teacher_temp: float,
    offset: Rows | None,
    number: Tensor,
    share: Tensor,
    slope: Rows | None,
    factor: Tensor | None = None,
) -> Tensor:
    """Of each student row the cross-entropy (n,) float32 with the distributions that answer it.

    Args:
        student: n rows.
        student_temp: τ.
        teacher: m rows of logits.
        norms: theirs, of `row_norms` with the same temperature and offset.
        teacher_temp: τ_t.
        offset: m rows, or None.
        number: (n, k) int64, which of the m answer.
        share: (n, k) float32 weights. 0: no answer, whatever the number. Rows of which all are 0
            have no loss and no gradient, and are not read.
        slope: where given, n rows to which the gradient is written. May be ``student``.
        factor: where given, a float32 scalar that the gradient is multiplied with before it is
            rounded to the slope's dtype.
    """
    n, k = share.shape
    losses = torch.empty(n, dtype=torch.float32, device=share.device)
    width = _power_of_two(k)
    target = student if slope is None else slope
    with launching_on(share):
        _answered_kernel[n,](
            student.base,
            student.start,
            target.base,
            target.start,
            teacher.base,
            teacher.start,
            *_offset_or(offset, teacher),
            *norms,
            number.contiguous(),
            share.contiguous(),
            share if factor is None else factor,
            losses,
            student.length,
            k,
            1.0 / student_temp,
            1.0 / teacher_temp,
            HAS_OFFSET=offset is not None,
            HAS_SLOPE=slope is not None,
            HAS_FACTOR=factor is not None,
            ALIGNED=_alignment(student, target),
            TEACHER_ALIGNED=_alignment(teacher, offset),
            K=width,
            BLOCK=_block(student.length, width),
            num_warps=_WARPS,
            enable_fp_fusion=True,
        )
    return losses


def slope_in_place(scores: Tensor, teacher: Tensor, number: Tensor, share: Tensor) -> Tensor:
    """Turn scores into the gradient in them; the cross-entropy (n,) float32 of each row.

    What the fused loss asks of a block that is multiplied out: `prototype_cross_entropy`.

    Args:
        scores: (n, c) of the student, the temperature in them already; written to.
        teacher: (m, c) scores, temperature and offset in them already.
        number: (n, k) int64, which of the m answer.
        share: (n, k) float32 weights; 0: no answer, whatever the number.
    """
    ours, theirs = Rows.of([scores[None]]), Rows.of([teacher[None]])
    m = teacher.shape[0]
    read = share.new_zeros(m + 1, dtype=torch.bool)
    read.index_fill_(0, torch.where(share != 0, number, m).flatten(), True)
    norms = row_norms(theirs, 1.0, None, read[:m])
    return answered_rows(ours, 1.0, theirs, norms, 1.0, None, number, share, ours)


def scale_in_place(values: Tensor, factor: Tensor) -> None:
    """Multiply by a float32 scalar that stays on its device; free of charge where it is 1.

    Args:
        values: without gaps in memory, in any order of its axes.
        factor: a scalar.
    """
    n = values.numel()
    with launching_on(values):
        _scale_kernel[-(-n // _BLOCK),](
            values, factor, n, BLOCK=_BLOCK, num_warps=_WARPS, enable_fp_fusion=True
        )


def _offset_or(offset: Rows | None, other: Rows) -> tuple[Tensor, Tensor]:
    """A kernel takes tensors, those too that it does not read."""
    rows = other if offset is None else offset
    return rows.base, rows.start


def _alignment(*rows: Rows | None) -> int:
    return min(one.alignment for one in rows if one is not None)


def _block(length: int, candidates: int) -> int:
    return min(max(16, _BLOCK // candidates), max(16, _power_of_two(length)))


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()

"""`lattice` in one launch for all pairs of views of a step, whatever their grids.

A program takes one image of one pair: it reads two matrices, works out which of the teacher's
tokens lie inside the source, and then where each student token falls in the teacher's lattice. The
rest comes from a table of a few numbers a pair, which stays on the device from step to step.

All in float64, every product and sum rounded for itself: which centres lie inside the source is
then to the bit what `geometry.inside` says. Bytes moved by formula: 24 a student token and pair
in float64, 16 in float32, all of it written; the matrices are nothing beside. Nothing here was
timed on a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from local_distill.kernels._triton_language import jit, tl
from local_distill.kernels.lattice import snapping_origin
from local_distill.kernels.triton_switch import launching_on
from local_distill.structures import TokenGrid

__all__ = ["LatticePair", "lattice_matches"]

# Tokens that one step of a program's loops takes.
_BLOCK = 256


class LatticePair(NamedTuple):
    """One pair of views: where they stand among all, and their grids."""

    student: int
    teacher: int
    student_grid: TokenGrid
    teacher_grid: TokenGrid


def lattice_matches(
    matrix: Tensor,
    source_size: Tensor,
    pairs: Sequence[LatticePair],
    limit: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest teacher token of every student token, for all pairs of views.

    `lattice.nearest_on_lattice` has the equation. What no lattice serves gives no match.

    Args:
        matrix: (n, b, 3, 3) float64, view → source px.
        source_size: (n, b, 2) integers (height, width).
        pairs: at least one, of grids with at least one token each.
        limit: in larger cell diagonals; a token at or beyond it has no match.
        dtype: of weights and costs, float32 or float64.

    Returns:
        Pair after pair, image after image, token after token, all in a row: the teacher index in
        [0, t), the weight 0 or 1, the cost, infinite where there is no match.
    """
    b = matrix.shape[1]
    count = b * sum(pair.student_grid.num_tokens for pair in pairs)
    index = torch.empty(count, dtype=torch.int64, device=matrix.device)
    weight, cost = torch.empty((2, count), dtype=dtype, device=matrix.device).unbind()
    whole, real = _numbers_on(tuple(pairs), limit, matrix.device)
    with launching_on(matrix):
        _lattice_kernel[b, len(pairs)](
            matrix.contiguous(),
            source_size.contiguous(),
            whole,
            real,
            index,
            weight,
            cost,
            ORIGIN=snapping_origin(torch.float64),
            BLOCK=_BLOCK,
            num_warps=4,
            # Sums that are compared to the bit must not skip a rounding.
            enable_fp_fusion=False,
        )
    return index, weight, cost


@jit
def _cells(
    matrix: tl.tensor, x_stride: tl.tensor, y_stride: tl.tensor, x0: tl.tensor, y0: tl.tensor
) -> tl.tensor:
    """(column, row, 1) → source px, a row of the matrix: along a column, along a row, constant."""
    x, y, one = tl.load(matrix), tl.load(matrix + 1), tl.load(matrix + 2)
    return x * x_stride, y * y_stride, x * x0 + y * y0 + one


@jit
def _cross(
    a: tl.tensor, b: tl.tensor, c: tl.tensor, d: tl.tensor, e: tl.tensor, f: tl.tensor
) -> tl.tensor:
    """Of two rows, (a, b, c) × (d, e, f)."""
    return b * f - c * e, c * d - a * f, a * e - b * d


@jit
def _larger(a: tl.tensor, b: tl.tensor, c: tl.tensor) -> tl.tensor:
    return tl.maximum(tl.maximum(tl.abs(a), tl.abs(b)), tl.abs(c))


@jit
def _is_sound(
    determinant: tl.tensor, lengths: tl.tensor, largest: tl.tensor, constant: tl.tensor
) -> tl.tensor:
    """Finite and not singular, and no numbers of which products might overflow."""
    least = 1e-7 * tl.sqrt(lengths) * tl.maximum(tl.abs(constant), 1e-30)
    return (tl.abs(determinant) > least) & (largest < 1.157e77)


@jit
def _placed(matrix: tl.tensor, size: tl.tensor, x: tl.tensor, y: tl.tensor) -> tl.tensor:
    """Whether view points lie in the closed source rectangle, and their third coordinates."""
    third = tl.load(matrix + 6) * x + tl.load(matrix + 7) * y + tl.load(matrix + 8)
    across = (tl.load(matrix) * x + tl.load(matrix + 1) * y + tl.load(matrix + 2)) / third
    down = (tl.load(matrix + 3) * x + tl.load(matrix + 4) * y + tl.load(matrix + 5)) / third
    height, width = tl.load(size).to(tl.float64), tl.load(size + 1).to(tl.float64)
    inside = (across >= 0.0) & (across <= width) & (down >= 0.0) & (down <= height)
    return inside & (third > 0.0), third


@jit
def _lattice_kernel(
    matrices: tl.tensor,
    sizes: tl.tensor,
    whole: tl.tensor,
    real: tl.tensor,
    indices: tl.tensor,
    weights: tl.tensor,
    costs: tl.tensor,
    ORIGIN: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    image, images = tl.program_id(0), tl.num_programs(0)
    whole += tl.program_id(1) * 7
    real += tl.program_id(1) * 9
    ours = tl.load(whole) * images + image
    theirs = tl.load(whole + 1) * images + image
    rows, cols = tl.load(whole + 2).to(tl.int32), tl.load(whole + 3).to(tl.int32)
    teacher_rows = tl.load(whole + 4).to(tl.int32)
    teacher_cols = tl.load(whole + 5).to(tl.int32)

    # The teacher's lattice: source px → (column, row), by the cofactors C of its cells' matrix.
    matrix, size = matrices + theirs * 9, sizes + theirs * 2
    sx, sy, ox, oy = tl.load(real + 4), tl.load(real + 5), tl.load(real + 6), tl.load(real + 7)
    a, b, c = _cells(matrix, sx, sy, ox, oy)
    d, e, f = _cells(matrix + 3, sx, sy, ox, oy)
    g, h, i = _cells(matrix + 6, sx, sy, ox, oy)
    c00, c01, c02 = _cross(d, e, f, g, h, i)
    c10, c11, c12 = _cross(g, h, i, a, b, c)
    c20, c21, c22 = _cross(a, b, c, d, e, f)
    determinant = a * c00 + b * c01 + c * c02
    wide, high = a * a + d * d, b * b + e * e
    largest = tl.maximum(tl.maximum(_larger(a, b, c), _larger(d, e, f)), _larger(g, h, i))
    good = _is_sound(determinant, wide * high, largest, tl.load(matrix + 8))
    dot = a * b + d * e
    bend = tl.maximum(tl.abs(g), tl.abs(h)) * tl.maximum(teacher_rows, teacher_cols).to(tl.float64)
    good = good & (dot * dot < 1e-10 * (wide * high)) & (bend < 1e-5 * tl.abs(i))
    wide, high = tl.sqrt(wide) / tl.abs(i), tl.sqrt(high) / tl.abs(i)

    # The teacher's tokens inside the source: those of an upright lattice fill a rectangle.
    first_x = tl.full((BLOCK,), 2147483647, tl.int32)
    first_y = tl.full((BLOCK,), 2147483647, tl.int32)
    last_x = tl.full((BLOCK,), -1, tl.int32)
    last_y = tl.full((BLOCK,), -1, tl.int32)
    count = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, teacher_rows * teacher_cols, BLOCK):
        token = start + tl.arange(0, BLOCK)
        x, y = token % teacher_cols, token // teacher_cols
        inside, _ = _placed(matrix, size, ox + sx * x.to(tl.float64), oy + sy * y.to(tl.float64))
        inside = inside & (y < teacher_rows)
        count += inside.to(tl.int32)
        first_x = tl.where(inside, tl.minimum(first_x, x), first_x)
        first_y = tl.where(inside, tl.minimum(first_y, y), first_y)
        last_x = tl.where(inside, tl.maximum(last_x, x), last_x)
        last_y = tl.where(inside, tl.maximum(last_y, y), last_y)
    number = tl.sum(count, 0)
    left, right = tl.min(first_x, 0), tl.max(last_x, 0)
    top, bottom = tl.min(first_y, 0), tl.max(last_y, 0)
    good = good & (number > 0)
    good = good & (number == (right - left + 1) * (bottom - top + 1))
    left, right = left.to(tl.float64) + ORIGIN, right.to(tl.float64) + ORIGIN
    top, bottom = top.to(tl.float64) + ORIGIN, bottom.to(tl.float64) + ORIGIN

    # The student's cells, and they in the teacher's lattice.
    matrix, size = matrices + ours * 9, sizes + ours * 2
    sx, sy, ox, oy = tl.load(real), tl.load(real + 1), tl.load(real + 2), tl.load(real + 3)
    a, b, c = _cells(matrix, sx, sy, ox, oy)
    d, e, f = _cells(matrix + 3, sx, sy, ox, oy)
    g, h, i = _cells(matrix + 6, sx, sy, ox, oy)
    k00, k01, k02 = _cross(d, e, f, g, h, i)
    k10, k11, k12 = _cross(g, h, i, a, b, c)
    largest = tl.maximum(tl.maximum(_larger(a, b, c), _larger(d, e, f)), _larger(g, h, i))
    lengths = (a * a + d * d) * (b * b + e * e)
    good = good & _is_sound(a * k00 + b * k01 + c * k02, lengths, largest, tl.load(matrix + 8))
    # The inverse is the transpose of the cofactors by the determinant.
    u0, u1 = c00 * a + c10 * d + c20 * g, c00 * b + c10 * e + c20 * h
    u2 = c00 * c + c10 * f + c20 * i
    v0, v1 = c01 * a + c11 * d + c21 * g, c01 * b + c11 * e + c21 * h
    v2 = c01 * c + c11 * f + c21 * i
    w0, w1 = c02 * a + c12 * d + c22 * g, c02 * b + c12 * e + c22 * h
    w2 = c02 * c + c12 * f + c22 * i

    limit = tl.where(good, tl.load(real + 8), 0.0)  # no cost is below 0
    tokens = rows * cols
    first = tl.load(whole + 6) * images + image.to(tl.int64) * tokens
    for start in range(0, tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        x, y = (token % cols).to(tl.float64), (token // cols).to(tl.float64)
        inside, third = _placed(matrix, size, ox + sx * x, oy + sy * y)
        # Squared diagonal of the student's cell, as `lattice.lattice_students` has it.
        one, two = k02 * y - k01, k12 * y - k11
        squared = one * one + two * two
        one, two = k00 - k02 * x, k10 - k12 * x
        squared += one * one + two * two
        third *= third
        squared = tl.maximum(squared / (third * third), wide * wide + high * high)
        # At or beyond the horizon, which is outside the source; no 0/0 then.
        third = (w0 * x + w1 * y + w2) / determinant
        third = tl.maximum(third, 2.2250738585072014e-308) * determinant
        across = (u0 * x + u1 * y + u2) / third + ORIGIN
        down = (v0 * x + v1 * y + v2) / third + ORIGIN
        column = tl.minimum(tl.maximum(tl.ceil(across - 0.5), left), right)
        row = tl.minimum(tl.maximum(tl.ceil(down - 0.5), top), bottom)
        one, two = (across - column) * wide, (down - row) * high
        cost = tl.sqrt((one * one + two * two) / squared)
        keep = inside & (cost < limit)
        index = (row - ORIGIN).to(tl.int64) * teacher_cols + (column - ORIGIN).to(tl.int64)
        place = first + token
        kind = costs.dtype.element_ty
        tl.store(indices + place, tl.where(keep, index, 0), mask=token < tokens)
        tl.store(weights + place, keep.to(kind), mask=token < tokens)
        cost = tl.where(keep, cost, float("inf"))
        tl.store(costs + place, cost.to(kind), mask=token < tokens)


@functools.lru_cache(maxsize=64)  # a training has the same few lists of grids at every step
def _numbers_on(
    pairs: tuple[LatticePair, ...], limit: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Of each pair what its programs need, int64 and float64; shared, not to be written to."""
    whole, real, first = [], [], 0
    for student, teacher, ours, theirs in pairs:
        whole.append([student, teacher, ours.rows, ours.cols, theirs.rows, theirs.cols, first])
        real.append([*ours.stride, *ours.offset, *theirs.stride, *theirs.offset, limit])
        first += ours.num_tokens
    # By way of the CPU and not blocking: the host need not wait for the device to take the numbers.
    return (
        torch.tensor(whole, dtype=torch.int64, device="cpu").to(device, non_blocking=True),
        torch.tensor(real, dtype=torch.float64, device="cpu").to(device, non_blocking=True),
    )

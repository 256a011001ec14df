"""One block of images of the fused prototype loss: its rows, their scores, loss and slopes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from local_distill._precision import widest
from local_distill.kernels.byte_budget import block_length, slices
from local_distill.kernels.exponential import exp_

__all__ = ["Product", "Rows", "loss_and_slope", "rows_of"]

# Above so many candidates a token, answers are a product of matrices.
_FEW_CANDIDATES = 8
# Tables of the size of a block of rows that are alive at once.
_TABLES = 2
# Whether torch can sum products of half precision in float32; it came with 2.8.
_CAN_WIDEN = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)


class Product(NamedTuple):
    """How scores come from features: scale · features · weightᵀ + offset."""

    weight: Tensor  # in the type that products are done in
    scale: Tensor
    offset: Tensor | None
    dtype: torch.dtype  # what they are summed in, and all else is done in

    def scores(self, features: Tensor, columns: slice) -> Tensor:
        """(n, columns), a new table."""
        weight = self.weight[columns]
        if weight.dtype != self.dtype:
            table = self._multiply(features, weight.T).mul_(self.scale)
            return table if self.offset is None else table.add_(self.offset[columns])
        scaled = features.to(self.dtype) * self.scale
        if self.offset is None:
            return scaled @ weight.T
        return torch.addmm(self.offset[columns].to(self.dtype), scaled, weight.T)

    def add_slope_(self, slope: Tensor, table: Tensor, columns: slice) -> None:
        """Add the gradient in the features, table · weight, but for the scale."""
        weight = self.weight[columns]
        if weight.dtype == self.dtype:
            slope.addmm_(table, weight)
        else:
            slope.add_(self._multiply(table, weight))

    def add_weight_slope_(
        self, slope: Tensor, table: Tensor, features: Tensor, factor: Tensor
    ) -> None:
        """Add the gradient in some prototypes, factor · tableᵀ · features, but for the scale."""
        if self.weight.dtype == self.dtype:
            slope.addmm_(table.T, features.to(self.dtype) * factor)
        else:
            slope.add_(self._multiply(table.T, features).mul_(factor))

    def _multiply(self, left: Tensor, right: Tensor) -> Tensor:
        """Of numbers in half precision, summed in float32."""
        left, right = left.to(self.weight.dtype), right.to(self.weight.dtype)
        if left.is_cuda and _CAN_WIDEN:
            return torch.mm(left, right, out_dtype=self.dtype)
        return left.to(self.dtype) @ right.to(self.dtype)


class _Norm(NamedTuple):
    """The logsumexp of rows, in two parts: together they would be rounded as their sum is."""

    peak: Tensor  # (n, 1)
    log_sum: Tensor  # (n, 1)

    def taken_from_(self, scores: Tensor, rows: slice) -> Tensor:
        """Log-probabilities, in place."""
        return scores.sub_(self.peak[rows]).sub_(self.log_sum[rows])


class Rows(NamedTuple):
    """The tokens of some images that take part: n of the student's, m of the teacher's."""

    student: Tensor  # (n, d)
    teacher: Tensor  # (m, e)
    place: Tensor | None  # (n,) where they stand among all of the student's, None: all do
    mass: Tensor  # (n, 1), of the largest
    number: Tensor  # (n, k) row of the teacher's, m: none
    share: Tensor  # (n, k), of the largest mass
    largest: Tensor  # the mass that all are divided by, so that no slope is small in half precision

    def answer(self, probs: Tensor, rows: slice) -> Tensor:
        """(rows, columns) what the teacher's distributions (m + 1, columns) say of some rows."""
        number, share = self.number[rows], self.share[rows]
        if number.shape[1] > _FEW_CANDIDATES:
            table = share.new_zeros(number.shape[0], probs.shape[0])
            return table.scatter_add_(1, number, share) @ probs
        return nn.functional.embedding_bag(number, probs, mode="sum", per_sample_weights=share)


def rows_of(
    student: Tensor, teacher: Tensor, index: Tensor, share: Tensor, dtype: torch.dtype
) -> Rows:
    """The rows that take part, as far as their number can be known without waiting for a device."""
    numbered = _numbered(student, teacher, index, share, dtype)
    return _kept_rows(*numbered) if student.device.type == "cpu" else _all_rows(*numbered)


def _numbered(
    student: Tensor, teacher: Tensor, index: Tensor, share: Tensor, dtype: torch.dtype
) -> tuple[Rows, Tensor, Tensor]:
    """All rows, those of all images numbered on; which (n,) are answered, which (m,) are read."""
    images, tokens = teacher.shape[:2]
    none = images * tokens
    first = tokens * torch.arange(images, device=index.device)[:, None, None]
    # != and not >: a weight of NaN is to be seen in the loss
    number = torch.where(share != 0, index + first, none).flatten(0, 1)
    shares = share.to(dtype).flatten(0, 1)
    mass = shares.sum(-1, keepdim=True)
    largest = mass.amax() if mass.numel() else mass.sum()
    largest = torch.where(largest > 0, largest, torch.where(largest == 0, 1.0, largest))
    read = torch.zeros(none + 1, dtype=torch.bool, device=index.device)
    read.index_fill_(0, number.flatten(), True)
    relative = mass / largest, number, shares / largest, largest
    rows = Rows(student.flatten(0, 1), teacher.flatten(0, 1), None, *relative)
    return rows, mass[:, 0] != 0, read[:none]


def _all_rows(rows: Rows, answered: Tensor, read: Tensor) -> Rows:
    """All, those that take no part set to zero: 0 · NaN is NaN."""
    student = torch.where(answered[:, None], rows.student, 0.0)
    return rows._replace(student=student, teacher=torch.where(read[:, None], rows.teacher, 0.0))


def _kept_rows(rows: Rows, answered: Tensor, read: Tensor) -> Rows:
    """Those that take part; the teacher's are numbered anew."""
    place = answered.nonzero()[:, 0]
    anew = torch.cat((read.cumsum(0) - 1, read.sum()[None]))
    return Rows(
        rows.student[place],
        rows.teacher[read],
        place,
        rows.mass[place],
        anew[rows.number[place]],
        rows.share[place],
        rows.largest,
    )


def loss_and_slope(
    rows: Rows,
    ours: Product,
    theirs: Product,
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
    tiles = list(slices(c, max_bytes // column_bytes))
    norm = teacher_norm = None
    if len(tiles) > 1:
        norm = _norm(ours, rows.student, tiles)
        teacher_norm = _norm(theirs, rows.teacher, tiles)
    for columns in tiles:
        probs = _distributions(theirs, rows.teacher, columns, teacher_norm)
        table = ours.scores(rows.student, columns)
        for block in _row_blocks(table):
            total += _slope_(table[block], rows.answer(probs, block), rows.mass[block], norm, block)
        if slope is not None:
            ours.add_slope_(slope, table, columns)
        if weight_slope is not None:
            ours.add_weight_slope_(weight_slope[columns], table, rows.student, rows.largest)
    if slope is not None:
        slope.mul_(rows.largest)
    return total * rows.largest, slope


def _slope_(
    scores: Tensor, answer: Tensor, mass: Tensor, norm: _Norm | None, rows: slice
) -> Tensor:
    """Turn the scores of some rows into the gradient in them, in place; their part of the loss.

    With ``norm`` they may be a tile of the rows; without, they are the whole of them.
    """
    if norm is not None:
        gain = torch.dot(answer.flatten(), norm.taken_from_(scores, rows).flatten())
        exp_(scores).mul_(mass).sub_(answer)
        return -gain
    gain = torch.dot(answer.flatten(), scores.sub_(scores.amax(-1, keepdim=True)).flatten())
    total = exp_(scores).sum(-1, keepdim=True)
    scores.mul_(mass / total).sub_(answer)
    return (mass * total.log()).sum() - gain


def _distributions(
    product: Product, features: Tensor, columns: slice, norm: _Norm | None
) -> Tensor:
    """(m + 1, columns) of the softmax; the last row is zero, for candidates of no weight."""
    m = features.shape[0]
    probs = product.scores(nn.functional.pad(features, (0, 0, 0, 1)), columns)
    for block in _row_blocks(probs[:m]) if m else ():
        rows = probs[:m][block]
        if norm is not None:
            exp_(norm.taken_from_(rows, block))
        else:
            exp_(rows.sub_(rows.amax(-1, keepdim=True)))
            rows.div_(rows.sum(-1, keepdim=True))
    probs[m:] = 0.0
    return probs


def _norm(product: Product, features: Tensor, tiles: list[slice]) -> _Norm:
    """Of each row's scores over all tiles."""
    peak = features.new_full((features.shape[0], 1), -torch.inf, dtype=product.dtype)
    total = torch.zeros_like(peak)
    for columns in tiles:
        scores = product.scores(features, columns)
        for block in _row_blocks(scores):
            rows = scores[block]
            higher = torch.maximum(peak[block], rows.amax(-1, keepdim=True))
            part = exp_(rows.sub_(higher)).sum(-1, keepdim=True)
            total[block] = total[block] * (peak[block] - higher).exp() + part
            peak[block] = higher
    return _Norm(peak, total.log())


def _row_blocks(table: Tensor) -> Iterator[slice]:
    """Rows so few at a time that what is done to them stays in the caches."""
    return slices(table.shape[0], block_length(table[0].nbytes * _TABLES, table.device))

"""What the questions take, by formula: flops and bytes that no way of answering can do without."""

from __future__ import annotations

import torch

from local_distill.benchmarking.cases import Work
from local_distill.benchmarking.sizes import Step

__all__ = [
    "loss_from_logits_work",
    "loss_from_prototypes_work",
    "nearest_work",
    "prototype_product_flops",
    "similarity_product_flops",
    "similarity_work",
]

_ANSWER_BYTES = 8 + 4 + 4  # of one student token: index, weight, cost
_GEOMETRY_BYTES = 9 * 4 + 4 * 4  # of one view: matrix and sizes
_SOFTMAX = 5  # largest, difference, exponential, sum, quotient
_ANSWERED = 3  # of a student's entry and one teacher view: product, sum, and a place in the slope


def nearest_work(step: Step, batch: int) -> Work:
    """Nearest token by place: two coordinates, each two multiplications, additions and roundings.

    Bytes are those of the views' geometries, and of one answer a student token and pair. That a
    table of all pairs of tokens takes far more is the point.
    """
    answers = _answers(step, batch)
    views = len(step.student) + len(step.teacher)
    return Work(12 * answers, batch * views * _GEOMETRY_BYTES + answers * _ANSWER_BYTES)


def similarity_product_flops(step: Step, batch: int) -> float:
    """Of the products of all pairs' features, 2·b·s·t·d each."""
    total = 0
    for v, q in step.pairs:
        f, g = step.student[v], step.teacher[q]
        assert f.features is not None
        total += 2 * batch * f.num_tokens * g.num_tokens * f.features.shape[-1]
    return float(total)


def similarity_work(step: Step, batch: int) -> Work:
    """The products; each view's features read once, one answer a student token and pair."""
    views = [view.features for view in (*step.student, *step.teacher)]
    read = sum(features.nbytes for features in views if features is not None)
    written = _answers(step, batch) * _ANSWER_BYTES
    return Work(similarity_product_flops(step, batch), read + written)


def loss_from_logits_work(
    student_rows: int, teacher_rows: int, answered_rows: int, prototypes: int, dtype: torch.dtype
) -> Work:
    """Both networks' logits read once, the student's gradient written once.

    Args:
        student_rows: of all student views and images.
        teacher_rows: of all teacher views and images.
        answered_rows: student rows, each once for every teacher view that answers it.
        prototypes: c.
        dtype: of the logits.
    """
    flops = _SOFTMAX * (student_rows + teacher_rows) + _ANSWERED * answered_rows
    moved = (2 * student_rows + teacher_rows) * dtype.itemsize
    return Work(float(flops * prototypes), float(moved * prototypes))


def prototype_product_flops(
    student_rows: int, teacher_rows: int, prototypes: int, features: int
) -> float:
    """Forward of both networks, and backward to the student's features and prototypes."""
    return 2.0 * prototypes * features * (3 * student_rows + teacher_rows)


def loss_from_prototypes_work(
    student_rows: int,
    teacher_rows: int,
    answered_rows: int,
    prototypes: int,
    features: int,
    dtype: torch.dtype,
) -> Work:
    """The products and the loss; features and prototypes read, the student's gradients written."""
    loss = loss_from_logits_work(student_rows, teacher_rows, answered_rows, prototypes, dtype)
    products = prototype_product_flops(student_rows, teacher_rows, prototypes, features)
    numbers = (2 * student_rows + teacher_rows + 3 * prototypes) * features
    return Work(products + loss.flops, float(numbers * dtype.itemsize))


def _answers(step: Step, batch: int) -> int:
    return batch * sum(step.student[v].num_tokens for v, _ in step.pairs)

"""Steps changed in ways whose effect on a loss is known."""

from __future__ import annotations

import torch
from torch import Tensor

from local_distill.structures import Matches
from local_distill.testing.loss_properties._registry import LossExample, Pair


def doubled(example: LossExample) -> LossExample:
    """The example in float64, in which rounding hides nothing."""
    example = cast(example, torch.float64)
    return example._replace(
        matches=None
        if example.matches is None
        else {
            pair: found._replace(weight=found.weight.double(), cost=found.cost.double())
            for pair, found in example.matches.items()
        }
    )


def cast(example: LossExample, dtype: torch.dtype) -> LossExample:
    """The example with logits of this type."""
    return example._replace(
        student_logits=[logits.to(dtype) for logits in example.student_logits],
        teacher_logits=[logits.to(dtype) for logits in example.teacher_logits],
    )


def redrawn(example: LossExample, number: int) -> LossExample:
    """Another step of the same shapes, whose logits have a mean that a center notices."""
    generator = torch.Generator().manual_seed(1000 * number + example.seed)

    def drawn(logits: Tensor) -> Tensor:
        tilt = torch.linspace(-1.0, 2.0, logits.shape[-1])
        return (torch.randn(logits.shape, generator=generator) + tilt).to(logits.dtype)

    return example._replace(
        student_logits=[drawn(logits) for logits in example.student_logits],
        teacher_logits=[drawn(logits) for logits in example.teacher_logits],
    )


def pairs_of(example: LossExample) -> list[Pair]:
    """The pairs of views that take part."""
    if example.matches is not None:
        return list(example.matches)
    if example.pairs is not None:
        return example.pairs
    students, teachers = len(example.student_logits), len(example.teacher_logits)
    return [(v, q) for v in range(students) for q in range(teachers) if v != q]


def with_pairs(example: LossExample, pairs: list[Pair]) -> LossExample:
    """The same step with these pairs of views alone."""
    if example.matches is None:
        return example._replace(pairs=pairs)
    return example._replace(matches={pair: example.matches[pair] for pair in pairs})


def map_matches(example: LossExample, **parts: dict[Pair, Tensor]) -> LossExample:
    """The same step with these parts of its matches, such as ``weight={pair: tensor}``."""
    changed = {
        pair: found._replace(**{name: part[pair] for name, part in parts.items()})
        for pair, found in matches_of(example).items()
    }
    return example._replace(matches=changed)


def matches_of(example: LossExample) -> dict[Pair, Matches]:
    """The matches of a local example."""
    if example.matches is None:
        raise AssertionError("an example of a local loss needs `matches`")
    return example.matches


def unmatched(example: LossExample) -> list[Tensor]:
    """Per student view (b, s) bool: no pair has a match for the token."""
    free = [torch.ones(logits.shape[:2], dtype=torch.bool) for logits in example.student_logits]
    for (v, _), found in matches_of(example).items():
        free[v] = free[v] & ~found.matched
    return free


def unreferenced(example: LossExample) -> list[Tensor]:
    """Per teacher view (b, t) bool: no match of any pair refers to the token."""
    free = [torch.ones(logits.shape[:2], dtype=torch.bool) for logits in example.teacher_logits]
    for (_, q), found in matches_of(example).items():
        weight, index = found.weight.flatten(1), found.teacher_index.flatten(1)
        total = torch.zeros(free[q].shape, dtype=weight.dtype).scatter_add(1, index, weight)
        free[q] = free[q] & (total == 0)
    return free


def filled(views: list[Tensor], where: list[Tensor], value: float) -> list[Tensor]:
    """Views whose rows (b, n) of ``where`` hold this value."""
    return [
        torch.where(rows[..., None], value, logits)
        for logits, rows in zip(views, where, strict=True)
    ]


def permutation(size: int, generator: torch.Generator) -> Tensor:
    """An order that is not the old one, wherever there is another."""
    order = torch.randperm(size, generator=generator)
    return order.roll(1) if bool((order == torch.arange(size)).all()) else order

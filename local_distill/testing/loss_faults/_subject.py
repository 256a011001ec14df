"""How a loss is made and called, and the steps that it is tried on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from local_distill.structures import Matches

Pair = tuple[int, int]

# Tokens of each view: a student view and the teacher view of its number are the same view.
SIZES = (6, 4, 5, 3)
# Of tokens, or prototypes: what the last axis holds.
DIM = 5


class LossStep(NamedTuple):
    """What a loss is called with in one step.

    Attributes:
        student: per view (b, c), or (b, n_v, c) for a subject with ``tokens``: logits or features.
        teacher: per view, likewise; teacher view q is the same view as student view q.
        matches: ``{(v, q): Matches}`` of all pairs of different views, two candidates each; for
            whole views each is one token that the other answers.
        valid: per student view (b, n_v) bool: tokens that have a match, in every pair.
        temp: a temperature above 0, that of the teacher for instance; it changes from step to step.
    """

    student: list[Tensor]
    teacher: list[Tensor]
    matches: dict[Pair, Matches]
    valid: list[Tensor]
    temp: float = 0.1


class LossSubject(NamedTuple):
    """How a loss is made, and how it is called on a `LossStep`.

    Attributes:
        make: makes a new loss for c prototypes, or channels. Every call that is tried gets a new
            one, always from the same random seed.
        call: ``call(loss, step)`` gives the scalar. What it has no use for it leaves out.
        tokens: whether the loss takes views of tokens (b, n, c), not whole views (b, c).
        oracle: the truth of a new loss's first step, in float64, differentiable; None: the loss
            itself in float64, whose value must not depend on the order of the images.
        with_temp: does what has to be refused with a temperature that is not above 0, such as
            making a loss; None: there is no other temperature than the step's.

    Example:
        >>> from local_distill import Centering, LocalDistillationLoss
        >>> subject = LossSubject(
        ...     make=lambda c: LocalDistillationLoss(Centering(c)),
        ...     call=lambda loss, step: loss(
        ...         step.student, step.teacher, step.matches, teacher_temp=step.temp),
        ...     tokens=True,
        ... )
    """

    make: Callable[[int], nn.Module]
    call: Callable[[Any, LossStep], Tensor]
    tokens: bool = False
    oracle: Callable[[LossStep], Tensor] | None = None
    with_temp: Callable[[float], object] | None = None


def drawn(
    subject: LossSubject,
    seed: int = 0,
    *,
    students: int = 2,
    teachers: int = 2,
    images: int = 3,
    dim: int = DIM,
    sizes: Sequence[int] = SIZES,
    factor: float = 1.0,
    temp: float = 0.1,
) -> LossStep:
    """A step in float32. Token 0 is matched, and answers; the last one does neither."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(images, n, dim) if subject.tokens else (images, dim) for n in sizes]

    def numbers(views: int) -> list[Tensor]:
        # A mean that a center notices.
        tilt = torch.linspace(-0.5, 1.0, dim)
        return [factor * (torch.randn(s, generator=generator) + tilt) for s in shapes[:views]]

    student, teacher = numbers(students), numbers(teachers)
    counts = list(sizes) if subject.tokens else [1] * len(sizes)
    valid = []
    for n in counts[:students]:
        keep = torch.rand(images, n, generator=generator) > 0.3
        keep[:, 0] = True
        if n > 1:
            keep[:, -1] = False
        valid.append(keep)
    matches = {
        (v, q): _matches(valid[v], counts[q], generator)
        for v in range(students)
        for q in range(teachers)
        if v != q
    }
    return LossStep(student, teacher, matches, valid, temp)


def _matches(valid: Tensor, tokens: int, generator: torch.Generator) -> Matches:
    shape = (*valid.shape, 2)
    index = torch.randint(0, max(1, tokens - 1), shape, generator=generator)
    index[:, :1, 0] = 0
    # 64ths, which every dtype and sum holds exactly
    weight = torch.randint(4, 33, shape, generator=generator) / 64
    weight = weight * valid[..., None]
    cost = torch.where(valid, 1 - weight.sum(-1), torch.inf)
    return Matches(index, weight, cost)


def cast(step: LossStep, dtype: torch.dtype) -> LossStep:
    """The step with student and teacher in this dtype."""
    return mapped(step, lambda values: values.to(dtype))


def mapped(step: LossStep, change: Callable[[Tensor], Tensor]) -> LossStep:
    """The step with every view of student and teacher changed."""
    return step._replace(
        student=[change(view) for view in step.student],
        teacher=[change(view) for view in step.teacher],
    )


def images_of(step: LossStep, index: Sequence[int]) -> LossStep:
    """The step of these images alone, in this order."""
    pick = list(index)
    return LossStep(
        [view[pick] for view in step.student],
        [view[pick] for view in step.teacher],
        {pair: Matches(*(part[pick] for part in found)) for pair, found in step.matches.items()},
        [keep[pick] for keep in step.valid],
        step.temp,
    )


def spoilt(views: list[Tensor], bad: float, token: int = 0) -> list[Tensor]:
    """Views in whose first image one number, of this token, is bad."""
    changed = [view.clone() for view in views]
    for view in changed:
        (view[0, token] if view.dim() == 3 else view[0])[1 % view.shape[-1]] = bad
    return changed

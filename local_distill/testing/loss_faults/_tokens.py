"""Tokens without a direction, all alike, none at all, and grids that differ."""

from __future__ import annotations

import torch

from local_distill.testing.loss_faults._cases import CASES
from local_distill.testing.loss_faults._comparing import (
    ensure_right,
    ensure_true,
    measured,
    needs_teacher,
    needs_tokens,
    new,
    truth,
)
from local_distill.testing.loss_faults._subject import LossStep, LossSubject, drawn, mapped
from local_distill.testing.properties import ensure


def _agrees_with_itself(subject: LossSubject, step: LossStep, what: str) -> None:
    """Finite, and as in float64, where a plain oracle would divide by zero."""
    outcome = measured(subject, new(subject), step)
    finite = all(bool(part.isfinite().all()) for part in (outcome.value, *outcome.slopes))
    ensure(finite, f"{what}: the loss or its gradient is not finite")
    ensure_true(outcome, truth(subject._replace(oracle=None), step), step, what)


def _zeroed(views: list[torch.Tensor]) -> list[torch.Tensor]:
    changed = [view.clone() for view in views]
    for view in changed:
        (view[0, 0] if view.dim() == 3 else view[0]).zero_()
    return changed


@CASES.case("tokens", "student row of zero norm")
def _zero_student(subject: LossSubject) -> None:
    step = drawn(subject, 11)
    _agrees_with_itself(subject, step._replace(student=_zeroed(step.student)), "a row of zeros")


@CASES.case("tokens", "teacher row of zero norm")
def _zero_teacher(subject: LossSubject) -> None:
    needs_teacher(subject)
    step = drawn(subject, 12)
    _agrees_with_itself(subject, step._replace(teacher=_zeroed(step.teacher)), "a row of zeros")


@CASES.case("tokens", "duplicates")
def _alike(subject: LossSubject) -> None:
    row = torch.tensor([0.5, -1.0, 2.0, 0.25, 1.5])
    step = mapped(drawn(subject, 13), lambda view: row.expand(view.shape).clone())
    _agrees_with_itself(subject, step, "all rows alike")


@CASES.case("tokens", "rows of length 1e-18 and 1e18")
def _long_and_short(subject: LossSubject) -> None:
    for length in (1e-18, 1e18):
        step = drawn(subject, 14, factor=length)
        outcome = measured(subject, new(subject), step)
        finite = all(bool(part.isfinite().all()) for part in (outcome.value, *outcome.slopes))
        ensure(finite, f"rows of {length}: the loss or its gradient is not finite")


@CASES.case("tokens", "nothing is matched")
def _unmatched(subject: LossSubject) -> None:
    needs_tokens(subject)
    step = drawn(subject, 15)
    empty = {
        pair: found._replace(
            weight=torch.zeros_like(found.weight), cost=torch.full_like(found.cost, torch.inf)
        )
        for pair, found in step.matches.items()
    }
    flags = [torch.zeros_like(keep) for keep in step.valid]
    step = step._replace(matches=empty, valid=flags)
    outcome = measured(subject, new(subject), step)
    if subject.oracle is not None:
        ensure_true(outcome, truth(subject, step), step, "nothing is matched")
        return
    ensure(float(outcome.value) == 0, f"the loss is {float(outcome.value)} instead of 0")
    ensure(not any(bool(slope.any()) for slope in outcome.slopes), "there is a gradient")


@CASES.case("tokens", "1 × 1 grids")
def _single(subject: LossSubject) -> None:
    needs_tokens(subject)
    ensure_right(subject, drawn(subject, 16, sizes=(1, 1)), "one token a view")


@CASES.case("tokens", "4 × 7 beside 2 × 3")
def _unequal(subject: LossSubject) -> None:
    needs_tokens(subject)
    ensure_right(subject, drawn(subject, 17, sizes=(28, 6)), "28 tokens beside 6")

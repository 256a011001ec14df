"""NaN and infinity: they are seen, or touch nothing; they never stay."""

from __future__ import annotations

import copy
from typing import Literal

import torch

from local_distill.testing.loss_faults._cases import CASES
from local_distill.testing.loss_faults._comparing import (
    ensure_equal,
    ensure_finite_state,
    ensure_right,
    measured,
    needs_teacher,
    needs_tokens,
    outcomes_alike,
    trained,
    value_of,
)
from local_distill.testing.loss_faults._subject import (
    LossStep,
    LossSubject,
    drawn,
    images_of,
    spoilt,
)
from local_distill.testing.properties import ensure

Side = Literal["student", "teacher"]


def _with(step: LossStep, side: Side, bad: float, token: int = 0) -> LossStep:
    if side == "student":
        return step._replace(student=spoilt(step.student, bad, token))
    return step._replace(teacher=spoilt(step.teacher, bad, token))


def _bad(title: str, side: Side, bad: float) -> None:
    @CASES.case("numbers", title)
    def case(subject: LossSubject) -> None:
        if side == "teacher":
            needs_teacher(subject)
        before = trained(subject)
        step, later = drawn(subject, 2), drawn(subject, 3)
        loss = copy.deepcopy(before)
        value = measured(subject, loss, _with(step, side, bad)).value
        ensure_finite_state(loss, f"after {title}")
        others = images_of(step, [1, 2])
        if bool(value.isfinite()):
            # Not seen: then the image must count for nothing.
            left_out = value_of(subject, copy.deepcopy(before).eval(), others).detach()
            ensure(
                torch.allclose(value, left_out, rtol=1e-5, atol=1e-6),
                f"{title}: the loss is {float(value):.9g}, and without the image "
                f"{float(left_out):.9g}",
            )
        found = measured(subject, loss, later)
        # A bad student says nothing of the teacher, whose step counts. Of a bad teacher the whole
        # step is left out, or the image.
        as_if = [step] if side == "student" else [None, others]
        for one in as_if:
            clean = copy.deepcopy(before)
            if one is not None:
                measured(subject, clean, one)
            if outcomes_alike(found, measured(subject, clean, later), 1e-6 if one else 0.0):
                return
        raise AssertionError(
            f"after {title} the next step's loss is {float(found.value):.9g}, which it is neither "
            "without the step nor without the image"
        )


for _side in ("student", "teacher"):
    _bad(f"NaN in the {_side}", _side, torch.nan)
    _bad(f"infinity in the {_side}", _side, torch.inf)


def _unseen(title: str, side: Side) -> None:
    @CASES.case("numbers", title)
    def case(subject: LossSubject) -> None:
        needs_tokens(subject)
        if side == "teacher":
            needs_teacher(subject)
        before, step, later = trained(subject), drawn(subject, 2), drawn(subject, 3)
        wanted = measured(subject, copy.deepcopy(before), step)
        for bad in (torch.nan, torch.inf):
            loss = copy.deepcopy(before)
            bad_step = _with(step, side, bad, token=-1)
            found = measured(subject, loss, bad_step)
            if subject.oracle is None:
                ensure_equal(found, wanted, f"{bad} in {side} tokens without a match", share=1e-6)
            else:
                ensure_right(subject, bad_step, f"{bad} in {side} tokens without a match")
            ensure_finite_state(loss, f"after {bad}")
            value = measured(subject, loss, later).value
            ensure(bool(value.isfinite()), f"after {bad} the next loss is {float(value)}")


_unseen("NaN in a student token without a match", "student")
_unseen("NaN in a teacher token that answers none", "teacher")

"""How many views and images there are, and those that do not fit."""

from __future__ import annotations

import copy

from local_distill.testing.loss_faults._cases import CASES
from local_distill.testing.loss_faults._comparing import (
    ensure_equal,
    ensure_right,
    has_teacher,
    measured,
    needs_teacher,
    new,
    trained,
)
from local_distill.testing.loss_faults._subject import LossSubject, drawn, images_of
from local_distill.testing.properties import ensure


def _counts(title: str, students: int, teachers: int, *, teacher: bool = False) -> None:
    @CASES.case("views", title)
    def case(subject: LossSubject) -> None:
        if teacher:
            needs_teacher(subject)
        ensure_right(subject, drawn(subject, 20, students=students, teachers=teachers), title)


_counts("no local views", 2, 2)
_counts("one view", 1, 1)
_counts("two local sizes", 4, 2)
_counts("one teacher view", 2, 1, teacher=True)
_counts("more teacher than student views", 1, 3, teacher=True)


@CASES.case("views", "batch of 1")
def _one_image(subject: LossSubject) -> None:
    ensure_right(subject, drawn(subject, 21, images=1), "one image")


@CASES.case("views", "batch of 0")
def _no_image(subject: LossSubject) -> None:
    before, later = trained(subject), drawn(subject, 22)
    loss = copy.deepcopy(before)
    outcome = measured(subject, loss, images_of(drawn(subject, 23), []))
    ensure(float(outcome.value) == 0, f"without images the loss is {float(outcome.value)}")
    wanted = measured(subject, copy.deepcopy(before), later)
    ensure_equal(measured(subject, loss, later), wanted, "the step after one without images")


@CASES.case("views", "teacher batch 1 against 2")
def _batches(subject: LossSubject) -> None:
    step = images_of(drawn(subject, 24), [0, 1])
    if has_teacher(subject):
        step = step._replace(teacher=[view[:1] for view in step.teacher])
    else:
        step = step._replace(student=[*step.student[:-1], step.student[-1][:1]])
    subject.call(new(subject), step)
    raise AssertionError("a batch of 1 was broadcast")


@CASES.case("views", "student c = 1 against c = 16")
def _prototypes(subject: LossSubject) -> None:
    step = drawn(subject, 25, dim=16)
    narrow = [view[..., :1] for view in step.student]
    kept = [] if has_teacher(subject) else step.student[1:]
    step = step._replace(student=narrow[: len(narrow) - len(kept)] + kept)
    subject.call(new(subject, 16), step)
    raise AssertionError("c = 1 was broadcast")

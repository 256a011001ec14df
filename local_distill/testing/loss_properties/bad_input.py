"""Inputs that do not fit are refused by name, and no state moves."""

from __future__ import annotations

from local_distill.structures import Matches
from local_distill.testing.loss_properties._changing import matches_of, pairs_of, with_pairs
from local_distill.testing.loss_properties._registry import (
    ANY,
    LOCAL,
    LossExample,
    LossFactory,
    loss_property,
)
from local_distill.testing.loss_properties._running import call, ensure_same_state, make, state_of

__all__ = [
    "bare_tensors_are_refused",
    "batches_that_differ_are_refused",
    "integer_logits_are_refused",
    "matches_of_other_tokens_are_refused",
    "prototypes_that_differ_are_refused",
    "temperatures_must_be_above_zero",
    "views_that_are_not_there_are_refused",
]


@loss_property(kinds=ANY, max_examples=5)
def batches_that_differ_are_refused(factory: LossFactory, example: LossExample) -> None:
    """A batch of 1 against one of 2 or 3 is an error that is a ValueError, not a broadcast."""
    students = [logits[:1] for logits in example.student_logits]
    teachers = [logits[:1] for logits in example.teacher_logits]
    _ensure_refused(factory, example._replace(student_logits=students), "1 student image")
    _ensure_refused(factory, example._replace(teacher_logits=teachers), "1 teacher image")


@loss_property(kinds=ANY, max_examples=5)
def prototypes_that_differ_are_refused(factory: LossFactory, example: LossExample) -> None:
    """Student and teacher logits of different width, 1 among them, are a ValueError."""
    for c in (1, example.student_logits[0].shape[-1] - 1):
        students = [logits[..., :c] for logits in example.student_logits]
        teachers = [logits[..., :c] for logits in example.teacher_logits]
        own = example.student_logits[0].shape[-1]
        narrow = example._replace(student_logits=students)
        _ensure_refused(factory, narrow, f"{c} student prototypes", own)
        narrow = example._replace(teacher_logits=teachers)
        _ensure_refused(factory, narrow, f"{c} teacher prototypes", own)


@loss_property(kinds=ANY, max_examples=5)
def bare_tensors_are_refused(factory: LossFactory, example: LossExample) -> None:
    """A tensor in place of a list of views would be cut along its batch: a ValueError."""
    # as many images as views: nothing else is wrong with it
    pair = pairs_of(example)[0]
    single = with_pairs(example, [pair])
    b = example.student_logits[0].shape[0]
    n = max(pair) + 1
    student = example.student_logits[pair[0]][None].expand(max(n, b), *[-1] * _axes(example))
    teacher = example.teacher_logits[pair[1]][None].expand(max(n, b), *[-1] * _axes(example))
    bare_student = single._replace(student_logits=student)  # type: ignore[arg-type]
    bare_teacher = single._replace(teacher_logits=teacher)  # type: ignore[arg-type]
    _ensure_refused(factory, bare_student, "a bare tensor of student logits")
    _ensure_refused(factory, bare_teacher, "a bare tensor of teacher logits")


@loss_property(kinds=ANY, max_examples=5)
def integer_logits_are_refused(factory: LossFactory, example: LossExample) -> None:
    """Logits that are whole numbers are a mistake: a ValueError."""
    students = [logits.long() for logits in example.student_logits]
    teachers = [logits.long() for logits in example.teacher_logits]
    _ensure_refused(factory, example._replace(student_logits=students), "int64 student logits")
    _ensure_refused(factory, example._replace(teacher_logits=teachers), "int64 teacher logits")


@loss_property(kinds=ANY, max_examples=5)
def temperatures_must_be_above_zero(factory: LossFactory, example: LossExample) -> None:
    """A teacher temperature of 0, below, or NaN is an error that is a ValueError."""
    for temp in (0.0, -0.1, float("nan")):
        _ensure_refused(factory, example._replace(teacher_temp=temp), f"teacher_temp = {temp}")


@loss_property(kinds=ANY, max_examples=5)
def views_that_are_not_there_are_refused(factory: LossFactory, example: LossExample) -> None:
    """Pairs that name a view which was not given, -1 among them, are a ValueError."""
    students, teachers = len(example.student_logits), len(example.teacher_logits)
    first = pairs_of(example)[0]
    for pair in ((students, first[1]), (first[0], teachers), (-1, first[1]), (first[0], -1)):
        if example.matches is None:
            step = with_pairs(example, [pair])
        else:
            step = example._replace(matches={pair: example.matches[first]})
        _ensure_refused(factory, step, f"the pair {pair}")


@loss_property(kinds=LOCAL, max_examples=5)
def matches_of_other_tokens_are_refused(factory: LossFactory, example: LossExample) -> None:
    """Matches of another number of tokens, or that point at none of them, are a ValueError."""
    pair = pairs_of(example)[0]
    found = matches_of(example)[pair]
    tokens = example.teacher_logits[pair[1]].shape[1]
    beyond = found._replace(teacher_index=found.teacher_index.clamp_min(tokens))
    before = found._replace(teacher_index=found.teacher_index - tokens)
    short = found._replace(teacher_index=found.teacher_index.int())
    fewer = Matches(*(part[:, :1] for part in found))
    for what, matches in (
        ("matches beyond the teacher", beyond),
        ("negative indices", before),
        ("int32 indices", short),
        ("too few matches", fewer),
    ):
        _ensure_refused(factory, example._replace(matches={pair: matches}), what)


def _axes(example: LossExample) -> int:
    return example.student_logits[0].dim()


def _ensure_refused(
    factory: LossFactory, example: LossExample, what: str, c: int | None = None
) -> None:
    loss = make(factory, example, c)
    before = state_of(loss)
    try:
        call(loss, example)
    except ValueError:
        ensure_same_state(state_of(loss), before, f"{what}, refused")
        return
    except Exception as error:
        kind = type(error).__name__
        raise AssertionError(f"{what}: {kind} ({error}) instead of a ValueError") from error
    raise AssertionError(f"{what}: no error")

"""Tokens that mean nothing are never matched, and inputs that do not fit are refused by name."""

from __future__ import annotations

import torch
from torch import Tensor

from local_distill.errors import LocalDistillError
from local_distill.structures import Matcher, Tokens
from local_distill.testing.matcher_properties._changing import (
    images,
    outside_source,
    parts,
    with_features,
    with_matrix,
)
from local_distill.testing.matcher_properties._comparing import ensure_same, run
from local_distill.testing.matcher_properties._registry import (
    GEOMETRIC,
    SIMILARITY,
    MatcherExample,
    matcher_property,
)
from local_distill.testing.properties import ensure

__all__ = [
    "a_nan_geometry_is_refused_or_unmatched",
    "bad_student_tokens_leave_others_alone",
    "bad_teacher_tokens_leave_others_alone",
    "batches_that_differ_are_refused",
    "features_of_other_widths_are_refused",
    "half_precision_geometry_is_refused",
    "infinite_student_tokens_are_unmatched",
    "infinite_teacher_tokens_capture_nothing",
    "missing_inputs_are_refused",
    "nan_student_tokens_are_unmatched",
    "nan_teacher_tokens_capture_nothing",
    "student_tokens_outside_the_source_are_unmatched",
    "teacher_tokens_outside_the_source_capture_nothing",
    "views_of_other_sources_are_refused",
    "zero_student_tokens_are_unmatched",
    "zero_teacher_tokens_capture_nothing",
]


@matcher_property(kinds=SIMILARITY)
def nan_student_tokens_are_unmatched(matcher: Matcher, example: MatcherExample) -> None:
    """A student token with a NaN feature has no match, and no NaN comes out."""
    _bad_student(matcher, example, torch.nan)


@matcher_property(kinds=SIMILARITY)
def nan_teacher_tokens_capture_nothing(matcher: Matcher, example: MatcherExample) -> None:
    """A teacher token with a NaN feature is never a match, and no NaN comes out."""
    _bad_teacher(matcher, example, torch.nan)


@matcher_property(kinds=SIMILARITY)
def infinite_student_tokens_are_unmatched(matcher: Matcher, example: MatcherExample) -> None:
    """A student token with an infinite feature has no match, and no NaN comes out."""
    _bad_student(matcher, example, torch.inf)
    _bad_student(matcher, example, -torch.inf)


@matcher_property(kinds=SIMILARITY)
def infinite_teacher_tokens_capture_nothing(matcher: Matcher, example: MatcherExample) -> None:
    """A teacher token with an infinite feature is never a match, and no NaN comes out."""
    _bad_teacher(matcher, example, torch.inf)
    _bad_teacher(matcher, example, -torch.inf)


@matcher_property(kinds=SIMILARITY)
def zero_student_tokens_are_unmatched(matcher: Matcher, example: MatcherExample) -> None:
    """A student token of zero norm has no direction and no match (not for metrics of places)."""
    _bad_student(matcher, example, 0.0, whole=True)


@matcher_property(kinds=SIMILARITY)
def zero_teacher_tokens_capture_nothing(matcher: Matcher, example: MatcherExample) -> None:
    """A teacher token of zero norm is never a match (not for metrics of places)."""
    _bad_teacher(matcher, example, 0.0, whole=True)


@matcher_property(kinds=("similarity",))
def bad_student_tokens_leave_others_alone(matcher: Matcher, example: MatcherExample) -> None:
    """A NaN student token added at the end changes nothing for the tokens of its image."""
    student, teacher = (Tokens(parts(view)[0]) for view in example[:2])
    weights, costs = run(matcher, _with_nan_token(student), teacher)
    wanted = run(matcher, student, teacher)
    what = "the image with a NaN student token"
    ensure_same((weights[-1:, :-1], costs[-1:, :-1]), (wanted[0][-1:], wanted[1][-1:]), what)


@matcher_property(kinds=("similarity",))
def bad_teacher_tokens_leave_others_alone(matcher: Matcher, example: MatcherExample) -> None:
    """A NaN teacher token added at the end changes nothing for student tokens without weight on it.

    How much weight it gets is the business of `nan_teacher_tokens_capture_nothing`.
    """
    student, teacher = (Tokens(parts(view)[0]) for view in example[:2])
    weights, costs = run(matcher, student, _with_nan_token(teacher))
    wanted = run(matcher, student, teacher)
    free = weights[-1, :, -1] == 0
    ensure_same(
        (weights[-1:, free, :-1], costs[-1:, free]),
        (wanted[0][-1:, free], wanted[1][-1:, free]),
        "the image with a NaN teacher token",
    )


@matcher_property(padding=25.0)
def student_tokens_outside_the_source_are_unmatched(
    matcher: Matcher, example: MatcherExample
) -> None:
    """A student token whose centre lies in padding has no match."""
    student, teacher, _ = example
    weights, _ = run(matcher, student, teacher)
    weight = float(weights[outside_source(student)].sum())
    ensure(weight == 0, f"student tokens outside the source have weight {weight:.6g}")


@matcher_property(padding=25.0)
def teacher_tokens_outside_the_source_capture_nothing(
    matcher: Matcher, example: MatcherExample
) -> None:
    """A teacher token whose centre lies in padding is never a match."""
    student, teacher, _ = example
    weights, _ = run(matcher, student, teacher)
    weight = float(weights.mT[outside_source(teacher)].sum())
    ensure(weight == 0, f"teacher tokens outside the source have weight {weight:.6g}")


@matcher_property(kinds=GEOMETRIC)
def a_nan_geometry_is_refused_or_unmatched(matcher: Matcher, example: MatcherExample) -> None:
    """A NaN in an image's matrix is refused, or leaves that image alone without a match."""
    student, teacher, _ = example
    wanted = run(matcher, student, teacher)
    for side in (0, 1):
        views = [student, teacher]
        matrix = parts(views[side])[1].matrix.clone()
        matrix[0, 0, 2] = torch.nan
        views[side] = with_matrix(views[side], matrix)
        try:
            weights, costs = run(matcher, *views)
        except LocalDistillError:
            continue
        ensure(float(weights[0].sum()) == 0, "an image without a place has matches")
        ensure(not bool(costs.isnan().any()), "a cost is NaN")
        ensure_same((weights[1:], costs[1:]), (wanted[0][1:], wanted[1][1:]), "the other images")


@matcher_property(max_examples=5)
def batches_that_differ_are_refused(matcher: Matcher, example: MatcherExample) -> None:
    """A batch of 1 against one of 2 or 3 is an error that is a ValueError, not a broadcast."""
    student, teacher, _ = example
    _ensure_refused(matcher, images(student, [0]), teacher, "1 student image")
    _ensure_refused(matcher, student, images(teacher, [0]), "1 teacher image")


@matcher_property(max_examples=5)
def missing_inputs_are_refused(matcher: Matcher, example: MatcherExample) -> None:
    """Tokens without anything to compare are an error that is a ValueError."""
    student, teacher, _ = example
    _ensure_refused(matcher, Tokens(), teacher, "an empty student")
    _ensure_refused(matcher, student, Tokens(), "an empty teacher")


@matcher_property(kinds=SIMILARITY, max_examples=5)
def features_of_other_widths_are_refused(matcher: Matcher, example: MatcherExample) -> None:
    """Student and teacher features of different width are an error that is a ValueError."""
    student, teacher, _ = example
    narrow = with_features(teacher, parts(teacher)[0][..., :-1])
    _ensure_refused(matcher, student, narrow, "narrower teacher features")


@matcher_property(kinds=GEOMETRIC, max_examples=5)
def half_precision_geometry_is_refused(matcher: Matcher, example: MatcherExample) -> None:
    """A bfloat16 or float16 matrix has lost pixels: an error that is a ValueError."""
    student, teacher, _ = example
    for dtype in (torch.bfloat16, torch.float16):
        half = with_matrix(teacher, parts(teacher)[1].matrix.to(dtype))
        _ensure_refused(matcher, student, half, f"a {dtype} teacher matrix")


@matcher_property(kinds=GEOMETRIC, max_examples=5)
def views_of_other_sources_are_refused(matcher: Matcher, example: MatcherExample) -> None:
    """Views whose source sizes differ cannot show the same image: a ValueError."""
    student, teacher, _ = example
    _, geometry, _ = parts(teacher)
    other = teacher._replace(geometry=geometry._replace(source_size=geometry.source_size + 1))
    _ensure_refused(matcher, student, other, "another source size")


def _with_nan_token(view: Tokens) -> Tokens:
    """One more token at the end: NaN in the last image, as the first token in the others."""
    assert view.features is not None
    more = view.features[:, :1].clone()
    more[-1] = torch.nan
    return Tokens(torch.cat((view.features, more), 1))


def _spoilt(view: Tokens, value: float, seed: int, *, whole: bool) -> tuple[Tokens, int]:
    """The view with one bad token in its last image, and which token it is."""
    features = parts(view)[0].clone()
    token = seed % features.shape[1]
    if whole:
        features[-1, token] = value
    else:
        features[-1, token, seed % features.shape[2]] = value
    return with_features(view, features), token


def _bad_student(
    matcher: Matcher, example: MatcherExample, value: float, *, whole: bool = False
) -> None:
    student, token = _spoilt(example.student, value, example.seed, whole=whole)
    weights, costs = run(matcher, student, example.teacher)
    _ensure_no_nan(weights, costs)
    weight = float(weights[-1, token].sum())
    ensure(weight == 0, f"student token {token} is {value} and has weight {weight:.6g}")
    ensure(float(costs[-1, token]) == torch.inf, f"student token {token} is {value}, cost not inf")


def _bad_teacher(
    matcher: Matcher, example: MatcherExample, value: float, *, whole: bool = False
) -> None:
    teacher, token = _spoilt(example.teacher, value, example.seed, whole=whole)
    weights, costs = run(matcher, example.student, teacher)
    _ensure_no_nan(weights, costs)
    weight = float(weights[-1, :, token].sum())
    ensure(weight == 0, f"teacher token {token} is {value} and captures weight {weight:.6g}")


def _ensure_no_nan(weights: Tensor, costs: Tensor) -> None:
    ensure(not bool(weights.isnan().any()), "a weight is NaN")
    ensure(not bool(costs.isnan().any()), "a cost is NaN")


def _ensure_refused(matcher: Matcher, student: Tokens, teacher: Tokens, what: str) -> None:
    try:
        matcher(student, teacher)
    except ValueError:
        return
    except Exception as error:
        kind = type(error).__name__
        raise AssertionError(f"{what}: {kind} ({error}) instead of a ValueError") from error
    raise AssertionError(f"{what}: no error")

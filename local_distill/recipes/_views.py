"""Which views of a step take part in the global and in the local loss of a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from local_distill._check import check_sequence
from local_distill._logits import Logits
from local_distill.errors import ShapeError
from local_distill.matching.match_views import cross_view_pairs, match_views
from local_distill.structures import Matcher, Matches, Tokens, ViewOutput

__all__ = ["GlobalViews", "global_views", "local_pairs", "match_locally"]

Pair = tuple[int, int]


class GlobalViews(NamedTuple):
    """The views that have ``global_logits``, numbered anew, and the pairs of different ones."""

    student: list[Logits]
    teacher: list[Logits]
    pairs: list[Pair]


def global_views(student: Sequence[ViewOutput], teacher: Sequence[ViewOutput]) -> GlobalViews:
    """The views with ``global_logits``; the pairs leave out a view with itself."""
    check_sequence("student", student, "a ViewOutput")
    check_sequence("teacher", teacher, "a ViewOutput")
    students = {v: view.global_logits for v, view in enumerate(student)}
    teachers = {q: view.global_logits for q, view in enumerate(teacher)}
    s_views = {v: logits for v, logits in students.items() if logits is not None}
    t_views = {q: logits for q, logits in teachers.items() if logits is not None}
    s_place = {v: place for place, v in enumerate(s_views)}
    t_place = {q: place for place, q in enumerate(t_views)}
    pairs = [
        (s_place[v], t_place[q])
        for v, q in cross_view_pairs(len(student), len(teacher))
        if v in s_place and q in t_place
    ]
    if not pairs:
        raise ShapeError(
            f"none of the pairs of different views of {len(student)} student and {len(teacher)} "
            "teacher views has `global_logits` on both sides; give them for at least two views"
        )
    return GlobalViews(list(s_views.values()), list(t_views.values()), pairs)


def local_pairs(student: Sequence[ViewOutput], teacher: Sequence[ViewOutput]) -> list[Pair]:
    """The pairs of different views with ``token_logits`` and ``tokens`` on both sides."""
    check_sequence("student", student, "a ViewOutput")
    check_sequence("teacher", teacher, "a ViewOutput")
    pairs = [
        (v, q)
        for v, q in cross_view_pairs(len(student), len(teacher))
        if _is_local(student[v]) and _is_local(teacher[q])
    ]
    if not pairs:
        raise ShapeError(
            f"none of the pairs of different views of {len(student)} student and {len(teacher)} "
            "teacher views has `token_logits` and `tokens` on both sides; give both for at least "
            "two views"
        )
    return pairs


def match_locally(
    matcher: Matcher,
    student: Sequence[ViewOutput],
    teacher: Sequence[ViewOutput],
    pairs: list[Pair],
) -> dict[Pair, Matches]:
    """The matches of these pairs."""
    empty = Tokens()
    return match_views(
        matcher,
        [view.tokens or empty for view in student],
        [view.tokens or empty for view in teacher],
        pairs,
    )


def _is_local(view: ViewOutput) -> bool:
    return view.token_logits is not None and view.tokens is not None

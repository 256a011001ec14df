"""Apply a matcher to the pairs of views of a step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from local_distill._check import check_sequence, check_view_pairs
from local_distill._geometric_inputs import check_token_parts, check_tokens
from local_distill.matching._match_checks import check_matcher
from local_distill.structures import Matcher, Matches, Tokens

__all__ = ["cross_view_pairs", "match_views"]

Pair = tuple[int, int]


def cross_view_pairs(student_views: int, teacher_views: int) -> list[Pair]:
    """All (student view, teacher view) pairs of different views: DINO's.

    Convention: teacher view q is the same view as student view q, the global views come first.

    Example:
        >>> cross_view_pairs(3, 2)
        [(0, 1), (1, 0), (2, 0), (2, 1)]
    """
    return [(v, q) for v in range(student_views) for q in range(teacher_views) if v != q]


def match_views(
    matcher: Matcher,
    student: Sequence[Tokens],
    teacher: Sequence[Tokens],
    pairs: Iterable[Pair] | None = None,
) -> dict[Pair, Matches]:
    """Match every pair of views.

    Args:
        matcher: any `Matcher`; if it has a ``match_views`` of its own, that one is used.
        student: `Tokens` of each student view.
        teacher: `Tokens` of each teacher view.
        pairs: (v, q) pairs to match; by default all with v ≠ q.

    Returns:
        ``{(v, q): Matches}``, in the order of ``pairs``.

    Raises:
        ConfigError: a matcher that cannot be called, or the class of one.
        ShapeError: one `Tokens` where a list of views is wanted, a view that is no `Tokens`, or a
            pair that names a view that is not there.

    Example:
        >>> import torch
        >>> from local_distill import TokenGrid, from_box
        >>> from local_distill.matching import NearestMatcher
        >>> grid = TokenGrid.tiling(3, 2, view_size=(48, 32))
        >>> boxes = torch.tensor([[0.0, 0, 32, 48], [8, 0, 40, 48]])
        >>> geometry = from_box(boxes, view_size=(48, 32), source_size=(50, 40))
        >>> views = [Tokens(None, geometry, grid)] * 2
        >>> sorted(match_views(NearestMatcher(), views, views))
        [(0, 1), (1, 0)]
    """
    check_matcher(matcher)
    check_sequence("student", student, "Tokens")
    check_sequence("teacher", teacher, "Tokens")
    if pairs is None:
        pairs = cross_view_pairs(len(student), len(teacher))
    pairs = list(pairs)
    check_view_pairs(pairs, len(student), len(teacher))
    own = getattr(matcher, "match_views", None)
    # a matcher's own looks at the shapes again, and names the views itself
    check = check_tokens if own is None else check_token_parts
    for side, (name, views) in enumerate((("student", student), ("teacher", teacher))):
        for view in dict.fromkeys(pair[side] for pair in pairs):
            check(f"{name}[{view}]", views[view])
    if own is not None:
        result: dict[Pair, Matches] = own(student, teacher, pairs)
        return result
    return {(v, q): matcher(student[v], teacher[q]) for v, q in pairs}

"""Several pairs of views in one call of a matcher: their batches are stacked, the matches split."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch

from local_distill._check import check_sequence, check_view_pairs
from local_distill._geometric_inputs import check_token_parts
from local_distill.errors import LocalDistillError
from local_distill.structures import CropGeometry, Matcher, Matches, Tokens

__all__ = ["match_stacked"]

Pair = tuple[int, int]

# `student` or `teacher` as messages name them: in backquotes, alone or with .geometry and the like.
_NAMES = re.compile(r"(?<=`)(student|teacher)(?=[.`])")


def match_stacked(
    matcher: Matcher,
    student: Sequence[Tokens],
    teacher: Sequence[Tokens],
    pairs: Iterable[Pair],
    *,
    with_features: bool = True,
) -> dict[Pair, Matches]:
    """Match pairs of views with one call of the matcher for all that have the same grids.

    Pairs are stacked along the batch where every part of their tokens has the same shape, and the
    matches are split again. Only for a matcher whose images do not depend on one another: the
    result then is that of each pair by itself.

    Args:
        matcher: called with the stacked `Tokens`.
        student: `Tokens` of each student view.
        teacher: `Tokens` of each teacher view.
        pairs: (v, q) pairs to match.
        with_features: False for a matcher that looks at geometry alone: the features are then not
            stacked, which would copy them once a pair.

    Returns:
        ``{(v, q): Matches}``, in the order of ``pairs``.

    Raises:
        ShapeError: a pair names a view that is not there.
        LocalDistillError: what the matcher raises, with ``student[v]`` and ``teacher[q]`` named.

    Example:
        >>> from local_distill.matching import SimilarityMatcher
        >>> views = [Tokens(torch.eye(3).expand(2, 3, 3)), Tokens(torch.eye(3).expand(2, 3, 3))]
        >>> sorted(match_stacked(SimilarityMatcher(), views, views, [(1, 0), (0, 1)]))
        [(0, 1), (1, 0)]
    """
    _check_views("student", student)
    _check_views("teacher", teacher)
    pairs = list(pairs)
    check_view_pairs(pairs, len(student), len(teacher))
    found: dict[Pair, Matches] = {}
    for group in _same_shapes(student, teacher, pairs, with_features):
        found.update(_match_group(matcher, student, teacher, group, with_features))
    return {pair: found[pair] for pair in pairs}


def _same_shapes(
    student: Sequence[Tokens], teacher: Sequence[Tokens], pairs: list[Pair], with_features: bool
) -> list[list[Pair]]:
    """The pairs, in lists of those that can be stacked, each pair once."""
    groups: list[tuple[list[object], list[Pair]]] = []
    for v, q in pairs:
        form = [*_form(student[v], with_features), *_form(teacher[q], with_features)]
        # Compared one by one, not looked up in a dict: under torch.compile sizes may be symbols,
        # which have no hash.
        for known, group in groups:
            if known == form:
                if (v, q) not in group:
                    group.append((v, q))
                break
        else:
            groups.append((form, [(v, q)]))
    return [group for _, group in groups]


def _form(tokens: Tokens, with_features: bool) -> list[object]:
    """All that has to be equal in two views that are stacked, the batch included.

    So what does not fit within one pair is never made up for by what does not fit in another.
    """
    parts = [*(tokens.geometry or ())]
    if _passes_features(tokens, with_features):
        parts.append(tokens.features)
    form: list[object] = [tokens.grid, tokens.geometry is None]
    for part in parts:
        form += [tuple(part.shape), part.dtype, part.device]
    return form


def _passes_features(tokens: Tokens, with_features: bool) -> bool:
    """Whether the matcher is given features; those that don't fit the rest are, to be refused."""
    features, geometry, grid = tokens
    if features is None:
        return False
    if with_features or geometry is None or grid is None or features.dim() != 3:
        return True
    return tuple(features.shape[:2]) != (geometry.matrix.shape[0], grid.num_tokens)


def _match_group(
    matcher: Matcher,
    student: Sequence[Tokens],
    teacher: Sequence[Tokens],
    group: list[Pair],
    with_features: bool,
) -> dict[Pair, Matches]:
    """The matches of pairs of one form."""
    if len(group) == 1:
        v, q = group[0]
        return {(v, q): _match_one(matcher, student[v], teacher[q], v, q)}
    try:
        stacked = matcher(
            _stack([student[v] for v, _ in group], with_features),
            _stack([teacher[q] for _, q in group], with_features),
        )
    except LocalDistillError:
        # In which pair, and in which of its images? Only each pair by itself can say.
        for v, q in group:
            _match_one(matcher, student[v], teacher[q], v, q)
        raise
    b = stacked.cost.shape[0] // len(group)
    return {
        pair: Matches(*(part[i * b : (i + 1) * b] for part in stacked))
        for i, pair in enumerate(group)
    }


def _stack(views: list[Tokens], with_features: bool) -> Tokens:
    """One `Tokens` of all views of one form, one after another along the batch."""
    first = views[0]
    features = geometry = None
    if _passes_features(first, with_features):
        features = torch.cat([view.features for view in views if view.features is not None])
    if first.geometry is not None:
        parts = zip(*(view.geometry for view in views if view.geometry is not None), strict=True)
        geometry = CropGeometry(*(torch.cat(part) for part in parts))
    return Tokens(features, geometry, first.grid)


def _match_one(matcher: Matcher, student: Tokens, teacher: Tokens, v: int, q: int) -> Matches:
    """One pair by itself; an error says of which views."""
    try:
        return matcher(student, teacher)
    except LocalDistillError as error:
        text = _NAMES.sub(lambda name: f"{name[0]}[{v if name[1] == 'student' else q}]", str(error))
        if text == str(error):
            text += f" (in student[{v}] or teacher[{q}])"
        error.args = (text,)
        raise


def _check_views(name: str, views: Sequence[Tokens]) -> None:
    """Refuse what cannot be stacked because it is no `Tokens` of a `CropGeometry`."""
    check_sequence(name, views, "Tokens")
    for i, view in enumerate(views):
        check_token_parts(f"{name}[{i}]", view)

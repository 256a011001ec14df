"""What may change about two views without changing their match, or changes it in a known way."""

from __future__ import annotations

import torch

from local_distill.errors import LocalDistillError
from local_distill.structures import CropGeometry, Matcher, TokenGrid, Tokens
from local_distill.testing.matcher_properties._changing import (
    inside_source,
    map_source,
    parts,
    source_sizes,
    view_enlarged,
    view_mirrored,
    view_transposed,
    with_features,
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
    "a_view_matches_itself",
    "features_do_not_matter",
    "features_may_be_rotated",
    "features_may_be_scaled",
    "geometry_does_not_matter",
    "student_tokens_may_be_permuted",
    "teacher_tokens_may_be_permuted",
    "the_source_may_be_enlarged",
    "the_source_may_be_mirrored",
    "the_source_may_be_shifted",
    "the_source_may_be_transposed",
    "the_student_view_may_be_flipped",
    "the_teacher_view_may_be_flipped",
    "the_views_may_be_transposed",
    "the_views_resolution_does_not_matter",
    "ties_go_to_the_lowest_index",
    "ties_of_places_go_to_the_lowest_index",
    "views_far_apart_do_not_match",
]


@matcher_property(kinds=("similarity",))
def student_tokens_may_be_permuted(matcher: Matcher, example: MatcherExample) -> None:
    """Student tokens in another order have the same matches in that order."""
    student, teacher = (_features_only(view) for view in example[:2])
    assert student.features is not None
    order = torch.randperm(student.num_tokens, generator=example.generator())
    weights, costs = run(matcher, student, teacher)
    found = run(matcher, Tokens(student.features[:, order]), teacher)
    ensure_same(found, (weights[:, order], costs[:, order]), "student tokens permuted")


@matcher_property(kinds=("similarity",))
def teacher_tokens_may_be_permuted(matcher: Matcher, example: MatcherExample) -> None:
    """Teacher tokens in another order are matched all the same."""
    student, teacher = (_features_only(view) for view in example[:2])
    assert teacher.features is not None
    order = torch.randperm(teacher.num_tokens, generator=example.generator())
    weights, costs = run(matcher, student, teacher)
    found = run(matcher, student, Tokens(teacher.features[:, order]))
    ensure_same(found, (weights[:, :, order], costs), "teacher tokens permuted")


@matcher_property(kinds=GEOMETRIC)
def the_student_view_may_be_flipped(matcher: Matcher, example: MatcherExample) -> None:
    """A student view flipped left to right has the same matches at the mirrored tokens."""
    student, teacher, _ = example
    weights, costs = run(matcher, student, teacher)
    flipped, order = view_mirrored(student)
    found = run(matcher, flipped, teacher)
    ensure_same(found, (weights[:, order], costs[:, order]), "student view flipped")


@matcher_property(kinds=GEOMETRIC)
def the_teacher_view_may_be_flipped(matcher: Matcher, example: MatcherExample) -> None:
    """A teacher view flipped left to right is matched at the mirrored tokens."""
    student, teacher, _ = example
    weights, costs = run(matcher, student, teacher)
    flipped, order = view_mirrored(teacher)
    found = run(matcher, student, flipped)
    ensure_same(found, (weights[:, :, order], costs), "teacher view flipped")


@matcher_property(kinds=GEOMETRIC)
def the_views_may_be_transposed(matcher: Matcher, example: MatcherExample) -> None:
    """Views with x and y exchanged have the same matches, or are refused as such."""
    student, teacher, _ = example
    weights, costs = run(matcher, student, teacher)
    (s, rows), (t, columns) = view_transposed(student), view_transposed(teacher)
    try:
        found = run(matcher, s, t)
    except LocalDistillError:
        return  # a matcher of crops may refuse what is no crop; a wrong match is what it may not
    ensure_same(found, (weights[:, rows][:, :, columns], costs[:, rows]), "views transposed")


@matcher_property()
def a_view_matches_itself(matcher: Matcher, example: MatcherExample) -> None:
    """Between a view and itself tokens match, and each one's heaviest candidate is itself."""
    view = example.student
    weights, _ = run(matcher, view, view)
    matched = weights.sum(-1) > 0
    # of a single token, grids_of_one_token_are_served says so
    ensure(bool(matched.any()) or view.num_tokens <= 1, "no token of a view matches the view")
    own = weights.diagonal(dim1=1, dim2=2)
    best = weights.amax(-1)
    worse = matched & (own < best - 1e-5)
    if bool(worse.any()):
        image, i = worse.nonzero()[0].tolist()
        other = int(weights[image, i].argmax())
        ensure(False, f"image {image}: token {i} of a view matches its token {other}, not {i}")


@matcher_property(kinds=GEOMETRIC)
def the_source_may_be_shifted(matcher: Matcher, example: MatcherExample) -> None:
    """A source with more to its left and above changes nothing."""
    motion = torch.eye(3)
    motion[0, 2], motion[1, 2] = 7.0, 12.0
    sizes = source_sizes(example.student) + torch.tensor([12, 7], dtype=torch.int32)
    _ensure_unmoved(matcher, example, motion, sizes, "the source shifted")


@matcher_property(kinds=GEOMETRIC)
def the_source_may_be_enlarged(matcher: Matcher, example: MatcherExample) -> None:
    """A source of four times the size changes nothing: lengths count in cells, not in pixels."""
    motion = torch.diag(torch.tensor([4.0, 4.0, 1.0]))
    sizes = source_sizes(example.student) * 4
    _ensure_unmoved(matcher, example, motion, sizes, "the source enlarged")


@matcher_property(kinds=GEOMETRIC)
def the_source_may_be_mirrored(matcher: Matcher, example: MatcherExample) -> None:
    """A mirrored source changes nothing: both views are mirrored with it."""
    sizes = source_sizes(example.student)
    motion = torch.eye(3).repeat(sizes.shape[0], 1, 1)
    motion[:, 0, 0] = -1.0
    motion[:, 0, 2] = sizes[:, 1].float()
    _ensure_unmoved(matcher, example, motion, sizes, "the source mirrored")


@matcher_property(kinds=GEOMETRIC)
def the_source_may_be_transposed(matcher: Matcher, example: MatcherExample) -> None:
    """A source with x and y exchanged changes nothing, or the views are refused as such."""
    motion = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    sizes = source_sizes(example.student).flip(-1)
    try:
        _ensure_unmoved(matcher, example, motion, sizes, "the source transposed")
    except LocalDistillError:
        return  # as above


@matcher_property(kinds=GEOMETRIC)
def the_views_resolution_does_not_matter(matcher: Matcher, example: MatcherExample) -> None:
    """A view of twice the pixels under a network of twice the stride has the same matches."""
    student, teacher, _ = example
    wanted = run(matcher, student, teacher)
    found = run(matcher, view_enlarged(student, 2), view_enlarged(teacher, 4))
    ensure_same(found, wanted, "views of more pixels")


@matcher_property(kinds=GEOMETRIC)
def views_far_apart_do_not_match(matcher: Matcher, example: MatcherExample) -> None:
    """Views of opposite corners of a large source have no match (where there is a limit)."""
    views = []
    for view, corner in zip(example[:2], (0.0, 2000.0), strict=True):
        motion = torch.eye(3)
        motion[:2, 2] = corner
        views.append(map_source(view, motion, torch.full_like(source_sizes(view), 3000)))
    weights, _ = run(matcher, *views)
    ensure(float(weights.sum()) == 0, f"views far apart have weight {float(weights.sum()):.6g}")


@matcher_property(kinds=SIMILARITY)
def features_may_be_rotated(matcher: Matcher, example: MatcherExample) -> None:
    """An orthogonal map of all features changes nothing."""
    student, teacher, _ = example
    d = parts(student)[0].shape[-1]
    noise = torch.randn(d, d, generator=example.generator(), dtype=torch.float64)
    rotation = torch.linalg.qr(noise).Q.float()
    turned = [with_features(v, parts(v)[0] @ rotation) for v in (student, teacher)]
    ensure_same(run(matcher, *turned), run(matcher, student, teacher), "features rotated")


@matcher_property(kinds=SIMILARITY)
def features_may_be_scaled(matcher: Matcher, example: MatcherExample) -> None:
    """Each token's features times a positive number change nothing (not for metrics of places)."""
    student, teacher, _ = example
    generator = example.generator()
    scaled = []
    for view in (student, teacher):
        features = parts(view)[0]
        factor = 2.0 ** torch.randint(-3, 4, (*features.shape[:2], 1), generator=generator)
        scaled.append(with_features(view, features * factor))
    ensure_same(run(matcher, *scaled), run(matcher, student, teacher), "features scaled")


@matcher_property(kinds=("geometric",))
def features_do_not_matter(matcher: Matcher, example: MatcherExample) -> None:
    """A geometric matcher looks at no features: none, others and NaN give the same."""
    student, teacher, _ = example
    wanted = run(matcher, student, teacher)
    none = [with_features(view, None) for view in (student, teacher)]
    ensure_same(run(matcher, *none), wanted, "without features")
    other = [with_features(view, 3.0 - parts(view)[0].flip(1)) for view in (student, teacher)]
    ensure_same(run(matcher, *other), wanted, "with other features")
    nan = [with_features(v, torch.full_like(parts(v)[0], torch.nan)) for v in (student, teacher)]
    ensure_same(run(matcher, *nan), wanted, "with NaN features")


@matcher_property(kinds=("similarity",))
def geometry_does_not_matter(matcher: Matcher, example: MatcherExample) -> None:
    """For a similarity matcher, tokens inside the source match as without any geometry."""
    student, teacher, _ = example
    if not bool(inside_source(student).all() & inside_source(teacher).all()):
        return
    wanted = run(matcher, _features_only(student), _features_only(teacher))
    ensure_same(run(matcher, student, teacher), wanted, "with geometry")


@matcher_property(kinds=("similarity",))
def ties_go_to_the_lowest_index(matcher: Matcher, example: MatcherExample) -> None:
    """Of teacher tokens with equal features, a later one never weighs more than the first."""
    features, _, _ = parts(example.student)
    b, _, d = features.shape
    # Unit vectors, each way round: their length, mean and products are exact in any order of sums.
    axis = torch.eye(d, dtype=features.dtype)
    axes = torch.cat((axis, -axis)).expand(b, -1, -1)
    weights, _ = run(matcher, Tokens(features), Tokens(torch.cat((axes, axes), 1)))
    more = weights[..., 2 * d :] - weights[..., : 2 * d]
    ensure(float(more.max()) <= 1e-6, f"a copy weighs {float(more.max()):.6g} more than the first")


@matcher_property(kinds=GEOMETRIC, max_examples=1)
def ties_of_places_go_to_the_lowest_index(matcher: Matcher, example: MatcherExample) -> None:
    """Of teacher tokens equally far, a later one never weighs more than the first."""
    # one student token in the middle of 2 x 2 teacher tokens, in whole numbers
    size = torch.tensor([[16, 16]] * 2, dtype=torch.int32)
    geometry = CropGeometry(torch.eye(3).repeat(2, 1, 1), size, size)
    same = torch.ones(2, 4, 3)
    student = Tokens(same[:, :1], geometry, TokenGrid.tiling(1, 1, (16, 16)))
    teacher = Tokens(same, geometry, TokenGrid.tiling(2, 2, (16, 16)))
    weights, _ = run(matcher, student, teacher)
    first = weights[..., :1]
    ensure(bool((weights <= first + 1e-6).all()), f"the weights are {weights[0, 0].tolist()}")


def _features_only(view: Tokens) -> Tokens:
    return Tokens(parts(view)[0])


def _ensure_unmoved(
    matcher: Matcher,
    example: MatcherExample,
    motion: torch.Tensor,
    sizes: torch.Tensor,
    what: str,
) -> None:
    student, teacher, _ = example
    wanted = run(matcher, student, teacher)
    moved = [map_source(view, motion, sizes) for view in (student, teacher)]
    ensure_same(run(matcher, *moved), wanted, what)

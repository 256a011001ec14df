"""A table of faults: what a matcher makes of each kind of bad or extreme input.

The matchers' rows of `fault_tables`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from local_distill.geometry import from_box
from local_distill.matching.match_views import match_views
from local_distill.structures import Matcher, TokenGrid, Tokens
from local_distill.testing.check_matcher import matcher_kind
from local_distill.testing.fault_tables import (
    FaultCases,
    FaultResult,
    NotApplicable,
)
from local_distill.testing.matcher_properties import REGISTRY, MatcherExample, MatcherKind
from local_distill.testing.matcher_properties._changing import (
    images,
    map_source,
    parts,
    source_sizes,
    view_mirrored,
    with_features,
    with_matrix,
)
from local_distill.testing.matcher_properties._comparing import ensure_exact, ensure_same, run
from local_distill.testing.properties import ensure

__all__ = ["matcher_faults"]


Case = Callable[[Matcher, MatcherKind], None]
_CASES = FaultCases()
_case = _CASES.case


def matcher_faults(
    matcher: Matcher,
    kind: MatcherKind | None = None,
    *,
    groups: Iterable[str] | None = None,
    not_applicable: Mapping[str, str] | None = None,
) -> list[FaultResult]:
    """Try every fault on a matcher.

    Args:
        matcher: any callable ``(student: Tokens, teacher: Tokens) -> Matches``.
        kind: what it looks at, see `check_matcher`; found out by trying where not given.
        groups: only these groups of faults; ``"compile"`` takes longer than all the others.
        not_applicable: ``{fault: reason}`` of cases that are no fault for this matcher.

    Returns:
        One `FaultResult` for each case. Sound matchers have no ``"WRONG"``.

    Raises:
        ConfigError: a group or a fault that does not exist.

    Example:
        >>> from local_distill import NearestMatcher
        >>> results = matcher_faults(NearestMatcher(), groups=["views"])
        >>> [f"{result.fault}: {result.outcome}" for result in results][:3]
        ['batch of 1: right', 'batch of 0: right', 'teacher batch 1 against 2: refused']
    """
    kind = kind or matcher_kind(matcher)
    return _CASES.run(matcher, kind, groups=groups, not_applicable=not_applicable)


def _needs(kind: MatcherKind, what: MatcherKind) -> None:
    """Leave the case out for matchers that do not look at ``what``."""
    if kind not in (what, "both"):
        raise NotApplicable(f"looks at no {'geometry' if what == 'geometric' else 'features'}")


def _views(
    seed: int = 0,
    *,
    grids: tuple[tuple[int, int], tuple[int, int]] = ((4, 7), (2, 3)),
    source: tuple[int, int] = (120, 150),
    boxes: Sequence[Sequence[float]] = ((10.2, 8.4, 110.6, 95.1), (30.7, 20.9, 140.3, 110.8)),
) -> tuple[Tokens, Tokens]:
    """Two images' views in general position: crops of 112 × 98 and 48 × 72 view pixels."""
    generator = torch.Generator().manual_seed(seed)
    views = []
    for side, size in ((0, (112, 98)), (1, (48, 72))):
        rows, cols = grids[side]
        box = torch.tensor([boxes[side], boxes[side]])
        flips = torch.tensor([False, True])
        geometry = from_box(box, size, source, hflip=flips)
        features = torch.randn(2, rows * cols, 6, generator=generator)
        views.append(Tokens(features, geometry, TokenGrid.tiling(rows, cols, size)))
    return views[0], views[1]


def _holds(name: str, views: Callable[[], tuple[Tokens, Tokens]] = _views) -> Case:
    """A case that is a property of the kit, on fixed views."""

    def case(matcher: Matcher, kind: MatcherKind) -> None:
        one = next(declared for declared in REGISTRY if declared.name == name)
        if kind not in one.kinds:
            raise NotApplicable("looks at nothing that this fault touches, or at more than that")
        one.check(matcher, MatcherExample(*views(), seed=5))

    return case


def _equal_cells(flipped: bool) -> Callable[[], tuple[Tokens, Tokens]]:
    """Views of 3 × 5 and 4 × 7 tokens whose cells all are 12 × 8 source pixels.

    They are shifted by nearly half a cell, in the two images to either side of it, so that whatever
    moves a centre by little more than the 16th part of a cell leads to another token.
    """

    def views() -> tuple[Tokens, Tokens]:
        def view(boxes: list[list[float]], rows: int, cols: int, flip: bool) -> Tokens:
            size = (rows * 16, cols * 24)
            geometry = from_box(torch.tensor(boxes), size, (60, 100), hflip=flip)
            features = torch.ones(2, rows * cols, 3)
            return Tokens(features, geometry, TokenGrid.tiling(rows, cols, size))

        shifted = [[27.25, 16.5, 87.25, 40.5], [28.75, 15.5, 88.75, 39.5]]
        return view(shifted, 3, 5, flipped), view([[10.0, 12.0, 94.0, 44.0]] * 2, 4, 7, False)

    return views


def _sound(matcher: Matcher, student: Tokens, teacher: Tokens) -> tuple[Tensor, Tensor]:
    """Weights and costs, which keep the contract."""
    weights, costs = run(matcher, student, teacher)
    ensure(bool(weights.isfinite().all()) and not bool(costs.isnan().any()), "NaN came out")
    ensure(bool((weights >= 0).all()) and _most(weights) <= 1 + 1e-5, "weights are no shares")
    ensure(bool((costs.isfinite() == (weights.sum(-1) > 0)).all()), "cost and weight disagree")
    return weights, costs


def _most(weights: Tensor) -> float:
    return float(weights.sum(-1).max()) if weights.numel() else 0.0


def _heaviest_is_itself(matcher: Matcher, view: Tokens) -> None:
    weights, _ = _sound(matcher, view, view)
    own = weights.diagonal(dim1=1, dim2=2)
    matched = weights.sum(-1) > 0
    ensure(bool(matched.any()), "no token of a view matches the view itself")
    ensure(bool((own >= weights.amax(-1) - 1e-5)[matched].all()), "a token matches another one")


def _same_precision(dtype: torch.dtype) -> Case:
    def case(matcher: Matcher, kind: MatcherKind) -> None:
        _needs(kind, "similarity")
        views = [with_features(v, parts(v)[0].to(dtype)) for v in _views()]
        full = [with_features(v, parts(v)[0].float()) for v in views]
        ensure_exact(matcher(*views), matcher(*full), views[1].num_tokens, f"{dtype}")

    return case


for _dtype in (torch.float16, torch.bfloat16):
    _case("numbers", f"{str(_dtype).removeprefix('torch.')} features")(_same_precision(_dtype))
_case("numbers", "near-tied tokens in half precision")(
    _holds("half_precision_features_match_as_float32")
)
_case("numbers", "float64 is kept")(_holds("float64_stays_float64"))
_case("numbers", "autocast")(_holds("autocast_changes_nothing"))


@_case("numbers", "features up to 60,000")
def _large(matcher: Matcher, kind: MatcherKind) -> None:
    _needs(kind, "similarity")
    views = [with_features(v, (parts(v)[0] * 1e4).clamp(-6e4, 6e4)) for v in _views()]
    halves = [with_features(v, parts(v)[0].half()) for v in views]
    _sound(matcher, *halves)
    full = [with_features(v, parts(v)[0].float()) for v in halves]
    ensure_exact(matcher(*halves), matcher(*full), views[1].num_tokens, "float16 features")


for _name, _title in (
    ("nan_student_tokens_are_unmatched", "NaN in a student token"),
    ("nan_teacher_tokens_capture_nothing", "NaN in a teacher token"),
    ("infinite_student_tokens_are_unmatched", "infinity in a student token"),
    ("infinite_teacher_tokens_capture_nothing", "infinity in a teacher token"),
    ("a_bad_image_stays_alone", "a whole image of NaN"),
    ("zero_student_tokens_are_unmatched", "student token of zero norm"),
    ("zero_teacher_tokens_capture_nothing", "teacher token of zero norm"),
    ("ties_go_to_the_lowest_index", "duplicates"),
    ("ties_of_places_go_to_the_lowest_index", "exact ties of places"),
    ("grids_of_one_token_are_served", "1 × 1 grids"),
    ("a_teacher_without_tokens_is_served", "t = 0"),
    ("a_student_without_tokens_is_served", "s = 0"),
):
    _case("tokens", _title)(_holds(_name))


@_case("tokens", "4 × 7 beside 2 × 3")
def _unequal(matcher: Matcher, kind: MatcherKind) -> None:
    student, teacher = _views()
    weights, _ = _sound(matcher, student, teacher)
    ensure(tuple(weights.shape) == (2, 28, 6), f"weights of shape {tuple(weights.shape)}")


@_case("tokens", "37 × 37")
def _many(matcher: Matcher, kind: MatcherKind) -> None:
    student, _ = _views(grids=((37, 37), (2, 3)))
    _heaviest_is_itself(matcher, student)


@_case("geometry", "no overlap at all")
def _apart(matcher: Matcher, kind: MatcherKind) -> None:
    _needs(kind, "geometric")
    _sound(matcher, *_views(boxes=((1.3, 1.7, 40.2, 41.1), (90.4, 80.8, 140.1, 118.7))))


@_case("geometry", "identical views")
def _identical(matcher: Matcher, kind: MatcherKind) -> None:
    _heaviest_is_itself(matcher, _views()[0])


@_case("geometry", "flip of one view, of both")
def _flips(matcher: Matcher, kind: MatcherKind) -> None:
    student, teacher = _views()
    weights, costs = _sound(matcher, student, teacher)
    (s, rows), (t, columns) = view_mirrored(student), view_mirrored(teacher)
    mirrored = run(matcher, s, teacher)
    ensure_same(mirrored, (weights[:, rows], costs[:, rows]), "student view flipped")
    both = run(matcher, s, t)
    wanted = weights[:, rows][:, :, columns], costs[:, rows]
    ensure_same(both, wanted, "both views flipped")


def _enlarged(factor: int, side: int) -> Case:
    def case(matcher: Matcher, kind: MatcherKind) -> None:
        _needs(kind, "geometric")
        student, teacher = _views()
        wanted = _sound(matcher, student, teacher)
        motion = torch.diag(torch.tensor([float(factor), float(factor), 1.0]))
        sizes = torch.full_like(source_sizes(student), side)
        moved = [map_source(view, motion, sizes) for view in (student, teacher)]
        ensure_same(run(matcher, *moved), wanted, f"a source of {side} px")

    return case


_case("geometry", "4,096 px source")(_enlarged(27, 4096))
_case("geometry", "65,535 px source")(_enlarged(436, 65535))


@_case("geometry", "crops of 1 px")
def _tiny(matcher: Matcher, kind: MatcherKind) -> None:
    _needs(kind, "geometric")
    student, teacher = _views(boxes=((100.0, 80.0, 101.0, 81.0), (30.7, 20.9, 140.3, 110.8)))
    _sound(matcher, student, teacher)
    _sound(matcher, teacher, student)
    _heaviest_is_itself(matcher, student)


for _title, _flipped in (("equal cells, shifted", False), ("equal cells, one view flipped", True)):
    _case("geometry", _title)(
        _holds("the_heaviest_answer_lies_where_the_token_does", _equal_cells(_flipped))
    )

_case("geometry", "student tokens in padding")(
    lambda matcher, kind: _padded("student_tokens_outside_the_source_are_unmatched", matcher)
)
_case("geometry", "teacher tokens in padding")(
    lambda matcher, kind: _padded("teacher_tokens_outside_the_source_capture_nothing", matcher)
)


def _padded(name: str, matcher: Matcher) -> None:
    boxes = ((-60.3, -40.2, 80.6, 95.1), (-45.7, -30.9, 100.3, 90.8))
    one = next(declared for declared in REGISTRY if declared.name == name)
    one.check(matcher, MatcherExample(*_views(boxes=boxes)))


@_case("geometry", "turned source")
def _turned(matcher: Matcher, kind: MatcherKind) -> None:
    _needs(kind, "geometric")
    student, teacher = _views()
    wanted = _sound(matcher, student, teacher)
    motion = torch.tensor([[0.8, -0.6, 200.0], [0.6, 0.8, 60.0], [0.0, 0.0, 1.0]])
    sizes = torch.full_like(source_sizes(student), 500)
    moved = [map_source(view, motion, sizes) for view in (student, teacher)]
    ensure_same(run(matcher, *moved), wanted, "the source turned")


@_case("geometry", "perspective")
def _warped(matcher: Matcher, kind: MatcherKind) -> None:
    _needs(kind, "geometric")
    student, _ = _views()
    _, geometry, _ = parts(student)
    bend = torch.eye(3)
    bend[2, 0], bend[2, 1] = 1e-3, -5e-4
    warped = with_matrix(student, geometry.matrix @ bend)
    _heaviest_is_itself(matcher, warped)


@_case("geometry", "singular matrix")
def _singular(matcher: Matcher, kind: MatcherKind) -> None:
    _needs(kind, "geometric")
    _refused_or_unmatched(matcher, lambda matrix: matrix * torch.tensor([[0.0, 1.0, 1.0]]))


@_case("geometry", "NaN in a matrix")
def _nan_matrix(matcher: Matcher, kind: MatcherKind) -> None:
    _needs(kind, "geometric")
    _refused_or_unmatched(matcher, lambda matrix: torch.full_like(matrix, torch.nan))


def _refused_or_unmatched(matcher: Matcher, spoil: Callable[[Tensor], Tensor]) -> None:
    student, teacher = _views()
    matrix = parts(teacher)[1].matrix.clone()
    matrix[0] = spoil(matrix[0])
    weights, _ = _sound(matcher, student, with_matrix(teacher, matrix))
    ensure(float(weights[0].sum()) == 0, "an image without a place has matches")


@_case("geometry", "sizes given as (width, height)")
def _swapped(matcher: Matcher, kind: MatcherKind) -> None:
    _needs(kind, "geometric")
    features, geometry, _ = parts(_views()[0])
    # seven columns of 14 px do not fit into 56 px, which is all that can be seen of the mistake
    size = torch.tensor([[98, 56]] * 2, dtype=torch.int32)
    wrong = Tokens(features, geometry._replace(view_size=size), TokenGrid.tiling(4, 7, (56, 98)))
    matcher(wrong, wrong)
    raise AssertionError("a view of (width, height) was taken")


@_case("geometry", "half-precision matrix")
def _half_matrix(matcher: Matcher, kind: MatcherKind) -> None:
    _needs(kind, "geometric")
    student, teacher = _views()
    matcher(with_matrix(student, parts(student)[1].matrix.half()), teacher)
    raise AssertionError("a half-precision matrix was taken")


@_case("views", "batch of 1")
def _one_image(matcher: Matcher, kind: MatcherKind) -> None:
    student, teacher = _views()
    weights, costs = run(matcher, student, teacher)
    found = run(matcher, images(student, [1]), images(teacher, [1]))
    ensure_same(found, (weights[1:], costs[1:]), "one image")


_case("views", "batch of 0")(_holds("an_empty_batch_is_served"))


@_case("views", "teacher batch 1 against 2")
def _batches(matcher: Matcher, kind: MatcherKind) -> None:
    student, teacher = _views()
    matcher(student, images(teacher, [0]))
    raise AssertionError("a batch of 1 was broadcast")


@_case("views", "two local sizes, one teacher view")
def _steps(matcher: Matcher, kind: MatcherKind) -> None:
    one, two = _views()
    three, _ = _views(3, grids=((3, 2), (1, 1)), boxes=((40.1, 30.2, 90.3, 99.6), (0, 0, 9, 9)))
    students = [two, one, three]
    found = match_views(matcher, students, [two])
    ensure(list(found) == [(1, 0), (2, 0)], f"the pairs are {list(found)}")
    for (v, _), matches in found.items():
        ensure_same(
            run(lambda *_, matches=matches: matches, students[v], two),
            run(matcher, students[v], two),
            f"match_views, student view {v}",
        )


@_case("views", "more teacher than student views")
def _teachers(matcher: Matcher, kind: MatcherKind) -> None:
    one, two = _views()
    found = match_views(matcher, [one], [one, two, two])
    ensure(list(found) == [(0, 1), (0, 2)], f"the pairs are {list(found)}")


_case("layout", "non-contiguous and expanded")(_holds("layout_does_not_matter"))
_case("layout", "tensors that require a gradient")(_holds("no_gradient_flows"))
_case("layout", "inference_mode tensors")(_holds("inference_mode_works"))


@_case("layout", "channels-last feature maps")
def _channels_last(matcher: Matcher, kind: MatcherKind) -> None:
    _needs(kind, "similarity")
    views = _views()
    wanted = run(matcher, *views)
    maps = []
    for view in views:
        features, _, grid = parts(view)
        b, _, d = features.shape
        image = features.mT.reshape(b, d, grid.rows, grid.cols)
        image = image.contiguous(memory_format=torch.channels_last)
        maps.append(with_features(view, image.flatten(2).mT))
    ensure_same(run(matcher, *maps), wanted, "channels-last features")


def _compiled(backend: str) -> Case:
    def case(matcher: Matcher, kind: MatcherKind) -> None:
        graphs = 0

        def counting(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
            nonlocal graphs
            graphs += 1
            compiler = torch._dynamo.lookup_backend(backend)
            made: Callable[..., object] = compiler(module, inputs)
            return made

        torch.compiler.reset()
        compiled = torch.compile(lambda s, t: matcher(s, t), fullgraph=True, backend=counting)
        for step in range(10):
            low = 5.3 + step
            boxes = ((low, 8.4, 110.6, 95.1 + step), (30.7, low, 140.3, 110.8))
            views = _views(step, boxes=boxes)
            found = compiled(*views)
            again = run(lambda *_, found=found: found, *views)
            ensure_same(again, run(matcher, *views), f"compiled, step {step}")
        ensure(graphs <= 2, f"{graphs} graphs over ten steps of changing crops")

    return case


_case("compile", "aot_eager, ten steps")(_compiled("aot_eager"))
_case("compile", "inductor, ten steps")(_compiled("inductor"))

"""All pairs of views in one call: to the bit what each pair gives by itself."""

import itertools

import pytest
import torch
from helpers.strategies import crops, random_geometry
from hypothesis import given, settings
from hypothesis import strategies as st

from local_distill import (
    CropGeometry,
    GeometryError,
    LocalDistillError,
    Matches,
    ShapeError,
    TokenGrid,
    Tokens,
    match_views,
)
from local_distill.matching import SimilarityMatcher
from local_distill.matching._stacked_pairs import match_stacked
from local_distill.matching.bilinear import BilinearMatcher
from local_distill.matching.overlap import OverlapMatcher
from local_distill.matching.radius import RadiusMatcher

GEOMETRIC = [RadiusMatcher(), BilinearMatcher(), OverlapMatcher(), OverlapMatcher("clip")]
LARGE, SMALL = TokenGrid.tiling(3, 5, (24, 40)), TokenGrid.tiling(2, 3, (16, 16))


class Counting:
    """A matcher that remembers what it was called with."""

    def __init__(self, matcher):
        self.matcher = matcher
        self.calls = []

    def __call__(self, student, teacher):
        self.calls.append((student, teacher))
        return self.matcher(student, teacher)


def dino_views(b=2, features=None, seed=0):
    """Two global and three local views of b images."""
    generator = torch.Generator().manual_seed(seed)
    views = []
    for i in range(5):
        grid, size = (LARGE, (24, 40)) if i < 2 else (SMALL, (16, 16))
        values = None
        if features is not None:
            values = torch.randn(b, grid.num_tokens, features, generator=generator)
        views.append(Tokens(values, random_geometry(b, size, seed=seed + i), grid))
    return views


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("matcher", GEOMETRIC, ids=repr)
@settings(max_examples=10)
@given(data=st.data())
def test_matches_of_a_step_are_those_of_each_pair(matcher, data):
    b = data.draw(st.integers(1, 3))
    views = []
    for i in range(4):
        grid, size = (LARGE, (24, 40)) if i < 2 else (SMALL, (16, 16))
        views.append(Tokens(None, crops(data.draw, b, size, (50, 70), padding=9.0), grid))
    every = list(itertools.product(range(4), range(3)))
    pairs = data.draw(st.lists(st.sampled_from(every), max_size=8))
    found = matcher.match_views(views, views[:3], pairs)
    assert list(found) == list(dict.fromkeys(pairs))
    for (v, q), matches in found.items():
        assert isinstance(matches, Matches)
        assert same(matches, matcher(views[v], views[q]))


@pytest.mark.parametrize("matcher", GEOMETRIC, ids=repr)
def test_match_views_uses_it(matcher):
    views = dino_views(features=4)
    found = match_views(matcher, views, views[:2])
    assert list(found) == [(0, 1), (1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (4, 0), (4, 1)]
    for (v, q), matches in found.items():
        assert same(matches, matcher(views[v], views[q]))
    assert any(bool(matches.matched.any()) for matches in found.values())


def test_one_call_for_all_pairs_of_the_same_grids_without_their_features():
    views = dino_views(features=4)
    counting = Counting(RadiusMatcher())
    pairs = [(v, q) for v in range(5) for q in range(2) if v != q]
    match_stacked(counting, views, views[:2], pairs, with_features=False)
    assert [(s.grid, t.grid) for s, t in counting.calls] == [(LARGE, LARGE), (SMALL, LARGE)]
    assert [s.geometry.matrix.shape[0] for s, _ in counting.calls] == [2 * 2, 2 * 6]
    assert all(tokens.features is None for call in counting.calls for tokens in call)


def test_features_are_stacked_where_the_matcher_looks_at_them():
    views = dino_views(features=4)
    views[3] = views[3]._replace(features=views[3].features.double())  # a form of its own
    counting = Counting(SimilarityMatcher())
    pairs = [(v, q) for v in range(5) for q in range(2) if v != q]
    found = match_stacked(counting, views, views[:2], pairs)
    assert len(counting.calls) == 3
    for v, q in pairs:
        assert same(found[v, q], SimilarityMatcher()(views[v], views[q]))
    # views without geometry, and without a grid, can be stacked as well
    bare = [Tokens(view.features) for view in views]
    for (v, q), matches in match_stacked(SimilarityMatcher(), bare, bare[:2], pairs).items():
        assert same(matches, SimilarityMatcher()(bare[v], bare[q]))


@pytest.mark.parametrize("matcher", GEOMETRIC, ids=repr)
def test_nothing_to_match(matcher):
    views = dino_views()
    assert matcher.match_views(views, views[:2], []) == {}
    assert matcher.match_views([], [], []) == {}
    pairs = [(2, 0), (3, 0), (2, 1)]
    empty = [
        view._replace(geometry=CropGeometry(*(part[:0] for part in view.geometry)))
        for view in views
    ]
    for matches in matcher.match_views(empty, empty, pairs).values():
        assert matches.cost.shape == (0, 6)
    none = [view._replace(grid=view.grid._replace(rows=0)) for view in views]
    for matches in matcher.match_views(none, views, pairs).values():
        assert matches.cost.shape == (2, 0)
    for matches in matcher.match_views(views, none, pairs).values():
        assert matches.weight.shape == (2, 6, 0)
        assert bool(matches.cost.isinf().all())


def test_pairs_may_be_any_iterable_and_come_twice():
    views = dino_views()
    pairs = [(3, 1), (0, 1), (2, 0), (3, 1)]
    counting = Counting(RadiusMatcher())
    found = match_stacked(counting, tuple(views), views, iter(pairs))
    assert list(found) == [(3, 1), (0, 1), (2, 0)]  # in their order, not in that of the stacks
    assert [call[0].geometry.matrix.shape[0] for call in counting.calls] == [4, 2]
    assert same(found[3, 1], RadiusMatcher()(views[3], views[1]))


def bad_matrix(view, value):
    matrix = view.geometry.matrix.clone()
    matrix[1, 0, 0] = value
    return view._replace(geometry=view.geometry._replace(matrix=matrix))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda view: view._replace(geometry=None), r"`student\[3\]` has no geometry"),
        (lambda view: view._replace(grid=None), r"`student\[3\]` has no grid"),
        (
            lambda view: bad_matrix(view, torch.nan),
            r"`student\[3\].geometry`: the matrix holds NaN",
        ),
        (
            lambda view: view._replace(features=torch.zeros(2, 7, 4)),
            r"`student\[3\].features` holds 7 tokens",
        ),
        (
            lambda view: view._replace(geometry=random_geometry(2, (16, 16), (70, 50))),
            r"`student\[3\].geometry` and `teacher\[1\].geometry` have different source sizes",
        ),
        (
            lambda view: view._replace(features=None, geometry=random_geometry(1, (16, 16))),
            r"axis `b` is 1 in `student\[3\].*` but 2 in `teacher\[1\]",
        ),
        (
            lambda view: view._replace(geometry=random_geometry(1, (16, 16))),
            r"axis `b` is 1 in `student\[3\].*` but 2 in `student\[3\].features`",
        ),
        (
            lambda view: view._replace(geometry=view.geometry.matrix),
            r"`student\[3\].geometry` must be a CropGeometry",
        ),
        (lambda view: view.geometry.matrix, r"`student\[3\]` must be Tokens"),
    ],
)
@pytest.mark.parametrize("pairs", [[(3, 1)], [(2, 1), (3, 1), (4, 1)]])
def test_errors_name_the_view(change, text, pairs):
    views = dino_views(features=4)
    student = list(views)
    student[3] = change(views[3])
    with pytest.raises(LocalDistillError, match=text):
        RadiusMatcher().match_views(student, views, pairs)


def test_errors_name_the_image_of_the_view_not_of_the_stack():
    views = dino_views()
    matrix = views[1].geometry.matrix.clone()
    matrix[1, 0, 1] = 0.5 * matrix[1, 0, 0]
    sheared = [views[0], views[1]._replace(geometry=views[1].geometry._replace(matrix=matrix))]
    with pytest.raises(
        GeometryError, match=r"`teacher\[1\].geometry` of image 1: .*OverlapMatcher"
    ):
        OverlapMatcher().match_views(views, sheared, [(2, 0), (3, 0), (2, 1)])


def test_batches_that_differ_are_not_made_up_for_by_another_pair():
    two, three = dino_views(2), dino_views(3)
    for student, teacher in (([two[2], three[2]], [three[0], two[0]]),):
        with pytest.raises(ShapeError, match=r"axis `b` is 2 in `student\[0\].*3 in `teacher\[0\]"):
            RadiusMatcher().match_views(student, teacher, [(0, 0), (1, 1)])
    # views of different numbers of images are fine where pairs agree
    found = RadiusMatcher().match_views([two[2], three[2]], [two[0], three[0]], [(0, 0), (1, 1)])
    assert [matches.cost.shape[0] for matches in found.values()] == [2, 3]


def test_an_error_without_a_name_gets_one():
    def refuse(student, teacher):
        raise ShapeError("these do not fit")

    views = dino_views()
    for pairs in ([(4, 1)], [(4, 1), (3, 1)]):
        with pytest.raises(ShapeError, match=r"do not fit \(in student\[4\] or teacher\[1\]\)"):
            match_stacked(refuse, views, views, pairs)


def test_an_error_of_the_stack_alone_is_not_hidden():
    def refuse(student, teacher):
        if student.geometry.matrix.shape[0] > 2:
            raise ShapeError("too many")
        return RadiusMatcher()(student, teacher)

    views = dino_views()
    with pytest.raises(ShapeError, match="too many"):
        match_stacked(refuse, views, views, [(2, 0), (3, 0)])


def test_views_that_are_not_there_are_refused():
    views = dino_views()
    for pair in ((5, 0), (0, 2), (-1, 0)):
        with pytest.raises(ShapeError, match="`pairs` names"):
            RadiusMatcher().match_views(views, views[:2], [pair])
    with pytest.raises(ShapeError, match="`student` must be a list"):
        RadiusMatcher().match_views(views[0], views, [(0, 0)])
    with pytest.raises(ShapeError, match="`teacher` must be a list"):
        RadiusMatcher().match_views(views, torch.zeros(2), [(0, 0)])


def test_a_bad_view_changes_no_other_pair():
    """Seen nowhere, as under compile: the NaN view stays unmatched, the others as they are."""
    views = dino_views()
    student = list(views)
    student[3] = bad_matrix(views[3], torch.nan)
    pairs = [(2, 0), (3, 0), (4, 0)]
    matcher = RadiusMatcher()
    compiled = torch.compile(matcher.match_views, fullgraph=True, backend="eager")
    found, plain = compiled(student, views, pairs), matcher.match_views(views, views, pairs)
    assert same(found[2, 0], plain[2, 0])
    assert same(found[4, 0], plain[4, 0])
    assert torch.equal(found[3, 0].weight[0], plain[3, 0].weight[0])
    assert bool(plain[3, 0].matched[1].any())
    assert not found[3, 0].matched[1].any()


@pytest.mark.parametrize("matcher", GEOMETRIC[:3], ids=repr)
def test_compiles_to_two_graphs_over_changing_crops_and_batches(matcher):
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("eager")  # the matchers' own tests compile them for good
    compiled = torch.compile(matcher.match_views, fullgraph=True, backend=counter)
    pairs = [(0, 1), (1, 0), (2, 0), (3, 0)]
    for step, b in enumerate((2, 2, 3, 4, 2, 5)):
        views = dino_views(b, seed=10 * step)[:4]
        found, plain = compiled(views, views[:2], pairs), matcher.match_views(views, views, pairs)
        for pair in pairs:
            torch.testing.assert_close(found[pair].weight, plain[pair].weight)
            torch.testing.assert_close(found[pair].cost, plain[pair].cost)
    assert counter.frame_count <= 2


def test_no_gradient_and_no_change():
    views = dino_views()
    learned = [
        view._replace(geometry=view.geometry._replace(matrix=view.geometry.matrix.requires_grad_()))
        for view in views
    ]
    before = [view.geometry.matrix.detach().clone() for view in learned]
    for matcher in GEOMETRIC:
        found = matcher.match_views(learned, learned, [(2, 0), (3, 0)])
        assert not any(part.requires_grad for matches in found.values() for part in matches)
    for view, matrix in zip(learned, before, strict=True):
        assert torch.equal(view.geometry.matrix, matrix)

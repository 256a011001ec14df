import copy
import math
import pickle

import pytest
import torch
from helpers.strategies import matches_for, random_geometry
from hypothesis import given
from hypothesis import strategies as st

from local_distill import (
    Matches,
    NearestMatcher,
    ShapeError,
    SimilarityMatcher,
    TokenGrid,
    Tokens,
    match_views,
    nearest_matches,
    similarity_matches,
)
from local_distill.errors import ConfigError
from local_distill.matching._results import dense_matches
from local_distill.matching.keep_best import KeepBest, keep_best
from local_distill.matching.mutual import Mutual
from local_distill.testing import oracles


def check(matches, *, count=None, fraction=None):
    """What stays is what it was, and nothing is left of the rest."""
    found = keep_best(matches, count=count, fraction=fraction)
    assert torch.equal(found.teacher_index, matches.teacher_index)
    best = oracles.kept_tokens(matches, count=count, fraction=fraction)
    for image, kept in enumerate(best):
        for i in range(matches.cost.shape[1]):
            if i in kept:
                assert torch.equal(found.weight[image, i], matches.weight[image, i])
                assert found.cost[image, i] == matches.cost[image, i]
            else:
                assert (found.weight[image, i] == 0).all()
                assert float(found.cost[image, i]) == torch.inf
    return found


SIZES = st.tuples(st.integers(2, 3), st.integers(1, 12), st.integers(1, 5))


@st.composite
def some_matches(draw):
    matches = draw(matches_for(*draw(SIZES)))
    if draw(st.booleans()):  # exact ties
        matches = matches._replace(cost=(matches.cost * 3).floor())
    return matches


@given(some_matches(), st.integers(1, 14))
def test_keeps_a_count(matches, count):
    check(matches, count=count)


@given(some_matches(), st.integers(1, 100))
def test_keeps_a_fraction(matches, percent):
    check(matches, fraction=percent / 100)


@pytest.mark.parametrize("matched", [1, 3, 25, 50, 100, 196])
def test_the_fraction_is_exact_in_whole_per_cents(matched):
    valid = torch.zeros(2, 200, dtype=torch.bool)
    valid[1, 4 : 4 + matched] = True
    for percent in range(1, 101):  # 0.07 · 100 > 7 in floating point
        found = keep_best(Matches.identity(valid), fraction=percent / 100)
        assert found.matched.sum(1).tolist() == [0, -(-matched * percent // 100)]


def test_a_fraction_is_of_the_matched_tokens_of_each_image():
    valid = torch.zeros(3, 10, dtype=torch.bool)
    valid[0], valid[1, 3:7] = True, True
    found = keep_best(Matches.identity(valid), fraction=0.7)
    assert found.matched.sum(1).tolist() == [7, 3, 0]
    assert keep_best(Matches.identity(valid), fraction=1.0).matched.equal(valid)
    assert keep_best(Matches.identity(valid), fraction=1e-9).matched.sum(1).tolist() == [1, 1, 0]


def test_ties_go_to_the_lower_student_index():
    found = keep_best(Matches.identity(torch.ones(2, 300, dtype=torch.bool)), count=120)
    assert torch.equal(found.matched, (torch.arange(300) < 120).expand(2, 300))


@given(some_matches(), st.integers(1, 14))
def test_agrees_with_compact(matches, count):
    n = min(count, matches.cost.shape[1])
    _, best = matches.compact(n)
    _, again = keep_best(matches, count=count).compact(n)
    for one, two in zip(best, again, strict=True):
        assert torch.equal(one, two)


@given(some_matches(), st.integers(1, 14))
def test_twice_is_once_and_more_keeps_more(matches, count):
    once = keep_best(matches, count=count)
    assert torch.equal(keep_best(once, count=count).weight, once.weight)
    more = keep_best(matches, count=count + 1)
    assert not (once.matched & ~more.matched).any()


@given(some_matches(), st.integers(1, 14))
def test_an_image_knows_nothing_of_the_others(matches, count):
    whole = keep_best(matches, count=count)
    alone = keep_best(Matches(*(part[1:2] for part in matches)), count=count)
    assert torch.equal(alone.weight[0], whole.weight[1])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_cost_that_is_not_finite_is_no_match_and_takes_no_ones_place(bad):
    matches = Matches.identity(torch.ones(2, 5, dtype=torch.bool))
    matches.cost[0, 1] = bad
    found = keep_best(matches, count=2)
    assert found.matched.tolist() == [[True, False, True, False, False], [True, True] + [False] * 3]
    assert not found.cost.isnan().any()
    assert keep_best(matches, fraction=0.5).matched.sum(1).tolist() == [2, 3]


def test_a_token_without_weight_is_no_match_whatever_its_cost():
    matches = Matches.identity(torch.tensor([[False, True, True], [True, True, True]]))
    matches = matches._replace(cost=torch.zeros(2, 3))
    assert keep_best(matches, count=1).matched.tolist() == [
        [False, True, False],
        [True, False, False],
    ]


def test_negative_and_huge_costs():
    cost = torch.tensor([[-2.0, 3e38, -3e38, 0.0]] * 2)
    matches = Matches.identity(torch.ones(2, 4, dtype=torch.bool))._replace(cost=cost)
    found = keep_best(matches, count=2)
    assert found.matched.tolist() == [[True, False, True, False]] * 2


def test_dense_matches_keep_their_expanded_index():
    g = torch.Generator().manual_seed(0)
    matches = dense_matches(torch.rand(2, 6, 4, generator=g) / 4, torch.rand(2, 6, generator=g))
    found = check(matches, count=3)
    assert found.teacher_index.stride()[:2] == (0, 0)


@pytest.mark.parametrize(("b", "s", "k"), [(0, 3, 1), (2, 0, 1), (2, 3, 0), (0, 0, 0)])
@pytest.mark.parametrize("setting", [{"count": 2}, {"fraction": 0.5}])
def test_empty(b, s, k, setting):
    matches = Matches(torch.zeros(b, s, k).long(), torch.zeros(b, s, k), torch.zeros(b, s))
    found = keep_best(matches, **setting)
    assert found.weight.shape == (b, s, k)
    assert not found.matched.any()
    assert bool(found.cost.isposinf().all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_stay_and_nothing_is_changed_or_gets_a_gradient(dtype):
    g = torch.Generator().manual_seed(0)
    weight = torch.rand(4, 6, 2, generator=g).to(dtype).transpose(0, 2).requires_grad_()
    cost = torch.rand(6, 2, generator=g).to(dtype).T.requires_grad_()
    matches = Matches(torch.zeros(2, 6, 1).long().expand(2, 6, 4), weight, cost)
    before = [part.clone() for part in matches]
    found = keep_best(matches, count=2)
    assert found.weight.dtype == found.cost.dtype == dtype
    assert not found.weight.requires_grad
    assert not found.cost.requires_grad
    for part, old in zip(matches, before, strict=True):
        assert torch.equal(part, old)
    with torch.inference_mode():
        again = keep_best(Matches(*(part.clone() for part in matches)), count=2)
    assert torch.equal(again.weight, found.weight)


def views(count, seed):
    g = torch.Generator().manual_seed(seed)
    return [Tokens(torch.randn(2, 6 + i, 3, generator=g)) for i in range(count)]


@pytest.mark.parametrize("setting", [{"count": 2}, {"fraction": 0.5}])
def test_match_views_is_the_inner_matchers(setting):
    class Own:
        def __call__(self, student, teacher):
            raise AssertionError("not this one")

        def match_views(self, student, teacher, pairs):
            return {(v, q): similarity_matches(student[v], teacher[q]) for v, q in pairs}

    student, teacher = views(3, 0), views(2, 1)
    for pairs in (None, iter([(0, 0), (2, 1)]), []):
        for (v, q), matches in match_views(
            KeepBest(Own(), **setting), student, teacher, pairs
        ).items():
            wanted = KeepBest(SimilarityMatcher(), **setting)(student[v], teacher[q])
            assert torch.equal(matches.weight, wanted.weight)
            assert torch.equal(matches.cost, wanted.cost)
    assert len(KeepBest(Own(), **setting).match_views(student, teacher)) == 4


def test_both_directions_with_counts_of_their_own():
    """As VICRegL: 20 from the first view to the second, 4 back."""
    grid, small = TokenGrid.tiling(7, 7, (224, 224)), TokenGrid.tiling(3, 3, (96, 96))
    large = Tokens(None, random_geometry(2, (224, 224)), grid)
    little = Tokens(None, random_geometry(2, (96, 96), seed=1), small)
    nearest = NearestMatcher(max_distance=None)
    there = match_views(KeepBest(nearest, count=20), [large, little], [large, little], [(0, 1)])
    back = match_views(KeepBest(nearest, count=4), [large, little], [large, little], [(1, 0)])
    found = there | back
    assert found[0, 1].matched.sum(1).tolist() == [20, 20]
    assert found[1, 0].matched.sum(1).tolist() == [4, 4]
    whole = nearest(large, little)
    assert (
        found[0, 1].cost.nan_to_num(posinf=-1).amax(1) <= whole.cost.sort(1).values[:, 19]
    ).all()


def test_of_mutual_matches():
    grid = TokenGrid.tiling(3, 5, (24, 40))
    one, two = (Tokens(None, random_geometry(seed=seed), grid) for seed in (0, 1))
    mutual = Mutual(NearestMatcher(max_distance=None))(one, two)
    found = KeepBest(Mutual(NearestMatcher(max_distance=None)), count=2)(one, two)
    assert torch.equal(found.weight, keep_best(mutual, count=2).weight)
    assert found.matched.sum(1).tolist() == mutual.matched.sum(1).clamp_max(2).tolist()


def test_module_manners():
    module = KeepBest(SimilarityMatcher(), fraction=0.25)
    assert len(list(module.modules())) == 2
    student, teacher = views(2, 0)
    wanted = module(student, teacher)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(student, teacher).weight, wanted.weight)
    assert "fraction=0.25" in repr(module)
    assert "nearest_matches" in repr(KeepBest(nearest_matches, count=3))
    assert "count=3" in repr(KeepBest(nearest_matches, count=3))


@pytest.mark.parametrize("setting", [{"count": 3}, {"fraction": 0.4}])
def test_vmap(setting):
    g = torch.Generator().manual_seed(0)
    all_matches = [
        dense_matches(torch.rand(2, 6, 4, generator=g) / 4, torch.rand(2, 6, generator=g))
        for _ in range(3)
    ]
    stacked = Matches(*(torch.stack(parts) for parts in zip(*all_matches, strict=True)))
    found = torch.vmap(lambda matches: keep_best(matches, **setting))(stacked)
    for i, matches in enumerate(all_matches):
        assert torch.equal(found.weight[i], keep_best(matches, **setting).weight)


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ({}, "exactly one of `count` and `fraction`"),
        ({"count": 3, "fraction": 0.5}, "got count=3 and fraction=0.5"),
        ({"count": 0}, "`count`.*at least 1"),
        ({"count": -1}, "`count`"),
        ({"count": 2.0}, "`count`"),
        ({"count": True}, "`count`"),
        ({"fraction": 0.0}, r"`fraction` must lie in \(0, 1\]"),
        ({"fraction": 1.1}, "`fraction`"),
        ({"fraction": -0.1}, "`fraction`"),
        ({"fraction": math.nan}, "`fraction`"),
        ({"fraction": "half"}, "`fraction`"),
    ],
)
def test_bad_settings_are_refused(setting, text):
    with pytest.raises(ConfigError, match=text):
        keep_best(Matches.identity(torch.ones(2, 3)), **setting)
    with pytest.raises(ConfigError, match=text):
        KeepBest(SimilarityMatcher(), **setting)


def test_bad_matchers_and_matches_are_refused_by_name():
    with pytest.raises(ConfigError, match="`matcher` must be a callable"):
        KeepBest(SimilarityMatcher, count=3)
    good = Matches.identity(torch.ones(2, 3))
    with pytest.raises(ShapeError, match="`matches` must be Matches"):
        keep_best(good.cost, count=1)
    with pytest.raises(ShapeError, match=r"axis `s` is 3 in `matches.teacher_index` but 1"):
        keep_best(good._replace(weight=good.weight[:, :1]), count=1)
    with pytest.raises(ShapeError, match=r"`matches.cost` must hold floating-point"):
        keep_best(good._replace(cost=good.cost.long()), count=1)

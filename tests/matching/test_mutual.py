import copy
import pickle
from unittest.mock import patch

import pytest
import torch
from helpers.strategies import matches_for, random_geometry
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
from local_distill.matching import mutual
from local_distill.matching._results import dense_matches
from local_distill.matching.keep_best import KeepBest
from local_distill.matching.mutual import Mutual, mutual_matches
from local_distill.testing import oracles


def check(matches, reverse):
    found = mutual_matches(matches, reverse)
    kept = torch.tensor(
        oracles.mutual_weights(matches, reverse), dtype=matches.weight.dtype
    ).reshape(matches.weight.shape)
    assert torch.equal(found.weight, kept)
    assert torch.equal(found.teacher_index, matches.teacher_index)
    stays = (kept > 0).any(-1)
    assert torch.equal(found.cost, torch.where(stays, matches.cost, torch.inf))
    return found


@st.composite
def both_ways(draw, most=6):
    b, s, t = draw(st.integers(2, 3)), draw(st.integers(1, 7)), draw(st.integers(1, 7))
    k, r = draw(st.integers(1, most)), draw(st.integers(1, most))
    return draw(matches_for(b, s, t, k)), draw(matches_for(b, t, s, r))


def soft(b, s, t, seed, zeros=0.5):
    """Dense matches, as soft matchers give them: the index is expanded."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.rand(b, s, t, generator=g) * (torch.rand(b, s, t, generator=g) > zeros) / t
    return dense_matches(weight, torch.rand(b, s, generator=g))


@given(both_ways())
def test_keeps_what_the_definition_keeps(pair):
    check(*pair)


@given(both_ways(), st.integers(1, 3), st.booleans())
def test_the_table_in_blocks_gives_the_same(pair, block, few):
    with (
        patch.object(mutual, "block_length", lambda _bytes, _device: block),
        patch.object(mutual, "_FEW_COMPARISONS", 100 if few else 0),
    ):
        check(*pair)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 99), st.booleans(), st.booleans())
def test_dense_on_one_side_or_both(s, t, seed, dense_forward, dense_reverse):
    one = soft(2, s, t, seed) if dense_forward else similar(2, s, t, seed)
    two = soft(2, t, s, seed + 1) if dense_reverse else similar(2, t, s, seed + 1)
    check(one, two)


def similar(b, s, t, seed):
    g = torch.Generator().manual_seed(seed)
    f, h = torch.randn(b, s, 3, generator=g), torch.randn(b, t, 3, generator=g)
    return similarity_matches(Tokens(f), Tokens(h))


@given(both_ways())
def test_both_directions_keep_the_same_pairs(pair):
    def named(matches):
        weight, index = matches.weight, matches.teacher_index
        places = (weight > 0).nonzero().tolist()
        return {(image, i, int(index[image, i, c])) for image, i, c in places}

    one, two = pair
    forward, back = named(mutual_matches(one, two)), named(mutual_matches(two, one))
    assert forward == {(image, i, j) for image, j, i in back}


@given(both_ways())
def test_twice_is_once(pair):
    one, two = pair
    once = mutual_matches(one, two)
    for first, second in zip(once, mutual_matches(once, two), strict=True):
        assert torch.equal(first, second)


@given(st.integers(2, 3), st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_mutual_nearest_neighbours_of_features(b, s, t, seed):
    g = torch.Generator().manual_seed(seed)
    f, h = torch.randn(b, s, 3, generator=g), torch.randn(b, t, 3, generator=g)
    found = Mutual(SimilarityMatcher("l2"))(Tokens(f), Tokens(h))
    for image in range(b):
        table = [[float((x - y).double().norm()) for y in h[image]] for x in f[image]]
        for i in range(s):
            j = min(range(t), key=lambda j, row=table[i]: row[j])
            back = min(range(s), key=lambda i, table=table, j=j: table[i][j])
            assert bool(found.matched[image, i]) == (back == i)
            assert not found.matched[image, i] or int(found.teacher_index[image, i, 0]) == j


def test_nearest_keeps_whole_what_is_one_to_one():
    grid = TokenGrid.tiling(3, 5, (24, 40))
    tokens = Tokens(None, random_geometry(), grid)
    assert Mutual(NearestMatcher())(tokens, tokens).matched.all()
    # four small student tokens fall on each teacher token, which chooses one of them
    fine = tokens._replace(grid=TokenGrid.tiling(6, 10, (24, 40)))
    found = Mutual(NearestMatcher(max_distance=None))(fine, tokens)
    assert found.matched.sum(1).tolist() == [15, 15]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_tokens_stay_out_and_cost_no_one_else(bad):
    g = torch.Generator().manual_seed(0)
    f, h = torch.randn(2, 6, 3, generator=g), torch.randn(2, 5, 3, generator=g)
    f[0, 2, 1], h[0, 3, 0] = bad, bad
    found = Mutual(SimilarityMatcher())(Tokens(f), Tokens(h))
    assert not found.matched[0, 2]
    assert not (found.matched[0] & (found.teacher_index[0, :, 0] == 3)).any()
    keep, kept = [0, 1, 3, 4, 5], [0, 1, 2, 4]
    alone = Mutual(SimilarityMatcher())(Tokens(f[:, keep]), Tokens(h[:, kept]))
    assert torch.equal(found.matched[0, keep], alone.matched[0])
    assert not found.weight.isnan().any()


def test_an_image_knows_nothing_of_the_others():
    one, two = soft(3, 5, 4, 0), soft(3, 4, 5, 1)
    whole = mutual_matches(one, two)
    for image in range(3):
        alone = mutual_matches(*(Matches(*(x[image : image + 1] for x in m)) for m in (one, two)))
        assert torch.equal(alone.weight[0], whole.weight[image])


def test_a_teacher_token_without_match_keeps_no_one():
    one = Matches(torch.zeros(2, 3, 1).long(), torch.ones(2, 3, 1), torch.zeros(2, 3))
    two = Matches(torch.zeros(2, 1, 1).long(), torch.zeros(2, 1, 1), torch.full((2, 1), torch.inf))
    found = mutual_matches(one, two)
    assert not found.matched.any()
    assert bool(found.cost.isposinf().all())


@pytest.mark.parametrize(
    ("b", "s", "t", "k", "r"),
    [
        (0, 3, 4, 1, 1),
        (0, 3, 4, 9, 9),
        (2, 0, 4, 1, 0),
        (2, 3, 0, 0, 1),
        (2, 3, 4, 0, 2),
        (2, 3, 4, 2, 0),
    ],
)
def test_empty(b, s, t, k, r):
    def none(n, c):
        return Matches(torch.zeros(b, n, c).long(), torch.ones(b, n, c), torch.zeros(b, n))

    found = mutual_matches(none(s, k), none(t, r))
    assert found.weight.shape == (b, s, k)
    assert not found.matched.any()
    assert bool(found.cost.isposinf().all())


class Storages(TorchDispatchMode):
    """The largest tensor that was made, in bytes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.largest = max(self.largest, leaf.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize(("k", "r"), [(1, 1), (4, 4)])
def test_few_candidates_need_no_table(k, r):
    b, s, t = 2, 300, 200
    g = torch.Generator().manual_seed(0)
    one = Matches(
        torch.randint(0, t, (b, s, k), generator=g), torch.ones(b, s, k) / k, torch.zeros(b, s)
    )
    two = Matches(
        torch.randint(0, s, (b, t, r), generator=g), torch.ones(b, t, r) / r, torch.zeros(b, t)
    )
    with Storages() as made:
        mutual_matches(one, two)
    assert made.largest <= 8 * b * max(s * k, t * r)


@pytest.mark.parametrize("k", [9, 200])
def test_the_table_keeps_to_the_budget(k):
    b, s, t, budget = 4, 900, 200, 60_000
    one, two = soft(b, s, t, 0), soft(b, t, s, 1)
    one, two = (
        Matches(m.teacher_index[..., :n], m.weight[..., :n].contiguous(), m.cost)
        for m, n in ((one, k), (two, 9))
    )
    with (
        patch.object(mutual, "block_length", lambda size, _device: max(1, budget // size)),
        Storages() as made,
    ):
        found = mutual_matches(one, two)
    # Nothing is larger than the int64 partners of an image or the result; one whole (t, s) table
    # would be 180,000 bytes.
    result = found.weight.untyped_storage().nbytes()
    assert result == 4 * b * s * k
    assert made.largest <= max(result, budget)


def test_no_gradient_nothing_changed_any_layout():
    one, two = soft(2, 4, 5, 0), soft(2, 5, 4, 1)
    wanted = mutual_matches(one, two)
    strided = Matches(
        one.teacher_index,
        one.weight.mT.contiguous().mT.requires_grad_(),
        one.cost.clone().requires_grad_(),
    )
    before = [part.clone() for part in (*strided, *two)]
    found = mutual_matches(strided, two)
    assert not found.weight.requires_grad
    assert not found.cost.requires_grad
    assert torch.equal(found.weight, wanted.weight)
    for part, old in zip((*strided, *two), before, strict=True):
        assert torch.equal(part, old)
    with torch.inference_mode():
        again = mutual_matches(*(Matches(*(part.clone() for part in m)) for m in (one, two)))
    assert torch.equal(again.weight, wanted.weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_stay(dtype):
    one = soft(2, 4, 5, 0)
    one = one._replace(weight=one.weight.to(dtype), cost=one.cost.to(dtype))
    found = mutual_matches(one, soft(2, 5, 4, 1))
    assert found.weight.dtype == found.cost.dtype == dtype


class Counting:
    """A matcher that is no Module, has its own `match_views` and counts."""

    def __init__(self):
        self.calls = []

    def __call__(self, student, teacher):
        raise AssertionError("not this one")

    def match_views(self, student, teacher, pairs):
        self.calls.append(list(pairs))
        return {(v, q): similarity_matches(student[v], teacher[q]) for v, q in pairs}


def views(count, seed):
    g = torch.Generator().manual_seed(seed)
    return [Tokens(torch.randn(2, 4 + i, 3, generator=g)) for i in range(count)]


@pytest.mark.parametrize("pairs", [None, [(0, 0), (2, 1)], iter([(1, 0), (0, 1)]), []])
def test_match_views_runs_each_way_once(pairs):
    student, teacher = views(3, 0), views(2, 1)
    inner = Counting()
    found = match_views(Mutual(inner), student, teacher, pairs)
    forward, back = inner.calls
    assert list(found) == forward
    assert back == [(q, v) for v, q in forward]
    for (v, q), matches in found.items():
        wanted = Mutual(SimilarityMatcher())(student[v], teacher[q])
        assert torch.equal(matches.weight, wanted.weight)
        assert torch.equal(matches.cost, wanted.cost)


def test_own_match_views_takes_all_pairs_by_default():
    student, teacher = views(3, 0), views(2, 1)
    assert list(Mutual(Counting()).match_views(student, teacher)) == [
        (0, 1), (1, 0), (2, 0), (2, 1),
    ]  # fmt: skip
    found = Mutual(Counting()).match_views(student, teacher, iter([(2, 1), (0, 0)]))
    assert list(found) == [(2, 1), (0, 0)]
    with pytest.raises(ShapeError, match="2 teacher views"):
        Mutual(Counting()).match_views(student, teacher, [(0, 2)])


def test_with_keep_best_inside_and_outside():
    student, teacher = views(2, 0), views(2, 1)
    best_inside = Mutual(KeepBest(SimilarityMatcher(), count=2))
    best_outside = KeepBest(Mutual(SimilarityMatcher()), count=2)
    for matcher in (best_inside, best_outside):
        for (v, q), matches in match_views(matcher, student, teacher).items():
            assert torch.equal(matches.cost, matcher(student[v], teacher[q]).cost)
            assert (matches.matched.sum(1) <= 2).all()
    # mutual pairs of the two best each way are among the mutual pairs
    inside, plain = (m(student[0], teacher[1]) for m in (best_inside, Mutual(SimilarityMatcher())))
    assert not (inside.matched & ~plain.matched).any()


def test_module_manners():
    module = Mutual(KeepBest(SimilarityMatcher(), count=2))
    assert len(list(module.modules())) == 3
    student, teacher = views(2, 0)
    wanted = module(student, teacher)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(student, teacher).weight, wanted.weight)
    assert "nearest_matches" in repr(Mutual(nearest_matches))
    assert "SimilarityMatcher" in repr(module)
    for bad in (None, SimilarityMatcher, 3):
        with pytest.raises(ConfigError, match="`matcher` must be a callable"):
            Mutual(bad)


@pytest.mark.parametrize("few", [True, False])
def test_compiles_to_one_graph_over_changing_steps(few):
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(mutual_matches, fullgraph=True, backend=counter)
    make = similar if few else soft
    for seed in range(10):
        one, two = make(2, 7, 5, seed), make(2, 5, 7, seed + 50)
        found, plain = compiled(one, two), mutual_matches(one, two)
        assert torch.equal(found.weight, plain.weight)
        assert torch.equal(found.cost, plain.cost)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("make", [similar, soft])
def test_vmap(make):
    pairs = [(make(2, 4, 5, seed), make(2, 5, 4, seed + 9)) for seed in range(3)]
    stacked = [
        Matches(*(torch.stack(x) for x in zip(*m, strict=True))) for m in zip(*pairs, strict=True)
    ]
    found = torch.vmap(mutual_matches)(*stacked)
    for i, pair in enumerate(pairs):
        assert torch.equal(found.weight[i], mutual_matches(*pair).weight)


GOOD, BACK = soft(2, 4, 5, 0), soft(2, 5, 4, 1)


@pytest.mark.parametrize(
    ("matches", "reverse", "text"),
    [
        (GOOD, Matches(*(part[:1] for part in BACK)), "axis `b` is 2 in `matches"),
        (GOOD, soft(2, 3, 4, 0), r"`matches.teacher_index` must lie in \[0, 3\).*from 0 to 4"),
        (GOOD, soft(2, 5, 9, 0), r"`reverse.teacher_index` must lie in \[0, 4\).*from 0 to 8"),
        (GOOD._replace(teacher_index=GOOD.teacher_index - 1), BACK, "from -1 to 3"),
        (GOOD._replace(teacher_index=GOOD.teacher_index.int()), BACK, "must be int64"),
        (GOOD._replace(weight=GOOD.weight > 0), BACK, "`matches.weight` must hold floating"),
        (GOOD._replace(cost=GOOD.cost[:, :2]), BACK, "axis `s` is 4 in `matches.teacher_index`"),
        (GOOD.weight, BACK, "`matches` must be Matches"),
        (GOOD, None, "`reverse` must be Matches"),
    ],
)  # fmt: skip
def test_bad_matches_are_refused_by_name(matches, reverse, text):
    with pytest.raises(ShapeError, match=text):
        mutual_matches(matches, reverse)

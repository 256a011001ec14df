import copy
import pickle
import sys

import pytest
import torch
from helpers.strategies import random_geometry
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from local_distill import (
    ShapeError,
    SimilarityMatcher,
    SoftSimilarityMatcher,
    TokenGrid,
    Tokens,
    from_box,
    match_views,
    similarity_matches,
)
from local_distill.errors import ConfigError
from local_distill.testing import oracles

# the package exports functions of the same names
byte_budget = sys.modules["local_distill.kernels.byte_budget"]
most_similar = sys.modules["local_distill.kernels.most_similar"]


def feature_views(b, counts, d):
    """Tokens with random features, one view for each count."""
    gen = torch.Generator().manual_seed(0)
    return [Tokens(torch.randn(b, n, d, generator=gen)) for n in counts]


@given(
    st.integers(2, 3), st.integers(1, 6), st.integers(1, 6), st.integers(1, 5),
    st.sampled_from(["cosine", "l2"]),
    st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    st.integers(0, 999),
)  # fmt: skip
def test_reaches_the_best_cost(b, s, t, d, metric, dtype, seed):
    gen = torch.Generator().manual_seed(seed)
    f = torch.randn(b, s, d, generator=gen).to(dtype)
    g = torch.randn(b, t, d, generator=gen).to(dtype)
    matches = similarity_matches(Tokens(f), Tokens(g), metric=metric)
    assert matches.matched.all()
    best = oracles.most_similar_tokens(Tokens(f), Tokens(g), metric)
    for image, table in enumerate(oracles.feature_costs(Tokens(f), Tokens(g), metric)):
        for i, costs in enumerate(table):
            j = int(matches.teacher_index[image, i, 0])
            assert costs[j] == pytest.approx(best[image][i].cost, abs=2e-6)
            assert float(matches.cost[image, i]) == pytest.approx(costs[j], abs=1e-5)


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast_give_float32s_indices(metric, dtype):
    gen = torch.Generator().manual_seed(0)
    # near-tied: neighbours differ in the last bits of the half-precision format
    base = torch.randn(2, 1, 32, generator=gen)
    f = (base + 0.05 * torch.randn(2, 60, 32, generator=gen)).to(dtype)
    g = (base + 0.05 * torch.randn(2, 50, 32, generator=gen)).to(dtype)
    wanted = similarity_matches(Tokens(f.float()), Tokens(g.float()), metric=metric)
    found = similarity_matches(Tokens(f), Tokens(g), metric=metric)
    assert torch.equal(found.teacher_index, wanted.teacher_index)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = similarity_matches(Tokens(f.float()), Tokens(g.float()), metric=metric)
    assert torch.equal(again.teacher_index, wanted.teacher_index)


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_bad_tokens_never_match_and_never_capture(metric, bad):
    gen = torch.Generator().manual_seed(0)
    f, g = torch.randn(2, 5, 3, generator=gen), torch.randn(2, 4, 3, generator=gen)
    f[0, 1, 2], g[1, 0, 0] = bad, bad
    matches = similarity_matches(Tokens(f), Tokens(g), metric=metric)
    assert matches.matched[0].tolist() == [True, False, True, True, True]
    assert matches.matched[1].all()
    assert (matches.teacher_index[1] != 0).all()
    assert matches.cost[0, 1] == torch.inf


def test_zero_norm_tokens_have_no_direction():
    f = torch.tensor([[[0.0, 0.0], [1.0, 0.0]], [[1.0, 1.0], [0.0, 1.0]]])
    g = torch.tensor([[[0.0, 0.0], [-1.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    matches = similarity_matches(Tokens(f), Tokens(g))
    assert matches.matched.tolist() == [[False, True], [False, False]]
    assert matches.teacher_index[0, 1, 0] == 1
    assert float(matches.cost[0, 1]) == 2.0
    # under l2 zero is a place like any other
    assert similarity_matches(Tokens(f), Tokens(g), metric="l2").matched.all()


def test_duplicates_and_ties_go_to_the_lowest_index():
    g = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]] * 2)
    f = torch.tensor([[[2.0, 0.0], [0.0, 3.0]]] * 2)
    for metric in ("cosine", "l2"):
        matches = similarity_matches(Tokens(f), Tokens(g), metric=metric)
        assert matches.teacher_index[..., 0].tolist() == [[0, 1], [0, 1]]


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_cosine_does_not_overflow_or_vanish(scale):
    gen = torch.Generator().manual_seed(0)
    f, g = torch.randn(2, 5, 3, generator=gen), torch.randn(2, 4, 3, generator=gen)
    plain = similarity_matches(Tokens(f), Tokens(g))
    scaled = similarity_matches(Tokens(f * scale), Tokens(g * scale))
    assert torch.equal(scaled.teacher_index, plain.teacher_index)
    torch.testing.assert_close(scaled.cost, plain.cost)


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("budget", [1, 400, 3000, 40_000])
def test_the_byte_budget_changes_nothing(monkeypatch, metric, budget):
    views = feature_views(5, (37, 11, 20), 3)
    whole = SimilarityMatcher(metric).match_views(views, views, [(0, 1), (2, 1), (2, 0)])
    monkeypatch.setattr(byte_budget, "_CPU_BYTES", budget)
    found = SimilarityMatcher(metric).match_views(views, views, [(0, 1), (2, 1), (2, 0)])
    for pair, matches in whole.items():
        assert torch.equal(found[pair].teacher_index, matches.teacher_index)
        torch.testing.assert_close(found[pair].cost, matches.cost, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("matcher", [SimilarityMatcher(), SoftSimilarityMatcher()])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_features_that_need_no_care_give_the_same_bits_without_it(monkeypatch, matcher, size):
    f, g = (Tokens(view.features * size) for view in feature_views(5, (37, 11), 3))
    plain = matcher(f, g)
    monkeypatch.setattr(most_similar, "_PLAIN_NORMS", (torch.inf, 0.0))
    careful = matcher(f, g)
    assert torch.equal(plain.teacher_index, careful.teacher_index)
    assert torch.equal(plain.weight, careful.weight)
    assert torch.equal(plain.cost, careful.cost)


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_a_table_never_outgrows_the_budget(monkeypatch, metric):
    """The largest tensor made is a block's: no table, and no prepared copy of a view."""
    f, g = feature_views(6, (200, 80), 64)
    given = {tokens.features.untyped_storage().data_ptr() for tokens in (f, g)}
    sizes = []

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made = [x.untyped_storage() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
            sizes.extend(x.nbytes() for x in made if x.data_ptr() not in given)
            return out

    # whole, the scores would take 384,000 bytes and the teacher 122,880; one image's scores 64,000
    monkeypatch.setattr(byte_budget, "_CPU_BYTES", 2**15)
    with Largest():
        similarity_matches(f, g, metric=metric)
    assert 2**13 < max(sizes) <= 2**15


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize(
    "dtypes", [(torch.float32,) * 3, (torch.bfloat16, torch.float64, torch.float32)]
)
def test_match_views_is_pair_by_pair(metric, dtypes):
    views = [
        tokens._replace(features=tokens.features.to(dtype))
        for tokens, dtype in zip(feature_views(3, (6, 5, 4), 7), dtypes, strict=True)
    ]
    geometry, grid = random_geometry(3), TokenGrid.tiling(2, 3, (24, 40))
    views[0] = views[0]._replace(geometry=geometry, grid=grid)
    matcher = SimilarityMatcher(metric)
    pairs = [(2, 0), (1, 2), (0, 0), (0, 1), (1, 0), (2, 0)]  # one of them twice
    found = match_views(matcher, views, views, pairs)
    assert list(found) == list(dict.fromkeys(pairs))
    for (v, q), matches in found.items():
        alone = matcher(views[v], views[q])
        assert torch.equal(matches.teacher_index, alone.teacher_index)
        assert matches.cost.dtype == alone.cost.dtype
        torch.testing.assert_close(matches.cost, alone.cost, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(matches.weight, alone.weight)


def test_match_views_takes_views_without_tokens_and_batches_of_their_own():
    views = [*feature_views(2, (3, 0), 4), *feature_views(3, (2, 5), 4)]
    found = match_views(SimilarityMatcher(), views, views, [(0, 1), (1, 0), (2, 3), (0, 0)])
    assert [tuple(matches.weight.shape) for matches in found.values()] == [
        (2, 3, 0), (2, 0, 1), (3, 2, 1), (2, 3, 1),
    ]  # fmt: skip
    assert match_views(SimilarityMatcher(), views, views, []) == {}


def test_match_views_names_the_view():
    views = feature_views(2, (3, 4), 4)
    with pytest.raises(ShapeError, match=r"axis `b` is 2 in `student\[0\].*`teacher\[1\]"):
        match_views(SimilarityMatcher(), views, [views[0], *feature_views(1, (4,), 4)], [(0, 1)])
    with pytest.raises(ShapeError, match=r"`teacher\[1\]` has no features"):
        match_views(SimilarityMatcher(), views, [views[0], Tokens()], [(0, 1)])


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_tokens_outside_the_source_take_no_part(metric):
    grid = TokenGrid.tiling(1, 4, (10, 40))
    padded = from_box(torch.tensor([[-20.0, 0, 20, 10]] * 2), (10, 40), (10, 40))
    features = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    tokens = Tokens(features, padded, grid)
    inner = torch.tensor([False, False, True, True])
    # each token's like stands at its own place, of which the first two are in the padding
    matches = similarity_matches(tokens, tokens, metric=metric)
    assert torch.equal(matches.matched, inner.expand(2, 4))
    assert torch.equal(matches.teacher_index[:, 2:, 0], torch.tensor([[2, 3]] * 2))
    matches = similarity_matches(Tokens(features), tokens, metric=metric)
    assert bool(matches.matched.all())
    assert int(matches.teacher_index.min()) >= 2


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
def test_a_bad_token_changes_nothing_else(metric, bad):
    (f, g) = feature_views(2, (9, 8), 6)
    before = similarity_matches(f, g, metric=metric)
    g.features[0, 3, 1] = bad
    f.features[1, 2, 0] = bad
    after = similarity_matches(f, g, metric=metric)
    same = before.teacher_index[..., 0] != 3
    same[1] = True
    same[1, 2] = False
    if bad == 1e30:
        assert bool(after.matched.all())
        if metric == "l2":  # a finite outlier is a place like any other, and takes precision
            same[0] = False
    assert torch.equal(after.teacher_index[same], before.teacher_index[same])
    torch.testing.assert_close(after.cost[same], before.cost[same])


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("exponent", [-36, -30, -19, 19, 30, 35])
def test_no_scale_overflows_or_vanishes(metric, exponent):
    f, g = feature_views(2, (7, 5), 6)
    plain = similarity_matches(f, g, metric=metric)
    scale = 10.0**exponent
    scaled = similarity_matches(
        Tokens(f.features * scale), Tokens(g.features * scale), metric=metric
    )
    assert torch.equal(scaled.teacher_index, plain.teacher_index)
    expected = plain.cost if metric == "cosine" else plain.cost * scale
    torch.testing.assert_close(scaled.cost, expected, rtol=1e-5, atol=1e-6 * expected.max().item())


def test_cosine_takes_tokens_of_quite_different_scales():
    f, g = feature_views(2, (6, 6), 8)
    plain = similarity_matches(f, g)
    powers = torch.tensor([1e-36, 1e-20, 1e-3, 1.0, 1e20, 1e36])[:, None]
    mixed = similarity_matches(Tokens(f.features * powers), Tokens(g.features * powers.flip(0)))
    assert torch.equal(mixed.teacher_index, plain.teacher_index)
    torch.testing.assert_close(mixed.cost, plain.cost, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_one_teacher_token_and_duplicates(metric):
    f, g = feature_views(3, (5, 1), 4)
    matches = similarity_matches(f, g, metric=metric)
    assert bool(matches.matched.all())
    assert int(matches.teacher_index.max()) == 0
    twice = Tokens(g.features.expand(3, 6, 4))
    assert bool(similarity_matches(f, twice, metric=metric).matched.all())


def test_float64_stays_and_is_exact():
    f, g = (Tokens(x.features.double() * 1e200) for x in feature_views(2, (9, 8), 6))
    for metric in ("cosine", "l2"):
        matches = similarity_matches(f, g, metric=metric)
        assert matches.cost.dtype == matches.weight.dtype == torch.float64
        assert matches.teacher_index.dtype == torch.int64
    costs = torch.tensor(oracles.feature_costs(f, g)[0], dtype=torch.float64)
    found = similarity_matches(f, g).cost[0]
    torch.testing.assert_close(found, costs.amin(1), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_inputs_stay_as_they_are_and_may_be_of_inference_mode(metric):
    f, g = feature_views(2, (400, 300), 30)  # more than one piece of a block
    copies = f.features.clone(), g.features.clone()
    plain = similarity_matches(f, g, metric=metric)
    assert torch.equal(f.features, copies[0])
    assert torch.equal(g.features, copies[1])
    with torch.inference_mode():
        made = Tokens(f.features * 1), Tokens(g.features * 1)
        within = similarity_matches(*made, metric=metric)
    for found in (within, similarity_matches(*made, metric=metric)):
        assert torch.equal(found.teacher_index, plain.teacher_index)


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_vmap(metric):
    f, g = feature_views(2, (6, 5), 4)
    pads = torch.stack([f.features, f.features.flip(0)]), torch.stack([g.features, g.features])
    matcher = SimilarityMatcher(metric)
    found = torch.vmap(lambda a, b: matcher(Tokens(a), Tokens(b)))(*pads)
    shared = torch.vmap(lambda a: matcher(Tokens(a), g))(pads[0])
    for i in range(2):
        plain = matcher(Tokens(pads[0][i]), g)
        assert torch.equal(found.teacher_index[i], plain.teacher_index)
        assert torch.equal(shared.teacher_index[i], plain.teacher_index)


def test_settings_travel_with_the_module():
    matcher = pickle.loads(pickle.dumps(copy.deepcopy(SimilarityMatcher("l2"))))
    assert repr(matcher) == "SimilarityMatcher(metric='l2')"


def test_no_gradient_and_any_layout():
    f = torch.randn(3, 5, 2, requires_grad=True).transpose(0, 2)
    g = torch.randn(1, 4, 3).expand(2, 4, 3)
    matches = similarity_matches(Tokens(f), Tokens(g))
    assert not matches.weight.requires_grad
    assert not matches.cost.requires_grad
    again = similarity_matches(Tokens(f.contiguous()), Tokens(g.contiguous()))
    assert torch.equal(matches.teacher_index, again.teacher_index)


@pytest.mark.parametrize(("b", "s", "t"), [(2, 3, 0), (2, 0, 3), (0, 3, 3)])
def test_empty(b, s, t):
    matches = similarity_matches(Tokens(torch.zeros(b, s, 4)), Tokens(torch.zeros(b, t, 4)))
    assert matches.weight.shape == (b, s, min(1, t))
    assert not matches.matched.any()


@pytest.mark.parametrize(
    ("student", "teacher", "text"),
    [
        (Tokens(torch.zeros(2, 3, 4)), Tokens(torch.zeros(1, 3, 4)), "axis `b`"),
        (Tokens(torch.zeros(2, 3, 4)), Tokens(torch.zeros(2, 3, 5)), "axis `d`"),
        (Tokens(), Tokens(torch.zeros(2, 3, 4)), "`student` has no features"),
        (Tokens(torch.zeros(2, 3, 4).long()), Tokens(torch.zeros(2, 3, 4)), "floating-point"),
        (
            Tokens(torch.zeros(2, 7, 4), None, TokenGrid.tiling(2, 3, (8, 8))),
            Tokens(torch.zeros(2, 6, 4)),
            "class and register tokens",
        ),
    ],
)
def test_bad_tokens_are_refused_by_name(student, teacher, text):
    with pytest.raises(ShapeError, match=text):
        SimilarityMatcher()(student, teacher)
    with pytest.raises(ConfigError, match="metric"):
        SimilarityMatcher(metric="l1")

import copy
import math
import pickle
import sys

import pytest
import torch
from helpers.strategies import random_geometry
from hypothesis import given
from hypothesis import strategies as st

from local_distill import GeometryError, ShapeError, TokenGrid, Tokens, from_box
from local_distill.errors import ConfigError
from local_distill.matching.soft_similarity import SoftSimilarityMatcher, soft_similarity_matches
from local_distill.testing import oracles

# the package exports a function of the same name
byte_budget = sys.modules["local_distill.kernels.byte_budget"]


def feature_views(b, counts, d, scale=1.0):
    """Tokens with random features, one view for each count."""
    gen = torch.Generator().manual_seed(0)
    return [Tokens(torch.randn(b, n, d, generator=gen) * scale) for n in counts]


@given(
    st.integers(2, 3), st.integers(1, 6), st.integers(1, 6), st.integers(1, 5),
    st.sampled_from([1e-4, 0.01, 0.1, 1.0, 100.0]),
    st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    st.integers(0, 999),
)  # fmt: skip
def test_gives_the_oracles_weights_and_costs(b, s, t, d, temperature, dtype, seed):
    gen = torch.Generator().manual_seed(seed)
    f = torch.randn(b, s, d, generator=gen).to(dtype)
    g = torch.randn(b, t, d, generator=gen).to(dtype)
    if seed % 3 == 0:
        f[0, 0], g[1, t - 1] = 0.0, torch.nan
    matches = soft_similarity_matches(Tokens(f), Tokens(g), temperature=temperature)
    assert matches.weight.dtype == matches.cost.dtype
    assert matches.weight.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(matches.teacher_index, torch.arange(t).expand(b, s, t))
    # a float32 cosine is good to some 1e-7, a weight to that over the temperature
    rounding = (1e-14 if dtype == torch.float64 else 5e-7) / temperature
    for image, tokens in enumerate(oracles.soft_similarities(Tokens(f), Tokens(g), temperature)):
        weight = torch.tensor([found.row(t) for found in tokens], dtype=torch.float64)
        cost = torch.tensor([found.cost for found in tokens], dtype=torch.float64)
        slack = {"rtol": 1e-5, "atol": 1e-6 + rounding}
        torch.testing.assert_close(matches.weight[image].double(), weight, **slack)
        torch.testing.assert_close(matches.cost[image].double(), cost, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-10, 1e-4, 0.1, 1e30])
def test_finite_at_any_temperature(temperature):
    f, g = feature_views(2, (9, 7), 5)
    for views in ((f, g), (f, f)):
        matches = soft_similarity_matches(*views, temperature=temperature)
        assert bool(matches.cost.isfinite().all())
        torch.testing.assert_close(matches.mass, torch.ones(2, 9))
    if temperature < 1e-4:  # the limit is the most similar alone
        assert torch.equal(matches.weight.argmax(-1), torch.arange(9).expand(2, 9))
        assert float(matches.weight.amax(-1).min()) > 0.999


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast_are_float32(dtype):
    f, g = (Tokens(x.features.to(dtype)) for x in feature_views(2, (40, 30), 32))
    wide = Tokens(f.features.float()), Tokens(g.features.float())
    wanted = soft_similarity_matches(*wide, temperature=1e-3)
    found = soft_similarity_matches(f, g, temperature=1e-3)
    assert torch.equal(found.weight, wanted.weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = soft_similarity_matches(*wide, temperature=1e-3)
    assert torch.equal(found.weight, wanted.weight)
    assert found.cost.dtype == torch.float32


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 0.0])
def test_bad_tokens_never_match_and_never_capture(bad):
    f, g = feature_views(2, (5, 4), 3)
    before = soft_similarity_matches(f, g)
    f.features[0, 1], g.features[1, 0] = bad, bad
    after = soft_similarity_matches(f, g)
    assert after.matched[0].tolist() == [True, False, True, True, True]
    assert float(after.cost[0, 1]) == math.inf
    assert float(after.weight[0, 1].abs().max()) == 0
    assert float(after.weight[1, :, 0].abs().max()) == 0
    others = torch.tensor([0, 2, 3, 4])
    torch.testing.assert_close(after.weight[0, others], before.weight[0, others])
    rest = before.weight[1, :, 1:]
    torch.testing.assert_close(after.weight[1, :, 1:], rest / rest.sum(-1, keepdim=True))


def test_an_image_without_a_valid_teacher_token_leaves_the_others_alone():
    f, g = feature_views(2, (5, 4), 3)
    before = soft_similarity_matches(f, g)
    g.features[0] = torch.nan
    after = soft_similarity_matches(f, g)
    assert not after.matched[0].any()
    assert bool(after.cost[0].isinf().all())
    assert torch.equal(after.weight[1], before.weight[1])
    assert bool(after.weight.isfinite().all())


def test_tokens_outside_the_source_take_no_part():
    grid = TokenGrid.tiling(1, 4, (10, 40))
    padded = from_box(torch.tensor([[-20.0, 0, 20, 10]] * 2), (10, 40), (10, 40))
    (view,) = feature_views(2, (4,), 5)
    tokens = view._replace(geometry=padded, grid=grid)
    matches = soft_similarity_matches(tokens, tokens)
    assert matches.matched.tolist() == [[False, False, True, True]] * 2
    matches = soft_similarity_matches(view, tokens)
    assert bool(matches.matched.all())
    assert float(matches.weight[..., :2].max()) == 0


@pytest.mark.parametrize("scale", [1e-30, 1e-19, 1e19, 1e30])
def test_does_not_overflow_or_vanish(scale):
    plain = soft_similarity_matches(*feature_views(2, (6, 5), 8))
    scaled = soft_similarity_matches(*feature_views(2, (6, 5), 8, scale))
    torch.testing.assert_close(scaled.weight, plain.weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scaled.cost, plain.cost, rtol=1e-5, atol=1e-6)


def test_duplicates_share_evenly():
    g = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]] * 2)
    matches = soft_similarity_matches(Tokens(g[:, :1]), Tokens(g), temperature=0.01)
    torch.testing.assert_close(matches.weight, torch.tensor([[[0.5, 0.0, 0.5]]] * 2))


@pytest.mark.parametrize("budget", [1, 500, 3000])
def test_the_byte_budget_changes_nothing(monkeypatch, budget):
    f, g = feature_views(5, (37, 11), 3)
    whole = soft_similarity_matches(f, g)
    monkeypatch.setattr(byte_budget, "_CPU_BYTES", budget)
    found = soft_similarity_matches(f, g)
    torch.testing.assert_close(found.weight, whole.weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.cost, whole.cost, rtol=1e-5, atol=1e-6)


def test_no_gradient_no_change_and_any_layout():
    f = torch.randn(3, 5, 2, requires_grad=True).transpose(0, 2)
    g = torch.randn(1, 4, 3).expand(2, 4, 3)
    copies = f.clone(), g.clone()
    matches = soft_similarity_matches(Tokens(f), Tokens(g))
    assert not matches.weight.requires_grad
    assert not matches.cost.requires_grad
    assert torch.equal(f, copies[0])
    assert torch.equal(g, copies[1])
    again = soft_similarity_matches(Tokens(f.contiguous()), Tokens(g.contiguous()))
    torch.testing.assert_close(matches.weight, again.weight)
    with torch.inference_mode():
        made = Tokens(f * 1), Tokens(g * 1)
        within = soft_similarity_matches(*made)
    for found in (within, soft_similarity_matches(*made)):
        torch.testing.assert_close(found.weight, again.weight)


@pytest.mark.parametrize(
    ("b", "s", "t", "d"), [(2, 3, 0, 4), (2, 0, 3, 4), (0, 3, 3, 4), (2, 3, 3, 0)]
)
def test_empty(b, s, t, d):
    matches = soft_similarity_matches(Tokens(torch.zeros(b, s, d)), Tokens(torch.zeros(b, t, d)))
    assert matches.weight.shape == (b, s, t)
    assert not matches.matched.any()
    assert bool(matches.cost.isinf().all())


def test_vmap():
    f, g = feature_views(2, (6, 5), 4)
    both = torch.stack([f.features, f.features.flip(0)])
    found = torch.vmap(lambda a: soft_similarity_matches(Tokens(a), g))(both)
    for i in range(2):
        plain = soft_similarity_matches(Tokens(both[i]), g)
        torch.testing.assert_close(found.weight[i], plain.weight)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf, "cold"])
def test_bad_temperatures_are_refused(bad):
    with pytest.raises(ConfigError, match="temperature"):
        SoftSimilarityMatcher(bad)
    with pytest.raises(ConfigError, match="temperature"):
        soft_similarity_matches(*feature_views(2, (3, 4), 2), temperature=bad)


@pytest.mark.parametrize(
    ("student", "teacher", "text"),
    [
        (Tokens(torch.zeros(2, 3, 4)), Tokens(torch.zeros(1, 3, 4)), "axis `b` is 2"),
        (Tokens(torch.zeros(2, 3, 4)), Tokens(torch.zeros(2, 3, 5)), "axis `d` is 4"),
        (Tokens(), Tokens(torch.zeros(2, 3, 4)), "`student` has no features"),
        (Tokens(torch.zeros(2, 3, 4)), Tokens(torch.zeros(2, 3, 4).int()), "floating-point"),
        (
            Tokens(torch.zeros(2, 7, 4), None, TokenGrid.tiling(2, 3, (8, 8))),
            Tokens(torch.zeros(2, 6, 4)),
            "class and register tokens",
        ),
    ],
)
def test_bad_tokens_are_refused_by_name(student, teacher, text):
    with pytest.raises(ShapeError, match=text):
        SoftSimilarityMatcher()(student, teacher)


def test_half_precision_geometry_is_refused():
    good = Tokens(torch.zeros(2, 15, 4), random_geometry(), TokenGrid.tiling(3, 5, (24, 40)))
    half = good.geometry._replace(matrix=good.geometry.matrix.half())
    with pytest.raises(GeometryError, match="half precision"):
        SoftSimilarityMatcher()(good, good._replace(geometry=half))


def test_settings_travel_with_the_module():
    matcher = pickle.loads(pickle.dumps(copy.deepcopy(SoftSimilarityMatcher(0.3))))
    assert repr(matcher) == "SoftSimilarityMatcher(temperature=0.3)"

import copy
import math
import pickle
import sys

import pytest
import torch
from helpers.strategies import random_geometry, view_pairs
from hypothesis import given
from hypothesis import strategies as st

from local_distill import (
    CropGeometry,
    GeometryError,
    ShapeError,
    TokenGrid,
    Tokens,
    from_box,
    from_matrix,
)
from local_distill.errors import ConfigError
from local_distill.matching.gated_similarity import GatedSimilarityMatcher, gated_similarity_matches
from local_distill.matching.similarity import similarity_matches
from local_distill.testing import oracles

# the package exports a function of the same name
byte_budget = sys.modules["local_distill.kernels.byte_budget"]

METRICS = pytest.mark.parametrize("metric", ["cosine", "l2"])


def with_features(tokens, d=6, seed=0, dtype=torch.float32):
    """The view with random features."""
    gen = torch.Generator().manual_seed(seed)
    b, n = tokens.geometry.matrix.shape[0], tokens.grid.num_tokens
    return tokens._replace(features=torch.randn(b, n, d, generator=gen).to(dtype))


def example(dtype=torch.float32, b=2):
    """Two overlapping views of 3 × 5 and 4 × 3 tokens."""
    one = Tokens(None, random_geometry(b), TokenGrid.tiling(3, 5, (24, 40)))
    two = Tokens(None, random_geometry(b, seed=3), TokenGrid.tiling(4, 3, (24, 40)))
    return with_features(one, seed=1, dtype=dtype), with_features(two, seed=2, dtype=dtype)


def check(student, teacher, matches, radius, metric):
    # within rounding of the radius a candidate may count or not
    near = oracles.gated_tokens(student, teacher, radius - 1e-4, metric)
    perhaps = oracles.gated_tokens(student, teacher, radius + 1e-4, metric)
    costs = oracles.feature_costs(student, teacher, metric)
    distances = oracles.distances_in_cells(student, teacher)
    for image in range(student.features.shape[0]):
        for i in range(student.grid.num_tokens):
            cost = float(matches.cost[image, i])
            assert bool(matches.matched[image, i]) == math.isfinite(cost)
            assert cost <= near[image][i].cost + 1e-5
            assert cost >= perhaps[image][i].cost - 1e-5
            if not math.isfinite(cost):
                assert float(matches.weight[image, i, 0]) == 0
                continue
            j = int(matches.teacher_index[image, i, 0])
            assert distances[image][i][j] < radius + 1e-4
            assert cost == pytest.approx(costs[image][i][j], abs=1e-5, rel=1e-5)
            assert float(matches.weight[image, i, 0]) == 1


@given(
    st.sampled_from(["crop", "turn", "warp"]).flatmap(lambda kind: view_pairs(kind, padding=9.0)),
    st.sampled_from([0.3, 1.0, 2.5]),
    st.sampled_from(["cosine", "l2"]),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    st.integers(0, 99),
)
def test_finds_the_best_within_the_radius(pair, radius, metric, dtype, seed):
    student, teacher = (with_features(x, 4, seed + k, dtype) for k, x in enumerate(pair))
    if seed % 2:
        student.features[0, 0], teacher.features[1, -1] = torch.nan, torch.inf
    matches = gated_similarity_matches(student, teacher, radius=radius, metric=metric)
    assert matches.cost.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    check(student, teacher, matches, radius, metric)


@METRICS
def test_a_wide_radius_is_the_similarity_match(metric):
    student, teacher = example()
    found = gated_similarity_matches(student, teacher, radius=1e6, metric=metric)
    plain = similarity_matches(student, teacher, metric=metric)
    assert torch.equal(found.teacher_index, plain.teacher_index)
    torch.testing.assert_close(found.cost, plain.cost)


@METRICS
def test_the_radius_is_excluded(metric):
    # neighbours exactly one cell diagonal apart
    grid = TokenGrid.tiling(1, 1, (2, 2))
    one = from_box(torch.tensor([[0.0, 0, 2, 2]] * 2), (2, 2), (4, 4))
    two = from_box(torch.tensor([[2.0, 2, 4, 4]] * 2), (2, 2), (4, 4))
    views = [with_features(Tokens(None, x, grid)) for x in (one, two)]
    assert not gated_similarity_matches(*views, radius=1.0, metric=metric).matched.any()
    assert gated_similarity_matches(*views, radius=1.0001, metric=metric).matched.all()


@METRICS
def test_ties_go_to_the_lowest_index_in_reach(metric):
    grid = TokenGrid.tiling(1, 5, (8, 40))
    geometry = from_box(torch.tensor([[0.0, 0, 40, 8]] * 2), (8, 40), (8, 40))
    features = torch.ones(2, 5, 3)
    tokens = Tokens(features, geometry, grid)
    # neighbours stand 1/√2 apart
    matches = gated_similarity_matches(tokens, tokens, radius=0.8, metric=metric)
    assert matches.teacher_index[..., 0].tolist() == [[0, 0, 1, 2, 3]] * 2


@METRICS
def test_no_overlap_gives_no_match(metric):
    grid = TokenGrid.tiling(3, 3, (9, 9))
    one = from_box(torch.tensor([[0.0, 0, 9, 9]] * 2), (9, 9), (90, 90))
    two = from_box(torch.tensor([[70.0, 70, 79, 79]] * 2), (9, 9), (90, 90))
    views = [with_features(Tokens(None, x, grid)) for x in (one, two)]
    matches = gated_similarity_matches(*views, metric=metric)
    assert not matches.matched.any()
    assert bool(matches.cost.isinf().all())
    assert int(matches.teacher_index.min()) >= 0
    assert int(matches.teacher_index.max()) < 9


@METRICS
def test_tokens_in_padding_never_match_and_never_capture(metric):
    grid = TokenGrid.tiling(2, 4, (20, 40))
    padded = from_box(torch.tensor([[-20.0, 0, 20, 20]] * 2), (20, 40), (20, 40))
    tokens = with_features(Tokens(None, padded, grid))
    matches = gated_similarity_matches(tokens, tokens, radius=50.0, metric=metric)
    assert matches.matched[0].tolist() == [False, False, True, True] * 2
    inner = from_box(torch.tensor([[0.0, 0, 20, 20]] * 2), (20, 40), (20, 40))
    student = tokens._replace(geometry=inner)  # the same features, all inside
    matches = gated_similarity_matches(student, tokens, radius=50.0, metric=metric)
    assert bool(matches.matched.all())
    assert set(matches.teacher_index.flatten().tolist()) <= {2, 3, 6, 7}


@METRICS
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_token_changes_nothing_else(metric, bad):
    student, teacher = example()
    before = gated_similarity_matches(student, teacher, radius=2.0, metric=metric)
    student.features[0, 1], teacher.features[1, 4] = bad, bad
    after = gated_similarity_matches(student, teacher, radius=2.0, metric=metric)
    assert not after.matched[0, 1]
    assert not ((after.teacher_index[1, :, 0] == 4) & after.matched[1]).any()
    same = before.teacher_index[..., 0] != 4
    same[0] = True
    same[0, 1] = False
    same &= before.matched  # the index of a token without a match says nothing
    assert torch.equal(after.teacher_index[same], before.teacher_index[same])
    torch.testing.assert_close(after.cost[same], before.cost[same])


def test_zero_norm_tokens_have_no_direction():
    student, teacher = example()
    teacher.features[0] = 0.0
    student.features[1, 3] = 0.0
    matches = gated_similarity_matches(student, teacher, radius=1e6)
    assert not matches.matched[0].any()
    assert (~matches.matched[1]).nonzero().flatten().tolist() == [3]
    # under l2 zero is a place like any other
    assert gated_similarity_matches(student, teacher, radius=1e6, metric="l2").matched.all()


@METRICS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast_give_float32s_indices(metric, dtype):
    student, teacher = example(dtype)
    wide = [tokens._replace(features=tokens.features.float()) for tokens in (student, teacher)]
    wanted = gated_similarity_matches(*wide, radius=3.0, metric=metric)
    found = gated_similarity_matches(student, teacher, radius=3.0, metric=metric)
    assert torch.equal(found.teacher_index, wanted.teacher_index)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gated_similarity_matches(*wide, radius=3.0, metric=metric)
    assert torch.equal(found.teacher_index, wanted.teacher_index)
    assert torch.equal(found.cost, wanted.cost)


@METRICS
@pytest.mark.parametrize("scale", [1e-30, 1e-19, 1e19, 1e30])
def test_does_not_overflow_or_vanish(metric, scale):
    student, teacher = example()
    plain = gated_similarity_matches(student, teacher, metric=metric)
    views = [x._replace(features=x.features * scale) for x in (student, teacher)]
    scaled = gated_similarity_matches(*views, metric=metric)
    assert torch.equal(scaled.matched, plain.matched)
    assert torch.equal(scaled.teacher_index, plain.teacher_index)
    expected = plain.cost * (scale if metric == "l2" else 1.0)
    torch.testing.assert_close(scaled.cost, expected, rtol=1e-5, atol=1e-6 * scale)


@METRICS
@pytest.mark.parametrize("budget", [1, 900, 7000])
def test_the_byte_budget_changes_nothing(monkeypatch, metric, budget):
    student, teacher = example(b=5)
    whole = gated_similarity_matches(student, teacher, radius=2.0, metric=metric)
    monkeypatch.setattr(byte_budget, "_CPU_BYTES", budget)
    found = gated_similarity_matches(student, teacher, radius=2.0, metric=metric)
    assert torch.equal(found.matched, whole.matched)
    assert torch.equal(found.teacher_index, whole.teacher_index)
    torch.testing.assert_close(found.cost, whole.cost, rtol=1e-5, atol=1e-6)


def test_large_sources_and_crops_of_one_pixel():
    side = 65535
    grid = TokenGrid.tiling(7, 9, (63, 81))
    boxes = [[side - 1.0, side - 1.0, side, side], [0.0, 0.0, side, side]]
    tokens = with_features(Tokens(None, from_box(torch.tensor(boxes), (63, 81), (side,) * 2), grid))
    matches = gated_similarity_matches(tokens, tokens)
    assert torch.equal(matches.teacher_index[1, :, 0], torch.arange(63))
    assert float(matches.cost[matches.matched].max()) <= 1e-6


def test_no_gradient_no_change_any_layout_and_inference_mode():
    student, teacher = example()
    plain = gated_similarity_matches(student, teacher)
    f = student.features.transpose(0, 2).contiguous().requires_grad_().transpose(0, 2)
    matrix = student.geometry.matrix.clone().requires_grad_()
    odd = student._replace(features=f, geometry=student.geometry._replace(matrix=matrix))
    copied = teacher.features.clone()
    matches = gated_similarity_matches(odd, teacher)
    assert not matches.weight.requires_grad
    assert not matches.cost.requires_grad
    assert torch.equal(matches.teacher_index, plain.teacher_index)
    assert torch.equal(teacher.features, copied)
    with torch.inference_mode():
        made = [
            Tokens(x.features * 1, CropGeometry(*(p.clone() for p in x.geometry)), x.grid)
            for x in (student, teacher)
        ]
        within = gated_similarity_matches(*made)
    for found in (within, gated_similarity_matches(*made)):
        assert torch.equal(found.teacher_index, plain.teacher_index)


@METRICS
def test_empty(metric):
    student, teacher = example()
    nothing = Tokens(
        torch.zeros(2, 0, 6), teacher.geometry, TokenGrid(0, 3, (8.0, 8.0), (4.0, 4.0))
    )
    matches = gated_similarity_matches(student, nothing, metric=metric)
    assert matches.weight.shape == (2, 15, 0)
    assert not matches.matched.any()
    assert gated_similarity_matches(nothing, student, metric=metric).cost.shape == (2, 0)
    none = [
        Tokens(x.features[:0], CropGeometry(*(p[:0] for p in x.geometry)), x.grid)
        for x in (student, teacher)
    ]
    assert gated_similarity_matches(*none, metric=metric).weight.shape == (0, 15, 1)


@METRICS
def test_vmap(metric):
    student, teacher = example(b=3)
    twice = [
        (
            torch.stack([x.features, x.features.flip(0)]),
            CropGeometry(*(torch.stack([p, p.flip(0)]) for p in x.geometry)),
        )
        for x in (student, teacher)
    ]

    def one(f, f_geometry, g, g_geometry):
        return gated_similarity_matches(
            Tokens(f, f_geometry, student.grid), Tokens(g, g_geometry, teacher.grid), metric=metric
        )

    found = torch.vmap(one)(*twice[0], *twice[1])
    for i in range(2):
        parts = [(f[i], CropGeometry(*(p[i] for p in geometry))) for f, geometry in twice]
        plain = one(*parts[0], *parts[1])
        assert torch.equal(found.matched[i], plain.matched)
        assert torch.equal(found.teacher_index[i], plain.teacher_index)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"features": None}, ShapeError, "`teacher` has no features"),
        ({"geometry": None}, ShapeError, "`teacher` has no geometry"),
        ({"grid": None}, ShapeError, "`teacher` has no grid"),
        ({"features": torch.zeros(2, 15, 5)}, ShapeError, "axis `d` is 6 in `student.features`"),
        ({"features": torch.zeros(2, 16, 6)}, ShapeError, "class and register tokens"),
        ({"features": torch.zeros(2, 15, 6).int()}, ShapeError, "floating-point"),
        ({"geometry": random_geometry(1)}, ShapeError, "axis `b` is"),
        ({"geometry": random_geometry(source_size=(70, 50))}, GeometryError, "source sizes"),
        ({"grid": TokenGrid.tiling(5, 3, (40, 24))}, GeometryError, r"\(width, height\)"),
    ],
)
def test_bad_tokens_are_refused_by_name(change, error, text):
    good = with_features(Tokens(None, random_geometry(), TokenGrid.tiling(3, 5, (24, 40))))
    with pytest.raises(error, match=text):
        GatedSimilarityMatcher()(good, good._replace(**change))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 0.0])
def test_bad_matrices_are_refused(bad):
    good = with_features(Tokens(None, random_geometry(), TokenGrid.tiling(3, 5, (24, 40))))
    matrix = good.geometry.matrix.clone()
    matrix[1, 0, 0] = bad
    with pytest.raises(GeometryError, match="student"):
        GatedSimilarityMatcher()(
            good._replace(geometry=good.geometry._replace(matrix=matrix)), good
        )
    half = good.geometry._replace(matrix=good.geometry.matrix.bfloat16())
    with pytest.raises(GeometryError, match="half precision"):
        GatedSimilarityMatcher()(good, good._replace(geometry=half))


def test_where_values_cannot_be_seen_a_nan_matrix_matches_nothing():
    matrix = torch.eye(3).repeat(2, 1, 1)
    matrix[1, 0, 0] = torch.nan
    size = torch.full((2, 2), 30, dtype=torch.int32)
    grid = TokenGrid.tiling(3, 3, (30, 30))
    tokens = with_features(Tokens(None, CropGeometry(matrix, size, size), grid))
    compiled = torch.compile(gated_similarity_matches, fullgraph=True, backend="eager")
    assert compiled(tokens, tokens).matched.all(1).tolist() == [True, False]
    assert compiled(tokens, tokens).matched.any(1).tolist() == [True, False]


def test_perspective_is_followed():
    matrix = torch.eye(3).repeat(2, 1, 1)
    matrix[:, 2, 0] = 0.01
    grid = TokenGrid.tiling(3, 4, (30, 40))
    bent = with_features(Tokens(None, from_matrix(matrix, (30, 40), (30, 40)), grid))
    matches = gated_similarity_matches(bent, bent, radius=0.7)
    check(bent, bent, matches, 0.7, "cosine")
    assert bool(matches.matched.any())


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf, "near"])
def test_bad_settings_are_refused(bad):
    with pytest.raises(ConfigError, match="radius"):
        GatedSimilarityMatcher(radius=bad)
    with pytest.raises(ConfigError, match="metric"):
        GatedSimilarityMatcher(metric="l1")
    with pytest.raises(ConfigError, match="radius"):
        gated_similarity_matches(*example(), radius=bad)


def test_settings_travel_with_the_module():
    matcher = pickle.loads(pickle.dumps(copy.deepcopy(GatedSimilarityMatcher(2, "l2"))))
    assert repr(matcher) == "GatedSimilarityMatcher(radius=2.0, metric='l2')"

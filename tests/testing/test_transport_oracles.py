"""The oracles of transport and of clusterings against linear scaling, scipy, and by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from local_distill import ConfigError, TokenGrid, Tokens, from_box
from local_distill.testing import oracles

SEEDS = st.integers(0, 9999)


def random(seed, *shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def masses(seed, n):
    parts = 0.1 + random(seed, n)
    return parts / parts.sum()


def plan_of(costs, rows, cols, **settings):
    plan = oracles.scaled_plan(costs.tolist(), rows.tolist(), cols.tolist(), **settings)
    return torch.tensor(plan, dtype=torch.float64)


@given(SEEDS, st.integers(1, 5), st.integers(1, 5), st.integers(0, 4), st.booleans())
def test_plans_are_those_of_scaling_without_logarithms(seed, n, k, iterations, rows_last):
    costs, rows, cols = random(seed, n, k), masses(seed + 1, n), masses(seed + 2, k)
    wanted = (-costs / 0.1).exp()
    for _ in range(iterations):
        if rows_last:
            wanted = wanted * (cols / wanted.sum(0))
            wanted = wanted * (rows / wanted.sum(1))[:, None]
        else:
            wanted = wanted * (rows / wanted.sum(1))[:, None]
            wanted = wanted * (cols / wanted.sum(0))
    last = "rows" if rows_last else "cols"
    found = plan_of(costs, rows, cols, epsilon=0.1, iterations=iterations, last=last)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-15)


def test_long_scaling_gives_the_one_plan_with_both_masses_and_potentials():
    costs, rows, cols = random(0, 4, 6), masses(1, 4), masses(2, 6)
    found = plan_of(costs, rows, cols, epsilon=0.2, iterations=300, last="rows")
    torch.testing.assert_close(found.sum(1), rows)
    torch.testing.assert_close(found.sum(0), cols)
    potentials = found.log() + costs / 0.2  # f_n + g_k: no row differs from another but by a shift
    shifts = potentials - potentials[:1]
    torch.testing.assert_close(shifts, shifts[:, :1].expand(4, 6))


def test_small_entropy_finds_the_cheapest_assignment():
    optimize = pytest.importorskip("scipy.optimize")
    for seed in range(5):
        costs, even = random(seed, 6, 6), torch.full((6,), 1 / 6, dtype=torch.float64)
        found = plan_of(costs, even, even, epsilon=2e-3, iterations=400, last="rows")
        rows, cols = optimize.linear_sum_assignment(costs.numpy())
        wanted = torch.zeros(6, 6, dtype=torch.float64)
        wanted[rows, cols] = 1 / 6
        torch.testing.assert_close(found, wanted, rtol=0, atol=0.01)


def test_nothing_flows_where_it_must_not():
    costs = [[0.0, None, 5.0], [1.0, 2.0, 0.0], [None, 0.0, 1.0]]
    plan = oracles.scaled_plan(
        costs, [0.5, 0.5, 0.0], [0.5, 0.25, 0.25], epsilon=1.0, iterations=200, last="cols"
    )
    assert plan[2] == [0.0] * 3  # no mass
    assert plan[0][1] == 0
    assert [sum(row) for row in plan[:2]] == pytest.approx([0.5, 0.5])
    assert [sum(col) for col in zip(*plan, strict=True)] == pytest.approx([0.5, 0.25, 0.25])


@given(SEEDS, st.integers(1, 4), st.integers(1, 4), st.sampled_from([0.05, 1.0]))
def test_transport_plans_are_the_scaled_costs_of_torch(seed, s, t, epsilon):
    f, g = random(seed, 2, s, 3) - 0.5, random(seed + 1, 2, t, 3) - 0.5
    costs = 1 - torch.nn.functional.cosine_similarity(f[:, :, None], g[:, None], dim=-1)
    found = oracles.transport_plan(Tokens(f), Tokens(g), epsilon=epsilon, iterations=5)
    for image, tokens in enumerate(found):
        wanted = (-costs[image] / epsilon).exp()
        for _ in range(5):
            wanted = wanted / wanted.sum(0) / t
            wanted = wanted / wanted.sum(1, keepdim=True) / s
        rows = torch.tensor([token.row(t) for token in tokens], dtype=torch.float64)
        torch.testing.assert_close(rows, s * wanted, rtol=1e-7, atol=1e-12)
        torch.testing.assert_close(rows.sum(1), torch.ones(s, dtype=torch.float64))
        expected = (s * wanted * costs[image]).sum(1).tolist()
        assert [token.cost for token in tokens] == pytest.approx(expected)


def test_transport_counts_distances_and_leaves_out_what_is_outside():
    grid = TokenGrid.tiling(1, 3, (4, 9))  # 3 px apart, diagonal 5
    inside = from_box([[0.0, 0, 9, 4]], (4, 9), (4, 9))
    moved = from_box([[-3.0, 0, 6, 4]], (4, 9), (4, 9))  # its first token is in the padding
    same = torch.ones(1, 3, 2)
    student, teacher = Tokens(same, inside, grid), Tokens(same, moved, grid)
    found = oracles.transport_plan(
        student, teacher, epsilon=0.5, iterations=400, distance_weight=2.0
    )[0]
    assert [0 in token.weights for token in found] == [False] * 3
    # costs of 2 · 3/5 a step: student tokens 0, 1, 2 stand 0, 1, 2 and 1, 0, 1 steps away
    costs = torch.tensor([[0.0, 1.2], [1.2, 0.0], [2.4, 1.2]], dtype=torch.float64)
    third, half = torch.full((3,), 1 / 3).double(), torch.full((2,), 0.5).double()
    wanted = 3 * plan_of(costs, third, half, epsilon=0.5, iterations=400, last="rows")
    for token, row in zip(found, wanted.tolist(), strict=True):
        assert token.row(3)[1:] == pytest.approx(row)
    assert sum(token.row(3)[1] for token in found) == pytest.approx(1.5)
    back = oracles.transport_plan(teacher, student, epsilon=0.5, iterations=2)[0]
    assert back[0] == oracles.TokenMatch({}, math.inf)
    none = oracles.transport_plan(Tokens(0 * same), Tokens(same), epsilon=0.5, iterations=2)
    assert none == [[oracles.TokenMatch({}, math.inf)] * 3]


def test_joint_tokens_are_the_students_and_then_the_teachers():
    grid = TokenGrid.tiling(1, 2, (4, 8))
    crop = from_box([[-4.0, 0, 4, 4]], (4, 8), (4, 8))
    student = Tokens(torch.tensor([[[5.0, 0.0], [3.0, -4.0]]]), crop, grid)
    teacher = Tokens(torch.tensor([[[0.0, 0.0], [0.0, math.nan], [0.0, 2.0]]]))
    (joint,) = oracles.joint_tokens(student, teacher)
    assert joint.units == [None, [0.6, -0.8], None, None, [0.0, 1.0]]
    assert joint.points == [(-2.0, 2.0), (2.0, 2.0)] + [(0.0, 0.0)] * 3


def test_weighted_means_by_hand():
    rows = [[2.0, 0.0], None, [6.0, 4.0]]
    assert oracles.weighted_mean([1.0, 0.0, 3.0], rows) == [5.0, 3.0]
    assert oracles.weighted_mean([1.0, 9.0, 1.0], rows) == [4.0, 2.0]  # None is not looked at
    assert oracles.weighted_mean([0.0, 0.0, 0.0], rows) is None


@given(SEEDS, st.sampled_from([0.0, 2.0]), st.sampled_from(["image", "batch"]))
def test_cluster_plans_scale_costs_of_likeness_and_distance(seed, weight, scale):
    z, c = (random(seed + i, 2, 4 - i, 3) - 0.5 for i in (0, 1))
    z, c = (torch.nn.functional.normalize(x, dim=-1) for x in (z, c))
    d = 9 * random(seed + 2, 2, 4, 3)
    rows, cols = (torch.stack([masses(seed + i, n) for i in (3, 4)]) for n in (4, 3))
    plans, totals = oracles.cluster_plans(
        z.tolist(),
        c.tolist(),
        d.tolist(),
        rows.tolist(),
        cols.tolist(),
        position_weight=weight,
        epsilon=0.2,
        iterations=4,
        cost_scale=scale,
    )
    costs = -torch.einsum("bnd,bkd->bnk", z, c) + weight * d / d.amax((1, 2), keepdim=True)
    axes = (1, 2) if scale == "image" else (0, 1, 2)
    low, high = costs.amin(axes, keepdim=True), costs.amax(axes, keepdim=True)
    costs = (costs - low) / (high - low)
    for image in range(2):
        wanted = (-costs[image] / 0.2).exp()
        for _ in range(4):
            wanted = wanted * (rows[image] / wanted.sum(1))[:, None]
            wanted = wanted * (cols[image] / wanted.sum(0))
        found = torch.tensor(plans[image], dtype=torch.float64)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-15)
        assert totals[image] == pytest.approx(float((wanted * costs[image]).sum()))


def test_cluster_plans_pass_over_what_is_not_there():
    east, north = [1.0, 0.0], [0.0, 1.0]
    settings = {"position_weight": 1.0, "epsilon": 0.3, "iterations": 50, "cost_scale": "image"}
    # the far distances of what takes no part are no scale for the others
    plans, _ = oracles.cluster_plans(
        [[east, None, north]],
        [[east, None, north]],
        [[[0.0, 1e9, 0.5], [1e9] * 3, [1.0, 1e9, 0.0]]],
        [[0.5, 0.0, 0.5]],
        [[0.5, 0.0, 0.5]],
        **settings,
    )
    alone, _ = oracles.cluster_plans(
        [[east, north]], [[east, north]], [[[0.0, 0.5], [1.0, 0.0]]], [[0.5] * 2], [[0.5] * 2],
        **settings,
    )  # fmt: skip
    kept = [[row[0], row[2]] for row in (plans[0][0], plans[0][2])]
    assert kept == alone[0]
    assert plans[0][1] == [0.0] * 3
    assert [row[1] for row in plans[0]] == [0.0] * 3
    nothing, totals = oracles.cluster_plans(
        [[None]], [[east]], [[[0.0]]], [[0.0]], [[1.0]], **settings
    )
    assert (nothing, totals) == ([[[0.0]]], [0.0])
    with pytest.raises(ConfigError, match="`cost_scale`"):
        oracles.cluster_plans([], [], [], [], [], **{**settings, "cost_scale": "all"})


def test_hard_shares_by_hand():
    plan = [[9.0, 9.0], [0.3, 0.1], [0.1, 0.2], [0.0, 0.0], [0.6, 0.1]]
    # of the view's columns, whose sums are 1 and 0.4, the tokens have 0.3, 0.1, 0, 0.6 and
    # 0.25, 0.5, 0, 0.25
    shares = oracles.hard_shares(plan, 1, 5, by_share=True)
    assert [row[0] for row in shares] == pytest.approx([1 / 3, 0, 0, 2 / 3])
    assert [row[1] for row in shares] == pytest.approx([0, 1, 0, 0])
    whole = oracles.hard_shares(plan, 1, 5, by_share=False)
    assert whole == [[0.5, 0.0], [0.0, 1.0], [0.0, 0.0], [0.5, 0.0]]
    # a small cluster gives more of itself to a token that gives more to a large one
    plan = [[0.5, 0.0], [0.5, 0.2]]
    assert oracles.hard_shares(plan, 0, 2, by_share=True) == [[1.0, 0.0], [0.0, 1.0]]
    assert oracles.hard_shares(plan, 0, 2, by_share=False) == [[0.5, 0.0], [0.5, 0.0]]


@given(SEEDS, st.booleans())
def test_hard_shares_sum_to_one_and_name_one_cluster_a_token(seed, by_share):
    plan = random(seed, 6, 3)
    found = torch.tensor(
        oracles.hard_shares(plan.tolist(), 2, 6, by_share=by_share), dtype=torch.float64
    )
    assert ((found > 0).sum(1) == 1).all()
    judged = plan[2:] / plan[2:].sum(0) if by_share else plan[2:]
    assert torch.equal(found.argmax(1), judged.argmax(1))
    sums = found.sum(0)
    torch.testing.assert_close(sums, (sums > 0).double())

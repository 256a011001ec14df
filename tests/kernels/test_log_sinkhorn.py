import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from local_distill.errors import ConfigError, ShapeError
from local_distill.kernels.log_sinkhorn import log_sinkhorn, log_uniform


def truth(scores, row, col, iterations, last):
    """Plain Sinkhorn on exponentials, in float64 loops; rows and columns of mass 0 are 0."""
    s, t = len(row), len(col)
    live = [scores[i][j] for i in range(s) for j in range(t) if row[i] > 0 and col[j] > 0]
    top = max(live) if live else 0.0
    plan = [
        [math.exp(scores[i][j] - top) if row[i] > 0 and col[j] > 0 else 0.0 for j in range(t)]
        for i in range(s)
    ]

    def scale_rows():
        for i in range(s):
            total = sum(plan[i])
            if total > 0:
                plan[i] = [value * row[i] / total for value in plan[i]]

    def scale_columns():
        for j in range(t):
            total = sum(plan[i][j] for i in range(s))
            if total > 0:
                for i in range(s):
                    plan[i][j] *= col[j] / total

    for _ in range(iterations):
        for step in (scale_columns, scale_rows) if last == "row" else (scale_rows, scale_columns):
            step()
    return plan


@st.composite
def problems(draw, most=6):
    b, s, t = draw(st.integers(2, 3)), draw(st.integers(1, most)), draw(st.integers(1, most))
    g = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    scores = 3 * torch.randn(b, s, t, generator=g, dtype=torch.float64)

    def masses(n):
        mass = torch.rand(b, n, generator=g, dtype=torch.float64) + 0.1
        mass = mass * (torch.rand(b, n, generator=g) > 0.25)
        return mass / mass.sum(-1, keepdim=True).clamp_min(1e-9)

    return scores, masses(s), masses(t)


@given(problems(), st.integers(1, 7), st.sampled_from(["row", "column"]))
def test_agrees_with_loops_on_exponentials(problem, iterations, last):
    scores, row, col = problem
    found = log_sinkhorn(scores, row.log(), col.log(), iterations=iterations, last=last)
    assert found.dtype == torch.float64
    for image in range(scores.shape[0]):
        wanted = truth(
            scores[image].tolist(), row[image].tolist(), col[image].tolist(), iterations, last
        )
        torch.testing.assert_close(
            found[image].exp(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-9, atol=1e-14
        )


@settings(max_examples=12)
@given(problems(), st.sampled_from(["row", "column"]))
def test_reaches_both_masses_in_the_long_run(problem, last):
    scores, row, col = problem
    both = (row.sum(1) > 0) & (col.sum(1) > 0)
    plan = log_sinkhorn(scores, row.log(), col.log(), iterations=1500, last=last).exp()
    torch.testing.assert_close(plan.sum(2)[both], row[both], rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(plan.sum(1)[both], col[both], rtol=1e-4, atol=1e-8)
    assert float(plan[~both].sum()) == 0
    # and stays there: the next step of either side changes nothing
    more = log_sinkhorn(scores, row.log(), col.log(), iterations=1501, last=last).exp()
    torch.testing.assert_close(more, plan, rtol=1e-4, atol=1e-8)


@given(problems(), st.integers(1, 3), st.sampled_from(["row", "column"]))
def test_the_last_side_has_its_masses_exactly(problem, iterations, last):
    scores, row, col = problem
    plan = log_sinkhorn(scores, row.log(), col.log(), iterations=iterations, last=last).exp()
    found, wanted, other = (plan.sum(2), row, col) if last == "row" else (plan.sum(1), col, row)
    reachable = other.sum(1, keepdim=True) > 0
    torch.testing.assert_close(found, torch.where(reachable, wanted, 0.0))


@given(st.floats(1e-6, 1.0), st.integers(0, 999), st.sampled_from([torch.float32, torch.float64]))
def test_finite_at_any_epsilon(epsilon, seed, dtype):
    g = torch.Generator().manual_seed(seed)
    cost = 2 * torch.rand(2, 7, 5, generator=g).to(dtype)
    row = log_uniform(torch.tensor([True] * 6 + [False]), dtype)
    col = log_uniform(torch.ones(2, 5, dtype=torch.bool), dtype)
    plan = log_sinkhorn(-cost / epsilon, row, col, iterations=30, last="row").exp()
    assert plan.dtype == dtype
    assert plan.isfinite().all()
    torch.testing.assert_close(plan.sum(2)[:, :6], torch.full((2, 6), 1 / 6, dtype=dtype))
    assert float(plan[:, 6].abs().max()) == 0


@given(st.floats(-38, 38), st.integers(0, 99), st.sampled_from(["row", "column"]))
def test_finite_for_any_finite_scores(exponent, seed, last):
    g = torch.Generator().manual_seed(seed)
    scores = (torch.randn(2, 4, 6, generator=g) * 10.0**exponent).clamp(-3.4e38, 3.4e38)
    scores[0, 0, 0], scores[1, 3, 5] = torch.finfo().max, -torch.finfo().max
    row = log_uniform(torch.ones(4, dtype=torch.bool), torch.float32)
    col = log_uniform(torch.ones(6, dtype=torch.bool), torch.float32)
    plan = log_sinkhorn(scores, row, col, iterations=9, last=last).exp()
    assert plan.isfinite().all()
    assert float(plan.sum()) == pytest.approx(2.0, rel=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_stands_in_empty_rows_and_columns_is_never_read(bad):
    scores = torch.randn(2, 4, 5)
    row, col = (
        torch.tensor([True, False, True, True]),
        torch.tensor([True, True, True, True, False]),
    )
    log_row, log_col = log_uniform(row, scores.dtype), log_uniform(col, scores.dtype)
    clean = log_sinkhorn(scores, log_row, log_col, iterations=5)
    dirty = scores.clone()
    dirty[:, 1], dirty[..., 4] = bad, bad
    assert torch.equal(log_sinkhorn(dirty, log_row, log_col, iterations=5), clean)
    assert torch.equal(clean > -torch.inf, (row[:, None] & col).expand(2, 4, 5))
    alone = log_sinkhorn(
        scores[:, row][..., col], log_row[row], log_col[col], iterations=5
    )  # as if they were not there
    torch.testing.assert_close(clean[:, row][..., col], alone)


@pytest.mark.parametrize("last", ["row", "column"])
def test_no_mass_on_one_side_leaves_all_empty(last):
    none = torch.full((3,), -torch.inf)
    some = log_uniform(torch.ones(4, dtype=torch.bool), torch.float32)
    assert log_sinkhorn(torch.randn(2, 3, 4), none, some, iterations=3, last=last).exp().sum() == 0
    assert log_sinkhorn(torch.randn(2, 4, 3), some, none, iterations=3, last=last).exp().sum() == 0


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (3, 4), (2, 2, 3, 4)])
def test_any_leading_axes_and_empty_ones(shape):
    row = log_uniform(torch.ones(shape[:-1], dtype=torch.bool), torch.float32)
    col = log_uniform(torch.ones((*shape[:-2], shape[-1]), dtype=torch.bool), torch.float32)
    assert log_sinkhorn(torch.zeros(shape), row, col, iterations=2).shape == shape


def test_shifting_rows_or_columns_changes_nothing():
    scores = torch.randn(2, 4, 5, dtype=torch.float64)
    row = log_uniform(torch.ones(4, dtype=torch.bool), scores.dtype)
    col = log_uniform(torch.ones(5, dtype=torch.bool), scores.dtype)
    plan = log_sinkhorn(scores, row, col, iterations=300)
    moved = scores + 7 * torch.randn(2, 4, 1, dtype=torch.float64) + torch.randn(2, 1, 5).double()
    torch.testing.assert_close(log_sinkhorn(moved, row, col, iterations=300), plan)


def test_compiles_and_maps():
    scores = torch.randn(3, 4, 5)
    row = log_uniform(torch.tensor([True, True, False, True]), scores.dtype)
    col = log_uniform(torch.ones(5, dtype=torch.bool), scores.dtype)
    plain = log_sinkhorn(scores, row, col, iterations=4)
    compiled = torch.compile(log_sinkhorn, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(scores, row, col, iterations=4), plain)
    mapped = torch.vmap(lambda one: log_sinkhorn(one, row, col, iterations=4))(scores)
    torch.testing.assert_close(mapped, plain)


def test_bad_input_is_refused_by_name():
    row, col = torch.zeros(3), torch.zeros(4)
    with pytest.raises(ConfigError, match="`iterations`"):
        log_sinkhorn(torch.zeros(3, 4), row, col, iterations=0)
    with pytest.raises(ConfigError, match="`last`"):
        log_sinkhorn(torch.zeros(3, 4), row, col, iterations=1, last="col")
    with pytest.raises(ShapeError, match="`log_row` must have shape"):
        log_sinkhorn(torch.zeros(2, 3, 4), col, col, iterations=1)
    with pytest.raises(ShapeError, match="`log_col` must have shape"):
        log_sinkhorn(torch.zeros(2, 3, 4), row, row, iterations=1)
    with pytest.raises(ShapeError, match=r"`scores`.*float16"):
        log_sinkhorn(torch.zeros(3, 4).half(), row, col, iterations=1)

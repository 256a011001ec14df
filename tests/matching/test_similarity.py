import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from local_distill import ShapeError, SimilarityMatcher, TokenGrid, Tokens, similarity_matches
from local_distill.errors import ConfigError


def truth(f, g, metric):
    """[s] of (best score, cost per teacher token), float64 loops."""
    rows = []
    for i in range(f.shape[0]):
        costs = []
        for j in range(g.shape[0]):
            a, b = f[i].double(), g[j].double()
            if metric == "cosine":
                costs.append(1 - float((a * b).sum() / (a.norm() * b.norm())))
            else:
                costs.append(float(((a - b) ** 2).sum().sqrt()))
        rows.append(costs)
    return rows


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
    for image in range(b):
        rows = truth(f[image], g[image], metric)
        for i, costs in enumerate(rows):
            j = int(matches.teacher_index[image, i, 0])
            assert costs[j] == pytest.approx(min(costs), abs=2e-6)
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


def test_chunks_change_nothing(monkeypatch):
    from local_distill.matching import similarity

    gen = torch.Generator().manual_seed(0)
    f, g = torch.randn(2, 37, 3, generator=gen), torch.randn(2, 11, 3, generator=gen)
    whole = similarity_matches(Tokens(f), Tokens(g))
    monkeypatch.setattr(similarity, "_BLOCK_BYTES", 400)
    assert torch.equal(similarity_matches(Tokens(f), Tokens(g)).teacher_index, whole.teacher_index)


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


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles(backend):
    compiled = torch.compile(SimilarityMatcher(), fullgraph=True, backend=backend)
    for _ in range(3):
        f, g = torch.randn(2, 7, 4), torch.randn(2, 5, 4)
        found, plain = compiled(Tokens(f), Tokens(g)), similarity_matches(Tokens(f), Tokens(g))
        assert torch.equal(found.teacher_index, plain.teacher_index)


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

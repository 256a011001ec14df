"""The similarity match by tiles, interpreted: the plain form's matches, and no table of scores."""

from unittest import mock

import pytest
import torch
from helpers.compiled import compiled_launches
from helpers.interpreted import interpreted, needs_triton

from local_distill import SimilarityMatcher, Tokens
from local_distill.kernels import most_similar as plain
from local_distill.kernels import use_triton
from local_distill.kernels.row_tables import Rows
from local_distill.kernels.triton_most_similar import (
    _ready,
    most_similar_by_tiles,
    tiles_serve,
)

# Not bfloat16: the interpreter's products of it are wrong. It is compiled below.
DTYPES = [torch.float16, torch.float32]
PAIRS = [(0, 1), (1, 0), (2, 0), (2, 1)]


def views(b=2, counts=(5, 70, 3), d=24, dtype=torch.float32):
    student = {v: torch.randn(b, n, d).to(dtype) for v, n in enumerate(counts)}
    return student, {q: torch.randn(b, counts[q], d).to(dtype) for q in (0, 1)}


def cosines(f, g):
    """(b, s, t) in float64, NaN with tokens that have no direction."""
    f, g = f.double(), g.double()
    f, g = (one / one.abs().amax(-1, keepdim=True) for one in (f, g))
    return torch.cosine_similarity(f[:, :, None], g[:, None], dim=-1, eps=0)


def check(found, student, teacher, valid=None, pairs=PAIRS, tolerance=2e-6):
    """The similarity reached is the best there is, and the cost says so."""
    assert list(found) == list(pairs)
    for v, q in pairs:
        index, cost = found[v, q]
        assert index.dtype == torch.int64
        table = cosines(student[v], teacher[q])
        unfit = (table.isnan() | table.isinf()).all(1, keepdim=True)
        if valid is not None and valid[q] is not None:
            unfit = unfit | ~valid[q][:, None]
        table = torch.where(unfit, -torch.inf, table)
        best = table.amax(-1)
        reached = table.gather(2, index[..., None])[..., 0]
        some = best.isfinite()
        torch.testing.assert_close(reached[some], best[some], rtol=0, atol=tolerance)
        wanted = torch.where(some, 1 - best, torch.inf)
        torch.testing.assert_close(cost.double(), wanted, rtol=0, atol=tolerance)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("s", "t", "d"), [(1, 1, 1), (41, 401, 127), (64, 64, 64), (65, 129, 17)])
def test_the_best_of_all(s, t, d, dtype):
    student, teacher = {0: torch.randn(2, s, d).to(dtype)}, {0: torch.randn(2, t, d).to(dtype)}
    found = most_similar_by_tiles(student, teacher, {0: None}, [(0, 0)])
    check(found, student, teacher, pairs=[(0, 0)])


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_pairs_of_a_step_in_two_launches(dtype):
    student, teacher = views(dtype=dtype)
    teacher[1] = teacher[1].mT.contiguous().mT
    check(most_similar_by_tiles(student, teacher, {0: None, 1: None}, PAIRS), student, teacher)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_lowest_index_of_equal_ones(dtype):
    f = torch.randn(2, 7, 24).to(dtype)
    # each of three tokens many times over, in several tiles
    g = f[:, :3].repeat(1, 50, 1)
    found = most_similar_by_tiles({0: f}, {0: g}, {0: None}, [(0, 0)])
    assert (found[0, 0].teacher_index < 3).all()
    assert torch.equal(found[0, 0].teacher_index[:, :3], torch.tensor([[0, 1, 2]] * 2))


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 0.0])
def test_unfit_tokens_are_not_matched_and_capture_nothing(bad, dtype):
    student, teacher = views(dtype=dtype)
    wanted = most_similar_by_tiles(student, teacher, {0: None, 1: None}, PAIRS)
    if bad == 0:
        student[1][:, 4] = teacher[1][:, 66] = 0.0
    else:
        student[1][:, 4, 3] = teacher[1][:, 66, 23] = bad
    found = most_similar_by_tiles(student, teacher, {0: None, 1: None}, PAIRS)
    for pair, (index, cost) in found.items():
        gone = torch.zeros_like(cost, dtype=torch.bool)
        if pair[0] == 1:
            gone[:, 4] = True
        assert (cost[gone] == torch.inf).all()
        if pair[1] == 1:
            assert (index != 66).all()
            gone |= wanted[pair].teacher_index == 66
        assert torch.equal(index[~gone], wanted[pair].teacher_index[~gone])
        assert torch.equal(cost[~gone], wanted[pair].cost[~gone])


@interpreted
def test_tokens_that_may_not_be_chosen():
    student, teacher = views()
    valid = {0: None, 1: torch.rand(2, 70) < 0.3}
    valid[1][1] = False
    found = most_similar_by_tiles(student, teacher, valid, PAIRS)
    check(found, student, teacher, valid)
    assert (found[0, 1].cost[1] == torch.inf).all()
    assert (found[0, 1].teacher_index[1] == 0).all()


@interpreted
@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-18, 1e18, 1e37])
def test_features_of_any_size(size):
    student, teacher = views()
    student[0] *= size
    teacher[1] *= size
    found = most_similar_by_tiles(student, teacher, {0: None, 1: None}, PAIRS)
    check(found, student, teacher)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_tokens_are_made_ready_without_rounding(dtype):
    tokens = (torch.randn(2, 9, 41) * torch.logspace(-3, 3, 9)[:, None]).to(dtype)
    table, norm = _ready(Rows.of([tokens]), None)
    assert table.shape == (18, 48)
    assert not table[:, 41:].any()
    ratio = table[:, :41].double() / tokens.flatten(0, 1).double()
    assert torch.equal(ratio.log2(), ratio.log2().round())
    largest = table.abs().amax(1)
    assert ((largest >= 1) & (largest < 2)).all()
    torch.testing.assert_close(norm.double(), table.double().norm(dim=1), rtol=1e-6, atol=0)


@interpreted
def test_the_matcher_takes_the_kernels():
    student, teacher = views()
    given = [[Tokens(one) for one in side.values()] for side in (student, teacher)]
    results = []
    for triton in (True, False):
        wrapped = mock.patch.object(plain, "_most_similar", wraps=plain._most_similar)
        with use_triton(triton), wrapped as walk:
            results.append(SimilarityMatcher().match_views(*given, PAIRS))
        assert walk.called is not triton
        with use_triton(triton), wrapped as walk:
            SimilarityMatcher("l2").match_views(*given, PAIRS)
        assert walk.called
    for one, two in zip(results[0].values(), results[1].values(), strict=True):
        assert torch.equal(one.teacher_index, two.teacher_index)
        assert torch.equal(one.weight, two.weight)
        torch.testing.assert_close(one.cost, two.cost, rtol=0, atol=1e-6)


@interpreted
def test_empty_sides_match_nothing():
    with use_triton(True):
        for b, s, t in ((0, 3, 2), (2, 0, 2), (2, 3, 0)):
            found = SimilarityMatcher()(Tokens(torch.randn(b, s, 4)), Tokens(torch.randn(b, t, 4)))
            assert not found.weight.any()


def test_what_the_kernels_do_not_take():
    student, teacher = views()
    assert tiles_serve(student, teacher, PAIRS)
    assert not tiles_serve(student, {q: g.half() for q, g in teacher.items()}, PAIRS)
    doubles = ({v: f.double() for v, f in side.items()} for side in (student, teacher))
    assert not tiles_serve(*doubles, PAIRS)
    assert not tiles_serve({0: torch.empty(70000, 1, 1)}, {0: torch.empty(70000, 1, 1)}, [(0, 0)])


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_kernels_compile_for_a_gpu(dtype, tmp_path):
    student, teacher = views(d=384, dtype=dtype)
    valid = {0: None, 1: torch.ones(2, 70, dtype=torch.bool)}
    with compiled_launches(tmp_path) as launches:
        most_similar_by_tiles(student, teacher, valid, PAIRS)
    assert [one.metadata.name for one in launches] == ["_ready_kernel", "_best_kernel"]
    ready, best = launches
    for kernel in launches:
        assert ".target sm_90" in kernel.asm["ptx"]
        assert kernel.asm["cubin"][:4] == b"\x7fELF"
    assert ".v4.b32" in ready.asm["ptx"]
    # products on the tensor cores in half precision, in plain float32 and no TF32 otherwise
    tensor_cores = "mma" in best.asm["ptx"]
    assert tensor_cores == (dtype != torch.float32)
    assert "tf32" not in best.asm["ptx"]
    kind = {torch.float16: ".f16", torch.bfloat16: ".bf16", torch.float32: "fma.rn.f32"}[dtype]
    assert kind in best.asm["ptx"]

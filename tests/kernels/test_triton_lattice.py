"""All pairs of a step in one launch, interpreted: the matches of the lattice in torch."""

import itertools
import math
from unittest import mock

import pytest
import torch
from helpers.compiled import compiled_launches
from helpers.drawn import drawn
from helpers.interpreted import interpreted, needs_triton
from helpers.strategies import random_geometry, similar_pairs, view_pairs

from local_distill import CropGeometry, TokenGrid, Tokens
from local_distill.geometry import inside, wide_centers
from local_distill.kernels import use_triton
from local_distill.kernels.triton_lattice import LatticePair, lattice_matches
from local_distill.matching import nearest
from local_distill.matching.nearest import nearest_view_matches


def plain(*args, **settings):
    """Token by token, without a word about what no lattice serves."""
    with (
        use_triton(False),
        mock.patch.object(nearest, "are_aligned", return_value=False),
        mock.patch.object(nearest, "_refuse_unserved"),
    ):
        return nearest_view_matches(*args, **settings)


def kernel(*args, **settings):
    with use_triton(True), mock.patch.object(nearest, "_on_lattice", side_effect=AssertionError):
        return nearest_view_matches(*args, **settings)


def assert_same(found, wanted, sides, cells=1e-9):
    assert list(found) == list(wanted)
    for (_, q), one in found.items():
        two = wanted[_, q]
        assert torch.equal(one.weight, two.weight)
        assert one.weight.dtype == two.weight.dtype
        assert one.cost.dtype == two.cost.dtype
        matched = two.matched
        assert torch.equal(one.teacher_index[matched], two.teacher_index[matched])
        assert (one.teacher_index >= 0).all()
        assert (one.teacher_index < sides[1][q].num_tokens).all()
        torch.testing.assert_close(one.cost, two.cost, rtol=1e-6, atol=cells)


def check(student, teacher, pairs=None, cells=1e-9, **settings):
    pairs = pairs or list(itertools.product(range(len(student)), range(len(teacher))))
    found = kernel(student, teacher, pairs, **settings)
    assert_same(found, plain(student, teacher, pairs, **settings), (student, teacher), cells)
    return found


@interpreted
@pytest.mark.parametrize("kind", ["crop", "turn", "similar", "warp"])
def test_as_token_by_token(kind):
    strategy = similar_pairs() if kind == "similar" else view_pairs(kind, padding=12.0)
    matched = 0
    for number, (one, two) in enumerate(drawn(strategy, 9)):
        limit = (0.5, None, 0.3, 1e-200, 1e200)[number % 5]
        found = check([one, two], [one, two], max_distance=limit)
        matched += sum(int(matches.matched.sum()) for matches in found.values())
    assert matched > 0


def step(b=2, big=(5, 7), small=(3, 2), dtype=torch.float32):
    """Two large views and two small ones of the same images."""
    views = []
    for seed, (rows, cols) in enumerate((big, big, small, small)):
        size = (8 * rows, 8 * cols)
        crop = random_geometry(b, view_size=size, seed=seed)
        crop = crop._replace(matrix=crop.matrix.to(dtype))
        views.append(Tokens(None, crop, TokenGrid.tiling(rows, cols, size)))
    return views


PAIRS = [(3, 1), (0, 1), (1, 0), (2, 0), (2, 1), (3, 0)]


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_of_mixed_grids(dtype):
    views = step(dtype=dtype)
    check(views, views[:2], PAIRS)


@interpreted
def test_more_tokens_than_one_step_of_the_loops_takes():
    views = step(b=1, big=(17, 19), small=(2, 301))
    check(views, views, max_distance=None)


@interpreted
def test_a_student_in_perspective():
    teachers = step()[:2]
    students = []
    for seed, view in enumerate(step()):
        bend = torch.eye(3)
        bend[2, :2] = torch.tensor([0.3, -0.2]) / 8
        bend[2, 0] -= 0.04 * seed
        crop = view.geometry
        students.append(view._replace(geometry=crop._replace(matrix=crop.matrix @ bend)))
    found = check(students, teachers, PAIRS)
    assert any(matches.matched.any() for matches in found.values())


@interpreted
def test_beyond_the_horizon_nothing_is_matched():
    view = step()[0]
    size = torch.tensor([[56.0, 56.0]])
    matrix = torch.eye(3).repeat(2, 1, 1)
    matrix[:, 2, 0] = -4 / 56  # the horizon is a line down the first quarter
    matrix[1, :2] *= -1  # of the second image the half beyond it would fall into the source
    sizes = size.int().expand(2, 2)
    seen = Tokens(None, CropGeometry(matrix, sizes, sizes), TokenGrid.tiling(4, 4, (56, 56)))
    whole = Tokens(None, CropGeometry(torch.eye(3).repeat(2, 1, 1), sizes, sizes), view.grid)
    found = check([seen, whole], [whole], max_distance=None)
    assert found[0, 0].matched[0].any()
    assert not found[0, 0].matched[1].any()


@interpreted
def test_ties_go_to_the_lowest_index():
    crop = random_geometry(2, view_size=(32, 32))
    fine = Tokens(None, crop, TokenGrid.tiling(4, 4, view_size=(32, 32)))
    coarse = Tokens(None, crop, TokenGrid.tiling(2, 2, view_size=(32, 32)))
    found = kernel([fine, coarse], [fine], [(0, 0), (1, 0)])
    assert found[1, 0].teacher_index[..., 0].tolist() == [[0, 2, 8, 10]] * 2
    assert found[0, 0].teacher_index[..., 0].tolist() == [list(range(16))] * 2
    assert not found[0, 0].cost.any()


@interpreted
@pytest.mark.parametrize("fault", ["nan", "inf", "singular", "huge", "no tokens inside", "bent"])
def test_what_no_lattice_serves_is_not_matched(fault):
    views = step()
    matrix = views[1].geometry.matrix
    wanted = kernel(views, views, max_distance=None, pairs=PAIRS)
    if fault == "no tokens inside":
        matrix[1, :2, 2] += 1e4
    elif fault == "huge":
        matrix[1, 0] *= 1e36
    elif fault == "bent":  # as a student's view it is served
        matrix[1, 2, 0] = 1e-3
    elif fault == "singular":
        matrix[1, :2, 1] = matrix[1, :2, 0]
    else:
        matrix[1, 0, 2] = float(fault)
    with mock.patch.object(nearest, "refuse_bad_values"):
        found = kernel(views, views, PAIRS, max_distance=None)
        assert_same(found, plain(views, views, PAIRS, max_distance=None), (views, views))
    for pair, matches in found.items():
        assert torch.equal(matches.weight[0], wanted[pair].weight[0])
        if pair[1] == 1 or (pair[0] == 1 and fault != "bent"):
            assert not matches.matched[1].any()


@interpreted
def test_which_centres_lie_inside_is_to_the_bit_what_geometry_says():
    grid = TokenGrid(6, 9, (7.3, 5.1), (0.37, 0.11))
    for seed in range(8):
        crop = random_geometry(3, view_size=(33, 66), source_size=(47, 61), seed=seed)
        # exactly on the edges of the source, or one rounding beside them
        wide = crop.matrix.double()
        wide[:, 0, 0] = 61 / (0.37 + 8 * 7.3) * torch.tensor([1.0, 1 + 2e-16, 1 - 2e-16]).double()
        wide[:, 0, 2] = 0.0
        crop = CropGeometry(wide, crop.view_size, crop.source_size)
        view = Tokens(None, crop, grid)
        found = kernel([view], [view], [(0, 0)], max_distance=None)[0, 0]
        assert torch.equal(found.matched, inside(wide_centers(crop, grid), crop.source_size))


@interpreted
def test_the_tokens_of_large_sources_and_tiny_crops():
    for size, step_length in ((65535, 4096.0), (65535, 1e-3), (4000, 1.0)):
        grid = TokenGrid(7, 7, (16.0, 16.0), (8.0, 8.0))
        scale = step_length / 16
        matrix = torch.eye(3).double().repeat(2, 1, 1)
        matrix[:, 0, 0] = matrix[:, 1, 1] = scale
        matrix[:, :2, 2] = size / 2 + torch.rand(2, 2).double()
        crop = CropGeometry(
            matrix, torch.full((2, 2), 112).int(), torch.full((2, 2), size, dtype=torch.int32)
        )
        moved = crop._replace(matrix=matrix + 0)
        moved.matrix[:, :2, 2] += step_length * torch.tensor([1.0, 2.0]).double()
        views = [Tokens(None, one, grid) for one in (crop, moved)]
        # 30 million cells from the source's corner, float64 is good to 10⁻⁸ of one
        found = check(views, views, cells=1e-7, max_distance=0.1)
        moves = torch.zeros(2, 7, 7, dtype=torch.bool)
        moves[:, 2:, 1:] = True  # by one column and two rows
        if step_length <= 1:  # else the view reaches out of the source
            assert torch.equal(found[0, 1].matched, moves.flatten(1))


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kernel_compiles_for_a_gpu(dtype, tmp_path):
    views = step(dtype=dtype)
    matrix = torch.stack([view.geometry.matrix for view in views]).double()
    sizes = torch.stack([view.geometry.source_size for view in views])
    pairs = [LatticePair(v, q, views[v].grid, views[q].grid) for v, q in PAIRS]
    with compiled_launches(tmp_path) as launches:
        index, weight, cost = lattice_matches(matrix, sizes, pairs, math.inf, dtype)
    assert (
        index.shape
        == weight.shape
        == cost.shape
        == (2 * sum(views[v].num_tokens for v, _ in PAIRS),)
    )
    assert [one.metadata.name for one in launches] == ["_lattice_kernel"]
    ptx = launches[0].asm["ptx"]
    assert ".target sm_90" in ptx
    assert launches[0].asm["cubin"][:4] == b"\x7fELF"
    # no product is fused into a sum, but in the steps of divisions and roots
    assert "fma.rn.f64" not in ptx
    assert "0d0010000000000000" in ptx  # the smallest number of float64 did not become 0 on the way

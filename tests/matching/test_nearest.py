import itertools
import math

import numpy as np
import pytest
import torch
from helpers import oracles
from helpers.strategies import crops, grids, random_geometry, similar_pairs, view_pairs
from hypothesis import given, settings
from hypothesis import strategies as st

from local_distill import (
    CropGeometry,
    GeometryError,
    NearestMatcher,
    ShapeError,
    TokenGrid,
    Tokens,
    from_box,
    from_matrix,
    match_views,
    nearest_matches,
)
from local_distill.errors import ConfigError


def check_against_oracle(student, teacher, matches, max_distance):
    truth = oracles.nearest(student, teacher)
    side = int(student.geometry.source_size.max())
    slack = 8 * side * 2.0**-23
    for image, i in itertools.product(range(len(truth)), range(student.grid.num_tokens)):
        best = truth[image][i]
        cost = float(matches.cost[image, i])
        matched = bool(matches.matched[image, i])
        assert matched == math.isfinite(cost)
        if best is None or (max_distance is not None and best[1] > max_distance + 1e-5):
            assert not matched
        elif max_distance is None or best[1] < max_distance - 1e-5:
            assert matched
            j = int(matches.teacher_index[image, i, 0])
            p = oracles.center(student.geometry, student.grid, image, *divmod(i, student.grid.cols))
            q = oracles.center(teacher.geometry, teacher.grid, image, *divmod(j, teacher.grid.cols))
            assert oracles.is_inside(q, teacher.geometry.source_size[image].tolist())
            assert math.hypot(p[0] - q[0], p[1] - q[1]) <= best[0] + slack
            if best[0] > 100 * slack:  # below, the two candidates' diagonals may differ
                assert cost == pytest.approx(best[1], rel=1e-3, abs=1e-5)


@st.composite
def large_views(draw):
    """Both sides' `Tokens` on any two grids, with or without a rest of the view."""
    source = (draw(st.integers(30, 700)), draw(st.integers(30, 700)))
    sides = []
    for _ in range(2):
        rows, cols = draw(st.integers(1, 40)), draw(st.integers(1, 40))
        stride = (draw(st.sampled_from([4.0, 14.0, 16.0, 7.3])), draw(st.sampled_from([5.0, 16.0])))
        rest = (draw(st.integers(0, 13)), draw(st.integers(0, 13)))
        size = (math.ceil(rows * stride[1]) + rest[0], math.ceil(cols * stride[0]) + rest[1])
        offset = draw(st.sampled_from([(0.5, 0.5), (stride[0] / 2, stride[1] / 2), (1.25, 3.1)]))
        geometry = crops(draw, 2, size, source, padding=draw(st.sampled_from([0.0, 40.0])))
        sides.append(Tokens(None, geometry, TokenGrid(rows, cols, stride, offset)))
    return sides


def all_distances(student, teacher):
    """(b, s, t) float64 distances of the centres in the source, inf where either is outside."""
    sides = []
    for geometry, grid in ((student.geometry, student.grid), (teacher.geometry, teacher.grid)):
        r, c = np.divmod(np.arange(grid.rows * grid.cols), grid.cols)
        x = grid.offset[0] + grid.stride[0] * c
        y = grid.offset[1] + grid.stride[1] * r
        m = geometry.matrix.double().numpy()[:, :, :, None]
        px, py, w = (m[:, i, 0] * x + m[:, i, 1] * y + m[:, i, 2] for i in range(3))
        size = geometry.source_size.numpy()[:, :, None]
        px, py = px / w, py / w
        good = (w > 0) & (px >= 0) & (py >= 0) & (px <= size[:, 1]) & (py <= size[:, 0])
        sides.append((px, py, good))
    (sx, sy, s_good), (tx, ty, t_good) = sides
    apart = np.hypot(sx[..., None] - tx[:, None], sy[..., None] - ty[:, None])
    return np.where(s_good[..., None] & t_good[:, None], apart, np.inf)


def check_against_brute_force(student, teacher, method):
    matches = nearest_matches(student, teacher, max_distance=None, method=method)
    truth = all_distances(student, teacher)
    best = truth.min(-1)
    assert np.array_equal(matches.matched.numpy(), np.isfinite(best))
    index = matches.teacher_index.numpy()
    reached = np.take_along_axis(truth, index, -1)[..., 0]
    side = int(student.geometry.source_size.max())
    matched = np.isfinite(best)
    # float64 places in the source, and 2⁻³⁶ of a cell, which is no larger than the source
    np.testing.assert_allclose(reached[matched], best[matched], rtol=1e-9, atol=3e-11 * side)
    if truth.shape[-1] == 1:
        return
    second = np.partition(truth, 1, -1)[..., 1]
    tied = second <= best * (1 + 1e-9) + 3e-11 * side
    clear = matched & ~tied
    assert np.array_equal(index[clear][:, 0], truth.argmin(-1)[clear])


@given(large_views(), st.sampled_from(["lattice", "search"]))
def test_large_grids_reach_what_brute_force_reaches(pair, method):
    check_against_brute_force(*pair, method)


@given(view_pairs("turn"), st.sampled_from(["lattice", "search"]))
def test_quarter_turns_reach_what_brute_force_reaches(pair, method):
    check_against_brute_force(*pair, method)


@given(view_pairs("warp", padding=5.0))
def test_search_reaches_what_brute_force_reaches_on_perspective(pair):
    check_against_brute_force(*pair, "search")


@given(view_pairs("warp", padding=5.0), st.data())
def test_lattice_reaches_what_brute_force_reaches_for_perspective_students(pair, data):
    """A student may be of any homography: only the teacher has to be a lattice."""
    student, _ = pair
    b = student.geometry.matrix.shape[0]
    source = tuple(student.geometry.source_size[0].tolist())
    grid, size = data.draw(grids(most=9))
    teacher = Tokens(None, crops(data.draw, b, size, source, padding=9.0), grid)
    check_against_brute_force(student, teacher, "lattice")
    found = nearest_matches(student, teacher, max_distance=None)
    searched = nearest_matches(student, teacher, max_distance=None, method="search")
    torch.testing.assert_close(found.cost, searched.cost, rtol=1e-4, atol=1e-5)


LIMITS = st.sampled_from([None, 0.3, 0.5, 2.0])


@given(view_pairs("crop", padding=12.0), LIMITS, st.sampled_from(["lattice", "search"]))
def test_reaches_the_oracles_distance_on_crops_flips_and_pads(pair, limit, method):
    student, teacher = pair
    matches = nearest_matches(student, teacher, max_distance=limit, method=method)
    check_against_oracle(student, teacher, matches, limit)


@given(view_pairs("turn"), LIMITS, st.sampled_from(["lattice", "search"]))
def test_reaches_the_oracles_distance_on_quarter_turns(pair, limit, method):
    student, teacher = pair
    matches = nearest_matches(student, teacher, max_distance=limit, method=method)
    check_against_oracle(student, teacher, matches, limit)


@given(similar_pairs(), LIMITS, st.sampled_from(["lattice", "search"]))
def test_reaches_the_oracles_distance_on_similarity_transforms(pair, limit, method):
    student, teacher = pair
    matches = nearest_matches(student, teacher, max_distance=limit, method=method)
    check_against_oracle(student, teacher, matches, limit)


@given(view_pairs("warp", padding=5.0), LIMITS)
def test_search_reaches_the_oracles_distance_on_perspective(pair, limit):
    student, teacher = pair
    matches = nearest_matches(student, teacher, max_distance=limit, method="search")
    check_against_oracle(student, teacher, matches, limit)


@given(view_pairs("crop", padding=12.0))
def test_lattice_and_search_agree(pair):
    student, teacher = pair
    one = nearest_matches(student, teacher, method="lattice")
    two = nearest_matches(student, teacher, method="search")
    # within rounding of the limit the two may decide differently
    near = (one.cost - 0.5).abs().le(1e-5) | (two.cost - 0.5).abs().le(1e-5)
    assert torch.equal(one.matched[~near], two.matched[~near])
    both = one.matched & two.matched
    torch.testing.assert_close(one.cost[both], two.cost[both], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["lattice", "search"])
def test_identical_views_match_themselves(method):
    grid = TokenGrid.tiling(3, 5, (24, 40))
    tokens = Tokens(None, random_geometry(), grid)
    matches = nearest_matches(tokens, tokens, method=method)
    assert torch.equal(matches.teacher_index[..., 0], torch.arange(15).expand(2, 15))
    assert matches.cost.max() == 0


@pytest.mark.parametrize("method", ["lattice", "search"])
def test_a_flip_is_followed(method):
    grid = TokenGrid.tiling(2, 3, (20, 30))
    box = torch.tensor([[1.0, 2, 31, 22], [0, 0, 15, 10]])
    plain = from_box(box, (20, 30), (40, 40))
    flipped = from_box(box, (20, 30), (40, 40), hflip=True, vflip=True)
    matches = nearest_matches(Tokens(None, plain, grid), Tokens(None, flipped, grid), method=method)
    assert matches.teacher_index[0, :, 0].tolist() == [5, 4, 3, 2, 1, 0]
    assert bool(matches.matched.all())


@pytest.mark.parametrize("method", ["lattice", "search"])
@pytest.mark.parametrize("flip", [False, True])
def test_exact_ties_go_to_the_lowest_index(method, flip):
    # a 1 × 1 student exactly between four teacher tokens
    teacher = from_box(torch.tensor([[0.0, 0, 4, 4]] * 2), (4, 4), (4, 4), hflip=flip)
    student = from_box(torch.tensor([[0.0, 0, 4, 4]] * 2), (4, 4), (4, 4))
    matches = nearest_matches(
        Tokens(None, student, TokenGrid.tiling(1, 1, (4, 4))),
        Tokens(None, teacher, TokenGrid.tiling(2, 2, (4, 4))),
        max_distance=None,
        method=method,
    )
    assert matches.teacher_index.flatten().tolist() == [0, 0]


@pytest.mark.parametrize("rows", [1, 3, 5, 7])
@pytest.mark.parametrize("cols", [1, 3, 7, 11])
def test_halves_that_the_inverse_rounds_are_ties_too(rows, cols):
    """Every student token half way between teacher tokens, at places no float holds exactly."""
    box = torch.tensor([[0.1, 0.7, 10.1, 20.7], [3.3, 1.9, 33.3, 51.9]])
    geometry = from_box(box, (840, 840), (60, 60))
    student = Tokens(None, geometry, TokenGrid.tiling(rows, cols, (840, 840)))
    teacher = Tokens(None, geometry, TokenGrid.tiling(2 * rows, 2 * cols, (840, 840)))
    found = nearest_matches(student, teacher, max_distance=None).teacher_index[..., 0]
    first = [4 * r * cols + 2 * c for r in range(rows) for c in range(cols)]
    assert found.tolist() == [first, first]


@pytest.mark.parametrize("method", ["lattice", "search"])
def test_the_limit_is_excluded(method):
    # neighbours exactly one cell apart: distance 1/√2 of the diagonal
    grid = TokenGrid.tiling(1, 1, (2, 2))
    one = from_box(torch.tensor([[0.0, 0, 2, 2]] * 2), (2, 2), (4, 4))
    two = from_box(torch.tensor([[2.0, 2, 4, 4]] * 2), (2, 2), (4, 4))
    views = Tokens(None, one, grid), Tokens(None, two, grid)
    assert not nearest_matches(*views, max_distance=1.0, method=method).matched.any()
    assert nearest_matches(*views, max_distance=1.0001, method=method).matched.all()


@pytest.mark.parametrize("method", ["lattice", "search"])
def test_no_overlap_gives_no_match(method):
    grid = TokenGrid.tiling(3, 3, (9, 9))
    one = from_box(torch.tensor([[0.0, 0, 9, 9]] * 2), (9, 9), (90, 90))
    two = from_box(torch.tensor([[70.0, 70, 79, 79]] * 2), (9, 9), (90, 90))
    matches = nearest_matches(Tokens(None, one, grid), Tokens(None, two, grid), method=method)
    assert not matches.matched.any()
    assert bool(matches.cost.isinf().all())
    assert float(matches.weight.sum()) == 0


@pytest.mark.parametrize("method", ["lattice", "search"])
def test_tokens_in_padding_never_match(method):
    grid = TokenGrid.tiling(2, 4, (20, 40))
    padded = from_box(torch.tensor([[-20.0, 0, 20, 20]] * 2), (20, 40), (20, 40))
    matches = nearest_matches(
        Tokens(None, padded, grid), Tokens(None, padded, grid), max_distance=None, method=method
    )
    assert matches.matched[0].tolist() == [False, False, True, True] * 2
    # a student inside must not be captured by the teacher's tokens outside
    inner = from_box(torch.tensor([[0.0, 0, 10, 20]] * 2), (20, 10), (20, 40))
    matches = nearest_matches(
        Tokens(None, inner, TokenGrid.tiling(2, 2, (20, 10))),
        Tokens(None, padded, grid),
        max_distance=None,
        method=method,
    )
    assert bool(matches.matched.all())
    assert set(matches.teacher_index.flatten().tolist()) <= {2, 3, 6, 7}


@pytest.mark.parametrize("method", ["lattice", "search"])
def test_empty_grids(method):
    tokens = Tokens(None, random_geometry(), TokenGrid.tiling(3, 5, (24, 40)))
    none = tokens._replace(grid=TokenGrid(0, 5, (8.0, 8.0), (4.0, 4.0)))
    found = nearest_matches(tokens, none, method=method)
    assert found.weight.shape == (2, 15, 0)
    assert not found.matched.any()
    assert nearest_matches(none, tokens, method=method).cost.shape == (2, 0)


@pytest.mark.parametrize("method", ["lattice", "search"])
def test_empty_batch(method):
    geometry = CropGeometry(*(part[:0] for part in random_geometry()))
    tokens = Tokens(None, geometry, TokenGrid.tiling(3, 5, (24, 40)))
    assert nearest_matches(tokens, tokens, method=method).weight.shape == (0, 15, 1)


@pytest.mark.parametrize("side", [4096, 65535])
@pytest.mark.parametrize("method", ["lattice", "search"])
def test_large_sources_and_crops_of_one_pixel(side, method):
    grid = TokenGrid.tiling(7, 9, (63, 81))
    boxes = [[side - 1.0, side - 1.0, side, side], [0.0, 0.0, side, side]]
    geometry = from_box(torch.tensor(boxes), (63, 81), (side, side))
    tokens = Tokens(None, geometry, grid)
    matches = nearest_matches(tokens, tokens, method=method)
    assert torch.equal(matches.teacher_index[1, :, 0], torch.arange(63))
    assert bool(matches.matched[1].all())
    # one source pixel under 63 tokens: float32 cannot tell all of them apart at 65,535 px
    reached = matches.cost[0][matches.matched[0]]
    assert bool((reached <= 0.5).all())


def test_lattice_refuses_what_it_cannot_serve():
    grid = TokenGrid.tiling(3, 3, (30, 30))
    plain = from_box(torch.tensor([[0.0, 0, 30, 30]] * 2), (30, 30), (30, 30))
    shear = torch.eye(3).repeat(2, 1, 1)
    shear[1, 0, 1] = 0.3
    bent = torch.eye(3).repeat(2, 1, 1)
    bent[1, 2, 0] = 0.01
    for matrix in (shear, bent):
        warped = from_matrix(matrix, (30, 30), (30, 30))
        with pytest.raises(GeometryError, match=r'image 1.*method="search"'):
            nearest_matches(Tokens(None, plain, grid), Tokens(None, warped, grid))
        # as a student it is welcome
        assert nearest_matches(Tokens(None, warped, grid), Tokens(None, plain, grid)).matched.any()


def test_lattice_refuses_a_turned_view_that_leaves_the_source():
    grid = TokenGrid.tiling(6, 6, (30, 30))
    c = math.sqrt(0.5)
    turn = torch.tensor([[c, -c, 15.0], [c, c, -6.0], [0, 0, 1]]).repeat(2, 1, 1)
    turned = Tokens(None, from_matrix(turn, (30, 30), (30, 30)), grid)
    with pytest.raises(GeometryError, match="search"):
        nearest_matches(turned, turned)
    check_against_oracle(turned, turned, nearest_matches(turned, turned, method="search"), 0.5)


def test_where_values_cannot_be_seen_nothing_wrong_is_matched():
    """Under compile the lattice can't raise: it leaves unserved images without matches."""
    grid = TokenGrid.tiling(3, 3, (30, 30))
    matrix = torch.eye(3).repeat(3, 1, 1)
    matrix[1, 0, 1] = 0.3
    matrix[2, 0, 0] = torch.nan
    size = torch.full((3, 2), 30, dtype=torch.int32)
    tokens = Tokens(None, CropGeometry(matrix, size, size), grid)
    compiled = torch.compile(nearest_matches, fullgraph=True, backend="eager")
    matches = compiled(tokens, tokens)
    assert matches.matched.all(1).tolist() == [True, False, False]
    assert matches.matched.any(1).tolist() == [True, False, False]


@pytest.mark.parametrize("entry", [0.0, 1e-30, 1e30, 1e150, torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("place", [(0, 0), (1, 2), (2, 0), (2, 2)])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_whatever_a_matrix_holds_indices_stay_in_range(entry, place, side):
    """Where values cannot be seen nothing is refused; an index out of range would crash later."""
    grid = TokenGrid.tiling(3, 5, (24, 40))
    good = random_geometry(3)
    good = good._replace(matrix=good.matrix.double())
    matrix = good.matrix.clone()
    matrix[1, *place] = entry
    bad = good._replace(matrix=matrix)
    pair = {"student": good, "teacher": good, side: bad}
    compiled = torch.compile(nearest_matches, fullgraph=True, backend="eager")
    tokens = [Tokens(None, pair[name], grid) for name in ("student", "teacher")]
    found = compiled(*tokens, max_distance=None)
    assert int(found.teacher_index.min()) >= 0
    assert int(found.teacher_index.max()) < 15
    assert not found.cost.isnan().any()
    assert torch.equal(found.matched, found.cost.isfinite())
    plain = nearest_matches(Tokens(None, good, grid), Tokens(None, good, grid), max_distance=None)
    for image in (0, 2):  # the others are as they were
        assert torch.equal(found.teacher_index[image], plain.teacher_index[image])
        torch.testing.assert_close(found.cost[image], plain.cost[image], rtol=1e-6, atol=1e-9)


def test_a_token_on_the_horizon_is_not_matched():
    """Third coordinate and numerator 0 at once: 0/0 in the closed form."""
    matrix = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0.5, 0, -1.0]]).repeat(2, 1, 1)
    size = torch.full((2, 2), 4, dtype=torch.int32)
    student = Tokens(
        None, CropGeometry(matrix, size, size), TokenGrid(1, 4, (1.0, 1.0), (0.0, 0.0))
    )
    teacher = Tokens(
        None,
        from_box([[0.0, 0, 4, 4]] * 2, (4, 4), (4, 4)),
        TokenGrid(2, 2, (2.0, 2.0), (2.0, 0.0)),
    )
    for method in ("lattice", "search"):
        found = nearest_matches(student, teacher, max_distance=None, method=method)
        assert not found.matched[:, 2].any()
        assert int(found.teacher_index.min()) >= 0


def test_vmap():
    grid = TokenGrid.tiling(3, 5, (24, 40))
    geometry = CropGeometry(*(torch.stack([p, p.flip(0)]) for p in random_geometry(3)))
    other = CropGeometry(*(torch.stack([p, p.flip(0)]) for p in random_geometry(3, seed=1)))

    def one(a, b):
        return nearest_matches(Tokens(None, a, grid), Tokens(None, b, grid))

    found = torch.vmap(one)(geometry, other)
    for i in range(2):
        plain = one(CropGeometry(*(p[i] for p in geometry)), CropGeometry(*(p[i] for p in other)))
        assert torch.equal(found.teacher_index[i], plain.teacher_index)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"geometry": None}, ShapeError, "`teacher` has no geometry"),
        ({"grid": None}, ShapeError, "`teacher` has no grid"),
        ({"geometry": random_geometry(1)}, ShapeError, "axis `b` is 2 in `student"),
        ({"geometry": random_geometry(source_size=(70, 50))}, GeometryError, "source sizes"),
        ({"features": torch.zeros(2, 16, 4)}, ShapeError, "class and register tokens"),
        ({"grid": TokenGrid.tiling(5, 3, (40, 24))}, GeometryError, r"\(width, height\)"),
    ],
)
def test_bad_tokens_are_refused_by_name(change, error, text):
    good = Tokens(None, random_geometry(), TokenGrid.tiling(3, 5, (24, 40)))
    with pytest.raises(error, match=text):
        NearestMatcher()(good, good._replace(**change))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 0.0])
def test_bad_matrices_are_refused(bad):
    good = Tokens(None, random_geometry(), TokenGrid.tiling(3, 5, (24, 40)))
    matrix = good.geometry.matrix.clone()
    matrix[1, 0, 0] = bad
    with pytest.raises(GeometryError, match="student"):
        NearestMatcher()(good._replace(geometry=good.geometry._replace(matrix=matrix)), good)


def test_half_precision_geometry_is_refused():
    good = Tokens(None, random_geometry(), TokenGrid.tiling(3, 5, (24, 40)))
    half = good.geometry._replace(matrix=good.geometry.matrix.bfloat16())
    with pytest.raises(GeometryError, match="half precision"):
        NearestMatcher()(good, good._replace(geometry=half))


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, "near"])
def test_bad_limits_are_refused(bad):
    with pytest.raises(ConfigError, match="max_distance"):
        NearestMatcher(max_distance=bad)
    with pytest.raises(ConfigError, match="method"):
        NearestMatcher(method="best")


@settings(max_examples=10)
@given(st.integers(1, 3), st.integers(1, 3))
def test_match_views_gives_all_pairs(students, teachers):
    grid = TokenGrid.tiling(3, 5, (24, 40))
    views = [Tokens(None, random_geometry(seed=i), grid) for i in range(3)]
    found = match_views(NearestMatcher(), views[:students], views[:teachers])
    assert set(found) == {(v, q) for v in range(students) for q in range(teachers) if v != q}
    for (v, q), matches in found.items():
        assert torch.equal(matches.cost, nearest_matches(views[v], views[q]).cost)


def test_match_views_prefers_the_matchers_own():
    class Own:
        def __call__(self, student, teacher):
            raise AssertionError("not this one")

        def match_views(self, student, teacher, pairs):
            return dict.fromkeys(pairs, "own")

    assert match_views(Own(), [Tokens()] * 2, [Tokens()] * 2) == {(0, 1): "own", (1, 0): "own"}
    with pytest.raises(ShapeError, match="2 teacher views"):
        match_views(Own(), [Tokens()] * 2, [Tokens()] * 2, [(0, 2)])

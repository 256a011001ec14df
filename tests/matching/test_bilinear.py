"""The four teacher tokens around the centre, against plain loops and against grid_sample."""

import copy
import math
import pickle

import pytest
import torch
from helpers.strategies import random_geometry, similar_pairs, view_pairs
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
from local_distill.matching.bilinear import BilinearMatcher, bilinear_matches
from local_distill.testing import oracles

ANY_PAIR = st.one_of(
    view_pairs("crop", padding=12.0),
    view_pairs("turn"),
    similar_pairs(),
    view_pairs("warp", padding=5.0),
)
GRID = TokenGrid.tiling(3, 5, (24, 40))


def views(b=2, dtype=torch.float32):
    """Two overlapping views of b images."""
    sides = []
    for seed in (0, 1):
        geometry = random_geometry(b, seed=seed)
        geometry = geometry._replace(matrix=geometry.matrix.to(dtype))
        sides.append(Tokens(None, geometry, GRID))
    return sides


def table(matches, t):
    """(b, s, t) weights, from candidates."""
    b, s, _ = matches.weight.shape
    return matches.weight.new_zeros(b, s, t).scatter_add(2, matches.teacher_index, matches.weight)


@given(ANY_PAIR)
def test_weights_and_costs_are_those_of_the_loops(pair):
    student, teacher = pair
    matches = bilinear_matches(student, teacher)
    t = teacher.grid.num_tokens
    assert matches.weight.shape[2] == 4
    assert bool(((matches.teacher_index >= 0) & (matches.teacher_index < t)).all())
    assert bool((matches.weight >= 0).all())
    assert float(matches.mass.max()) <= 1 + 1e-6
    found = table(matches, t)
    for image, tokens in enumerate(oracles.bilinear_corners(student, teacher)):
        weights = torch.tensor([corners.row(t) for corners in tokens])
        torch.testing.assert_close(found[image], weights, rtol=0, atol=1e-6)
        for i, corners in enumerate(tokens):
            mass = sum(corners.weights.values())
            if mass > 1e-6:
                cost = float(matches.cost[image, i])
                assert cost == pytest.approx(corners.cost, rel=1e-4, abs=1e-5)
            elif mass == 0:
                assert float(matches.cost[image, i]) == math.inf
    assert torch.equal(matches.matched, matches.cost.isfinite())


@given(st.data())
def test_reads_as_grid_sample_with_zeros_for_padding(data):
    """Crops worked out by hand, with the teacher's values read by torch."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    rows, cols = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    low = torch.rand(2, 2, generator=generator, dtype=torch.float64) * 30
    side = 3 + torch.rand(2, 2, generator=generator, dtype=torch.float64) * 30
    flip = torch.rand(2, 2, generator=generator) > 0.5
    box = torch.cat((low, low + side), 1)
    teacher_view = from_box(box, (48, 60), (70, 80), hflip=flip[:, 0], vflip=flip[:, 1])
    teacher = Tokens(None, teacher_view, TokenGrid.tiling(rows, cols, (48, 60)))
    whole = from_box(torch.tensor([[0.0, 0, 80, 70]] * 2), (70, 80), (70, 80))
    student = Tokens(
        None, whole._replace(matrix=whole.matrix.double()), TokenGrid.tiling(35, 40, (70, 80))
    )
    values = torch.randn(2, rows * cols, 3, generator=generator, dtype=torch.float64)
    found = bilinear_matches(student, teacher).gather(values)

    xs, ys = torch.arange(1.0, 80, 2), torch.arange(1.0, 70, 2)
    centers = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), -1).double()  # (35, 40, 2)
    share = (centers - low[:, None, None]) / side[:, None, None]  # of the crop, from its top left
    share = torch.where(flip[:, None, None], 1 - share, share)
    image = values.mT.reshape(2, 3, rows, cols)
    # without align_corners −1 and 1 are the outer edges of the outermost cells: the crop's
    sampled = torch.nn.functional.grid_sample(
        image, 2 * share - 1, mode="bilinear", padding_mode="zeros", align_corners=False
    )
    torch.testing.assert_close(found, sampled.flatten(2).mT, rtol=1e-9, atol=1e-9)
    assert bool((found != 0).any())


def test_the_match_fades_out_over_the_cell_around_the_outermost_centres():
    grid = TokenGrid.tiling(1, 2, (8, 16))  # centres at x = 20 and 28, y = 8
    teacher = Tokens(None, from_box(torch.tensor([[16.0, 4, 32, 12]] * 2), (8, 16), (16, 64)), grid)
    xs = [12.0, 12.5, 16.0, 20.0, 22.0, 28.0, 34.0, 36.0, 37.0]
    masses = [0, 1 / 16, 0.5, 1, 1, 1, 0.25, 0, 0]
    for x, mass in zip(xs, masses, strict=True):
        point = from_box(torch.tensor([[x - 2, 6, x + 2, 10]] * 2), (8, 8), (16, 64))
        student = Tokens(None, point, TokenGrid.tiling(1, 1, (8, 8)))
        matches = bilinear_matches(student, teacher)
        assert matches.mass.flatten().tolist() == [mass] * 2
        assert matches.matched.flatten().tolist() == [mass > 0] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("flip", [False, True])
def test_identical_views_match_themselves(dtype, flip):
    box = torch.tensor([[1.0, 2, 41, 26], [8, 0, 28, 12]], dtype=dtype)
    tokens = Tokens(None, from_box(box, (24, 40), (50, 60), hflip=flip, vflip=flip), GRID)
    matches = bilinear_matches(tokens, tokens)
    best = matches.weight.argmax(-1, keepdim=True)
    assert torch.equal(
        matches.teacher_index.gather(2, best)[..., 0], torch.arange(15).expand(2, 15)
    )
    assert bool((matches.weight.gather(2, best) == 1).all())
    assert bool((matches.mass == 1).all())
    assert bool((matches.cost == 0).all())


@given(similar_pairs())
def test_any_turned_view_matches_itself(pair):
    tokens, _ = pair
    found = table(bilinear_matches(tokens, tokens), tokens.grid.num_tokens)
    torch.testing.assert_close(found, torch.eye(tokens.grid.num_tokens).expand_as(found))


def test_views_apart_have_no_match():
    one = from_box(torch.tensor([[0.0, 0, 40, 24]] * 2), (24, 40), (90, 90))
    two = from_box(torch.tensor([[50.0, 60, 90, 84]] * 2), (24, 40), (90, 90))
    matches = bilinear_matches(Tokens(None, one, GRID), Tokens(None, two, GRID))
    assert not matches.matched.any()
    assert bool(matches.cost.isinf().all())


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (1, 4), (4, 1)])
def test_grids_of_one_row_or_column(rows, cols):
    grid = TokenGrid.tiling(rows, cols, (24, 40))
    teacher = Tokens(None, random_geometry(seed=1), grid)
    student = Tokens(None, random_geometry(), GRID)
    matches = bilinear_matches(student, teacher)
    assert matches.teacher_index.shape == (2, 15, 4)
    assert int(matches.teacher_index.max()) < rows * cols
    assert bool(matches.matched.any())
    found = table(matches, rows * cols)
    for image, tokens in enumerate(oracles.bilinear_corners(student, teacher)):
        weights = torch.tensor([corners.row(rows * cols) for corners in tokens])
        torch.testing.assert_close(found[image], weights, rtol=0, atol=1e-6)


@pytest.mark.parametrize("side", [4096, 65535])
def test_large_sources_and_crops_of_one_pixel(side):
    # float64 geometry, as float32 cannot hold the cells of a crop of 1 px at 65,535 px
    boxes = [[side - 1.0, side - 1.0, side, side], [0.0, 0.0, side, side]]
    geometry = from_box(torch.tensor(boxes, dtype=torch.float64), (24, 24), (side, side))
    tokens = Tokens(None, geometry, TokenGrid.tiling(3, 3, (24, 24)))
    matches = bilinear_matches(tokens, tokens)
    found = table(matches, 9)
    torch.testing.assert_close(found, torch.eye(9).double().expand(2, 9, 9), rtol=0, atol=1e-8)
    assert float(matches.cost.max()) < 1e-8


def test_tokens_in_padding_never_match():
    grid = TokenGrid.tiling(2, 4, (20, 40))
    padded = Tokens(
        None, from_box(torch.tensor([[-20.0, 0, 20, 20]] * 2), (20, 40), (20, 40)), grid
    )
    assert bilinear_matches(padded, padded).matched[0].tolist() == [False, False, True, True] * 2
    # centres at x = 0, 2, 4, 6 and 8, the teacher's at −15, −5, 5 and 15: −5 takes no part
    geometry = from_box(torch.tensor([[-1.0, 0, 9, 20]] * 2), (20, 40), (20, 40))
    inner = Tokens(None, geometry, TokenGrid.tiling(2, 5, (20, 40)))
    found = table(bilinear_matches(inner, padded), 8)
    expected = torch.tensor([0.5, 0.7, 0.9, 0.9, 0.7])
    torch.testing.assert_close(found[0, :5, 2], expected, rtol=0, atol=1e-6)
    assert not found[..., [0, 1, 4, 5]].any()


def test_points_beyond_a_horizon_never_match():
    # both views' right half lies behind the camera
    matrix = torch.tensor([[1.0, 0, 0], [0, 1, 0], [-0.04, 0, 1]]).repeat(2, 1, 1)
    bent = Tokens(None, from_matrix(matrix, (24, 40), (200, 400)), GRID)
    matches = bilinear_matches(bent, bent)
    assert matches.matched[0].tolist() == [True, True, True, False, False] * 3
    assert float(matches.mass[0, 0]) == pytest.approx(1, abs=1e-6)
    # source points that the bent view has behind it: its pixels right of 25 show x < −25
    shift = torch.tensor([[1.0, 0, 200], [0, 1, 100], [0, 0, 1]])
    teacher = Tokens(None, from_matrix(shift @ matrix, (24, 40), (200, 400)), GRID)
    left = from_box(torch.tensor([[0.0, 0, 170, 200]] * 2), (24, 40), (200, 400))
    student = Tokens(None, left, TokenGrid.tiling(24, 40, (24, 40)))
    assert not bilinear_matches(student, teacher).matched.any()
    inverse = torch.linalg.inv(teacher.geometry.matrix[0].double())
    point = inverse @ torch.tensor([100.0, 100.0, 1.0]).double()
    assert point[2] < 0  # it would have come out inside the view
    assert 0 < point[0] / point[2] < 40


def test_empty_grids_and_batches():
    tokens, _ = views()
    none = tokens._replace(grid=GRID._replace(rows=0))
    assert bilinear_matches(tokens, none).weight.shape == (2, 15, 0)
    assert bool(bilinear_matches(tokens, none).cost.isinf().all())
    assert bilinear_matches(none, tokens).weight.shape == (2, 0, 4)
    empty = tokens._replace(geometry=CropGeometry(*(part[:0] for part in tokens.geometry)))
    assert bilinear_matches(empty, empty).weight.shape == (0, 15, 4)


@pytest.mark.parametrize("student", [torch.float32, torch.float64])
@pytest.mark.parametrize("teacher", [torch.float32, torch.float64])
def test_dtypes(student, teacher):
    one, two = views(dtype=student)[0], views(dtype=teacher)[1]
    for matches in (
        bilinear_matches(one, two),
        bilinear_matches(one, two._replace(grid=GRID._replace(rows=0))),
    ):
        assert matches.weight.dtype == matches.cost.dtype == torch.promote_types(student, teacher)
        assert matches.teacher_index.dtype == torch.int64


def test_no_gradient_no_change_any_layout():
    student, teacher = views()
    plain = bilinear_matches(student, teacher)
    learned = student.geometry.matrix.clone().requires_grad_()
    twisted = student.geometry.matrix.mT.contiguous().mT
    for matrix in (learned, twisted):
        before = matrix.detach().clone()
        tokens = student._replace(geometry=student.geometry._replace(matrix=matrix))
        found = bilinear_matches(tokens, teacher)
        assert not any(part.requires_grad for part in found)
        assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))
        assert torch.equal(matrix, before)
    with torch.inference_mode():
        inside = CropGeometry(*(part.clone() for part in student.geometry))
    found = bilinear_matches(student._replace(geometry=inside), teacher)
    assert torch.equal(found.weight, plain.weight)
    one = CropGeometry(*(part[:1].expand(2, *part.shape[1:]) for part in student.geometry))
    found = bilinear_matches(student._replace(geometry=one), teacher)
    assert torch.equal(found.weight[0], plain.weight[0])


def test_features_are_not_looked_at():
    student, teacher = views()
    plain = bilinear_matches(student, teacher)
    bad = torch.full((2, 15, 4), torch.nan)
    found = bilinear_matches(student._replace(features=bad.half()), teacher._replace(features=bad))
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))


def test_a_bad_image_that_cannot_be_seen_stays_unmatched():
    matrix = torch.eye(3).repeat(3, 1, 1)
    matrix[1, 0, 0] = torch.nan
    matrix[2] = 0.0
    size = torch.tensor([[24, 40]] * 3, dtype=torch.int32)
    tokens = Tokens(None, CropGeometry(matrix, size, size), GRID)
    good = Tokens(None, CropGeometry(torch.eye(3).repeat(3, 1, 1), size, size), GRID)
    compiled = torch.compile(bilinear_matches, fullgraph=True, backend="eager")
    for pair in ((tokens, good), (good, tokens), (tokens, tokens)):
        matches = compiled(*pair)
        assert matches.matched.all(1).tolist() == [True, False, False]
        assert matches.matched.any(1).tolist() == [True, False, False]
        assert not any(part.isnan().any() for part in matches)


def test_vmap():
    geometry, other = (
        CropGeometry(*(torch.stack([p, p.flip(0)]) for p in random_geometry(3, seed=seed)))
        for seed in (0, 1)
    )
    found = torch.vmap(lambda a, b: bilinear_matches(Tokens(None, a, GRID), Tokens(None, b, GRID)))(
        geometry, other
    )
    for i in range(2):
        a, b = (CropGeometry(*(p[i] for p in part)) for part in (geometry, other))
        plain = bilinear_matches(Tokens(None, a, GRID), Tokens(None, b, GRID))
        assert all(torch.equal(x[i], y) for x, y in zip(found, plain, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"geometry": None}, ShapeError, "`teacher` has no geometry, which the bilinear matcher"),
        ({"grid": None}, ShapeError, "`teacher` has no grid"),
        ({"geometry": random_geometry(1)}, ShapeError, "axis `b` is 2 in `student"),
        ({"geometry": random_geometry(source_size=(70, 50))}, GeometryError, "source sizes"),
        ({"features": torch.zeros(2, 16, 4)}, ShapeError, "class and register tokens"),
        ({"grid": TokenGrid.tiling(5, 3, (40, 24))}, GeometryError, r"\(width, height\)"),
    ],
)
def test_bad_tokens_are_refused_by_name(change, error, text):
    student, teacher = views()
    with pytest.raises(error, match=text):
        BilinearMatcher()(student, teacher._replace(**change))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 0.0])
def test_bad_matrices_are_refused(bad):
    student, teacher = views()
    matrix = student.geometry.matrix.clone()
    matrix[1, 0, 0] = bad
    broken = student._replace(geometry=student.geometry._replace(matrix=matrix))
    with pytest.raises(GeometryError, match="student"):
        bilinear_matches(broken, teacher)
    half = teacher.geometry._replace(matrix=teacher.geometry.matrix.bfloat16())
    with pytest.raises(GeometryError, match="half precision"):
        bilinear_matches(student, teacher._replace(geometry=half))


def test_the_module_is_the_function():
    matcher = BilinearMatcher()
    assert repr(matcher) == "BilinearMatcher()"
    plain = bilinear_matches(*views())
    for copied in (matcher, copy.deepcopy(matcher), pickle.loads(pickle.dumps(matcher))):
        found = copied(*views())
        assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))


def test_everything_is_made_on_the_tokens_device():
    """The meta device holds no values, and refuses to work with the CPU's."""
    pair = [view._replace(geometry=view.geometry.to("meta")) for view in views()]
    for student, teacher in (pair, (pair[0], pair[1]._replace(grid=GRID._replace(rows=0)))):
        matches = bilinear_matches(student, teacher)
        assert [part.device.type for part in matches] == ["meta"] * 3

import itertools
import math
from fractions import Fraction

import pytest
import torch
from helpers import oracles
from helpers.strategies import random_geometry, view_pairs
from hypothesis import given
from hypothesis import strategies as st

from local_distill import (
    CropGeometry,
    GeometryError,
    ShapeError,
    TokenGrid,
    cell_diagonals,
    compose,
    from_box,
    from_matrix,
    invert,
    source_valid,
    to_source,
    token_centers,
)

SIDES = st.sampled_from([37, 500, 4096, 65535])


@st.composite
def exact_boxes(draw):
    """A crop in whole 1/16 pixels, so that its truth is a fraction, in a source of any size."""
    width, height = draw(SIDES), draw(SIDES)
    x0 = draw(st.integers(0, 16 * width - 16))
    y0 = draw(st.integers(0, 16 * height - 16))
    x1 = draw(st.integers(x0 + 16, 16 * width))
    y1 = draw(st.integers(y0 + 16, 16 * height))
    view = (draw(st.integers(1, 300)), draw(st.integers(1, 300)))
    flips = draw(st.booleans()), draw(st.booleans())
    return (x0, y0, x1, y1), view, (height, width), flips


@given(exact_boxes(), st.floats(0, 1), st.floats(0, 1))
def test_float32_is_good_to_two_to_the_minus_22_of_the_longer_side(drawn, fx, fy):
    (x0, y0, x1, y1), view, source, (hflip, vflip) = drawn
    box = torch.tensor([[x0 / 16, y0 / 16, x1 / 16, y1 / 16]] * 2, dtype=torch.float64).float()
    geometry = from_box(box, view, source, hflip=hflip, vflip=vflip)
    assert geometry.matrix.dtype == torch.float32
    px = torch.tensor(fx * view[1]).float()
    py = torch.tensor(fy * view[0]).float()
    found = to_source(geometry, torch.stack((px, py)).expand(2, 1, 2))
    for given_box, got in zip(box.tolist(), found[:, 0].tolist(), strict=True):
        corners = [Fraction(value) for value in given_box]  # what float32 made of the box
        share_x = Fraction(float(px)) / view[1]
        share_y = Fraction(float(py)) / view[0]
        share_x = 1 - share_x if hflip else share_x
        share_y = 1 - share_y if vflip else share_y
        truth_x = corners[0] + share_x * (corners[2] - corners[0])
        truth_y = corners[1] + share_y * (corners[3] - corners[1])
        bound = max(source) * 2.0**-22
        assert abs(got[0] - float(truth_x)) <= bound
        assert abs(got[1] - float(truth_y)) <= bound
        if max(source) <= 4096:
            assert bound <= 1e-3


@given(exact_boxes())
def test_there_and_back(drawn):
    (x0, y0, x1, y1), view, source, (hflip, vflip) = drawn
    box = torch.tensor([[x0 / 16, y0 / 16, x1 / 16, y1 / 16]] * 2)
    geometry = from_box(box, view, source, hflip=hflip, vflip=vflip)
    back = invert(geometry)
    assert torch.equal(back.view_size, geometry.source_size)
    points = torch.tensor([[0.0, 0.0], [view[1], view[0]], [view[1] / 3, view[0] / 7]])
    there = to_source(geometry, points.expand(2, 3, 2))
    again = to_source(geometry, to_source(back, there))
    # two roundings of float32 matrices, in source pixels
    assert float((again - there).abs().max()) <= 2 * max(source) * 2.0**-22


@given(view_pairs("warp", padding=9.0))
def test_centers_diagonals_and_validity_are_the_oracles(pair):
    for tokens in pair:
        centers = token_centers(tokens.geometry, tokens.grid)
        diagonals = cell_diagonals(tokens.geometry, tokens.grid)
        valid = source_valid(tokens.geometry, tokens.grid)
        for image, i in itertools.product(*map(range, centers.shape[:2])):
            place = divmod(i, tokens.grid.cols)
            truth = oracles.center(tokens.geometry, tokens.grid, image, *place)
            assert centers[image, i].tolist() == pytest.approx(truth, rel=1e-5, abs=1e-3)
            wanted = oracles.diagonal(tokens.geometry, tokens.grid, image, *place)
            assert float(diagonals[image, i]) == pytest.approx(wanted, rel=1e-4)
            size = tokens.geometry.source_size[image].tolist()
            assert bool(valid[image, i]) == oracles.is_inside(truth, size)


def test_a_flip_mirrors_the_centers():
    grid = TokenGrid.tiling(3, 4, (30, 40))
    box = torch.tensor([[5.0, 6, 45, 36], [0, 0, 20, 15]])
    plain = token_centers(from_box(box, (30, 40), (50, 60)), grid).reshape(2, 3, 4, 2)
    both = from_box(box, (30, 40), (50, 60), hflip=torch.tensor([True, False]), vflip=True)
    flipped = token_centers(both, grid).reshape(2, 3, 4, 2)
    assert torch.equal(flipped[0], plain[0].flip(0, 1))
    assert torch.equal(flipped[1], plain[1].flip(0))


@given(view_pairs("warp"), view_pairs("crop"))
def test_compose_is_one_after_the_other(outer_pair, inner_pair):
    outer = outer_pair[0].geometry
    inner = inner_pair[0].geometry
    b = min(outer.matrix.shape[0], inner.matrix.shape[0])
    outer = CropGeometry(*(part[:b] for part in outer))
    inner = CropGeometry(*(part[:b] for part in inner))._replace(source_size=outer.view_size)
    points = torch.tensor([[0.5, 0.5], [3.0, 2.0], [7.0, 1.0]]).expand(b, 3, 2)
    chained = to_source(outer, to_source(inner, points))
    joined = compose(outer, inner)
    scale = float(outer.source_size.max())
    close = (to_source(joined, points) - chained).abs() <= 1e-4 * scale
    assert bool((close | chained.isnan()).all())
    assert torch.equal(joined.view_size, inner.view_size)
    assert torch.equal(joined.source_size, outer.source_size)


def test_compose_refuses_swapped_arguments():
    outer = random_geometry(view_size=(24, 40), source_size=(50, 70))
    inner = random_geometry(view_size=(8, 9), source_size=(24, 40))
    compose(outer, inner)
    with pytest.raises(GeometryError, match="swapped"):
        compose(inner, outer)


def test_float64_stays_float64():
    box = torch.tensor([[0.1, 0.2, 9.3, 7.7]], dtype=torch.float64)
    geometry = from_box(box, (5, 7), (10, 12))
    assert geometry.matrix.dtype == torch.float64
    assert token_centers(geometry, TokenGrid.tiling(2, 3, (5, 7))).dtype == torch.float64
    assert compose(geometry, random_geometry(1, (3, 3), (5, 7))).matrix.dtype == torch.float64


def test_a_matrix_of_negative_scale_is_the_same_homography():
    matrix = torch.tensor([[1.0, 0.1, 3], [0, 1, 2], [1e-3, 0, 1]])
    points = torch.tensor([[1.0, 2.0], [20.0, 10.0]])
    one = to_source(from_matrix(matrix, (20, 30), (40, 50)), points)
    two = to_source(from_matrix(-matrix, (20, 30), (40, 50)), points)
    torch.testing.assert_close(one, two)


def test_beyond_the_horizon_is_nan_and_never_valid():
    matrix = torch.tensor([[1.0, 0, 0], [0, 1, 0], [-0.05, 0, 1]])
    geometry = from_matrix(matrix, (20, 30), (400, 500))
    grid = TokenGrid.tiling(1, 3, (20, 30))
    assert token_centers(geometry, grid)[:, 0].isnan().tolist() == [False, False, True]
    assert source_valid(geometry, grid).tolist() == [True, True, False]


@pytest.mark.parametrize("bad", [(5, 5, 5, 9), (5, 9, 9, 5), (9, 5, 5, 9), (0, 0, math.nan, 4)])
def test_boxes_without_area_are_refused(bad):
    with pytest.raises(GeometryError, match=r"x0, y0, x1, y1.*top, left"):
        from_box(bad, (8, 8), (20, 20))
    with pytest.raises(GeometryError, match="x1 > x0"):
        from_box(torch.tensor([[0.0, 0, 4, 4], [float(v) for v in bad]]), (8, 8), (20, 20))


@pytest.mark.parametrize(
    ("view", "source", "error", "text"),
    [
        ((0, 8), (20, 20), GeometryError, "view_size must be at least"),
        ((8, 8), (20, -20), GeometryError, "source_size must be at least"),
        ((8,), (20, 20), ShapeError, "`view_size` must be whole numbers"),
        ((8.0, 8.0), (20, 20), ShapeError, "`view_size` must be whole numbers"),
        (torch.ones(3, 2, dtype=torch.int32), (20, 20), ShapeError, "leading axes"),
    ],
)
def test_bad_sizes_are_refused(view, source, error, text):
    with pytest.raises(error, match=text):
        from_box(torch.tensor([[0.0, 0, 4, 4]] * 2), view, source)


@pytest.mark.parametrize(
    ("matrix", "error", "text"),
    [
        (torch.zeros(3, 3), GeometryError, "singular"),
        (torch.tensor([[1.0, 2, 0], [2, 4, 0], [0, 0, 1]]), GeometryError, "singular"),
        (torch.full((3, 3), torch.nan), GeometryError, "NaN"),
        (torch.eye(3).half(), GeometryError, "half precision"),
        (torch.eye(3).long(), GeometryError, "float32 or float64"),
        (torch.eye(2), ShapeError, r"\(…, 3, 3\)"),
        ([[1, 0, 0]], ShapeError, "list"),
    ],
)
def test_bad_matrices_are_refused(matrix, error, text):
    with pytest.raises(error, match=text):
        from_matrix(matrix, (8, 8), (20, 20))


def test_a_tiny_crop_of_a_huge_source_is_not_singular():
    geometry = from_box((65534, 65534, 65535, 65535), (2000, 2000), (65535, 65535))
    assert invert(geometry).matrix.isfinite().all()


def test_box_shapes_and_types_are_checked():
    with pytest.raises(ShapeError, match=r"\(…, 4\)"):
        from_box((0, 0, 4), (8, 8), (20, 20))
    with pytest.raises(GeometryError, match="float16"):
        from_box(torch.tensor([0.0, 0, 4, 4]).half(), (8, 8), (20, 20))
    with pytest.raises(ShapeError, match="CropGeometry"):
        token_centers(torch.eye(3), TokenGrid.tiling(1, 1, (4, 4)))
    broken = random_geometry()._replace(view_size=torch.ones(3, 2, dtype=torch.int32))
    with pytest.raises(ShapeError, match="same leading axes"):
        token_centers(broken, TokenGrid.tiling(1, 1, (4, 4)))


def test_a_grid_of_another_view_is_refused():
    with pytest.raises(GeometryError, match=r"given as \(width, height\)"):
        token_centers(random_geometry(view_size=(24, 40)), TokenGrid.tiling(5, 3, (40, 24)))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles(backend):
    grid = TokenGrid.tiling(3, 5, (24, 40))

    def work(geometry):
        both = compose(geometry, invert(geometry))
        return token_centers(geometry, grid), source_valid(geometry, grid), both.matrix

    compiled = torch.compile(work, fullgraph=True, backend=backend)
    for seed in range(3):
        geometry = random_geometry(seed=seed)
        for a, b in zip(compiled(geometry), work(geometry), strict=True):
            torch.testing.assert_close(a, b)


def test_a_grid_that_is_none_is_refused_by_name():
    geometry = from_box([[0.0, 0, 8, 6]] * 2, (6, 8), (9, 11))
    with pytest.raises(ShapeError, match="`grid` must be a TokenGrid or None, got tuple"):
        token_centers(geometry, (3, 4))
    with pytest.raises(ShapeError, match=r"`grid.stride` must be a pair .* got 2"):
        token_centers(geometry, TokenGrid(3, 4, 2, 1))

"""Footprints and their overlaps against polygons cut in plain loops, and against counted points."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers import oracles
from helpers.strategies import crops, grids, random_geometry, similar_pairs, view_pairs
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from local_distill import (
    CropGeometry,
    GeometryError,
    ShapeError,
    TokenGrid,
    Tokens,
    from_box,
    from_matrix,
    source_valid,
)
from local_distill import footprints as module
from local_distill.errors import ConfigError
from local_distill.footprints import footprint_areas, overlap_area, token_footprints

ANY_PAIR = st.one_of(
    view_pairs("crop", padding=12.0),
    view_pairs("turn"),
    similar_pairs(),
    view_pairs("warp", padding=5.0),
)


# The oracle: float64 in plain loops. Polygons are lists of (x, y).


def quad_of(tokens, image, row, col):
    """Top-left, top-right, bottom-right, bottom-left of the view's cell."""
    corners = ((-0.5, -0.5), (-0.5, 0.5), (0.5, 0.5), (0.5, -0.5))  # (row, col)
    return [
        oracles.center(tokens.geometry, tokens.grid, image, row + r, col + c) for r, c in corners
    ]


def area_of(polygon):
    """Signed."""
    ends = zip(polygon, polygon[1:] + polygon[:1], strict=True)
    return sum(p[0] * q[1] - q[0] * p[1] for p, q in ends) / 2


def cut(polygon, start, end):
    """What lies left of start → end (x right, y down: where the cross product is positive)."""

    def depth(p):
        return (end[0] - start[0]) * (p[1] - start[1]) - (end[1] - start[1]) * (p[0] - start[0])

    left = []
    for p, q in zip(polygon, polygon[1:] + polygon[:1], strict=True):
        if depth(p) >= 0:
            left.append(p)
        if depth(p) * depth(q) < 0:
            share = depth(p) / (depth(p) - depth(q))
            left.append((p[0] + share * (q[0] - p[0]), p[1] + share * (q[1] - p[1])))
    return left


def shared_area(one, two):
    if any(math.isnan(value) for point in (*one, *two) for value in point):
        return 0.0
    home = two[0]
    one, two = ([(x - home[0], y - home[1]) for x, y in quad] for quad in (one, two))
    if area_of(two) < 0:
        two = two[::-1]
    for start, end in zip(two, two[1:] + two[:1], strict=True):
        one = cut(one, start, end)
        if not one:
            return 0.0
    return abs(area_of(one))


def cells(tokens):
    return list(itertools.product(range(tokens.grid.rows), range(tokens.grid.cols)))


def slack(*tokens):
    """What float32 may round of an area: relative to the largest one around."""
    areas = torch.cat([footprint_areas(side.geometry, side.grid).flatten() for side in tokens])
    return 1e-6 * float(torch.where(areas.isfinite(), areas, 0.0).max())


def wide(tokens):
    """The same view in float64."""
    geometry = tokens.geometry
    return tokens._replace(geometry=geometry._replace(matrix=geometry.matrix.double()))


@given(ANY_PAIR)
def test_footprints_are_the_cells_corners_carried_over(pair):
    for tokens in pair:
        quads = token_footprints(tokens.geometry, tokens.grid)
        side = int(tokens.geometry.source_size.max())
        assert quads.shape == (*tokens.geometry.matrix.shape[:1], tokens.grid.num_tokens, 4, 2)
        for image in range(quads.shape[0]):
            for i, (row, col) in enumerate(cells(tokens)):
                expected = torch.tensor(quad_of(tokens, image, row, col), dtype=torch.float64)
                near = expected.nan_to_num().abs().max().clamp(min=side)
                torch.testing.assert_close(
                    quads[image, i].double(),
                    expected,
                    rtol=1e-6,
                    atol=float(near) * 1e-6,
                    equal_nan=True,
                )


@given(ANY_PAIR)
def test_areas_are_those_of_the_oracle(pair):
    for tokens in map(wide, pair):
        areas = footprint_areas(tokens.geometry, tokens.grid)
        for image in range(areas.shape[0]):
            for i, (row, col) in enumerate(cells(tokens)):
                expected = abs(area_of(quad_of(tokens, image, row, col)))
                expected = math.inf if math.isnan(expected) else expected
                assert float(areas[image, i]) == pytest.approx(expected, rel=1e-8)


def check_overlaps(student, teacher, areas, tolerance):
    assert areas.shape == (
        student.geometry.matrix.shape[0],
        student.grid.num_tokens,
        teacher.grid.num_tokens,
    )
    for image in range(areas.shape[0]):
        one = [quad_of(student, image, *cell) for cell in cells(student)]
        two = [quad_of(teacher, image, *cell) for cell in cells(teacher)]
        truth = torch.tensor(
            [[shared_area(p, q) for q in two] for p in one], dtype=torch.float64
        ).reshape(areas.shape[1:])
        torch.testing.assert_close(areas[image].double(), truth, rtol=1e-6, atol=tolerance)
        assert bool((areas[image] >= 0).all())


@settings(max_examples=25)
@given(view_pairs("crop", padding=12.0), st.sampled_from(["clip", "boxes"]))
def test_overlaps_of_crops_and_flips(pair, method):
    areas = overlap_area(*pair, method=method)
    check_overlaps(*pair, areas, slack(*pair))


@settings(max_examples=20)
@given(view_pairs("turn"))
def test_overlaps_of_quarter_turns(pair):
    check_overlaps(*pair, overlap_area(*pair), slack(*pair))


@settings(max_examples=20)
@given(similar_pairs())
def test_overlaps_of_any_turn(pair):
    check_overlaps(*pair, overlap_area(*pair), slack(*pair))


@settings(max_examples=20)
@given(view_pairs("warp", padding=5.0))
def test_overlaps_in_perspective(pair):
    check_overlaps(*pair, overlap_area(*pair), slack(*pair))


@given(view_pairs("crop", padding=12.0))
def test_both_methods_agree(pair):
    torch.testing.assert_close(
        overlap_area(*pair, method="boxes"),
        overlap_area(*pair, method="clip"),
        rtol=1e-6,
        atol=slack(*pair),
    )


def test_overlaps_against_counted_points():
    # Neither polygon code: points of a fine raster, each asked by the sign of four cross products.
    turned = torch.tensor([[0.8, -0.5, 12.0], [0.4, 0.9, 3.0], [0.004, -0.002, 1.0]])
    mirrored = torch.tensor([[-0.9, 0.2, 45.0], [0.1, 1.1, 2.0], [0.0, 0.003, 1.0]])
    views = [
        from_matrix(
            torch.stack((m, m @ torch.diag(torch.tensor([1.1, 0.9, 1])))), (33, 41), (60,) * 2
        )
        for m in (turned, mirrored)
    ]
    student = Tokens(None, views[0], TokenGrid.tiling(2, 3, (33, 41)))
    teacher = Tokens(None, views[1], TokenGrid.tiling(3, 2, (33, 41)))
    areas = overlap_area(student, teacher)
    step = 0.1
    line = torch.arange(-30, 80, step, dtype=torch.float64) + step / 2

    def covered(tokens, image, cell):
        quad = quad_of(tokens, image, *cell)
        depths = torch.stack(
            [
                (q[0] - p[0]) * (line[:, None] - p[1]) - (q[1] - p[1]) * (line - p[0])
                for p, q in zip(quad, quad[1:] + quad[:1], strict=True)
            ]
        )
        return (depths > 0).all(0) | (depths < 0).all(0)

    for image in range(2):
        two = torch.stack([covered(teacher, image, cell).flatten() for cell in cells(teacher)])
        for i, cell in enumerate(cells(student)):
            counted = (covered(student, image, cell).flatten() & two).sum(1) * step**2
            torch.testing.assert_close(areas[image, i].double(), counted.double(), rtol=0, atol=0.5)
    assert float(areas.max()) > 50  # the scene has something to say


@given(ANY_PAIR)
def test_exchange_of_student_and_teacher(pair):
    student, teacher = map(wide, pair)
    torch.testing.assert_close(
        overlap_area(student, teacher),
        overlap_area(teacher, student).mT,
        rtol=1e-9,
        atol=1e-6 * slack(student, teacher),
    )


@given(ANY_PAIR)
def test_never_more_than_either_footprint(pair):
    student, teacher = pair
    areas = overlap_area(student, teacher)
    assert bool((areas >= 0).all())
    room = slack(student, teacher)
    own = footprint_areas(student.geometry, student.grid)
    other = footprint_areas(teacher.geometry, teacher.grid)
    assert bool((areas.sum(2) <= own * (1 + 1e-5) + room).all())
    assert bool((areas.sum(1) <= other * (1 + 1e-5) + room).all())


@given(st.data(), st.sampled_from(["crop", "similar", "warp"]))
def test_cells_that_cover_a_token_share_all_of_it(data, kind):
    student, _ = data.draw(view_pairs(kind))
    assume(bool(token_footprints(student.geometry, student.grid).isfinite().all()))
    quads = token_footprints(student.geometry, student.grid)
    low, high = quads.flatten(0, 2).amin(0), quads.flatten(0, 2).amax(0)
    # An upright view that shows all of the student's footprints and more; any grid that tiles it.
    box = torch.cat((low - 3, high + 5)).expand(quads.shape[0], 4)
    grid, view = data.draw(grids())
    grid = TokenGrid.tiling(grid.rows, grid.cols, view)
    flips = torch.tensor([data.draw(st.booleans()) for _ in range(quads.shape[0])])
    geometry = from_box(box, view, (100, 100), hflip=flips)
    geometry = geometry._replace(source_size=student.geometry.source_size)
    areas = overlap_area(student, Tokens(None, geometry, grid))
    own = footprint_areas(student.geometry, student.grid)
    torch.testing.assert_close(areas.sum(2), own, rtol=1e-4, atol=1e-4 * float(own.max()))


@given(ANY_PAIR, st.floats(0.1, 50.0))
def test_a_source_f_times_as_large_shares_f_squared_the_area(pair, factor):
    before = overlap_area(*map(wide, pair))
    scaled = []
    for tokens in map(wide, pair):
        matrix = tokens.geometry.matrix.clone()
        matrix[:, :2] *= factor
        scaled.append(tokens._replace(geometry=tokens.geometry._replace(matrix=matrix)))
    room = 1e-6 * slack(*scaled)
    torch.testing.assert_close(overlap_area(*scaled), before * factor**2, rtol=1e-9, atol=room)


@pytest.mark.parametrize("method", ["clip", "boxes"])
@pytest.mark.parametrize("flip", [False, True])
def test_a_view_shares_each_cell_with_itself_alone(method, flip):
    boxes = torch.tensor([[3.3, 1.7, 61.9, 40.2], [0.0, 0.0, 70.0, 50.0]])
    geometry = from_box(boxes, (35, 63), (50, 70), hflip=flip)
    tokens = Tokens(None, geometry, TokenGrid.tiling(5, 7, (35, 63)))
    areas = overlap_area(tokens, tokens, method=method)
    own = footprint_areas(geometry, tokens.grid)
    torch.testing.assert_close(areas, torch.diag_embed(own), rtol=1e-6, atol=1e-9)
    # Two cells apart there is no touching edge, and so nothing at all.
    assert float(areas[:, 0, 2:7].abs().max()) == 0.0


@given(similar_pairs())
def test_a_turned_view_shares_each_cell_with_itself_alone(pair):
    # All sides fall together, so that corners lie on either side of them by rounding alone.
    tokens, _ = pair
    own = footprint_areas(tokens.geometry, tokens.grid)
    areas = overlap_area(tokens, tokens)
    torch.testing.assert_close(
        areas, torch.diag_embed(own), rtol=1e-6, atol=1e-6 * float(own.max())
    )


@pytest.mark.parametrize("turn", range(0, 360, 15))
def test_cells_of_half_the_size_share_a_quarter(turn):
    # Corners on corners, sides on sides, at every angle; also 40,000 px from the origin.
    c, s = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    matrix = torch.tensor(
        [[[c, -s, x], [s, c, y], [0.0, 0.0, 1.0]] for x, y in ((90.0, 80.0), (4e4, 3e4))],
        dtype=torch.float64,
    )
    geometry = from_matrix(matrix, (24, 40), (65535, 65535))
    coarse = Tokens(None, geometry, TokenGrid.tiling(3, 5, (24, 40)))
    fine = Tokens(None, geometry, TokenGrid.tiling(6, 10, (24, 40)))
    expected = torch.zeros(15, 60, dtype=torch.float64)
    for row, col in itertools.product(range(6), range(10)):
        expected[row // 2 * 5 + col // 2, row * 10 + col] = 16.0
    for one, two, truth in ((coarse, fine, expected), (fine, coarse, expected.mT)):
        torch.testing.assert_close(
            overlap_area(one, two), truth.expand(2, -1, -1), rtol=0, atol=1e-8
        )


def test_views_apart_share_exactly_nothing():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10]])
    apart = torch.tensor([[11.0, 0, 21, 10], [0, 30, 10, 35]])
    one = Tokens(None, from_box(boxes, (16, 16), (40, 40)), TokenGrid.tiling(3, 3, (16, 16)))
    two = Tokens(None, from_box(apart, (16, 16), (40, 40)), TokenGrid.tiling(2, 4, (16, 16)))
    for method in ("clip", "boxes"):
        assert torch.equal(overlap_area(one, two, method=method), torch.zeros(2, 9, 8))
    # A diamond beside a corner: none of the box's sides alone tells them apart.
    diamond = torch.tensor([[1.0, -1.0, 18.0], [1.0, 1.0, 2.0], [0.0, 0.0, 1.0]])
    two = Tokens(
        None, from_matrix(diamond.expand(2, 3, 3), (6, 6), (40, 40)), TokenGrid.tiling(1, 1, (6, 6))
    )
    assert torch.equal(overlap_area(one, two), torch.zeros(2, 9, 1))
    assert torch.equal(overlap_area(two, one), torch.zeros(2, 1, 9))


def test_cells_beyond_the_horizon_share_nothing_and_are_without_bounds():
    matrix = torch.tensor([[1.0, 0, 0], [0, 1, 0], [-1 / 24, 0, 1]]).expand(2, 3, 3)
    geometry = CropGeometry(
        matrix, torch.tensor([[16, 32]] * 2).int(), torch.tensor([[40, 40]] * 2).int()
    )
    tokens = Tokens(None, geometry, TokenGrid.tiling(2, 4, (16, 32)))
    quads = token_footprints(geometry, tokens.grid)
    assert torch.equal(quads.isnan().any(-1).any(-1)[0], torch.tensor([0, 0, 1, 1] * 2).bool())
    upright = Tokens(
        None,
        from_box(torch.tensor([[0.0, 0, 40, 40]] * 2), (40, 40), (40, 40)),
        TokenGrid.tiling(1, 1, (40, 40)),
    )
    for areas in (overlap_area(tokens, upright)[..., 0], overlap_area(upright, tokens)[:, 0]):
        assert torch.equal(areas[0] > 0, torch.tensor([1, 1, 0, 0] * 2).bool())
        assert bool((areas / footprint_areas(geometry, tokens.grid)).isfinite().all())
    assert bool(footprint_areas(geometry, tokens.grid)[0, 2:4].isinf().all())


@pytest.mark.parametrize("method", ["clip", "boxes"])
def test_empty_grids_and_batches(method):
    geometry = random_geometry(2)
    full = Tokens(None, geometry, TokenGrid.tiling(2, 3, (24, 40)))
    none = Tokens(None, geometry, TokenGrid(0, 0, (8.0, 8.0), (4.0, 4.0)))
    assert token_footprints(geometry, none.grid).shape == (2, 0, 4, 2)
    assert footprint_areas(geometry, none.grid).shape == (2, 0)
    assert overlap_area(full, none, method=method).shape == (2, 6, 0)
    assert overlap_area(none, full, method=method).shape == (2, 0, 6)
    nobody = CropGeometry(*(part[:0] for part in geometry))
    empty = full._replace(geometry=nobody)
    assert overlap_area(empty, empty, method=method).shape == (0, 6, 6)


def test_leading_axes_of_footprints():
    geometry = CropGeometry(*(part.unflatten(0, (2, 3)) for part in random_geometry(6)))
    grid = TokenGrid.tiling(2, 3, (24, 40))
    assert token_footprints(geometry, grid).shape == (2, 3, 6, 4, 2)
    assert footprint_areas(geometry, grid).shape == (2, 3, 6)
    single = CropGeometry(*(part[1, 2] for part in geometry))
    torch.testing.assert_close(
        token_footprints(single, grid), token_footprints(geometry, grid)[1, 2], rtol=0, atol=0
    )


@given(view_pairs("warp"), st.integers(1, 4000))
def test_blocks_do_not_change_a_number(pair, budget):
    whole = overlap_area(*pair)
    before = module._CLIP_BYTES
    try:
        module._CLIP_BYTES = budget * module._BYTES_PER_PAIR
        assert torch.equal(overlap_area(*pair), whole)
    finally:
        module._CLIP_BYTES = before


def test_dtypes_and_gradients():
    grid = TokenGrid.tiling(2, 3, (24, 40))
    one, two = random_geometry(2, seed=1), random_geometry(2, seed=2)
    wide_one = one._replace(matrix=one.matrix.double().requires_grad_())
    narrow = overlap_area(Tokens(None, one, grid), Tokens(None, two, grid))
    assert narrow.dtype == torch.float32
    mixed = overlap_area(Tokens(None, wide_one, grid), Tokens(None, two, grid))
    assert mixed.dtype == torch.float64
    assert not mixed.requires_grad
    torch.testing.assert_close(mixed.float(), narrow, rtol=0, atol=0)
    assert footprint_areas(wide_one, grid).requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = overlap_area(Tokens(None, one, grid), Tokens(None, two, grid))
    assert torch.equal(again, narrow)
    with torch.inference_mode():
        assert torch.equal(overlap_area(Tokens(None, one, grid), Tokens(None, two, grid)), narrow)


def test_compiles_to_one_graph():
    torch._dynamo.reset()
    grid = TokenGrid.tiling(2, 3, (24, 40))
    sides = [Tokens(None, random_geometry(3, seed=seed), grid) for seed in (1, 2)]
    for method in ("clip", "boxes"):
        compiled = torch.compile(overlap_area, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(
            compiled(*sides, method=method), overlap_area(*sides, method=method)
        )
    turned = torch.tensor([[0.6, -0.8, 9.0], [0.8, 0.6, 1.0], [0.0, 0.0, 1.0]]).expand(3, 3, 3)
    turned = sides[0]._replace(geometry=from_matrix(turned, (24, 40), (50, 70)))
    # Values cannot be looked at in a graph: what cannot be served is 0 there, never wrong.
    assert torch.equal(compiled(turned, sides[1], method="boxes"), torch.zeros(3, 6, 6))


def test_what_is_refused():
    grid = TokenGrid.tiling(2, 3, (24, 40))
    one = Tokens(None, random_geometry(2), grid)
    with pytest.raises(ShapeError, match=r"`student` has no geometry"):
        overlap_area(Tokens(torch.zeros(2, 6, 4), None, grid), one)
    with pytest.raises(ShapeError, match=r"`teacher` has no grid"):
        overlap_area(one, one._replace(grid=None))
    with pytest.raises(ShapeError, match=r"axis `b` is 2 in `student\S*` but 3 in `teacher"):
        overlap_area(one, one._replace(geometry=random_geometry(3)))
    with pytest.raises(GeometryError, match="different source sizes"):
        overlap_area(one, one._replace(geometry=random_geometry(2, source_size=(70, 50))))
    with pytest.raises(ConfigError, match=r'"clip" or "boxes", got \'lattice\''):
        overlap_area(one, one, method="lattice")  # type: ignore[arg-type]
    with pytest.raises(GeometryError, match="float16"):
        token_footprints(one.geometry._replace(matrix=one.geometry.matrix.half()), grid)


@given(st.one_of(similar_pairs(), view_pairs("warp")), st.booleans())
def test_boxes_refuse_what_is_not_upright(pair, first):
    turned, _ = pair
    m = turned.geometry.matrix.double()
    drift = torch.stack((m[:, 1, 0] / m[:, 1, 1], m[:, 0, 1] / m[:, 0, 0])).abs()
    assume(bool((drift > 1e-2).any(1).any()))
    box = torch.tensor([[0.0, 0, 9, 9]] * m.shape[0])
    upright = from_box(box, (9, 9), (9, 9))._replace(source_size=turned.geometry.source_size)
    upright = Tokens(None, upright, TokenGrid.tiling(1, 2, (9, 9)))
    name = "student" if first else "teacher"
    with pytest.raises(GeometryError, match=rf"`{name}.geometry` of image .*method=\"clip\""):
        overlap_area(*((turned, upright) if first else (upright, turned)), method="boxes")


@given(ANY_PAIR)
def test_tokens_are_valid_where_the_oracle_says(pair):
    for tokens in map(wide, pair):
        valid = source_valid(tokens.geometry, tokens.grid)
        for image in range(valid.shape[0]):
            size = tokens.geometry.source_size[image].tolist()
            for i, (row, col) in enumerate(cells(tokens)):
                x, y = oracles.center(tokens.geometry, tokens.grid, image, row, col)
                margin = min(abs(x), abs(y), abs(x - size[1]), abs(y - size[0]))
                if math.isnan(margin) or margin > 1e-9 * max(size):  # on the edge either is right
                    assert bool(valid[image, i]) == oracles.is_inside((x, y), size)


@given(st.data())
def test_a_crop_of_one_pixel_and_far_padding(data):
    view = (16, 24)
    grid = TokenGrid.tiling(2, 3, view)
    tiny = crops(data.draw, 2, view, (1, 1))
    far = from_box(torch.tensor([[-9e4, -9e4, 9e4, 9e4]] * 2), view, (1, 1))
    sides = Tokens(None, tiny, grid), Tokens(None, far, grid)
    check_overlaps(*sides, overlap_area(*sides), 1e-6)

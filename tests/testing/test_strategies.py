"""The strategies draw what they say, and shrink to small, plain examples."""

import math

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, find, given
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable

from local_distill import ConfigError, TokenGrid, Tokens, from_box
from local_distill.testing import (
    crop_geometries,
    matches,
    strategies,
    token_grids,
    tokens,
    view_pairs,
)
from local_distill.testing.snippets import to_code

KINDS = ["crop", "turn", "similar", "warp"]
SIZES = st.tuples(st.integers(9, 211), st.integers(9, 211))
VIEWS = st.tuples(st.integers(8, 97), st.integers(8, 97))


def places(geometry, points):
    """(b, n, 2) where view points (x, y) lie in the source; float64, written out."""
    matrix = geometry.matrix.double()
    rows = []
    for image in range(matrix.shape[0]):
        row = []
        for x, y in points:
            u, v, w = (matrix[image] @ torch.tensor([x, y, 1.0], dtype=torch.float64)).tolist()
            assert w > 0
            row.append([u / w, v / w])
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def corners(view_size):
    height, width = view_size
    return [(0, 0), (width, 0), (0, height), (width, height)]


def centers(view):
    grid = view.grid
    return places(
        view.geometry,
        [
            (grid.offset[0] + grid.stride[0] * col, grid.offset[1] + grid.stride[1] * row)
            for row in range(grid.rows)
            for col in range(grid.cols)
        ],
    )


def beyond(points, source_size):
    """How many pixels the furthest point lies out of the source."""
    height, width = source_size
    x, y = points.unbind(-1)
    return float(torch.stack((-x, x - width, -y, y - height)).max())


@given(st.data(), VIEWS, SIZES, st.sampled_from([None, 0, 1]))
def test_crops_lie_inside_the_source(data, view, source, side):
    geometry = data.draw(crop_geometries(2, view, source, side=side))
    assert beyond(places(geometry, corners(view)), source) <= 1e-4
    assert geometry.matrix.dtype == torch.float32
    assert geometry.source_size.tolist() == [list(source)] * 2
    assert geometry.view_size.tolist() == [list(view)] * 2


@given(st.data(), VIEWS, SIZES, st.sampled_from([None, 0, 1]), st.integers(1, 30))
def test_padding_is_the_most_that_crops_reach_out(data, view, source, side, padding):
    geometry = data.draw(crop_geometries(2, view, source, side=side, padding=padding))
    assert beyond(places(geometry, corners(view)), source) <= padding + 1e-3


def test_padded_views_reach_out():
    pair = find(
        view_pairs(padding=25.0), lambda pair: some_outside(pair[0]) and some_outside(pair[1])
    )
    assert pair[0].geometry.matrix.shape[0] == 2


def some_outside(view):
    return beyond(centers(view), view.geometry.source_size[0].tolist()) > 1


def axes(geometry):
    """Lengths of the view's two axes in the source, and the cosine between them."""
    across, down = geometry.matrix.double()[:, :2, :2].unbind(-1)
    lengths = across.norm(dim=-1), down.norm(dim=-1)
    return *lengths, (across * down).sum(-1) / lengths[0] / lengths[1]


@given(st.data(), VIEWS, SIZES, st.sampled_from(["crop", "turn"]))
def test_crops_and_turns_have_axes_along_the_sources(data, view, source, kind):
    matrix = data.draw(crop_geometries(2, view, source, kind=kind)).matrix
    assert torch.equal(matrix[:, 2], torch.tensor([[0.0, 0.0, 1.0]]).expand(2, -1))
    both = matrix[:, :2, :2].abs()
    straight = both[:, 0, 1] + both[:, 1, 0] == 0
    turned = both[:, 0, 0] + both[:, 1, 1] == 0
    assert bool((straight | turned).all())
    if kind == "crop":
        assert bool(straight.all())


@given(st.data(), VIEWS)
def test_similar_views_have_square_pixels_and_lie_inside(data, view):
    source = (400, 500)  # of `view_pairs`
    geometry = data.draw(crop_geometries(2, view, source, kind="similar"))
    across, down, cosine = axes(geometry)
    torch.testing.assert_close(across, down, rtol=1e-5, atol=0)
    assert float(cosine.abs().max()) < 1e-5
    assert beyond(places(geometry, corners(view)), source) <= 0


@given(st.data(), VIEWS, SIZES)
def test_warps_show_their_whole_view(data, view, source):
    geometry = data.draw(crop_geometries(2, view, source, kind="warp"))
    places(geometry, corners(view))  # none lies beyond the horizon
    assert bool((torch.linalg.det(geometry.matrix.double()).abs() > 0).all())


@pytest.mark.parametrize(
    ("kind", "shows"),
    [
        ("crop", lambda geometry: bool((geometry.matrix[:, 0, 0] < 0).any())),
        ("turn", lambda geometry: bool((geometry.matrix[:, 0, 1] != 0).any())),
        ("similar", lambda geometry: bool((torch.linalg.det(geometry.matrix) < 0).any())),
        ("warp", lambda geometry: bool((geometry.matrix[:, 2, :2] != 0).any())),
    ],
)
def test_every_kind_has_what_it_is_named_for(kind, shows):
    pair = find(view_pairs(kind), lambda pair: shows(pair[1].geometry))
    assert shows(pair[1].geometry)


@pytest.mark.parametrize("kind", KINDS)
def test_general_position_leaves_no_ties(kind):
    @hypothesis.settings(max_examples=60, suppress_health_check=list(HealthCheck))
    @given(view_pairs(kind, general_position=True))
    def check(pair):
        for one, other in (pair, pair[::-1]):
            points, candidates = centers(one), centers(other)
            if candidates.shape[1] < 2:
                continue
            distance = (points[:, :, None] - candidates[:, None]).norm(dim=-1)
            nearest, second = distance.sort(-1).values[..., :2].unbind(-1)
            # what float32 geometry is good to
            longer = float(one.geometry.source_size.max())
            assert float((second - nearest).min()) > 2**-22 * longer

    check()


def test_pairs_that_are_not_in_general_position_are_not_drawn(monkeypatch):
    """The pairs above are too few to meet a near tie; this is what keeps it out."""
    geometry = from_box([[0.0, 0.0, 16.0, 16.0]], (16, 16), (16, 16))
    middle, four = (Tokens(None, geometry, TokenGrid.tiling(n, n, (16, 16))) for n in (1, 2))
    clear, margin = strategies._nearest_is_clear, strategies._MARGIN
    assert not clear(middle, four)
    assert clear(four, middle)
    # 1 pixel of offset makes √2 pixels of difference, to first order, of a cell of 8·√2
    for part, wanted in ((0.5, False), (2.0, True)):
        offset = (8.0 + 8 * margin * part, 8.0 + 16 * margin * part)
        assert clear(middle._replace(grid=middle.grid._replace(offset=offset)), four) is wanted

    monkeypatch.setattr(strategies, "_nearest_is_clear", lambda one, other: False)
    assert find(view_pairs(), lambda pair: True)
    with pytest.raises(Unsatisfiable):
        find(view_pairs(general_position=True), lambda pair: True, settings=FEW)


FEW = hypothesis.settings(max_examples=20, database=None, suppress_health_check=list(HealthCheck))


def test_without_general_position_there_are_ties():
    """So the test above can fail."""

    def tied(pair):
        distance = (centers(pair[0])[:, :, None] - centers(pair[1])[:, None]).norm(dim=-1)
        if distance.shape[2] < 2:
            return False
        nearest, second = distance.sort(-1).values[..., :2].unbind(-1)
        return bool((second == nearest).any())

    assert tied(find(view_pairs(), tied))


@given(st.data(), VIEWS, st.sampled_from([None, True, False]))
def test_grids_fit_their_view(data, view, tiling):
    grid = data.draw(token_grids(view, 5, tiling=tiling))
    height, width = view
    assert 1 <= grid.rows <= 5
    assert 1 <= grid.cols <= 5
    assert 0 < grid.offset[0] + grid.stride[0] * (grid.cols - 1) < width
    assert 0 < grid.offset[1] + grid.stride[1] * (grid.rows - 1) < height
    tiles = TokenGrid.tiling(grid.rows, grid.cols, view) == grid
    if tiling is not None:
        assert tiles == tiling


@given(st.data(), st.integers(1, 3), st.integers(0, 5), st.integers(1, 5))
def test_matches_keep_the_contract(data, b, s, t):
    found = data.draw(matches(b, s, t))
    assert found.teacher_index.dtype == torch.int64
    assert found.teacher_index.shape == found.weight.shape
    assert found.cost.shape == (b, s)
    assert bool(((found.teacher_index >= 0) & (found.teacher_index < t)).all())
    assert bool((found.weight >= 0).all())
    assert bool((found.weight.sum(-1) <= 1 + 1e-6).all())
    assert torch.equal(found.cost.isfinite(), found.matched)
    assert bool((found.cost[~found.matched] == math.inf).all())


@pytest.mark.parametrize("wanted", [True, False])
def test_matches_are_there_and_are_not(wanted):
    def has(found):
        return bool((found.matched == wanted).any())

    assert has(find(matches(2, 3, 4), has))


def test_features_have_two_decimals_and_the_dtype_float32():
    with_default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        view = find(tokens(dim=3, kind="warp"), lambda view: view.num_tokens > 2)
    finally:
        torch.set_default_dtype(with_default)
    assert view.features.dtype == torch.float32
    assert view.geometry.matrix.dtype == torch.float32
    torch.testing.assert_close(view.features * 100, (view.features * 100).round())


def test_the_smallest_pair_is_two_images_of_one_token():
    student, teacher = find(view_pairs(dim=3, general_position=True), lambda pair: True)
    for view in (student, teacher):
        assert view.grid.rows == view.grid.cols == 1
        assert view.geometry.matrix.shape[0] == 2
        assert view.geometry.source_size.tolist() == [[9, 9]] * 2
        assert view.geometry.view_size.tolist() == [[8, 8]] * 2
    assert not torch.equal(student.features, teacher.features)


def test_shrinking_takes_away_what_does_not_matter():
    student, teacher = find(view_pairs(dim=3), lambda pair: pair[1].num_tokens >= 5)
    assert student.num_tokens == 1
    assert teacher.num_tokens in (5, 6)  # 1 × 5 or 5 × 1, or the next that hypothesis stops at
    assert bool((student.geometry.matrix[:, 0, 0] > 0).all())  # no flip
    grid = find(token_grids((32, 48)), lambda grid: grid.cols == 3)
    assert grid == TokenGrid.tiling(1, 3, (32, 48))
    geometry = find(crop_geometries(1, (8, 8), (64, 64)), lambda g: float(g.matrix[0, 0, 2]) >= 7.5)
    assert float(geometry.matrix[0, 0, 2]) == 8.0
    assert float(geometry.matrix[0, 1, 2]) == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_search_draws_the_same_to_the_bit(kind):
    def drawn():
        found = []

        @hypothesis.settings(derandomize=True, database=None, max_examples=20)
        @given(view_pairs(kind, dim=3, general_position=True))
        def search(pair):
            found.append(to_code(pair))

        search()
        return found

    first = drawn()
    assert first == drawn()
    assert len(set(first)) > 10


def test_an_unknown_kind_is_named():
    with pytest.raises(ConfigError, match="'spiral'"):
        find(crop_geometries(1, (8, 8), (9, 9), kind="spiral"), lambda geometry: True)

"""How far matches lie from the geometric truth."""

import math
from unittest.mock import patch

import pytest
import torch
from helpers import oracles
from helpers.some_matches import candidates, hard, soft
from helpers.strategies import matches_for, random_geometry, view_pairs
from hypothesis import given, settings
from hypothesis import strategies as st

from local_distill import (
    Matches,
    SimilarityMatcher,
    TokenGrid,
    Tokens,
    from_box,
    from_matrix,
    nearest_matches,
)
from local_distill.geometry import token_centers
from local_distill.matching.diagnostics import (
    correspondence,
    correspondence_accuracy,
    correspondence_error,
    diagnose,
    mean_correspondence_error,
    reachable_tokens,
)


def true_error(matches, student, teacher):
    """[b][s], with the helpers' homography and its derivative by differences."""
    result = []
    for image, rows in enumerate(candidates(matches)[0]):
        size = student.geometry.source_size[image].tolist()
        errors = []
        for i, table in enumerate(rows):
            at = divmod(i, student.grid.cols)
            own = oracles.center(student.geometry, student.grid, image, *at)
            own_cell = oracles.diagonal(student.geometry, student.grid, image, *at)
            if not table or not oracles.is_inside(own, size):
                errors.append(math.inf)
                continue
            total = 0.0
            for j, weight in table.items():
                there = divmod(j, teacher.grid.cols)
                other = oracles.center(teacher.geometry, teacher.grid, image, *there)
                cell = oracles.diagonal(teacher.geometry, teacher.grid, image, *there)
                pixels = math.hypot(own[0] - other[0], own[1] - other[1])
                total += weight * (math.inf if math.isnan(pixels) else pixels / max(own_cell, cell))
            errors.append(total / sum(table.values()))
        result.append(errors)
    return torch.tensor(result, dtype=torch.float64)


@st.composite
def matched_views(draw, kind, padding=0.0):
    student, teacher = draw(view_pairs(kind, padding=padding))
    sizes = student.geometry.matrix.shape[0], student.grid.num_tokens, teacher.grid.num_tokens
    if draw(st.booleans()):
        return soft(*sizes, draw(st.integers(0, 99))), student, teacher
    return draw(matches_for(*sizes)), student, teacher


@settings(max_examples=15)
@pytest.mark.parametrize("kind", ["crop", "turn", "warp"])
@given(data=st.data())
def test_the_error_agrees_with_the_definition(kind, data):
    matches, student, teacher = data.draw(matched_views(kind, padding=8.0))
    block = data.draw(st.sampled_from([1, 3, 1000]))
    with patch.object(correspondence, "block_length", lambda _bytes, _device: block):
        error = correspondence_error(matches, student, teacher)
    wanted = true_error(matches, student, teacher)
    assert error.dtype == torch.float32
    assert torch.equal(error.isinf(), wanted.isinf())
    torch.testing.assert_close(error.double(), wanted, rtol=1e-3, atol=1e-3)


@settings(max_examples=15)
@given(matched_views("crop", padding=8.0), st.sampled_from([0.3, 0.5, 1.5]))
def test_the_means_agree_with_the_definition(drawn, threshold):
    matches, student, teacher = drawn
    error = true_error(matches, student, teacher)
    truth = oracles.nearest(student, teacher)
    near = [[best is not None and best[1] < threshold for best in row] for row in truth]
    close = [abs(best[1] - threshold) < 1e-4 for row in truth for best in row if best is not None]
    if any(close) or bool(((error - threshold).abs() < 1e-3).any()):
        return  # within rounding of the threshold either answer is right
    reach = torch.tensor(near).reshape(error.shape)
    assert torch.equal(reachable_tokens(student, teacher, threshold), reach)
    counted = error[reach & error.isfinite()]
    wanted = float(counted.mean()) if len(counted) else 0.0
    found = mean_correspondence_error(matches, student, teacher, threshold=threshold)
    assert float(found) == pytest.approx(wanted, rel=1e-3, abs=1e-3)
    finite = error[error.isfinite()]
    found = mean_correspondence_error(matches, student, teacher, threshold=None)
    assert float(found) == pytest.approx(
        float(finite.mean()) if len(finite) else 0.0, rel=1e-3, abs=1e-3
    )
    judged = error[reach & matches.matched]
    wanted = float((judged < threshold).double().mean()) if len(judged) else 0.0
    found = correspondence_accuracy(matches, student, teacher, threshold)
    assert float(found) == pytest.approx(wanted)


@pytest.mark.parametrize("kind", ["crop", "turn", "warp"])
@given(data=st.data())
def test_the_error_of_nearest_is_its_cost(kind, data):
    student, teacher = data.draw(view_pairs(kind, padding=8.0))
    limit = data.draw(st.sampled_from([None, 0.5]))
    matches = nearest_matches(student, teacher, max_distance=limit, method="search")
    error = correspondence_error(matches, student, teacher)
    torch.testing.assert_close(error, matches.cost, rtol=1e-6, atol=1e-7)
    if limit is not None and matches.matched.any():
        assert float(correspondence_accuracy(matches, student, teacher)) == 1


@given(view_pairs("crop"))
def test_a_matcher_that_sees_places_reaches_the_nearest(pair):
    """Features that are the positions themselves: l2 similarity is the nearest centre."""
    student, teacher = (
        tokens._replace(features=token_centers(tokens.geometry, tokens.grid).double())
        for tokens in pair
    )
    matches = SimilarityMatcher("l2")(student, teacher)
    error = correspondence_error(matches, student, teacher)
    nearest = nearest_matches(student, teacher, max_distance=None, method="search")
    torch.testing.assert_close(error, nearest.cost, rtol=1e-3, atol=1e-3)
    same = SimilarityMatcher("l2")(teacher, teacher)
    assert float(mean_correspondence_error(same, teacher, teacher)) <= 1e-3
    assert float(correspondence_accuracy(same, teacher, teacher)) == 1


def test_noise_on_the_places_raises_the_curve():
    view = Tokens(None, random_geometry(3), TokenGrid.tiling(6, 10, (24, 40)))
    places = token_centers(view.geometry, view.grid)
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(places.shape, generator=g)
    errors, shares = [], []
    for strength in (0.0, 2.0, 20.0):
        seen = view._replace(features=places + strength * noise)
        matches = SimilarityMatcher("l2")(seen, view._replace(features=places))
        errors.append(float(mean_correspondence_error(matches, view, view)))
        shares.append(float(correspondence_accuracy(matches, view, view)))
    assert errors == sorted(errors)
    assert errors[0] == 0
    assert errors[2] > 1
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == 1


def test_padding_has_no_true_place_and_is_no_good_match():
    grid = TokenGrid.tiling(1, 4, (10, 40))
    padded = Tokens(
        None, from_box(torch.tensor([[-20.0, 0, 20, 10]] * 2), (10, 40), (10, 40)), grid
    )
    inner = Tokens(None, from_box(torch.tensor([[0.0, 0, 40, 10]] * 2), (10, 40), (10, 40)), grid)
    one = hard([[0, 0, 0, 0]] * 2)  # teacher token 0 is centred at −15 in the padded view
    cell = math.hypot(10, 10)
    found = correspondence_error(one, inner, padded)
    assert found[0].tolist() == pytest.approx([20 / cell, 30 / cell, 40 / cell, 50 / cell])
    found = correspondence_error(one, padded, inner)
    assert found[1].tolist() == pytest.approx([math.inf, math.inf, 0.0, 10 / cell])
    assert reachable_tokens(inner, padded).tolist() == [[True, True, False, False]] * 2


def test_beyond_the_horizon_no_match_is_right():
    grid = TokenGrid.tiling(1, 4, (10, 40))
    matrix = torch.eye(3).repeat(2, 1, 1)
    plain = Tokens(None, from_matrix(matrix, (10, 40), (10, 40)), grid)
    matrix[1, 2, 0] = -1 / 30  # tokens at x > 30 look away
    bent = Tokens(None, from_matrix(matrix, (10, 40), (10, 40)), grid)
    index = torch.tensor([[[0, 3], [0, 3], [0, 3], [0, 3]]] * 2)
    weight = torch.tensor([[[0.5, 0.5], [1, 0], [0, 1], [0, 0]]] * 2)
    matches = Matches(index, weight, torch.zeros(2, 4))
    found = correspondence_error(matches, plain, bent)
    assert found[0].isfinite().tolist() == [True, True, True, False]
    assert found[1].isfinite().tolist() == [False, True, False, False]
    assert not found.isnan().any()


def test_no_overlap_leaves_nothing_to_average():
    grid = TokenGrid.tiling(3, 3, (9, 9))
    one = Tokens(None, from_box(torch.tensor([[0.0, 0, 9, 9]] * 2), (9, 9), (90, 90)), grid)
    two = Tokens(None, from_box(torch.tensor([[70.0, 70, 79, 79]] * 2), (9, 9), (90, 90)), grid)
    matches = hard([list(range(9))] * 2)
    numbers = diagnose(matches, one, two)
    assert float(numbers.correspondence_tokens) == 0
    assert float(numbers.correspondence_error) == 0
    assert float(numbers.correspondence_accuracy) == 0
    wanted = math.hypot(70, 70) / math.hypot(3, 3)
    assert float(mean_correspondence_error(matches, one, two, threshold=None)) == pytest.approx(
        wanted
    )


@pytest.mark.parametrize("side", [4096, 65535])
def test_large_sources_and_crops_of_one_pixel(side):
    grid = TokenGrid.tiling(3, 5, (63, 81))
    boxes = torch.tensor([[side - 1.0, side - 1.0, side, side], [0.0, 0.0, side, side]])
    view = Tokens(None, from_box(boxes, (63, 81), (side, side)), grid)
    matches = Matches.identity(torch.ones(2, 15))
    assert float(correspondence_error(matches, view, view).max()) == 0

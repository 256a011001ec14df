"""Columns and rows apart: the same answers as the lattice that takes every token by itself."""

import itertools
from unittest import mock

import pytest
import torch
from helpers.strategies import crops, view_pairs
from hypothesis import given
from hypothesis import strategies as st

from local_distill import TokenGrid, Tokens, from_box
from local_distill.kernels import aligned_lattice
from local_distill.kernels.aligned_lattice import are_aligned
from local_distill.matching import nearest
from local_distill.matching.nearest import nearest_view_matches


def token_by_token(*args, **settings):
    with mock.patch.object(nearest, "are_aligned", return_value=False):
        return nearest_view_matches(*args, **settings)


def assert_same(one, two):
    assert one.keys() == two.keys()
    for pair, matches in one.items():
        other = two[pair]
        assert torch.equal(matches.weight, other.weight)
        assert torch.equal(matches.matched, other.matched)
        matched = matches.matched
        assert torch.equal(matches.teacher_index[matched], other.teacher_index[matched])
        ulp = torch.finfo(other.cost.dtype).eps
        torch.testing.assert_close(matches.cost, other.cost, rtol=ulp, atol=1e-10)


@given(st.data(), st.sampled_from([0.5, None, 0.3, 1e-200, 1e200]))
def test_mixed_grids_are_as_token_by_token(data, limit):
    """Non-square grids of different sizes, padding, flips, views that hardly overlap."""
    b = data.draw(st.integers(2, 3))
    source = data.draw(st.tuples(st.integers(20, 600), st.integers(20, 600)))
    views = []
    for _ in range(data.draw(st.integers(2, 4))):
        rows, cols = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
        size = (rows * data.draw(st.integers(1, 9)), cols * data.draw(st.integers(1, 9)))
        stride = size[1] / cols, size[0] / rows
        offset = tuple(step * data.draw(st.sampled_from([0.5, 0.25, 0.3])) for step in stride)
        views.append(
            Tokens(
                None,
                crops(data.draw, b, size, source, padding=15.0),
                TokenGrid(rows, cols, stride, offset),
            )
        )
    pairs = list(itertools.product(range(len(views)), repeat=2))
    with mock.patch.object(nearest, "cell_maps", side_effect=AssertionError):  # it is the other way
        found = nearest_view_matches(views, views, pairs, max_distance=limit)
    assert_same(found, token_by_token(views, views, pairs, max_distance=limit))


@given(view_pairs("crop", padding=12.0))
def test_blocks_of_pairs_are_as_the_whole(pair):
    pairs = list(itertools.product(range(2), repeat=2))
    whole = nearest_view_matches(pair, pair, pairs)
    with mock.patch.object(aligned_lattice, "block_length", return_value=1):
        blocks = nearest_view_matches(pair, pair, pairs)
    for key, matches in whole.items():
        assert all(torch.equal(a, b) for a, b in zip(matches, blocks[key], strict=True))


def crop(hflip=False, vflip=False):
    boxes = torch.tensor([[3.0, 4, 60, 41], [0, 0, 7, 5]])
    return from_box(boxes, (32, 48), (50, 70), hflip=hflip, vflip=vflip).matrix.double()


@pytest.mark.parametrize("vflip", [False, True])
@pytest.mark.parametrize("hflip", [False, True])
def test_crops_and_flips_are_aligned(hflip, vflip):
    assert are_aligned(crop(hflip, vflip)[None])


@pytest.mark.parametrize(
    ("row", "col", "value"),
    [
        (0, 1, 1e-9),  # shear
        (1, 0, -1e-9),
        (2, 0, 1e-12),  # perspective
        (2, 1, 1e-12),
        (2, 2, 2.0),  # the same view, in other numbers
        (2, 2, -1.0),
        (0, 0, 0.0),  # no area
        (1, 1, 0.0),
        (0, 2, 1e200),
        *itertools.product(range(3), range(3), [float("nan")]),
    ],
)
def test_anything_else_in_one_image_is_not(row, col, value):
    matrix = crop()
    matrix[1, row, col] = value
    assert not are_aligned(matrix[None])


def test_no_view_is_not():
    assert not are_aligned(torch.zeros(2, 0, 3, 3))

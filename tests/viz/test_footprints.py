"""Footprints on the source, by their artists' data coordinates."""

import numpy as np
import pytest
import torch

from local_distill import ShapeError, TokenGrid, from_box, from_matrix
from local_distill.viz import draw_footprints, draw_tokens, new_figure, token_colors

GRID = TokenGrid.tiling(2, 3, (20, 30))


def panel():
    return new_figure(4, 3).add_subplot()


def quads(collection):
    return [path.vertices[:4].tolist() for path in collection.get_paths()]


def test_a_turned_view_has_its_footprints_where_its_matrix_puts_the_corners():
    # a quarter turn: view x runs down the source, view y runs to the left
    turn = torch.tensor([[0.0, -1, 40], [1, 0, 5], [0, 0, 1]])
    ax = panel()
    drawn = draw_footprints(ax, torch.zeros(3, 50, 60), from_matrix(turn, (20, 30), (50, 60)), GRID)
    expected = []
    for row in range(2):
        for col in range(3):
            x, y = 10 * col, 10 * row
            corners = [(x, y), (x + 10, y), (x + 10, y + 10), (x, y + 10)]
            expected.append([[40.0 - v, 5.0 + u] for u, v in corners])
    assert quads(drawn) == expected
    assert ax.get_xlim() == (0, 60)
    assert ax.get_ylim() == (50, 0)


def test_what_lies_outside_is_hollow_and_not_cut_off():
    ax = panel()
    padded = from_box((-10, 0, 20, 20), (20, 30), (20, 40))  # column 0 is padding
    filled = draw_footprints(ax, torch.zeros(3, 20, 40), padded, GRID)
    hollow = ax.collections[-1]
    assert len(filled.get_paths()) == 4
    assert quads(hollow)[0] == [[-10, 0], [0, 0], [0, 10], [-10, 10]]
    assert len(hollow.get_facecolor()) == 0
    assert ax.get_xlim() == (-10, 40)


def test_chosen_tokens_in_chosen_colours():
    ax = panel()
    whole = from_box((0, 0, 30, 20), (20, 30), (20, 30))
    filled = draw_footprints(
        ax, torch.zeros(3, 20, 30), whole, GRID, tokens=[5, 0], colors=["red", "blue"]
    )
    assert quads(filled) == [
        [[20, 10], [30, 10], [30, 20], [20, 20]],
        [[0, 0], [10, 0], [10, 10], [0, 10]],
    ]
    assert filled.get_facecolor()[:, :3].tolist() == [[1, 0, 0], [0, 0, 1]]


def test_a_token_has_one_colour_in_the_view_and_on_the_source():
    colors = token_colors(GRID)
    ax, other = panel(), panel()
    whole = from_box((0, 0, 30, 20), (20, 30), (20, 30))
    filled = draw_footprints(ax, torch.zeros(3, 20, 30), whole, GRID)
    draw_tokens(other, torch.zeros(3, 20, 30), GRID, token_colors=colors)
    cells = next(one for one in other.collections if len(one.get_paths()) == 6)
    assert np.allclose(filled.get_facecolor()[:, :3], cells.get_facecolor()[:, :3])
    assert quads(cells) == quads(filled)
    assert len({tuple(color) for color in colors.round(3).tolist()}) == 6


def test_a_transparent_colour_leaves_the_view_as_it_is():
    ax = panel()
    draw_tokens(ax, torch.zeros(3, 20, 30), GRID, token_colors=[(1, 0, 0, 0)] * 5 + ["red"])
    cells = next(one for one in ax.collections if len(one.get_paths()) == 6)
    assert cells.get_facecolor()[:, 3].tolist() == [0, 0, 0, 0, 0, 0.6]


def test_a_cell_beyond_the_horizon_is_left_out():
    matrix = torch.tensor([[1.0, 0, 0], [0, 1, 0], [-0.04, 0, 1]])  # the horizon is at x = 25
    view = from_matrix(matrix, (20, 30), (20, 30))
    drawn = draw_footprints(panel(), torch.zeros(3, 20, 30), view, GRID)
    assert np.isfinite([vertex for quad in quads(drawn) for vertex in quad]).all()
    assert len(drawn.get_paths()) < 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": [6]}, r"`tokens` must be in 0 … 5.*2 × 3"),
        ({"tokens": [-1]}, r"`tokens` must be in 0 … 5"),
        ({"colors": ["red"]}, r"`colors` has 1 entries for 6 tokens"),
        ({"sample": 2}, r"sample"),
    ],
)
def test_bad_input_says_what_is_wrong(options, message):
    crops = from_box(torch.tensor([[0.0, 0, 30, 20]] * 2), (20, 30), (20, 30))
    with pytest.raises(ShapeError, match=message):
        draw_footprints(panel(), torch.zeros(2, 3, 20, 30), crops, GRID, **options)
    with pytest.raises(ShapeError, match=r"`token_colors` has 1 entries for 6"):
        draw_tokens(panel(), torch.zeros(3, 20, 30), GRID, token_colors=["red"])

"""The closed form's work grows as the tokens do; a table of all pairs grows as their square."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from local_distill import NearestMatcher, TokenGrid, Tokens, from_box, match_views

# Work in numbers written; fourfold tokens, and a little for what does not grow.
TOKENS, LEAST, MOST = 4, 3.0, 4.4


class _Written(TorchDispatchMode):
    """How many numbers operators write into new tensors, and the largest of these."""

    def __init__(self):
        super().__init__()
        self.total = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for one in torch.utils._pytree.tree_leaves(result):
            if isinstance(one, torch.Tensor) and one._base is None:
                self.total += one.numel()
                self.largest = max(self.largest, one.numel())
        return result


def written(matcher, side):
    boxes = torch.tensor([[3.2, 5.1, 170.4, 120.6], [40.3, 20.7, 230.9, 190.2]])
    views = []
    for shift in (0.0, 17.3):
        geometry = from_box(boxes + shift, (side * 8, side * 8), (300, 320))
        grid = TokenGrid.tiling(side, side, (side * 8, side * 8))
        views.append(Tokens(None, geometry, grid))
    with _Written() as count:
        match_views(matcher, views, views)
    return count


def test_the_closed_form_is_linear_in_the_tokens():
    few, many = (written(NearestMatcher(), side) for side in (32, 64))
    assert LEAST <= many.total / few.total <= MOST
    assert many.largest <= 4 * 64**2 * 2 * 2  # pairs of views, images; never a table of all pairs


def test_the_measure_sees_what_is_not():
    few, many = (written(NearestMatcher(method="search"), side) for side in (16, 32))
    assert many.total / few.total > TOKENS * 2


@pytest.mark.parametrize("side", [7, 33])
def test_ten_views_cost_as_their_tokens(side):
    def count(views):
        box = torch.tensor([[3.2, 5.1, 170.4, 120.6]]).repeat(2, 1)
        geometry = from_box(box, (side * 8, side * 8), (300, 320))
        grid = TokenGrid.tiling(side, side, (side * 8, side * 8))
        with _Written() as found:
            match_views(NearestMatcher(), [Tokens(None, geometry, grid)] * views,
                        [Tokens(None, geometry, grid)] * 2)  # fmt: skip
        return found.total

    assert count(10) / count(5) <= 18 / 8 * 1.2  # pairs of different views

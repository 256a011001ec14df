"""Whether the answers lie where the tokens do: half a pixel and half a cell show here, by name."""

from __future__ import annotations

import math

from local_distill.structures import Matcher, Tokens
from local_distill.testing.matcher_properties._comparing import run
from local_distill.testing.matcher_properties._registry import MatcherExample, matcher_property
from local_distill.testing.oracles.geometry import geometry_and_grid, token_center, token_places

__all__ = ["the_heaviest_answer_lies_where_the_token_does"]

Point = tuple[float, float]

# In cells: by how much the nearest token has to be nearer than the second.
_CLEAR = 0.05


# Where features are looked at too, the most alike within reach may win over the nearest.
@matcher_property(kinds=("geometric",), same_cells=True)
def the_heaviest_answer_lies_where_the_token_does(
    matcher: Matcher, example: MatcherExample
) -> None:
    """Among cells of one size, no answer weighs more than the teacher token of nearest centre."""
    student, teacher, _ = example
    weights, _ = run(matcher, student, teacher)
    worst: tuple[float, str] | None = None
    for image, table in enumerate(weights.tolist()):
        cell = _common_cell(student, teacher, image)
        others = [place.center for place in token_places(teacher, image) if place.inside]
        if cell is None or len(others) < max(2, teacher.num_tokens):
            continue  # of one token, or of those that padding leaves, there is less to choose from
        for i, own in enumerate(token_places(student, image)):
            apart = [_cells(own.center, other, cell) for other in others]
            nearest, second = sorted(range(len(apart)), key=apart.__getitem__)[:2]
            row = table[i]
            if not own.inside or apart[second] - apart[nearest] < _CLEAR or sum(row) <= 0:
                continue
            answer = row.index(max(row))
            too_far = apart[answer] - apart[nearest]
            if row[nearest] < row[answer] - 1e-5 and (worst is None or too_far > worst[0]):
                said = (
                    f"image {image}: student token {i}, at {_at(own.center)} of the source, is "
                    f"answered by teacher token {answer} at {_at(others[answer])}, "
                    f"{apart[answer]:.2f} cells off; token {nearest} at {_at(others[nearest])} is "
                    f"{apart[nearest]:.2f} off"
                )
                worst = too_far, said
    if worst is not None:
        raise AssertionError(worst[1])


def _common_cell(student: Tokens, teacher: Tokens, image: int) -> Point | None:
    """Width and height in the source of the cells of both views; None where they have none."""
    cells: list[Point] = []
    for view in (student, teacher):
        geometry, grid = geometry_and_grid(view)
        start, right, below = (
            token_center(geometry, grid, image, *place) for place in ((0, 0), (0, 1), (1, 0))
        )
        if not (_is_zero(right[1] - start[1]) and _is_zero(below[0] - start[0])):
            return None  # turned or warped
        cells.append((abs(right[0] - start[0]), abs(below[1] - start[1])))
    same = all(math.isclose(one, other, rel_tol=1e-4) for one, other in zip(*cells, strict=True))
    return cells[0] if same else None


def _is_zero(pixels: float) -> bool:
    return abs(pixels) < 1e-3


def _cells(one: Point, other: Point, cell: Point) -> float:
    """How far apart, in cells along either side."""
    return math.hypot((one[0] - other[0]) / cell[0], (one[1] - other[1]) / cell[1])


def _at(point: Point) -> str:
    return f"({round(point[0], 2)}, {round(point[1], 2)})"

"""The kit names what the package is about: answers that are off by half a pixel or half a cell."""

import math
import re

import pytest
import torch
from helpers.drawn import drawn
from helpers.half_pixel_matchers import HALF_PIXELS, centred, corners_aligned, half_a_cell_off

from local_distill import (
    BilinearMatcher,
    KeepBest,
    Mutual,
    NearestMatcher,
    OverlapMatcher,
    RadiusMatcher,
    cell_diagonals,
    nearest_matches,
    source_valid,
    token_centers,
)
from local_distill.testing import (
    PropertyFailed,
    check_matcher,
    matcher_faults,
    matcher_properties,
    same_cell_pairs,
)
from local_distill.testing.matcher_properties import REGISTRY, same_cell_examples
from local_distill.testing.oracles import nearest_teacher_tokens

NAME = "the_heaviest_answer_lies_where_the_token_does"
# What CI tries a property on.
EXAMPLES = drawn(same_cell_examples(), 15)
PROPERTY = next(one for one in REGISTRY if one.name == NAME)
SAID = re.compile(
    r"image (\d+): student token (\d+), at \(([\d.]+), ([\d.]+)\) of the source, is answered by "
    r"teacher token (\d+) at \(([\d.]+), ([\d.]+)\), ([\d.]+) cells off; token (\d+) at "
    r"\(([\d.]+), ([\d.]+)\) is ([\d.]+) off"
)


def breaks(matcher, example):
    try:
        PROPERTY.check(matcher, example)
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("name", HALF_PIXELS)
def test_half_pixels_are_found_in_many_of_few_examples(name):
    least = 3 if "a pixel" in name else 8
    assert sum(breaks(HALF_PIXELS[name], example) for example in EXAMPLES) >= least


@pytest.mark.parametrize("matcher", [corners_aligned, half_a_cell_off])
def test_the_message_says_which_token_and_by_how_much(matcher):
    with pytest.raises(PropertyFailed) as caught:
        check_matcher(matcher, kind="geometric", properties=[NAME], max_examples=15)
    message = str(caught.value)
    said = SAID.search(message)
    assert said, message
    image, token, x, y, answer, a_x, a_y, off, nearest, n_x, n_y, less = map(float, said.groups())
    assert off > less + 0.25
    # the small example that goes with it is of the fewest tokens, and says the same
    known = {"subject": matcher}
    code = message.partition("to repeat:\n\n")[2].replace("\n    ", "\n").strip()
    lines = [line for line in code.splitlines() if "subject = ..." not in line]
    with pytest.raises(PropertyFailed) as again:
        exec("\n".join(lines), known)
    assert str(again.value) == message
    student, teacher, _ = known["example"]
    assert student.num_tokens * teacher.num_tokens <= 4
    assert token < student.num_tokens
    i, j, k = (int(number) for number in (image, answer, nearest))
    centers = token_centers(teacher.geometry, teacher.grid)[i].tolist()
    assert centers[j] == pytest.approx([a_x, a_y], abs=0.01)
    assert centers[k] == pytest.approx([n_x, n_y], abs=0.01)
    assert math.dist((x, y), (a_x, a_y)) > math.dist((x, y), (n_x, n_y))


@pytest.mark.parametrize(
    "matcher",
    [
        centred,
        NearestMatcher(max_distance=None),
        NearestMatcher(method="search"),
        BilinearMatcher(),
        OverlapMatcher(),
        OverlapMatcher("clip"),
        RadiusMatcher(),
        Mutual(BilinearMatcher()),
        KeepBest(OverlapMatcher(), fraction=0.5),
    ],
    ids=lambda matcher: " ".join(repr(matcher).split())[:40],
)
def test_right_matchers_of_any_kind_agree(matcher):
    for example in EXAMPLES:
        assert not breaks(matcher, example)


def test_it_applies_where_geometry_alone_decides():
    for kind, applies in (("geometric", True), ("both", False), ("similarity", False)):
        names = [one.name for one in matcher_properties(kind)]
        assert (NAME in names) == applies


def test_a_choice_by_looks_among_the_near_is_no_fault_of_places():
    """Why it does not apply to what looks at features as well: the most alike wins in reach."""
    from local_distill import GatedSimilarityMatcher

    assert any(breaks(GatedSimilarityMatcher(), example) for example in EXAMPLES)


def test_the_table_of_faults_has_them():
    def wrong(matcher):
        results = matcher_faults(matcher, "geometric", groups=["geometry"])
        return {one.fault for one in results if one.outcome == "WRONG" and "cells" in one.fault}

    assert wrong(corners_aligned) == {"equal cells, shifted", "equal cells, one view flipped"}
    assert wrong(half_a_cell_off) == {"equal cells, one view flipped"}
    assert wrong(centred) == set()


# The examples


def test_examples_have_tokens_to_choose_from_and_are_not_square():
    several = [one for one in EXAMPLES if min(one.student.num_tokens, one.teacher.num_tokens) > 1]
    assert len(several) >= 10
    sides = [side for one in EXAMPLES for view in one[:2] for side in view.grid[:2]]
    assert any(rows != cols for rows, cols in zip(sides[::2], sides[1::2], strict=True))
    assert any(side % 2 and side > 1 for side in sides)
    assert any(one.student.num_tokens != one.teacher.num_tokens for one in EXAMPLES)
    flipped = {
        (side, bool(view.geometry.matrix[image, axis, axis] < 0), axis)
        for one in EXAMPLES
        for side, view in enumerate(one[:2])
        for image in range(2)
        for axis in range(2)
    }
    assert len(flipped) == 8  # either view, flipped and not, along either axis


def test_pairs_are_of_equal_cells_inside_and_clear():
    for student, teacher in drawn(same_cell_pairs(), 25):
        assert student.features is None
        ours, theirs = (cell_diagonals(*view[1:]) for view in (student, teacher))
        torch.testing.assert_close(ours[:, :1], theirs[:, :1])
        for view in (student, teacher):
            assert bool(source_valid(*view[1:]).all())
            assert view.geometry.source_size.unique(dim=0).shape[0] == 1
        apart = torch.cdist(token_centers(*student[1:]), token_centers(*teacher[1:]))
        # they overlap: some student token has an answer within half a cell
        matched = nearest_matches(student, teacher).matched
        assert bool(matched.any(1).all())
        if teacher.num_tokens > 1:
            # in cells, along their sides
            scale = teacher.geometry.matrix.diagonal(dim1=1, dim2=2)[:, :2].abs()
            cell = (scale * torch.tensor(teacher.grid.stride))[:, None]
            places = (token_centers(*view[1:]) / cell for view in (student, teacher))
            nearest, second = torch.cdist(*places).topk(2, largest=False).values.unbind(-1)
            assert bool((second - nearest > 0.05)[matched].all())
        wanted = nearest_teacher_tokens(student, teacher)
        found = apart.amin(-1)
        for image, row in enumerate(wanted):
            assert found[image].tolist() == pytest.approx([each.pixels for each in row], rel=1e-4)

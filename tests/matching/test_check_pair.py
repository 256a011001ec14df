"""`check_pair` refuses what the package's own matchers refuse, and is seen by no graph."""

import pytest
import torch
from torch import nn

from local_distill import (
    ConfigError,
    GeometryError,
    Matches,
    ShapeError,
    TokenGrid,
    Tokens,
    from_box,
    nearest_matches,
    similarity_matches,
)
from local_distill.matching import check_pair

GRID = TokenGrid.tiling(2, 3, (32, 48))


def view(batch=2, dim=4, *, features=True, geometry=True, source=(40, 60), grid=GRID):
    boxes = torch.tensor([[1.0, 2.0, 49.0, 34.0]]).repeat(batch, 1)
    values = torch.randn(batch, grid.num_tokens, dim, generator=torch.Generator().manual_seed(0))
    return Tokens(
        values if features else None,
        from_box(boxes, (32, 48), source) if geometry else None,
        grid if geometry else None,
    )


def spoilt(matrix_of):
    good = view()
    return good._replace(geometry=good.geometry._replace(matrix=matrix_of(good.geometry.matrix)))


OF_PLACES = {
    "no geometry": (view(geometry=False), ShapeError, "`teacher` has no geometry"),
    "no grid": (view()._replace(grid=None), ShapeError, "`teacher` has no grid"),
    "another batch": (view(1), ShapeError, "axis `b` is 2 in `student"),
    "another source": (view(source=(41, 60)), GeometryError, "different source sizes"),
    "half precision": (spoilt(torch.Tensor.half), GeometryError, "float16"),
    "singular": (spoilt(lambda matrix: matrix * 0), GeometryError, "teacher.geometry.*singular"),
}
OF_FEATURES = {
    "no features": (view(features=False), ShapeError, "`teacher` has no features"),
    "another batch": (view(1), ShapeError, "axis `b` is 2 in `student"),
    "another width": (view(dim=5), ShapeError, "axis `d` is 4 in `student.features` but 5 in"),
    "whole numbers": (view()._replace(features=torch.ones(2, 6, 4).long()), ShapeError, "floating"),
    "a token too many": (view()._replace(features=torch.ones(2, 7, 4)), ShapeError, "7 tokens"),
    "half precision": (spoilt(torch.Tensor.half), GeometryError, "float16"),
}


@pytest.mark.parametrize("case", OF_PLACES)
def test_what_the_geometric_matcher_refuses_is_refused(case):
    teacher, kind, message = OF_PLACES[case]
    for refuses in (lambda s, t: check_pair(s, t, geometry=True), nearest_matches):
        with pytest.raises(kind, match=message):
            refuses(view(), teacher)
    with pytest.raises(kind):
        check_pair(teacher, view(), geometry=True)


@pytest.mark.parametrize("case", OF_FEATURES)
def test_what_the_similarity_matcher_refuses_is_refused(case):
    teacher, kind, message = OF_FEATURES[case]
    for refuses in (lambda s, t: check_pair(s, t, features=True), similarity_matches):
        with pytest.raises(kind, match=message):
            refuses(view(), teacher)
    with pytest.raises(kind):
        check_pair(teacher, view(), features=True)


@pytest.mark.parametrize("case", [*OF_PLACES, *OF_FEATURES])
def test_both_together_refuse_either(case):
    teacher, kind, _ = {**OF_PLACES, **OF_FEATURES}[case]
    with pytest.raises(kind):
        check_pair(view(), teacher, features=True, geometry=True)


@pytest.mark.parametrize("named", ["features", "geometry"])
def test_what_is_not_asked_for_may_be_missing(named):
    alone = view(features=named == "features", geometry=named == "geometry")
    check_pair(alone, alone, **{named: True})
    other = {"features": "geometry", "geometry": "features"}[named]
    with pytest.raises(ShapeError, match="this matcher needs"):
        check_pair(alone, alone, **{other: True})


def test_bad_tokens_and_empty_views_pass():
    bad = view()._replace(features=torch.full((2, 6, 4), torch.nan))
    check_pair(bad, bad, features=True, geometry=True)
    none = view(grid=GRID._replace(rows=0))
    check_pair(view(), none, features=True, geometry=True)
    check_pair(view(0), view(0), features=True, geometry=True)


def test_no_tokens_and_nothing_asked_for_are_errors():
    with pytest.raises(ConfigError, match="nothing to check"):
        check_pair(view(), view())
    for named in ("features", "geometry"):
        with pytest.raises(ShapeError, match="`student` must be Tokens"):
            check_pair(torch.ones(2, 6, 4), view(), **{named: True})


def product(student, teacher):
    """Both inputs are asked for, and looked at."""
    check_pair(student, teacher, features=True, geometry=True)
    cost, index = (1 - student.features @ teacher.features.mT).min(-1)
    return Matches(index[..., None], torch.ones_like(cost)[..., None], cost)


def test_it_compiles_into_one_graph():
    compiled = torch.compile(product, fullgraph=True, backend="eager")
    found, wanted = compiled(view(), view()), product(view(), view())
    assert torch.equal(found.teacher_index, wanted.teacher_index)
    with pytest.raises(Exception, match="axis `b` is 2"):
        compiled(view(), view(1))


def test_it_maps():
    one = view()

    def costs(f, matrix):
        geometry = one.geometry._replace(matrix=matrix)
        tokens = Tokens(f, geometry, one.grid)
        return product(tokens, tokens).cost

    features = torch.stack((one.features, 2 * one.features))
    found = torch.vmap(costs)(features, torch.stack((one.geometry.matrix,) * 2))
    assert torch.equal(found[1], costs(features[1], one.geometry.matrix))


def test_values_are_not_asked_for_where_they_lie_on_a_device():
    """A meta tensor has none: whatever looked at one would fail."""
    there = [
        Tokens(
            one.features.to("meta"), type(one.geometry)(*(p.to("meta") for p in one.geometry)), GRID
        )
        for one in (view(), view(source=(41, 60)))
    ]
    check_pair(*there, features=True, geometry=True)
    with pytest.raises(GeometryError, match="different source sizes"):
        check_pair(view(), view(source=(41, 60)), geometry=True)


def test_the_module_of_a_user_needs_one_line():
    class Mine(nn.Module):
        def forward(self, student, teacher):
            return product(student, teacher)

    from local_distill.testing import check_matcher

    names = [
        "batches_that_differ_are_refused",
        "features_of_other_widths_are_refused",
        "half_precision_geometry_is_refused",
        "missing_inputs_are_refused",
        "views_of_other_sources_are_refused",
        "vmap_works",
        "compiles_without_graph_breaks",
    ]
    assert check_matcher(Mine(), properties=names, max_examples=3) == names

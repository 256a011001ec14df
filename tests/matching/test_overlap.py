"""Teacher tokens by shared footprint, against polygons cut in plain loops and against intervals."""

import copy
import functools
import importlib
import pickle

import pytest
import torch
from helpers.strategies import random_geometry, similar_pairs, view_pairs
from hypothesis import given, settings
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
from local_distill.errors import ConfigError
from local_distill.footprints import footprint_areas, overlap_area
from local_distill.matching.overlap import OverlapMatcher, overlap_matches
from local_distill.testing import oracles

ANY_PAIR = st.one_of(
    view_pairs("crop", padding=12.0),
    view_pairs("turn"),
    similar_pairs(),
    view_pairs("warp", padding=5.0),
)
METHODS = ("boxes", "clip")
GRID = TokenGrid.tiling(3, 5, (24, 40))


def views(b=2, dtype=torch.float32):
    """Two overlapping views of b images."""
    sides = []
    for seed in (0, 1):
        geometry = random_geometry(b, seed=seed)
        geometry = geometry._replace(matrix=geometry.matrix.to(dtype))
        sides.append(Tokens(None, geometry, GRID))
    return sides


def check_against_oracle(student, teacher, matches):
    t = teacher.grid.num_tokens
    assert torch.equal(matches.teacher_index, torch.arange(t).expand_as(matches.teacher_index))
    for image, tokens in enumerate(oracles.cell_overlaps(student, teacher)):
        there = [
            [place.inside for place in oracles.token_places(side, image)]
            for side in (student, teacher)
        ]
        for i, wanted in enumerate(tokens):
            found = matches.weight[image, i]
            torch.testing.assert_close(found, torch.tensor(wanted.row(t)), rtol=0, atol=1e-5)
            assert not any(w > 0 for w, valid in zip(found, there[1], strict=True) if not valid)
            if bool(matches.matched[image, i]):
                assert there[0][i]
                assert float(matches.cost[image, i]) == pytest.approx(wanted.cost, abs=1e-5)
    assert bool((matches.weight >= 0).all())
    assert float(matches.mass.max()) <= 1 + 1e-6
    assert bool((matches.cost >= 0).all())
    assert torch.equal(matches.matched, matches.cost.isfinite())


@given(view_pairs("crop", padding=12.0), st.sampled_from(METHODS))
def test_shares_of_crops_flips_and_pads(pair, method):
    check_against_oracle(*pair, overlap_matches(*pair, method=method))


@settings(max_examples=25)
@given(ANY_PAIR)
def test_shares_of_any_geometry(pair):
    check_against_oracle(*pair, overlap_matches(*pair, method="clip"))


@given(view_pairs("crop", padding=12.0))
def test_both_methods_agree(pair):
    boxes, clip = (overlap_matches(*pair, method=method) for method in METHODS)
    torch.testing.assert_close(boxes.weight, clip.weight, rtol=0, atol=1e-6)
    both = boxes.matched & clip.matched  # of a sliver the two may leave a rest or nothing
    torch.testing.assert_close(boxes.cost[both], clip.cost[both], rtol=0, atol=1e-6)


@given(view_pairs("crop"), st.sampled_from(METHODS))
def test_share_times_footprint_is_the_area_shared(pair, method):
    student, teacher = pair
    matches = overlap_matches(student, teacher, method=method)
    own = footprint_areas(student.geometry, student.grid)[..., None]
    valid = matches.weight > 0
    areas = overlap_area(student, teacher, method=method)
    torch.testing.assert_close(
        (matches.weight * own)[valid], areas[valid], rtol=1e-4, atol=1e-6 * float(own.max())
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("flip", [False, True])
def test_identical_views_match_themselves(method, flip):
    box = torch.tensor([[1.0, 2, 41, 26], [8, 0, 28, 12]])
    tokens = Tokens(None, from_box(box, (24, 40), (50, 60), hflip=flip), GRID)
    matches = overlap_matches(tokens, tokens, method=method)
    torch.testing.assert_close(matches.weight, torch.eye(15).expand(2, 15, 15), rtol=0, atol=1e-6)
    assert torch.equal(matches.weight.argmax(-1), torch.arange(15).expand(2, 15))
    assert float(matches.cost.max()) < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_cells_that_tile_a_token_cover_all_of_it(method):
    geometry = from_box(torch.tensor([[3.0, 1, 43, 25], [0, 0, 7, 11]]), (24, 40), (50, 60))
    coarse = Tokens(None, geometry, TokenGrid.tiling(2, 2, (24, 40)))
    fine = Tokens(None, geometry, TokenGrid.tiling(8, 6, (24, 40)))
    there = overlap_matches(coarse, fine, method=method)
    assert (there.weight[0] > 1e-6).sum(-1).tolist() == [12] * 4
    torch.testing.assert_close(there.mass, torch.ones(2, 4))
    assert float(there.cost.max()) < 1e-6
    back = overlap_matches(fine, coarse, method=method)
    assert (back.weight[0] > 1e-6).sum(-1).tolist() == [1] * 48
    torch.testing.assert_close(back.mass, torch.ones(2, 48))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_brings_no_mass_above_one(method, dtype):
    for seed in range(20):
        geometry = random_geometry(3, seed=seed)
        geometry = geometry._replace(matrix=geometry.matrix.to(dtype))
        coarse = Tokens(None, geometry, TokenGrid.tiling(1, 3, (24, 40)))
        fine = Tokens(None, geometry, TokenGrid.tiling(7, 9, (24, 40)))
        matches = overlap_matches(coarse, fine, method=method)
        assert float(matches.weight.double().sum(-1).max()) <= 1 + 2 * torch.finfo(dtype).eps
        assert float(matches.cost.min()) >= 0


@pytest.mark.parametrize("method", METHODS)
def test_views_apart_have_no_match(method):
    one = from_box(torch.tensor([[0.0, 0, 40, 24]] * 2), (24, 40), (90, 90))
    two = from_box(torch.tensor([[50.0, 60, 90, 84]] * 2), (24, 40), (90, 90))
    matches = overlap_matches(Tokens(None, one, GRID), Tokens(None, two, GRID), method=method)
    assert not matches.matched.any()
    assert float(matches.weight.sum()) == 0
    assert bool(matches.cost.isinf().all())


@settings(max_examples=15)
@given(
    view_pairs("crop", padding=12.0), st.sampled_from(METHODS), st.sampled_from([1, 9000, 90000])
)
def test_blocks_do_not_change_a_number(pair, method, budget):
    whole = overlap_matches(*pair, method=method)
    module = importlib.import_module("local_distill.kernels.byte_budget")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "byte_budget", lambda device: budget)
        blocks = overlap_matches(*pair, method=method)
    assert all(torch.equal(a, b) for a, b in zip(whole, blocks, strict=True))


@pytest.mark.parametrize("side", [4096, 65535])
@pytest.mark.parametrize("method", METHODS)
def test_large_sources_and_crops_of_one_pixel(side, method):
    # float64 geometry, as float32 cannot hold the cells of a crop of 1 px at 65,535 px
    boxes = [[side - 1.0, side - 1.0, side, side], [0.0, 0.0, side, side]]
    geometry = from_box(torch.tensor(boxes, dtype=torch.float64), (24, 24), (side, side))
    tokens = Tokens(None, geometry, TokenGrid.tiling(3, 3, (24, 24)))
    matches = overlap_matches(tokens, tokens, method=method)
    expected = torch.eye(9).double().expand(2, 9, 9)
    torch.testing.assert_close(matches.weight, expected, rtol=0, atol=1e-8)
    assert float(matches.cost.max()) < 1e-8
    # float32 keeps what it can: weights are right for the geometry that it holds
    rough = tokens._replace(geometry=geometry._replace(matrix=geometry.matrix.float()))
    check_against_oracle(rough, rough, overlap_matches(rough, rough, method=method))


@pytest.mark.parametrize("method", METHODS)
def test_tokens_in_padding_never_match(method):
    grid = TokenGrid.tiling(2, 4, (20, 40))
    padded = Tokens(
        None, from_box(torch.tensor([[-20.0, 0, 20, 20]] * 2), (20, 40), (20, 40)), grid
    )
    matches = overlap_matches(padded, padded, method=method)
    valid = torch.tensor([False, False, True, True] * 2)
    assert torch.equal(matches.weight > 0.5, (torch.eye(8) * valid > 0).expand(2, 8, 8))
    assert not matches.weight[:, ~valid].any()
    assert not matches.weight[..., ~valid].any()
    # a cell half in the padding, centre inside, is covered as far as valid cells reach
    inner = Tokens(
        None,
        from_box(torch.tensor([[-4.0, 0, 6, 20]] * 2), (20, 10), (20, 40)),
        TokenGrid.tiling(1, 1, (20, 10)),
    )
    matches = overlap_matches(inner, padded, method=method)
    assert matches.mass.flatten().tolist() == pytest.approx([0.6] * 2)
    assert matches.cost.flatten().tolist() == pytest.approx([0.4] * 2)


def test_cells_that_reach_the_horizon_have_no_match():
    # the horizon at x = 30, inside the fourth column and right of its centres, which are in view
    matrix = torch.tensor([[1.0, 0, 0], [0, 1, 0], [-1 / 30, 0, 1]]).repeat(2, 1, 1)
    bent = Tokens(None, from_matrix(matrix, (24, 40), (500, 900)), GRID)
    whole = from_box(torch.tensor([[0.0, 0, 900, 500]] * 2), (24, 40), (500, 900))
    flat = Tokens(None, whole, TokenGrid.tiling(2, 2, (24, 40)))
    assert source_valid(bent.geometry, GRID)[0].tolist() == ([True] * 4 + [False]) * 3
    matches = overlap_matches(bent, flat, method="clip")
    assert matches.matched[0].tolist() == [True, True, True, False, False] * 3
    assert not any(part.isnan().any() for part in matches)
    back = overlap_matches(flat, bent, method="clip")
    assert back.weight[0].any(0).tolist() == [True, True, True, False, False] * 3
    assert not any(part.isnan().any() for part in back)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_boxes_refuse_what_is_not_upright_and_name_the_way_out(side):
    one, two = views()
    turn = torch.tensor([[0.8, -0.6, 9.0], [0.6, 0.8, 2.0], [0, 0, 1]]).repeat(2, 1, 1)
    turn[0] = torch.eye(3)
    turned = Tokens(None, from_matrix(turn, (24, 40), (50, 70)), GRID)
    pair = (turned, two) if side == "student" else (one, turned)
    text = rf"`{side}.geometry` of image 1.*OverlapMatcher\(method=\"clip\"\)"
    with pytest.raises(GeometryError, match=text):
        overlap_matches(*pair)
    assert overlap_matches(*pair, method="clip").matched.any()


def test_where_boxes_cannot_see_what_they_are_given_nothing_wrong_is_matched():
    matrix = torch.eye(3).repeat(2, 1, 1)
    matrix[1, 0, 1] = 0.3
    size = torch.tensor([[24, 40]] * 2, dtype=torch.int32)
    tokens = Tokens(None, CropGeometry(matrix, size, size), GRID)
    matches = torch.compile(overlap_matches, fullgraph=True, backend="eager")(tokens, tokens)
    assert matches.matched.all(1).tolist() == [True, False]
    assert matches.matched.any(1).tolist() == [True, False]


@pytest.mark.parametrize("method", METHODS)
def test_empty_grids_and_batches(method):
    match = functools.partial(overlap_matches, method=method)
    tokens, _ = views()
    none = tokens._replace(grid=GRID._replace(rows=0))
    assert match(tokens, none).weight.shape == (2, 15, 0)
    assert bool(match(tokens, none).cost.isinf().all())
    assert match(none, tokens).weight.shape == (2, 0, 15)
    empty = tokens._replace(geometry=CropGeometry(*(part[:0] for part in tokens.geometry)))
    assert match(empty, empty).weight.shape == (0, 15, 15)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("student", [torch.float32, torch.float64])
@pytest.mark.parametrize("teacher", [torch.float32, torch.float64])
def test_dtypes(student, teacher, method):
    match = functools.partial(overlap_matches, method=method)
    one, two = views(dtype=student)[0], views(dtype=teacher)[1]
    for matches in (
        match(one, two),
        match(one, two._replace(grid=GRID._replace(rows=0))),
    ):
        assert matches.weight.dtype == matches.cost.dtype == torch.promote_types(student, teacher)
        assert matches.teacher_index.dtype == torch.int64


@pytest.mark.parametrize("method", METHODS)
def test_no_gradient_no_change_any_layout(method):
    match = functools.partial(overlap_matches, method=method)
    student, teacher = views()
    plain = match(student, teacher)
    learned = student.geometry.matrix.clone().requires_grad_()
    twisted = student.geometry.matrix.mT.contiguous().mT
    for matrix in (learned, twisted):
        before = matrix.detach().clone()
        tokens = student._replace(geometry=student.geometry._replace(matrix=matrix))
        found = match(tokens, teacher)
        assert not any(part.requires_grad for part in found)
        assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))
        assert torch.equal(matrix, before)
    with torch.inference_mode():
        inside = CropGeometry(*(part.clone() for part in student.geometry))
    found = match(student._replace(geometry=inside), teacher)
    assert torch.equal(found.weight, plain.weight)
    one = CropGeometry(*(part[:1].expand(2, *part.shape[1:]) for part in student.geometry))
    found = match(student._replace(geometry=one), teacher)
    assert torch.equal(found.weight[0], plain.weight[0])


@pytest.mark.parametrize("method", METHODS)
def test_features_are_not_looked_at(method):
    match = functools.partial(overlap_matches, method=method)
    student, teacher = views()
    plain = match(student, teacher)
    bad = torch.full((2, 15, 4), torch.nan)
    found = match(student._replace(features=bad.half()), teacher._replace(features=bad))
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_a_bad_image_that_cannot_be_seen_stays_unmatched(method):
    match = functools.partial(overlap_matches, method=method)
    matrix = torch.eye(3).repeat(3, 1, 1)
    matrix[1, 0, 0] = torch.nan
    matrix[2] = 0.0
    size = torch.tensor([[24, 40]] * 3, dtype=torch.int32)
    tokens = Tokens(None, CropGeometry(matrix, size, size), GRID)
    good = Tokens(None, CropGeometry(torch.eye(3).repeat(3, 1, 1), size, size), GRID)
    compiled = torch.compile(match, fullgraph=True, backend="eager")
    for pair in ((tokens, good), (good, tokens), (tokens, tokens)):
        matches = compiled(*pair)
        assert matches.matched.all(1).tolist() == [True, False, False]
        assert matches.matched.any(1).tolist() == [True, False, False]
        assert not any(part.isnan().any() for part in matches)


@pytest.mark.parametrize("method", METHODS)
def test_vmap(method):
    match = functools.partial(overlap_matches, method=method)
    geometry, other = (
        CropGeometry(*(torch.stack([p, p.flip(0)]) for p in random_geometry(3, seed=seed)))
        for seed in (0, 1)
    )
    found = torch.vmap(lambda a, b: match(Tokens(None, a, GRID), Tokens(None, b, GRID)))(
        geometry, other
    )
    for i in range(2):
        a, b = (CropGeometry(*(p[i] for p in part)) for part in (geometry, other))
        plain = match(Tokens(None, a, GRID), Tokens(None, b, GRID))
        assert all(torch.equal(x[i], y) for x, y in zip(found, plain, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"geometry": None}, ShapeError, "`teacher` has no geometry, which the overlap matcher"),
        ({"grid": None}, ShapeError, "`teacher` has no grid"),
        ({"geometry": random_geometry(1)}, ShapeError, "axis `b` is 2 in `student"),
        ({"geometry": random_geometry(source_size=(70, 50))}, GeometryError, "source sizes"),
        ({"features": torch.zeros(2, 16, 4)}, ShapeError, "class and register tokens"),
        ({"grid": TokenGrid.tiling(5, 3, (40, 24))}, GeometryError, r"\(width, height\)"),
    ],
)
def test_bad_tokens_are_refused_by_name(change, error, text):
    student, teacher = views()
    with pytest.raises(error, match=text):
        OverlapMatcher()(student, teacher._replace(**change))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 0.0])
def test_bad_matrices_are_refused(bad):
    student, teacher = views()
    matrix = student.geometry.matrix.clone()
    matrix[1, 0, 0] = bad
    broken = student._replace(geometry=student.geometry._replace(matrix=matrix))
    with pytest.raises(GeometryError, match="student"):
        overlap_matches(broken, teacher)
    half = teacher.geometry._replace(matrix=teacher.geometry.matrix.bfloat16())
    with pytest.raises(GeometryError, match="half precision"):
        overlap_matches(student, teacher._replace(geometry=half))


@pytest.mark.parametrize("bad", ["polygon", None, 3])
def test_unknown_methods_are_refused(bad):
    with pytest.raises(ConfigError, match="method"):
        OverlapMatcher(method=bad)
    with pytest.raises(ConfigError, match="method"):
        overlap_matches(*views(), method=bad)


def test_the_module_is_the_function():
    matcher = OverlapMatcher(method="clip")
    assert repr(matcher) == "OverlapMatcher(method='clip')"
    plain = overlap_matches(*views(), method="clip")
    for copied in (matcher, copy.deepcopy(matcher), pickle.loads(pickle.dumps(matcher))):
        found = copied(*views())
        assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_everything_is_made_on_the_tokens_device(method):
    """The meta device holds no values, and refuses to work with the CPU's."""
    pair = [view._replace(geometry=view.geometry.to("meta")) for view in views()]
    for student, teacher in (pair, (pair[0], pair[1]._replace(grid=GRID._replace(rows=0)))):
        matches = overlap_matches(student, teacher, method=method)
        assert [part.device.type for part in matches] == ["meta"] * 3


@pytest.mark.parametrize("method", ["boxes", "clip"])
def test_cells_that_touch_by_rounding_do_not_match(method):
    # 1e-7 of a cell is what float32 leaves of two crops that meet at a line
    grid = TokenGrid.tiling(2, 3, (20, 30))
    one = from_box(torch.tensor([[0.0, 0, 30, 20]] * 2, dtype=torch.float64), (20, 30), (20, 60))
    for overlap, matched in ((1e-6, False), (1e-2, True)):
        box = torch.tensor([[30.0 - overlap, 0, 60, 20]] * 2, dtype=torch.float64)
        two = from_box(box, (20, 30), (20, 60))
        found = overlap_matches(Tokens(None, one, grid), Tokens(None, two, grid), method=method)
        assert bool(found.matched.any()) is matched

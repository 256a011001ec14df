"""Every teacher token within the radius, against plain loops over all pairs."""

import copy
import importlib
import math
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
    TeacherTargets,
    TokenGrid,
    Tokens,
    from_box,
    from_matrix,
)
from local_distill.errors import ConfigError
from local_distill.losses import local_distillation_loss
from local_distill.matching.radius import RadiusMatcher, radius_matches
from local_distill.testing import oracles

ANY_PAIR = st.one_of(
    view_pairs("crop", padding=12.0),
    view_pairs("turn"),
    similar_pairs(),
    view_pairs("warp", padding=5.0),
)
GRID = TokenGrid.tiling(3, 5, (24, 40))


def views(b=2, dtype=torch.float32):
    """Two overlapping views of b images."""
    sides = []
    for seed in (0, 1):
        geometry = random_geometry(b, seed=seed)
        geometry = geometry._replace(matrix=geometry.matrix.to(dtype))
        sides.append(Tokens(None, geometry, GRID))
    return sides


def check_against_oracle(student, teacher, matches, radius):
    s, t = student.grid.num_tokens, teacher.grid.num_tokens
    assert matches.weight.shape == (student.geometry.matrix.shape[0], s, t)
    assert torch.equal(matches.teacher_index, torch.arange(t).expand_as(matches.teacher_index))
    for image, table in enumerate(oracles.distances_in_cells(student, teacher)):
        for i, distances in enumerate(table):
            weights = matches.weight[image, i].tolist()
            cost = float(matches.cost[image, i])
            taken = []
            for weight, far in zip(weights, distances, strict=True):
                assert weight in (0.0, pytest.approx(1 / t, rel=1e-6))
                if far is None or far > radius + 1e-6:
                    assert weight == 0
                elif far < radius - 1e-6:
                    assert weight > 0
                if weight > 0:
                    taken.append(far)
            if taken:
                assert cost == pytest.approx(sum(taken) / len(taken), rel=1e-5, abs=1e-5)
            else:
                assert cost == math.inf
    assert torch.equal(matches.matched, matches.cost.isfinite())


@given(ANY_PAIR, st.sampled_from([0.2, 0.7, 3.0]))
def test_takes_the_tokens_that_loops_take(pair, radius):
    check_against_oracle(*pair, radius_matches(*pair, radius=radius), radius)


@given(view_pairs("crop", padding=12.0))
def test_a_larger_radius_only_adds(pair):
    few, more = (radius_matches(*pair, radius=radius).weight for radius in (0.5, 0.9))
    assert bool((more >= few).all())


@given(ANY_PAIR)
def test_exchange_of_student_and_teacher(pair):
    student, teacher = pair
    there, back = radius_matches(student, teacher), radius_matches(teacher, student)
    assert torch.equal(there.weight > 0, (back.weight > 0).mT)


def test_the_radius_is_excluded():
    # neighbours exactly one cell apart across both axes: one diagonal
    grid = TokenGrid.tiling(1, 1, (2, 2))
    one = from_box(torch.tensor([[0.0, 0, 2, 2]] * 2), (2, 2), (4, 4))
    two = from_box(torch.tensor([[2.0, 2, 4, 4]] * 2), (2, 2), (4, 4))
    pair = Tokens(None, one, grid), Tokens(None, two, grid)
    assert not radius_matches(*pair, radius=1.0).matched.any()
    assert radius_matches(*pair, radius=1.0001).matched.all()


def test_the_larger_cell_is_the_unit():
    # centres 3 px apart; diagonals √2·2 and √2·8: 1.06 of the smaller, 0.265 of the larger
    grid = TokenGrid.tiling(1, 1, (4, 4))
    small = from_box(torch.tensor([[0.0, 3, 2, 5]] * 2), (4, 4), (8, 8))
    large = from_box(torch.tensor([[0.0, 0, 8, 8]] * 2), (4, 4), (8, 8))
    for pair in ((small, large), (large, small)):
        matches = radius_matches(*(Tokens(None, part, grid) for part in pair), radius=0.3)
        assert matches.cost.flatten().tolist() == pytest.approx([3 / (8 * math.sqrt(2))] * 2)


@pytest.mark.parametrize("flip", [False, True])
def test_identical_views_match_themselves_and_their_neighbours(flip):
    geometry = from_box(torch.tensor([[0.0, 0, 40, 24]] * 2), (24, 40), (24, 40), hflip=flip)
    tokens = Tokens(None, geometry, GRID)
    # cells of 8 × 8: a side is 0.707 of the diagonal
    assert torch.equal(
        radius_matches(tokens, tokens).weight > 0, torch.eye(15).expand(2, 15, 15) > 0
    )
    neighbours = radius_matches(tokens, tokens, radius=0.71)
    assert (neighbours.weight[0] > 0).sum(-1).tolist() == [
        3,
        4,
        4,
        4,
        3,
        4,
        5,
        5,
        5,
        4,
        3,
        4,
        4,
        4,
        3,
    ]
    assert float(neighbours.cost[0, 0]) == pytest.approx(2 * math.sqrt(0.5) / 3)


def test_views_apart_have_no_match():
    one = from_box(torch.tensor([[0.0, 0, 40, 24]] * 2), (24, 40), (90, 90))
    two = from_box(torch.tensor([[50.0, 60, 90, 84]] * 2), (24, 40), (90, 90))
    matches = radius_matches(Tokens(None, one, GRID), Tokens(None, two, GRID))
    assert not matches.matched.any()
    assert bool(matches.cost.isinf().all())


def test_the_loss_by_image_is_the_mean_over_positive_pairs():
    student, teacher = views(3)
    generator = torch.Generator().manual_seed(0)
    logits, answers = torch.randn(2, 3, 15, 7, dtype=torch.float64, generator=generator)
    loss = local_distillation_loss(
        logits,
        TeacherTargets(answers, None, 0.5),
        radius_matches(student, teacher, radius=0.7),
        student_temp=0.3,
        normalize="image",
    )
    total = 0.0
    for image, tokens in enumerate(oracles.radius_neighbours(student, teacher, 0.7)):
        terms = []
        for i, found in enumerate(tokens):
            for j in found.weights:
                logs = oracles.log_softmax((logits[image, i] / 0.3).tolist())
                probs = oracles.softmax((answers[image, j] / 0.5).tolist())
                terms.append(-sum(p * q for p, q in zip(probs, logs, strict=True)))
        assert terms
        total += sum(terms) / len(terms)
    assert float(loss) == pytest.approx(total / 3, rel=1e-6)


@settings(max_examples=15)
@given(ANY_PAIR, st.sampled_from([1, 700, 5000]))
def test_blocks_do_not_change_a_number(pair, budget):
    whole = radius_matches(*pair)
    module = importlib.import_module("local_distill.kernels.byte_budget")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "byte_budget", lambda device: budget)
        blocks = radius_matches(*pair)
    assert all(torch.equal(a, b) for a, b in zip(whole, blocks, strict=True))


@pytest.mark.parametrize("side", [4096, 65535])
def test_large_sources_and_crops_of_one_pixel(side):
    # float64 geometry, as float32 cannot hold the cells of a crop of 1 px at 65,535 px
    boxes = [[side - 1.0, side - 1.0, side, side], [0.0, 0.0, side, side]]
    geometry = from_box(torch.tensor(boxes, dtype=torch.float64), (24, 24), (side, side))
    tokens = Tokens(None, geometry, TokenGrid.tiling(3, 3, (24, 24)))
    matches = radius_matches(tokens, tokens)
    assert torch.equal(matches.weight > 0, torch.eye(9).expand(2, 9, 9) > 0)
    assert float(matches.cost.max()) < 1e-6


def test_tokens_in_padding_never_match():
    grid = TokenGrid.tiling(2, 4, (20, 40))
    geometry = from_box(torch.tensor([[-20.0, 0, 20, 20]] * 2), (20, 40), (20, 40))
    tokens = Tokens(None, geometry, grid)
    matches = radius_matches(tokens, tokens, radius=50.0)
    valid = torch.tensor([False, False, True, True] * 2)
    assert torch.equal(matches.weight > 0, (valid[:, None] & valid).expand(2, 8, 8))


def test_empty_grids_and_batches():
    tokens, _ = views()
    none = tokens._replace(grid=GRID._replace(rows=0))
    assert radius_matches(tokens, none).weight.shape == (2, 15, 0)
    assert bool(radius_matches(tokens, none).cost.isinf().all())
    assert radius_matches(none, tokens).weight.shape == (2, 0, 15)
    empty = tokens._replace(geometry=CropGeometry(*(part[:0] for part in tokens.geometry)))
    assert radius_matches(empty, empty).weight.shape == (0, 15, 15)


@pytest.mark.parametrize("student", [torch.float32, torch.float64])
@pytest.mark.parametrize("teacher", [torch.float32, torch.float64])
def test_dtypes(student, teacher):
    one, two = views(dtype=student)[0], views(dtype=teacher)[1]
    for matches in (
        radius_matches(one, two),
        radius_matches(one, two._replace(grid=GRID._replace(rows=0))),
    ):
        assert matches.weight.dtype == matches.cost.dtype == torch.promote_types(student, teacher)
        assert matches.teacher_index.dtype == torch.int64


def test_no_gradient_no_change_any_layout():
    student, teacher = views()
    plain = radius_matches(student, teacher)
    learned = student.geometry.matrix.clone().requires_grad_()
    twisted = student.geometry.matrix.mT.contiguous().mT
    for matrix in (learned, twisted):
        before = matrix.detach().clone()
        tokens = student._replace(geometry=student.geometry._replace(matrix=matrix))
        found = radius_matches(tokens, teacher)
        assert not any(part.requires_grad for part in found)
        assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))
        assert torch.equal(matrix, before)
    with torch.inference_mode():
        inside = CropGeometry(*(part.clone() for part in student.geometry))
    found = radius_matches(student._replace(geometry=inside), teacher)
    assert torch.equal(found.weight, plain.weight)
    one = CropGeometry(*(part[:1].expand(2, *part.shape[1:]) for part in student.geometry))
    found = radius_matches(student._replace(geometry=one), teacher)
    assert torch.equal(found.weight[0], plain.weight[0])


def test_features_are_not_looked_at():
    student, teacher = views()
    plain = radius_matches(student, teacher)
    bad = torch.full((2, 15, 4), torch.nan)
    found = radius_matches(student._replace(features=bad.half()), teacher._replace(features=bad))
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))


def test_a_bad_image_that_cannot_be_seen_stays_unmatched():
    matrix = torch.eye(3).repeat(3, 1, 1)
    matrix[1, 0, 0] = torch.nan
    matrix[2] = 0.0
    size = torch.tensor([[24, 40]] * 3, dtype=torch.int32)
    tokens = Tokens(None, CropGeometry(matrix, size, size), GRID)
    good = Tokens(None, CropGeometry(torch.eye(3).repeat(3, 1, 1), size, size), GRID)
    compiled = torch.compile(radius_matches, fullgraph=True, backend="eager")
    for pair in ((tokens, good), (good, tokens), (tokens, tokens)):
        matches = compiled(*pair)
        assert matches.matched.all(1).tolist() == [True, False, False]
        assert matches.matched.any(1).tolist() == [True, False, False]
        assert not any(part.isnan().any() for part in matches)


def test_vmap():
    geometry, other = (
        CropGeometry(*(torch.stack([p, p.flip(0)]) for p in random_geometry(3, seed=seed)))
        for seed in (0, 1)
    )
    found = torch.vmap(lambda a, b: radius_matches(Tokens(None, a, GRID), Tokens(None, b, GRID)))(
        geometry, other
    )
    for i in range(2):
        a, b = (CropGeometry(*(p[i] for p in part)) for part in (geometry, other))
        plain = radius_matches(Tokens(None, a, GRID), Tokens(None, b, GRID))
        assert all(torch.equal(x[i], y) for x, y in zip(found, plain, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"geometry": None}, ShapeError, "`teacher` has no geometry, which the radius matcher"),
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
        RadiusMatcher()(student, teacher._replace(**change))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 0.0])
def test_bad_matrices_are_refused(bad):
    student, teacher = views()
    matrix = student.geometry.matrix.clone()
    matrix[1, 0, 0] = bad
    broken = student._replace(geometry=student.geometry._replace(matrix=matrix))
    with pytest.raises(GeometryError, match="student"):
        radius_matches(broken, teacher)
    half = teacher.geometry._replace(matrix=teacher.geometry.matrix.bfloat16())
    with pytest.raises(GeometryError, match="half precision"):
        radius_matches(student, teacher._replace(geometry=half))


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf, "near", None])
def test_bad_radii_are_refused(bad):
    with pytest.raises(ConfigError, match="radius"):
        RadiusMatcher(radius=bad)
    with pytest.raises(ConfigError, match="radius"):
        radius_matches(*views(), radius=bad)


def test_the_module_is_the_function():
    matcher = RadiusMatcher(radius=0.4)
    assert repr(matcher) == "RadiusMatcher(radius=0.4)"
    plain = radius_matches(*views(), radius=0.4)
    for copied in (matcher, copy.deepcopy(matcher), pickle.loads(pickle.dumps(matcher))):
        found = copied(*views())
        assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))


def test_tokens_beyond_the_horizon_never_match():
    # the view's right half lies behind the camera
    matrix = torch.tensor([[1.0, 0, 0], [0, 1, 0], [-0.04, 0, 1]]).repeat(2, 1, 1)
    geometry = from_matrix(matrix, (24, 40), (200, 400))
    tokens = Tokens(None, geometry, GRID)
    matches = radius_matches(tokens, tokens, radius=100.0)
    assert matches.matched[0].tolist() == [True, True, True, False, False] * 3


def test_everything_is_made_on_the_tokens_device():
    """The meta device holds no values, and refuses to work with the CPU's."""
    pair = [view._replace(geometry=view.geometry.to("meta")) for view in views()]
    for student, teacher in (pair, (pair[0], pair[1]._replace(grid=GRID._replace(rows=0)))):
        matches = radius_matches(student, teacher)
        assert [part.device.type for part in matches] == ["meta"] * 3

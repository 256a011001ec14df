"""The oracles against closed forms, and against torch in float64; they share no maths with us."""

import ast
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from local_distill import ConfigError, Matches, ShapeError, TokenGrid, Tokens, from_box
from local_distill.testing import matches, oracles, view_pairs


@given(view_pairs("warp", max_side=3))
def test_token_centers_are_the_homographys_points(pair):
    for tokens in pair:
        geometry, grid = tokens.geometry, tokens.grid
        for image in range(len(geometry.matrix)):
            place = grid.offset[0] + grid.stride[0], grid.offset[1] + 2 * grid.stride[1], 1.0
            point = geometry.matrix[image].double() @ torch.tensor(place, dtype=torch.float64)
            found = oracles.token_center(geometry, grid, image, row=2, col=1)
            if point[2] > 0:
                assert found == pytest.approx((point[:2] / point[2]).tolist(), rel=1e-12)
            else:
                assert all(map(math.isnan, found))


def test_cell_diagonals_of_crops_are_those_of_their_cells():
    boxes = torch.tensor([[3.0, 5.0, 3.0 + 48, 5.0 + 18], [0.0, 0.0, 15.0, 24.0]])
    crop = from_box(boxes, (32, 64), (60, 70), hflip=torch.tensor([True, False]))
    grid = TokenGrid.tiling(3, 4, (32, 64))
    assert oracles.cell_diagonal(crop, grid, 0, 1, 2) == pytest.approx(math.hypot(12, 6))
    assert oracles.cell_diagonal(crop, grid, 1, 0, 0) == pytest.approx(math.hypot(3.75, 8))


@given(view_pairs("similar", max_side=4))
def test_nearest_is_the_least_of_all_distances(pair):
    student, teacher = pair
    found = oracles.nearest_teacher_tokens(student, teacher)
    for image in range(len(found)):
        places = []
        for tokens in pair:
            n = tokens.grid.num_tokens
            cells = [divmod(i, tokens.grid.cols) for i in range(n)]
            points = [oracles.token_center(tokens.geometry, tokens.grid, image, *p) for p in cells]
            places.append(torch.tensor(points, dtype=torch.float64))
        size = student.geometry.source_size[image].flip(0)
        inside = [((p >= 0) & (p <= size)).all(-1) for p in places]
        distances = torch.cdist(
            places[0], places[1][inside[1]], compute_mode="donot_use_mm_for_euclid_dist"
        )
        for i, nearest in enumerate(found[image]):
            if not bool(inside[0][i]) or not bool(inside[1].any()):
                assert nearest is None
            else:
                assert nearest.pixels == pytest.approx(float(distances[i].min()), abs=1e-9)
                assert nearest.cells >= 0


def test_nearest_in_cells_is_by_the_larger_diagonal():
    crop = from_box([[0.0, 0.0, 8.0, 6.0]], (16, 16), (20, 30))
    coarse = Tokens(None, crop, TokenGrid.tiling(1, 1, (16, 16)))
    fine = Tokens(None, crop, TokenGrid.tiling(2, 2, (16, 16)))
    for student, teacher in ((coarse, fine), (fine, coarse)):
        first = oracles.nearest_teacher_tokens(student, teacher)[0][0]
        assert first.pixels == pytest.approx(2.5)
        assert first.cells == pytest.approx(0.25)  # of the coarse cell's diagonal, 10
    far = from_box([[25.0, 15.0, 40.0, 30.0]], (16, 16), (20, 30))
    outside = Tokens(None, far, TokenGrid.tiling(1, 1, (16, 16)))
    assert oracles.nearest_teacher_tokens(outside, fine) == [[None]]
    assert oracles.nearest_teacher_tokens(fine, outside) == [[None] * 4]
    with pytest.raises(ShapeError, match="geometry"):
        oracles.nearest_teacher_tokens(Tokens(torch.zeros(1, 2, 3)), fine)


@given(st.lists(st.floats(-800, 800), min_size=1, max_size=6))
def test_softmaxes_are_torchs(row):
    wanted = torch.tensor(row, dtype=torch.float64)
    assert oracles.softmax(row) == pytest.approx(wanted.softmax(0).tolist(), abs=1e-14)
    assert oracles.log_softmax(row) == pytest.approx(wanted.log_softmax(0).tolist(), rel=1e-12)


@given(st.data(), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(0, 99))
def test_token_cross_entropies_are_torchs(data, s, t, c, seed):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (
        torch.randn(2, n, c, generator=generator, dtype=torch.float64) for n in (s, t)
    )
    center = torch.randn(c, generator=generator, dtype=torch.float64)
    found = data.draw(matches(2, s, t))
    weight = found.weight.double()
    losses, masses = oracles.token_cross_entropies(
        student, teacher, found.teacher_index, weight, center.tolist(), 0.2, 0.07
    )
    probs = ((teacher - center) / 0.07).softmax(-1)
    logs = (student / 0.2).log_softmax(-1)
    table = torch.zeros(2, s, t, dtype=torch.float64).scatter_add(2, found.teacher_index, weight)
    torch.testing.assert_close(
        torch.tensor(losses, dtype=torch.float64), -(table @ probs * logs).sum(-1)
    )
    torch.testing.assert_close(torch.tensor(masses, dtype=torch.float64), table.sum(-1))


def test_normalized_loss_of_hand_made_tables():
    losses, masses = [[2.0, 0.0], [1.0, 3.0], [0.0, 0.0]], [[1.0, 0.0], [0.5, 0.5], [0.0, 0.0]]
    assert oracles.normalized_loss(losses, masses, "all") == pytest.approx(1.0)
    assert oracles.normalized_loss(losses, masses, "matched") == pytest.approx(3.0)
    assert oracles.normalized_loss(losses, masses, "image") == pytest.approx((2 + 4 + 0) / 3)
    for kind in ("all", "matched", "image"):
        assert oracles.normalized_loss([[0.0]], [[0.0]], kind) == 0
        assert oracles.normalized_loss([], [], kind) == 0
    with pytest.raises(ConfigError, match="mean"):
        oracles.normalized_loss([], [], "mean")


def test_local_loss_is_the_mean_over_pairs():
    one = Matches.identity(torch.tensor([[True, True], [True, False]]))
    none = Matches.identity(torch.zeros(2, 2, dtype=torch.bool))
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 2, 2, 3, generator=generator, dtype=torch.float64)
    settings = {"center": [0.1, 0.2, -0.3], "student_temp": 0.1, "teacher_temp": 0.05}
    single = oracles.local_loss([student], [teacher], {(0, 0): one}, **settings)
    both = oracles.local_loss(
        [student, student], [teacher], {(0, 0): one, (1, 0): none}, **settings
    )
    probs = ((teacher - torch.tensor(settings["center"], dtype=torch.float64)) / 0.05).softmax(-1)
    rows = -(probs * (student / 0.1).log_softmax(-1)).sum(-1)
    assert single == pytest.approx(float((rows[0, 0] + rows[0, 1] + rows[1, 0]) / 3))
    assert both == pytest.approx(single / 2)
    assert oracles.local_loss([], [], {}, **settings) == 0
    with pytest.raises(ConfigError, match="None"):
        oracles.local_loss([None], [teacher], {(0, 0): one}, **settings)


def test_centers_move_by_the_mean_of_all_rows():
    views = [torch.tensor([[1.0, 0.0], [3.0, 2.0]]), torch.tensor([[[8.0, 1.0]]])]
    assert oracles.moved_center([2.0, 1.0], views, 0.5) == pytest.approx([3.0, 1.0])
    assert oracles.moved_center([2.0, 1.0], [views[0][:0]], 0.5) == [2.0, 1.0]
    probs = oracles.centered_probs([1.0, 2.0], [0.5, 1.5], 0.1)
    assert probs == pytest.approx([0.5, 0.5])
    assert oracles.centered_probs([1.0, 0.0], [0.0, 0.0], 1.0)[0] == pytest.approx(
        math.e / (1 + math.e)
    )


def test_oracles_share_nothing_with_the_packages_maths():
    folder = Path(oracles.__file__).parent
    allowed = ("local_distill.errors", "local_distill.structures", "local_distill.testing.oracles")
    files = sorted(folder.glob("*.py"))
    assert len(files) >= 5
    for path in files:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("local_distill"):
                assert node.module.startswith(allowed), (path.name, node.module)

"""The matchers' oracles against closed forms, torch, scipy and the counting of points."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from local_distill import (
    ConfigError,
    Matches,
    ShapeError,
    TokenGrid,
    Tokens,
    from_box,
    from_matrix,
)
from local_distill.testing import matches, oracles

SEEDS = st.integers(0, 9999)


def crops(seed, padding=6.0):
    """Two crops of each of two images, with what is known of them without any geometry."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(2, 2, 2, generator=generator, dtype=torch.float64) * 20 - padding
    side = 4 + torch.rand(2, 2, 2, generator=generator, dtype=torch.float64) * 26
    views = []
    for k, (rows, cols) in enumerate(torch.randint(1, 4, (2, 2), generator=generator).tolist()):
        crop = from_box(torch.cat((low[k], low[k] + side[k]), 1), (24, 40), (30, 36))
        steps = side[k] / torch.tensor([cols, rows])
        place = torch.tensor([[c + 0.5, r + 0.5] for r in range(rows) for c in range(cols)])
        centers = low[k][:, None] + steps[:, None] * place
        inside = ((centers >= 0) & (centers <= torch.tensor([36.0, 30.0]))).all(-1)
        tokens = Tokens(None, crop, TokenGrid.tiling(rows, cols, (24, 40)))
        views.append((tokens, centers, steps, inside))
    return views


def known_distances(one, two):
    """(2, s, t) in larger cell diagonals, inf where either is outside."""
    (_, p, p_steps, p_inside), (_, q, q_steps, q_inside) = one, two
    far = (p[:, :, None] - q[:, None]).norm(dim=-1)
    unit = torch.maximum(p_steps.norm(dim=-1), q_steps.norm(dim=-1))[:, None, None]
    return torch.where(p_inside[:, :, None] & q_inside[:, None], far / unit, torch.inf)


def turned(seed):
    """Two warped views of two images, all of them inside."""
    generator = torch.Generator().manual_seed(seed)
    views = []
    for rows, cols in ((2, 3), (3, 2)):
        angle, x, y, bend = torch.rand(4, 2, generator=generator, dtype=torch.float64).unbind(0)
        c, s = (0.8 * angle).cos(), (0.8 * angle).sin()
        one = torch.ones_like(c)
        rows_of = [c, -s, 18 + 6 * x], [s, c, 10 + 6 * y], [0.01 * bend, -0.008 * bend, one]
        matrix = torch.stack([torch.stack(row, -1) for row in rows_of], 1)
        geometry = from_matrix(matrix, (20, 24), (60, 70))
        views.append(Tokens(None, geometry, TokenGrid.tiling(rows, cols, (20, 24))))
    return views


def featured(seed, b=2, s=5, t=4, d=3):
    generator = torch.Generator().manual_seed(seed)
    f, g = (torch.randn(b, n, d, generator=generator, dtype=torch.float64) for n in (s, t))
    return Tokens(f), Tokens(g)


def filled(table, missing=math.inf):
    """A nest of lists as a tensor, None replaced."""
    return torch.tensor(
        [[[missing if v is None else v for v in row] for row in image] for image in table],
        dtype=torch.float64,
    )


def rows_of(found, t):
    return torch.tensor([[x.row(t) for x in image] for image in found], dtype=torch.float64)


def costs_of(found):
    return torch.tensor([[x.cost for x in image] for image in found], dtype=torch.float64)


@given(SEEDS)
def test_places_of_crops(seed):
    for tokens, centers, steps, inside in crops(seed):
        for image in range(2):
            places = oracles.token_places(tokens, image)
            found = torch.tensor([place.center for place in places], dtype=torch.float64)
            torch.testing.assert_close(found, centers[image], rtol=1e-9, atol=1e-9)
            assert [place.inside for place in places] == inside[image].tolist()
            diagonal = float(steps[image].norm())
            assert [place.diagonal for place in places] == pytest.approx([diagonal] * len(places))


@given(SEEDS, st.sampled_from([0.3, 0.8, 2.0]))
def test_distances_and_what_is_within_a_radius(seed, radius):
    one, two = crops(seed)
    wanted = known_distances(one, two)
    torch.testing.assert_close(filled(oracles.distances_in_cells(one[0], two[0])), wanted)
    found = oracles.radius_neighbours(one[0], two[0], radius)
    near = wanted < radius
    torch.testing.assert_close(rows_of(found, near.shape[2]), near.double() / near.shape[2])
    mean = torch.where(near, wanted, 0.0).sum(-1) / near.sum(-1)
    torch.testing.assert_close(costs_of(found), mean.nan_to_num(torch.inf))


def test_a_radius_is_excluded():
    crop = from_box([[0.0, 0.0, 6.0, 8.0]], (8, 6), (8, 6))  # cells of 3 × 4
    tokens = Tokens(None, crop, TokenGrid.tiling(2, 2, (8, 6)))
    for radius, count in ((0.6, 1), (0.601, 2), (0.8, 2), (0.801, 3), (1.0, 3), (1.001, 4)):
        found = oracles.radius_neighbours(tokens, tokens, radius)[0]
        assert [len(x.weights) for x in found] == [count] * 4
    exactly = oracles.distances_in_cells(tokens, tokens)[0][0][1]
    assert 1 not in oracles.radius_neighbours(tokens, tokens, exactly)[0][0].weights
    likeness = torch.tensor([[[-1.0], [1.0], [1.0], [1.0]]])
    one, two = (tokens._replace(features=x) for x in (torch.ones(1, 4, 1), likeness))
    assert oracles.gated_tokens(one, two, exactly)[0][0].weights == {0: 1.0}
    assert oracles.gated_tokens(one, two, math.nextafter(exactly, 1.0))[0][0].weights == {1: 1.0}


@given(SEEDS)
def test_bilinear_corners_of_crops_read_as_grid_sample(seed):
    one, two = crops(seed, padding=0.0)
    student, teacher = one[0], two[0]
    rows, cols = teacher.grid.rows, teacher.grid.cols
    pictures = torch.eye(rows * cols, dtype=torch.float64).reshape(1, -1, rows, cols)
    first = two[1][:, 0] - two[2] / 2  # the top left corner
    share = (one[1] - first[:, None]) / (two[2] * torch.tensor([cols, rows]))[:, None]
    read = torch.nn.functional.grid_sample(
        pictures.expand(2, -1, -1, -1), 2 * share[:, None] - 1, align_corners=False
    )[:, :, 0].mT
    read = read * one[3][:, :, None] * two[3][:, None]
    found = oracles.bilinear_corners(student, teacher)
    weights = rows_of(found, rows * cols)
    torch.testing.assert_close(weights, read, rtol=0, atol=1e-9)
    mean = (weights * known_distances(one, two).nan_to_num(posinf=0.0)).sum(-1) / weights.sum(-1)
    torch.testing.assert_close(costs_of(found), mean.nan_to_num(torch.inf))


def test_bilinear_corners_of_warped_views_mean_the_students_place():
    whole = 0
    for seed in range(20):
        student, teacher = turned(seed)
        (x_step, y_step), (x_first, y_first) = teacher.grid.stride, teacher.grid.offset
        for image, tokens in enumerate(oracles.bilinear_corners(student, teacher)):
            back = torch.linalg.inv(teacher.geometry.matrix[image])
            for found, place in zip(tokens, oracles.token_places(student, image), strict=True):
                u, v, w = (back @ torch.tensor([*place.center, 1.0], dtype=torch.float64)).tolist()
                col, row = (u / w - x_first) / x_step, (v / w - y_first) / y_step
                if not (0 <= col <= teacher.grid.cols - 1 and 0 <= row <= teacher.grid.rows - 1):
                    assert sum(found.weights.values()) < 1
                    continue
                whole += 1
                parts = [(w, *divmod(j, teacher.grid.cols)) for j, w in found.weights.items()]
                assert sum(w for w, _, _ in parts) == pytest.approx(1)
                assert sum(w * r for w, r, _ in parts) == pytest.approx(row, abs=1e-9)
                assert sum(w * c for w, _, c in parts) == pytest.approx(col, abs=1e-9)
    assert whole > 20


@given(SEEDS)
def test_overlaps_of_crops_are_products_of_intervals(seed):
    one, two = crops(seed)
    (p, p_step), (q, q_step) = ((x[1][:, :, None], x[2][:, None, None]) for x in (one, two))
    q = q.transpose(1, 2)
    high = torch.minimum(p + p_step / 2, q + q_step / 2)
    low = torch.maximum(p - p_step / 2, q - q_step / 2)
    wanted = ((high - low).clamp_min(0) / p_step).prod(-1) * one[3][:, :, None] * two[3][:, None]
    found = oracles.cell_overlaps(one[0], two[0])
    torch.testing.assert_close(rows_of(found, two[1].shape[1]), wanted, rtol=0, atol=1e-9)
    costs, left = costs_of(found), 1 - wanted.sum(-1)
    matched = costs.isfinite()
    torch.testing.assert_close(costs[matched], left[matched], rtol=0, atol=1e-9)
    assert float(wanted[~matched].sum()) < 1e-9


@pytest.mark.parametrize("seed", range(3))
def test_overlaps_of_warped_views_by_counting_points(seed):
    student, teacher = turned(seed)
    found = rows_of(oracles.cell_overlaps(student, teacher), 6)
    step = 0.1
    xs, ys = torch.arange(step / 2, 70, step), torch.arange(step / 2, 60, step)
    x, y = (axis.flatten().double() for axis in torch.meshgrid(xs, ys, indexing="xy"))
    points = torch.stack((x, y, torch.ones_like(x)))
    for image in range(2):
        cells = []
        for tokens in (student, teacher):
            u, v, w = torch.linalg.inv(tokens.geometry.matrix[image]) @ points
            stride, cols = tokens.grid.stride, tokens.grid.cols
            col, row = (u / w / stride[0]).floor(), (v / w / stride[1]).floor()
            seen = (col >= 0) & (col < cols) & (row >= 0) & (row < tokens.grid.rows) & (w > 0)
            cells.append(torch.where(seen, row * cols + col, -1))
        for i, j in itertools.product(range(6), range(6)):
            own = cells[0] == i
            share = float((own & (cells[1] == j)).sum() / own.sum())
            assert float(found[image, i, j]) == pytest.approx(share, abs=0.01)
    assert bool((found.sum(-1) > 0.9).any())


def test_cells_at_the_horizon_and_in_the_padding_have_no_overlap():
    matrix = torch.tensor([[[1.0, 0, 0], [0, 1, 0], [-1 / 30, 0, 1]]])  # the horizon at x = 30
    bent = Tokens(None, from_matrix(matrix, (8, 40), (90, 900)), TokenGrid.tiling(1, 5, (8, 40)))
    whole = Tokens(
        None, from_box([[0.0, 0, 900, 90]], (90, 900), (90, 900)), TokenGrid.tiling(1, 1, (90, 900))
    )
    assert [bool(x.weights) for x in oracles.cell_overlaps(bent, whole)[0]] == [True] * 3 + [
        False
    ] * 2
    assert set(oracles.cell_overlaps(whole, bent)[0][0].weights) == {0, 1, 2}
    assert oracles.cell_overlaps(bent, whole)[0][4] == oracles.TokenMatch({}, math.inf)


def test_covered_shares_by_hand():
    square = [(0.0, 0.0), (2.0, 0.0), (2.0, 2.0), (0.0, 2.0)]
    diamond = [(1.0, 0.0), (2.0, 1.0), (1.0, 2.0), (0.0, 1.0)]
    triangle = [(0.0, 0.0), (2.0, 0.0), (0.0, 1.0)]
    for one, two, share in (
        (square, diamond, 0.5),
        (diamond, square, 1.0),
        (triangle, square, 1.0),
        (square, triangle, 0.25),
        (square, [(x + 1.5, y) for x, y in square], 0.25),
        (square, [(x + 5, y) for x, y in square], 0.0),
        (square, [(x + 2, y) for x, y in square], 0.0),
    ):
        for a, b in itertools.product((one, one[::-1]), (two, two[::-1])):
            assert oracles.covered_share(a, b) == pytest.approx(share)


@given(SEEDS)
def test_feature_costs_are_torchs(seed):
    student, teacher = featured(seed)
    f, g = student.features, teacher.features
    cosine = torch.nn.functional.cosine_similarity(f[:, :, None], g[:, None], dim=-1)
    torch.testing.assert_close(filled(oracles.feature_costs(student, teacher)), 1 - cosine)
    distance = (f[:, :, None] - g[:, None]).square().sum(-1).sqrt()
    torch.testing.assert_close(filled(oracles.feature_costs(student, teacher, "l2")), distance)
    best = oracles.most_similar_tokens(student, teacher)
    least = (1 - cosine).min(-1)
    assert [[list(x.weights.items()) for x in image] for image in best] == [
        [[(j, 1.0)] for j in image] for image in least.indices.tolist()
    ]
    torch.testing.assert_close(costs_of(best), least.values)


@given(SEEDS, st.sampled_from([1e-4, 0.05, 1.0]))
def test_soft_similarities_are_torchs(seed, temperature):
    student, teacher = featured(seed)
    f, g = student.features, teacher.features
    cosine = torch.nn.functional.cosine_similarity(f[:, :, None], g[:, None], dim=-1)
    found = oracles.soft_similarities(student, teacher, temperature)
    weights = (cosine / temperature).softmax(-1)
    torch.testing.assert_close(rows_of(found, 4), weights, rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(costs_of(found), (weights * (1 - cosine)).sum(-1), rtol=1e-6, atol=0)


def test_tokens_that_take_no_part_in_similarity():
    f = torch.tensor([[[1.0, 0.0], [0.0, 0.0], [math.nan, 1.0], [1.0, 1.0]]]).double()
    g = torch.tensor([[[1.0, math.inf], [0.0, 2.0], [0.0, 0.0], [0.0, 1.0]]]).double()
    crop = from_box([[0.0, 0, 40, 10]], (10, 40), (10, 39))
    half_out = from_box([[-10.0, 0, 30, 10]], (10, 40), (10, 39))
    grid = TokenGrid.tiling(1, 4, (10, 40))
    nothing = oracles.TokenMatch({}, math.inf)
    assert oracles.most_similar_tokens(Tokens(f), Tokens(g))[0][1:3] == [nothing] * 2
    first, *_, last = oracles.most_similar_tokens(Tokens(f), Tokens(g))[0]
    assert first == oracles.TokenMatch({1: 1.0}, 1.0)  # 1 and 3 are alike: the first of them
    assert list(last.weights) == [1]
    squared = oracles.most_similar_tokens(Tokens(f), Tokens(g), "l2")[0]
    assert squared[1:3] == [oracles.TokenMatch({2: 1.0}, 0.0), nothing]
    assert [row[0] for row in oracles.feature_costs(Tokens(f), Tokens(g), "l2")[0]] == [None] * 4
    found = oracles.soft_similarities(Tokens(f), Tokens(g), 0.1)[0]
    assert [list(x.weights) for x in found] == [[1, 3], [], [], [1, 3]]
    placed = oracles.soft_similarities(Tokens(f, half_out, grid), Tokens(g, crop, grid), 0.1)[0]
    assert placed[0] == nothing  # outside
    assert [list(x.weights) for x in placed[1:]] == [[], [], [1, 3]]


@given(SEEDS, st.sampled_from([0.4, 1.0, 1e6]), st.sampled_from(["cosine", "l2"]))
def test_gated_tokens_are_the_best_of_those_in_reach(seed, radius, metric):
    one, two = crops(seed)
    s, t = one[1].shape[1], two[1].shape[1]
    features = featured(seed, s=s, t=t)
    student, teacher = (
        view[0]._replace(features=x.features) for view, x in zip((one, two), features, strict=True)
    )
    f, g = student.features[:, :, None], teacher.features[:, None]
    if metric == "cosine":
        costs = 1 - torch.nn.functional.cosine_similarity(f, g, dim=-1)
    else:
        costs = (f - g).square().sum(-1).sqrt()
    costs = torch.where(known_distances(one, two) < radius, costs, torch.inf)
    found = oracles.gated_tokens(student, teacher, radius, metric)
    least = costs.min(-1)
    torch.testing.assert_close(costs_of(found), least.values)
    for image, i in itertools.product(range(2), range(s)):
        matched = math.isfinite(float(least.values[image, i]))
        wanted = {int(least.indices[image, i]): 1.0} if matched else {}
        assert found[image][i].weights == wanted


@given(SEEDS)
def test_mutual_weights_are_where_both_tables_have_weight(seed):
    generator = torch.Generator().manual_seed(seed)
    one, two = (
        Matches(
            torch.randint(0, t, (2, s, k), generator=generator),
            torch.rand(2, s, k, generator=generator)
            * (torch.rand(2, s, k, generator=generator) > 0.3),
            torch.zeros(2, s),
        )
        for s, t, k in ((5, 4, 2), (4, 5, 3))
    )
    table = torch.zeros(2, 4, 5).scatter_add(2, two.teacher_index, two.weight)
    returned = table.mT.gather(2, one.teacher_index) > 0
    found = torch.tensor(oracles.mutual_weights(one, two))
    assert torch.equal(found, torch.where(returned, one.weight, 0.0))


@given(st.data(), st.integers(1, 9))
def test_kept_tokens_are_the_first_of_a_stable_sort(data, count):
    found = data.draw(matches(2, 7, 3))
    found = found._replace(cost=(found.cost * 3).floor())  # ties
    order = found.cost.argsort(dim=1, stable=True)
    for image, kept in enumerate(oracles.kept_tokens(found, count=count)):
        assert kept == order[image, : min(count, int(found.matched[image].sum()))].tolist()


def test_kept_parts_are_exact_and_rounded_up():
    all_of_them = Matches.identity(torch.ones(1, 100))
    for percent in range(1, 101):
        assert len(oracles.kept_tokens(all_of_them, fraction=percent / 100)[0]) == percent
    matched = Matches.identity(torch.tensor([[1, 0, 1, 1, 1]]))._replace(
        cost=torch.tensor([[math.nan, 0.0, 2.0, math.inf, 1.0]])
    )
    assert oracles.kept_tokens(matched, fraction=0.01) == [[4]]
    assert oracles.kept_tokens(matched, count=9) == [[4, 2]]
    for setting in ({}, {"count": 1, "fraction": 0.5}):
        with pytest.raises(ConfigError, match="exactly one"):
            oracles.kept_tokens(matched, **setting)


def test_what_is_missing_is_named():
    bare, crop = Tokens(), from_box([[0.0, 0, 8, 8]], (8, 8), (8, 8))
    place = Tokens(None, crop, TokenGrid.tiling(2, 2, (8, 8)))
    features = Tokens(torch.ones(1, 4, 2))
    for matcher in (
        oracles.cell_overlaps,
        oracles.bilinear_corners,
        oracles.distances_in_cells,
        lambda a, b: oracles.transport_plan(a, b, epsilon=1.0, iterations=1, distance_weight=1.0),
    ):
        with pytest.raises(ShapeError, match="geometry"):
            matcher(features, features)
    for pair in ((bare, features), (features, bare), (place, features)):
        with pytest.raises(ShapeError, match="features"):
            oracles.feature_costs(*pair)
    with pytest.raises(ConfigError, match="l1"):
        oracles.feature_costs(features, features, "l1")

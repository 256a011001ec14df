import copy
import math
import pickle

import pytest
import torch
from helpers.strategies import random_geometry, view_pairs
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from local_distill import CropGeometry, ShapeError, TokenGrid, Tokens, from_box
from local_distill.errors import ConfigError, GeometryError
from local_distill.kernels import block_length
from local_distill.matching.sinkhorn import SinkhornMatcher, sinkhorn_matches
from local_distill.testing import oracles


def check(student, teacher, matches, epsilon, iterations, distance_weight, tolerance):
    plans = oracles.transport_plan(
        student,
        teacher,
        epsilon=epsilon,
        iterations=iterations,
        distance_weight=distance_weight,
    )
    t = teacher.features.shape[1]
    for image, tokens in enumerate(plans):
        wanted = torch.tensor([token.row(t) for token in tokens], dtype=torch.float64)
        found = torch.zeros_like(wanted)
        found.scatter_add_(1, matches.teacher_index[image], matches.weight[image].double())
        torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)
        for cost, token in zip(matches.cost[image].tolist(), tokens, strict=True):
            assert cost == pytest.approx(token.cost, abs=tolerance)


@given(
    st.integers(2, 3), st.integers(1, 6), st.integers(1, 6), st.integers(1, 4),
    st.sampled_from([0.02, 0.05, 0.3]), st.integers(1, 12),
    st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    st.integers(0, 9999),
)  # fmt: skip
def test_is_the_transport_plan_of_loops(b, s, t, d, epsilon, iterations, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    student = Tokens(torch.randn(b, s, d, generator=g).to(dtype))
    teacher = Tokens(torch.randn(b, t, d, generator=g).to(dtype))
    matches = sinkhorn_matches(student, teacher, epsilon=epsilon, iterations=iterations)
    wide = torch.promote_types(dtype, torch.float32)
    assert matches.weight.dtype == matches.cost.dtype == wide
    assert matches.weight.shape == matches.teacher_index.shape == (b, s, t)
    check(student, teacher, matches, epsilon, iterations, 0.0, 1e-9 if wide.itemsize == 8 else 1e-4)


@given(view_pairs(padding=12.0), st.sampled_from([0.1, 1.0]), st.integers(0, 99))
def test_distances_in_cells_are_part_of_the_cost(pair, weight, seed):
    g = torch.Generator().manual_seed(seed)
    student, teacher = (
        view._replace(
            features=torch.randn(
                view.geometry.matrix.shape[0], view.grid.num_tokens, 3, generator=g
            )
        )
        for view in pair
    )
    matches = sinkhorn_matches(student, teacher, epsilon=0.5, iterations=4, distance_weight=weight)
    check(student, teacher, matches, 0.5, 4, weight, 2e-3)


def test_in_the_long_run_no_teacher_token_answers_more_than_its_share():
    g = torch.Generator().manual_seed(0)
    f, h = torch.randn(2, 6, 4, generator=g), torch.randn(2, 9, 4, generator=g)
    h[:, :3] = f[:, :1]  # three copies that all would choose
    f[0, 2], h[1, 5] = torch.nan, 0.0
    matches = sinkhorn_matches(Tokens(f), Tokens(h), epsilon=0.1, iterations=500)
    share = matches.weight.sum(1)
    assert share[0].tolist() == pytest.approx([5 / 9] * 9, rel=1e-4)
    assert share[1].tolist() == pytest.approx(
        [6 / 8 if j != 5 else 0.0 for j in range(9)], rel=1e-4
    )
    assert matches.mass[0].tolist() == pytest.approx([1, 1, 0, 1, 1, 1])


def test_small_epsilon_finds_the_permutation():
    g = torch.Generator().manual_seed(3)
    f = torch.randn(2, 12, 16, generator=g)
    order = torch.randperm(12, generator=g)
    near = f[:, order] + 0.05 * torch.randn(2, 12, 16, generator=g)
    for epsilon in (0.05, 1e-3, 1e-5):
        matches = sinkhorn_matches(Tokens(near), Tokens(f), epsilon=epsilon, iterations=20)
        assert torch.equal(matches.weight.argmax(-1), order.expand(2, 12))
        assert matches.weight.isfinite().all()
        assert float(matches.weight.amax(-1).min()) > 0.99


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_bad_token_is_as_if_it_were_not_there(bad, side):
    g = torch.Generator().manual_seed(1)
    f, h = torch.randn(2, 4, 3, generator=g), torch.randn(2, 5, 3, generator=g)
    dirty = {"student": f.clone(), "teacher": h.clone()}
    dirty[side][0, 1] = bad
    found = sinkhorn_matches(Tokens(dirty["student"]), Tokens(dirty["teacher"]))
    whole = sinkhorn_matches(Tokens(f), Tokens(h))
    assert torch.equal(found.weight[1], whole.weight[1])  # the other image
    kept = [i for i in range(dirty[side].shape[1]) if i != 1]
    without = {"student": f[:1], "teacher": h[:1]}
    without[side] = without[side][:, kept]
    alone = sinkhorn_matches(Tokens(without["student"]), Tokens(without["teacher"]))
    weight = found.weight[0][kept] if side == "student" else found.weight[0][:, kept]
    torch.testing.assert_close(weight, alone.weight[0])
    if side == "student":
        assert not found.matched[0, 1]
        assert float(found.cost[0, 1]) == math.inf
    else:
        assert float(found.weight[0, :, 1].abs().max()) == 0


def test_nothing_valid_on_one_side_leaves_the_image_unmatched():
    f, h = torch.randn(2, 4, 3), torch.randn(2, 5, 3)
    f[0] = torch.nan
    h[1] = 0.0
    matches = sinkhorn_matches(Tokens(f), Tokens(h))
    assert not matches.matched.any()
    assert bool((matches.weight == 0).all())
    assert bool((matches.cost == math.inf).all())


@pytest.mark.parametrize(("b", "s", "t"), [(0, 3, 4), (2, 0, 4), (2, 3, 0), (2, 1, 1)])
def test_empty_and_single(b, s, t):
    matches = sinkhorn_matches(Tokens(torch.ones(b, s, 2)), Tokens(torch.ones(b, t, 2)))
    assert matches.weight.shape == (b, s, t)
    assert matches.cost.shape == (b, s)
    assert bool((matches.matched == (t > 0)).all())


def test_tokens_outside_the_source_take_no_part():
    grid = TokenGrid.tiling(1, 3, (8, 24))
    padded = from_box(torch.tensor([[-8.0, 0, 16, 8], [0, 0, 24, 8]]), (8, 24), (8, 24))
    tokens = Tokens(torch.randn(2, 3, 4), padded, grid)
    for weight in (0.0, 1.0):
        matches = sinkhorn_matches(tokens, tokens, distance_weight=weight)
        assert matches.matched.tolist() == [[False, True, True], [True] * 3]
        assert float(matches.weight[0, :, 0].abs().max()) == 0
        assert matches.mass[0].tolist() == pytest.approx([0, 1, 1])


def test_blocks_of_images_give_the_same_numbers():
    g = torch.Generator().manual_seed(5)
    f, h = torch.randn(6, 250, 4, generator=g), torch.randn(6, 260, 4, generator=g)
    assert block_length(250 * 260 * 4 * 4, f.device) < 6  # several blocks
    whole = sinkhorn_matches(Tokens(f), Tokens(h))
    for image in range(6):
        one = slice(image, image + 1)
        alone = sinkhorn_matches(Tokens(f[one]), Tokens(h[one]))
        torch.testing.assert_close(whole.weight[one], alone.weight)
        torch.testing.assert_close(whole.cost[one], alone.cost)


def test_no_gradient_and_inputs_are_left_alone():
    f, h = torch.randn(2, 4, 3, requires_grad=True), torch.randn(2, 5, 3, requires_grad=True)
    before = f.detach().clone(), h.detach().clone()
    matches = sinkhorn_matches(Tokens(f), Tokens(h))
    assert not matches.weight.requires_grad
    assert not matches.cost.requires_grad
    assert torch.equal(f, before[0])
    assert torch.equal(h, before[1])
    with torch.inference_mode():
        frozen = Tokens(before[0].clone()), Tokens(before[1].clone())
    assert torch.equal(sinkhorn_matches(*frozen).weight, matches.weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sinkhorn_matches(Tokens(f), Tokens(h)).weight, matches.weight)
    # close, not equal: sums along another axis of memory add up in another order
    wide = torch.randn(3, 4, 2).transpose(0, 2)
    torch.testing.assert_close(
        sinkhorn_matches(Tokens(wide), Tokens(wide)).weight,
        sinkhorn_matches(Tokens(wide.contiguous()), Tokens(wide.contiguous())).weight,
    )


def test_runs_where_no_value_can_be_read():
    # fake tensors have shapes only: whatever asks for a value, as a host sync does, raises
    grid = TokenGrid.tiling(2, 3, (16, 24))
    geometry = random_geometry(view_size=(16, 24))
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        parts = [fake.from_tensor(part) for part in geometry]
        tokens = Tokens(torch.zeros(2, 6, 4), CropGeometry(*parts), grid)
        with pytest.raises(DataDependentOutputException):
            float(tokens.features.sum())
        matches = sinkhorn_matches(tokens, tokens, distance_weight=1.0)
    assert matches.weight.shape == (2, 6, 6)


def test_maps_over_a_new_axis():
    f, h = torch.randn(3, 2, 4, 5), torch.randn(3, 2, 6, 5)
    mapped = torch.vmap(lambda x, y: sinkhorn_matches(Tokens(x), Tokens(y)).weight)(f, h)
    for k in range(3):
        torch.testing.assert_close(mapped[k], sinkhorn_matches(Tokens(f[k]), Tokens(h[k])).weight)


def test_module_is_the_function():
    matcher = SinkhornMatcher(epsilon=0.2, iterations=3)
    f, h = Tokens(torch.randn(2, 4, 3)), Tokens(torch.randn(2, 5, 3))
    wanted = sinkhorn_matches(f, h, epsilon=0.2, iterations=3)
    for other in (matcher, copy.deepcopy(matcher), pickle.loads(pickle.dumps(matcher))):
        assert torch.equal(other(f, h).weight, wanted.weight)
    assert repr(matcher) == "SinkhornMatcher(epsilon=0.2, iterations=3, distance_weight=0.0)"


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"epsilon": 0.0}, "epsilon"),
        ({"epsilon": math.nan}, "epsilon"),
        ({"iterations": 0}, "iterations"),
        ({"iterations": 2.5}, "iterations"),
        ({"distance_weight": -1.0}, "distance_weight"),
        ({"distance_weight": math.nan}, "distance_weight"),
    ],
)
def test_bad_settings_are_refused(settings, name):
    with pytest.raises(ConfigError, match=f"`{name}`"):
        SinkhornMatcher(**settings)
    tokens = Tokens(torch.ones(2, 3, 4))
    with pytest.raises(ConfigError, match=f"`{name}`"):
        sinkhorn_matches(tokens, tokens, **settings)


def test_bad_tokens_are_refused_by_name():
    good = Tokens(torch.zeros(2, 3, 4))
    with pytest.raises(ShapeError, match="axis `b`"):
        sinkhorn_matches(good, Tokens(torch.zeros(1, 3, 4)))
    with pytest.raises(ShapeError, match="axis `d`"):
        sinkhorn_matches(good, Tokens(torch.zeros(2, 3, 5)))
    with pytest.raises(ShapeError, match="`student` has no features"):
        sinkhorn_matches(Tokens(), good)
    with pytest.raises(ShapeError, match="no geometry, which a SinkhornMatcher"):
        sinkhorn_matches(good, good, distance_weight=1.0)
    geometry, grid = random_geometry(view_size=(16, 24)), TokenGrid.tiling(1, 3, (16, 24))
    for matrix, text in (
        (geometry.matrix.half(), "float16"),
        (geometry.matrix * torch.tensor([1.0, 0.0, 1.0])[:, None], "singular"),
        (geometry.matrix * torch.nan, "NaN"),
    ):
        bad = good._replace(geometry=geometry._replace(matrix=matrix), grid=grid)
        with pytest.raises(GeometryError, match=text):
            sinkhorn_matches(bad, bad)
    sizes = geometry._replace(source_size=geometry.source_size + 1)
    with pytest.raises(GeometryError, match="different source sizes"):
        sinkhorn_matches(
            good._replace(geometry=geometry, grid=grid),
            good._replace(geometry=sizes, grid=grid),
            distance_weight=1.0,
        )

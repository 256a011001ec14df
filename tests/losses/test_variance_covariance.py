"""VICReg's terms and VICRegL's criterion against naive float64 loops and the published code."""

import math

import pytest
import torch
from helpers.strategies import matches_for
from hypothesis import given
from hypothesis import strategies as st

from local_distill import ConfigError, Matches, ShapeError
from local_distill.losses._wide_squares import sum_of_squares
from local_distill.losses.local_variance_covariance import VICRegLLoss
from local_distill.losses.variance_covariance import (
    VICRegLoss,
    covariance_loss,
    invariance_loss,
    variance_loss,
)

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-4


def variance_of(column):
    mean = sum(column) / len(column)
    return sum((x - mean) ** 2 for x in column) / (len(column) - 1)


def covariance_of(one, two):
    means = sum(one) / len(one), sum(two) / len(two)
    return sum((x - means[0]) * (y - means[1]) for x, y in zip(one, two, strict=True)) / (
        len(one) - 1
    )


def oracle_penalties(positions, d):
    """Of [position][row][channel]: VICReg's variance and covariance term, as plain numbers."""
    variances, covariances = [], []
    for rows in positions:
        if len(rows) < 2:
            continue
        columns = [[row[j] for row in rows] for j in range(d)]
        variances.append(sum(max(0.0, 1 - math.sqrt(variance_of(c) + EPS)) for c in columns) / d)
        covariances.append(
            sum(
                covariance_of(columns[i], columns[j]) ** 2
                for i in range(d) for j in range(d) if i != j
            ) / d
        )  # fmt: skip
    known = max(len(variances), 1)
    return sum(variances) / known, sum(covariances) / known


def by_position(values, valid):
    return [
        [row for row, keep in zip(values[:, i].tolist(), valid[:, i].tolist(), strict=True) if keep]
        for i in range(values.shape[1])
    ]


@given(
    st.integers(0, 5), st.integers(1, 3), st.integers(1, 4), st.sampled_from(DTYPES),
    st.floats(0, 50), st.integers(0, 2**31),
)  # fmt: skip
def test_the_terms_are_the_oracles(b, n, d, dtype, offset, seed):
    g = torch.Generator().manual_seed(seed)
    x, y = ((torch.randn(b, n, d, generator=g) * 0.5 + offset).to(dtype) for _ in range(2))
    valid = torch.rand(b, n, generator=g) > 0.3
    variance, covariance = oracle_penalties(by_position(x.double(), valid), d)
    squares = [
        (p - q) ** 2
        for one, two in zip(
            by_position(x.double(), valid), by_position(y.double(), valid), strict=True
        )
        for row, other in zip(one, two, strict=True)
        for p, q in zip(row, other, strict=True)
    ]
    # what does not count may be anything
    x, y = (torch.where(valid[..., None], values, torch.nan) for values in (x, y))
    rel = 1e-9 if dtype == torch.float64 else 3e-4 if offset > 5 else 1e-5
    found = [variance_loss(x, valid=valid), covariance_loss(x, valid=valid)]
    found.append(invariance_loss(x, y, valid=valid))
    truth = [variance, covariance, sum(squares) / max(len(squares), 1)]
    for value, wanted in zip(found, truth, strict=True):
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert float(value) == pytest.approx(wanted, rel=rel, abs=rel)


def test_whole_views_are_one_position():
    values = torch.randn(5, 3)
    assert torch.equal(variance_loss(values), variance_loss(values[:, None]))
    assert torch.equal(covariance_loss(values), covariance_loss(values[:, None]))


def wave(*shape, start=0.0):
    count = math.prod(shape)
    return ((torch.arange(count).double() + start) * 1.7).sin().reshape(shape) * 1.5


def test_the_published_vicreg():
    # golden: the authors' module with an identity projector, batch_size=6, 25, 25, 1, float64
    views = [wave(6, 5, start=10.0 * v).requires_grad_() for v in range(2)]
    value = VICRegLoss(covariance_weight=2.0)(views)
    value.backward()
    assert float(value.detach()) == pytest.approx(75.83305376701762, rel=1e-12)
    sums = [float(view.grad.abs().sum()) for view in views]
    assert sums == pytest.approx([83.65678245913463, 84.60728171719181], rel=1e-12)


def nearest(one, two):
    cost, index = torch.cdist(one, two).min(-1)
    return Matches(index[..., None], torch.ones(*index.shape, 1), cost)


def test_the_published_vicregl():
    # golden: the authors' `global_loss` and `local_loss` with num_matches [4, 2] and
    # l2_all_matches=0, one process, float64; three views of 3 × 2, 2 × 3 and 2 × 2 patches
    whole = [wave(6, 5, start=10.0 * v).requires_grad_() for v in range(3)]
    patches = [wave(6, n, 4, start=100.0 + 7 * v).square() for v, n in enumerate((6, 6, 4))]
    patches = [values.requires_grad_() for values in patches]
    places = [wave(6, n, 2, start=50.0 + 3 * v) for v, n in enumerate((6, 6, 4))]
    forth = [(0, 1), (0, 2), (1, 0), (1, 2)]
    back = [(q, v) for v, q in forth]
    location, feature = (
        [
            {(v, q): nearest(of[v].detach(), of[q].detach()).compact(n) for v, q in pairs}
            for pairs, n in ((forth, 4), (back, 2))
        ]
        for of in (places, patches)
    )
    terms = VICRegLLoss(alpha=0.75)(whole, patches, location, feature, pairs=forth)
    terms.loss.backward()
    assert float(terms.global_loss.detach()) == pytest.approx(82.28777323216423, rel=1e-12)
    local = float((terms.location_loss + terms.feature_loss).detach())
    assert local == pytest.approx(62.329442887364344, rel=1e-12)
    assert [float(values.grad.abs().sum()) for values in whole + patches] == pytest.approx(
        [43.559271402105495, 37.12289202146739, 31.161515270746037,
         8.031908159226244, 9.190018829438259, 4.161036693789021], rel=1e-12,
    )  # fmt: skip


@given(st.integers(2, 5), st.integers(2, 4), st.integers(1, 4))
def test_many_views_are_averaged(b, views, d):
    g = torch.Generator().manual_seed(b + 10 * views)
    values = [torch.randn(b, d, generator=g, dtype=torch.float64) for _ in range(views)]
    pairs = [(v, q) for v in range(views) for q in range(v + 1, views)]
    weights = {"invariance_weight": 3.0, "variance_weight": 5.0, "covariance_weight": 7.0}
    penalties = [oracle_penalties([view.tolist()], d) for view in values]
    squares = [
        sum((p - q) ** 2 for p, q in zip(values[v].flatten(), values[w].flatten(), strict=True))
        / (b * d)
        for v, w in pairs
    ]
    truth = 3 * float(sum(squares)) / len(pairs)
    truth += sum(5 * variance + 7 * covariance for variance, covariance in penalties) / views
    assert float(VICRegLoss(**weights)(values)) == pytest.approx(truth, rel=1e-9)


def oracle_local(values, found, weights=(25.0, 25.0, 1.0)):
    """VICRegL's criterion of one pair's plain matches, loop by loop."""
    x, y = (part.double().tolist() for part in values)
    d, slots = len(x[0][0]), len(x[0])
    ours, theirs = [[] for _ in range(slots)], [[] for _ in range(slots)]
    error = total = 0.0
    for image, (indices, masses) in enumerate(
        zip(found.teacher_index.tolist(), found.weight.double().tolist(), strict=True)
    ):
        for i in range(slots):
            mass = sum(masses[i])
            if mass == 0:
                continue
            answer = [
                sum(w * y[image][j][c] for j, w in zip(indices[i], masses[i], strict=True) if w)
                / mass
                for c in range(d)
            ]
            ours[i].append(x[image][i])
            theirs[i].append(answer)
            error += mass * sum((p - q) ** 2 for p, q in zip(x[image][i], answer, strict=True)) / d
            total += mass
    one, two = oracle_penalties(ours, d), oracle_penalties(theirs, d)
    return (
        weights[0] * (error / total if total else 0.0)
        + weights[1] * (one[0] + two[0]) / 2
        + weights[2] * (one[1] + two[1]) / 2
    )


@given(
    st.data(), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(1, 3),
    st.sampled_from(DTYPES),
)  # fmt: skip
def test_matched_vectors_are_the_oracles(data, b, s, t, d, dtype):
    found = {(0, 1): data.draw(matches_for(b, s, t)), (1, 0): data.draw(matches_for(b, t, s))}
    tokens = [torch.randn(b, n, d).to(dtype) for n in (s, t)]
    whole = [torch.randn(b, 4).to(dtype) for _ in range(2)]
    terms = VICRegLLoss(alpha=0.25)(whole, tokens, found, [found, {(0, 1): found[0, 1]}])
    forth, back = (
        oracle_local([tokens[v], tokens[q]], matches) for (v, q), matches in found.items()
    )
    rel = 1e-9 if dtype == torch.float64 else 1e-4
    assert float(terms.location_loss) == pytest.approx((forth + back) / 2, rel=rel, abs=rel)
    assert float(terms.feature_loss) == pytest.approx((2 * forth + back) / 3, rel=rel, abs=rel)
    assert torch.equal(terms.global_loss, VICRegLoss()(whole))
    assert float(terms.loss) == pytest.approx(
        float(0.25 * terms.global_loss + 0.75 * (terms.location_loss + terms.feature_loss)),
        rel=1e-6,
    )


def test_compact_matches_stand_in_the_order_of_the_tokens():
    g = torch.Generator().manual_seed(1)
    tokens = [torch.randn(3, n, 2, generator=g, dtype=torch.float64) for n in (5, 4)]
    found = nearest(*tokens)
    found.weight[0, 2:] = 0
    found.cost[0, 2:] = torch.inf
    kept, matches = found.compact(3)
    inverse = torch.zeros(3, 3, 2, dtype=torch.float64)
    index = torch.zeros(3, 3, 1).long()
    weight = torch.zeros(3, 3, 1)
    for image in range(3):
        ranked = [int(i) for i, ok in zip(kept[image], matches.matched[image], strict=True) if ok]
        for place, token in enumerate(sorted(ranked)):
            inverse[image, place] = tokens[0][image, token]
            index[image, place] = found.teacher_index[image, token]
            weight[image, place] = 1
    plain = Matches(index, weight, torch.zeros(3, 3))
    whole = [torch.randn(3, 4) for _ in range(2)]
    value = VICRegLLoss()(whole, tokens, {(0, 1): (kept, matches)}).location_loss
    assert float(value) == pytest.approx(oracle_local([inverse, tokens[1]], plain), rel=1e-12)


def some_step(dtype=torch.float64, seed=0, b=3):
    g = torch.Generator().manual_seed(seed)
    whole = [torch.randn(b, 3, generator=g, dtype=dtype) for _ in range(3)]
    tokens = [torch.randn(b, n, 2, generator=g, dtype=dtype) for n in (4, 3)]
    weight = torch.rand(b, 4, 2, generator=g, dtype=dtype) / 2
    weight[:1, 1] = 0
    matches = Matches(torch.randint(0, 3, (b, 4, 2), generator=g), weight, torch.rand(b, 4))
    return whole, tokens, {(0, 1): matches}, {(1, 0): nearest(*tokens[::-1]).compact(2)}


def test_gradients_are_exact_on_both_sides():
    whole, tokens, location, feature = some_step()
    inputs = [part.requires_grad_() for part in whole + tokens]
    loss = VICRegLLoss(alpha=0.5)
    assert torch.autograd.gradcheck(
        lambda *parts: loss(parts[:3], parts[3:], location, feature).loss, inputs
    )
    assert torch.autograd.gradgradcheck(lambda *parts: VICRegLoss()(parts), inputs[:3])
    x, y = (torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    valid = torch.rand(4, 2) > 0.3
    assert torch.autograd.gradcheck(lambda v: variance_loss(v, valid=valid), (x,))
    assert torch.autograd.gradcheck(lambda v: covariance_loss(v, valid=valid), (x,))
    assert torch.autograd.gradcheck(lambda v, w: invariance_loss(v, w, valid=valid), (x, y))


def test_what_no_match_refers_to_may_be_nan():
    whole, tokens, location, feature = some_step()
    feature[1, 0][1].weight[0, -1] = 0
    clean = VICRegLLoss()(whole, tokens, location, feature).loss
    read = torch.zeros(2, 3, 4, dtype=torch.bool)
    for (v, q), found in {**location, **feature}.items():
        rows, matches = found if not isinstance(found, Matches) else (None, found)
        for image in range(3):
            for i in range(matches.weight.shape[1]):
                if matches.mass[image, i] > 0:
                    read[v, image, i if rows is None else rows[image, i]] = True
                for k in range(matches.weight.shape[2]):
                    if matches.weight[image, i, k] > 0:
                        read[q, image, matches.teacher_index[image, i, k]] = True
    dirty = [
        torch.where(seen[:, : values.shape[1], None], values, torch.nan).requires_grad_()
        for values, seen in zip(tokens, read, strict=True)
    ]
    assert any(values.isnan().any() for values in dirty)
    value = VICRegLLoss()(whole, dirty, location, feature).loss
    assert float(value.detach()) == pytest.approx(float(clean), rel=1e-12)
    value.backward()
    for values, seen in zip(dirty, read, strict=True):
        assert values.grad.isfinite().all()
        assert (values.grad[~seen[:, : values.shape[1]]] == 0).all()


@pytest.mark.parametrize("b", [0, 1])
def test_few_images_have_no_statistics(b):
    whole, tokens, location, _ = some_step(b=b)
    inputs = [part.requires_grad_() for part in whole + tokens]
    terms = VICRegLLoss()(whole, tokens, location)
    terms.loss.backward()
    assert all(part.grad.isfinite().all() for part in inputs if part.grad is not None)
    alone = VICRegLLoss(variance_weight=0.0, covariance_weight=0.0)(whole, tokens, location)
    assert torch.equal(terms.loss, alone.loss)
    assert (float(terms.loss.detach()) == 0) == (b == 0)
    values = whole[0].detach()
    assert float(variance_loss(values)) == float(covariance_loss(values)) == 0


def test_no_match_at_all_is_zero_with_a_graph():
    whole, tokens, location, _ = some_step()
    location[0, 1].weight.zero_()
    inputs = [part.requires_grad_() for part in tokens]
    terms = VICRegLLoss()(whole, tokens, location, {})
    assert float(terms.location_loss.detach()) == 0
    assert float(terms.feature_loss.detach()) == 0
    terms.loss.backward()
    assert all(part.grad.abs().max() == 0 for part in inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_huge_values_stay_finite_and_right(dtype, autocast):
    g = torch.Generator().manual_seed(0)
    views = [(torch.randn(6, 8, generator=g).sign() * 60000).to(dtype) for _ in range(2)]
    for view in views:
        view.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        value = VICRegLoss(invariance_weight=1e-30, covariance_weight=1e-20)(views)
    truth = VICRegLoss(invariance_weight=1e-30, covariance_weight=1e-20)(
        [view.detach().double() for view in views]
    )
    assert value.dtype == torch.float32
    assert float(value.detach()) == pytest.approx(float(truth), rel=1e-5)
    value.backward()
    assert all(view.grad.isfinite().all() for view in views)


def large(size, *shape, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=g) * size).to(dtype).requires_grad_()


def in_both(loss, *inputs):
    """Value and gradients in float32 and, of the same numbers, in float64."""
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = [part.detach().to(dtype).requires_grad_() for part in inputs]
        value = loss(*leaves)
        assert value.dtype == dtype
        results.append((float(value.detach()), torch.autograd.grad(value, leaves)))
    return results


def assert_right(loss, *inputs):
    (value, slopes), (truth, wanted) = in_both(loss, *inputs)
    assert math.isfinite(value)
    assert value == pytest.approx(truth, rel=1e-5)
    assert_slopes(slopes, wanted)


def assert_slopes(slopes, wanted):
    for one, two in zip(slopes, wanted, strict=True):
        torch.testing.assert_close(one.double(), two, rtol=1e-4, atol=1e-5 * float(two.abs().max()))


@pytest.mark.parametrize("size", [1e9, 1e-4, 1e-9])
def test_covariances_of_many_channels_fit_where_their_mean_does(size):
    # their sum, 400 times as much, does not; of the small ones the squares do not
    assert_right(covariance_loss, large(size, 6, 400))


@pytest.mark.parametrize("size", [1e18, 1e12, 1e-12, 1e-18])
def test_differences_of_any_size(size):
    x, y = large(size, 4, 900), large(size, 4, 900, seed=1)
    assert_right(invariance_loss, x, y)


def test_small_weights_make_large_covariances_fit():
    one, two = large(1e12, 6, 5), large(1e12, 6, 5, seed=1)
    settings = {"invariance_weight": 1e-20, "covariance_weight": 1e-20}
    assert_right(lambda *views: VICRegLoss(**settings)(views), one, two)
    tokens = large(1e11, 6, 3, 5), large(1e11, 6, 3, 5, seed=1)
    matches = {(0, 1): Matches.identity(torch.ones(6, 3, dtype=torch.bool))}
    assert_right(lambda *v: VICRegLLoss(**settings)(v[:2], v[2:], matches).loss, one, two, *tokens)


def test_a_value_beyond_float32_is_infinite_and_its_gradient_right():
    view, other = large(1e11, 6, 5), large(1e11, 6, 5, seed=1)
    for loss, inputs in (
        (covariance_loss, (view,)),
        (lambda *views: VICRegLoss()(views), (view, other)),
    ):
        (value, slopes), (truth, wanted) = in_both(loss, *inputs)
        assert truth > torch.finfo(torch.float32).max
        assert value == math.inf
        assert_slopes(slopes, wanted)


def test_a_term_without_weight_is_left_out_however_large():
    views = [large(1e25, 6, 5, seed=seed) for seed in range(2)]
    value = VICRegLoss(invariance_weight=1e-30, covariance_weight=0.0)(views)
    value.backward()
    assert math.isfinite(float(value.detach()))
    assert all(bool(view.grad.isfinite().all()) for view in views)
    nothing = VICRegLoss(0.0, 0.0, 0.0)([view.detach().requires_grad_() for view in views])
    assert float(nothing.detach()) == 0
    nothing.backward()


@given(
    st.lists(st.floats(-(2.0**127), 2.0**127, width=32), max_size=7),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_sums_of_squares_are_those_of_exact_numbers(numbers, dtype):
    values = torch.tensor(numbers, dtype=dtype)
    truth = math.fsum(float(x) ** 2 for x in values.tolist())
    assert float(sum_of_squares(values)) == pytest.approx(truth, rel=1e-6)


def test_sums_of_squares_have_exact_gradients_and_show_what_is_not_finite():
    values = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    for axes in (1, 2):
        assert torch.autograd.gradcheck(lambda v: sum_of_squares(v, axes), values)  # noqa: B023
        assert torch.autograd.gradgradcheck(lambda v: sum_of_squares(v, axes), values)  # noqa: B023
    each = torch.func.vmap(sum_of_squares)(values)
    torch.testing.assert_close(each, values.square().sum(-1))
    bad = torch.tensor([[1.0, math.nan], [1.0, math.inf], [0.0, 0.0]])
    assert sum_of_squares(bad).tolist()[1:] == [math.inf, 0.0]
    assert math.isnan(sum_of_squares(bad)[0])


@pytest.mark.parametrize("size", [1e18, 1e-18])
def test_extreme_values_are_right_in_float64(size):
    g = torch.Generator().manual_seed(0)
    values = (torch.randn(4, 3, generator=g, dtype=torch.float64) * size).requires_grad_()
    value = variance_loss(values) + covariance_loss(values)
    truth = sum(oracle_penalties([values.tolist()], 3))
    assert float(value.detach()) == pytest.approx(truth, rel=1e-9)
    value.backward()
    assert values.grad.isfinite().all()


def test_layout_does_not_matter_and_nothing_is_changed():
    whole, tokens, location, feature = some_step()
    truth = VICRegLLoss()(whole, tokens, location, feature).loss
    before = [part.clone() for part in whole + tokens]
    other = [torch.stack([part, part * 0], -1)[..., 0] for part in whole]
    turned = [part.transpose(0, 1).contiguous().transpose(0, 1) for part in tokens]
    assert torch.allclose(VICRegLLoss()(other, turned, location, feature).loss, truth, rtol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(whole + tokens, before, strict=True))


def test_it_compiles_whole():
    whole, tokens, location, feature = some_step(torch.float32)
    loss = VICRegLLoss()
    truth = loss(whole, tokens, location, feature)
    found = torch.compile(loss, fullgraph=True, backend="aot_eager")(
        whole, tokens, location, feature
    )
    torch.testing.assert_close(found, truth)


def index_beyond():
    return Matches(torch.full((3, 4, 1), 3), torch.ones(3, 4, 1), torch.zeros(3, 4))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"embeddings": [torch.randn(3, 3), torch.randn(1, 3)]}, "axis `b` is 3 in .* but 1"),
        ({"embeddings": [torch.randn(3, 3), torch.randn(3, 1)]}, "axis `d` is 3 in .* but 1"),
        ({"embeddings": [torch.randn(3, 3)]}, "make no pair"),
        ({"embeddings": torch.randn(3, 3)}, "`embeddings` must be a list"),
        ({"token_embeddings": [torch.randn(3, 4, 2), None]}, "must be a tensor"),
        ({"token_embeddings": [torch.randn(3, 4, 2), torch.randn(3, 3, 1)]}, "axis `d`"),
        ({"token_embeddings": [torch.randn(3, 5, 2), torch.randn(3, 3, 2)]}, "axis `s` is 5"),
        ({"location_matches": {(0, 2): index_beyond()}}, "between views 0 and 2"),
        ({"location_matches": {(0, 1): index_beyond()}}, "reaches 3"),
        ({"location_matches": [{(0, 1): index_beyond()}]}, r"location_matches\[0\]"),
        ({"location_matches": {(0, 1): None}}, "must be Matches, or what their compact"),
        (
            {"location_matches": {(0, 1): (torch.full((3, 4), 4), index_beyond())}},
            r"location_matches\[\(0, 1\)\]\[0\]` reaches 4",
        ),
        ({"pairs": [(0, 9)]}, "pairs"),
    ],
)
def test_bad_input_is_refused_by_name(change, text):
    whole, tokens, location, feature = some_step(torch.float32)
    parts = {
        "embeddings": whole, "token_embeddings": tokens,
        "location_matches": location, "feature_matches": feature,
    }  # fmt: skip
    with pytest.raises(ShapeError, match=text):
        VICRegLLoss()(**parts | change)


def test_bad_settings_are_refused():
    for settings in (
        {"invariance_weight": -1.0}, {"variance_weight": math.nan}, {"covariance_weight": math.inf},
        {"target_std": 0.0}, {"eps": -1.0},
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=next(iter(settings))):
            VICRegLoss(**settings)
    with pytest.raises(ConfigError, match="alpha"):
        VICRegLLoss(alpha=1.5)
    with pytest.raises(ShapeError, match="bool"):
        variance_loss(torch.randn(3, 2), valid=torch.ones(3))
    with pytest.raises(ShapeError, match="floating"):
        covariance_loss(torch.ones(3, 2).long())

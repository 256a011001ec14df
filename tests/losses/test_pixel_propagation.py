"""PixPro's propagation and consistency against naive float64 loops."""

import math

import pytest
import torch
from helpers.feature_kit import feature_loss_test
from helpers.strategies import matches_for
from hypothesis import given
from hypothesis import strategies as st

from local_distill import (
    ConfigError,
    Matches,
    RadiusMatcher,
    ShapeError,
    TokenGrid,
    Tokens,
    from_box,
)
from local_distill.losses.pixel_propagation import (
    PixelConsistencyLoss,
    PixelPropagation,
    pixel_consistency_loss,
)

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
NORMALIZATIONS = ["all", "matched", "image"]


def direction(row):
    norm = math.sqrt(sum(x * x for x in row))
    return [x / norm for x in row] if norm > 0 else list(row)


def cosine(a, b):
    return sum(x * y for x, y in zip(direction(a), direction(b), strict=True))


def naive_loss(student, teacher, matches, normalize):
    """Loops over all pairs of tokens, each with its weight."""
    sums, masses = [], []
    for image in range(student.shape[0]):
        total = mass = 0.0
        for i in range(student.shape[1]):
            for j, w in zip(
                matches.teacher_index[image, i].tolist(),
                matches.weight[image, i].tolist(),
                strict=True,
            ):
                if w > 0:
                    total -= w * cosine(student[image, i].tolist(), teacher[image, j].tolist())
                    mass += w
        sums.append(total)
        masses.append(mass)
    if normalize == "image":
        return sum(t / m for t, m in zip(sums, masses, strict=True) if m) / len(sums)
    size = sum(masses) if normalize == "matched" else student.shape[0] * student.shape[1]
    return sum(sums) / size if size else 0.0


@given(
    st.data(), st.integers(2, 3), st.integers(1, 5), st.integers(1, 6), st.integers(1, 6),
    st.sampled_from(NORMALIZATIONS), st.sampled_from(DTYPES), st.booleans(),
)  # fmt: skip
def test_one_pair_is_the_loops(data, b, s, t, d, normalize, dtype, autocast):
    matches = data.draw(matches_for(b, s, t))
    student, teacher = torch.randn(b, s, d).to(dtype), torch.randn(b, t, d).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = pixel_consistency_loss(student, teacher, matches, normalize=normalize)
    truth = naive_loss(student.double(), teacher.double(), matches, normalize)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # the weights are float32
    assert float(found) == pytest.approx(truth, abs=1e-6 if dtype == torch.float64 else 1e-5)


test_it_keeps_the_properties_of_local_losses = feature_loss_test(
    lambda d: PixelConsistencyLoss(),
    exclude=["compiles_without_graph_breaks"],  # below, with the propagation
)


def naive_propagation(features, values, gamma, normalize):
    smooth = []
    for image in range(features.shape[0]):
        for one in features[image].tolist():
            total = [0.0] * features.shape[2]
            for other, value in zip(features[image].tolist(), values[image].tolist(), strict=True):
                weight = max(cosine(one, other), 0.0)
                weight = weight**gamma if weight else 0.0
                value = direction(value) if normalize else value
                total = [a + weight * x for a, x in zip(total, value, strict=True)]
            smooth.append(total)
    return torch.tensor(smooth, dtype=torch.float64).reshape(features.shape)


@given(
    st.integers(2, 3), st.integers(1, 6), st.integers(1, 5),
    st.sampled_from([0.5, 1.0, 2.0, 3.5]), st.integers(0, 2), st.booleans(),
)  # fmt: skip
def test_propagation_is_the_loops(b, n, d, gamma, num_layers, normalize):
    propagate = PixelPropagation(
        d, gamma=gamma, num_layers=num_layers, normalize_values=normalize
    ).double()
    features = torch.randn(b, n, d, dtype=torch.float64)
    found = propagate(features)
    # g by hand: linear layers, between them BatchNorm over all tokens of all images, and ReLU
    rows = features.reshape(-1, d)
    linears = [layer for layer in propagate.transform if isinstance(layer, torch.nn.Linear)]
    assert len(linears) == num_layers
    for place, linear in enumerate(linears):
        if place:
            rows = (rows - rows.mean(0)) / (rows.var(0, unbiased=False) + 1e-5).sqrt()
            rows = rows.clamp_min(0)
        rows = rows @ linear.weight.T + linear.bias
    wanted = naive_propagation(features, rows.detach().view(b, n, d), gamma, normalize)
    torch.testing.assert_close(found.detach(), wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("autocast", [False, True])
def test_propagation_is_not_rounded(dtype, autocast):
    features = torch.randn(2, 5, 4).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = PixelPropagation(4, num_layers=0)(features)
    truth = naive_propagation(features.double(), features.double(), 2.0, True)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("num_layers", [0, 1, 2])
def test_gradient_through_both(gamma, num_layers):
    student, teacher, matches = step()
    propagate = PixelPropagation(5, gamma=gamma, num_layers=num_layers).double()
    weights = tuple(propagate.parameters())

    def both(features, *_):
        return pixel_consistency_loss(propagate(features), teacher, matches)

    assert torch.autograd.gradcheck(both, (student.requires_grad_(), *weights))
    both(student).backward()
    assert all(part.grad is not None for part in (student, *weights))


def test_tokens_at_right_angles_have_a_finite_gradient():
    features = torch.eye(3).expand(2, 3, 3).clone().requires_grad_()
    for gamma in (0.5, 1.0, 2.0):
        smooth = PixelPropagation(3, gamma=gamma, num_layers=0)(features)
        (gradient,) = torch.autograd.grad(smooth.square().sum() + smooth.sum(), features)
        assert bool(gradient.isfinite().all())


def step(b=2, s=4, t=3, d=5, k=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(b, n, d, generator=g, dtype=torch.float64) for n in (s, t))
    weight = torch.rand(b, s, k, generator=g, dtype=torch.float64) / k
    weight[:, 1] = 0
    index = torch.randint(0, t, (b, s, k), generator=g)
    return student, teacher, Matches(index, weight, torch.zeros(b, s))


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_gradient_of_the_loss(normalize):
    student, teacher, matches = step()
    teacher.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: pixel_consistency_loss(x, teacher, matches, normalize=normalize),
        student.requires_grad_(),
    )
    pixel_consistency_loss(student, teacher, matches, normalize=normalize).backward()
    assert teacher.grad is None
    assert bool((student.grad[:, 1] == 0).all())
    assert bool((student.grad[:, [0, 2, 3]].abs().sum(-1) > 0).all())


def test_within_a_radius_all_pairs_of_tokens_weigh_alike():
    grids = TokenGrid.tiling(3, 4, (48, 64)), TokenGrid.tiling(5, 2, (50, 20))
    boxes = (
        torch.tensor([[0.0, 0, 40, 40], [8, 4, 60, 50]]),
        torch.tensor([[5.0, 8, 45, 60], [0, 0, 64, 64]]),
    )
    views = [
        Tokens(torch.randn(2, grid.num_tokens, 6).double(), from_box(box, size, (64, 64)), grid)
        for grid, box, size in zip(grids, boxes, ((48, 64), (50, 20)), strict=True)
    ]
    matches = RadiusMatcher(0.7)(*views)
    counts = (matches.weight > 0).sum((1, 2))
    assert int(counts.min()) > 3  # and not one of each token
    assert bool(((matches.weight > 0).sum(-1) > 1).any())
    student, teacher = (view.features for view in views)
    table = (
        torch.nn.functional.normalize(student, dim=-1)
        @ torch.nn.functional.normalize(teacher, dim=-1).mT
    )
    plain = -(table * (matches.weight > 0)).sum((1, 2)) / counts
    found = pixel_consistency_loss(student, teacher, matches)
    assert float(found) == pytest.approx(float(plain.mean()), rel=1e-6)


# PixPro's forward with its encoders replaced by the features below, pixpro_p = 2, clamp 0, no layer
# in the transform, crops that are `BOXES` of a square source; float64. Theirs is 4 times the mean.
BOXES = torch.tensor([[[0.0, 0, 60, 60], [20, 10, 80, 90]], [[10.0, 20, 90, 70], [0, 0, 70, 80]]])
PUBLISHED = 0.32571660321558277


def test_the_numbers_of_the_published_code():
    grid = TokenGrid.tiling(3, 3, (48, 48))
    place = torch.arange(2 * 9 * 4, dtype=torch.float64)
    student = [torch.sin(1.7 * place).view(2, 9, 4), torch.sin(place * place).view(2, 9, 4)]
    teacher = [torch.cos(0.9 * place).view(2, 9, 4), torch.cos(3 * place * place).view(2, 9, 4)]
    views = [Tokens(None, from_box(box.double(), (48, 48), (100, 100)), grid) for box in BOXES]
    matches = {(v, q): RadiusMatcher(0.7)(views[v], views[q]) for v, q in ((0, 1), (1, 0))}
    propagate = PixelPropagation(4, gamma=2.0, num_layers=0)
    value = PixelConsistencyLoss()([propagate(x) for x in student], teacher, matches)
    # it adds 1e-6 to the number of pairs that it divides by
    assert 4 * float(value) == pytest.approx(PUBLISHED, rel=1e-6)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_pairs_are_averaged_and_views_may_be_missing(normalize):
    one, two, three = step(seed=1), step(seed=2), step(seed=1, t=7)
    matches = {
        (0, 1): one[2],
        (2, 1): two[2]._replace(weight=torch.zeros_like(two[2].weight)),  # gives 0, and counts
        (0, 2): three[2],
    }
    student, teacher = [one[0], None, two[0]], [None, one[1], three[1]]
    found = PixelConsistencyLoss(normalize=normalize)(student, teacher, matches)
    wanted = naive_loss(one[0], one[1], one[2], normalize)
    wanted += naive_loss(one[0], three[1], three[2], normalize)
    assert float(found) == pytest.approx(wanted / 3, rel=1e-9)


def test_the_same_direction_is_the_least():
    student, _, _ = step()
    same = Matches.identity(torch.ones(2, 4, dtype=torch.bool))
    for scale in (1e-18, 1.0, 1e18):
        assert float(pixel_consistency_loss(student, scale * student, same)) == pytest.approx(-1)
        assert float(pixel_consistency_loss(student, -scale * student, same)) == pytest.approx(1)


def test_nothing_to_learn_gives_zero_with_a_graph():
    student, teacher, matches = step()
    student.requires_grad_()
    nothing = matches._replace(weight=torch.zeros_like(matches.weight))
    none = Matches(matches.teacher_index[..., :0], matches.weight[..., :0], matches.cost)
    empty = Matches(*(part[:0] for part in matches))
    for normalize in NORMALIZATIONS:
        for value in (
            pixel_consistency_loss(student, teacher, nothing, normalize=normalize),
            pixel_consistency_loss(student, teacher[:, :0], none, normalize=normalize),
            pixel_consistency_loss(student[:0], teacher[:0], empty, normalize=normalize),
            PixelConsistencyLoss(normalize=normalize)([student], [teacher], {}),
        ):
            assert float(value.detach()) == 0
            (gradient,) = torch.autograd.grad(value, student)
            assert bool((gradient == 0).all())


def test_nan_in_rows_that_do_not_count_reaches_nothing():
    student, teacher, matches = step()
    matches.teacher_index.clamp_(max=1)
    wanted = pixel_consistency_loss(student, teacher, matches)
    student[:, 1], teacher[:, 2] = math.nan, math.inf
    student.requires_grad_()
    value = pixel_consistency_loss(student, teacher, matches)
    value.backward()
    assert torch.equal(value.detach(), wanted)
    assert bool(student.grad.isfinite().all())
    student = student.detach().clone()
    student[0, 0, 0] = math.nan  # a matched one is seen
    assert math.isnan(pixel_consistency_loss(student, teacher, matches))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-18, 1e18, 6e4, 0.0])
def test_features_of_any_size_stay_finite(dtype, scale):
    if dtype == torch.float16 and scale in (1e-18, 1e18):
        scale = {1e-18: 1e-3, 1e18: 6e4}[scale]
    student, teacher, matches = step()
    student = (student.clamp(-1, 1) * scale).to(dtype).requires_grad_()
    teacher = (teacher.clamp(-1, 1) * scale).to(dtype)
    for gamma in (0.5, 2.0):
        smooth = PixelPropagation(5, gamma=gamma, num_layers=0)(student)
        value = pixel_consistency_loss(smooth, teacher, matches)
        (gradient,) = torch.autograd.grad(value, student)
        assert bool(value.isfinite())
        assert bool(gradient.isfinite().all())


def test_layout_and_inputs():
    student, teacher, matches = step()
    wanted = pixel_consistency_loss(student, teacher, matches)
    parts = [student, teacher, *matches]
    before = [part.clone() for part in parts]
    strided = [torch.stack((part, part), -1)[..., 0] for part in (student, teacher)]
    found = pixel_consistency_loss(strided[0], strided[1].mT.contiguous().mT, matches)
    torch.testing.assert_close(found, wanted, rtol=1e-14, atol=1e-15)
    assert all(torch.equal(one, two) for one, two in zip(parts, before, strict=True))
    with torch.inference_mode():
        teacher = teacher.clone()
    value = pixel_consistency_loss(student.requires_grad_(), teacher, matches)
    value.backward()
    assert torch.equal(value.detach(), wanted)


def test_it_compiles_into_one_graph():
    student, teacher, matches = step()
    propagate, loss = PixelPropagation(5, num_layers=2).double(), PixelConsistencyLoss()

    def both(x):
        return loss([propagate(x)], [teacher], {(0, 0): matches})

    found = []
    for call in (both, torch.compile(both, fullgraph=True, backend="aot_eager")):
        leaf = student.clone().requires_grad_()
        value = call(leaf)
        value.backward()
        found.append([value.detach(), leaf.grad])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)


def test_what_does_not_fit_is_refused():
    student, teacher, matches = step()
    for parts, text in (
        ((student, teacher[..., :4], matches), "axis `d` is 5 in `student.0.` but 4"),
        ((student, teacher[:1], matches), "axis `b` is 2 in `student.0.` but 1"),
        ((student[:, :2], teacher, matches), "axis `s` is 2"),
        ((student.long(), teacher, matches), "floating-point"),
        ((student, teacher[:, :1], matches), "but `teacher.0.` has 1 tokens"),
    ):
        with pytest.raises(ShapeError, match=text):
            pixel_consistency_loss(*parts)
    with pytest.raises(ConfigError, match="all, matched, image"):
        pixel_consistency_loss(student, teacher, matches, normalize="mean")
    with pytest.raises(ConfigError, match="all, matched, image"):
        PixelConsistencyLoss(normalize="mean")
    with pytest.raises(ShapeError, match="`teacher` must be a list"):
        PixelConsistencyLoss()([student], teacher, {(0, 0): matches})
    for settings in ({"dim": 0}, {"gamma": 0.0}, {"gamma": math.nan}, {"num_layers": -1}):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            PixelPropagation(**({"dim": 5} | settings))
    for features, text in (
        (torch.randn(2, 3, 4), "made for dim=5"),
        (torch.randn(2, 5), "3 axes `b n d`"),
        (torch.ones(2, 3, 5).long(), "floating-point"),
    ):
        with pytest.raises(ShapeError, match=text):
            PixelPropagation(5)(features)
    assert repr(PixelConsistencyLoss()) == "PixelConsistencyLoss(normalize='image')"
    assert "gamma=2.0, num_layers=1" in repr(PixelPropagation(5))

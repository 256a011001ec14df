"""KoLeo against naive float64 loops and the published code."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from local_distill import ConfigError, ShapeError
from local_distill.losses.koleo import KoLeoLoss, koleo_loss

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def oracle(features, valid=None, eps=1e-8):
    """The loss, loop by loop; rows without a direction are left out."""
    rows = []
    for i, row in enumerate(features.double().tolist()):
        if valid is not None and not valid[i]:
            continue
        length = math.hypot(*row)
        if length > 0:
            rows.append([x / length for x in row])
    if len(rows) < 2:
        return 0.0
    total = 0.0
    for i, row in enumerate(rows):
        products = [
            sum(a * b for a, b in zip(row, other, strict=True)) if j != i else -math.inf
            for j, other in enumerate(rows)
        ]
        other = rows[products.index(max(products))]
        distance = math.sqrt(sum((a - b + eps) ** 2 for a, b in zip(row, other, strict=True)))
        total -= math.log(distance + eps)
    return total / len(rows)


@given(
    st.integers(0, 7), st.integers(2, 5), st.sampled_from(DTYPES), st.booleans(),
    st.integers(0, 2**31),
)  # fmt: skip
def test_it_is_the_oracle(b, d, dtype, flagged, seed):
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(b, d, generator=g).to(dtype)
    valid = torch.rand(b, generator=g) > 0.4 if flagged else None
    truth = oracle(features, valid)
    dirty = features if valid is None else torch.where(valid[:, None], features, torch.nan)
    found = koleo_loss(dirty, valid=valid)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # of rows that lie near together float32 knows the distance to a few digits only
    tolerance = 1e-9 if dtype == torch.float64 else 1e-3
    kept = features if valid is None else features[valid]
    kept = torch.nn.functional.normalize(kept.double(), dim=-1)
    assume(dtype == torch.float64 or not (torch.pdist(kept) < 1e-2).any())
    assert float(found) == pytest.approx(truth, rel=tolerance, abs=tolerance)


def wave(*shape):
    return (torch.arange(math.prod(shape)).double() * 1.7).sin().reshape(shape) * 1.5


def test_the_published_code():
    # golden: DINOv2's KoLeoLoss in float64
    features = wave(7, 5).requires_grad_()
    value = koleo_loss(features)
    value.backward()
    assert float(value.detach()) == pytest.approx(1.0197034795931763, rel=1e-12)
    assert float(features.grad.abs().sum()) == pytest.approx(3.9857018789341656, rel=1e-12)


def test_gradients_are_exact():
    g = torch.Generator().manual_seed(0)
    features = torch.randn(6, 3, generator=g, dtype=torch.float64, requires_grad=True)
    valid = torch.tensor([True, True, False, True, True, True])
    assert torch.autograd.gradcheck(koleo_loss, (features,))
    assert torch.autograd.gradcheck(lambda rows: koleo_loss(rows, valid=valid), (features,))


def test_rows_are_pushed_apart():
    features = torch.tensor([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.0]], requires_grad=True)
    koleo_loss(features).backward()
    assert features.grad[0, 1] < 0 < features.grad[1, 1]  # the step goes against the gradient


def test_opposite_rows_are_each_others_neighbour():
    # -1 is no mark for a row's product with itself: opposite rows have it too
    assert float(koleo_loss(torch.tensor([[1.0, 0.0], [-3.0, 0.0]]))) == pytest.approx(-math.log(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("count", [2, 3])
def test_equal_rows_are_finite_and_not_pushed(dtype, count):
    features = torch.tensor([[1.0, 2.0, 3.0]] * count + [[3.0, -1.0, 0.5]], dtype=dtype)
    features.requires_grad_()
    value = koleo_loss(features)
    value.backward()
    assert math.isfinite(float(value.detach()))
    assert features.grad.isfinite().all()
    assert features.grad.abs().max() < 10
    assert features.grad[-1].abs().max() > 0
    assert float(value.detach()) == pytest.approx(oracle(features.detach()), rel=1e-3)


def test_few_rows_and_rows_without_a_direction():
    for rows in (torch.zeros(0, 3), torch.ones(1, 3), torch.zeros(4, 3)):
        rows.requires_grad_()
        value = koleo_loss(rows)
        value.backward()
        assert float(value.detach()) == 0
        assert rows.grad.shape == rows.shape
        assert rows.grad.isfinite().all()
    rows = torch.randn(5, 3)
    rows[2] = 0
    kept = rows[[0, 1, 3, 4]]
    rows.requires_grad_()
    value = koleo_loss(rows)
    value.backward()
    assert float(value.detach()) == pytest.approx(float(koleo_loss(kept)), rel=1e-6)
    assert rows.grad[2].abs().max() == 0


def test_rows_that_do_not_count_may_be_nan_and_others_are_seen():
    rows = torch.randn(5, 3)
    rows[1] = torch.nan
    valid = torch.tensor([True, False, True, True, True])
    rows.requires_grad_()
    value = koleo_loss(rows, valid=valid)
    value.backward()
    assert rows.grad.isfinite().all()
    assert rows.grad[1].abs().max() == 0
    assert math.isnan(float(koleo_loss(rows.detach())))


@pytest.mark.parametrize("size", [1e30, 1e18, 1e-18, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_length_does_not_matter(size, dtype):
    g = torch.Generator().manual_seed(3)
    rows = torch.randn(6, 4, generator=g).to(dtype)
    scaled = (rows * size).requires_grad_()
    value = koleo_loss(scaled)
    value.backward()
    assert float(value.detach()) == pytest.approx(float(koleo_loss(rows)), rel=1e-5)
    assert scaled.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_nearest_is_found_in_float32_whatever_autocast_says(dtype):
    g = torch.Generator().manual_seed(0)
    features = torch.randn(128, 64, generator=g).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = koleo_loss(features)
    assert float(found) == pytest.approx(float(koleo_loss(features.double())), rel=1e-5)


def test_views_are_averaged_and_never_mixed():
    g = torch.Generator().manual_seed(0)
    views = [torch.randn(n, 4, generator=g) for n in (3, 5)]
    valid = [None, torch.tensor([True, True, False, True, True])]
    loss = KoLeoLoss()
    truth = (oracle(views[0]) + oracle(views[1], valid[1])) / 2
    assert float(loss(views, valid)) == pytest.approx(truth, rel=1e-5)
    assert torch.equal(loss(views[0]), koleo_loss(views[0]))
    assert torch.equal(KoLeoLoss(across_processes=True)(views, valid), loss(views, valid))


def test_layout_does_not_matter_and_nothing_is_changed():
    rows = torch.randn(5, 4)
    before = rows.clone()
    truth = koleo_loss(rows)
    assert torch.equal(koleo_loss(rows.T.contiguous().T), truth)
    assert torch.equal(koleo_loss(torch.stack([rows, rows], -1)[..., 0]), truth)
    assert torch.equal(rows, before)
    with torch.inference_mode():
        assert torch.equal(koleo_loss(rows.clone()), truth)


def test_it_compiles_whole():
    rows = torch.randn(6, 4)
    valid = torch.tensor([True, True, False, True, True, True])
    loss = KoLeoLoss()
    found = torch.compile(loss, fullgraph=True, backend="aot_eager")([rows, rows], [valid, None])
    torch.testing.assert_close(found, loss([rows, rows], [valid, None]))


@pytest.mark.parametrize(
    ("features", "valid", "text"),
    [
        (torch.randn(2, 3, 4), None, "must have 2 axes `b d`"),
        (torch.ones(3, 2).long(), None, "floating-point"),
        (torch.randn(3, 2), torch.ones(2, dtype=torch.bool), "axis `b` is 3"),
        (torch.randn(3, 2), torch.ones(3), "must be bool"),
        ([], None, "0 views"),
        (None, None, "`features` must be a list"),
        ([None], None, r"`features\[0\]` must be a tensor"),
        ([torch.randn(3, 2)], [None, None], "`valid` 2"),
    ],
)
def test_bad_input_is_refused_by_name(features, valid, text):
    with pytest.raises(ShapeError, match=text):
        KoLeoLoss()(features, valid)


@pytest.mark.parametrize("eps", [0.0, -1.0, math.nan])
def test_bad_settings_are_refused(eps):
    with pytest.raises(ConfigError, match="eps"):
        KoLeoLoss(eps)
    with pytest.raises(ConfigError, match="eps"):
        koleo_loss(torch.randn(3, 2), eps=eps)

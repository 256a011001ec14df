"""The fused prototype loss against the plain form, which multiplies the logits out."""

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from local_distill.kernels import prototype_block
from local_distill.kernels import prototype_cross_entropy as module
from local_distill.kernels.prototype_cross_entropy import prototype_cross_entropy

ALPHA, BETA = 3.0, 5.0  # reciprocals of the temperatures
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def problem(seed=0, *, b=3, s=7, t=5, c=23, d=4, e=3, k=2, dtype=torch.float64, offset=True):
    """Features, prototypes and soft answers; some tokens without answer, some never read."""
    g = torch.Generator().manual_seed(seed)
    student = torch.randn(b, s, d, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(c, d, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    teacher = torch.randn(b, t, e, generator=g, dtype=torch.float64).to(dtype)
    teacher_weight = torch.randn(c, e, generator=g, dtype=torch.float64).to(dtype)
    extra = torch.randn(c, generator=g, dtype=torch.float64) if offset else None
    index = torch.randint(0, max(1, t - 1), (b, s, k), generator=g)
    share = torch.rand(b, s, k, generator=g, dtype=torch.float64) / k
    share[:, 0] = 0.0
    return student, weight, teacher, teacher_weight, extra, index, share


def plain(student, weight, teacher, teacher_weight, offset, index, share):
    """Σ m·logsumexp(u) - p·u of the whole table, in the dtype of what is given."""
    scores = ALPHA * student @ weight.T
    probs = BETA * teacher @ teacher_weight.T
    probs = (probs if offset is None else probs + offset).softmax(-1)
    b, s, k = index.shape
    total = 0.0
    for candidate in range(k):
        rows = index[..., candidate, None].expand(b, s, probs.shape[-1])
        part = share[..., candidate, None]
        taken = torch.where(part > 0, probs.gather(1, rows), 0.0)
        total = total - (part * taken * scores.log_softmax(-1)).sum((1, 2))[..., None].sum()
    return total


def fused(*parts, **settings):
    scales = {"student_scale": torch.tensor(ALPHA), "teacher_scale": torch.tensor(BETA)}
    return prototype_cross_entropy(*parts, **scales, **settings)


def with_gradient(form, parts, **settings):
    value = form(*parts, **settings)
    return value.detach(), torch.autograd.grad(value, parts[:2])


@given(
    seed=st.integers(0, 99),
    b=st.integers(1, 4),
    s=st.integers(1, 9),
    t=st.integers(1, 7),
    c=st.integers(1, 40),
    k=st.sampled_from([1, 2, 3, 11]),
    offset=st.booleans(),
    max_bytes=st.sampled_from([1, 400, 3_000, 10**6]),
)
def test_chunks_and_tiles_of_any_size_are_as_the_plain_form(seed, b, s, t, c, k, offset, max_bytes):
    parts = problem(seed, b=b, s=s, t=t, c=c, k=k, offset=offset)
    value, gradients = with_gradient(fused, parts, max_bytes=max_bytes)
    wanted, wanted_gradients = with_gradient(plain, parts)
    torch.testing.assert_close(value, wanted, rtol=1e-10, atol=1e-12)
    for found, expected in zip(gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("max_bytes", [400, 10**6], ids=["tiles", "chunks"])
@pytest.mark.parametrize("offset", [True, False])
def test_gradcheck(max_bytes, offset):
    student, weight, *rest = problem(c=9, offset=offset)

    def loss(student, weight):
        return fused(student, weight, *rest, max_bytes=max_bytes)

    assert torch.autograd.gradcheck(loss, (student, weight))


@pytest.mark.parametrize("max_bytes", [400, 10**6], ids=["tiles", "chunks"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("learning", [True, False])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's tester looks at it
def test_the_operator_keeps_the_contract_of_custom_operators(max_bytes, dtype, learning):
    parts = list(problem(dtype=dtype))
    scales = torch.tensor(ALPHA), torch.tensor(BETA)
    if not learning:
        parts[:2] = [one.detach() for one in parts[:2]]
    # schema, registration of autograd, fake tensors, dynamic shapes: all four utilities
    found = torch.library.opcheck(
        module._fused, (*parts, *scales, max_bytes, learning, learning), rtol=1e-2, atol=1e-2
    )
    assert set(found.values()) == {"SUCCESS"}
    assert len(found) == 4


def test_it_is_differentiated_once():
    parts = problem()
    (slope,) = torch.autograd.grad(fused(*parts), parts[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="once, not twice"):
        slope.sum().backward()


def test_a_backward_may_be_repeated():
    parts = problem()
    value = fused(*parts)
    first = torch.autograd.grad(value, parts[0], retain_graph=True)[0]
    second = torch.autograd.grad(2 * value, parts[0])[0]
    torch.testing.assert_close(second, 2 * first)


@pytest.mark.parametrize("max_bytes", [3_000, 10**6], ids=["tiles", "chunks"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_at_least_as_near_to_the_truth_as_the_plain_form(dtype, max_bytes):
    parts = problem(3, c=301, d=32, e=16, dtype=dtype)
    truth = [one if one is None or not one.is_floating_point() else one.double() for one in parts]
    truth[:2] = [one.detach().requires_grad_() for one in truth[:2]]
    wanted, wanted_gradients = with_gradient(plain, truth)
    value, gradients = with_gradient(fused, parts, max_bytes=max_bytes)
    rough = [one if one is None or not one.is_floating_point() else one.to(dtype) for one in parts]
    rough[:2] = [one.detach().requires_grad_() for one in rough[:2]]
    plain_value, plain_gradients = with_gradient(plain, rough)

    def error(found, wanted):
        return float((found.double() - wanted).abs().max() / wanted.abs().max())

    rounding = {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, 1e-6)
    assert error(value, wanted) <= max(error(plain_value, wanted), rounding)
    for found, expected, other in zip(gradients, wanted_gradients, plain_gradients, strict=True):
        # a gradient in half precision is rounded once
        least = max(rounding, torch.finfo(dtype).eps)
        assert error(found, expected) <= max(error(other, expected), least)


@pytest.mark.parametrize("max_bytes", [3_000, 10**6], ids=["tiles", "chunks"])
@pytest.mark.parametrize("factor", [1.0, 1e-7], ids=["large", "small shares"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_of_half_precision_as_a_gpu_does_them(dtype, factor, max_bytes):
    """All of that path but the one product: what is rounded, and that no slope is lost."""
    student, weight, *rest, share = problem(3, c=301, d=32, e=16, dtype=dtype)
    parts = student, weight, *rest, share * factor
    wide = [one if one is None or not one.is_floating_point() else one.double() for one in parts]
    wide[:2] = [one.detach().requires_grad_() for one in wide[:2]]
    wanted, wanted_gradients = with_gradient(plain, wide)
    with mock.patch.object(module, "_product_dtype", return_value=dtype):
        value = fused(*parts, max_bytes=max_bytes)
        # as a loss scale would, so that the gradients themselves fit into float16
        gradients = torch.autograd.grad(value / factor, parts[:2])
    torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=0)
    for found, expected in zip(gradients, wanted_gradients, strict=True):
        largest = float(expected.abs().max()) / factor
        error = float((found.double() - expected / factor).abs().max())
        assert error <= 4 * torch.finfo(dtype).eps * largest


def test_rows_that_take_no_part_may_be_nan():
    student, weight, teacher, *rest = problem()
    wanted = with_gradient(fused, (student, weight, teacher, *rest))
    bad_student, bad_teacher = student.detach().clone(), teacher.clone()
    bad_student[:, 0] = torch.nan  # without answer
    bad_teacher[:, -1] = torch.inf  # never read
    found = with_gradient(fused, (bad_student.requires_grad_(), weight, bad_teacher, *rest))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert float(found[1][0][:, 0].abs().max()) == 0


def test_where_rows_cannot_be_left_out_they_are_zeroed():
    """What a device does, whose numbers of rows are not known without waiting for it."""
    student, weight, teacher, *rest = problem()
    with torch.no_grad():
        student[:, 0] = torch.nan
        teacher[:, -1] = torch.inf
    wanted = with_gradient(fused, (student, weight, teacher, *rest))

    def whole(student, teacher, index, share, dtype):
        return prototype_block._all_rows(
            *prototype_block._numbered(student, teacher, index, share, dtype)
        )

    with mock.patch.object(module, "rows_of", whole):
        found = with_gradient(fused, (student, weight, teacher, *rest))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_a_nan_that_takes_part_is_seen():
    student, weight, *rest = problem()
    with torch.no_grad():
        student[1, 2] = torch.nan
    assert fused(student, weight, *rest).isnan()
    share = rest[-1].clone()
    share[0, 1, 0] = torch.nan
    assert fused(*problem()[:-1], share).isnan()


def test_large_half_precision_logits_stay_finite():
    student, weight, teacher, teacher_weight, _, index, share = problem(dtype=torch.float16, d=4)
    with torch.no_grad():
        student.copy_(60_000.0 * student.sign())
        weight.copy_(weight.sign())
        teacher.copy_(60_000.0 * teacher.sign())
    value, gradients = with_gradient(
        fused, (student, weight, teacher, teacher_weight, None, index, share)
    )
    assert value.isfinite()
    assert gradients[0].isfinite().all()


def test_a_loss_scale_keeps_small_gradients():
    student, weight, *rest, share = problem(dtype=torch.float16)
    small = share * 1e-9  # the slopes are below float16's smallest number
    scale = 2.0**24
    (slope,) = torch.autograd.grad(fused(student, weight, *rest, small) * scale, student)
    (wanted,) = torch.autograd.grad(fused(student, weight, *rest, share), student)
    torch.testing.assert_close(slope.double(), wanted.double() * 1e-9 * scale, rtol=1e-2, atol=1e-7)
    assert float(slope.abs().max()) > 0


def peak_bytes(parts, max_bytes):
    """What torch's allocator has handed out at most at a time, gradients included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        fused(*parts, max_bytes=max_bytes).backward()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def test_memory_is_flat_in_the_batch():
    settings = {"s": 13, "t": 7, "c": 4_000, "d": 8, "e": 8}
    few, many = (peak_bytes(problem(b=b, **settings), max_bytes=21 * 4_000 * 8) for b in (2, 32))
    assert few > 20 * 4_000 * 8  # one image's scores: the record sees what is made
    assert many <= 1.1 * few  # while the table is sixteen times as large


def test_memory_is_flat_in_the_prototypes_but_for_their_gradient():
    settings = {"b": 2, "s": 13, "t": 7, "d": 2, "e": 2}
    few, many = (
        peak_bytes(problem(c=c, **settings), max_bytes=300_000) - 2 * c * 2 * 8
        for c in (4_000, 32_000)
    )
    assert many <= 1.1 * few


def test_teacher_and_shares_receive_no_gradient():
    student, weight, teacher, teacher_weight, offset, index, share = problem()
    wanting = [one.requires_grad_() for one in (teacher, teacher_weight, offset, share)]
    fused(student, weight, teacher, teacher_weight, offset, index, share).backward()
    assert all(one.grad is None for one in wanting)
    assert student.grad is not None


@pytest.mark.parametrize("who", ["student", "weight"])
def test_one_of_the_two_may_be_frozen(who):
    parts = list(problem())
    wanted = with_gradient(fused, parts)[1]
    frozen, free = (0, 1) if who == "student" else (1, 0)
    parts[frozen] = parts[frozen].detach()
    (found,) = torch.autograd.grad(fused(*parts), parts[free])
    torch.testing.assert_close(found, wanted[free])


def test_nothing_is_worked_out_for_no_gradient():
    parts = problem()
    with torch.no_grad():
        value = fused(*parts)
    assert not value.requires_grad
    torch.testing.assert_close(value, fused(*parts).detach())
    with torch.inference_mode():
        torch.testing.assert_close(fused(*parts), value)


@pytest.mark.parametrize(("b", "s", "t"), [(0, 3, 2), (2, 0, 3), (2, 3, 0)])
def test_nothing_to_compare_is_zero_with_a_graph(b, s, t):
    _, weight, _, teacher_weight, offset, _, _ = problem(b=2, s=3, t=2)
    index = torch.zeros(b, s, 2, dtype=torch.int64)
    parts = (
        torch.zeros(b, s, 4, dtype=torch.float64, requires_grad=True),
        weight,
        torch.zeros(b, t, 3, dtype=torch.float64),
        teacher_weight,
        offset,
        index,
        torch.zeros(b, s, 2, dtype=torch.float64),
    )
    value, gradients = with_gradient(fused, parts)
    assert float(value) == 0
    assert all(float(one.abs().sum()) == 0 for one in gradients)


def test_autocast_rounds_nothing():
    parts = problem(dtype=torch.float32)
    wanted = with_gradient(fused, parts)
    with torch.autocast("cpu", torch.bfloat16):
        found = with_gradient(fused, parts)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_layouts_do_not_matter():
    student, weight, teacher, teacher_weight, offset, index, share = problem()
    wanted = with_gradient(fused, (student, weight, teacher, teacher_weight, offset, index, share))
    strided = [
        student.detach().mT.contiguous().mT.requires_grad_(),
        weight.detach().T.contiguous().T.requires_grad_(),
        teacher.mT.contiguous().mT,
        teacher_weight.T.contiguous().T,
        offset,
        index.mT.contiguous().mT,
        share.mT.contiguous().mT,
    ]
    torch.testing.assert_close(with_gradient(fused, strided), wanted, rtol=1e-12, atol=1e-12)

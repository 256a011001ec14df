"""Blocks of rows and keys: the value and the gradients of the plain form, and far less memory."""

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from local_distill.kernels import log_normalizer as kernel
from local_distill.kernels.log_normalizer import log_normalizer, plain_log_normalizer


def problem(seed=0, n=6, r=9, d=4, dtype=torch.float64, images=True):
    """Rows and keys of length 1, one key that does not count, and whose image each of them is."""
    g = torch.Generator().manual_seed(seed)
    rows, keys = (
        torch.nn.functional.normalize(
            torch.randn(many, d, generator=g, dtype=torch.float64), dim=-1
        ).to(dtype)
        for many in (n, r)
    )
    valid = torch.rand(r, generator=g) > 0.2
    valid[-1:] = False
    known = {}
    if images:
        known = {
            "row_image": torch.randint(0, 3, (n,), generator=g),
            "key_image": torch.randint(-1, 3, (r,), generator=g),
        }
        known["key_image"][:1], valid[:1] = -1, True  # a key that all see
    return rows.requires_grad_(), keys.requires_grad_(), valid, known


def naive(rows, keys, temp, valid, row_image=None, key_image=None):
    """Row by row, over the keys that it sees."""
    values = []
    for i, row in enumerate(rows):
        scores = [
            row @ key / temp
            for j, key in enumerate(keys)
            if valid[j] and (row_image is None or row_image[i] != key_image[j])
        ]
        values.append(torch.stack(scores).logsumexp(0))
    return torch.stack(values)


def gradients(value, rows, keys):
    slope = torch.sin(torch.arange(len(value), dtype=value.dtype) + 1)  # each row its own factor
    return torch.autograd.grad((value * slope).sum(), (rows, keys))


@given(
    st.integers(0, 99),
    st.integers(1, 9),
    st.integers(2, 9),
    st.integers(1, 5),
    st.integers(1, 12),
    st.sampled_from([0.01, 0.2, 1.0]),
    st.sampled_from([torch.float64, torch.float32]),
    st.booleans(),
)
def test_blocks_of_any_length_are_as_the_loops(seed, n, r, d, length, temp, dtype, images):
    rows, keys, valid, known = problem(seed, n, r, d, dtype, images)
    valid[0] = True
    with mock.patch.object(kernel, "block_length", return_value=length):
        value = log_normalizer(rows, keys, temp, valid=valid, **known)
        found = gradients(value, rows, keys)
    wanted = naive(rows.double(), keys.double(), temp, valid, **known)
    rtol = 1e-9 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(value.double(), wanted, rtol=rtol, atol=rtol / temp)
    for one, two in zip(found, gradients(wanted, rows, keys), strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, two, rtol=10 * rtol, atol=10 * rtol / temp**2)
    assert bool((found[1][~valid] == 0).all())


@pytest.mark.parametrize("images", [False, True])
def test_gradients_are_exact(images):
    rows, keys, valid, known = problem(images=images)
    with mock.patch.object(kernel, "block_length", return_value=4):
        assert torch.autograd.gradcheck(
            lambda x, y: log_normalizer(x, y, 0.3, valid=valid, **known), (rows, keys)
        )


def test_a_second_backward_gives_the_same_and_a_second_derivative_is_refused():
    rows, keys, valid, known = problem()
    value = log_normalizer(rows, keys, 0.3, valid=valid, **known).sum()
    first, second = (torch.autograd.grad(value, (rows, keys), retain_graph=True) for _ in range(2))
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one, two)
    (slope,) = torch.autograd.grad(value, rows, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_keys_without_a_gradient_may_change_before_backward():
    rows, keys, valid, _ = problem(images=False)
    keys = keys.detach()
    (wanted,) = torch.autograd.grad(log_normalizer(rows, keys, 0.3, valid=valid).sum(), rows)
    value = log_normalizer(rows, keys, 0.3, valid=valid).sum()
    keys.zero_()
    assert torch.equal(torch.autograd.grad(value, rows)[0], wanted)


@pytest.mark.parametrize("length", [2, 100])
def test_rows_without_keys(length):
    rows, keys, valid, _ = problem(images=False)
    with mock.patch.object(kernel, "block_length", return_value=length):
        unseen = log_normalizer(rows, keys, 0.3, valid=torch.zeros_like(valid))
        none = log_normalizer(rows, keys[:0], 0.3, valid=valid[:0])
        empty = log_normalizer(rows[:0], keys, 0.3, valid=valid)
    assert bool((unseen < -1e300).all())
    assert bool(unseen.isfinite().all())
    assert bool((none == -torch.inf).all())
    assert empty.shape == (0,)
    for value in (unseen, none, empty):
        assert all(bool(part.isfinite().all()) for part in gradients(value, rows, keys))


def test_nan_stays_in_its_row():
    rows, keys, valid, known = problem()
    with torch.no_grad():
        rows[2] = torch.nan
    with mock.patch.object(kernel, "block_length", return_value=3):
        value = log_normalizer(rows, keys.detach(), 0.3, valid=valid, **known)
        (slope,) = torch.autograd.grad(value.sum(), rows)
    bad = torch.arange(6) == 2
    assert torch.equal(value.isnan(), bad)
    assert torch.equal(slope.isnan().any(-1), bad)


def test_autocast_rounds_neither_the_value_nor_a_gradient_taken_inside():
    rows, keys, valid, known = problem(dtype=torch.float32)
    wanted = log_normalizer(rows, keys, 0.3, valid=valid, **known)
    slopes = gradients(wanted, rows, keys)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = log_normalizer(rows, keys, 0.3, valid=valid, **known)
        found = gradients(value, rows, keys)
    assert torch.equal(value, wanted)
    for one, two in zip(found, slopes, strict=True):
        assert torch.equal(one, two)


class _Largest(TorchDispatchMode):
    """The most numbers that any tensor made meanwhile holds."""

    def __init__(self):
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for part in out if isinstance(out, tuple | list) else (out,):
            if isinstance(part, torch.Tensor):
                self.most = max(self.most, part.numel())
        return out


def test_no_table_of_all_rows_and_keys():
    rows, keys, valid, known = problem(n=300, r=500, d=3)
    short = mock.patch.object(kernel, "block_length", side_effect=lambda each, _: 2**15 // each)
    with short, _Largest() as small:
        gradients(log_normalizer(rows, keys, 0.3, valid=valid, **known), rows, keys)
    with _Largest() as large:
        gradients(plain_log_normalizer(rows, keys, 0.3, valid, **known), rows, keys)
    assert large.most == 300 * 500
    assert small.most <= 2**15 // 16


@pytest.mark.parametrize("table", [20, 2**25])
def test_a_traced_graph_has_the_same_numbers(table, monkeypatch):
    rows, keys, valid, known = problem()
    monkeypatch.setattr(kernel, "_TRACED_TABLE", table)
    compiled = torch.compile(
        lambda x, y: log_normalizer(x, y, 0.3, valid=valid, **known),
        fullgraph=True,
        backend="aot_eager",
    )
    wanted = log_normalizer(rows, keys, 0.3, valid=valid, **known)
    value = compiled(rows, keys)
    torch.testing.assert_close(value, wanted)
    for one, two in zip(gradients(value, rows, keys), gradients(wanted, rows, keys), strict=True):
        torch.testing.assert_close(one, two)


def test_transforms_of_functions_work():
    rows, keys, valid, _ = problem(images=False)
    wanted = log_normalizer(rows, keys, 0.3, valid=valid)
    each = torch.func.vmap(lambda row: log_normalizer(row[None], keys, 0.3, valid=valid)[0])(rows)
    torch.testing.assert_close(each, wanted)
    slope = torch.func.grad(lambda x: log_normalizer(x, keys, 0.3, valid=valid).sum())(rows)
    torch.testing.assert_close(slope, torch.autograd.grad(wanted.sum(), rows)[0])

"""`to_code` writes source that gives the value back."""

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from local_distill import CropGeometry, Matches, TokenGrid, Tokens, from_box
from local_distill.testing.snippets import to_code

FLOATS = [
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
    torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip
COMPLEX = [torch.complex64, torch.complex128]
INTEGERS = [
    torch.bool, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.uint8, torch.uint16, torch.uint32,
]  # fmt: skip
SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)
NAMES = {
    "torch": torch,
    "nan": math.nan,
    "inf": math.inf,
    **{kind.__name__: kind for kind in (CropGeometry, Matches, TokenGrid, Tokens)},
}


def again(value):
    return eval(to_code(value), dict(NAMES))


def same(one, other):
    """Of the same kind, shape and dtype, with the same bits (all NaN count as one)."""
    if isinstance(one, Tensor):
        if one.dtype != other.dtype or one.shape != other.shape:
            return False
        if one.is_complex():
            return same(torch.view_as_real(one), torch.view_as_real(other))
        if not one.is_floating_point():
            return torch.equal(one, other)
        one, other = one.double(), other.double()
        equal = (one == other) & (one.signbit() == other.signbit())
        return bool((equal | (one.isnan() & other.isnan())).all())
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) and math.isnan(one):
        return math.isnan(other)
    return one == other


def test_same_tells_apart():
    assert not same(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same(torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64))
    assert not same((1,), [1])
    assert not same({"a": torch.zeros(2)}, {"a": torch.zeros(1, 2)})
    assert not same(torch.zeros(0), torch.zeros(0, 2))


@given(st.data(), st.sampled_from(FLOATS), SHAPES)
def test_floats_of_any_bits(data, dtype, shape):
    count = math.prod(shape)
    numbers = data.draw(st.lists(st.floats(), min_size=count, max_size=count))
    value = torch.tensor(numbers, dtype=torch.float64).reshape(shape).to(dtype)
    assert same(again(value), value)


@given(st.data(), st.sampled_from(COMPLEX), SHAPES)
def test_complex_numbers(data, dtype, shape):
    count = math.prod(shape)
    numbers = data.draw(st.lists(st.complex_numbers(), min_size=count, max_size=count))
    value = torch.tensor(numbers, dtype=torch.complex128).reshape(shape).to(dtype)
    assert same(again(value), value)
    assert same(again(value.conj()), value.conj().resolve_conj())


@given(st.data(), st.sampled_from(INTEGERS), SHAPES)
def test_whole_numbers(data, dtype, shape):
    least, most = (
        (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    )
    count = math.prod(shape)
    numbers = data.draw(st.lists(st.integers(least, most), min_size=count, max_size=count))
    value = torch.tensor(numbers, dtype=dtype).reshape(shape)
    assert same(again(value), value)


@given(st.integers(0, 2**32 - 1))
def test_any_float32_is_given_back_by_its_decimals(bits):
    value = torch.tensor([bits - 2**31], dtype=torch.int32).view(torch.float32)
    assert same(again(value), value)
    assert len(to_code(value)) <= len("torch.tensor([-1.2345678e-38])") + 1


@pytest.mark.parametrize(
    "value",
    [
        torch.arange(12.0).reshape(3, 4).T,
        torch.tensor([1.5]).expand(3),
        torch.ones(2, requires_grad=True),
        torch.zeros(2, 0, 3, dtype=torch.int32),
        torch.tensor(math.nan),
        torch.tensor(-math.inf, dtype=torch.float64),
    ],
)
def test_layouts_and_shapes_without_numbers(value):
    assert same(again(value), value.detach())


class Part(NamedTuple):
    name: str
    pairs: tuple
    view: dict


NAMES["Part"] = Part
PLAIN = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4),
    st.sampled_from([torch.float32, torch.int64, torch.device("cpu"), torch.device("cuda:1")]),
    st.lists(st.floats(width=32), max_size=3).map(torch.tensor),
)  # fmt: skip
VALUES = st.recursive(
    PLAIN,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.tuples(st.integers(), st.text(max_size=2)), inner, max_size=2),
        st.builds(
            Part,
            st.text(max_size=3),
            st.lists(inner, max_size=2).map(tuple),
            st.dictionaries(st.integers(), inner, max_size=2),
        ),
        st.builds(Tokens, inner, st.none(), st.builds(
            TokenGrid, st.integers(), st.integers(), st.tuples(st.floats(), st.floats()), inner,
        )),
    ),
    max_leaves=8,
)  # fmt: skip


@given(VALUES)
def test_containers_in_containers(value):
    assert same(again(value), value)


def test_structures_are_laid_out_a_field_a_line():
    grid = TokenGrid.tiling(1, 2, (16, 32))
    view = Tokens(torch.ones(1, 2, 1), from_box([[0.0, 0.0, 32.0, 16.0]], (16, 32), (16, 32)), grid)
    assert same(again(view), view)
    lines = to_code(view).splitlines()
    assert lines[0] == "Tokens("
    assert lines[1] == "    features=torch.tensor([[[1.0], [1.0]]]),"
    assert lines[3].startswith("        matrix=torch.tensor(")
    assert lines[-2] == (
        "    grid=TokenGrid(rows=1, cols=2, stride=(16.0, 16.0), offset=(8.0, 8.0)),"
    )


def test_a_long_tensor_is_named_and_the_rest_stays_source():
    view = Tokens(torch.zeros(1, 5000, 1), None, TokenGrid.tiling(1, 2, (16, 32)))
    found = again(view)
    assert found.features == "a tensor of shape (1, 5000, 1) and torch.float32, too long to print"
    assert found.grid == view.grid
    assert isinstance(again(torch.zeros(4096)), Tensor)

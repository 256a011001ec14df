"""The queue of negatives is a list of the latest good keys."""

import copy
import math
from collections import deque

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from local_distill import ConfigError, ShapeError
from local_distill.losses.negative_queue import NegativeQueue


class Naive:
    """The queue as a list, newest last; float64 loops."""

    def __init__(self, num_keys):
        self.keys, self.skipped = deque(maxlen=num_keys), 0

    def update(self, keys):
        for key in keys.tolist():
            norm = math.sqrt(sum(x * x for x in key))
            if math.isfinite(norm) and norm > 0:
                self.keys.append([x / norm for x in key])
            else:
                self.skipped += 1


def in_order(queue):
    """The keys, oldest first."""
    filled = queue.keys[queue.valid]
    return filled.roll(-int(queue.position), 0) if len(filled) == queue.num_keys else filled


@given(
    st.integers(1, 7),
    st.lists(st.integers(0, 9), min_size=1, max_size=6),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.integers(0, 9999),
)
def test_it_is_a_list_of_the_latest(num_keys, batches, share_bad, seed):
    g = torch.Generator().manual_seed(seed)
    queue, naive = NegativeQueue(num_keys, 3).double(), Naive(num_keys)
    for n in batches:
        keys = torch.randn(n, 3, generator=g, dtype=torch.float64)
        for bad in (math.nan, math.inf, 0.0):
            rows = torch.rand(n, 1, generator=g) < share_bad / 3
            keys = torch.where(rows, torch.tensor([bad, 1.0 if bad else 0.0, bad]), keys)
        queue.update(keys)
        naive.update(keys)
        kept = in_order(queue)
        assert len(kept) == len(naive.keys) == int(queue.count)
        wanted = torch.tensor(list(naive.keys), dtype=torch.float64).reshape(-1, 3)
        torch.testing.assert_close(kept, wanted, rtol=1e-14, atol=1e-14)
        assert int(queue.skipped) == naive.skipped
        assert bool(queue.keys.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 1e4, 1e18, 1e-18])
def test_any_size_of_key_enters_with_length_one(dtype, scale):
    keys = torch.randn(5, 3, dtype=torch.float64) * scale
    fits = dtype != torch.float16 or 1.0 <= scale <= 1e4
    queue = NegativeQueue(8, 3)
    queue.update(keys.to(dtype))
    assert queue.keys.dtype == torch.float32
    assert int(queue.count) == (5 if fits else 0)  # beyond float16 they are infinite, or nothing
    lengths = queue.keys[queue.valid].norm(dim=-1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))


def test_what_is_too_large_for_the_state_does_not_enter():
    queue = NegativeQueue(4, 2)
    queue.update(torch.tensor([[1e300, 1.0], [1.0, 1.0]], dtype=torch.float64))
    assert (int(queue.count), int(queue.skipped)) == (1, 1)


def test_random_directions_fill_it_as_published():
    queue = NegativeQueue(6, 3)
    queue.update(torch.randn(6, 3))
    assert (int(queue.count), int(queue.position)) == (6, 0)


@pytest.mark.parametrize("cast", [torch.nn.Module.half, lambda m: m.to(torch.bfloat16)])
def test_it_stays_float32_in_half_precision(cast):
    queue = NegativeQueue(4, 2)
    queue.update(torch.tensor([[1.0, 3.0]]))
    before = queue.keys.clone()
    cast(queue)
    assert queue.keys.dtype == torch.float32
    assert torch.equal(queue.keys, before)
    assert queue.double().keys.dtype == torch.float64


def test_the_keys_are_no_part_of_a_graph_and_stay_as_they_were():
    queue = NegativeQueue(4, 2)
    keys = torch.tensor([[3.0, 4.0]], requires_grad=True)
    queue.update(keys)
    assert not queue.keys.requires_grad
    assert keys.tolist() == [[3.0, 4.0]]


def test_a_checkpoint_goes_on_alike():
    first, second = NegativeQueue(5, 2), NegativeQueue(5, 2)
    first.update(torch.randn(4, 2))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    third = copy.deepcopy(first)
    keys = torch.randn(3, 2)
    keys[1] = math.nan
    for queue in (first, second, third):
        queue.update(keys)
    for queue in (second, third):
        for name, part in first.state_dict().items():
            assert torch.equal(part, queue.state_dict()[name]), name


def test_nothing_waits_for_the_device():
    with FakeTensorMode():  # raises wherever a value would be looked at
        queue = NegativeQueue(5, 2)
        queue.update(torch.randn(4, 2))
        assert queue.valid.shape == (5,)


def test_what_does_not_fit_is_refused_and_changes_nothing():
    queue = NegativeQueue(4, 3)
    for keys, text in (
        (torch.randn(2, 4), "made for dim=3"),
        (torch.randn(2, 1, 3), "2 axes `n d`"),
        (torch.ones(2, 3).long(), "floating-point"),
        ([[1.0, 2.0, 3.0]], "must be a tensor"),
    ):
        with pytest.raises(ShapeError, match=text):
            queue.update(keys)
    assert int(queue.count) == 0
    for settings in ({"num_keys": 0}, {"dim": 0}, {"num_keys": 2.0}):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            NegativeQueue(**settings)


def test_it_prints_its_settings():
    assert repr(NegativeQueue(4, 3)) == "NegativeQueue(num_keys=4, dim=3)"

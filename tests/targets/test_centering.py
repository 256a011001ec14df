import copy
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from local_distill import Centering, ConfigError, ShapeError


@given(st.integers(1, 3), st.integers(1, 4), st.booleans(), st.floats(0, 0.99), st.integers(0, 99))
def test_the_center_is_the_ema_of_the_mean(views, c, local, momentum, seed):
    g = torch.Generator().manual_seed(seed)
    targets = Centering(c, momentum).double()
    center = [0.0] * c
    for _ in range(3):
        logits = [
            torch.randn((2, 3 + view, c) if local else (2, c), generator=g, dtype=torch.float64)
            for view in range(views)
        ]
        rows = [row for view in logits for row in view.reshape(-1, c).tolist()]
        for j in range(c):
            mean = sum(row[j] for row in rows) / len(rows)
            center[j] = momentum * center[j] + (1 - momentum) * mean
        targets.update(logits)
        assert targets.center.tolist() == pytest.approx(center)
    for view, found in zip(logits, targets(logits, teacher_temp=0.3), strict=True):
        wanted = ((view - torch.tensor(center, dtype=torch.float64)) / 0.3).softmax(-1)
        torch.testing.assert_close(found.probs(), wanted)


def test_rows_that_are_not_valid_do_not_count():
    targets = Centering(2, momentum=0.0)
    logits = torch.tensor([[[1.0, 2.0], [torch.nan, 9.0]], [[3.0, 4.0], [5.0, 6.0]]])
    valid = torch.tensor([[True, False], [True, True]])
    targets.update([logits], [valid])
    assert targets.center.tolist() == [3.0, 4.0]
    assert int(targets.skipped) == 0
    targets.update([logits], [torch.zeros(2, 2, dtype=torch.bool)])
    assert targets.center.tolist() == [3.0, 4.0]


def test_forward_changes_nothing():
    targets = Centering(3)
    before = copy.deepcopy(targets.state_dict())
    targets([torch.randn(2, 3)], teacher_temp=0.1)
    assert all(torch.equal(before[k], v) for k, v in targets.state_dict().items())


def test_an_update_after_use_does_not_change_the_targets():
    targets = Centering(3, momentum=0.0)
    logits = [torch.randn(2, 3)]
    made = targets(logits, teacher_temp=0.1)[0]
    before = made.probs()
    targets.update(logits)
    assert torch.equal(made.probs(), before)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_non_finite_numbers_never_enter(bad, dtype):
    targets = Centering(3)
    good = torch.randn(4, 3).to(dtype)
    targets.update([good])
    before = copy.deepcopy(targets.state_dict())
    dirty = good.clone()
    dirty[2, 1] = bad
    targets.update([dirty])
    assert torch.equal(targets.center, before["center"])
    assert int(targets.skipped) == 1
    with targets.accumulate():
        targets.update([dirty])
    assert all(v.isfinite().all() for v in targets.state_dict().values())
    targets.update([good])
    assert int(targets.skipped) == 2
    assert not torch.equal(targets.center, before["center"])


def test_large_half_precision_sums_do_not_overflow():
    # 12,544 tokens of mean logit 8 sum to 100,352, which float16 does not hold
    targets = Centering(2, momentum=0.0)
    targets.update([torch.full((64, 196, 2), 8.0, dtype=torch.float16)])
    assert targets.center.tolist() == [8.0, 8.0]
    targets.update([torch.full((64, 196, 2), -60000.0, dtype=torch.float16)])
    assert targets.center.tolist() == pytest.approx([-60000.0] * 2, rel=1e-3)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_accumulation_is_one_step_of_the_whole(sizes):
    batches = [torch.randn(n, 3) for n in sizes]
    whole, parts = Centering(3), Centering(3)
    whole.update([torch.cat(batches)])
    for number, batch in enumerate(batches):
        with parts.accumulate(number < len(batches) - 1):
            before = parts.center.clone()
            parts.update([batch])
            assert number == len(batches) - 1 or torch.equal(parts.center, before)
    torch.testing.assert_close(parts.center, whole.center)
    assert float(parts._count) == 0


def test_state_goes_on_from_a_checkpoint_in_the_middle_of_accumulation():
    a, b, c = (torch.randn(4, 3) for _ in range(3))
    one = Centering(3)
    one.update([a])
    with one.accumulate():
        one.update([b])
    two = Centering(3)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    three = copy.deepcopy(one)
    for targets in (one, two, three):
        targets.update([c])
    assert torch.equal(one.center, two.center)
    assert torch.equal(one.center, three.center)


def test_half_leaves_the_state_in_float32():
    targets = Centering(3)
    targets.update([torch.randn(4, 3)])
    before = targets.center.clone()
    targets.half().to(torch.bfloat16)
    assert targets.center.dtype == torch.float32
    assert torch.equal(targets.center, before)
    assert targets.double().center.dtype == torch.float64


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_update_compiles(backend):
    plain, targets = Centering(3), Centering(3)
    compiled = torch.compile(targets.update, fullgraph=True, backend=backend)
    for bad in (0.0, torch.nan, 0.0):
        logits = [torch.randn(2, 4, 3) + bad]
        compiled(logits)
        plain.update(logits)
    torch.testing.assert_close(targets.center, plain.center)
    assert int(targets.skipped) == 1


def test_bad_settings_and_shapes_are_refused():
    with pytest.raises(ConfigError, match="num_prototypes"):
        Centering(0)
    with pytest.raises(ConfigError, match="momentum"):
        Centering(3, momentum=1.0)
    targets = Centering(3)
    with pytest.raises(ShapeError, match="must be a list"):
        targets.update(torch.randn(2, 3))
    with pytest.raises(ShapeError, match=r"axis `c` is 4 in `teacher_logits\[1\]`"):
        targets.update([torch.randn(2, 3), torch.randn(2, 4)])
    with pytest.raises(ShapeError, match="floating-point"):
        targets.update([torch.ones(2, 3).long()])
    with pytest.raises(ShapeError, match="`valid` has 2 views"):
        targets.update([torch.randn(2, 3)], [None, None])
    with pytest.raises(ShapeError, match=r"`valid\[0\]` must be bool, got torch.float32"):
        targets.update([torch.randn(2, 3)], [torch.ones(2)])
    with pytest.raises(ConfigError, match="teacher_temp"):
        targets([torch.randn(2, 3)], teacher_temp=0.0)


def test_a_bad_micro_batch_is_counted_on_all_ranks_alike():
    """Which of them met it is known to it alone until the step, where sums are reduced."""
    targets = Centering(2, momentum=0.0)
    with targets.accumulate():
        targets.update([torch.full((3, 2), torch.nan)])
        targets.update([torch.ones(1, 2)])
    assert int(targets.skipped) == 0

    def with_another_rank(values, group):
        # its sum over 2 rows is (6, 8), and it left out one micro-batch as well
        return values + torch.tensor([6.0, 8.0, 2.0, 1.0])

    with mock.patch("local_distill.targets.centering.all_reduce_sum", with_another_rank):
        targets.update([torch.full((1, 2), 2.0)])
    torch.testing.assert_close(targets.center, torch.tensor([9.0 / 4, 11.0 / 4]))
    assert int(targets.skipped) == 2
    targets.update([torch.ones(1, 2)])
    assert int(targets.skipped) == 2

"""Several processes are one: loss, gradient and centers as of the whole batch."""

import functools
from pathlib import Path

import pytest
import torch
from helpers.processes import said_by_all

from local_distill import Centering, GlobalDistillationLoss, LocalDistillationLoss, Matches

SCRIPT = Path(__file__).with_name("process_worker.py")


def whole_batch(total, normalize, c=5):
    """Loss, gradients and centers in one process; the same numbers the workers draw."""
    g = torch.Generator().manual_seed(3)
    student = torch.randn(total, 4, c, generator=g, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(total, 6, c, generator=g, dtype=torch.float64)
    weight = torch.rand(total, 4, 2, generator=g, dtype=torch.float64) / 2
    weight[::2, 1] = 0
    index = torch.randint(0, 6, (total, 4, 2), generator=g)
    local = LocalDistillationLoss(Centering(c).double(), normalize=normalize)
    whole = GlobalDistillationLoss(Centering(c).double())
    for _ in range(2):
        value = local([student], [teacher], {(0, 0): Matches(index, weight, weight[..., 0])},
                      teacher_temp=0.2)  # fmt: skip
        value = value + whole([student[:, 0]], [teacher[:, 0]], teacher_temp=0.2, pairs=[(0, 0)])
    value.backward()
    return value.detach(), student.grad, local.targets.center, whole.targets.center


CASES = [
    ([8], "matched", -1),
    ([4, 4], "all", -1),
    ([6, 2], "matched", -1),
    ([7, 1], "image", -1),
    ([8, 0], "matched", -1),
    ([3, 3, 2], "matched", -1),
    ([2, 2, 2, 2], "image", -1),
    ([2, 2], "matched", 1),
]


@functools.cache  # to start processes takes longer than all that they do
def results_of(ranks):
    """The cases of so many processes, and of each case what every rank says."""
    cases = [case for case in CASES if len(case[0]) == ranks]
    said = said_by_all(SCRIPT, ranks, ranks=ranks, cases=cases)
    return cases, list(zip(*said, strict=True))


def result_of(case):
    cases, results = results_of(len(case[0]))
    return results[cases.index(case)]


@pytest.mark.parametrize("case", [case for case in CASES if case[2] < 0], ids=str)
def test_processes_agree_with_one(case):
    sizes, normalize, _ = case
    value, gradient, local_center, global_center = whole_batch(sum(sizes), normalize)
    results = result_of(case)
    assert len(results) == len(sizes)
    for result in results:
        assert result["value"] == pytest.approx(float(value), rel=1e-9)
        # to the bit on all ranks, and as of one process up to the order of summation
        assert result["centers"] == results[0]["centers"]
        assert result["centers"][0] == pytest.approx(local_center.tolist(), rel=1e-9)
        assert result["centers"][1] == pytest.approx(global_center.tolist(), rel=1e-9)
    assert results[0]["eval"] == pytest.approx(results[0]["alone"], rel=1e-9)
    # gradients are averaged over the processes by data-parallel wrappers
    shares = torch.cat(
        [torch.tensor(r["gradient"], dtype=torch.float64).reshape(-1, 4, 5) for r in results]
    )
    torch.testing.assert_close(shares / len(sizes), gradient)


def test_nan_on_one_rank_is_seen_by_all_and_enters_no_state():
    for result in result_of(([2, 2], "matched", 1)):
        assert result["value"] != result["value"]
        assert all(abs(v) < 100 for center in result["centers"] for v in center)
        assert result["skipped"] == [2, 2]

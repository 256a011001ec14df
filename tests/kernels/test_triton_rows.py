"""The kernels over rows of logits, interpreted: float64's numbers, and what they must not read."""

import pytest
import torch
from helpers.compiled import compiled_launches
from helpers.interpreted import interpreted, needs_triton

from local_distill.kernels.row_tables import Rows
from local_distill.kernels.triton_rows import (
    answered_rows,
    row_norms,
    scale_in_place,
    slope_in_place,
)

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


class Problem:
    """Student and teacher views, and candidates; rows of image 0 come first, then those of 1."""

    def __init__(self, b=2, s=(3, 4), t=(5, 2), c=97, k=2, dtype=torch.float32, scale=1.0, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.student = [(scale * torch.randn(b, n, c, generator=g)).to(dtype) for n in s]
        self.teacher = [(scale * torch.randn(b, n, c, generator=g)).to(dtype) for n in t]
        self.offset = torch.randn(c, generator=g)
        self.number = torch.randint(0, b * sum(t), (b * sum(s), k), generator=g)
        self.share = torch.rand(b * sum(s), k, generator=g) / k
        self.share[torch.rand(self.share.shape, generator=g) < 0.2] = 0.0
        self.share[0] = 0.0

    def run(self, offset=True, factor=None, student_temp=0.1, teacher_temp=0.07, slope=None):
        """(n,) losses and the gradients (b, s, c) of the views."""
        student, teacher = Rows.of(self.student), Rows.of(self.teacher)
        shift = None
        if offset:
            shift = Rows.of([self.offset.expand(one.shape) for one in self.teacher])
        read = torch.zeros(len(teacher.start), dtype=torch.bool)
        read[self.number[self.share != 0]] = True
        norms = row_norms(teacher, teacher_temp, shift, read)
        slopes = [torch.full_like(one, torch.nan) for one in self.student]
        target = Rows.of(slopes if slope is None else slope)
        losses = answered_rows(
            *(student, student_temp, teacher, norms, teacher_temp, shift),
            *(self.number, self.share, target, factor),
        )
        return losses, slopes

    def truth(self, offset=True, student_temp=0.1, teacher_temp=0.07):
        """The same in float64."""
        student = joined(self.student).double().requires_grad_()
        scores = joined(self.teacher).double() / teacher_temp
        if offset:
            scores = scores + self.offset.double()
        share = self.share.double()
        kept = (share != 0)[..., None]
        answer = torch.where(kept, scores.softmax(-1)[self.number], 0.0) * share[..., None]
        logs = (student / student_temp).log_softmax(-1)
        losses = -(answer.sum(1) * torch.where((share.sum(1) != 0)[:, None], logs, 0.0)).sum(-1)
        losses.sum().backward()
        return losses.detach(), student.grad


def joined(views):
    return torch.cat(views, 1).flatten(0, 1)


def near(values, wanted, dtype=torch.float32):
    step = 4 * torch.finfo(dtype).eps
    least = 1e-5 * wanted.abs().max()
    torch.testing.assert_close(values.double(), wanted, rtol=max(step, 2e-5), atol=float(least))


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_loss_and_gradient_are_those_of_float64(k, offset, dtype):
    problem = Problem(k=k, dtype=dtype)
    losses, slopes = problem.run(offset)
    wanted, gradient = problem.truth(offset)
    near(losses, wanted)
    near(joined(slopes), gradient, dtype)


@interpreted
@pytest.mark.parametrize(("n", "m", "c"), [(41, 401, 1271), (1, 1, 1), (3, 2, 4096), (2, 3, 4097)])
def test_odd_sizes(n, m, c):
    problem = Problem(b=1, s=(n,), t=(m,), c=c, k=2, dtype=torch.float16)
    losses, slopes = problem.run()
    wanted, gradient = problem.truth()
    near(losses, wanted)
    near(joined(slopes), gradient, torch.float16)


@interpreted
@pytest.mark.parametrize("block", [16, 64])
def test_a_row_of_many_blocks(block):
    from unittest import mock

    from local_distill.kernels import triton_rows

    problem = Problem(b=1, c=203, k=3)
    with mock.patch.object(triton_rows, "_block", return_value=block):
        losses, slopes = problem.run()
    wanted, gradient = problem.truth()
    near(losses, wanted)
    near(joined(slopes), gradient)


@interpreted
def test_rows_of_any_strides():
    problem = Problem(c=96)
    for side in (problem.student, problem.teacher):
        side[0] = side[0].transpose(0, 1).contiguous().transpose(0, 1)
        side[1] = torch.cat((side[1], side[1]), 2)[..., 5:101]
    problem.teacher[1] = problem.teacher[1][:1].expand(2, -1, -1)
    losses, slopes = problem.run()
    wanted, gradient = problem.truth()
    near(losses, wanted)
    near(joined(slopes), gradient)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_no_weight_refers_to_is_not_read(dtype):
    problem = Problem(dtype=dtype)
    wanted, slopes = problem.run()
    unanswered = problem.share.sum(1) == 0
    unread = torch.ones(14, dtype=torch.bool)
    unread[problem.number[problem.share != 0]] = False
    assert unanswered.any()
    assert unread.any()
    for views, gone, per_image in ((problem.student, unanswered, 7), (problem.teacher, unread, 7)):
        gone = gone.view(2, per_image)
        first = 0
        for view in views:
            view[gone[:, first : first + view.shape[1]]] = torch.nan
            first += view.shape[1]
    problem.number[problem.share == 0] = 10**12  # whatever the index
    losses, again = problem.run()
    torch.testing.assert_close(losses, wanted, rtol=0, atol=0)
    for one, two in zip(again, slopes, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)
    assert not losses[unanswered].any()
    assert not joined(again)[unanswered].any()


@interpreted
def test_a_weight_of_nan_is_seen():
    problem = Problem()
    problem.share[1, 0] = torch.nan
    losses, _ = problem.run()
    assert losses[1].isnan()
    assert losses[2:].isfinite().all()


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_finite_for_the_largest_logits_of_float16(dtype):
    problem = Problem(dtype=dtype)
    for view in (*problem.student, *problem.teacher):
        view.copy_(view.float().sign() * 60000)
    for offset in (True, False):
        losses, slopes = problem.run(offset, teacher_temp=0.04)
        wanted, gradient = problem.truth(offset, teacher_temp=0.04)
        assert losses.isfinite().all()
        assert joined(slopes).isfinite().all()
        # An offset is added in float32, as in the plain form, to scores of 1.5 million: ± 1/16.
        loose = 0.1 if offset else 1e-3
        torch.testing.assert_close(losses.double(), wanted, rtol=loose, atol=1e-5)
        torch.testing.assert_close(joined(slopes).double(), gradient, rtol=loose, atol=loose)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_in_place_of_the_logits(dtype):
    problem = Problem(dtype=dtype)
    wanted, slopes = problem.run()
    losses, _ = problem.run(slope=problem.student)
    assert torch.equal(losses, wanted)
    for one, two in zip(problem.student, slopes, strict=True):
        assert torch.equal(one, two)


@interpreted
def test_a_block_of_scores_becomes_its_slope():
    problem = Problem(b=1, s=(7,), t=(5,))
    wanted, gradient = problem.truth(offset=False, student_temp=1, teacher_temp=1)
    scores, teacher = problem.student[0][0], problem.teacher[0][0]
    number = torch.where(problem.share != 0, problem.number, 5)  # the fused loss says so of none
    near(slope_in_place(scores, teacher, number, problem.share), wanted)
    near(scores, gradient)


@interpreted
def test_a_factor_comes_before_the_rounding():
    problem = Problem(dtype=torch.float16)
    problem.share *= 1e-8
    _, lost = problem.run()
    _, slopes = problem.run(factor=torch.tensor(2.0**24))
    _, gradient = problem.truth()
    near(joined(slopes), 2.0**24 * gradient, torch.float16)
    assert int((joined(lost) != 0).sum()) < int((joined(slopes) != 0).sum())


@interpreted
def test_norms_of_rows_that_are_not_kept_are_not_worked_out():
    problem = Problem()
    problem.teacher[0][0, 0] = torch.nan
    keep = torch.ones(14, dtype=torch.bool)
    keep[0] = False
    norms = row_norms(Rows.of(problem.teacher), 0.5, None, keep)
    sums = norms.peak / 0.5 + norms.log_sum
    near(sums[1:], (joined(problem.teacher).double() / 0.5).logsumexp(-1)[1:])
    assert sums[0] == 0


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [1.0, -2.5])
def test_scaling_in_place(factor, dtype):
    values = torch.randn(3, 5, 1271).to(dtype).transpose(0, 1)
    wanted = (values.float() * factor).to(dtype)
    scale_in_place(values, torch.tensor(factor))
    torch.testing.assert_close(values, wanted)  # the interpreter rounds bfloat16 towards zero
    assert torch.equal(values, wanted) or dtype == torch.bfloat16


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 3])
def test_kernels_compile_for_a_gpu(k, dtype, tmp_path):
    problem = Problem(c=4096, k=k, dtype=dtype)
    with compiled_launches(tmp_path) as launches:
        problem.run()
        problem.run(offset=False, factor=torch.tensor(2.0))
        scale_in_place(problem.student[0], torch.tensor(2.0))
    assert [one.metadata.name for one in launches] == [
        *("_norm_kernel", "_answered_kernel") * 2,
        "_scale_kernel",
    ]
    for kernel in launches:
        assert ".target sm_90" in kernel.asm["ptx"]
        assert kernel.asm["cubin"][:4] == b"\x7fELF"
        # rows that are known to be aligned are read 16 bytes at a time
        assert "ld.global" in kernel.asm["ptx"]
        assert ".v4.b32" in kernel.asm["ptx"]
        assert "st.local" not in kernel.asm["ptx"]


@needs_triton
def test_kernels_of_odd_rows_compile_for_a_gpu(tmp_path):
    problem = Problem(c=41, k=2, dtype=torch.bfloat16)
    with compiled_launches(tmp_path) as launches:
        problem.run()
    assert all(kernel.asm["cubin"][:4] == b"\x7fELF" for kernel in launches)
    assert len(launches) == 2

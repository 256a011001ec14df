"""The local loss by kernels over rows, interpreted: the plain form's loss and gradient."""

from unittest import mock

import pytest
import torch
from helpers.compiled import compiled_launches
from helpers.interpreted import interpreted, needs_triton

from local_distill import Centering, LocalDistillationLoss, Matches, TeacherTargets
from local_distill.kernels import paired_cross_entropy, use_triton
from local_distill.kernels.paired_cross_entropy import AnsweredView, blockwise_cross_entropy
from local_distill.kernels.triton_cross_entropy import cross_entropy_by_rows, rows_serve

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
PAIRS = [(0, 1), (1, 0), (2, 0), (2, 1)]


def problem(b=2, c=37, counts=(4, 6, 3), k=2, dtype=torch.float32, teacher=None, scale=1.0):
    """Student views of several sizes, teacher views, and soft matches with rows of no mass."""
    g = torch.Generator().manual_seed(0)
    offset = torch.randn(c, generator=g)
    student = [(2 * torch.randn(b, s, c, generator=g)).to(dtype).requires_grad_() for s in counts]
    targets = {
        q: TeacherTargets(
            torch.randn(b, counts[q], c, generator=g).to(teacher or dtype), offset, 0.5
        )
        for q in (0, 1)
    }
    answers = {v: [] for v in range(len(counts))}
    for v, q in PAIRS:
        index = torch.randint(0, counts[q], (b, counts[v], k), generator=g)
        weight = torch.rand(b, counts[v], k, generator=g) / k
        weight[:, 0] = 0
        shares = scale * torch.rand(b, generator=g).double()
        answers[v].append((q, Matches(index, weight, weight.sum(2)), shares))
    return student, [AnsweredView(one, answers[v]) for v, one in enumerate(student)], targets


def run(student, views, targets, factor=1.0, *, triton):
    with use_triton(triton):
        value = blockwise_cross_entropy(views, targets, 0.3)
        gradients = torch.autograd.grad(value * factor, student)
    return value.detach(), gradients


def close(one, two):
    torch.testing.assert_close(one[0], two[0], rtol=1e-5, atol=1e-6)
    for ours, plain in zip(one[1], two[1], strict=True):
        assert ours.dtype == plain.dtype
        torch.testing.assert_close(ours, plain)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 2, 4])
def test_as_the_plain_form(k, dtype):
    given = problem(k=k, dtype=dtype)
    with mock.patch.object(paired_cross_entropy, "_walk", side_effect=AssertionError):
        found = run(*given, factor=-1.5, triton=True)
    close(found, run(*given, factor=-1.5, triton=False))


@interpreted
@pytest.mark.parametrize("change", ["mixed", "no offset", "one offset a view", "strided", "frozen"])
def test_other_inputs_as_the_plain_form(change):
    student, views, targets = problem(teacher=torch.float16 if change == "mixed" else None)
    if change == "no offset":
        targets = {q: one._replace(offset=None) for q, one in targets.items()}
    if change == "one offset a view":
        targets[1] = targets[1]._replace(offset=torch.randn(74)[::2])
    if change == "strided":
        targets[1] = targets[1]._replace(logits=targets[1].logits.mT.contiguous().mT)
    if change == "frozen":
        views[0] = views[0]._replace(logits=views[0].logits.detach())
        student = student[1:]
    with mock.patch.object(paired_cross_entropy, "_walk", side_effect=AssertionError):
        found = run(student, views, targets, triton=True)
    close(found, run(student, views, targets, triton=False))


@interpreted
def test_loss_scaling_saves_small_gradients_of_float16():
    given = problem(dtype=torch.float16, scale=1e-7)
    lost = run(*given, triton=True)
    kept = run(*given, factor=2.0**16, triton=True)
    close(kept, run(*given, factor=2.0**16, triton=False))
    for small, one in zip(lost[1], kept[1], strict=True):
        assert int((one != 0).sum()) > int((small != 0).sum())


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_second_backward_gives_the_same(dtype):
    student, views, targets = problem(dtype=dtype)
    with use_triton(True):
        value = blockwise_cross_entropy(views, targets, 0.3)
        one, two = (torch.autograd.grad(value, student, retain_graph=True) for _ in range(2))
    for first, second in zip(one, two, strict=True):
        torch.testing.assert_close(first, second)


@interpreted
def test_what_no_match_refers_to_stays_out():
    student, views, targets = problem(k=1)
    wanted = run(student, views, targets, triton=True)
    with torch.no_grad():
        for logits in student:
            logits[:, 0] = torch.nan  # rows of no mass
        read = torch.zeros(2, 6, dtype=torch.bool)
        for _, answers in views:
            for q, found, _ in answers:
                if q == 1:
                    read[:, :].scatter_(1, found.teacher_index[:, 1:, 0], True)
        assert not read.all()
        targets[1].logits[~read] = torch.nan
    close(run(student, views, targets, triton=True), wanted)


@interpreted
def test_the_local_loss_takes_the_kernels():
    loss = LocalDistillationLoss(Centering(37))
    student, views, _ = problem()
    matches = {(v, q): found for v, view in enumerate(views) for q, found, _ in view.answers}
    teacher = [torch.randn(2, s, 37) for s in (4, 6)]
    values = []
    for triton in (True, False):
        with (
            use_triton(triton),
            mock.patch.object(
                paired_cross_entropy, "_walk", wraps=paired_cross_entropy._walk
            ) as plain,
        ):
            values.append(loss.eval()(student, teacher, matches, teacher_temp=0.1))
        assert plain.called is not triton
    torch.testing.assert_close(*values)


def test_what_the_kernels_do_not_take():
    _, views, targets = problem()
    assert rows_serve(views, targets)
    _, doubles, wide = problem(dtype=torch.float64)
    assert not rows_serve(doubles, targets)
    assert not rows_serve(views, wide)
    assert not rows_serve(problem(k=9)[1], targets)  # so many are a product of matrices
    assert not rows_serve(problem(k=0)[1], targets)
    assert not rows_serve([views[0]._replace(logits=views[0].logits.mT.contiguous().mT)], targets)
    mixed = {0: targets[0], 1: targets[1]._replace(offset=None)}
    assert not rows_serve(views, mixed)
    assert not rows_serve(views, {0: targets[0], 1: targets[1]._replace(temp=0.1)})
    for sizes in ({"b": 0}, {"c": 0}):
        _, empty, nothing = problem(**sizes)
        assert not rows_serve(empty, nothing)


@needs_triton
def test_two_launches_serve_a_step(tmp_path):
    student, views, targets = problem(c=64)
    with compiled_launches(tmp_path) as launches, torch.no_grad():
        cross_entropy_by_rows(views, targets, 0.3, [torch.empty_like(one) for one in student], None)
    assert [one.metadata.name for one in launches] == ["_norm_kernel", "_answered_kernel"]

"""Every dtype, with autocast and without, many shapes and layouts, against float64 oracles.

The loss is held to plain loops over Python's floats, the gradient to float64's autograd of one
log_softmax and one gather a pair.
"""

import itertools

import pytest
import torch

from local_distill import Centering, GlobalDistillationLoss, LocalDistillationLoss, Matches
from local_distill.losses import MaskedDistillationLoss
from local_distill.testing import oracles

STUDENT_TEMP, TEACHER_TEMP = 0.1, 0.07
# images, student tokens, teacher tokens, candidates, prototypes, size of the logits
SHAPES = [
    (2, 1, 1, 1, 1, 1),
    (2, 1, 1, 1, 2, 1),
    (2, 4, 6, 1, 5, 1),
    (2, 6, 4, 1, 5, 1),
    (3, 9, 4, 1, 7, 1),
    (2, 3, 5, 2, 4, 1),
    (2, 3, 5, 5, 4, 1),
    (2, 2, 12, 12, 3, 1),
    (5, 1, 3, 1, 3, 1),
    (2, 7, 1, 1, 3, 1),
    (3, 2, 2, 1, 33, 1),
    (2, 5, 5, 3, 17, 1),
    (1, 4, 4, 1, 6, 1),
    (2, 4, 6, 1, 5, 10),
    (2, 6, 4, 4, 5, 10),
    (3, 3, 3, 1, 2, 10),
    (2, 4, 6, 1, 5, 100),
    (2, 6, 4, 2, 9, 100),
    (2, 3, 3, 3, 5, 100),
    (2, 4, 6, 1, 5, 2000),
    (3, 2, 5, 2, 8, 2000),
    (2, 5, 2, 1, 3, 2000),
    (2, 4, 6, 1, 5, 20_000),
    (2, 3, 4, 3, 7, 20_000),
]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
NORMALIZE = ["all", "matched", "image"]


def drawn(number, dtype, strided):
    b, s, t, k, c, size = SHAPES[number]
    g = torch.Generator().manual_seed(number)

    def logits(n):
        values = (size * torch.randn(b, n, c, generator=g)).clamp(-60_000, 60_000).to(dtype)
        return values.mT.contiguous().mT if strided else values

    index = torch.randint(0, t, (b, s, k), generator=g)
    weight = torch.rand(b, s, k, generator=g) / k
    weight[:, ::3] = 0
    weight[0, 0] = 1 / k
    return logits(s), logits(t), Matches(index, weight, weight.sum(-1))


def true_gradient(student, teacher, matches, normalize):
    """Of one pair, from a form that shares nothing with the loss."""
    s = student.double().requires_grad_()
    probs = (teacher.double() / TEACHER_TEMP).softmax(-1)
    weight = matches.weight.double()
    rows = matches.teacher_index.flatten(1)[..., None].expand(-1, -1, s.shape[2])
    target = probs.gather(1, rows).unflatten(1, weight.shape[1:])
    target = (target * weight[..., None]).sum(2)
    cross = -(target * (s / STUDENT_TEMP).log_softmax(-1)).sum(-1)
    if normalize == "all":
        value = cross.mean()
    elif normalize == "matched":
        value = cross.sum() / weight.sum()
    else:
        mass = weight.sum((1, 2))
        value = (cross.sum(1) / torch.where(mass > 0, mass, 1.0)).mean()
    return torch.autograd.grad(value, s)[0]


def assert_close(value, gradient, student, truth, slope):
    size = max(1.0, float(student.detach().double().abs().max()) / STUDENT_TEMP)
    assert abs(float(value.detach()) - truth) <= 1e-5 * size
    assert gradient.dtype == student.dtype
    # of what the dtype can hold, beside the float32 that it is worked out in
    eps = max(torch.finfo(student.dtype).eps, 1e-5 if student.dtype != torch.float64 else 1e-9)
    largest = float(slope.abs().max())
    torch.testing.assert_close(
        gradient.double(), slope, rtol=2 * eps, atol=2 * eps * max(largest, 1e-2)
    )


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestGrid:
    def run(self, loss, student, autocast):
        student.requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            value = loss(student)
        assert value.dtype == torch.promote_types(student.dtype, torch.float32)
        return value, torch.autograd.grad(value, student)[0]

    @pytest.mark.parametrize("normalize", NORMALIZE)
    def test_local(self, dtype, autocast, strided, normalize):
        for number in range(len(SHAPES)):
            student, teacher, matches = drawn(number, dtype, strided)
            truth = oracles.local_loss(
                [student],
                [teacher],
                {(0, 0): matches},
                center=[0.0] * student.shape[2],
                student_temp=STUDENT_TEMP,
                teacher_temp=TEACHER_TEMP,
                normalize=normalize,
            )
            loss = LocalDistillationLoss(
                Centering(student.shape[2]), student_temp=STUDENT_TEMP, normalize=normalize
            )
            value, gradient = self.run(
                lambda s: loss([s], [teacher], {(0, 0): matches}, teacher_temp=TEACHER_TEMP),  # noqa: B023
                student,
                autocast,
            )
            slope = true_gradient(student.detach(), teacher, matches, normalize)
            assert_close(value, gradient, student, truth, slope)

    def test_global(self, dtype, autocast, strided):
        for number in range(len(SHAPES)):
            student, teacher, _ = drawn(number, dtype, strided)
            student, teacher = student[:, 0].detach(), teacher[:, 0]
            b, c = student.shape
            whole = Matches.identity(torch.ones(b, 1, dtype=torch.bool))
            truth = oracles.local_loss(
                [student[:, None]],
                [teacher[:, None]],
                {(0, 0): whole},
                center=[0.0] * c,
                student_temp=STUDENT_TEMP,
                teacher_temp=TEACHER_TEMP,
            )
            loss = GlobalDistillationLoss(Centering(c), student_temp=STUDENT_TEMP)
            value, gradient = self.run(
                lambda s: loss([s], [teacher], teacher_temp=TEACHER_TEMP, pairs=[(0, 0)]),  # noqa: B023
                student,
                autocast,
            )
            slope = true_gradient(student.detach()[:, None], teacher[:, None], whole, "all")[:, 0]
            assert_close(value, gradient, student, truth, slope)

    def test_masked(self, dtype, autocast, strided):
        for number in range(len(SHAPES)):
            student, _, matches = drawn(number, dtype, strided)
            c = student.shape[2]
            teacher = student.detach().roll(1, -1)
            valid = matches.matched
            same = Matches.identity(valid)
            truth = oracles.local_loss(
                [student],
                [teacher],
                {(0, 0): same},
                center=[0.0] * c,
                student_temp=STUDENT_TEMP,
                teacher_temp=TEACHER_TEMP,
                normalize="image",
            )
            loss = MaskedDistillationLoss(Centering(c), student_temp=STUDENT_TEMP)
            value, gradient = self.run(
                lambda s: loss([s], [teacher], [valid], teacher_temp=TEACHER_TEMP),  # noqa: B023
                student,
                autocast,
            )
            slope = true_gradient(student.detach(), teacher, same, "image")
            assert_close(value, gradient, student, truth, slope)


def test_the_grid_is_one():
    assert len(SHAPES) >= 24
    assert len(set(SHAPES)) == len(SHAPES)
    assert len(list(itertools.product(DTYPES, (False, True), (False, True)))) == 16

"""The losses' values and gradients against naive float64 loops."""

import math

import pytest
import torch
from helpers import oracles
from helpers.strategies import matches_for
from hypothesis import given
from hypothesis import strategies as st

from local_distill import (
    Centering,
    GlobalDistillationLoss,
    LocalDistillationLoss,
    Matches,
    TeacherTargets,
    local_distillation_loss,
)

NORMALIZATIONS = ["all", "matched", "image"]


@given(
    st.data(),
    st.integers(2, 3),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(1, 6),
    st.sampled_from(NORMALIZATIONS),
    st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
)
def test_one_pair_is_the_oracles(data, b, s, t, c, normalize, dtype):
    matches = data.draw(matches_for(b, s, t))
    scale = data.draw(st.sampled_from([1.0, 10.0, 100.0]))
    student = (torch.randn(b, s, c) * scale).to(dtype)
    teacher = (torch.randn(b, t, c) * scale).to(dtype)
    center = torch.randn(c, dtype=torch.float64)
    targets = TeacherTargets(teacher, -center / 0.07, 0.07)
    found = local_distillation_loss(
        student, targets, matches, student_temp=0.1, normalize=normalize
    )
    losses, masses = oracles.token_cross_entropies(
        student.double(), teacher.double(), matches.teacher_index, matches.weight.double(),
        center.tolist(), 0.1, 0.07,
    )  # fmt: skip
    truth = oracles.normalized(losses, masses, normalize)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    largest = float(student.double().abs().max()) / 0.1
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    # near-ties of the sharpened teacher move with float32's rounding of logits / 0.07
    slack = 0.0 if dtype == torch.float64 else 30 * float(teacher.double().abs().max()) / 0.07
    assert float(found) == pytest.approx(
        truth, abs=max(1.0, largest) * tolerance * (1 + slack * 1e-2)
    )


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_many_views_are_the_mean_over_pairs(normalize):
    g = torch.Generator().manual_seed(0)
    c, tokens = 5, [4, 6, 3]
    student = [torch.randn(2, n, c, generator=g, dtype=torch.float64) for n in tokens]
    teacher = [torch.randn(2, n, c, generator=g, dtype=torch.float64) for n in tokens[:2]]
    matches = {}
    for v, q in [(0, 1), (1, 0), (2, 0), (2, 1)]:
        s, t = tokens[v], tokens[q]
        weight = torch.rand(2, s, 2, generator=g, dtype=torch.float64) / 2
        weight[:, 0] = 0
        index = torch.randint(0, t, (2, s, 2), generator=g)
        matches[v, q] = Matches(index, weight, torch.zeros(2, s))
    matches[0, 1].weight.zero_()  # a pair without any match gives 0, and still counts as a pair
    loss = LocalDistillationLoss(Centering(c).double(), student_temp=0.2, normalize=normalize)
    loss.targets.center.copy_(torch.randn(c, generator=g, dtype=torch.float64))
    center = loss.targets.center.tolist()
    total = 0.0
    for (v, q), found in matches.items():
        pair = oracles.token_cross_entropies(
            student[v], teacher[q], found.teacher_index, found.weight, center, 0.2, 0.05
        )
        total += oracles.normalized(*pair, normalize)
    value = loss.eval()(student, teacher, matches, teacher_temp=0.05)
    assert float(value) == pytest.approx(total / 4, rel=1e-12)


@given(st.integers(2, 3), st.integers(2, 4), st.integers(1, 3), st.integers(1, 5))
def test_the_global_loss_is_dinos(b, views, teachers, c):
    g = torch.Generator().manual_seed(b + 10 * views)
    student = [torch.randn(b, c, generator=g, dtype=torch.float64) for _ in range(views)]
    teacher = [torch.randn(b, c, generator=g, dtype=torch.float64) for _ in range(teachers)]
    loss = GlobalDistillationLoss(Centering(c).double(), student_temp=0.1).eval()
    loss.targets.center.copy_(torch.randn(c, generator=g, dtype=torch.float64))
    total, pairs = 0.0, 0
    for q in range(teachers):
        for v in range(views):
            if v == q:
                continue
            probs = ((teacher[q] - loss.targets.center) / 0.04).softmax(-1)
            total += float(-(probs * (student[v] / 0.1).log_softmax(-1)).sum(-1).mean())
            pairs += 1
    value = loss(student, teacher, teacher_temp=0.04)
    assert float(value) == pytest.approx(total / pairs, rel=1e-9)


def some_step(c=5, requires_grad=True, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    student = [torch.randn(2, n, c, generator=g, dtype=dtype) for n in (4, 3)]
    teacher = [torch.randn(2, 4, c, generator=g, dtype=dtype)]
    for logits in (*student, *teacher):
        logits.requires_grad_(requires_grad)
    index = torch.randint(0, 4, (2, 3, 2), generator=g)
    weight = torch.rand(2, 3, 2, generator=g, dtype=dtype) / 2
    weight[0, 1] = 0
    matches = {(1, 0): Matches(index, weight, torch.zeros(2, 3))}
    return student, teacher, matches


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_gradients_are_exact(normalize):
    student, teacher, matches = some_step()
    loss = LocalDistillationLoss(Centering(5).double(), normalize=normalize).eval()

    def of(logits):
        return loss([None, logits], teacher, matches, teacher_temp=0.5)

    assert torch.autograd.gradcheck(of, (student[1],))
    whole = GlobalDistillationLoss(Centering(5).double(), student_temp=0.7).eval()
    a = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    b = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    target = torch.randn(2, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, y: whole([x, y], [target], teacher_temp=0.5, pairs=[(0, 0), (1, 0)]), (a, b)
    )


def test_the_teacher_never_receives_a_gradient():
    student, teacher, matches = some_step()
    loss = LocalDistillationLoss(Centering(5))
    loss(student, teacher, matches, teacher_temp=0.04).backward()
    assert teacher[0].grad is None
    assert student[1].grad is not None
    assert student[0].grad is None  # no pair names it
    flat = [part[:, 0].detach().requires_grad_() for part in student]
    answer = teacher[0][:, 0].detach().requires_grad_()
    GlobalDistillationLoss(Centering(5))(flat, [answer], teacher_temp=0.04).backward()
    assert answer.grad is None
    assert flat[1].grad is not None


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_unmatched_tokens_may_be_nan(normalize):
    student, teacher, matches = some_step(requires_grad=False)
    clean = LocalDistillationLoss(Centering(5), normalize=normalize)
    value = clean.eval()(student, teacher, matches, teacher_temp=0.04)
    dirty = student[1].clone()
    dirty[0, 1] = torch.nan  # the token without a match
    dirty.requires_grad_()
    again = clean([None, dirty], teacher, matches, teacher_temp=0.04)
    assert float(again.detach()) == pytest.approx(float(value))
    again.backward()
    assert dirty.grad.isfinite().all()
    assert dirty.grad[0, 1].abs().max() == 0


def test_no_match_at_all_is_zero_with_a_graph():
    student, teacher, matches = some_step()
    matches[1, 0].weight.zero_()
    for normalize in NORMALIZATIONS:
        loss = LocalDistillationLoss(Centering(5), normalize=normalize)
        for chosen in (matches, {}):
            value = loss(student, teacher, chosen, teacher_temp=0.04)
            assert float(value.detach()) == 0
            value.backward()
    assert student[1].grad.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [2000.0, 60000.0])
@pytest.mark.parametrize("autocast", [False, True])
def test_huge_logits_stay_finite_and_right(dtype, size, autocast):
    g = torch.Generator().manual_seed(0)
    student = (torch.randn(2, 3, 4, generator=g).sign() * size).to(dtype).requires_grad_()
    teacher = (torch.randn(2, 3, 4, generator=g).sign() * size).to(dtype)
    matches = Matches.identity(torch.ones(2, 3, dtype=torch.bool))
    targets = TeacherTargets(teacher, None, 0.04)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = local_distillation_loss(student, targets, matches)
    logs = (student.detach().double() / 0.1).log_softmax(-1)
    truth = -((teacher.double() / 0.04).softmax(-1) * logs).sum(-1).mean()
    assert float(found.detach()) == pytest.approx(float(truth), rel=1e-5)
    found.backward()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("layout", ["strided", "expanded", "channels_last"])
def test_layout_does_not_matter(layout):
    g = torch.Generator().manual_seed(0)
    plain = torch.randn(2, 3, 4, generator=g)
    matches = Matches.identity(torch.ones(2, 3, dtype=torch.bool))
    if layout == "strided":
        other = torch.stack([plain, plain * 0], -1)[..., 0]
    elif layout == "expanded":
        plain = plain[:, :1].expand(2, 3, 4)
        other, plain = plain, plain.contiguous()
    else:
        other = plain.transpose(1, 2).contiguous().transpose(1, 2)
    targets = TeacherTargets(other, None, 0.04)
    truth = local_distillation_loss(plain, TeacherTargets(plain, None, 0.04), matches)
    assert torch.equal(local_distillation_loss(other, targets, matches), truth)


def test_one_prototype_has_no_loss():
    matches = Matches.identity(torch.ones(2, 3, dtype=torch.bool))
    targets = TeacherTargets(torch.randn(2, 3, 1), None, 0.04)
    assert float(local_distillation_loss(torch.randn(2, 3, 1), targets, matches)) == 0


@pytest.mark.parametrize("b", [0, 1])
def test_small_batches(b):
    student = torch.randn(b, 3, 4, requires_grad=True)
    matches = Matches.identity(torch.ones(b, 3, dtype=torch.bool))
    for normalize in NORMALIZATIONS:
        loss = LocalDistillationLoss(Centering(4), normalize=normalize)
        value = loss([student], [torch.randn(b, 3, 4)], {(0, 0): matches}, teacher_temp=0.04)
        assert math.isfinite(float(value.detach()))
        assert (float(value.detach()) == 0) == (b == 0)
        value.backward()
        assert loss.targets.center.isfinite().all()
    whole = GlobalDistillationLoss(Centering(4))
    views = [torch.randn(b, 4, requires_grad=True) for _ in range(2)]
    value = whole(views, [view.detach() for view in views], teacher_temp=0.04)
    value.backward()
    assert math.isfinite(float(value.detach()))


def test_inference_mode_inputs():
    with torch.inference_mode():
        teacher = [torch.randn(2, 4, 5)]
    student, _, matches = some_step(dtype=torch.float32)
    loss = LocalDistillationLoss(Centering(5))
    loss(student, teacher, matches, teacher_temp=0.04).backward()
    assert student[1].grad.isfinite().all()
    assert loss.targets.center.abs().max() > 0


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles(backend):
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend(backend)
    plain, loss = LocalDistillationLoss(Centering(5)), LocalDistillationLoss(Centering(5))
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for seed in range(4):
        student, teacher, matches = some_step(dtype=torch.float32, seed=seed)
        value = compiled(student, teacher, matches, teacher_temp=0.04)
        value.backward()
        other, _, _ = some_step(dtype=torch.float32, seed=seed)
        truth = plain(other, teacher, matches, teacher_temp=0.04)
        truth.backward()
        torch.testing.assert_close(value, truth)
        torch.testing.assert_close(student[1].grad, other[1].grad)
        torch.testing.assert_close(loss.targets.center, plain.targets.center)
    assert counter.frame_count <= 2
    whole = GlobalDistillationLoss(Centering(5))
    views = [torch.randn(2, 5) for _ in range(3)]
    found = torch.compile(whole, fullgraph=True, backend=backend)(
        views, views[:2], teacher_temp=0.1
    )
    truth = GlobalDistillationLoss(Centering(5))(views, views[:2], teacher_temp=0.1)
    torch.testing.assert_close(found, truth)

"""The monitors: numbers of naive loops, and what they say of models that really collapse."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from local_distill import Centering, EmaTeacher, GlobalDistillationLoss, ShapeError, TeacherTargets
from local_distill.kernels import byte_budget
from local_distill.losses.monitors import DistillationMonitors, distillation_monitors
from local_distill.targets import SinkhornKnopp


def naive(targets, features=None, valid=None):
    """All numbers in plain loops over Python's floats."""
    rows = []
    for view, (logits, offset, temp) in enumerate(targets):
        c = logits.shape[-1]
        keep = None if valid is None or valid[view] is None else valid[view].flatten().tolist()
        shift = [0.0] * c if offset is None else offset.tolist()
        for i, row in enumerate(logits.double().reshape(-1, c).tolist()):
            scores = [value / temp + more for value, more in zip(row, shift, strict=True)]
            # -inf is no fault of a row: this prototype has no part of it
            wrong = any(map(math.isnan, scores)) or max(scores) == math.inf
            if (keep is None or keep[i]) and not wrong:
                parts = [math.exp(value - max(scores)) for value in scores]
                rows.append([part / sum(parts) for part in parts])
    n = len(rows)
    mean = [sum(row[j] for row in rows) / n for j in range(c)]
    entropy = sum(map(entropy_of, rows)) / n
    used = {max(range(c), key=row.__getitem__) for row in rows}
    found = {
        "teacher_entropy": entropy,
        "teacher_kl": math.log(c) - entropy,
        "marginal_entropy": entropy_of(mean),
        "information": entropy_of(mean) - entropy,
        "prototype_usage": len(used) / c,
        "effective_usage": math.exp(entropy_of(mean)) / c,
    }
    if features is not None:
        units = []
        for view, part in enumerate(features):
            d = part.shape[-1]
            keep = None if valid is None or valid[view] is None else valid[view].flatten().tolist()
            for i, row in enumerate(part.double().reshape(-1, d).tolist()):
                length = math.sqrt(sum(value * value for value in row))
                if (keep is None or keep[i]) and math.isfinite(length) and length > 0:
                    units.append([value / length for value in row])
        stds = []
        for k in range(d):
            middle = sum(unit[k] for unit in units) / len(units)
            stds.append(math.sqrt(sum((unit[k] - middle) ** 2 for unit in units) / len(units)))
        found["feature_std"] = math.sqrt(d) * sum(stds) / d
    return found


def entropy_of(probs):
    return -sum(p * math.log(p) for p in probs if p > 0)


def numbers_of(*args, **kwargs):
    return {name: float(v) for name, v in distillation_monitors(*args, **kwargs).as_dict().items()}


@st.composite
def steps(draw):
    """Targets and features of views of different sizes, and which tokens count; float64."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    b, c, d = draw(st.integers(1, 3)), draw(st.integers(1, 7)), draw(st.integers(1, 5))
    local = draw(st.booleans())
    sizes = [draw(st.integers(2, 5)) for _ in range(draw(st.integers(1, 3)))]
    shapes = [(b, n) if local else (n,) for n in sizes]
    logits = [2 * torch.randn(*shape, c, generator=g, dtype=torch.float64) for shape in shapes]
    features = [torch.randn(*shape, d, generator=g, dtype=torch.float64) + 1 for shape in shapes]
    kind = draw(st.sampled_from([Centering, SinkhornKnopp]))
    targets = kind(c).double()
    targets.update([part + 0.5 for part in logits])
    valid = [torch.rand(shape, generator=g) > 0.3 for shape in shapes]
    for keep in valid:
        keep.view(-1)[0] = True
    valid[-1] = draw(st.sampled_from([valid[-1], None]))
    temp = draw(st.sampled_from([0.04, 0.3, 1.0]))
    return targets(logits, teacher_temp=temp), features, draw(st.sampled_from([valid, None]))


@given(steps())
def test_are_the_numbers_of_the_loops(step):
    targets, features, valid = step
    found = distillation_monitors(targets, features, valid)
    assert all(number.dtype == torch.float64 and number.dim() == 0 for number in found)
    wanted = naive(*step)
    assert list(found.as_dict("a/")) == ["a/" + name for name in wanted]
    assert numbers_of(*step) == pytest.approx(wanted, rel=1e-9, abs=1e-12)
    without = numbers_of(targets, valid=valid)
    del wanted["feature_std"]
    assert without == pytest.approx(wanted, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_and_single_precision(dtype):
    g = torch.Generator().manual_seed(0)
    logits = [3 * torch.randn(3, n, 33, generator=g).to(dtype) for n in (7, 5)]
    features = [(torch.randn(3, 7, 9, generator=g) + 2).to(dtype)]
    targets = Centering(33)(logits, teacher_temp=0.5)
    found = distillation_monitors(targets, features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = distillation_monitors(targets, features)
    assert all(number.dtype == torch.float32 for number in found)
    assert all(torch.equal(one, two) for one, two in zip(found, cast, strict=True))
    wanted = naive(targets, features)
    assert numbers_of(targets, features) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_extreme_numbers_stay_finite(dtype):
    logits = [torch.tensor([[6e4, -6e4, 0.0], [-6e4, 6e4, 0.0]], dtype=dtype)]
    found = numbers_of(Centering(3)(logits, teacher_temp=0.04))
    assert found["teacher_entropy"] == 0
    assert found["marginal_entropy"] == pytest.approx(math.log(2))
    x = torch.randn(50, 4)
    for scale in (1e18, 1e-18):
        found = distillation_monitors(Centering(3)(logits, teacher_temp=1.0), [x * scale])
        torch.testing.assert_close(
            found.feature_std, torch.tensor(naive([(logits[0], None, 1.0)], [x])["feature_std"])
        )


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_bad_rows_do_not_count(bad):
    logits, features = torch.randn(2, 3, 4), torch.randn(2, 3, 5)
    dirty, spoilt = logits.clone(), features.clone()
    dirty[1, 0, 2] = bad
    spoilt[0, 2, 1] = bad
    spoilt[1, 1] = 0.0
    targets = [TeacherTargets(dirty, None, 0.3)]
    found = numbers_of(targets, [spoilt])
    assert found == pytest.approx(naive(targets, [spoilt]), rel=1e-5)
    assert all(map(math.isfinite, found.values()))
    if bad == -torch.inf:
        return
    keep = torch.ones(2, 3, dtype=torch.bool)
    keep[1, 0] = False
    clean = numbers_of([TeacherTargets(logits, None, 0.3)], valid=[keep])
    del found["feature_std"]
    assert found == pytest.approx(clean, rel=1e-6)


@pytest.mark.parametrize("b", [0, 2])
def test_where_nothing_counts_all_is_zero(b):
    targets = [TeacherTargets(torch.randn(b, 3, 4), None, 0.1)]
    none = [torch.zeros(b, 3, dtype=torch.bool)]
    found = numbers_of(targets, [torch.randn(b, 3, 5)], none)
    assert found == dict.fromkeys(DistillationMonitors._fields, 0.0)


def test_known_answers():
    flat = numbers_of([TeacherTargets(torch.zeros(6, 8), None, 0.1)], [torch.ones(6, 3)])
    assert flat["teacher_entropy"] == pytest.approx(math.log(8))
    assert flat["teacher_kl"] == pytest.approx(0, abs=1e-6)
    assert flat["effective_usage"] == pytest.approx(1)
    assert flat["information"] == pytest.approx(0, abs=1e-6)
    assert flat["feature_std"] == pytest.approx(0, abs=1e-6)
    one = numbers_of([TeacherTargets(torch.eye(8)[:1].repeat(6, 1), None, 0.001)])
    assert one["teacher_entropy"] == one["marginal_entropy"] == one["information"] == 0
    assert one["teacher_kl"] == pytest.approx(math.log(8))
    assert one["prototype_usage"] == one["effective_usage"] == pytest.approx(1 / 8)
    even = numbers_of([TeacherTargets(torch.eye(8), None, 0.001)], [torch.randn(5000, 16)])
    assert even["prototype_usage"] == 1
    assert even["effective_usage"] == pytest.approx(1)
    assert even["information"] == pytest.approx(math.log(8))
    assert even["feature_std"] == pytest.approx(1, abs=0.02)


def test_features_that_are_all_but_equal():
    # near collapse the square of the mean is a million times the variance
    features = [torch.ones(40, 6) + 1e-3 * torch.randn(40, 6)]
    targets = [TeacherTargets(torch.zeros(40, 2), None, 0.1)]
    found = numbers_of(targets, features)["feature_std"]
    assert found == pytest.approx(naive(targets, features)["feature_std"], rel=1e-3)
    assert found < 2e-3


def test_many_tokens_in_blocks():
    logits, valid = torch.randn(3, 500, 400).half(), torch.rand(3, 500) > 0.5
    assert logits.numel() * 16 > byte_budget(logits.device)
    probs = (logits[valid].double() / 0.2).softmax(-1)
    found = distillation_monitors([TeacherTargets(logits, None, 0.2)], valid=[valid])
    for number, wanted in (
        (found.teacher_entropy, torch.special.entr(probs).sum(-1).mean()),
        (found.marginal_entropy, torch.special.entr(probs.mean(0)).sum()),
    ):
        torch.testing.assert_close(number.double(), wanted, rtol=1e-6, atol=0)
    assert float(found.prototype_usage) == pytest.approx(len(probs.argmax(-1).unique()) / 400)


def test_no_gradient_and_inputs_are_left_alone():
    logits = torch.randn(2, 3, 4, requires_grad=True)
    features = torch.randn(3, 2, 5, requires_grad=True).transpose(0, 1)
    before = logits.detach().clone(), features.detach().clone()
    found = distillation_monitors([TeacherTargets(logits, None, 0.1)], [features])
    assert not any(number.requires_grad for number in found)
    assert torch.equal(logits, before[0])
    assert torch.equal(features, before[1])
    with torch.inference_mode():
        frozen = before[0].clone()
    again = distillation_monitors([TeacherTargets(frozen, None, 0.1)], [features])
    assert all(torch.equal(one, two) for one, two in zip(found, again, strict=True))


def test_runs_where_no_value_can_be_read():
    # fake tensors have shapes only: whatever asks for a value, as a host sync does, raises
    with FakeTensorMode():
        targets = Centering(4)([torch.zeros(2, 3, 4)], teacher_temp=0.1)
        valid = [torch.ones(2, 3, dtype=torch.bool)]
        found = distillation_monitors(targets, [torch.zeros(2, 3, 5)], valid)
    assert all(number.shape == () for number in found)


def test_compiles():
    torch.compiler.reset()
    compiled = torch.compile(distillation_monitors, fullgraph=True, backend="aot_eager")
    targets = Centering(4)([torch.randn(2, 3, 4)], teacher_temp=0.1)
    valid, features = [torch.rand(2, 3) > 0.3], [torch.randn(2, 3, 5)]
    for one, two in zip(
        compiled(targets, features, valid),
        distillation_monitors(targets, features, valid),
        strict=True,
    ):
        torch.testing.assert_close(one, two)


def test_bad_input_is_refused_by_name():
    target = TeacherTargets(torch.randn(2, 3, 4), None, 0.1)
    keep = torch.ones(2, 3, dtype=torch.bool)
    features = torch.randn(2, 3, 5)
    for message, arguments in (
        ("wrap it as", [target]),
        ("`teacher_targets` must be a list", [target.logits]),
        ("`teacher_targets` is empty", [[]]),
        (r"`teacher_targets\[0\]` must be a TeacherTargets, got Tensor", [[target.logits]]),
        (r"axis `c` is 4 in .* but 5 in `teacher_targets\[1\].logits`",
         [[target, target._replace(logits=features)]]),
        ("floating-point", [[target._replace(logits=target.logits.long())]]),
        ("axis `c` is 0", [[target._replace(logits=features[..., :0])]]),
        ("`valid` has 2 views but `teacher_targets` has 1", [[target], None, [keep, keep]]),
        (r"`valid\[0\]` must have shape \(2, 3\)", [[target], None, [keep[:1]]]),
        (r"`valid\[0\]` must be bool", [[target], None, [keep.float()]]),
        ("`features` must be a list", [[target], features]),
        ("`features` is empty", [[target], []]),
        (r"axis `d` is 5 in `features\[0\]` but 6", [[target], [features, torch.ones(2, 6)]]),
        (r"`valid\[0\]` must have shape \(2, 4\) as `features\[0\]`",
         [[target], [torch.ones(2, 4, 5)], [keep]]),
        ("`valid` has 1 views but `features` has 2", [[target], [features] * 2, [keep]]),
    ):  # fmt: skip
        with pytest.raises(ShapeError, match=message):
            distillation_monitors(*arguments)


class Softmax(nn.Module):
    """Targets with neither centering nor anything else against collapse."""

    def forward(self, teacher_logits, *, teacher_temp, valid=None):
        return [TeacherTargets(logits.detach(), None, teacher_temp) for logits in teacher_logits]

    def update(self, teacher_logits, valid=None):
        pass


class Network(nn.Module):
    """Points to features and prototype logits."""

    def __init__(self, c):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(6, 32), nn.GELU(), nn.Linear(32, 8))
        self.head = nn.Linear(8, c)

    def forward(self, points):
        features = self.backbone(points)
        return features, self.head(nn.functional.normalize(features, dim=-1))


C = 16


def trained(targets, teacher_temp, seed, steps=100):
    """Monitors of the first and of the last step of a small model that learns from noisy views.

    The points lie in 8 clusters, and the head prefers one prototype a little from the start.
    """
    torch.manual_seed(seed)
    places = 2 * torch.randn(8, 6)
    student = Network(C)
    with torch.no_grad():
        student.head.bias[0] += 0.3
    teacher = EmaTeacher(student)
    loss = GlobalDistillationLoss(targets, student_temp=0.1)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2, weight_decay=0.0)
    found = []
    for step in range(steps):
        views = [places.repeat(8, 1) + 0.5 * torch.randn(64, 6) for _ in range(2)]
        logits = [student(view)[1] for view in views]
        answers = [teacher(view) for view in views]
        taught = [answer[1] for answer in answers]
        if step in (0, steps - 1):
            made = targets(taught, teacher_temp=teacher_temp)
            found.append(numbers_of(made, [answer[0] for answer in answers]))
        optimizer.zero_grad()
        loss(logits, taught, teacher_temp=teacher_temp).backward()
        optimizer.step()
        teacher.update(student, momentum=0.9)
    return found


@pytest.mark.parametrize("seed", [3, 4])
@pytest.mark.parametrize("targets", [Softmax(), Centering(C)], ids=["softmax", "centering"])
def test_collapse_to_the_uniform_distribution_is_seen(targets, seed):
    # a teacher softer than the student, with and without a center
    before, after = trained(copy.deepcopy(targets), 0.5, seed)
    assert before["teacher_kl"] > 0.05
    assert before["feature_std"] > 0.6
    assert after["teacher_kl"] < 0.005
    assert after["teacher_entropy"] > math.log(C) - 0.005
    assert after["information"] < 0.005
    assert after["effective_usage"] > 0.99  # all evenly, and yet nothing is told
    assert after["feature_std"] < 0.6 * before["feature_std"]


@pytest.mark.parametrize("seed", [3, 4])
def test_collapse_to_one_prototype_is_seen(seed):
    # a sharp teacher without a center
    before, after = trained(Softmax(), 0.04, seed)
    assert before["prototype_usage"] > 2 / C
    assert before["information"] > 0.1
    assert after["prototype_usage"] == 1 / C
    assert after["effective_usage"] < 1.01 / C
    assert after["marginal_entropy"] < 0.01
    assert after["information"] < 0.01
    assert after["teacher_kl"] > math.log(C) - 0.01  # sure of one prototype, the same for all


@pytest.mark.parametrize("seed", [3, 4])
@pytest.mark.parametrize("kind", [Centering, SinkhornKnopp])
def test_what_keeps_from_collapse_is_seen_as_well(kind, seed):
    _, after = trained(kind(C), 0.04, seed)
    assert after["teacher_kl"] > 1.0
    assert after["information"] > 1.0  # of log 8 = 2.08 that would tell the clusters apart
    assert after["prototype_usage"] >= 4 / C
    assert after["effective_usage"] > 0.2
    assert after["feature_std"] > 0.7

"""NeCo's consistency of order against naive float64 loops and the published code."""

import itertools
import math

import pytest
import torch
from helpers.order_oracle import comparators
from hypothesis import given
from hypothesis import strategies as st

from local_distill import ConfigError, Matches, ShapeError
from local_distill.losses import patch_order
from local_distill.losses.patch_order import PatchOrderLoss, soft_sort

NETWORKS = ["bitonic", "odd_even"]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def oracle_sort(scores, steepness, network):
    """Sorted numbers and the permutation [from][to], swap by swap."""
    x, size = list(scores), len(scores)
    table = [[float(i == j) for j in range(size)] for i in range(size)]
    for _, low, high in sorted(comparators(network, size)):
        keep = math.atan(steepness * (x[high] - x[low])) / math.pi + 0.5
        x[low], x[high] = (
            keep * x[low] + (1 - keep) * x[high], keep * x[high] + (1 - keep) * x[low],
        )  # fmt: skip
        for row in table:
            row[low], row[high] = (
                keep * row[low] + (1 - keep) * row[high], keep * row[high] + (1 - keep) * row[low],
            )  # fmt: skip
    return x, table


@pytest.mark.parametrize("network", NETWORKS)
@given(st.integers(1, 13), st.floats(1.0, 300.0), st.integers(0, 2**31))
def test_soft_sort_is_the_oracle(network, size, steepness, seed):
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, size, generator=g, dtype=torch.float64)
    ordered, permutation = soft_sort(scores, steepness=steepness, network=network)
    for row in range(2):
        truth = oracle_sort(scores[row].tolist(), steepness, network)
        assert ordered[row].tolist() == pytest.approx(truth[0], abs=1e-9)
        table = torch.tensor(truth[1], dtype=torch.float64)
        torch.testing.assert_close(permutation[row], table, atol=1e-12, rtol=1e-9)
    for axis in (-1, -2):
        torch.testing.assert_close(permutation.sum(axis), torch.ones(2, size, dtype=torch.float64))
    # what stands at each place is the mean that its column says
    torch.testing.assert_close((scores[:, None] @ permutation)[:, 0], ordered)


@pytest.mark.parametrize("network", NETWORKS)
def test_the_networks_sort(network):
    # a network that sorts all zeros and ones sorts everything (Knuth's 0-1 principle)
    for size in range(1, 11):
        rows = torch.tensor(list(itertools.product([0.0, 1.0], repeat=size)), dtype=torch.float64)
        ordered, _ = soft_sort(rows, steepness=1e12, network=network)
        torch.testing.assert_close(ordered, rows.sort(-1).values, atol=1e-9, rtol=0)
    for size in (31, 33, 49, 50):
        rows = (torch.rand(60, size, dtype=torch.float64) > torch.rand(60, 1)).double()
        ordered, _ = soft_sort(rows, steepness=1e12, network=network)
        torch.testing.assert_close(ordered, rows.sort(-1).values, atol=1e-8, rtol=0)


def oracle(student, teacher, references, matches, steepness, network):
    """The loss, loop by loop."""

    def cosine(a, b):
        lengths = math.hypot(*a) * math.hypot(*b)
        return sum(x * y for x, y in zip(a, b, strict=True)) / lengths if lengths else 0.0

    total = count = 0.0
    for image in range(student.shape[0]):
        anchors = (references[image] if references.dim() == 3 else references).double().tolist()
        for i in range(student.shape[1]):
            weights = matches.weight[image, i].double().tolist()
            mass = sum(weights)
            if mass == 0:
                continue
            answer = [0.0] * teacher.shape[2]
            for j, w in zip(matches.teacher_index[image, i].tolist(), weights, strict=True):
                for c in range(len(answer)):
                    answer[c] += w * float(teacher[image, j, c]) if w else 0.0
            row = student[image, i].double().tolist()
            ours = oracle_sort([cosine(row, r) for r in anchors], steepness[0], network)[1]
            theirs = oracle_sort([cosine(answer, r) for r in anchors], steepness[1], network)[1]
            for ps, qs in zip(ours, theirs, strict=True):
                total -= mass * sum(q * math.log(p) for p, q in zip(ps, qs, strict=True))
            count += mass * len(anchors)
    return total / count if count else 0.0


def some_matches(g, b, s, t):
    weight = torch.rand(b, s, 2, generator=g, dtype=torch.float64) / 2
    weight = weight * (torch.rand(b, s, 1, generator=g) > 0.3)
    return Matches(torch.randint(0, t, (b, s, 2), generator=g), weight, torch.zeros(b, s))


@given(
    st.integers(0, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 6),
    st.sampled_from(NETWORKS), st.sampled_from(DTYPES), st.booleans(), st.integers(0, 2**31),
)  # fmt: skip
def test_the_loss_is_the_oracle(b, s, t, r, network, dtype, own, seed):
    g = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(b, n, 3, generator=g).to(dtype) for n in (s, t))
    references = torch.randn(*([b, r] if own else [r]), 3, generator=g).to(dtype)
    matches = some_matches(g, b, s, t)
    loss = PatchOrderLoss(student_steepness=20.0, teacher_steepness=40.0, network=network)
    found = loss(student, teacher, references, matches)
    truth = oracle(student, teacher, references, matches, (20.0, 40.0), network)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    assert float(found) == pytest.approx(truth, rel=tolerance, abs=tolerance)


def wave(*shape, start=0.0):
    count = math.prod(shape)
    return ((torch.arange(count).double() + start) * 1.7).sin().reshape(shape) * 1.5


@pytest.mark.parametrize(
    ("network", "value", "gradient"),
    [
        ("bitonic", 1.4903704922779548, 6.774404849674657),
        ("odd_even", 1.3102525734333081, 5.787624884076329),
    ],
)
@pytest.mark.parametrize("blocks", [False, True])
def test_the_published_code(monkeypatch, network, value, gradient, blocks):
    # golden: NeCo's permutation matrices of cosines (diffsort 0.2.0, steepness 100) and its
    # cross-entropy, float64
    if blocks:
        monkeypatch.setattr(patch_order, "_BLOCK_BYTES", 5 * 3 * 10 * 81 * 8)
    student = wave(2, 9, 5).requires_grad_()
    teacher, references = wave(2, 9, 5, start=0.1), wave(2, 9, 5, start=40.0)
    found = PatchOrderLoss(network=network)(student, teacher, references)
    found.backward()
    assert float(found.detach()) == pytest.approx(value, rel=1e-12)
    assert float(student.grad.abs().sum()) == pytest.approx(gradient, rel=1e-9)


@pytest.mark.parametrize("network", NETWORKS)
def test_gradients_are_exact(monkeypatch, network):
    g = torch.Generator().manual_seed(0)
    student = torch.randn(2, 3, 3, generator=g, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 2, 3, generator=g, dtype=torch.float64)
    references = torch.randn(5, 3, generator=g, dtype=torch.float64)
    matches = some_matches(g, 2, 3, 2)
    loss = PatchOrderLoss(student_steepness=7.0, network=network)
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher, references, matches), (student,))
    monkeypatch.setattr(patch_order, "_BLOCK_BYTES", 1)
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher, references, matches), (student,))
    scores = torch.randn(2, 5, generator=g, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: soft_sort(x, steepness=7.0, network=network), scores)


def test_the_same_order_is_better_than_another():
    g = torch.Generator().manual_seed(0)
    teacher, references = torch.randn(2, 6, 4, generator=g), torch.randn(9, 4, generator=g)
    loss = PatchOrderLoss()
    assert loss(teacher * 3, teacher, references) < loss(-teacher, teacher, references) / 2


def test_teacher_and_references_receive_no_gradient():
    student, teacher, references = (torch.randn(2, 5, 3, requires_grad=True) for _ in range(3))
    PatchOrderLoss()(student, teacher, references).backward()
    assert teacher.grad is None
    assert references.grad is None
    assert student.grad.abs().max() > 0


def test_patches_without_a_match_may_be_nan():
    g = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 4, 3, generator=g) for _ in range(2))
    references = torch.randn(5, 3, generator=g)
    valid = torch.tensor([[True, False, True, True], [False, True, True, False]])
    matches = Matches.identity(valid)
    truth = PatchOrderLoss()(student, teacher, references, matches)
    student, teacher = (torch.where(valid[..., None], x, torch.nan) for x in (student, teacher))
    student.requires_grad_()
    found = PatchOrderLoss()(student, teacher, references, matches)
    found.backward()
    assert float(found.detach()) == pytest.approx(float(truth), rel=1e-6)
    assert student.grad.isfinite().all()
    assert student.grad[~valid].abs().max() == 0


@pytest.mark.parametrize("b", [0, 2])
def test_nothing_to_compare_is_zero_with_a_graph(b):
    student = torch.randn(b, 4, 3, requires_grad=True)
    none = Matches.identity(torch.zeros(b, 4, dtype=torch.bool))
    value = PatchOrderLoss()(student, torch.randn(b, 4, 3), torch.randn(5, 3), none)
    value.backward()
    assert float(value.detach()) == 0
    assert not student.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_steep_sorting_stays_finite_whatever_autocast_says(dtype):
    g = torch.Generator().manual_seed(0)
    student, teacher = ((torch.randn(2, 6, 8, generator=g) * 1e4).to(dtype) for _ in range(2))
    student.requires_grad_()
    references = teacher.flatten(0, 1)
    loss = PatchOrderLoss(student_steepness=1e4, teacher_steepness=1e4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(student, teacher, references)
        soft = PatchOrderLoss()(student, teacher, references)
    found.backward()
    assert math.isfinite(float(found.detach()))
    assert student.grad.isfinite().all()
    exact = PatchOrderLoss()(student.detach().double(), teacher.double(), references.double())
    assert float(soft.detach()) == pytest.approx(float(exact), rel=1e-4)


@pytest.mark.parametrize("size", [1e30, 1e18, 1e-18, 1e-30])
def test_the_length_does_not_matter(size):
    g = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(2, 4, 3, generator=g) for _ in range(2))
    references = torch.randn(5, 3, generator=g)
    scaled = (student * size).requires_grad_()
    found = PatchOrderLoss()(scaled, teacher * size, references * size)
    found.backward()
    truth = PatchOrderLoss()(student, teacher, references)
    assert float(found.detach()) == pytest.approx(float(truth), rel=1e-4)
    assert scaled.grad.isfinite().all()


def test_it_compiles_whole():
    student, teacher, references = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.randn(4, 4)
    loss = PatchOrderLoss()
    found = torch.compile(loss, fullgraph=True, backend="aot_eager")(student, teacher, references)
    torch.testing.assert_close(found, loss(student, teacher, references))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"teacher": torch.randn(2, 5, 3)}, "axis `s` is 4"),
        ({"teacher": torch.randn(1, 4, 3)}, "axis `b` is 2"),
        ({"references": torch.randn(5, 1)}, "axis `d` is 3"),
        ({"references": torch.randn(1, 5, 3)}, "axis `b` is 2"),
        ({"references": None}, "must be a tensor"),
        ({"student": torch.ones(2, 4, 3).long()}, "floating-point"),
        ({"matches": Matches(torch.full((2, 4, 1), 4), torch.ones(2, 4, 1), None)}, "reaches 4"),
    ],
)
def test_bad_input_is_refused_by_name(change, text):
    parts = {
        "student": torch.randn(2, 4, 3), "teacher": torch.randn(2, 4, 3),
        "references": torch.randn(5, 3),
    }  # fmt: skip
    with pytest.raises(ShapeError, match=text):
        PatchOrderLoss()(**parts | change)


def test_bad_settings_are_refused():
    for name in ("student_steepness", "teacher_steepness"):
        with pytest.raises(ConfigError, match=name):
            PatchOrderLoss(**{name: 0.0})
    with pytest.raises(ConfigError, match="network"):
        PatchOrderLoss(network="bubble")
    with pytest.raises(ConfigError, match="network"):
        soft_sort(torch.randn(3), network="bubble")


def test_a_dict_of_matches_is_refused_with_the_fix():
    features = torch.randn(2, 6, 4)
    matches = {(0, 1): Matches.identity(torch.ones(2, 6, dtype=torch.bool))}
    with pytest.raises(ShapeError, match=r"got dict; .* say matches\[v, q\]"):
        PatchOrderLoss()(features, features, features[0], matches)

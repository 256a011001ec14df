"""DenseCL's losses against naive float64 loops, with their queue."""

import copy
import math

import pytest
import torch
from helpers.feature_kit import feature_loss_test
from helpers.strategies import matches_for
from hypothesis import given
from hypothesis import strategies as st

from local_distill import ConfigError, Matches, ShapeError
from local_distill.losses.dense_contrastive import DenseContrastiveLoss, dense_contrastive_loss
from local_distill.losses.global_contrastive import GlobalContrastiveLoss
from local_distill.losses.negative_queue import NegativeQueue

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def direction(row):
    norm = math.sqrt(sum(x * x for x in row))
    return [x / norm for x in row] if norm > 0 else list(row)


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def naive(student, teacher, matches, negatives, temp):
    """Loops in float64: the mean over matched tokens of -log of the answer's share."""
    losses = []
    for image in range(student.shape[0]):
        for i in range(student.shape[1]):
            answer, mass = [0.0] * student.shape[2], 0.0
            for j, w in zip(
                matches.teacher_index[image, i].tolist(),
                matches.weight[image, i].tolist(),
                strict=True,
            ):
                if w > 0:
                    y = direction(teacher[image, j].tolist())
                    answer = [a + w * x for a, x in zip(answer, y, strict=True)]
                    mass += w
            if mass == 0:
                continue
            x = direction(student[image, i].tolist())
            positive = dot(x, direction(answer)) / temp
            scores = [positive] + [dot(x, direction(n)) / temp for n in negatives.tolist()]
            top = max(scores)
            losses.append(top + math.log(sum(math.exp(s - top) for s in scores)) - positive)
    return sum(losses) / len(losses) if losses else 0.0


@given(
    st.data(), st.integers(2, 3), st.integers(1, 5), st.integers(1, 6), st.integers(1, 6),
    st.integers(1, 9), st.sampled_from([0.07, 0.2, 1.0]), st.sampled_from(DTYPES), st.booleans(),
)  # fmt: skip
def test_one_pair_is_the_loops(data, b, s, t, d, r, temp, dtype, autocast):
    matches = data.draw(matches_for(b, s, t))
    student, teacher = torch.randn(b, s, d).to(dtype), torch.randn(b, t, d).to(dtype)
    negatives = torch.randn(r, d).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = dense_contrastive_loss(student, teacher, matches, negatives, temp=temp)
    truth = naive(student.double(), teacher.double(), matches, negatives.double(), temp)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-7 if dtype == torch.float64 else 1e-5  # the weights are float32
    assert float(found) == pytest.approx(truth, abs=tolerance / temp)


def with_a_queue(d):
    loss = DenseContrastiveLoss(NegativeQueue(7, d))
    loss.queue.update(torch.randn(5, d))
    return loss


test_it_keeps_the_properties_of_local_losses = feature_loss_test(
    with_a_queue,
    exclude=[
        "order_of_prototypes_does_not_matter",  # the keys in the queue stay in the old one
        "teacher_tokens_that_are_not_valid_stay_out",  # no `teacher_valid`: a key is of all tokens
        "compiles_without_graph_breaks",  # below, with several steps
    ],
)


def step(b=2, s=3, t=4, d=5, r=6, k=2, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(b, n, d, generator=g, dtype=dtype) for n in (s, t))
    weight = torch.rand(b, s, k, generator=g, dtype=dtype) / k
    weight[:, 1] = 0
    matches = Matches(torch.randint(0, t, (b, s, k), generator=g), weight, torch.zeros(b, s))
    return student, teacher, matches, torch.randn(r, d, generator=g, dtype=dtype)


def test_gradient():
    student, teacher, matches, negatives = step()
    teacher.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: dense_contrastive_loss(x, teacher, matches, negatives),
        student.requires_grad_(),
    )
    dense_contrastive_loss(student, teacher, matches, negatives).backward()
    assert teacher.grad is None
    assert bool((student.grad[:, 1] == 0).all())
    assert bool((student.grad[:, [0, 2]].abs().sum(-1) > 0).all())


def test_the_numbers_of_the_published_code():
    # DenseCL's forward_train with an identity encoder, one process, both queues started with the
    # directions of `old`, tokens and whole views from sin and cos of their place; float64.
    place = torch.arange(2 * 6 * 4, dtype=torch.float64)
    student, teacher = torch.sin(1.7 * place).view(2, 6, 4), torch.cos(0.9 * place).view(2, 6, 4)
    backbone = torch.sin(place * place).view(2, 6, 4), torch.cos(3.0 * place * place).view(2, 6, 4)
    old = torch.sin(0.3 + torch.arange(8 * 4, dtype=torch.float64) ** 2).view(8, 4)
    units = [torch.nn.functional.normalize(part, dim=-1) for part in backbone]
    index = (units[0] @ units[1].mT).argmax(-1)
    matches = Matches(index[..., None], torch.ones(2, 6, 1), torch.zeros(2, 6))
    dense, whole = (kind(NegativeQueue(8, 4)).double() for kind in KINDS)
    values = []
    for _ in range(2):
        for loss in (dense, whole):
            if not int(loss.queue.count):
                loss.queue.update(old)
        values.append(float(dense([student, teacher], [student, teacher], {(0, 1): matches})))
        global_views = [student.mean(1), teacher.mean(1)]
        values.append(float(whole(global_views, global_views, pairs=[(0, 1)])))
    assert values == pytest.approx(PUBLISHED, rel=1e-12)
    torch.testing.assert_close(dense.queue.keys[:2], dense.queue.keys[2:4])  # enqueued twice


KINDS = (DenseContrastiveLoss, GlobalContrastiveLoss)
PUBLISHED = [4.784248094456674, 3.396003125012829, 4.724093016184164, 3.0942207988685237]


def test_pairs_are_averaged_and_views_may_be_missing():
    one, two, three = step(seed=1), step(seed=2), step(seed=1, t=7)
    matches = {
        (0, 1): one[2],
        (2, 1): two[2]._replace(weight=torch.zeros_like(two[2].weight)),  # gives 0, and counts
        (0, 2): three[2],
    }
    negatives = torch.randn(6, 5, dtype=torch.float64)
    loss = DenseContrastiveLoss(NegativeQueue(6, 5)).double()
    loss.queue.update(negatives)
    student, teacher = [one[0], None, two[0]], [None, one[1], three[1]]
    found = loss.eval()(student, teacher, matches)
    wanted = naive(one[0], one[1], one[2], negatives, 0.2)
    wanted += naive(one[0], three[1], three[2], negatives, 0.2)
    assert float(found) == pytest.approx(wanted / 3, rel=1e-9)


def test_the_queue_learns_after_use_the_mean_of_each_image():
    student, teacher, matches, negatives = step()
    loss = DenseContrastiveLoss(NegativeQueue(16, 5)).double()
    loss.queue.update(negatives)
    quiet = float(loss.eval()([student], [teacher], {(0, 0): matches}))
    assert int(loss.queue.count) == 6
    with torch.no_grad():
        loss.train()([student], [teacher], {(0, 0): matches})
    assert int(loss.queue.count) == 6
    student.requires_grad_()
    value = loss([student, student], [teacher, -teacher], {(0, 0): matches, (1, 0): matches})
    assert float(value.detach()) == pytest.approx(quiet, rel=1e-12)
    value.backward()  # the queue was written to since
    # once for each teacher view that takes part, however many pairs name it
    wanted = torch.tensor([direction(row) for row in teacher.mean(1).tolist()]).double()
    torch.testing.assert_close(loss.queue.keys[6:8], wanted, rtol=1e-6, atol=1e-6)
    assert int(loss.queue.count) == 8


def test_whole_views_are_grids_of_one_token():
    g = torch.Generator().manual_seed(3)
    student, teacher = torch.randn(2, 3, 4, 5, generator=g, dtype=torch.float64)
    loss = GlobalContrastiveLoss(NegativeQueue(7, 5), temp=0.3).double()
    negatives = torch.randn(7, 5, generator=g, dtype=torch.float64)
    loss.queue.update(negatives)
    whole = Matches.identity(torch.ones(4, 1, dtype=torch.bool))
    wanted = [
        naive(student[v][:, None], teacher[q][:, None], whole, negatives, 0.3)
        for v in range(3)
        for q in range(2)
        if v != q
    ]
    value = loss(list(student), list(teacher[:2]))
    assert float(value) == pytest.approx(sum(wanted) / 4, rel=1e-9)
    assert sorted(loss.state_dict()) == [
        f"dense.queue.{name}" for name in ("count", "keys", "position", "skipped")
    ]


def test_nothing_to_learn_gives_zero_with_a_graph():
    student, teacher, matches, negatives = step()
    student.requires_grad_()
    nothing = matches._replace(weight=torch.zeros_like(matches.weight))
    none = matches._replace(
        teacher_index=matches.teacher_index[..., :0], weight=matches.weight[..., :0]
    )
    cases = [
        dense_contrastive_loss(student, teacher, nothing, negatives),
        dense_contrastive_loss(student, teacher[:, :0], none, negatives),
        dense_contrastive_loss(student, teacher, matches, negatives[:0]),
        dense_contrastive_loss(
            student, teacher, matches, negatives, negatives_valid=torch.zeros(6).bool()
        ),
        DenseContrastiveLoss(NegativeQueue(4, 5))([student], [teacher], {(0, 0): matches}),
        DenseContrastiveLoss(NegativeQueue(4, 5))([student], [teacher], {}),
        dense_contrastive_loss(
            student[:0], teacher[:0], Matches(*(part[:0] for part in matches)), negatives
        ),
    ]
    for value in cases:
        assert float(value.detach()) == 0
        (gradient,) = torch.autograd.grad(value, student)
        assert bool((gradient == 0).all())


def test_nan_in_rows_that_do_not_count_reaches_nothing():
    student, teacher, matches, negatives = step()
    matches.teacher_index.clamp_(max=2)
    wanted = dense_contrastive_loss(student, teacher, matches, negatives)
    student[:, 1], teacher[:, 3] = math.nan, math.inf
    negatives = torch.cat((negatives, torch.full((1, 5), math.nan).double()))
    student.requires_grad_()
    valid = torch.arange(7) < 6
    value = dense_contrastive_loss(student, teacher, matches, negatives, negatives_valid=valid)
    value.backward()
    assert torch.equal(value.detach(), wanted)
    assert bool(student.grad.isfinite().all())
    student = student.detach().clone()
    student[0, 0, 0] = math.nan  # a matched one is seen
    assert math.isnan(dense_contrastive_loss(student, teacher, matches, negatives[:6]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-18, 1e18, 6e4, 0.0])
def test_features_of_any_size_stay_finite(dtype, scale):
    if dtype == torch.float16 and scale in (1e-18, 1e18):
        scale = {1e-18: 1e-3, 1e18: 6e4}[scale]
    student, teacher, matches, negatives = step()
    student = (student.clamp(-1, 1) * scale).to(dtype).requires_grad_()
    teacher, negatives = ((part.clamp(-1, 1) * scale).to(dtype) for part in (teacher, negatives))
    value = dense_contrastive_loss(student, teacher, matches, negatives, temp=0.01)
    value.backward()
    assert bool(value.isfinite())
    assert bool(student.grad.isfinite().all())


def test_layout_and_inputs():
    student, teacher, matches, negatives = step()
    wanted = dense_contrastive_loss(student, teacher, matches, negatives)
    parts = [student, teacher, *matches, negatives]
    before = [part.clone() for part in parts]
    strided = [torch.stack((part, part), -1)[..., 0] for part in (student, teacher, negatives)]
    found = dense_contrastive_loss(strided[0], strided[1].mT.contiguous().mT, matches, strided[2])
    torch.testing.assert_close(found, wanted, rtol=1e-14, atol=0)
    assert all(torch.equal(one, two) for one, two in zip(parts, before, strict=True))
    with torch.inference_mode():
        teacher = teacher.clone()
    value = dense_contrastive_loss(student.requires_grad_(), teacher, matches, negatives)
    value.backward()
    assert torch.equal(value.detach(), wanted)


def test_nan_never_enters_the_queue():
    loss = DenseContrastiveLoss(NegativeQueue(4, 5)).double()
    student, teacher, matches, _ = step()
    teacher[0, 0, 0] = math.nan
    loss([student], [teacher], {(0, 0): matches})
    assert (int(loss.queue.count), int(loss.queue.skipped)) == (1, 1)
    assert bool(loss.queue.keys.isfinite().all())


def test_it_compiles_into_one_graph():
    student, teacher, matches, negatives = step()
    losses = [DenseContrastiveLoss(NegativeQueue(7, 5)).double() for _ in range(2)]
    found = []
    for loss, call in zip(losses, (losses[0], torch.compile(
        losses[1], fullgraph=True, backend="aot_eager")), strict=True):  # fmt: skip
        loss.queue.update(negatives)
        leaf = student.clone().requires_grad_()
        for _ in range(2):
            value = call([leaf], [teacher], {(0, 0): matches})
        value.backward()
        found.append([value.detach(), leaf.grad, *loss.state_dict().values()])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"teacher": torch.randn(2, 4, 6)}, "axis `d` is 5 in `student.0.` but 6"),
        ({"teacher": torch.randn(1, 4, 5)}, "axis `b` is 2 in `student.0.` but 1"),
        ({"student": torch.randn(2, 2, 5)}, "axis `s` is 2"),
        ({"student": torch.ones(2, 3, 5).long()}, "floating-point"),
        ({"teacher": torch.randn(2, 1, 5)}, "but `teacher.0.` has 1 tokens"),
        ({"negatives": torch.randn(6, 1)}, "axis `d` is 5 in `student` but 1 in `negatives`"),
        ({"negatives_valid": torch.ones(5).bool()}, "axis `r` is 6 in `negatives` but 5"),
    ],
)
def test_what_does_not_fit_is_refused(change, text):
    student, teacher, matches, negatives = step()
    parts = {"student": student, "teacher": teacher, "matches": matches, "negatives": negatives}
    with pytest.raises(ShapeError, match=text):
        dense_contrastive_loss(**(parts | change))


def test_the_modules_refuse_and_keep_their_queue():
    student, teacher, matches, _ = step()
    loss = DenseContrastiveLoss(NegativeQueue(4, 3))
    for views, pairs, text in (
        (([student], [teacher]), {(0, 0): matches}, "made for dim=3"),
        ((student, [teacher]), {(0, 0): matches}, "`student` must be a list"),
        (([student], [teacher]), {(0, 1): matches}, r"pair \(0, 1\) but there are 1 student"),
        (([None], [teacher]), {(0, 0): matches}, "must be a tensor"),
    ):
        with pytest.raises(ShapeError, match=text):
            loss(*views, pairs)
    whole = GlobalContrastiveLoss(NegativeQueue(4, 5))
    view = torch.randn(2, 5)
    for student, pairs, text in (
        ([view], None, "no pair of different views"),
        ([view], [(0, 3)], "names .0, 3."),
        ([torch.randn(1, 5)], [(0, 0)], "axis `b`"),
        (view, None, "must be a list"),
    ):
        with pytest.raises(ShapeError, match=text):
            whole(student, [view], pairs=pairs)
    assert int(loss.queue.count) == int(whole.queue.count) == 0
    for temp in (0.0, -1.0, math.nan, None):
        for kind in KINDS:
            with pytest.raises(ConfigError, match="temp"):
                kind(NegativeQueue(4, 5), temp=temp)
        with pytest.raises(ConfigError, match="temp"):
            dense_contrastive_loss(*step(), temp=temp)
    assert "temp=0.2" in repr(copy.deepcopy(loss))

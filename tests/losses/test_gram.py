"""Gram anchoring against naive float64 loops and the published code."""

import math

import pytest
import torch
from helpers.strategies import matches_for
from hypothesis import given
from hypothesis import strategies as st

from local_distill import ConfigError, Matches, ShapeError
from local_distill.losses import gram
from local_distill.losses.gram import GramAnchoringLoss, gram_anchoring_loss

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
NEGATIVES = ["keep", "clip", "clip_teacher"]


def direction(row, normalize):
    length = math.hypot(*row)
    return [x / length for x in row] if normalize and length > 0 else row


def oracle(student, teacher, matches, scope, normalize, negatives):
    """The loss, loop by loop."""
    images = []
    for image in range(student.shape[0]):
        rows = []
        for i in range(student.shape[1]):
            answer = teacher[image, i].double().tolist() if matches is None else None
            if matches is not None:
                weights = matches.weight[image, i].double().tolist()
                mass = sum(weights)
                if mass == 0:
                    continue
                answer = [0.0] * teacher.shape[2]
                for j, w in zip(matches.teacher_index[image, i].tolist(), weights, strict=True):
                    for c in range(len(answer)):
                        answer[c] += w * float(teacher[image, j, c]) / mass if w else 0.0
            row = student[image, i].double().tolist()
            rows.append((direction(row, normalize), direction(answer, normalize)))
        images.append(rows)
    if scope == "batch":
        images = [[row for rows in images for row in rows]]
    total, count = 0.0, 0
    for rows in images:
        for x, y in rows:
            for other, answer in rows:
                ours = sum(a * b for a, b in zip(x, other, strict=True))
                theirs = sum(a * b for a, b in zip(y, answer, strict=True))
                if negatives == "clip":
                    ours, theirs = max(ours, 0.0), max(theirs, 0.0)
                elif negatives == "clip_teacher" and theirs < 0:
                    ours, theirs = max(ours, 0.0), 0.0
                total += (ours - theirs) ** 2
                count += 1
    return total / count if count else 0.0


@given(
    st.data(), st.integers(0, 3), st.integers(1, 4), st.integers(1, 5), st.sampled_from(DTYPES),
    st.sampled_from(["image", "batch"]), st.booleans(), st.sampled_from(NEGATIVES), st.booleans(),
)  # fmt: skip
def test_it_is_the_oracle(data, b, s, t, dtype, scope, normalize, negatives, matched):
    student = torch.randn(b, s, 3).to(dtype)
    teacher = torch.randn(b, t if matched else s, 2).to(dtype)
    matches = data.draw(matches_for(b, s, t)) if matched else None
    truth = oracle(student, teacher, matches, scope, normalize, negatives)
    found = gram_anchoring_loss(
        student, teacher, matches, scope=scope, normalize=normalize, negatives=negatives
    )
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    assert float(found) == pytest.approx(truth, rel=tolerance, abs=tolerance)


def wave(*shape, start=0.0):
    count = math.prod(shape)
    return ((torch.arange(count).double() + start) * 1.7).sin().reshape(shape) * 1.5


@pytest.mark.parametrize(
    ("scope", "negatives", "value", "gradient"),
    [
        ("image", "keep", 0.9202578205709308, 0.4234917836300086),
        ("image", "clip", 0.3956856696971245, 0.17524940884915963),
        ("batch", "keep", 0.9885420551931302, 0.13353739718528926),
        ("batch", "clip", 0.3173665597504793, 0.14827991587138206),
    ],
)
@pytest.mark.parametrize("blocks", [False, True])
def test_the_published_code(monkeypatch, scope, negatives, value, gradient, blocks):
    # golden: DINOv3's GramLoss, its casts to float32 replaced by float64; "clip" is remove_neg
    if blocks:
        monkeypatch.setattr(gram, "_TABLE_BYTES", 4 * 2 * 8 * 12 * 5)
    student = wave(2, 6, 5).requires_grad_()
    teacher = wave(2, 6, 4, start=30.0)
    found = gram_anchoring_loss(student, teacher, scope=scope, negatives=negatives)
    found.backward()
    assert float(found.detach()) == pytest.approx(value, rel=1e-12)
    assert float(student.grad.abs().sum()) == pytest.approx(gradient, rel=1e-12)


@pytest.mark.parametrize("negatives", NEGATIVES)
@pytest.mark.parametrize("blocks", [False, True])
def test_gradients_are_exact(monkeypatch, negatives, blocks):
    if blocks:
        monkeypatch.setattr(gram, "_TABLE_BYTES", 1)
    g = torch.Generator().manual_seed(0)
    student = torch.randn(2, 4, 3, generator=g, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 5, 3, generator=g, dtype=torch.float64)
    weight = torch.rand(2, 4, 2, generator=g, dtype=torch.float64) / 2
    weight[0, 1] = 0
    matches = Matches(torch.randint(0, 5, (2, 4, 2), generator=g), weight, torch.zeros(2, 4))
    for scope in ("image", "batch"):
        loss = GramAnchoringLoss(scope=scope, negatives=negatives)
        assert torch.autograd.gradcheck(
            lambda x, loss=loss: loss([x], [teacher], {(0, 0): matches}), (student,)
        )


def test_blocks_are_used_where_the_table_is_large(monkeypatch):
    seen = []
    block = gram._block
    monkeypatch.setattr(
        gram, "_block", lambda *parts: seen.append(len(parts[0][0])) or block(*parts)
    )
    student, teacher = torch.randn(2, 7, 3), torch.randn(2, 7, 3)
    whole = gram_anchoring_loss(student, teacher)
    assert seen == [7]
    monkeypatch.setattr(gram, "_TABLE_BYTES", 4 * 3 * 2 * 7 * 4)
    assert float(gram_anchoring_loss(student, teacher)) == pytest.approx(float(whole), rel=1e-6)
    assert seen == [7, 3, 3, 1]


def test_views_are_averaged_or_make_one_batch():
    g = torch.Generator().manual_seed(0)
    student = [torch.randn(2, n, 3, generator=g) for n in (4, 6)]
    teacher = [torch.randn(2, n, 5, generator=g) for n in (4, 6)]
    each = [gram_anchoring_loss(x, y) for x, y in zip(student, teacher, strict=True)]
    assert float(GramAnchoringLoss()(student, teacher)) == pytest.approx(float(sum(each)) / 2)
    assert torch.equal(GramAnchoringLoss()(student, [teacher[0], None]), each[0])
    both = GramAnchoringLoss(scope="batch")(student, teacher)
    # as one image of all tokens
    flat = [torch.cat([view.flatten(0, 1) for view in side])[None] for side in (student, teacher)]
    assert float(both) == pytest.approx(float(gram_anchoring_loss(*flat)), rel=1e-6)


def test_the_teacher_never_receives_a_gradient():
    student, teacher = (torch.randn(2, 4, 3, requires_grad=True) for _ in range(2))
    found = Matches.identity(torch.ones(2, 4, dtype=torch.bool))
    for matches in (None, {(0, 0): found}):
        GramAnchoringLoss()([student], [teacher], matches).backward()
    assert teacher.grad is None
    assert student.grad.abs().max() > 0


def test_patches_without_a_match_may_be_nan():
    g = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 4, 3, generator=g) for _ in range(2))
    valid = torch.tensor([[True, False, True, True], [False, True, True, False]])
    matches = Matches.identity(valid)
    truth = gram_anchoring_loss(student, teacher, matches)
    student, teacher = (torch.where(valid[..., None], x, torch.nan) for x in (student, teacher))
    student.requires_grad_()
    for scope in ("image", "batch"):
        found = gram_anchoring_loss(student, teacher, matches, scope=scope)
        found.backward()
        assert student.grad.isfinite().all()
        assert student.grad[~valid].abs().max() == 0
    found = gram_anchoring_loss(student.detach(), teacher, matches)
    assert float(found) == pytest.approx(float(truth), rel=1e-6)
    assert math.isnan(float(gram_anchoring_loss(student.detach(), teacher)))  # seen, not hidden


def test_nothing_to_compare_is_zero_with_a_graph():
    student = torch.randn(2, 4, 3, requires_grad=True)
    none = Matches.identity(torch.zeros(2, 4, dtype=torch.bool))
    for loss in (GramAnchoringLoss(), GramAnchoringLoss(scope="batch")):
        for matches in ({(0, 0): none}, {}):
            value = loss([student], [torch.randn(2, 4, 3)], matches)
            value.backward()
            assert float(value.detach()) == 0
    assert student.grad.abs().max() == 0


def test_patches_without_a_direction_get_no_gradient():
    student = torch.randn(2, 4, 3)
    student[0, 1] = 0
    student.requires_grad_()
    gram_anchoring_loss(student, torch.randn(2, 4, 3)).backward()
    assert student.grad.isfinite().all()
    assert student.grad[0, 1].abs().max() == 0


@pytest.mark.parametrize("size", [1e30, 1e18, 1e-18, 1e-30])
def test_the_length_does_not_matter(size):
    g = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(2, 4, 3, generator=g) for _ in range(2))
    truth = gram_anchoring_loss(student, teacher)
    scaled = (student * size).requires_grad_()
    found = gram_anchoring_loss(scaled, teacher * size)
    found.backward()
    assert float(found.detach()) == pytest.approx(float(truth), rel=1e-5)
    assert scaled.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_it_is_computed_in_float32_whatever_autocast_says(dtype):
    g = torch.Generator().manual_seed(0)
    student, teacher = ((torch.randn(2, 20, 16, generator=g) * 1e4).to(dtype) for _ in range(2))
    student.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gram_anchoring_loss(student, teacher)
    truth = gram_anchoring_loss(student.detach().double(), teacher.double())
    assert float(found.detach()) == pytest.approx(float(truth), rel=1e-5)
    found.backward()
    assert student.grad.isfinite().all()


def test_layout_does_not_matter_and_nothing_is_changed():
    student, teacher = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    before = student.clone(), teacher.clone()
    truth = gram_anchoring_loss(student, teacher, negatives="clip")
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (student, teacher)]
    assert torch.allclose(gram_anchoring_loss(*turned, negatives="clip"), truth)
    row = student[:1].expand(2, -1, -1)
    assert torch.allclose(
        gram_anchoring_loss(row, teacher), gram_anchoring_loss(row.clone(), teacher)
    )
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])


def test_it_compiles_whole():
    student, teacher = [torch.randn(2, 4, 3)], [torch.randn(2, 5, 3)]
    matches = {
        (0, 0): Matches(torch.randint(0, 5, (2, 4, 1)), torch.ones(2, 4, 1), torch.zeros(2, 4))
    }
    loss = GramAnchoringLoss(negatives="clip_teacher")
    found = torch.compile(loss, fullgraph=True, backend="aot_eager")(student, teacher, matches)
    torch.testing.assert_close(found, loss(student, teacher, matches))


@pytest.mark.parametrize(
    ("student", "teacher", "matches", "text"),
    [
        ([torch.randn(2, 4, 3)], [torch.randn(2, 5, 3)], None, "axis `s` is 4"),
        ([torch.randn(2, 4, 3)], [torch.randn(1, 4, 3)], None, "axis `b` is 2"),
        ([torch.randn(2, 4)], [torch.randn(2, 4, 3)], None, "must have 3 axes `b s d`"),
        ([torch.ones(2, 4, 3).long()], [torch.randn(2, 4, 3)], None, "floating-point"),
        (torch.randn(2, 4, 3), [torch.randn(2, 4, 3)], None, "must be a list"),
        ([], [torch.randn(2, 4, 3)], None, "0 student and 1 teacher"),
        ([torch.randn(2, 4, 3)], [torch.randn(2, 4, 3)], (0, 1), "1 teacher"),
        ([torch.randn(2, 4, 3)], [torch.randn(2, 1, 3)], (0, 0), "reaches 1"),
    ],
)
def test_bad_input_is_refused_by_name(student, teacher, matches, text):
    if matches is not None:
        ones = torch.ones(2, 4, 1)
        matches = {matches: Matches(ones.long(), ones, ones[..., 0])}
    with pytest.raises(ShapeError, match=text):
        GramAnchoringLoss()(student, teacher, matches)


def test_bad_settings_are_refused():
    with pytest.raises(ConfigError, match="scope"):
        GramAnchoringLoss(scope="view")
    with pytest.raises(ConfigError, match="negatives"):
        gram_anchoring_loss(torch.randn(2, 4, 3), torch.randn(2, 4, 3), negatives="none")

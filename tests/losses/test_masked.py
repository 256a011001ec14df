"""iBOT's masked tokens: the loss against naive loops, and the masks themselves."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from local_distill import Centering, ConfigError, LocalDistillationLoss, Matches, ShapeError
from local_distill.losses.masked import MaskedDistillationLoss
from local_distill.masking import random_block_mask
from local_distill.testing import check_loss, loss_properties
from local_distill.testing.loss_properties import LossExample


def log_softmax(row):
    top = max(row)
    norm = top + math.log(sum(math.exp(x - top) for x in row))
    return [x - norm for x in row]


def naive(student, teacher, valid, center, student_temp, teacher_temp):
    """Mean over views, then images, then the masked tokens of each."""
    views = []
    for s, t, masked in zip(student, teacher, valid, strict=True):
        images = []
        for image in range(s.shape[0]):
            losses = []
            for i in range(s.shape[1]):
                if not masked[image, i]:
                    continue
                scores = [(x - c) / teacher_temp for x, c in
                          zip(t[image, i].tolist(), center, strict=True)]  # fmt: skip
                logs = log_softmax([x / student_temp for x in s[image, i].tolist()])
                losses.append(-sum(math.exp(p) * q for p, q in
                                   zip(log_softmax(scores), logs, strict=True)))  # fmt: skip
            images.append(sum(losses) / max(len(losses), 1))
        views.append(sum(images) / len(images))
    return sum(views) / len(views)


def step(b=3, sizes=(6, 4), c=5, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    student, teacher = (
        [torch.randn(b, n, c, generator=g, dtype=torch.float64).to(dtype) for n in sizes]
        for _ in range(2)
    )
    valid = [torch.rand(b, n, generator=g) > 0.5 for n in sizes]
    valid[0][1] = False  # an image without masks
    return student, teacher, valid


@given(
    st.integers(2, 3),
    st.lists(st.integers(1, 6), min_size=1, max_size=3),
    st.integers(1, 6),
    st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    st.booleans(),
    st.integers(0, 9999),
)
def test_it_is_the_loops(b, sizes, c, dtype, autocast, seed):
    student, teacher, valid = step(b, sizes, c, seed, dtype)
    loss = MaskedDistillationLoss(Centering(c).double(), student_temp=0.2)
    loss.targets.center.normal_()
    center = loss.targets.center.tolist()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = loss(student, teacher, valid, teacher_temp=0.3)
    wide = [[part.double() for part in views] for views in (student, teacher)]
    truth = naive(*wide, valid, center, 0.2, 0.3)
    assert float(found) == pytest.approx(truth, abs=1e-10 if dtype == torch.float64 else 1e-4)


def test_it_is_the_local_loss_of_each_view_with_itself():
    student, teacher, valid = step()
    losses = (
        MaskedDistillationLoss(Centering(5).double()),
        LocalDistillationLoss(Centering(5).double(), normalize="image"),
    )
    matches = {(v, v): Matches.identity(masked) for v, masked in enumerate(valid)}
    for _ in range(2):  # the center has moved in the second step
        one = losses[0](student, teacher, valid, teacher_temp=0.1)
        two = losses[1](student, teacher, matches, teacher_temp=0.1)
        assert torch.equal(one, two)
    assert torch.equal(losses[0].targets.center, losses[1].targets.center)
    assert float(losses[0].targets.center.abs().sum()) > 0


def test_gradient():
    student, teacher, valid = step()
    loss = MaskedDistillationLoss(Centering(5).double(), student_temp=0.5)
    for logits in (*student, *teacher):
        logits.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *views: loss.eval()(list(views), teacher, valid, teacher_temp=0.3), tuple(student)
    )
    loss.train()(student, teacher, valid, teacher_temp=0.3).backward()
    assert all(logits.grad is None for logits in teacher)
    for logits, masked in zip(student, valid, strict=True):
        assert torch.equal((logits.grad != 0).any(-1), masked)


def test_views_without_masks_take_no_part():
    student, teacher, valid = step()
    loss = MaskedDistillationLoss(Centering(5).double()).eval()
    alone = loss(student[:1], teacher[:1], valid[:1], teacher_temp=0.1)
    # a local view, which the teacher never sees, and a global one without masks
    found = loss([student[0], None, student[1]], teacher, [valid[0], None, None], teacher_temp=0.1)
    assert torch.equal(found, alone)
    # masks of no token are not the same: the view counts
    half = loss(student, teacher, [valid[0], torch.zeros_like(valid[1])], teacher_temp=0.1)
    torch.testing.assert_close(half, alone / 2)


def test_no_mask_at_all_gives_zero_with_a_graph():
    student, teacher, valid = step()
    student[0].requires_grad_()
    loss = MaskedDistillationLoss(Centering(5).double())
    for masks in ([None, None], [torch.zeros_like(masked) for masked in valid]):
        value = loss(student, teacher, masks, teacher_temp=0.1)
        assert float(value.detach()) == 0
        (gradient,) = torch.autograd.grad(value, student[0])
        assert bool((gradient == 0).all())


# iBOT's iBOTLoss with λ1 = 0, two global crops and no local one, epoch 0, temperatures 0.1 and
# 0.04, center momentum 0.9, on the step below; float64; two calls.
PUBLISHED = [6.657080529222631, 6.855645870479625]


def test_the_numbers_of_the_published_code():
    place = torch.arange(2 * 3 * 4 * 5, dtype=torch.float64)
    student = torch.sin(1.7 * place).view(2, 3, 4, 5)
    teacher = torch.cos(0.9 * place * place).view(2, 3, 4, 5)
    valid = (torch.sin(torch.arange(24.0) ** 2) > 0.1).view(2, 3, 4)
    valid[1, 2] = False
    loss = MaskedDistillationLoss(Centering(5, momentum=0.9).double(), student_temp=0.1)
    values = [
        float(loss(list(student), list(teacher), list(valid), teacher_temp=0.04)) for _ in range(2)
    ]
    assert values == pytest.approx(PUBLISHED, rel=1e-12)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"valid": [torch.ones(3, 6).bool()]}, "`valid` has 1 views but `student_logits` has 2"),
        ({"valid": torch.ones(3, 6).bool()}, "`valid` must be a list"),
        ({"valid": [torch.ones(3, 6), None]}, "`valid.0.` must be bool"),
        ({"valid": [torch.ones(3, 5).bool(), None]}, "axis `n` is 5 in `valid.0.` but 6"),
        ({"valid": [torch.ones(1, 6).bool(), None]}, "axis `b` is 1 in `valid.0.` but 3"),
        ({"teacher_logits": [torch.randn(3, 6, 5)]}, "there are 1 teacher views"),
        ({"teacher_logits": [torch.randn(3, n, 5) for n in (5, 4)]}, "axis `n`"),
        ({"student_logits": [None, torch.randn(3, 4, 5)]}, "must be a tensor"),
    ],
)
def test_what_does_not_fit_is_refused(change, text):
    student, teacher, valid = step(dtype=torch.float32)
    parts = {"student_logits": student, "teacher_logits": teacher, "valid": valid}
    loss = MaskedDistillationLoss(Centering(5))
    with pytest.raises(ShapeError, match=text):
        loss(**(parts | change), teacher_temp=0.1)
    assert float(loss.targets.center.abs().sum()) == 0


class AsLocal(nn.Module):
    """The signature of a local loss, for its kit: masks from the matches of a view with itself."""

    def __init__(self, c):
        super().__init__()
        self.masked = MaskedDistillationLoss(Centering(c))
        self.targets, self.student_temp = self.masked.targets, self.masked.student_temp

    def forward(self, student_logits, teacher_logits, matches, **more):
        assert all(v == q for v, q in matches)
        masks = [(matches[v, v].weight > 0).any(-1) if (v, v) in matches else None
                 for v in range(len(student_logits))]  # fmt: skip
        return self.masked(student_logits, teacher_logits, masks, **more)


def masked_example(seed):
    student, teacher, valid = step(seed=seed, dtype=torch.float32)
    for masked in valid:
        masked[:, 0], masked[:, -1] = True, False
    matches = {(v, v): Matches.identity(masked) for v, masked in enumerate(valid)}
    return LossExample(student, teacher, matches, seed=seed)


# What these do to matches, masks cannot say: another view, another place.
UNSAID = {
    "views_that_are_not_there_are_refused",
    "matches_of_other_tokens_are_refused",
    "order_of_student_tokens_does_not_matter",
    "order_of_teacher_tokens_does_not_matter",
}


@pytest.mark.parametrize(
    "name", [one.name for one in loss_properties("local") if one.name not in UNSAID]
)
def test_it_keeps_the_properties_of_local_losses(name):
    examples = [masked_example(seed) for seed in range(2)]
    assert check_loss(AsLocal, kind="local", properties=[name], examples=examples) == [name]


def test_order_of_tokens_does_not_matter():
    student, teacher, valid = step()
    loss = MaskedDistillationLoss(Centering(5).double()).eval()
    wanted = loss(student, teacher, valid, teacher_temp=0.1)
    turned = [[part.flip(1) for part in views] for views in (student, teacher, valid)]
    torch.testing.assert_close(loss(*turned, teacher_temp=0.1), wanted)


# Masks


@given(
    st.integers(0, 5), st.integers(1, 14), st.integers(1, 14),
    st.floats(0, 1), st.floats(0, 1), st.integers(0, 9999),
)  # fmt: skip
def test_never_more_than_the_ratio(b, rows, cols, one, two, seed):
    low, high = sorted((one, two))
    g = torch.Generator().manual_seed(seed)
    masks = random_block_mask(b, rows, cols, ratio_ranges=[(low, high)], generator=g)
    assert masks.shape == (b, rows * cols)
    assert masks.dtype == torch.bool
    assert bool((masks.sum(1) <= high * rows * cols + 1e-9).all())
    again = random_block_mask(
        b, rows, cols, ratio_ranges=[(low, high)], generator=g.manual_seed(seed)
    )
    assert torch.equal(masks, again)


def test_a_rectangle_where_one_is_enough():
    g = torch.Generator().manual_seed(0)
    # an area of 16 of 18 that may be masked: what is left is less than any block that fits
    masks = random_block_mask(200, 12, 12, ratio_ranges=[(0.12, 0.12)], generator=g)
    whole = 0
    for mask in masks.view(-1, 12, 12):
        inside = mask.any(1)[:, None] & mask.any(0)
        whole += bool((inside == mask).all())
    assert whole > 20  # scattered tokens would never do so


def test_most_of_the_ratio_is_masked_and_every_place_has_its_turn():
    g = torch.Generator().manual_seed(1)
    masks = random_block_mask(400, 14, 14, ratio_ranges=[(0.4, 0.4)], generator=g)
    share = masks.float().mean(1)
    assert 0.35 < float(share.mean()) <= 0.4
    places = masks.float().mean(0)
    assert float(places.min()) > 0.005  # the corners, where few rectangles end
    assert float(places.max()) < 0.85  # the middle


def test_the_default_leaves_half_of_the_images_whole():
    g = torch.Generator().manual_seed(2)
    share = random_block_mask(600, 14, 14, generator=g).float().mean(1)
    assert 0.42 < float((share == 0).float().mean()) < 0.58
    some = share[share > 0]
    assert 0.05 < float(some.min()) < 0.15
    assert 0.44 < float(some.max()) <= 0.5
    assert 0.24 < float(some.mean()) < 0.33


def test_small_and_narrow_grids_can_be_masked():
    g = torch.Generator().manual_seed(3)
    for rows, cols in ((1, 9), (9, 1), (2, 2), (1, 1)):
        masks = random_block_mask(200, rows, cols, ratio_ranges=[(1.0, 1.0)], generator=g)
        assert bool(masks.any(0).all())


def test_the_shape_follows_the_aspect_range():
    for aspect, wide in (((0.2, 0.3), True), ((3.0, 5.0), False)):
        g = torch.Generator().manual_seed(4)
        masks = random_block_mask(
            50, 16, 16, ratio_ranges=[(0.08, 0.08)], aspect_range=aspect, generator=g
        ).view(-1, 16, 16)
        height, width = (float(masks.any(axis).sum(1).float().mean()) for axis in (2, 1))
        assert (width if wide else height) > 2 * (height if wide else width)


def test_masks_do_not_touch_the_global_generator_if_given_one():
    before = torch.get_rng_state()
    random_block_mask(2, 5, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)
    random_block_mask(2, 5, 5)
    assert not torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"batch": -1}, "`batch`"),
        ({"rows": 0}, "`rows`"),
        ({"cols": 2.0}, "`cols`"),
        ({"ratio_ranges": []}, "`ratio_ranges` is empty"),
        ({"ratio_ranges": [(0.5, 0.1)]}, "`ratio_ranges` runs from 0.5 down to 0.1"),
        ({"ratio_ranges": [(0.5, 1.1)]}, r"`ratio_ranges` must lie in \[0, 1\]"),
        ({"aspect_range": (0.0, 1.0)}, "`aspect_range`"),
        ({"aspect_range": (2.0, 1.0)}, "`aspect_range` runs from"),
    ],
)
def test_masks_that_cannot_be_are_refused(change, text):
    with pytest.raises(ConfigError, match=text):
        random_block_mask(**({"batch": 2, "rows": 4, "cols": 5} | change))

"""The recipe `ibot` against the authors' code, and what any loop may do with it."""

import pytest
import torch
from helpers.check_recipe import check_checkpoint, check_compiles, check_golden, check_two_centers
from helpers.recipe_views import leaves, views, wave

from local_distill import Centering, ConfigError, MaskedDistillationLoss, ShapeError, ViewOutput
from local_distill.losses.global_distillation import GlobalDistillationLoss
from local_distill.recipes import ibot
from local_distill.recipes.ibot import IbotLoss

# Loss, then the gradient's numbers (global and token logits of the two large views, global logits
# of the two small ones), of bytedance/ibot's iBOTLoss in float64: two steps, the second with the
# centers that the first left; τ_t = 0.05, of tokens 0.06; one image has no mask.
GOLDEN = [
    (
        39.46510450622318,
        [2.59922144642, -3.3380135743, -2.71490537751, 0.18803508737, 1.7540600611,
         -0.451852691481],
    ),
    (
        35.88278058821201,
        [2.67380160038, -0.439898740053, -2.35343093992, -0.468630928229, 1.69923199686,
         2.43783831458],
    ),
]  # fmt: skip


def masks(phase=0.0):
    found = [wave(2, 16, phase=phase + view) > 0.3 for view in range(2)]
    found[1][0] = False  # an image without a mask
    return found


def small(outputs):
    """Of views after the second the global logits alone."""
    return [*outputs[:2], *(view._replace(token_logits=None) for view in outputs[2:])]


def test_loss_and_gradient_are_those_of_the_published_code():
    loss = ibot(6).double()

    def step(phase):
        student, teacher = (
            small(views(4, 6, phase=phase, grad=True)),
            views(2, 6, phase=phase + 100),
        )
        temps = {"teacher_temp": 0.05, "teacher_token_temp": 0.06}
        return loss(student, teacher, [*masks(phase), None, None], **temps), leaves(student)

    check_golden(GOLDEN, step)


def test_teacher_and_tokens_that_were_not_masked_receive_no_gradient():
    student, teacher = views(2, 6, grad=True), views(2, 6, phase=9, grad=True)
    valid = masks()
    terms = ibot(6)(student, teacher, valid, teacher_temp=0.05)
    terms.loss.backward()
    assert all(x.grad is None for x in leaves(teacher))
    for view, hidden in zip(student, valid, strict=True):
        touched = view.token_logits.grad.abs().sum(-1) > 0
        assert torch.equal(touched, hidden)
        assert view.global_logits.grad.abs().sum() > 0
    assert sorted(terms.matches) == [(0, 0), (1, 1)]
    assert torch.equal(terms.matches[1, 1].matched, valid[1])


def test_one_temperature_serves_both_if_no_other_is_given():
    step = (views(2, 6), views(2, 6, phase=9), masks())
    alike = ibot(6)(*step, teacher_temp=0.05, teacher_token_temp=0.05).loss
    assert torch.equal(ibot(6)(*step, teacher_temp=0.05).loss, alike)
    assert ibot(6)(*step, teacher_temp=0.05, teacher_token_temp=0.5).loss != alike


@pytest.mark.parametrize(("students", "teachers"), [(2, 2), (4, 2), (2, 3), (4, 1)])
def test_any_number_of_views(students, teachers):
    student, teacher = small(views(students, 6, grad=True)), views(teachers, 6, phase=9)
    masked = min(teachers, 2)
    valid = [*masks()[:masked], *[None] * (students - masked)]
    terms = ibot(6)(student, teacher, valid, teacher_temp=0.05)
    assert terms.loss.isfinite()
    assert terms.global_loss > 0
    assert terms.local_loss > 0
    assert len(terms.matches) == masked
    torch.testing.assert_close(terms.loss, terms.global_loss + terms.local_loss)


def test_views_without_global_logits_keep_their_number():
    one, two, three = small(views(3, 6))
    teacher = views(2, 6, phase=9)
    valid = [*masks(), None]
    terms = ibot(6)([one, two, three], [ViewOutput(None, *teacher[0][1:]), teacher[1]], valid,
                    teacher_temp=0.05)  # fmt: skip
    alone = ibot(6).global_loss([one.global_logits, three.global_logits],
                                [teacher[1].global_logits], teacher_temp=0.05,
                                pairs=[(0, 0), (1, 0)])  # fmt: skip
    torch.testing.assert_close(terms.global_loss, alone)


def test_nothing_masked_is_nothing_to_learn():
    student = views(2, 6, grad=True)
    nothing = [torch.zeros(2, 16, dtype=torch.bool)] * 2
    terms = ibot(6)(student, views(2, 6, phase=9), nothing, teacher_temp=0.05)
    terms.loss.backward()
    assert terms.local_loss == 0
    assert all(view.token_logits.grad.abs().sum() == 0 for view in student)


def test_state_goes_through_a_checkpoint():
    step = views(2, 6), views(2, 6, phase=9), masks()
    loss = check_checkpoint(lambda: ibot(6), step, teacher_temp=0.05)
    check_two_centers(loss.global_loss, loss.masked_loss)


def test_weights_and_settings_reach_the_parts():
    loss = ibot(7, num_token_prototypes=5, student_temp=0.2, center_momentum=0.5)
    assert loss.global_loss.targets.num_prototypes == 7
    assert loss.masked_loss.targets.num_prototypes == 5
    assert ibot(7).masked_loss.targets.num_prototypes == 7
    for part in (loss.global_loss, loss.masked_loss):
        assert part.student_temp == 0.2
        assert part.targets.momentum == 0.5
    weighted = ibot(6)
    weighted.global_weight, weighted.local_weight = 2.0, 0.5
    terms = weighted(views(2, 6), views(2, 6, phase=9), masks(), teacher_temp=0.05)
    torch.testing.assert_close(terms.loss, 2 * terms.global_loss + 0.5 * terms.local_loss)


def test_bad_input_is_refused_before_the_state_changes():
    loss = ibot(6)
    view = views(2, 6)
    cases = [
        ([None, None], "no masks"),
        ([masks()[0]], "2"),
        ([masks()[0].float(), None], "bool"),
        ([masks()[0][:, :9], None], "axis `n`"),
    ]
    for valid, message in cases:
        with pytest.raises(ShapeError, match=message):
            loss(view, view, valid, teacher_temp=0.05)
    with pytest.raises(ShapeError, match="global_logits"):
        loss(view[:1], view[:1], masks()[:1], teacher_temp=0.05)
    assert all(x.abs().sum() == 0 for x in loss.state_dict().values())


def test_bad_settings_are_refused():
    targets = Centering(6)
    parts = GlobalDistillationLoss(targets), MaskedDistillationLoss(targets)
    with pytest.raises(ConfigError, match="share"):
        IbotLoss(*parts)
    with pytest.raises(ConfigError, match="local_weight"):
        IbotLoss(parts[0], MaskedDistillationLoss(Centering(6)), local_weight=-1.0)
    with pytest.raises(ConfigError, match="num_prototypes"):
        ibot(6, num_token_prototypes=0)


def test_compiles_into_one_graph():
    step = (views(2, 6, grad=True), views(2, 6, phase=9), masks())
    check_compiles(ibot(6), step, teacher_temp=0.05)

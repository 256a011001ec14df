"""The recipe `esvit` against the authors' code, and what any loop may do with it."""

import pytest
import torch
from helpers.check_recipe import (
    VIEW_COUNTS,
    check_all_pairs,
    check_checkpoint,
    check_golden,
    check_teacher_is_still,
    check_two_centers,
)
from helpers.recipe_views import leaves, views

from local_distill import ConfigError, ShapeError
from local_distill.recipes import esvit

# Loss, then the gradient's numbers (global and token logits of each view), of microsoft/esvit's
# DDINOLoss in float64: two steps, the second with the centers that the first left; 4 student views,
# 2 teacher views, τ_t = 0.05.
GOLDEN = [
    (
        28.383397941756453,
        [1.29961072321, -0.534994406555, -1.35745268875, 0.698276574781, 0.877030030552,
         -1.00711793813, -0.225926345741, 0.463097695143],
    ),
    (
        27.95951776698683,
        [1.33690080019, -0.733731746069, -1.17671546996, 0.499219513293, 0.849615998432,
         -0.284741982443, 1.21891915729, 0.0352555452641],
    ),
]  # fmt: skip


def test_loss_and_gradient_are_those_of_the_published_code():
    loss = esvit(6).double()

    def step(phase):
        student, teacher = views(4, 6, phase=phase, grad=True), views(2, 6, phase=phase + 100)
        return loss(student, teacher, teacher_temp=0.05), leaves(student)

    check_golden(GOLDEN, step)


def test_regions_answer_by_their_features():
    student, teacher = views(3, 6), views(2, 6, phase=100)
    matches = esvit(6)(student, teacher, teacher_temp=0.05).matches
    assert sorted(matches) == [(0, 1), (1, 0), (2, 0), (2, 1)]
    for (v, q), found in matches.items():
        one, two = (x.tokens.features / x.tokens.features.norm(dim=-1, keepdim=True)
                    for x in (student[v], teacher[q]))  # fmt: skip
        assert torch.equal(found.teacher_index[..., 0], (one @ two.mT).argmax(-1))


def test_teacher_receives_no_gradient():
    student, teacher = views(3, 6, grad=True), views(2, 6, phase=9, grad=True)
    check_teacher_is_still(esvit(6), student, teacher, teacher_temp=0.05)


@pytest.mark.parametrize(("students", "teachers"), VIEW_COUNTS)
def test_any_number_of_views(students, teachers):
    student, teacher = views(students, 6, grad=True), views(teachers, 6, phase=9)
    terms = esvit(6)(student, teacher, teacher_temp=0.05)
    assert terms.loss > 0
    check_all_pairs(terms, students, teachers, 0.5, 0.5)


def test_state_goes_through_a_checkpoint():
    step = views(3, 6), views(2, 6, phase=9)
    loss = check_checkpoint(lambda: esvit(6), step, teacher_temp=0.05)
    check_two_centers(loss.global_loss, loss.local_loss)


def test_settings_reach_the_parts():
    loss = esvit(7, student_temp=0.2, center_momentum=0.5)
    for part in (loss.global_loss, loss.local_loss):
        assert part.student_temp == 0.2
        assert (part.targets.num_prototypes, part.targets.momentum) == (7, 0.5)


def test_bad_input_is_refused():
    view = views(2, 6)
    bare = [x._replace(token_logits=None) for x in view]
    with pytest.raises(ShapeError, match="token_logits"):
        esvit(6)(bare, bare, teacher_temp=0.05)
    blind = [x._replace(tokens=x.tokens._replace(features=None)) for x in view]
    with pytest.raises(ShapeError, match="features"):
        esvit(6)(blind, blind, teacher_temp=0.05)
    with pytest.raises(ConfigError, match="momentum"):
        esvit(6, center_momentum=1.0)

"""The recipe `dino` against the authors' code, and what any loop may do with it."""

import pytest
import torch
from helpers.check_recipe import VIEW_COUNTS, check_checkpoint, check_compiles, check_golden
from helpers.recipe_views import leaves, views

from local_distill import ConfigError, ShapeError, ViewOutput
from local_distill.recipes import dino

# Loss, then the gradient's numbers, of facebookresearch/dino's DINOLoss in float64: two steps, the
# second with the center that the first left; 4 student views, 2 teacher views, τ_t = 0.05.
GOLDEN = [
    (34.67930734198234, [2.59922144642, -2.71490537751, 1.7540600611, -0.451852691481]),
    (33.11485330836123, [2.67380160038, -2.35343093992, 1.69923199686, 2.43783831458]),
]


def test_loss_and_gradient_are_those_of_the_published_code():
    loss = dino(6).double()

    def step(phase):
        student, teacher = views(4, 6, phase=phase, grad=True), views(2, 6, phase=phase + 100)
        terms = loss(student, teacher, teacher_temp=0.05)
        return terms, [view.global_logits for view in student]

    check_golden(GOLDEN, step)


def test_teacher_receives_no_gradient_and_tokens_are_not_looked_at():
    loss = dino(6)
    student, teacher = views(3, 6, grad=True), views(2, 6, phase=9, grad=True)
    terms = loss(student, teacher, teacher_temp=0.05)
    terms.loss.backward()
    assert all(x.grad is None for x in leaves(teacher))
    assert all(view.token_logits.grad is None for view in student)
    assert all(view.global_logits.grad.abs().sum() > 0 for view in student)
    assert terms.loss == terms.global_loss
    assert terms.local_loss == 0
    assert terms.matches == {}


@pytest.mark.parametrize(("students", "teachers"), VIEW_COUNTS)
def test_any_number_of_views(students, teachers):
    student, teacher = views(students, 6, grad=True), views(teachers, 6, phase=9)
    loss = dino(6).double()
    found = loss(student, teacher, teacher_temp=0.05).loss
    expected = [
        -(t.global_logits / 0.05).softmax(1) * (s.global_logits / 0.1).log_softmax(1)
        for v, s in enumerate(student)
        for q, t in enumerate(teacher)
        if v != q
    ]
    torch.testing.assert_close(found, torch.stack(expected).sum(-1).mean())


def test_views_without_global_logits_keep_their_number():
    one, two, three = views(3, 6, grad=True)
    loss = dino(6)
    without = loss([one, two, three], [ViewOutput(), two], teacher_temp=0.05).loss
    alone = dino(6).global_loss(
        [one.global_logits, three.global_logits], [two.global_logits], teacher_temp=0.05,
        pairs=[(0, 0), (1, 0)],
    )  # fmt: skip
    torch.testing.assert_close(without, alone)


def test_state_goes_through_a_checkpoint():
    step = views(3, 6, grad=True), views(2, 6, phase=9)
    loss = check_checkpoint(lambda: dino(6), step, teacher_temp=0.05)
    assert loss.global_loss.targets.center.abs().sum() > 0


def test_settings_reach_the_parts():
    loss = dino(7, student_temp=0.2, center_momentum=0.5)
    assert loss.global_loss.student_temp == 0.2
    assert (loss.global_loss.targets.num_prototypes, loss.global_loss.targets.momentum) == (7, 0.5)


def test_bad_input_is_refused():
    view = views(1, 6)
    with pytest.raises(ShapeError, match="global_logits"):
        dino(6)(view, view, teacher_temp=0.05)
    with pytest.raises(ShapeError, match="must be a list"):
        dino(6)(view[0].global_logits, view, teacher_temp=0.05)
    with pytest.raises(ConfigError, match="student_temp"):
        dino(6, student_temp=0.0)
    with pytest.raises(ConfigError, match="num_prototypes"):
        dino(0)


def test_compiles_into_one_graph():
    step = (views(3, 6, grad=True), views(2, 6, phase=9))
    check_compiles(dino(6), step, teacher_temp=0.05)

"""The recipe `glsd` against the authors' code, and what any loop may do with it."""

import pytest
from helpers.check_recipe import (
    VIEW_COUNTS,
    check_all_pairs,
    check_checkpoint,
    check_golden,
    check_teacher_is_still,
    check_two_centers,
)
from helpers.recipe_views import leaves, views

from local_distill import ConfigError, NearestMatcher, ShapeError, SimilarityMatcher
from local_distill.recipes import glsd

# Loss, then the gradient's numbers (global and token logits of each view), of
# tileb1/global-local-self-distillation's DDINOLoss in float64: two steps, the second with the
# centers that the first left; 4 student views, 2 teacher views, τ_t = 0.05. Its places of tokens
# came from its own way: a map of pixel positions, cropped and resized (bicubic) and mirrored as the
# image. The settings are dense_matching_type and hinge_bool.
GOLDEN = {
    "distance, hinge": [
        (
            29.820466504912865,
            [1.29961072321, -0.551099360004, -1.35745268875, 0.710998526347, 0.877030030552,
             -0.927457408923, -0.225926345741, 1.01257130705],
        ),
        (
            28.4894068681512,
            [1.33690080019, -0.656007823666, -1.17671546996, 0.783912804279, 0.849615998432,
             -0.489674024707, 1.21891915729, -0.133770228816],
        ),
    ],
    "distance": [
        (
            30.019851004852015,
            [1.29961072321, -0.598084877893, -1.35745268875, 0.710998526347, 0.877030030552,
             -0.927457408923, -0.225926345741, 1.01257130705],
        ),
        (
            28.493769455714727,
            [1.33690080019, -0.656878167095, -1.17671546996, 0.783912804279, 0.849615998432,
             -0.489674024707, 1.21891915729, -0.133770228816],
        ),
    ],
    "similarity": [
        (
            28.38339794175645,
            [1.29961072321, -0.534994406555, -1.35745268875, 0.698276574781, 0.877030030552,
             -1.00711793813, -0.225926345741, 0.463097695143],
        ),
        (
            27.959517766986828,
            [1.33690080019, -0.733731746069, -1.17671546996, 0.499219513293, 0.849615998432,
             -0.284741982443, 1.21891915729, 0.0352555452641],
        ),
    ],
}  # fmt: skip
SETTINGS = {
    "distance, hinge": {},
    "distance": {"max_distance": None},
    "similarity": {"matching": "similarity"},
}


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_loss_and_gradient_are_those_of_the_published_code(name):
    loss = glsd(6, **SETTINGS[name]).double()

    def step(phase):
        student, teacher = views(4, 6, phase=phase, grad=True), views(2, 6, phase=phase + 100)
        return loss(student, teacher, teacher_temp=0.05), leaves(student)

    check_golden(GOLDEN[name], step)


def test_tokens_without_a_match_count_in_the_mean():
    student, teacher = views(2, 6), views(2, 6, phase=100)
    found = glsd(6)(student, teacher, teacher_temp=0.05)
    matched = glsd(6)
    matched.local_loss.normalize = "matched"
    other = matched(student, teacher, teacher_temp=0.05)
    shares = [m.matched.double().mean() for m in found.matches.values()]
    assert min(shares) < 1  # or the test shows nothing
    assert found.local_loss < other.local_loss


def test_teacher_receives_no_gradient():
    student, teacher = views(3, 6, grad=True), views(2, 6, phase=9, grad=True)
    check_teacher_is_still(glsd(6), student, teacher, teacher_temp=0.05)


@pytest.mark.parametrize(("students", "teachers"), VIEW_COUNTS)
@pytest.mark.parametrize("matching", ["geometric", "similarity"])
def test_any_number_of_views(students, teachers, matching):
    student, teacher = views(students, 6, grad=True), views(teachers, 6, phase=9)
    terms = glsd(6, matching=matching)(student, teacher, teacher_temp=0.05)
    assert terms.loss > 0
    check_all_pairs(terms, students, teachers, 0.5, 0.5)


def test_state_goes_through_a_checkpoint():
    step = views(3, 6), views(2, 6, phase=9)
    loss = check_checkpoint(lambda: glsd(6), step, teacher_temp=0.05)
    check_two_centers(loss.global_loss, loss.local_loss)


def test_settings_reach_the_parts():
    loss = glsd(7, max_distance=0.3, student_temp=0.2, center_momentum=0.5)
    assert isinstance(loss.matcher, NearestMatcher)
    assert loss.matcher.max_distance == 0.3
    assert isinstance(glsd(7, matching="similarity").matcher, SimilarityMatcher)
    for part in (loss.global_loss, loss.local_loss):
        assert part.student_temp == 0.2
        assert (part.targets.num_prototypes, part.targets.momentum) == (7, 0.5)


def test_bad_input_is_refused():
    with pytest.raises(ConfigError, match="'geometrical'"):
        glsd(6, matching="geometrical")
    with pytest.raises(ConfigError, match="max_distance"):
        glsd(6, max_distance=0.0)
    nowhere = [x._replace(tokens=x.tokens._replace(geometry=None)) for x in views(2, 6)]
    with pytest.raises(ShapeError, match="geometry"):
        glsd(6)(nowhere, nowhere, teacher_temp=0.05)

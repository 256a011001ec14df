"""The recipe `densecl` against the authors' code, and what any loop may do with it."""

import pytest
import torch
from helpers.check_recipe import (
    VIEW_COUNTS,
    check_all_pairs,
    check_checkpoint,
    check_compiles,
    check_golden,
    check_teacher_is_still,
)
from helpers.recipe_views import leaves, views, wave

from local_distill import (
    ConfigError,
    DenseContrastiveLoss,
    GlobalContrastiveLoss,
    NegativeQueue,
    ShapeError,
    SimilarityMatcher,
    ViewOutput,
)
from local_distill.recipes import densecl
from local_distill.recipes.densecl import DenseclLoss

# Loss, then the gradient's numbers (global and dense features), of WXinlong/DenseCL's forward_train
# in float64, its encoders replaced by these features: two steps, the second with the keys that the
# first left in the queues of 8.
GOLDEN = [
    (7.0292604797522, [-0.060217752305, -0.0913800821086]),
    (5.992379745637448, [-0.0104434622285, -0.00307611729124]),
]


def filled(dim=6, num_keys=8):
    """The recipe with queues that are full, as the published ones always are."""
    loss = densecl(dim, num_keys=num_keys).double()
    loss.global_loss.queue.update(wave(num_keys, dim, phase=50.0))
    loss.dense_loss.queue.update(wave(num_keys, dim, phase=60.0))
    return loss


def test_loss_and_gradient_are_those_of_the_published_code():
    loss = filled()

    def step(phase):
        student, teacher = views(1, 6, phase=phase, grad=True), views(2, 6, phase=phase + 100)
        return loss(student, [ViewOutput(), teacher[1]]), leaves(student)

    check_golden(GOLDEN, step)


def test_both_ways_are_averaged():
    one, two = views(2, 6, grad=True)
    a, b = views(2, 6, phase=100)
    both = filled().eval()([one, two], [a, b])
    ways = [filled().eval()([one], [ViewOutput(), b]), filled().eval()([ViewOutput(), two], [a])]
    assert sorted(both.matches) == [(0, 1), (1, 0)]
    torch.testing.assert_close(both.loss, (ways[0].loss + ways[1].loss) / 2)


def test_queues_start_empty_and_take_the_teacher_in():
    loss = densecl(6, num_keys=8).double()
    student, teacher = views(1, 6, grad=True), views(2, 6, phase=100)
    terms = loss(student, [ViewOutput(), teacher[1]])
    assert terms.loss == 0
    terms.loss.backward()
    whole = torch.nn.functional.normalize(teacher[1].global_logits, dim=1)
    dense = torch.nn.functional.normalize(teacher[1].token_logits.mean(1), dim=1)
    for queue, keys in ((loss.global_loss.queue, whole), (loss.dense_loss.queue, dense)):
        torch.testing.assert_close(queue.keys[queue.valid], keys)
    assert loss(student, [ViewOutput(), teacher[1]]).loss > 0


def test_teacher_receives_no_gradient():
    student, teacher = views(2, 6, grad=True), views(2, 6, phase=9, grad=True)
    check_teacher_is_still(filled(), student, teacher)


@pytest.mark.parametrize(("students", "teachers"), VIEW_COUNTS)
def test_any_number_of_views(students, teachers):
    terms = filled()(views(students, 6, grad=True), views(teachers, 6, phase=9))
    assert terms.loss > 0
    check_all_pairs(terms, students, teachers, 0.5, 0.5)


def test_state_goes_through_a_checkpoint():
    check_checkpoint(filled, (views(2, 6), views(2, 6, phase=9)))


def test_settings_reach_the_parts():
    loss = densecl(5, num_keys=9, temp=0.3, local_weight=0.25)
    assert (loss.global_weight, loss.local_weight) == (0.75, 0.25)
    for part in (loss.global_loss, loss.dense_loss):
        assert (part.queue.dim, part.queue.num_keys) == (5, 9)
    assert loss.dense_loss.temp == loss.global_loss.dense.temp == 0.3
    assert loss.global_loss.queue is not loss.dense_loss.queue


def test_bad_input_is_refused_before_the_state_changes():
    loss = densecl(6, num_keys=8)
    view = views(2, 6)
    with pytest.raises(ShapeError, match="global_logits"):
        loss(view[:1], view[:1])
    bare = [x._replace(token_logits=None) for x in view]
    with pytest.raises(ShapeError, match="token_logits"):
        loss(bare, bare)
    blind = [x._replace(tokens=x.tokens._replace(features=None)) for x in view]
    with pytest.raises(ShapeError, match="features"):
        loss(blind, blind)
    with pytest.raises(ShapeError, match="dim=6"):
        loss(views(2, 5), views(2, 5))
    assert all(x.abs().sum() == 0 for x in loss.state_dict().values())


def test_bad_settings_are_refused():
    with pytest.raises(ConfigError, match="local_weight"):
        densecl(6, local_weight=1.5)
    with pytest.raises(ConfigError, match="temp"):
        densecl(6, temp=0.0)
    queue = NegativeQueue(8, 6)
    with pytest.raises(ConfigError, match="share"):
        DenseclLoss(GlobalContrastiveLoss(queue), DenseContrastiveLoss(queue), SimilarityMatcher())
    with pytest.raises(ConfigError, match="global_weight"):
        DenseclLoss(
            GlobalContrastiveLoss(queue),
            DenseContrastiveLoss(NegativeQueue(8, 6)),
            SimilarityMatcher(),
            global_weight=float("nan"),
        )


def test_compiles_into_one_graph():
    step = (views(2, 6, grad=True), views(2, 6, phase=9))
    check_compiles(filled(), step)

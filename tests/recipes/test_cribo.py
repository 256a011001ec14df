"""CrIBo's recipe gives the published numbers, and holds together as a module."""

import copy
import math

import pytest
import torch

from local_distill import ConfigError, ShapeError, TokenGrid, Tokens, ViewOutput, from_box
from local_distill.losses.global_distillation import GlobalDistillationLoss
from local_distill.losses.local_distillation import LocalDistillationLoss
from local_distill.matching.cross_image import CrossImageQueue
from local_distill.matching.refined_clusters import RefinedJointClusters
from local_distill.recipes.cribo import Cribo, cribo
from local_distill.targets.centering import Centering

B, PATCHES, FEATURES, PROTOTYPES, CLUSTER_PROTOTYPES, CLUSTERS, IMAGES = 4, 16, 6, 7, 5, 3, 8


def waves(*shape, phase):
    steps = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(steps**1.3 * 0.7 + phase).reshape(shape)


def views_of(step):
    """Two views of the student and of the teacher in one step, and what has a gradient."""
    grid = TokenGrid.tiling(4, 4, view_size=(64, 64))
    start = 100 * step
    student, teacher = [], []
    for v in range(2):
        u = waves(B, 4, phase=start + 40 + v).abs()
        left, top = 50 * u[:, 0], 50 * u[:, 1]
        box = torch.stack((left, top, left + 60 + 80 * u[:, 2], top + 60 + 80 * u[:, 3]), 1)
        geometry = from_box(box, (64, 64), (200, 200), hflip=u[:, 0] > 0.5)
        for views, phase in ((student, start + 10 * v), (teacher, start + 20 + 10 * v)):
            features = waves(B, PATCHES, FEATURES, phase=phase + 1)
            tokens = Tokens(features)
            if views is teacher:
                if v == 1:  # the views have something in common
                    features = 0.6 * teacher[0].tokens.features + 0.8 * features
                tokens = Tokens(features, geometry, grid)
            logits = waves(B, PROTOTYPES, phase=phase)
            views.append(ViewOutput(global_logits=logits, tokens=tokens))
    leaves = [part for view in student for part in (view.global_logits, view.tokens.features)]
    return student, teacher, [part.requires_grad_() for part in leaves]


def heads():
    return [waves(FEATURES, CLUSTER_PROTOTYPES, phase=50 + i) for i in range(2)]


def made(**settings):
    settings = {"num_clusters": CLUSTERS, "queue_images": IMAGES, **settings}
    return cribo(FEATURES, PROTOTYPES, CLUSTER_PROTOTYPES, **settings).double()


def terms_of(recipe, step, weights, student=None, teacher=None, **more):
    given = views_of(step)
    start = torch.arange(CLUSTERS) * 9 + torch.arange(B)[:, None] * 3 + step
    options = {
        "teacher_temp": 0.04,
        "cluster_teacher_temp": 0.05,
        "neighbour_weight": 0.0 if step < 2 else 1.0,
        "initial": start % (2 * PATCHES),
        **more,
    }
    return recipe(
        student or given[0],
        teacher or given[1],
        student_head=lambda pooled: pooled @ weights[0],
        teacher_head=lambda pooled: pooled @ weights[1],
        **options,
    ), given[2]


# What the authors' clustering, queue and loss (tileb1/CrIBo, float64 throughout, one process, patch
# positions at the centres, a queue of 8 images that two steps fill) give in the third and the fifth
# step: the three terms, the norms of the gradients of both views' logits and patches and of the
# head. 7 and 9 objects find a neighbour in the third step, 11 and 8 in the fifth.
GOLDEN = {
    2: ([13.98239051150033, 10.2596093348186, 12.07791872491719],
        [3.1173599726071606, 4.1869113457063145, 3.241329447262232, 3.3510357899955188,
         10.848222688442721]),
    4: ([12.945199120630516, 7.827393574450426, 9.210524946126393],
        [3.051497913484661, 2.436079094361237, 3.0743278813065364, 3.1107640134342236,
         8.765979691267026]),
}  # fmt: skip


def test_the_authors_numbers():
    recipe, weights = made(legacy=True), heads()
    weights[0].requires_grad_()
    for step in range(5):
        terms, leaves = terms_of(recipe, step, weights)
        if step not in GOLDEN:
            continue
        wanted, norms = GOLDEN[step]
        assert [float(term.detach()) for term in terms[1:4]] == pytest.approx(wanted, rel=1e-9)
        assert float(terms.loss.detach()) == pytest.approx(sum(wanted), rel=1e-9)
        grads = torch.autograd.grad(terms.loss, [*leaves, weights[0]])
        assert [float(grad.norm()) for grad in grads] == pytest.approx(norms, rel=1e-9)


def test_neighbours_are_divided_by_their_own_number():
    ours, theirs, weights = made(), made(legacy=True), heads()
    for step in range(3):
        own, _ = terms_of(ours, step, weights)
        other, _ = terms_of(theirs, step, weights)
    for term, same in zip(own[1:3], other[1:3], strict=True):
        torch.testing.assert_close(term, same)
    # by hand: what each way found, before this step's objects entered the queue
    fresh = made()
    for step in range(2):
        terms_of(fresh, step, weights)
    student, teacher, _ = views_of(2)
    center = fresh.cluster_loss.targets.center.clone()
    start = (torch.arange(CLUSTERS) * 9 + torch.arange(B)[:, None] * 3 + 2) % (2 * PATCHES)
    found = fresh.clusters(teacher[0].tokens, teacher[1].tokens, initial=start)
    asked, scores = [], []
    for part, own_view, other_view in zip(found, student, teacher, strict=True):
        asked.append(Tokens(part.pool(other_view.tokens.features)))
        scores.append(part.pool(own_view.tokens.features.detach()) @ weights[0])
    total, sums, counts = 0.0, [], []
    for v in range(2):
        way = fresh.queue(asked[v], asked[1 - v], view=v)
        value, count = 0.0, 0
        for image, k in way.matched.nonzero().tolist():
            row = fresh.queue.rows(v)[way.teacher_index[image, k, 0]]
            target = ((row @ weights[1] - center) / 0.05).softmax(-1)
            value -= float((target * (scores[1 - v][image, k] / 0.1).log_softmax(-1)).sum())
            count += 1
        total += value / count / 2
        sums.append(value)
        counts.append(count)
    assert counts[0] != counts[1]
    assert float(own.neighbour_loss.detach()) == pytest.approx(total, rel=1e-9)
    assert float(other.neighbour_loss.detach()) == pytest.approx(
        sum(sums) / counts[0] / 2, rel=1e-9
    )
    assert int(own.neighbours.sum()) == counts[0]


def test_the_weight_of_neighbours_comes_from_the_caller():
    recipe, weights = made(), heads()
    for step in range(2):
        terms_of(recipe, step, weights)
    for weight in (0.0, 0.3):
        terms, _ = terms_of(copy.deepcopy(recipe), 2, weights, neighbour_weight=weight)
        wanted = terms.global_loss + terms.cluster_loss + weight * terms.neighbour_loss
        torch.testing.assert_close(terms.loss, wanted)
        assert float(terms.neighbour_loss.detach()) > 0


def test_an_empty_queue_gives_zero_with_a_graph():
    for legacy in (False, True):
        terms, leaves = terms_of(made(legacy=legacy), 0, heads(), neighbour_weight=1.0)
        assert float(terms.neighbour_loss.detach()) == 0
        terms.loss.backward()
        assert all(part.grad.isfinite().all() for part in leaves)


def test_an_image_that_comes_again_is_no_neighbour_of_itself():
    recipe, weights = made(queue_images=4), heads()
    ids = torch.arange(B)
    terms_of(recipe, 3, weights, image_id=ids)
    again, _ = terms_of(copy.deepcopy(recipe), 3, weights)
    assert again.neighbours.all()
    named, _ = terms_of(copy.deepcopy(recipe), 3, weights, image_id=ids)
    assert int(named.neighbours.sum()) < again.neighbours.numel()
    # all images are one: neither way finds anything
    one = made(queue_images=4)
    same = torch.zeros_like(ids)
    terms_of(one, 3, weights, image_id=same)
    found, _ = terms_of(one, 3, weights, image_id=same)
    assert not found.neighbours.any()
    assert float(found.neighbour_loss.detach()) == 0


def test_the_queue_and_the_centers_learn_in_training_only():
    recipe, weights = made(), heads()
    with torch.no_grad():
        terms_of(recipe, 0, weights)
    terms_of(recipe.eval(), 0, weights)
    assert int(recipe.queue.count) == 0
    assert float(recipe.cluster_loss.targets.center.abs().max()) == 0
    terms_of(recipe.train(), 0, weights)
    assert int(recipe.queue.count) == B
    assert float(recipe.cluster_loss.targets.center.abs().max()) > 0


def test_the_teacher_gets_no_gradient():
    recipe, weights = made(), heads()
    for step in range(2):
        terms_of(recipe, step, weights)
    student, teacher, leaves = views_of(2)
    inputs = [part for view in teacher for part in (view.global_logits, view.tokens.features)]
    for part in (*inputs, *weights):
        part.requires_grad_()
    terms, _ = terms_of(recipe, 2, weights, student, teacher)
    terms.loss.backward()
    assert all(part.grad is not None for part in (*leaves, weights[0]))
    assert all(part.grad is None for part in (*inputs, weights[1]))


def test_state_comes_back():
    recipe, weights = made(), heads()
    for step in range(3):
        terms_of(recipe, step, weights)
    fresh = made()
    fresh.load_state_dict(recipe.state_dict())
    wanted = terms_of(recipe.eval(), 3, weights)[0].loss
    for other in (fresh, copy.deepcopy(recipe)):
        found = terms_of(other.eval(), 3, weights)[0].loss
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_bad_input_is_refused():
    recipe, weights = made(), heads()
    student, teacher, _ = views_of(0)
    with pytest.raises(ShapeError, match="`teacher` must have two views, got 1"):
        terms_of(recipe, 0, weights, student, teacher[:1])
    with pytest.raises(ShapeError, match=r"`student\[0\]` has no `global_logits`"):
        terms_of(recipe, 0, weights, [view._replace(global_logits=None) for view in student])
    with pytest.raises(ShapeError, match=r"`student\[0\]` has no `tokens`"):
        terms_of(recipe, 0, weights, [view._replace(tokens=None) for view in student])
    with pytest.raises(ShapeError, match=r"`student\[0\].tokens` has no `features`"):
        terms_of(recipe, 0, weights, [view._replace(tokens=Tokens()) for view in student])
    for weight in (-1.0, math.nan, None):
        with pytest.raises(ConfigError, match="`neighbour_weight`"):
            terms_of(recipe, 0, weights, neighbour_weight=weight)
    for settings, text in (
        ({"num_clusters": 0}, "`num_clusters`"),
        ({"queue_images": 0}, "`num_images`"),
        ({"cluster_student_temp": 0.0}, "`cluster_student_temp`"),
    ):
        with pytest.raises(ConfigError, match=text):
            cribo(**{"queue_images": 2, **settings})
    with pytest.raises(TypeError):
        cribo(tokens=3)
    with pytest.raises(ConfigError, match="num_objects=4"):
        Cribo(
            GlobalDistillationLoss(Centering(3)),
            LocalDistillationLoss(Centering(3)),
            RefinedJointClusters(3),
            CrossImageQueue(2, num_objects=4, feature_dim=3),
        )

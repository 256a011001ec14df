"""SDSSL's recipes give the published numbers, and hold together as modules."""

import copy

import pytest
import torch
from torch import nn

from local_distill import ConfigError, ShapeError
from local_distill.layer_heads import LayerHeads
from local_distill.losses.intermediate import IntermediateDistillationLoss
from local_distill.losses.view_objectives import ByolObjective
from local_distill.recipes.sdssl import Sdssl, sdssl_byol, sdssl_moco, sdssl_simclr

RECIPES = {"moco": sdssl_moco, "byol": sdssl_byol, "simclr": sdssl_simclr}
SIZES = {"embed_dim": 5, "hidden_dim": 4, "last_hidden_dim": 8, "out_dim": 4}


def waves(*shape, phase):
    steps = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(steps * 0.7 + phase).reshape(shape)


@torch.no_grad()
def fill(head):
    """Weights that anyone can write down: sines, around 1 for those of BatchNorm."""
    for i, weight in enumerate(head.parameters()):
        weight.copy_(waves(*weight.shape, phase=i) + (1.0 if weight.dim() == 1 else 0.0))


def made(method, depth=12, **more):
    recipe = RECIPES[method](depth, **SIZES, **more).double()
    for head in (*recipe.student_heads.projectors, *recipe.student_heads.predictors):
        fill(head)
    if recipe.teacher_head is not None:
        fill(recipe.teacher_head.module)
    return recipe


def step(recipe, method, depth=12, *, ratio, b=6):
    student = [waves(depth, b, 5, phase=phase).requires_grad_() for phase in (0.0, 1.0)]
    teacher = [waves(b, 5, phase=phase).requires_grad_() for phase in (2.0, 3.0)]
    last = None if method == "simclr" else teacher
    return student, teacher, recipe(student, last, ratio=ratio)


# What a training step of the authors' code (hagiss/SDSSL, its network wrapper with 12 layers, on
# one process, float64) gives for these features and weights: the loss, the norms of the gradient
# of both views' features and of all heads.
GOLDEN = {
    ("moco", 0.37): (
        53.70366867268757, 0.7855854872636576, 1.6673591494243714, 10.68436747955354),
    ("byol", 0.37): (
        20.308072693954465, 0.23947668363646252, 0.22565743550435727, 7.215380541160548),
    ("byol", 0.0): (
        19.80637906283481, 0.051704495347957194, 0.05644095952355553, 6.731424132626874),
    ("simclr", 0.37): (
        4.0790619396880725, 1.8925132900888808, 2.8792332374139624, 10.328239099361717),
}  # fmt: skip


@pytest.mark.parametrize(("method", "ratio"), GOLDEN)
def test_the_authors_numbers(method, ratio):
    recipe = made(method, **({} if method == "moco" else {"legacy": True}))
    student, _, terms = step(recipe, method, ratio=ratio)
    terms.loss.backward()
    heads = [part.grad for part in recipe.student_heads.parameters() if part.grad is not None]
    reached = [
        float(terms.loss.detach()),
        *(float(view.grad.norm()) for view in student),
        float(torch.cat([grad.flatten() for grad in heads]).norm()),
    ]
    assert reached == pytest.approx(GOLDEN[method, ratio], rel=1e-9)


def test_lower_layers_learn_nothing_from_byol_at_ratio_0_but_in_the_authors_code():
    for legacy in (False, True):
        student, _, terms = step(made("byol", 3, legacy=legacy), "byol", 3, ratio=0.0)
        terms.loss.backward()
        assert (float(student[0].grad[:-1].abs().max()) > 0) is legacy


@pytest.mark.parametrize("method", RECIPES)
def test_the_student_alone_gets_a_gradient(method):
    recipe = made(method, 3)
    student, teacher, terms = step(recipe, method, 3, ratio=0.5)
    terms.loss.backward()
    assert all(view.grad is not None for view in student)
    assert all(view.grad is None for view in teacher)
    assert all(part.grad is not None for part in recipe.student_heads.parameters())
    if recipe.teacher_head is not None:
        assert not any(part.requires_grad for part in recipe.teacher_head.parameters())


def test_simclr_takes_batch_statistics_over_both_views():
    recipe = made("simclr", 2)
    student = [waves(2, 4, 5, phase=phase) for phase in (0.0, 1.0)]
    terms = recipe(student, ratio=0.5)
    both = recipe.student_heads(torch.cat(student, 1)).projections
    views = [both[:, :4], both[:, 4:]]
    wanted = recipe.loss(views, [view[-1] for view in views], ratio=0.5)
    torch.testing.assert_close(terms.loss, wanted.loss)
    alone = [recipe.student_heads(view).projections for view in student]
    other = recipe.loss(alone, [view[-1] for view in alone], ratio=0.5)
    assert not torch.allclose(terms.loss, other.loss)


@pytest.mark.parametrize("method", RECIPES)
def test_state_comes_back(method):
    recipe = made(method, 3)
    before = step(recipe, method, 3, ratio=0.5)[2]
    fresh = RECIPES[method](3, **SIZES).double()
    fresh.load_state_dict(recipe.state_dict())
    for other in (fresh, copy.deepcopy(recipe)):
        again = step(other, method, 3, ratio=0.5)[2]
        torch.testing.assert_close(again.loss, before.loss, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["moco", "byol"])
def test_the_teachers_head_follows_the_students_last_projector(method):
    recipe = made(method, 2)
    own = next(recipe.teacher_head.parameters())
    theirs = next(recipe.student_heads.projectors[-1].parameters())
    with torch.no_grad():
        theirs.add_(1.0)
    wanted = 0.75 * own.detach() + 0.25 * theirs.detach()
    recipe.update_teacher(0.75)
    torch.testing.assert_close(own.detach(), wanted)
    made("simclr", 2).update_teacher(0.5)  # has none: nothing to do


@pytest.mark.parametrize("method", ["moco", "byol"])
def test_targets_come_from_the_teachers_head(method):
    recipe = made(method, 2)
    with torch.no_grad():
        for weight in recipe.teacher_head.parameters():
            weight.mul_(0.5 + waves(*weight.shape, phase=9).abs())
    student, teacher, terms = step(recipe, method, 2, ratio=0.5)
    outputs = [recipe.student_heads(view) for view in student]
    targets = [recipe.teacher_head.module(features) for features in teacher]
    wanted = recipe.loss(
        [out.predictions for out in outputs],
        targets,
        ratio=0.5,
        detached_layers=[out.detached for out in outputs],
    )
    torch.testing.assert_close(terms.loss, wanted.loss)
    other = step(made(method, 2), method, 2, ratio=0.5)[2]
    assert not torch.allclose(terms.loss, other.loss)


def test_simclr_can_lose_the_gradient_of_other_processes():
    assert sdssl_simclr(2, **SIZES, legacy=True).loss.objective.legacy
    assert not sdssl_simclr(2, **SIZES).loss.objective.legacy


@pytest.mark.parametrize("method", RECIPES)
def test_layers_of_several_widths_and_many_views(method):
    recipe = RECIPES[method](2, **{**SIZES, "embed_dim": (3, 6)})
    student = [[torch.randn(4, 3), torch.randn(4, 6)] for _ in range(3)]
    teacher = None if method == "simclr" else [torch.randn(4, 6) for _ in range(2)]
    loss = recipe(student, teacher, ratio=0.5).loss
    assert loss.isfinite()
    loss.backward()
    with torch.no_grad():
        assert recipe(student, teacher, ratio=0.5).loss.isfinite()


@pytest.mark.parametrize("method", RECIPES)
def test_training_the_heads_lowers_the_loss(method):
    torch.manual_seed(0)
    recipe = made(method, 2)
    optimiser = torch.optim.SGD(recipe.student_heads.parameters(), lr=0.01)
    losses = []
    for _ in range(15):
        terms = step(recipe, method, 2, ratio=0.5)[2]
        optimiser.zero_grad()
        terms.loss.backward()
        optimiser.step()
        losses.append(float(terms.loss.detach()))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("method", RECIPES)
def test_bad_input_is_refused(method):
    recipe = made(method, 2)
    student = [torch.randn(2, 4, 5).double() for _ in range(2)]
    teacher = [torch.randn(4, 5).double() for _ in range(2)]
    last = None if method == "simclr" else teacher
    with pytest.raises(ShapeError, match="`teacher_last`"):
        recipe(student, teacher if last is None else None, ratio=0.5)
    with pytest.raises(ShapeError, match="3 layers"):
        recipe([torch.randn(3, 4, 5).double()] * 2, last, ratio=0.5)
    with pytest.raises(ShapeError, match="`student_layers`"):
        recipe(student[0], last, ratio=0.5)
    with pytest.raises(ConfigError, match="`ratio`"):
        recipe(student, last, ratio=-1.0)
    with pytest.raises(ConfigError, match="`depth`"):
        RECIPES[method](0)
    with pytest.raises(TypeError):
        RECIPES[method](2, hidden=3)
    heads = LayerHeads(5, 2, method="byol", hidden_dim=4, last_hidden_dim=4, out_dim=3)
    with pytest.raises(ConfigError, match="depth=3"):
        Sdssl(heads, IntermediateDistillationLoss(ByolObjective(), depth=3))


def test_published_sizes():
    with torch.device("meta"):
        recipe = sdssl_moco()
    assert recipe.loss.depth == 12
    widths = [
        part.weight.shape for part in recipe.teacher_head.module if isinstance(part, nn.Linear)
    ]
    assert [tuple(shape) for shape in widths] == [(4096, 768), (4096, 4096), (256, 4096)]

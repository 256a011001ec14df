"""CrOC's recipe gives the published numbers, and holds together as a module."""

import copy

import pytest
import torch

from local_distill import ConfigError, ShapeError, TokenGrid, Tokens, from_box
from local_distill.recipes.croc import CrocView, croc

B, HEADS, PATCHES, FEATURES, KEYS, PROTOTYPES, CLUSTER_PROTOTYPES = 3, 2, 16, 6, 4, 7, 5


def waves(*shape, phase):
    steps = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(steps * 0.7 + phase).reshape(shape)


def step_of():
    """Two views of the student and of the teacher, the heads' weights, and what has a gradient."""
    grid = TokenGrid.tiling(4, 4, view_size=(64, 64))
    student, teacher = [], []
    for v in range(2):
        u = waves(B, 4, phase=40 + v).abs()
        left, top = 50 * u[:, 0], 50 * u[:, 1]
        box = torch.stack((left, top, left + 60 + 80 * u[:, 2], top + 60 + 80 * u[:, 3]), 1)
        geometry = from_box(box, (64, 64), (200, 200), hflip=u[:, 0] > 0.5)
        for views, start in ((student, 10 * v), (teacher, 20 + 10 * v)):
            view = CrocView(
                waves(B, PROTOTYPES, phase=start),
                waves(B, FEATURES, phase=start + 1),
                Tokens(waves(B, PATCHES, FEATURES, phase=start + 2)),
            )
            if views is teacher:
                view = view._replace(
                    tokens=view.tokens._replace(geometry=geometry, grid=grid),
                    keys=waves(B, HEADS, PATCHES, KEYS, phase=start + 3),
                    cls_keys=waves(B, HEADS, KEYS, phase=start + 4),
                )
            views.append(view)
    leaves = [part for view in student for part in (view.global_logits, view.cls)]
    leaves += [view.tokens.features for view in student]
    weights = [waves(FEATURES, CLUSTER_PROTOTYPES, phase=50 + i) for i in range(2)]
    return student, teacher, weights, [part.requires_grad_() for part in (*leaves, weights[0])]


def start(times=B * HEADS):
    return (torch.arange(5) * 6 + torch.arange(times)[:, None]) % (2 * PATCHES)


def made(**settings):
    recipe = croc(PROTOTYPES, CLUSTER_PROTOTYPES, **settings).double()
    recipe.global_loss.targets.center.copy_(waves(PROTOTYPES, phase=52) * 0.1)
    recipe.cluster_loss.targets.center.copy_(waves(CLUSTER_PROTOTYPES, phase=53) * 0.1)
    return recipe


def terms_of(recipe, student, teacher, weights, **more):
    options = {"teacher_temp": 0.04, "cluster_teacher_temp": 0.05, "initial": start(), **more}
    return recipe(
        student,
        teacher,
        student_head=lambda pooled: pooled @ weights[0],
        teacher_head=lambda pooled: pooled @ weights[1],
        **options,
    )


def test_the_authors_numbers():
    # their clustering and loss (stegmuel/CrOC, float64, one process, patch positions at the
    # centres, these tokens to start from): the loss and its two terms, the norms of the gradients
    # of both views' logits, [CLS], patches, and of the head, and those of the centers afterwards
    student, teacher, weights, leaves = step_of()
    recipe = made()
    terms = terms_of(recipe, student, teacher, weights)
    terms.loss.backward()
    assert [float(term.detach()) for term in terms[:3]] == pytest.approx(
        [17.017539745299857, 13.599667708926617, 3.4178720363732396], rel=1e-10
    )
    assert [float(part.grad.norm()) for part in leaves] == pytest.approx(
        [3.7579313185565657, 0.46037456100547314, 3.5851945555386737, 0.46037456100547314,
         3.7864883568205894, 3.2093460761252186, 6.989796798840766], rel=1e-10,
    )  # fmt: skip
    centers = [recipe.global_loss.targets.center, recipe.cluster_loss.targets.center]
    assert [float(center.norm()) for center in centers] == pytest.approx(
        [0.14655879865237956, 0.14160552798485404], rel=1e-10
    )


def test_the_teacher_gets_no_gradient():
    student, teacher, weights, leaves = step_of()
    for view in teacher:
        for part in (view.global_logits, view.cls, view.tokens.features, view.keys):
            part.requires_grad_()
            leaves.append(part)
    weights[1].requires_grad_()
    terms_of(made(), student, teacher, weights).loss.backward()
    assert all(part.grad is not None for part in leaves[:7])
    assert all(part.grad is None for part in (*leaves[7:], weights[1]))


def test_clusters_that_one_view_lacks_do_not_count():
    student, teacher, weights, leaves = step_of()
    # one view's keys lie in one plane, the other's in another, so that few clusters are in both
    first, second = (view.keys.clone() for view in teacher)
    first[..., :2] = 0
    second[..., 2:] = 0
    teacher = [teacher[0]._replace(keys=first), teacher[1]._replace(keys=second)]
    recipe = made(position_weight=0.0)
    terms = terms_of(recipe, student, teacher, weights)
    assert 0 < int(terms.valid.sum()) < terms.valid.numel()
    seen, taught = [], []

    def head(pooled):
        seen.append(pooled.detach())
        return torch.where(terms.valid[..., None], pooled @ weights[0], torch.nan)

    def teacher_head(pooled):
        taught.append(pooled)
        return torch.where(terms.valid[..., None], pooled @ weights[1], torch.nan)

    other = made(position_weight=0.0)
    again = other(
        student, teacher, student_head=head, teacher_head=teacher_head,
        teacher_temp=0.04, cluster_teacher_temp=0.05, initial=start(),
    )  # fmt: skip
    torch.testing.assert_close(again.loss, terms.loss)
    targets = recipe.cluster_loss.targets
    rows = torch.cat([(view @ weights[1])[terms.valid] for view in taught])
    before = made().cluster_loss.targets.center
    torch.testing.assert_close(targets.center, 0.9 * before + 0.1 * rows.mean(0))
    again.loss.backward()
    assert all(part.grad.isfinite().all() for part in leaves)
    lengths = torch.cat([view.cls for view in student]).norm(dim=-1).mean()
    for pooled in seen:
        wanted = torch.where(terms.valid, lengths, 0.0)
        torch.testing.assert_close(pooled.norm(dim=-1), wanted)


def test_no_cluster_at_all_is_zero_with_a_graph():
    student, teacher, weights, leaves = step_of()
    nothing = [view._replace(keys=torch.zeros_like(view.keys)) for view in teacher]
    terms = terms_of(made(), student, nothing, weights)
    assert float(terms.cluster_loss.detach()) == 0
    terms.loss.backward()
    assert all(part.grad is None or part.grad.isfinite().all() for part in leaves)


@pytest.mark.parametrize("size", [1e18, 1e-18])
def test_features_of_any_size(size):
    student, teacher, weights, _ = step_of()
    leaves, views = [], []
    for view in student:
        parts = [(part * size).detach().float() for part in (view.cls, view.tokens.features)]
        leaves += [part.requires_grad_() for part in parts]
        views.append(view._replace(cls=parts[0], tokens=Tokens(parts[1])))
    terms = croc(PROTOTYPES, CLUSTER_PROTOTYPES)(
        views, teacher, student_head=lambda pooled: (pooled / size) @ weights[0].float(),
        teacher_head=lambda pooled: pooled @ weights[1], teacher_temp=0.04, initial=start(),
    )  # fmt: skip
    terms.loss.backward()
    assert terms.loss.isfinite()
    assert all(part.grad.isfinite().all() for part in leaves)
    wanted = terms_of(
        croc(PROTOTYPES, CLUSTER_PROTOTYPES), student, teacher, weights, cluster_teacher_temp=0.04
    )
    assert float(terms.loss.detach()) == pytest.approx(float(wanted.loss.detach()), rel=1e-5)


def test_the_draw_follows_its_generator():
    student, teacher, weights, _ = step_of()
    losses = [
        terms_of(made(), student, teacher, weights, initial=None,
                 generator=torch.Generator().manual_seed(seed)).loss
        for seed in (0, 0, 1)
    ]  # fmt: skip
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0)
    assert not torch.equal(losses[0], losses[2])


def test_state_comes_back():
    student, teacher, weights, _ = step_of()
    recipe = made()
    terms_of(recipe, student, teacher, weights)
    fresh = croc(PROTOTYPES, CLUSTER_PROTOTYPES).double()
    fresh.load_state_dict(recipe.state_dict())
    wanted = terms_of(recipe.eval(), student, teacher, weights).loss
    for other in (fresh, copy.deepcopy(recipe)):
        torch.testing.assert_close(
            terms_of(other.eval(), student, teacher, weights).loss, wanted, rtol=0, atol=0
        )


def test_the_teacher_temperature_of_clusters_is_by_default_that_of_views():
    student, teacher, weights, _ = step_of()
    losses = [
        terms_of(made(), student, teacher, weights, cluster_teacher_temp=temp).loss
        for temp in (None, 0.04, 0.07)
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0)
    assert not torch.equal(losses[0], losses[2])


def test_bad_input_is_refused():
    student, teacher, weights, _ = step_of()
    recipe = made()
    with pytest.raises(ShapeError, match="`student` must have two views, got 1"):
        terms_of(recipe, student[:1], teacher, weights)
    with pytest.raises(ShapeError, match=r"`teacher\[0\]` needs `keys`"):
        terms_of(recipe, student, student, weights)
    with pytest.raises(ShapeError, match="axis `b`"):
        terms_of(
            recipe, [student[0]._replace(cls=student[0].cls[:1]), student[1]], teacher, weights
        )
    bare = [view._replace(tokens=view.tokens._replace(features=None)) for view in student]
    with pytest.raises(ShapeError, match=r"`student\[0\].tokens` has no `features`"):
        terms_of(recipe, bare, teacher, weights)
    for settings, text in (
        ({"max_clusters": 6}, "`max_clusters`"),
        ({"cluster_weight": 0.0}, "`cluster_weight`"),
        ({"cost_scale": "views"}, "cost_scale"),
        ({"student_temp": 0.0}, "`student_temp`"),
    ):
        with pytest.raises(ConfigError, match=text):
            croc(**settings)
    with pytest.raises(TypeError):
        croc(heads=6)

"""What the losses refuse, and that nothing is lost when they do."""

import pytest
import torch
from helpers.strategies import random_geometry

from local_distill import (
    Centering,
    ConfigError,
    GlobalDistillationLoss,
    GlobalLocalDistillationLoss,
    LocalDistillationLoss,
    MaskedDistillationLoss,
    Matches,
    NearestMatcher,
    PrototypeLogits,
    ShapeError,
    TokenGrid,
    Tokens,
    ViewOutput,
    local_distillation_loss,
    match_views,
)
from local_distill.losses import (
    DenseContrastiveLoss,
    GramAnchoringLoss,
    MocoV3Objective,
    NegativeQueue,
    PixelConsistencyLoss,
)


def step(**change):
    parts = {
        "student_logits": [torch.randn(2, 3, 5)],
        "teacher_logits": [torch.randn(2, 4, 5)],
        "matches": matches(),
        "teacher_temp": 0.04,
    }
    return parts | change


def matches(b=2, s=3, top=0):
    index = torch.zeros(b, s, 1).long()
    index[-1, -1] = top
    return {(0, 0): Matches(index, torch.ones(b, s, 1), torch.zeros(b, s))}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"teacher_logits": [torch.randn(2, 4, 6)]}, "axis `c` is 5 in `student_logits.0.` but 6"),
        ({"teacher_logits": [torch.randn(1, 4, 5)]}, "axis `b` is 2 in `student_logits.0.` but 1"),
        ({"student_logits": [torch.randn(2, 3, 1)]}, "axis `c` is 1"),
        ({"student_logits": [torch.randn(2, 2, 5)]}, "axis `s` is 2"),
        ({"student_logits": torch.randn(2, 3, 5)}, "`student_logits` must be a list"),
        ({"student_logits": [torch.randn(2, 5)]}, "must have 3 axes `b s c`"),
        ({"student_logits": [None]}, "must be a tensor"),
        ({"student_logits": [torch.ones(2, 3, 5).long()]}, "floating-point"),
        ({"matches": {(1, 0): None}}, r"pair \(1, 0\) but there are 1 student"),
        ({"matches": matches(top=4)}, "reaches 4"),
        ({"matches": matches(b=1)}, "axis `b`"),
        ({"matches": matches()[0, 0]}, r"must be a dict {\(v, q\): Matches}, got Matches; match_v"),
        ({"matches": [matches()[0, 0]]}, "`matches` must be a dict .*, got list"),
        ({"matches": {(0, 0): None}}, r"`matches\[\(0, 0\)\]` must be Matches.*, got NoneType"),
        ({"matches": {0: matches()[0, 0]}}, r"keys \(student view, teacher view\), got the key 0"),
        (
            {"student_logits": PrototypeLogits(torch.randn(2, 3, 4), torch.randn(5, 4))},
            r"got PrototypeLogits; wrap a single view as \[student_logits\]",
        ),
        ({"teacher_valid": [None, None]}, "`teacher_valid` has 2 views"),
        ({"teacher_valid": [torch.ones(2, 3, dtype=torch.bool)]}, r"`valid\[0\]`"),
    ],
)
def test_shapes_are_refused_by_name_and_no_state_moves(change, text):
    loss = LocalDistillationLoss(Centering(5))
    with pytest.raises(ShapeError, match=text):
        loss(**step(**change))
    assert float(loss.targets.center.abs().max()) == 0


def test_prototypes_of_the_targets_must_fit():
    with pytest.raises(ShapeError, match="num_prototypes=8"):
        LocalDistillationLoss(Centering(8))(**step())


@pytest.mark.parametrize("temp", [0.0, -0.1, float("nan"), float("inf"), None])
def test_temperatures_must_be_above_zero(temp):
    loss = LocalDistillationLoss(Centering(5))
    with pytest.raises(ConfigError, match="teacher_temp"):
        loss(**step(teacher_temp=temp))
    with pytest.raises(ConfigError, match="student_temp"):
        LocalDistillationLoss(Centering(5), student_temp=temp)
    with pytest.raises(ConfigError, match="student_temp"):
        GlobalDistillationLoss(Centering(5), student_temp=temp)


@pytest.mark.parametrize(
    ("targets", "text"),
    [
        ("centering", r"called with teacher logits and have `update`, .*, got 'centering'"),
        (Centering, "got the class Centering; make one of it"),
        (None, "got None"),
        (torch.nn.Softmax(-1), r"have `update`, .*, got Softmax"),
    ],
)
@pytest.mark.parametrize(
    "loss", [LocalDistillationLoss, GlobalDistillationLoss, MaskedDistillationLoss]
)
def test_targets_that_are_none(loss, targets, text):
    with pytest.raises(ConfigError, match="`targets` must .*" + text):
        loss(targets)


def test_teacher_logits_for_targets():
    parts = step()
    with pytest.raises(ShapeError, match=r"`teacher_targets` must be TeacherTargets.*, got Tensor"):
        local_distillation_loss(
            parts["student_logits"][0], parts["teacher_logits"][0], matches()[0, 0]
        )


@pytest.mark.parametrize(
    "loss",
    [
        DenseContrastiveLoss(NegativeQueue(6, dim=5)),
        PixelConsistencyLoss(),
        GramAnchoringLoss(),
        MocoV3Objective(),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_losses_on_features_refuse_the_matches_of_one_pair(loss):
    student, teacher = [torch.randn(2, 3, 5)], [torch.randn(2, 3, 5)]
    with pytest.raises(ShapeError, match=r"`matches` must be a dict .*, got Matches"):
        loss(student, teacher, matches=matches()[0, 0])
    with pytest.raises(
        ShapeError, match=r"`matches` has the pair \(1, 0\) but there are 1 student"
    ):
        loss(student, teacher, matches={(1, 0): matches()[0, 0]})
    assert loss(student, teacher, matches=matches()).isfinite()


def test_unknown_normalization():
    with pytest.raises(ConfigError, match="all, matched, image"):
        LocalDistillationLoss(Centering(5), normalize="mean")


@pytest.mark.parametrize(
    ("student", "teacher", "pairs", "text"),
    [
        ([torch.randn(2, 5)], [torch.randn(2, 5)], None, "no pair of different views"),
        ([torch.randn(2, 5)], [torch.randn(1, 5)], [(0, 0)], "axis `b`"),
        ([torch.randn(2, 5)], [torch.randn(2, 6)], [(0, 0)], "axis `c`"),
        ([torch.randn(2, 5)], [torch.randn(2, 5)], [(0, 3)], "names .0, 3."),
        (torch.randn(2, 5), [torch.randn(2, 5)], None, "must be a list"),
    ],
)
def test_global_inputs_are_refused(student, teacher, pairs, text):
    with pytest.raises(ShapeError, match=text):
        GlobalDistillationLoss(Centering(5))(student, teacher, teacher_temp=0.04, pairs=pairs)


def outputs(views, *, token_logits=True, seed=0):
    grid = TokenGrid.tiling(2, 3, (24, 40))
    found = []
    for view in range(views):
        g = torch.Generator().manual_seed(seed + view)
        tokens = Tokens(torch.randn(2, 6, 4, generator=g), random_geometry(seed=view), grid)
        local = torch.randn(2, 6, 7, generator=g) if token_logits else None
        found.append(ViewOutput(torch.randn(2, 5, generator=g), local, tokens))
    return found


def build(**weights):
    return GlobalLocalDistillationLoss(
        GlobalDistillationLoss(Centering(5)),
        LocalDistillationLoss(Centering(7)),
        NearestMatcher(),
        **weights,
    )


def test_global_and_local_are_put_together():
    student, teacher = outputs(3), outputs(2, seed=50)
    terms = build(global_weight=0.3, local_weight=2.0)(student, teacher, teacher_temp=0.04)
    whole = GlobalDistillationLoss(Centering(5))(
        [view.global_logits for view in student],
        [view.global_logits for view in teacher],
        teacher_temp=0.04,
    )
    found = match_views(
        NearestMatcher(), [view.tokens for view in student], [view.tokens for view in teacher]
    )
    local = LocalDistillationLoss(Centering(7))(
        [view.token_logits for view in student],
        [view.token_logits for view in teacher],
        found,
        teacher_temp=0.04,
    )
    torch.testing.assert_close(terms.global_loss, whole)
    torch.testing.assert_close(terms.local_loss, local)
    torch.testing.assert_close(terms.loss, 0.3 * whole + 2.0 * local)
    assert sorted(terms.matches) == [(0, 1), (1, 0), (2, 0), (2, 1)]


def test_views_without_token_logits_take_no_part_locally():
    student, teacher = outputs(3), outputs(2, seed=50)
    student[2] = student[2]._replace(token_logits=None)
    student[1] = student[1]._replace(global_logits=None)
    terms = build()(student, teacher, teacher_temp=0.04)
    assert sorted(terms.matches) == [(0, 1), (1, 0)]
    wanted = GlobalDistillationLoss(Centering(5))(
        [student[0].global_logits, student[2].global_logits],
        [view.global_logits for view in teacher],
        teacher_temp=0.04,
        pairs=[(0, 1), (1, 0), (1, 1)],
    )
    torch.testing.assert_close(terms.global_loss, wanted)


def test_nothing_local_is_an_error():
    views = outputs(2, token_logits=False)
    with pytest.raises(ShapeError, match="use GlobalDistillationLoss"):
        build()(views, views, teacher_temp=0.04)


def test_shared_targets_and_bad_weights_are_refused():
    targets = Centering(5)
    with pytest.raises(ConfigError, match="give each its own"):
        GlobalLocalDistillationLoss(
            GlobalDistillationLoss(targets), LocalDistillationLoss(targets), NearestMatcher()
        )
    with pytest.raises(ConfigError, match=r"got the class NearestMatcher; make one"):
        GlobalLocalDistillationLoss(
            GlobalDistillationLoss(targets), LocalDistillationLoss(Centering(5)), NearestMatcher
        )
    with pytest.raises(ConfigError, match="local_weight"):
        build(local_weight=-1.0)


@pytest.mark.parametrize(("views", "teachers"), [(1, 2), (2, 1), (2, 3)])
def test_any_counts_of_views(views, teachers):
    terms = build()(outputs(views), outputs(teachers, seed=9), teacher_temp=0.04)
    assert terms.loss.isfinite()
    assert len(terms.matches) == sum(v != q for v in range(views) for q in range(teachers))


def test_the_whole_step_compiles_to_one_graph():
    plain, loss = build(), build()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        student, teacher = outputs(3, seed=seed), outputs(2, seed=50 + seed)
        temp = 0.04 + 0.01 * seed  # warmed up, as DINO does
        found = compiled(student, teacher, teacher_temp=temp)
        wanted = plain(student, teacher, teacher_temp=temp)
        torch.testing.assert_close(found.loss, wanted.loss)
        assert torch.equal(found.matches[2, 1].teacher_index, wanted.matches[2, 1].teacher_index)
    torch.testing.assert_close(loss.local_loss.targets.center, plain.local_loss.targets.center)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda index: index - 1, "reaches -1 but `teacher_logits.0.` has 4 tokens"),
        (lambda index: index.int(), "teacher_index` must be int64, got torch.int32"),
    ],
)
def test_indices_that_point_at_no_token_are_refused(change, text):
    found = matches()[0, 0]
    bad = {(0, 0): found._replace(teacher_index=change(found.teacher_index))}
    with pytest.raises(ShapeError, match=text):
        LocalDistillationLoss(Centering(5))(**step(matches=bad))

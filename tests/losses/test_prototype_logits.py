"""Losses and targets on `PrototypeLogits`: what they give for the logits multiplied out."""

import os
from unittest import mock

import pytest
import torch

from local_distill import (
    Centering,
    GlobalDistillationLoss,
    GlobalLocalDistillationLoss,
    LocalDistillationLoss,
    Matches,
    NearestMatcher,
    PrototypeLogits,
    SinkhornKnopp,
    TeacherTargets,
    TokenGrid,
    Tokens,
    ViewOutput,
    from_box,
    local_distillation_loss,
)
from local_distill.errors import ConfigError, ShapeError
from local_distill.heads import ProjectionHead
from local_distill.kernels import prototype_block, use_prototype_bytes
from local_distill.losses import (
    MaskedDistillationLoss,
    _fused_pairs,
    _pairs,
    distillation_monitors,
)

C, TEMP = 13, 0.2
TARGETS = {"centering": Centering, "sinkhorn": SinkhornKnopp}


def views(counts, d, weight, seed=0, *, bias=None, b=3, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    shapes = [(b, n, d) if n else (b, d) for n in counts]
    features = [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]
    return [PrototypeLogits(one.requires_grad_(), weight, bias) for one in features]


def prototypes(d, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(C, d, generator=g, dtype=torch.float64).to(dtype).requires_grad_()


def some_matches(s, t, k, seed=0, b=3):
    g = torch.Generator().manual_seed(seed)
    index = torch.randint(0, t, (b, s, k), generator=g)
    weight = torch.rand(b, s, k, generator=g) / k * (torch.rand(b, s, 1, generator=g) < 0.7)
    return Matches(index, weight, torch.where(weight.sum(-1) > 0, 0.0, torch.inf))


def step(bias=None):
    """Student views of 6, 9 and 4 tokens, teacher views of 6 and 9, as both kinds of logits."""
    weight, teacher_weight = prototypes(5, 1), prototypes(3, 2)
    student = views((6, 9, 4), 5, weight, bias=bias)
    teacher = views((6, 9), 3, teacher_weight, 7)
    matches = {
        (0, 1): some_matches(6, 9, 1),
        (1, 0): some_matches(9, 6, 3),
        (2, 0): some_matches(4, 6, 9),
        (2, 1): some_matches(4, 9, 1),
    }
    return student, teacher, matches


def gradients(value, student):
    inputs = [one.features for one in student] + [student[0].weight]
    inputs += [] if student[0].bias is None else [student[0].bias]
    return torch.autograd.grad(value, inputs, allow_unused=True)


def out(logits):
    return [one.logits() for one in logits]


def never_plain():
    """No table of logits is made by the losses while this holds."""
    return mock.patch.object(PrototypeLogits, "logits", side_effect=AssertionError("multiplied"))


@pytest.mark.parametrize("normalize", ["all", "matched", "image"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("targets", TARGETS)
def test_the_local_loss(targets, with_bias, normalize):
    bias = prototypes(1, 3)[:, 0].detach().requires_grad_() if with_bias else None
    student, teacher, matches = step(bias)
    losses = [LocalDistillationLoss(TARGETS[targets](C), normalize=normalize) for _ in range(2)]
    for temp in (TEMP, 0.07):  # the second step meets a center that has moved
        if targets == "centering":
            with never_plain():
                found = losses[0](student, teacher, matches, teacher_temp=temp)
        else:
            found = losses[0](student, teacher, matches, teacher_temp=temp)
        wanted = losses[1](out(student), out(teacher), matches, teacher_temp=temp)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)  # a float32 center
        for one, other in zip(gradients(found, student), gradients(wanted, student), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)
    for name, value in losses[1].state_dict().items():
        torch.testing.assert_close(losses[0].state_dict()[name], value)


@pytest.mark.parametrize("targets", TARGETS)
def test_the_global_loss(targets):
    weight, teacher_weight = prototypes(5, 1), prototypes(3, 2)
    student = views((0, 0, 0), 5, weight)
    teacher = views((0, 0), 3, teacher_weight, 7)
    losses = [GlobalDistillationLoss(TARGETS[targets](C)) for _ in range(2)]
    found = losses[0](student, teacher, teacher_temp=TEMP)
    wanted = losses[1](out(student), out(teacher), teacher_temp=TEMP)
    torch.testing.assert_close(found, wanted)
    for one, other in zip(gradients(found, student), gradients(wanted, student), strict=True):
        torch.testing.assert_close(one, other)


def test_the_masked_loss():
    student, teacher, _ = step()
    valid = [torch.rand(3, 6) < 0.5, None, None]
    losses = [MaskedDistillationLoss(Centering(C)) for _ in range(2)]
    with never_plain():
        found = losses[0](student, teacher, valid, teacher_temp=TEMP)
    wanted = losses[1](out(student), out(teacher), valid, teacher_temp=TEMP)
    torch.testing.assert_close(found, wanted)


def test_global_and_local_together_from_heads():
    torch.manual_seed(0)
    sizes = {(3, 4): (48, 64), (2, 2): (32, 32)}
    grids = [(3, 4), (3, 4), (2, 2)]
    student_heads = [ProjectionHead(6, C, hidden_dim=7, bottleneck_dim=5) for _ in range(2)]
    teacher_heads = [ProjectionHead(6, C, hidden_dim=7, bottleneck_dim=5) for _ in range(2)]
    features = [torch.randn(2, rows * cols + 1, 6) for rows, cols in grids]
    tokens = []
    for grid in grids:
        box = torch.tensor([[0.0, 0.0, 60.0, 40.0], [10.0, 5.0, 70.0, 45.0]])
        geometry = from_box(box, view_size=sizes[grid], source_size=(80, 100))
        tokens.append(Tokens(None, geometry, TokenGrid.tiling(*grid, view_size=sizes[grid])))

    def outputs(heads, features, fused):
        glob, loc = ([one[:, 0] for one in features], [one[:, 1:] for one in features])
        if fused:
            logits = heads[0].prototype_logits(glob), heads[1].prototype_logits(loc)
        else:
            logits = [heads[0](one) for one in glob], [heads[1](one) for one in loc]
        return [ViewOutput(*parts) for parts in zip(*logits, tokens, strict=False)]

    results = []
    for fused in (True, False):
        loss = GlobalLocalDistillationLoss(
            GlobalDistillationLoss(Centering(C)), LocalDistillationLoss(Centering(C)),
            NearestMatcher(),
        )  # fmt: skip
        student = outputs(student_heads, features, fused)
        with torch.no_grad():
            teacher = outputs(teacher_heads, features[:2], fused)
        terms = loss(student, teacher, teacher_temp=TEMP)
        parameters = [p for head in student_heads for p in head.parameters() if p.requires_grad]
        results.append((terms.loss, *torch.autograd.grad(terms.loss, parameters)))
    torch.testing.assert_close(*results)


def test_one_pair():
    student, teacher, matches = step()
    targets = TeacherTargets(teacher[1], torch.randn(C, dtype=torch.float64), 0.3)
    found = local_distillation_loss(student[0], targets, matches[0, 1])
    plain = targets._replace(logits=teacher[1].logits())
    wanted = local_distillation_loss(student[0].logits(), plain, matches[0, 1])
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(targets.probs(), plain.probs())


def test_views_of_other_prototypes_are_worked_on_apart():
    student, teacher, matches = step()
    student[2] = PrototypeLogits(student[2].features, prototypes(5, 9))
    teacher[1] = PrototypeLogits(teacher[1].features, prototypes(3, 8))
    loss = LocalDistillationLoss(Centering(C)).eval()
    with mock.patch.object(
        _fused_pairs, "prototype_cross_entropy", wraps=_fused_pairs.prototype_cross_entropy
    ) as kernel:
        found = loss(student, teacher, matches, teacher_temp=TEMP)
    assert kernel.call_count == 4  # (0, 1); (1, 0); (2, 0); (2, 1)
    wanted = loss(out(student), out(teacher), matches, teacher_temp=TEMP)
    torch.testing.assert_close(found, wanted)


def test_the_mode_of_least_memory_is_chosen_for_all_losses():
    student, teacher, matches = step()
    loss = LocalDistillationLoss(Centering(C)).eval()
    wanted = loss(student, teacher, matches, teacher_temp=TEMP)
    with mock.patch.object(prototype_block, "_norm", wraps=prototype_block._norm) as tiled:
        with use_prototype_bytes(100):
            found = loss(student, teacher, matches, teacher_temp=TEMP)
        assert tiled.call_count == 2 * 3  # student and teacher of each image
        loss(student, teacher, matches, teacher_temp=TEMP)  # as before
        assert tiled.call_count == 2 * 3
    torch.testing.assert_close(found, wanted)
    with pytest.raises(ConfigError, match="`most`"):
        use_prototype_bytes(0)


def test_views_that_share_prototypes_are_one_call():
    student, teacher, matches = step()
    with mock.patch.object(
        _fused_pairs, "prototype_cross_entropy", wraps=_fused_pairs.prototype_cross_entropy
    ) as kernel:
        LocalDistillationLoss(Centering(C))(student, teacher, matches, teacher_temp=TEMP)
    assert kernel.call_count == 1


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_table_on_one_side_is_right_too(side):
    student, teacher, matches = step()
    loss = LocalDistillationLoss(Centering(C)).eval()
    wanted = loss(out(student), out(teacher), matches, teacher_temp=TEMP)
    mixed = (out(student), teacher) if side == "student" else (student, out(teacher))
    torch.testing.assert_close(loss(*mixed, matches, teacher_temp=TEMP), wanted)


def test_under_vmap_it_is_multiplied_out():
    student, teacher, matches = step()
    targets = TeacherTargets(teacher[1], None, 0.3)

    def loss(features):
        logits = PrototypeLogits(features, student[0].weight)
        return local_distillation_loss(logits, targets, matches[0, 1])

    many = torch.stack((student[0].features, 2 * student[0].features))
    torch.testing.assert_close(torch.vmap(loss)(many)[1], loss(many[1]))


def test_no_match_at_all_is_zero_with_a_graph():
    student, teacher, _ = step()
    loss = LocalDistillationLoss(Centering(C))
    none = {(0, 1): Matches.identity(torch.zeros(3, 6, dtype=torch.bool))}
    for matches in ({}, none):
        value = loss(student, teacher, matches, teacher_temp=TEMP)
        assert float(value.detach()) == 0
        found = gradients(value, student)
        assert all(one is None or float(one.abs().sum()) == 0 for one in found)
        assert found[0] is not None


@pytest.mark.parametrize("where", ["features", "weight"])
def test_a_nan_never_enters_the_center(where):
    _, teacher, _ = step()
    targets = Centering(C)
    targets.update(teacher)
    before = targets.center.clone()
    bad = [PrototypeLogits(*(None if one is None else one.detach().clone() for one in view))
           for view in teacher]  # fmt: skip
    getattr(bad[1], where)[0, 0] = torch.nan
    targets.update(bad)
    torch.testing.assert_close(targets.center, before, rtol=0, atol=0)
    assert int(targets.skipped) == 1


def test_the_center_comes_from_the_mean_feature():
    bias = torch.randn(C, dtype=torch.float64)
    teacher = views((6, 9), 3, prototypes(3, 2), bias=bias)
    valid = [torch.rand(3, 6) < 0.5, None]
    fused, plain = Centering(C), Centering(C)
    with never_plain():
        fused.update(teacher, valid)
    plain.update(out(teacher), valid)
    torch.testing.assert_close(fused.center, plain.center)
    with fused.accumulate():
        fused.update(teacher)
    with plain.accumulate():
        plain.update(out(teacher))
    torch.testing.assert_close(fused._sum, plain._sum)


def test_sinkhorn_balances_a_part_at_a_time():
    _, teacher, _ = step()
    valid = [torch.rand(3, 6) < 0.7, None]
    targets = SinkhornKnopp(C)
    wanted = targets(out(teacher), teacher_temp=0.3, valid=valid)
    with mock.patch("local_distill.targets._logits._PRODUCT_BYTES", 5 * 8 * C):
        found = targets(teacher, teacher_temp=0.3, valid=valid)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.offset, other.offset)
        assert isinstance(one.logits, PrototypeLogits)
        assert not one.logits.features.requires_grad


def test_monitors():
    _, teacher, _ = step()
    targets = Centering(C)
    found = distillation_monitors(targets(teacher, teacher_temp=0.3))
    wanted = distillation_monitors(targets(out(teacher), teacher_temp=0.3))
    torch.testing.assert_close(found.as_dict(), wanted.as_dict())


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize("autocast", [False, True])
def test_every_precision_is_near_float64(dtype, autocast):
    weight, teacher_weight = prototypes(5, 1, dtype), prototypes(3, 2, dtype)
    student = views((6, 9, 4), 5, weight.detach().requires_grad_(), dtype=dtype)
    teacher = views((6, 9), 3, teacher_weight, 7, dtype=dtype)
    _, _, matches = step()
    loss = LocalDistillationLoss(Centering(C)).eval()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = loss(student, teacher, matches, teacher_temp=TEMP)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    full = [[PrototypeLogits(one.features.double(), one.weight.double()) for one in side]
            for side in (student, teacher)]  # fmt: skip
    wanted = loss(*(out(side) for side in full), matches, teacher_temp=TEMP)
    largest = max(float(one.abs().max().detach()) for one in out(full[0])) / 0.1
    assert abs(float(found.detach()) - float(wanted.detach())) <= 1e-5 * largest
    found.backward()
    assert student[0].features.grad.dtype == dtype


# Inductor takes half a minute for all that stands around the operator, which is one node.
BACKENDS = ["aot_eager", "inductor"] if os.environ.get("ALL_PROPERTIES") else ["aot_eager"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_whole_at_most_two_graphs_over_ten_steps(backend):
    loss = LocalDistillationLoss(Centering(C))
    plain = LocalDistillationLoss(Centering(C))
    graphs = 0

    def counting(module, inputs):
        nonlocal graphs
        graphs += 1
        return torch._dynamo.lookup_backend(backend)(module, inputs)

    def run(loss, student, teacher, matches, temp):
        return loss(student, teacher, matches, teacher_temp=temp)

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend=counting)
    student, teacher, _ = step()
    for number in range(10):
        matches = {(0, 1): some_matches(6, 9, 1, number), (1, 0): some_matches(9, 6, 1, number)}
        temp = 0.04 + 0.003 * number
        found = compiled(loss, student, teacher, matches, temp)
        wanted = plain(student, teacher, matches, teacher_temp=temp)
        torch.testing.assert_close(found, wanted)
        for one, other in zip(gradients(found, student), gradients(wanted, student), strict=True):
            torch.testing.assert_close(one, other)
    assert graphs <= 2
    torch.testing.assert_close(loss.targets.center, plain.targets.center)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: p._replace(features=p.features[..., :-1]), r"axis `d` is 5 in .*weight"),
        (lambda p: p._replace(weight=p.weight[:-1]), r"axis `c` is 12 in `student_logits\[0\]`"),
        (
            lambda p: p._replace(weight=p.weight[0]),
            r"`student_logits\[0\].weight` must have 2 axes",
        ),
        (lambda p: p._replace(bias=p.weight), r"`student_logits\[0\].bias` must have 1 axes"),
        (lambda p: p._replace(features=p.features.long()), "floating-point"),
        (lambda p: p._replace(features=p.features[0]), r"`student_logits\[0\]` must have 3 axes"),
        (lambda p: p._replace(features=None), r"`student_logits\[0\].features` must be a tensor"),
        (lambda p: PrototypeLogits(p.features[..., :0], p.weight[:, :0]), "dimension 0"),
    ],
)
def test_bad_input_is_named(spoil, message):
    student, teacher, matches = step()
    student[0] = spoil(student[0])
    with pytest.raises(ShapeError, match=message):
        LocalDistillationLoss(Centering(C))(student, teacher, matches, teacher_temp=TEMP)


def test_targets_of_another_number_of_prototypes_are_refused():
    _, teacher, _ = step()
    with pytest.raises(ShapeError, match="num_prototypes=7"):
        Centering(7).update(teacher)


def test_the_head_multiplied_out_is_its_forward():
    head = ProjectionHead(6, C, hidden_dim=7, bottleneck_dim=5, batch_norm=False)
    features = [torch.randn(2, 4, 6), torch.randn(3, 6)]
    scores = head.prototype_logits(features)
    assert scores[0].weight is scores[1].weight
    for one, given in zip(scores, features, strict=True):
        torch.testing.assert_close(one.logits(), head(given))


@pytest.mark.parametrize("targets", TARGETS)
def test_targets_have_no_gradient_and_share_what_was_shared(targets):
    student, _, _ = step(bias=torch.zeros(C, dtype=torch.float64, requires_grad=True))
    found = TARGETS[targets](C)(student, teacher_temp=0.3)
    assert not any(part.requires_grad for target in found for part in target.logits)
    assert found[0].logits.weight is found[2].logits.weight


def test_the_plain_form_is_not_the_fused_one():
    """What these tests compare are two computations."""
    student, teacher, matches = step()
    with mock.patch.object(_pairs, "fused_cross_entropy", side_effect=RuntimeError("fused")):
        LocalDistillationLoss(Centering(C))(out(student), out(teacher), matches, teacher_temp=TEMP)
        with pytest.raises(RuntimeError, match="fused"):
            LocalDistillationLoss(Centering(C))(student, teacher, matches, teacher_temp=TEMP)

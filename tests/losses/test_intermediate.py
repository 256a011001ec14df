"""SDSSL's loss: the terms, their weights, who learns from what."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from local_distill import ConfigError, Matches, ShapeError
from local_distill.layer_heads import LayerHeads
from local_distill.losses.intermediate import IntermediateDistillationLoss
from local_distill.losses.view_objectives import ByolObjective, MocoV3Objective, SimclrObjective
from local_distill.schedules import cosine

OBJECTIVES = {"moco": MocoV3Objective, "byol": ByolObjective, "simclr": SimclrObjective}


def layers_of(depth, views=2, b=3, d=4, tokens=None, seed=0, dtype=torch.float64):
    """Student layers, detached layers, teacher's last."""
    g = torch.Generator().manual_seed(seed)

    def side(*lead):
        return [
            torch.randn(*lead, b, *(() if tokens is None else (tokens[v],)), d, generator=g,
                        dtype=dtype) for v in range(views)
        ]  # fmt: skip

    return side(depth), side(depth), side()


def matches_of(b=3, tokens=(3, 5), seed=0):
    g = torch.Generator().manual_seed(seed)
    found = {}
    for v, q in ((0, 1), (1, 0)):
        valid = torch.rand(b, tokens[v], generator=g) > 0.3
        index = torch.randint(0, tokens[q], (b, tokens[v], 1), generator=g)
        found[v, q] = Matches(index, valid[..., None].float(), valid.float())
    return found


def plain(objective, student, teacher, *, ratio, detached, matches=None, weights=None):
    """Layer by layer, as the formula says."""
    depth = student[0].shape[0]
    more = {} if matches is None else {"matches": matches}

    def layer(views, number):
        return objective([view[number] for view in views], teacher, **more)

    of = [layer(student, number) for number in range(depth)]
    last, mid, free = of[-1], 0.0, 0.0
    if depth > 1:
        weights = weights or [1.0] * (depth - 1)
        mid = sum(w * v for w, v in zip(weights, of[:-1], strict=True)) / sum(weights)
    if detached is not None:
        free = sum(layer(detached, number) for number in range(depth)) / depth
    return last + ratio * mid + depth * free, last, mid, free


@pytest.mark.parametrize("name", OBJECTIVES)
@given(
    depth=st.integers(1, 5),
    views=st.integers(2, 3),
    ratio=st.floats(0, 1),
    with_detached=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_terms_are_the_formula(name, depth, views, ratio, with_detached, seed):
    student, detached, teacher = layers_of(depth, views, seed=seed)
    objective = OBJECTIVES[name]()
    given_layers = detached if with_detached else None
    loss = IntermediateDistillationLoss(objective, depth=depth)
    terms = loss(student, teacher, ratio=ratio, detached_layers=given_layers)
    wanted = plain(objective, student, teacher, ratio=ratio, detached=given_layers)
    assert [float(term) for term in terms] == pytest.approx([float(term) for term in wanted])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_patch_tokens_learn_from_the_last_layer_through_matches(name):
    student, detached, teacher = layers_of(3, tokens=(3, 5))
    objective, matches = OBJECTIVES[name](), matches_of()
    loss = IntermediateDistillationLoss(objective, depth=3)
    terms = loss(student, teacher, ratio=0.3, detached_layers=detached, matches=matches)
    wanted = plain(objective, student, teacher, ratio=0.3, detached=detached, matches=matches)
    assert [float(term) for term in terms] == pytest.approx([float(term) for term in wanted])
    # a token without a match says nothing, whatever it is
    lost = ~matches[0, 1].matched
    assert lost.any()
    student[0][:, lost] = torch.nan
    student[0].requires_grad_()
    again = loss(student, teacher, ratio=0.3, detached_layers=detached, matches=matches)
    if name != "simclr":  # there the same tokens are targets
        assert [float(term.detach()) for term in again] == pytest.approx([float(t) for t in terms])
    again.loss.backward()
    assert float(student[0].grad[:, lost].abs().max()) == 0
    assert student[0].grad[:, ~lost].abs().min() > 0
    # views that no match names may be missing
    one = {(0, 1): matches[0, 1]}
    alone = loss([student[0].detach(), None], [None, teacher[1]], ratio=0.3, matches=one)
    assert alone.loss.isfinite()


def test_published_weights_by_hand():
    # BYOL with one image: 2 - 2cos is 2 at a right angle, 0 and 4 along and against
    up, right = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])
    view = torch.stack((right, -up, up))[:, None]  # layers of one view; the target is up
    free = torch.stack((-up, up, up))[:, None]
    loss = IntermediateDistillationLoss(ByolObjective(), depth=3)
    terms = loss([view, view], [up[None], up[None]], ratio=0.5, detached_layers=[free, free])
    assert [float(term) for term in terms[1:]] == pytest.approx([0, 2 * (2 + 4) / 2, 2 * 4 / 3])
    assert float(terms.loss) == pytest.approx(0 + 0.5 * 6 + 3 * 8 / 3)


# What the training steps of the authors' code (hagiss/SDSSL, bbd34fa) give for these features in
# float64 on one process, at 12 layers and ratio 0.37: the loss, the norms of both views' gradients.
GOLDEN = {
    "moco": (40.048533636145486, 0.1444988147514613, 0.9384304609739468),
    "byol": (56.34021469995618, 0.5533643289129464, 0.419033163941906),
    "simclr": (3.1184763514815232, 1.1115986034726724, 1.140688367361591),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_authors_numbers(name):
    def waves(*shape, phase):
        steps = torch.arange(math.prod(shape), dtype=torch.float64)
        return torch.sin(steps * 0.7 + phase).reshape(shape)

    def predict(x):
        return x + 0.5 * x.roll(1, -1)

    views = [waves(12, 3, 4, phase=phase).requires_grad_() for phase in (0.0, 1.0)]
    loss = IntermediateDistillationLoss(OBJECTIVES[name](), depth=12)
    if name == "simclr":
        terms = loss(views, [view[-1] for view in views], ratio=0.37)
    else:
        terms = loss(
            [predict(view) for view in views],
            [waves(3, 4, phase=phase) for phase in (2.0, 3.0)],
            ratio=0.37,
            detached_layers=[predict(view.detach()) for view in views],
        )
    terms.loss.backward()
    reached = [float(terms.loss.detach()), *(float(view.grad.norm()) for view in views)]
    assert reached == pytest.approx(GOLDEN[name], rel=1e-12)


def test_weights_of_layers_and_of_the_detached_term():
    student, detached, teacher = layers_of(4)
    objective = ByolObjective()
    loss = IntermediateDistillationLoss(
        objective, depth=4, layer_weights=[1, 0, 3], detached_weight=0.5
    )
    terms = loss(student, teacher, ratio=0.4, detached_layers=detached)
    wanted = plain(
        objective, student, teacher, ratio=0.4, detached=detached, weights=[1.0, 0.0, 3.0]
    )
    torch.testing.assert_close(terms.intermediate, wanted[2])
    torch.testing.assert_close(terms.loss, wanted[1] + 0.4 * wanted[2] + 0.5 * wanted[3])
    alike = IntermediateDistillationLoss(objective, depth=4, layer_weights=[2, 2, 2])
    same = IntermediateDistillationLoss(objective, depth=4)
    torch.testing.assert_close(
        alike(student, teacher, ratio=1.0).loss, same(student, teacher, ratio=1.0).loss
    )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_targets_learn_from_the_last_layer_alone_and_only_without_a_teacher(name):
    student, detached, teacher = layers_of(3)
    for view in (*student, *detached, *teacher):
        view.requires_grad_()
    objective = OBJECTIVES[name]()
    loss = IntermediateDistillationLoss(objective, depth=3)
    terms = loss(student, teacher, ratio=0.5, detached_layers=detached)
    for term in (terms.intermediate, terms.detached):
        assert torch.autograd.grad(term, teacher, retain_graph=True, allow_unused=True) == (
            None,
            None,
        )
    found = torch.autograd.grad(terms.loss, teacher, retain_graph=True, allow_unused=True)
    if name == "simclr":
        wanted = torch.autograd.grad(terms.last, teacher, retain_graph=True)
        for part, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(part, other)
    else:
        assert found == (None, None)
    # each term reaches its own layers
    mid = torch.autograd.grad(terms.intermediate, student, retain_graph=True)[0]
    assert mid[:-1].abs().amin() > 0
    assert float(mid[-1].abs().max()) == 0


def test_gradients():
    student, detached, teacher = layers_of(2, b=2, d=3, tokens=(2, 3))
    matches = matches_of(2, (2, 3))
    for objective in (MocoV3Objective(), ByolObjective(), SimclrObjective()):
        loss = IntermediateDistillationLoss(objective, depth=2)

        def step(one, two, free, other, loss=loss):
            return loss([one, two], teacher, ratio=0.6, detached_layers=[free, other],
                        matches=matches).loss  # fmt: skip

        inputs = [view.detach().requires_grad_() for view in (*student, *detached)]
        assert torch.autograd.gradcheck(step, inputs)


def test_any_callable_is_an_objective():
    student, detached, teacher = layers_of(3)
    calls = []

    def squared(views, targets):
        calls.append(tuple(views[0].shape))
        return (views[0] - targets[1]).square().mean() + (views[1] - targets[0]).square().mean()

    loss = IntermediateDistillationLoss(squared, depth=3)
    terms = loss(student, teacher, ratio=0.3, detached_layers=detached)
    wanted = plain(squared, student, teacher, ratio=0.3, detached=detached)
    assert [float(term) for term in terms] == pytest.approx([float(term) for term in wanted])
    assert set(calls) == {(3, 4)}


@pytest.mark.parametrize(("method", "end"), [("moco", 1.0), ("byol", 0.8), ("simclr", 0.8)])
def test_heads_schedule_and_loss_go_together(method, end):
    heads = LayerHeads((3, 5), 2, method=method, hidden_dim=6, last_hidden_dim=8, out_dim=4)
    loss = IntermediateDistillationLoss(OBJECTIVES[method](), depth=2)
    features = [[torch.randn(4, 3), torch.randn(4, 5)] for _ in range(2)]
    outputs = [heads(layers) for layers in features]
    if method == "simclr":
        teacher, detached = [out.projections[-1] for out in outputs], None
    else:
        teacher = [copy.deepcopy(heads).project_last(layers[-1]).detach() for layers in features]
        detached = [out.detached for out in outputs]
    ratio = cosine(75, start=0.0, end=end, total=100)
    assert ratio == pytest.approx(end * (1 - math.cos(math.pi * 0.75)) / 2)
    student = [out.predictions for out in outputs]
    terms = loss(student, teacher, ratio=ratio, detached_layers=detached)
    terms.loss.backward()
    assert all(part.grad is not None for part in heads.parameters())
    assert all(part.grad.isfinite().all() for part in heads.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_worked_out_in_float32(dtype):
    student, detached, teacher = layers_of(3, dtype=torch.float32)
    rounded = [[view.to(dtype) for view in side] for side in (student, detached, teacher)]
    loss = IntermediateDistillationLoss(MocoV3Objective(), depth=3)
    terms = loss(rounded[0], rounded[2], ratio=0.5, detached_layers=rounded[1])
    wide = [[view.double() for view in side] for side in rounded]
    wanted = loss(wide[0], wide[2], ratio=0.5, detached_layers=wide[1])
    for term, other in zip(terms, wanted, strict=True):
        assert term.dtype == torch.float32
        torch.testing.assert_close(term.double(), other, rtol=1e-5, atol=1e-5)


def test_batch_of_none_is_zero_with_a_graph():
    student, _, teacher = layers_of(3, b=0)
    student[0].requires_grad_()
    terms = IntermediateDistillationLoss(SimclrObjective(), depth=3)(student, teacher, ratio=0.5)
    assert [float(term.detach()) for term in terms] == [0, 0, 0, 0]
    terms.loss.backward()
    assert student[0].grad.shape == student[0].shape


def test_bad_input_is_refused():
    student, detached, teacher = layers_of(3)
    loss = IntermediateDistillationLoss(MocoV3Objective(), depth=3)
    with pytest.raises(ShapeError, match="has 2 layers but this loss was made for depth=3"):
        loss([view[1:] for view in student], teacher, ratio=0.5)
    with pytest.raises(ShapeError, match="`student_layers` must be a list"):
        loss(student[0], teacher, ratio=0.5)
    with pytest.raises(ShapeError, match="`teacher_last` must be a list"):
        loss(student, teacher[0], ratio=0.5)
    with pytest.raises(ShapeError, match=r"`student_layers\[0\]` must have 3 axes `l b d`"):
        loss([view[0] for view in student], teacher, ratio=0.5)
    with pytest.raises(ShapeError, match="`detached_layers` has 1 views but `student_layers` has"):
        loss(student, teacher, ratio=0.5, detached_layers=detached[:1])
    with pytest.raises(ShapeError, match=r"`detached_layers\[0\]` must have the shape"):
        loss(student, teacher, ratio=0.5, detached_layers=[view[:, :2] for view in detached])
    with pytest.raises(ShapeError, match="axis `b`"):
        loss(student, [view[:1] for view in teacher], ratio=0.5)
    with pytest.raises(ShapeError, match="no view"):
        loss([None, None], teacher, ratio=0.5, matches={})
    for ratio in (-0.1, math.nan, math.inf, None):
        with pytest.raises(ConfigError, match="`ratio`"):
            loss(student, teacher, ratio=ratio)
    for settings, text in (
        ({"depth": 0}, "`depth`"),
        ({"depth": 3, "layer_weights": [1.0]}, "2 lower layers"),
        ({"depth": 3, "layer_weights": [0, 0]}, "not all"),
        ({"depth": 3, "layer_weights": [1, -1]}, "`layer_weights`"),
        ({"depth": 3, "detached_weight": -1}, "`detached_weight`"),
    ):
        with pytest.raises(ConfigError, match=text):
            IntermediateDistillationLoss(MocoV3Objective(), **settings)
    assert repr(loss).startswith("IntermediateDistillationLoss(\n  depth=3, detached_weight=3.0")


def test_compile_does_not_ask_for_a_graph_for_every_ratio():
    from torch._dynamo.testing import CompileCounterWithBackend

    student, detached, teacher = layers_of(3)
    loss = IntermediateDistillationLoss(MocoV3Objective(), depth=3)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for step in range(6):
        ratio = cosine(step, start=0.0, end=1.0, total=5)
        terms = compiled(student, teacher, ratio=ratio, detached_layers=detached)
        wanted = loss(student, teacher, ratio=ratio, detached_layers=detached)
        torch.testing.assert_close(terms.loss, wanted.loss)
    assert counter.frame_count <= 2

"""MoCo v3's, BYOL's and SimCLR's objectives against plain loops."""

import copy
import math

import pytest
import torch
from helpers import some_matches
from hypothesis import given
from hypothesis import strategies as st

from local_distill import ConfigError, Matches, ShapeError
from local_distill.kernels import log_normalizer
from local_distill.losses._unit_rows import unit_rows
from local_distill.losses.pairwise_objective import PairwiseObjective
from local_distill.losses.view_objectives import ByolObjective, MocoV3Objective, SimclrObjective

OBJECTIVES = {
    "moco": lambda **more: MocoV3Objective(0.3, **more),
    "byol": lambda **more: ByolObjective(**more),
    "simclr": lambda **more: SimclrObjective(0.3, **more),
}


def cosine(x, y):
    dot = sum(float(a) * float(b) for a, b in zip(x, y, strict=True))
    norms = [math.sqrt(sum(float(a) ** 2 for a in row)) for row in (x, y)]
    return dot / (norms[0] * norms[1]) if norms[0] and norms[1] else 0.0


def plain(name, student, targets, matches, temp=0.3):
    """The three formulas in loops over images and tokens, float64; whole views are one token."""
    if matches is None:
        whole = torch.ones(student[0].shape[0], 1, dtype=torch.bool)
        pairs = [(v, q) for v in range(len(student)) for q in range(len(targets)) if v != q]
        matches = dict.fromkeys(pairs, Matches.identity(whole))
        student = [view[:, None] for view in student]
        targets = [view[:, None] for view in targets]
    values = []
    for (v, q), found in matches.items():
        index, weight = found.teacher_index.tolist(), found.weight.double().tolist()
        answers = []  # image, token, mass, what answers it
        for a, rows in enumerate(weight):
            for i, row in enumerate(rows):
                if sum(row) > 0:
                    parts = [w * targets[q][a, j].double() for w, j in
                             zip(row, index[a][i], strict=True) if w > 0]  # fmt: skip
                    answers.append((a, i, sum(row), sum(parts)))
        total = sum(mass for _, _, mass, _ in answers)
        value = 0.0
        for a, i, mass, answer in answers:
            own = student[v][a, i]
            agreement = cosine(own, answer)
            if name == "byol":
                value += mass * (2 - 2 * agreement) / total
                continue
            seen = [cosine(own, other) for *_, other in answers]
            if name == "simclr":
                seen += [cosine(own, targets[v][c, j]) for c, j, _, _ in answers if c != a]
            spread = sum(math.exp(score / temp) for score in seen)
            value += mass * (math.log(spread) - agreement / temp) / total
        values.append(value)
    return {"moco": 2 * temp, "byol": 1.0, "simclr": 1 / max(1, len(values))}[name] * sum(values)


def whole_views(views, b, d, *, targets=None, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    make = lambda: torch.randn(b, d, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    return [make() for _ in range(views)], [make() for _ in range(targets or views)]


def token_views(b=3, d=4, tokens=(3, 5, 2), *, k=2, seed=0, dtype=torch.float64):
    """Views of several sizes, and matches of some of their pairs with gaps."""
    g = torch.Generator().manual_seed(seed)
    student = [torch.randn(b, n, d, generator=g, dtype=torch.float64).to(dtype) for n in tokens]
    targets = [torch.randn(b, n, d, generator=g, dtype=torch.float64).to(dtype) for n in tokens]
    matches = {}
    for v in range(len(tokens)):
        q = 1 if v == 0 else 0
        weight = torch.rand(b, tokens[v], k, generator=g) / k
        weight[torch.rand(weight.shape, generator=g) < 0.4] = 0
        index = torch.randint(0, tokens[q], weight.shape, generator=g)
        matches[v, q] = Matches(index, weight, weight.sum(-1))
    return student, targets, matches


@pytest.mark.parametrize("name", OBJECTIVES)
@given(
    views=st.integers(1, 3),
    targets=st.integers(1, 3),
    b=st.integers(1, 4),
    d=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_whole_views_are_the_formula(name, views, targets, b, d, seed):
    if views == targets == 1:
        targets = 2
    student, teacher = whole_views(views, b, d, targets=targets, seed=seed)
    value = OBJECTIVES[name]()(student, teacher)
    assert value.shape == ()
    if name == "simclr":  # a view without targets of its own has no own negatives
        wanted = plain_simclr_with_missing(student, teacher)
    else:
        wanted = plain(name, student, teacher, None)
    assert float(value) == pytest.approx(wanted, rel=1e-10, abs=1e-12)


def plain_simclr_with_missing(student, targets, temp=0.3):
    values = []
    for v in range(len(student)):
        for q in range(len(targets)):
            if v == q:
                continue
            for a in range(len(student[v])):
                scores = [cosine(student[v][a], other) for other in targets[q]]
                own = targets[v] if v < len(targets) else []
                spread = scores + [cosine(student[v][a], o) for c, o in enumerate(own) if c != a]
                values.append(math.log(sum(math.exp(s / temp) for s in spread)) - scores[a] / temp)
    return sum(values) / len(values)


@pytest.mark.parametrize("name", OBJECTIVES)
@given(
    b=st.integers(1, 3),
    tokens=st.tuples(*[st.integers(1, 4)] * 3),
    k=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_tokens_through_matches_are_the_formula(name, b, tokens, k, seed):
    student, targets, matches = token_views(b, 3, tokens, k=k, seed=seed)
    value = OBJECTIVES[name]()(student, targets, matches=matches)
    # a pair without a match gives 0, and counts as a pair all the same
    wanted = plain(name, student, targets, matches)
    assert float(value) == pytest.approx(wanted, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_layers_at_once_are_the_layers_one_by_one(name):
    student, targets, matches = token_views()
    layers = [torch.stack((view, view.flip(0), -view)) for view in student]
    objective = OBJECTIVES[name]()
    together = objective.per_layer(layers, targets, matches=matches)
    alone = [objective([view[i] for view in layers], targets, matches=matches) for i in range(3)]
    torch.testing.assert_close(together, torch.stack(alone))
    assert together.unique().numel() == 3


@pytest.mark.parametrize("name", OBJECTIVES)
def test_whole_views_are_views_of_one_token(name):
    student, targets = whole_views(3, 4, 5)
    objective = OBJECTIVES[name]()
    pairs = [(v, q) for v in range(3) for q in range(3) if v != q]
    one = Matches.identity(torch.ones(4, 1, dtype=torch.bool))
    value = objective(
        [view[:, None] for view in student],
        [view[:, None] for view in targets],
        matches=dict.fromkeys(pairs, one),
    )
    torch.testing.assert_close(value, objective(student, targets))


def test_simclr_of_two_views_is_nt_xent():
    # eq. 1 of SimCLR over the 2b rows: everything but the row itself stands below the line
    views = torch.randn(2, 3, 4, dtype=torch.float64)
    rows = torch.nn.functional.normalize(views.flatten(0, 1), dim=-1)
    logits = (rows @ rows.T / 0.2).fill_diagonal_(-torch.inf)
    labels = torch.tensor([3, 4, 5, 0, 1, 2])
    wanted = torch.nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(SimclrObjective()(views.unbind(), views.unbind()), wanted)


def test_moco_is_twice_the_temperature_times_the_cross_entropy():
    (s1, s2), (t1, t2) = whole_views(2, 4, 5)
    unit = torch.nn.functional.normalize
    wanted = sum(
        torch.nn.functional.cross_entropy(unit(s) @ unit(t).T / 0.2, torch.arange(4)) * 0.4
        for s, t in ((s1, t2), (s2, t1))
    )
    torch.testing.assert_close(MocoV3Objective()([s1, s2], [t1, t2]), wanted)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("matched", [False, True])
def test_gradients(name, matched):
    if matched:
        student, targets, matches = token_views(2, 3, (2, 3, 2))
    else:
        (student, targets), matches = whole_views(3, 2, 3), None
    more = {} if name == "simclr" else {"detach_targets": False}
    objective = OBJECTIVES[name](**more)
    inputs = [part.requires_grad_() for part in (*student, *targets)]
    assert torch.autograd.gradcheck(
        lambda *parts: objective(parts[:3], parts[3:], matches=matches), inputs
    )


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("matched", [False, True])
def test_who_gets_a_gradient(name, matched):
    student, targets, matches = token_views()
    if not matched:
        student, targets, matches = *whole_views(3, 3, 4), None
    for part in (*student, *targets):
        part.requires_grad_()
    OBJECTIVES[name]()(student, targets, matches=matches).backward()
    assert all(part.grad.abs().max() > 0 for part in student)
    given = [part.grad is not None for part in targets]
    assert given == ([True] * 3 if name == "simclr" else [False] * 3)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
def test_dtypes(name, dtype, autocast):
    student, targets, matches = token_views(dtype=dtype)
    whole = whole_views(2, 5, 7, dtype=dtype)
    for views, teacher, found in ((student, targets, matches), (*whole, None)):
        views = [view.clone().requires_grad_() for view in views]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            value = OBJECTIVES[name]()(views, teacher, matches=found)
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        wanted = plain(name, [view.detach() for view in views], teacher, found)
        assert float(value.detach()) == pytest.approx(wanted, rel=1e-5, abs=1e-5)
        value.backward()
        assert all(view.grad.dtype == dtype and view.grad.isfinite().all() for view in views)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("size", [1e18, 1e-18, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_features_of_any_size(name, size, dtype):
    if dtype == torch.float16:
        size = {1e18: 15000.0, 1e-18: 1e-6, 0.0: 0.0}[size]
    student, targets = whole_views(2, 3, 4, dtype=torch.float32)
    big, big_targets = ([(view * size).to(dtype) for view in side] for side in (student, targets))
    for view in (*big, *big_targets):
        view.requires_grad_()
    value = OBJECTIVES[name]()(big, big_targets)
    value.backward()
    assert value.isfinite()
    assert all(view.grad.isfinite().all() for view in big)
    if size and not (dtype == torch.float16 and size < 1):
        tolerance = {torch.float32: 1e-5}.get(dtype, 0.05)
        wanted = OBJECTIVES[name]()(student, targets)
        torch.testing.assert_close(value, wanted, rtol=tolerance, atol=tolerance)


def test_gathered_targets_of_half_precision_get_a_finite_gradient():
    student, targets, matches = token_views(dtype=torch.float32)
    targets = [(view * 1e-6).half().requires_grad_() for view in targets]
    SimclrObjective()(student, targets, matches=matches).backward()
    assert all(view.grad.isfinite().all() for view in targets)
    assert any(view.grad.abs().max() > 0 for view in targets)


def test_unit_rows():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [3e30, 4e30], [3e-25, 4e-25]], requires_grad=True)
    unit = unit_rows(x)
    torch.testing.assert_close(
        unit, torch.tensor([[0.6, 0.8], [0, 0], [0.6, 0.8], [0.6, 0.8]]), rtol=1e-6, atol=0
    )
    unit.sum().backward()
    assert x.grad.isfinite().all()
    tiny = torch.full((1, 4), 1e-7, dtype=torch.float16, requires_grad=True)
    unit_rows(tiny).sum().backward()
    assert tiny.grad.isfinite().all()
    assert unit_rows(torch.tensor([[torch.nan, 1.0]])).isnan().all()
    y = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(unit_rows, y)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_tokens_that_no_match_refers_to_are_never_read(name, poison):
    student, targets, _ = token_views(2, 3, (3, 4))
    index = torch.tensor([[0, 1, 0], [2, 0, 2]])[..., None]
    weight = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 0.25]])[..., None]
    found = {(0, 1): Matches(index, weight, weight[..., 0])}
    objective = OBJECTIVES[name]()

    def step(views, teacher):
        views = [view.clone().requires_grad_() for view in views]
        value = objective(views, teacher, matches=found)
        value.backward()
        return value.detach(), views[0].grad

    wanted, gradient = step(student[:2], targets[:2])
    student[0][0, 2] = student[0][1, 0] = poison
    targets[1][0, 2:] = targets[1][1, 1] = poison
    targets[0][0, 2] = targets[0][1, 0] = poison  # SimCLR's own view
    value, poisoned = step(student[:2], targets[:2])
    torch.testing.assert_close(value, wanted)
    torch.testing.assert_close(poisoned, gradient)
    assert float(poisoned[0, 2].abs().max()) == 0
    student[0][0, 0, 0] = torch.nan
    assert step(student[:2], targets[:2])[0].isnan()  # what counts is seen


@pytest.mark.parametrize("name", OBJECTIVES)
def test_nothing_to_compare_is_zero_with_a_graph(name):
    objective = OBJECTIVES[name]()
    nothing = Matches(
        torch.zeros(2, 3, 1, dtype=torch.int64), torch.zeros(2, 3, 1), torch.full((2, 3), torch.inf)
    )
    cases = [
        (torch.full((2, 3, 4), torch.nan), torch.randn(2, 5, 4), {(0, 1): nothing}),
        (torch.full((2, 3, 4), torch.nan), torch.randn(2, 5, 4), {}),
        (torch.zeros(0, 4), torch.zeros(0, 4), None),
        (torch.randn(2, 3, 4), torch.randn(2, 0, 4), {(0, 1): Matches(
            torch.zeros(2, 3, 0, dtype=torch.int64), torch.zeros(2, 3, 0), nothing.cost)}),
    ]  # fmt: skip
    for one, two, matches in cases:
        one.requires_grad_()
        value = objective([one, None if matches is not None else one], [one, two], matches=matches)
        assert float(value.detach()) == 0
        value.backward()
        assert float(one.grad.abs().sum()) == 0


@pytest.mark.parametrize("name", ["moco", "simclr"])
def test_a_large_table_is_worked_out_in_blocks(name, monkeypatch):
    student, targets, matches = token_views(4, 3, (4, 5, 2))
    layers = [torch.stack((view, -view)) for view in student]

    def step():
        views = [view.clone().requires_grad_() for view in (*layers, *targets)]
        objective = OBJECTIVES[name]()
        value = objective.per_layer(views[:3], views[3:], matches=matches)
        (value * torch.tensor([1.0, 2.0])).sum().backward()
        return [value.detach()] + [view.grad for view in views if view.grad is not None]

    wanted = step()
    blocks = []
    monkeypatch.setattr(log_normalizer, "block_length", lambda *_: blocks.append(1) or 5)
    for part, other in zip(step(), wanted, strict=True):
        torch.testing.assert_close(part, other)
    assert blocks


@pytest.mark.parametrize("name", OBJECTIVES)
def test_layouts(name):
    student, targets, matches = token_views(2, 4, (3, 3, 2))
    objective = OBJECTIVES[name]()
    wanted = objective(student, targets, matches=matches)
    turned = [view.permute(2, 0, 1).contiguous().permute(1, 2, 0) for view in student]
    loose = [torch.stack((view, view), -1)[..., 0] for view in targets]
    before = [view.clone() for view in (*turned, *loose)]
    torch.testing.assert_close(objective(turned, loose, matches=matches), wanted)
    assert all(torch.equal(*pair) for pair in zip((*turned, *loose), before, strict=True))
    with torch.inference_mode():
        frozen = [view.clone() for view in targets]
    torch.testing.assert_close(objective(student, frozen, matches=matches), wanted)
    dense = {(0, 1): some_matches.soft(2, 3, 3)}
    table = dense[0, 1]._replace(teacher_index=dense[0, 1].teacher_index.contiguous())
    assert objective(student, targets, matches=dense) == objective(
        student, targets, matches={(0, 1): table}
    )
    same = student[0][:, :1].expand(-1, 3, -1)
    value = objective([same, *student[1:]], targets, matches=matches)
    assert value == objective([same.contiguous(), *student[1:]], targets, matches=matches)


def test_bad_input_is_refused():
    moco, simclr = MocoV3Objective(), SimclrObjective()
    x, y = torch.zeros(2, 4), torch.zeros(3, 4)
    for objective in (moco, simclr, ByolObjective()):
        with pytest.raises(
            ShapeError, match=r"axis `b` is 2 in `student.0.` but 3 in `targets.0.`"
        ):
            objective([x, x], [y, y])
        with pytest.raises(ShapeError, match="`student` must be a list"):
            objective(x, [x, x])
        with pytest.raises(ShapeError, match="`targets` must be a list"):
            objective([x, x], x)
        with pytest.raises(ShapeError, match="no pair of different views"):
            objective([x], [x])
        with pytest.raises(ShapeError, match="floating-point"):
            objective([x, x.long()], [x, x])
        with pytest.raises(ShapeError, match="dimension 0"):
            objective([x[:, :0], x], [x, x])
        with pytest.raises(ShapeError, match="2 axes `b d`"):
            objective([x[None], x], [x, x])
        with pytest.raises(ShapeError, match="3 axes `l b d`"):
            objective.per_layer([x, x], [x, x])
    student, targets, matches = token_views()
    with pytest.raises(ShapeError, match=r"pair \(2, 0\) but there are 2 student"):
        moco(student[:2], targets, matches=matches)
    with pytest.raises(ShapeError, match="axis `s0` is 3"):
        moco([student[0], student[1]], targets, matches={(0, 1): matches[1, 0]})
    with pytest.raises(ShapeError, match="reaches 4 but `targets"):
        moco(student, targets, matches={(0, 2): matches[0, 1]})
    with pytest.raises(ShapeError, match="a view with itself"):
        simclr(student, targets, matches={(0, 0): Matches.identity(torch.ones(3, 3).bool())})
    with pytest.raises(ShapeError, match=r"`student.0.` must be a tensor"):
        moco([None, *student[1:]], targets, matches=matches)
    for temp in (0.0, -1.0, math.nan, "0.2"):
        with pytest.raises(ConfigError, match="`temp`"):
            MocoV3Objective(temp)
        with pytest.raises(ConfigError, match="`temp`"):
            SimclrObjective(temp)


def test_copies_and_settings():
    student, targets = whole_views(2, 3, 4)
    for objective in (MocoV3Objective(), ByolObjective(), SimclrObjective()):
        other = copy.deepcopy(objective)
        assert torch.equal(other(student, targets), objective(student, targets))
        assert list(objective.state_dict()) == []
        assert isinstance(objective, PairwiseObjective)
    assert repr(MocoV3Objective()) == "MocoV3Objective(temp=0.2, detach_targets=True)"
    assert repr(SimclrObjective(0.1)) == "SimclrObjective(temp=0.1, legacy=False)"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_compile(name):
    student, targets, matches = token_views()
    objective = OBJECTIVES[name]()
    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")
    for view in student:
        view.requires_grad_()
    value = compiled(student, targets, matches=matches)
    wanted = objective(student, targets, matches=matches)
    torch.testing.assert_close(value, wanted)
    gradients = [torch.autograd.grad(part, student) for part in (value, wanted)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_compile_in_blocks(monkeypatch):
    monkeypatch.setattr(log_normalizer, "_TRACED_TABLE", 64)
    student, targets = whole_views(2, 9, 4)
    objective = SimclrObjective()
    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")
    for view in student:
        view.requires_grad_()
    one = torch.autograd.grad(compiled(student, targets), student)
    other = torch.autograd.grad(objective(student, targets), student)
    torch.testing.assert_close(one, other)

import copy
import io
import math
import pickle

import pytest
import torch
from helpers.check_clusters import check_clusters
from helpers.strategies import random_geometry, view_pairs
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from local_distill import CropGeometry, Matches, ShapeError, TokenGrid, Tokens, from_box
from local_distill.errors import ConfigError, GeometryError
from local_distill.matching.clusters import Clusters
from local_distill.matching.joint_clusters import JointClusters
from local_distill.testing.oracles import (
    cluster_plans,
    dot,
    hard_shares,
    joint_tokens,
    unit_vector,
    weighted_mean,
)


def softmax(values, valid, temp):
    parts = [math.exp(v / temp) if good else 0.0 for v, good in zip(values, valid, strict=True)]
    return [part / (sum(parts) or 1.0) for part in parts]


def truth(student, teacher, initial, scores, joint):
    """[image] of (student, teacher) assignments: CrOC's algorithm, step by step, in loops."""
    s = student.features.shape[1]
    units, points, rows, cols, centroids, places = [], [], [], [], [], []
    for image, (u, p) in enumerate(joint_tokens(student, teacher)):
        score = [0.0] * len(u) if scores is None else torch.cat(scores, 1)[image].tolist()
        u = [None if not math.isfinite(v) else row for row, v in zip(u, score, strict=True)]
        start = initial[image].tolist()
        units.append(u)
        points.append(p)
        rows.append(softmax(score, [row is not None for row in u], joint.token_temp))
        cols.append(
            softmax(
                [score[i] for i in start], [u[i] is not None for i in start], joint.cluster_temp
            )
        )
        centroids.append([u[i] for i in start])
        places.append([p[i] if u[i] is not None else None for i in start])
    levels = []
    for count in range(joint.start_clusters, 1, -1):
        distances = [
            [[0.0 if q is None else math.dist(p, q) for q in places[i]] for p in points[i]]
            for i in range(len(units))
        ]
        plans, costs = cluster_plans(
            units,
            [[c and (unit_vector(c) or c) for c in row] for row in centroids],
            distances,
            rows,
            cols,
            position_weight=joint.position_weight,
            epsilon=joint.epsilon,
            iterations=joint.sinkhorn_iterations,
            cost_scale=joint.cost_scale,
        )
        levels.append((count, plans, costs))
        for i, plan in enumerate(plans):
            plan = merged(plan, units[i])
            columns = list(zip(*plan, strict=True))
            centroids[i] = [weighted_mean(column, units[i]) for column in columns]
            places[i] = [weighted_mean(column, points[i]) for column in columns]
            cols[i] = [dot([v / (sum(c) or 1.0) for v in c], rows[i]) for c in columns]
            cols[i] = [v / (sum(cols[i]) or 1.0) for v in cols[i]]
    result = []
    for i in range(len(units)):
        kept = [level for level in levels if level[0] <= joint.max_clusters]
        best = min(kept, key=lambda level: level[2][i])
        plan = [row + [0.0] * (joint.max_clusters - len(row)) for row in best[1][i]]
        bounds = ((0, s), (s, len(plan)))
        result.append(tuple(hard_shares(plan, *bound, by_share=True) for bound in bounds))
    return result


def merged(plan, units):
    """The two clusters of most similar means joined, at the end; empty clusters before all."""
    k = len(plan[0])
    means = [weighted_mean(column, units) for column in zip(*plan, strict=True)]
    pairs = [(i, j) for i in range(k) for j in range(k) if i != j]

    def likeness(pair):
        a, b = means[pair[0]], means[pair[1]]
        return math.inf if a is None or b is None else dot(a, b)

    i, j = max(pairs, key=likeness)
    return [[v for c, v in enumerate(row) if c not in (i, j)] + [row[i] + row[j]] for row in plan]


@st.composite
def problems(draw, dtype=torch.float64, most=5):
    """Two views of grouped tokens with geometry, some tokens of them bad, and starting tokens."""
    views = list(draw(view_pairs(padding=draw(st.sampled_from([0.0, 9.0])))))
    g = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    b = views[0].geometry.matrix.shape[0]
    objects = torch.randn(b, 3, 4, generator=g)
    tokens = []
    for view in views:
        n = view.grid.num_tokens
        which = torch.randint(0, 3, (b, n, 1), generator=g).expand(-1, -1, 4)
        features = objects.gather(1, which) + 0.3 * torch.randn(b, n, 4, generator=g)
        for bad in (math.nan, 0.0):
            features = torch.where(torch.rand(b, n, 1, generator=g) < 0.05, bad, features)
        tokens.append(view._replace(features=features.to(dtype)))
    total = sum(view.grid.num_tokens for view in views)
    start = min(draw(st.integers(2, most)), total)
    # different tokens: two clusters that start alike tie for ever
    initial = torch.stack([torch.randperm(total, generator=g) for _ in range(b)])[:, :start]
    joint = JointClusters(
        start,
        draw(st.integers(2, start)),
        epsilon=draw(st.sampled_from([0.05, 0.2])),
        sinkhorn_iterations=draw(st.integers(1, 5)),
        position_weight=draw(st.sampled_from([0.0, 0.5, 4.0])),
        token_temp=draw(st.sampled_from([0.5, 2.0])),
        cost_scale=draw(st.sampled_from(["image", "batch"])),
    )
    scores = None
    if draw(st.booleans()):
        scores = tuple(
            torch.rand(view.features.shape[:2], generator=g).to(dtype) for view in tokens
        )
    return tokens[0], tokens[1], initial, scores, joint


@given(problems())
def test_are_those_of_loops(problem):
    student, teacher, initial, scores, joint = problem
    found = joint(student, teacher, initial=initial, token_scores=scores)
    assert torch.equal(found[0].valid, found[1].valid)
    check_clusters(found, truth(student, teacher, initial, scores, joint), 1e-6)


def grouped(b=3, n=12, d=6, seed=0, groups=3):
    """Two views of tokens of a few clearly different objects, and which token is of which."""
    g = torch.Generator().manual_seed(seed)
    objects = torch.eye(d)[:groups]
    which = torch.arange(n) % groups
    views = [objects[which] + 0.05 * torch.randn(b, n, d, generator=g) for _ in range(2)]
    return views[0], views[1], which


def test_finds_the_objects_that_are_there():
    one, two, which = grouped()
    joint = JointClusters(5, 4, position_weight=0.0)
    g = torch.Generator().manual_seed(1)
    first, second = joint(Tokens(one), Tokens(two), generator=g)
    for clusters in (first, second):
        assert clusters.assignment.shape == (3, 12, 4)
        label = clusters.assignment.argmax(-1)
        for image in range(3):  # an object may be split, but none shares a cluster with another
            for k in label[image].unique().tolist():
                assert len(set(which[label[image] == k].tolist())) == 1
    assert torch.equal(first.valid, second.valid)
    assert int(first.valid.sum(1).min()) >= 3
    # the same cluster is the same object in both views
    pooled = first.pool(one), second.pool(two)
    cosine = torch.nn.functional.cosine_similarity(*pooled, dim=-1)
    assert float(cosine[first.valid].min()) > 0.95


def test_a_cluster_of_one_view_alone_is_not_valid():
    one, two, _ = grouped(b=30, groups=6, seed=2)
    two = two[:, :2]  # two tokens can't be in four clusters
    first, second = JointClusters(5, 4, position_weight=0.0)(Tokens(one), Tokens(two))
    mass = [(clusters.assignment > 0).any(1) for clusters in (first, second)]
    assert bool((mass[0] & ~mass[1]).any())
    for clusters in (first, second):
        assert torch.equal(clusters.valid, mass[0] & mass[1])
    assert bool(first.valid.any(1).all())
    pooled = first.pool(one), second.pool(two)
    for features in pooled:
        assert torch.equal(features.abs().sum(-1) > 0, first.valid)
    matches = Matches.identity(first.valid)
    assert torch.equal(matches.gather(pooled[1]), pooled[1])


def test_each_token_has_one_cluster_and_parts_sum_to_one():
    one, two, _ = grouped(seed=4)
    for clusters in JointClusters(position_weight=0.0)(Tokens(one), Tokens(two)):
        assert int((clusters.assignment > 0).sum(-1).max()) == 1
        total = clusters.assignment.sum(1)
        assert bool(((total - 1).abs() < 1e-5)[clusters.valid].all())


def test_positions_part_what_looks_alike():
    grid = TokenGrid.tiling(1, 8, (8, 64))
    geometry = from_box(torch.tensor([[0.0, 0, 64, 8], [0, 0, 64, 8]]), (8, 64), (8, 64))
    tokens = Tokens(torch.ones(2, 8, 3), geometry, grid)
    first, _ = JointClusters(2, 2)(tokens, tokens, initial=torch.tensor([[0, 7], [7, 0]]))
    assert first.assignment[0].argmax(-1).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert first.assignment[1].argmax(-1).tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    # no unit: a source of another size, shown alike, is clustered alike
    large = from_box(torch.tensor([[0.0, 0, 6400, 800], [0, 0, 6400, 800]]), (8, 64), (800, 6400))
    start = torch.tensor([[1, 5], [6, 9]])
    small_one = JointClusters(2, 2)(tokens, tokens, initial=start)
    tokens = tokens._replace(geometry=large)
    large_one = JointClusters(2, 2)(tokens, tokens, initial=start)
    torch.testing.assert_close(small_one[0].assignment, large_one[0].assignment)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast_change_nothing(dtype):
    one, two, _ = grouped(seed=2)
    joint = JointClusters(position_weight=0.0)
    initial = torch.randint(0, 24, (3, 5), generator=torch.Generator().manual_seed(0))
    wide = joint(Tokens(one.to(dtype).float()), Tokens(two.to(dtype).float()), initial=initial)
    half = joint(Tokens(one.to(dtype)), Tokens(two.to(dtype)), initial=initial)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = joint(Tokens(one.to(dtype).float()), Tokens(two.to(dtype).float()), initial=initial)
    double = joint(Tokens(one.double()), Tokens(two.double()), initial=initial)
    for side in range(2):
        assert torch.equal(half[side].assignment, wide[side].assignment)
        assert torch.equal(cast[side].assignment, wide[side].assignment)
        assert half[side].assignment.dtype == torch.float32
        assert double[side].assignment.dtype == torch.float64


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
def test_bad_tokens_are_as_if_they_were_not_there(bad):
    one, two, _ = grouped(seed=3)
    dirty = one.clone()
    dirty[0, 5], dirty[0, 2] = bad, bad
    joint = JointClusters(position_weight=0.0)
    initial = torch.tensor([[0, 1, 3, 14, 20]] * 3)
    found = joint(Tokens(dirty), Tokens(two), initial=initial)
    whole = joint(Tokens(one), Tokens(two), initial=initial)
    assert torch.equal(found[0].assignment[1:], whole[0].assignment[1:])  # the other images
    kept = [i for i in range(12) if i not in (5, 2)]
    alone = joint(Tokens(one[:1, kept]), Tokens(two[:1]), initial=torch.tensor([[0, 1, 2, 12, 18]]))
    torch.testing.assert_close(found[0].assignment[:1, kept], alone[0].assignment)
    torch.testing.assert_close(found[1].assignment[:1], alone[1].assignment)
    assert float(found[0].assignment[0, [5, 2]].abs().max()) == 0
    pooled = found[0].pool(dirty)
    assert pooled.isfinite().all()


def test_tokens_outside_the_source_are_in_no_cluster():
    grid = TokenGrid.tiling(2, 3, (16, 24))
    padded = from_box(torch.tensor([[-8.0, 0, 16, 16], [0, 0, 24, 16]]), (16, 24), (16, 24))
    tokens = Tokens(torch.randn(2, 6, 4), padded, grid)
    first, _ = JointClusters(3, 2)(tokens, tokens)
    assert (first.assignment > 0).any(-1).tolist() == [[False, True, True] * 2, [True] * 6]


def test_starts_at_tokens_that_are_not_there_stay_empty():
    one, two, _ = grouped(b=2)
    one[0] = math.nan
    two[0, 1:] = math.nan
    one[1, :11] = math.nan
    two[1] = math.nan
    first, second = JointClusters(5, 4, position_weight=0.0)(Tokens(one), Tokens(two))
    assert not first.valid.any()
    assert int((second.assignment[0] > 0).sum()) == 1  # one token, in one cluster
    assert int((first.assignment[1] > 0).sum()) == 1
    assert second.assignment.isfinite().all()


def test_draws_follow_the_generator_and_take_valid_tokens_once():
    one, two, _ = grouped(b=40, n=6, groups=2)
    one[:, 3] = math.nan
    joint = JointClusters(11, 11, position_weight=0.0)  # as many as there are valid tokens
    draws = [
        joint(Tokens(one), Tokens(two), generator=torch.Generator().manual_seed(seed))[0]
        for seed in (5, 5, 6)
    ]
    assert torch.equal(draws[0].assignment, draws[1].assignment)
    assert not torch.equal(draws[0].assignment, draws[2].assignment)
    torch.manual_seed(8)
    again = [joint(Tokens(one), Tokens(two))[0] for _ in range(2)]
    assert not torch.equal(again[0].assignment, again[1].assignment)


def test_scores_say_how_often_a_token_is_drawn():
    # at a low temperature the best-scored tokens alone are ever drawn, and they carry the mass
    one, two, which = grouped(b=4, groups=2)
    low, high = torch.zeros(4, 12), torch.zeros(4, 12)
    high[:, which == 0] = 1.0
    joint = JointClusters(2, 2, position_weight=0.0, token_temp=1e-3, cluster_temp=1e-3)
    first, _ = joint(Tokens(one), Tokens(two), token_scores=(high, high))
    assert bool(first.valid.all())  # both start within the one object, which both views show
    shares = first.assignment.amax(-1)
    assert float(shares[:, which == 1].max()) < 1e-6 < float(shares[:, which == 0].min())
    with_nan = high.clone()
    with_nan[0, 0] = math.nan
    first, _ = joint(Tokens(one), Tokens(two), token_scores=(with_nan, low))
    assert float(first.assignment[0, 0].max()) == 0


def test_images_do_not_depend_on_each_other_unless_asked():
    one, two, _ = grouped(b=3, seed=7)
    one[2] *= torch.randn(6)
    initial = torch.tensor([[0, 1, 2, 15, 20]] * 3)
    for scale in ("image", "batch"):
        joint = JointClusters(position_weight=0.0, cost_scale=scale)
        whole = joint(Tokens(one), Tokens(two), initial=initial)[0].assignment
        alone = joint(Tokens(one[:1]), Tokens(two[:1]), initial=initial[:1])[0].assignment
        assert torch.allclose(whole[:1], alone, atol=1e-6) == (scale == "image")


def test_the_order_of_tokens_does_not_matter():
    one, two, _ = grouped(seed=9)
    joint = JointClusters(position_weight=0.0)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    back = order.argsort()
    initial = torch.tensor([[0, 4, 8, 13, 20]] * 3)
    moved = torch.where(initial < 12, back[initial.clamp_max(11)], initial)
    plain = joint(Tokens(one), Tokens(two), initial=initial)
    turned = joint(Tokens(one[:, order]), Tokens(two), initial=moved)
    torch.testing.assert_close(turned[0].assignment, plain[0].assignment[:, order])
    torch.testing.assert_close(turned[1].assignment, plain[1].assignment)


@pytest.mark.parametrize(("b", "s", "t"), [(0, 3, 4), (2, 0, 4), (2, 3, 0), (2, 0, 0), (2, 1, 1)])
def test_empty_and_single(b, s, t):
    first, second = JointClusters(3, 3, position_weight=0.0)(
        Tokens(torch.ones(b, s, 2)), Tokens(torch.ones(b, t, 2))
    )
    assert first.assignment.shape == (b, s, 3)
    assert second.assignment.shape == (b, t, 3)
    assert first.valid.shape == second.valid.shape == (b, 3)
    assert bool((first.valid.sum(1) == (1 if s and t else 0)).all())
    assert first.pool(torch.ones(b, s, 5)).shape == (b, 3, 5)


def test_pool_is_the_weighted_mean():
    g = torch.Generator().manual_seed(0)
    parts = torch.rand(2, 5, 3, generator=g, dtype=torch.float64)
    parts[:, :, 2] = 0
    parts[:, 4] = 0
    valid = torch.tensor([[True, True, False], [True, False, False]])
    features = torch.randn(2, 5, 4, generator=g, dtype=torch.float64)
    features[:, 4] = math.nan  # in no cluster
    clusters = Clusters(parts, valid)
    pooled = clusters.pool(features)
    for image in range(2):
        for k in range(3):
            weights = parts[image, :, k].tolist()
            wanted = weighted_mean(weights, features[image].tolist())
            wanted = wanted if valid[image, k] else [0.0] * 4
            assert pooled[image, k].tolist() == pytest.approx(wanted)
    # a token of a cluster that is not valid is not read either
    alone = torch.zeros(1, 2, 2)
    alone[0, 0, 0], alone[0, 1, 1] = 1, 1
    found = Clusters(alone, torch.tensor([[True, False]])).pool(
        torch.tensor([[[1.0, 2.0], [math.nan, math.inf]]])
    )
    assert found.tolist() == [[[1.0, 2.0], [0.0, 0.0]]]


def test_pool_gives_gradients_to_the_features():
    g = torch.Generator().manual_seed(0)
    clusters = Clusters(
        torch.rand(2, 4, 3, generator=g, dtype=torch.float64),
        torch.tensor([[True, True, False], [False, True, True]]),
    )
    features = torch.randn(2, 4, 2, generator=g, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(clusters.pool, (features,))
    dirty = features.detach().clone()
    dirty[0, 0] = math.nan
    parts = clusters.assignment.clone()
    parts[0, 0] = 0
    dirty.requires_grad_()
    Clusters(parts, clusters.valid).pool(dirty).sum().backward()
    assert dirty.grad.isfinite().all()
    half = clusters.pool(torch.randn(2, 4, 2).half())
    assert half.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(clusters.pool(features), clusters.pool(features.clone()))
        assert clusters.pool(features.float()).dtype == torch.float32


def test_no_gradient_and_inputs_are_left_alone():
    one, two, _ = grouped()
    before = one.clone(), two.clone()
    one.requires_grad_()
    first, _ = JointClusters(position_weight=0.0)(Tokens(one), Tokens(two))
    assert not first.assignment.requires_grad
    assert torch.equal(one.detach(), before[0])
    assert torch.equal(two, before[1])
    initial = torch.tensor([[0, 4, 8, 13, 20]] * 3)
    plain = JointClusters(position_weight=0.0)(Tokens(one), Tokens(two), initial=initial)
    with torch.inference_mode():
        frozen = Tokens(before[0].clone()), Tokens(before[1].clone())
    found = JointClusters(position_weight=0.0)(*frozen, initial=initial)
    assert torch.equal(found[0].assignment, plain[0].assignment)


def test_clusters_go_through_a_safe_checkpoint_and_a_pytree():
    clusters = Clusters(torch.rand(2, 3, 2), torch.ones(2, 2, dtype=torch.bool))
    buffer = io.BytesIO()
    torch.save(clusters, buffer)
    buffer.seek(0)
    found = torch.load(buffer, weights_only=True)
    assert isinstance(found, Clusters)
    assert torch.equal(found.assignment, clusters.assignment)
    assert isinstance(torch.utils._pytree.tree_map(torch.clone, clusters), Clusters)


def view(seed, n=(2, 3), d=4):
    size = (8 * n[0], 8 * n[1])
    geometry = random_geometry(view_size=size, seed=seed)
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(2, n[0] * n[1], d, generator=g)
    return Tokens(features, geometry, TokenGrid.tiling(*n, size))


def test_runs_where_no_value_can_be_read():
    # fake tensors have shapes only: whatever asks for a value, as a host sync does, raises
    one, two = view(0), view(1, (3, 3))
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        views = [
            Tokens(
                fake.from_tensor(v.features),
                CropGeometry(*(fake.from_tensor(part) for part in v.geometry)),
                v.grid,
            )
            for v in (one, two)
        ]
        with pytest.raises(DataDependentOutputException):
            float(views[0].features.sum())
        scores = torch.zeros(2, 6), torch.zeros(2, 9)
        first, second = JointClusters()(*views, token_scores=scores)
        pooled = first.pool(views[0].features)
    assert first.assignment.shape == (2, 6, 4)
    assert second.assignment.shape == (2, 9, 4)
    assert pooled.shape == (2, 4, 4)


def test_compiles_once_for_changing_crops():
    torch._dynamo.reset()
    joint = JointClusters(3, 2, sinkhorn_iterations=1)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(joint, fullgraph=True, backend=counter)
    initial = torch.tensor([[0, 5, 8], [2, 9, 3]])
    for step in range(10):
        one, two = view(2 * step), view(2 * step + 1)
        found = compiled(one, two, initial=initial)
        plain = joint(one, two, initial=initial)
        for side in range(2):
            torch.testing.assert_close(found[side].assignment, plain[side].assignment)
            assert torch.equal(found[side].valid, plain[side].valid)
    assert counter.frame_count <= 2


def test_a_draw_compiles_too():
    torch._dynamo.reset()
    joint = JointClusters(3, 2, sinkhorn_iterations=2, position_weight=0.0)
    compiled = torch.compile(joint, fullgraph=True, backend="aot_eager")
    one, two, _ = grouped()
    first, second = compiled(Tokens(one), Tokens(two))
    assert torch.equal(first.valid, second.valid)
    assert bool(((first.assignment > 0).sum(-1) == 1).all())


def test_maps_over_a_new_axis():
    joint = JointClusters(3, 2, position_weight=0.0)
    one, two = torch.randn(3, 2, 6, 4), torch.randn(3, 2, 5, 4)
    initial = torch.randint(0, 11, (3, 2, 3))
    mapped = torch.vmap(lambda x, y, i: joint(Tokens(x), Tokens(y), initial=i)[0].assignment)(
        one, two, initial
    )
    for k in range(3):
        plain = joint(Tokens(one[k]), Tokens(two[k]), initial=initial[k])[0].assignment
        torch.testing.assert_close(mapped[k], plain)


def test_modules_are_copied_and_printed():
    joint = JointClusters(6, 3, epsilon=0.1)
    one, two = view(0), view(1)
    initial = torch.tensor([[0, 5, 8, 1, 2, 3], [2, 9, 3, 4, 5, 6]])
    wanted = joint(one, two, initial=initial)[0].assignment
    for other in (copy.deepcopy(joint), pickle.loads(pickle.dumps(joint))):
        assert torch.equal(other(one, two, initial=initial)[0].assignment, wanted)
    assert repr(joint) == (
        "JointClusters(start_clusters=6, max_clusters=3, epsilon=0.1, sinkhorn_iterations=5, "
        "position_weight=4.0, token_temp=2.0, cluster_temp=2.0, cost_scale='image')"
    )


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"start_clusters": 1}, "start_clusters"),
        ({"max_clusters": 1}, "max_clusters"),
        ({"max_clusters": 6}, "max_clusters"),
        ({"epsilon": 0.0}, "epsilon"),
        ({"epsilon": math.nan}, "epsilon"),
        ({"sinkhorn_iterations": 0}, "sinkhorn_iterations"),
        ({"position_weight": -1.0}, "position_weight"),
        ({"position_weight": math.nan}, "position_weight"),
        ({"token_temp": 0.0}, "token_temp"),
        ({"cluster_temp": -1.0}, "cluster_temp"),
        ({"cost_scale": "all"}, "cost_scale"),
    ],
)
def test_bad_settings_are_refused(settings, name):
    with pytest.raises(ConfigError, match=f"`{name}`"):
        JointClusters(**settings)


def test_bad_tokens_are_refused_by_name():
    joint, flat = JointClusters(3, 2), JointClusters(3, 2, position_weight=0.0)
    good = Tokens(torch.zeros(2, 3, 4))
    with pytest.raises(ShapeError, match="no geometry, which a joint clustering"):
        joint(good, good)
    with pytest.raises(ShapeError, match="axis `b`"):
        flat(good, Tokens(torch.zeros(1, 3, 4)))
    with pytest.raises(ShapeError, match="axis `d`"):
        flat(good, Tokens(torch.zeros(2, 3, 5)))
    with pytest.raises(ShapeError, match="`student` has no features"):
        flat(Tokens(), good)
    for initial, text in (
        (
            torch.zeros(2, 2, dtype=torch.int64),
            r"`initial` must have shape .*\(2, 3\), got \(2, 2\)",
        ),
        (torch.zeros(2, 3), "`initial` must be an int64"),
        (torch.full((2, 3), 6), r"`initial` must hold token indices in \[0, s \+ t\) = \[0, 6\)"),
        (torch.full((2, 3), -1), "`initial` must hold"),
    ):
        with pytest.raises(ShapeError, match=text):
            flat(good, good, initial=initial)
    with pytest.raises(ShapeError, match="`token_scores` must be two"):
        flat(good, good, token_scores=torch.zeros(2, 3))
    with pytest.raises(ShapeError, match=r"`token_scores\[1\]`"):
        flat(good, good, token_scores=(torch.zeros(2, 3), torch.zeros(2, 4)))
    with pytest.raises(ShapeError, match="floating-point"):
        flat(good, good, token_scores=(torch.zeros(2, 3).long(), torch.zeros(2, 3)))
    one = view(0)
    with pytest.raises(GeometryError, match="float16"):
        joint(one._replace(geometry=one.geometry._replace(matrix=one.geometry.matrix.half())), one)
    clusters = flat(good, good)[0]
    with pytest.raises(ShapeError, match="axis `n` is 3"):
        clusters.pool(torch.zeros(2, 4, 5))

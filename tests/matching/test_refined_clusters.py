import copy
import math
import pickle

import pytest
import torch
from helpers.check_clusters import check_clusters
from helpers.strategies import random_geometry, view_pairs
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from local_distill import CropGeometry, ShapeError, TokenGrid, Tokens, from_box
from local_distill.errors import ConfigError
from local_distill.matching.refined_clusters import RefinedJointClusters
from local_distill.testing.oracles import (
    cluster_plans,
    hard_shares,
    joint_tokens,
    unit_vector,
    weighted_mean,
)


def truth(student, teacher, initial, joint):
    """[image] of (student, teacher) assignments: CrIBo's rounds in loops."""
    s, k = student.features.shape[1], joint.num_clusters
    units, points, exists, members = [], [], [], []
    for image, (u, p) in enumerate(joint_tokens(student, teacher)):
        units.append(u)
        points.append(p)
        start = initial[image].tolist()
        exists.append([u[i] is not None for i in start])
        members.append([[i] if u[i] is not None else [] for i in start])
    rows = [[1 / max(1, sum(z is not None for z in u)) for _ in u] for u in units]
    cols = [[1 / max(1, sum(there)) for _ in there] for there in exists]
    for _ in range(joint.rounds):
        centroids, distances = [], []
        for i, clusters in enumerate(members):
            row = []
            for there, cluster in zip(exists[i], clusters, strict=True):
                mean = weighted_mean([float(n in cluster) for n in range(len(units[i]))], units[i])
                zero = [0.0] * student.features.shape[2]
                row.append((mean and unit_vector(mean)) or zero if there else None)
            centroids.append(row)
            distances.append(neighbours(points[i], units[i], clusters, exists[i]))
        plans, _ = cluster_plans(
            units,
            centroids,
            distances,
            rows,
            cols,
            position_weight=joint.position_weight,
            epsilon=joint.epsilon,
            iterations=joint.sinkhorn_iterations,
            cost_scale=joint.cost_scale,
        )
        for i, plan in enumerate(plans):
            members[i] = [[] for _ in range(k)]
            for n, row in enumerate(plan):
                if max(row) > 0:
                    members[i][row.index(max(row))].append(n)
            if joint.update_masses:
                counts = [
                    len(m) + 0.01 if e else 0.0 for m, e in zip(members[i], exists[i], strict=True)
                ]
                cols[i] = [count / max(sum(counts), 0.01) for count in counts]
    return [
        tuple(hard_shares(plan, *bound, by_share=False) for bound in ((0, s), (s, len(plan))))
        for plan in plans
    ]


def neighbours(points, units, clusters, exists):
    """[n][k] distance to the nearest other token of a cluster; the mean where there is none."""
    table = []
    for p in points:
        row = []
        for cluster in clusters:
            away = [math.dist(p, points[m]) for m in cluster]
            row.append(min((d for d in away if d > 0), default=0.0))
        table.append(row)
    live = [
        table[n][k]
        for n, z in enumerate(units)
        for k, there in enumerate(exists)
        if z is not None and there
    ]
    mean = sum(live) / max(1, len(live))
    return [[d if d > 0 else mean for d in row] for row in table]


@st.composite
def problems(draw, most=5):
    """Two views of grouped tokens with geometry, some tokens of them bad, and starting tokens."""
    views = list(draw(view_pairs(padding=draw(st.sampled_from([0.0, 9.0])))))
    g = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    b = views[0].geometry.matrix.shape[0]
    objects = torch.randn(b, 3, 4, generator=g)
    tokens = []
    for one in views:
        n = one.grid.num_tokens
        which = torch.randint(0, 3, (b, n, 1), generator=g).expand(-1, -1, 4)
        features = objects.gather(1, which) + 0.3 * torch.randn(b, n, 4, generator=g)
        for bad in (math.nan, 0.0):
            features = torch.where(torch.rand(b, n, 1, generator=g) < 0.05, bad, features)
        tokens.append(one._replace(features=features.double()))
    total = sum(one.grid.num_tokens for one in views)
    k = min(draw(st.integers(1, most)), total)
    # different tokens: two clusters that start alike tie for ever
    initial = torch.stack([torch.randperm(total, generator=g) for _ in range(b)])[:, :k]
    joint = RefinedJointClusters(
        k,
        rounds=draw(st.integers(1, 4)),
        epsilon=draw(st.sampled_from([0.05, 0.2])),
        sinkhorn_iterations=draw(st.integers(1, 5)),
        position_weight=draw(st.sampled_from([0.0, 0.5, 2.0])),
        update_masses=draw(st.booleans()),
        cost_scale=draw(st.sampled_from(["image", "batch"])),
    )
    return tokens[0], tokens[1], initial, joint


@given(problems())
def test_are_those_of_loops(problem):
    student, teacher, initial, joint = problem
    found = joint(student, teacher, initial=initial)
    assert torch.equal(found[0].valid, found[1].valid)
    check_clusters(found, truth(student, teacher, initial, joint), 1e-6)


def test_a_cluster_of_one_view_alone_is_not_valid():
    both, only = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0])
    one = torch.stack((both, both, only, only)).expand(2, 4, 3)
    two = both.expand(2, 5, 3)
    joint = RefinedJointClusters(2, position_weight=0.0)
    first, second = joint(Tokens(one), Tokens(two), initial=torch.tensor([[0, 2], [3, 4]]))
    assert first.valid.tolist() == second.valid.tolist() == [[True, False], [False, True]]
    assert first.assignment[0].tolist() == [[0.5, 0], [0.5, 0], [0, 0.5], [0, 0.5]]
    assert float(second.assignment[0, :, 1].max()) == 0
    assert torch.equal(first.pool(one)[0], torch.stack((both, torch.zeros(3))))


def test_masses_follow_the_sizes_where_they_may():
    # one object of 9 tokens and one of 3: equal masses would tear the large one apart
    large, small = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0])
    g = torch.Generator().manual_seed(0)
    tokens = torch.stack([large] * 9 + [small] * 3) + 0.05 * torch.randn(2, 12, 3, generator=g)
    initial = torch.tensor([[0, 11], [3, 10]])
    sizes = {}
    for update in (True, False):
        joint = RefinedJointClusters(
            2, epsilon=0.05, sinkhorn_iterations=100, position_weight=0.0, update_masses=update
        )
        first, _ = joint(Tokens(tokens), Tokens(tokens), initial=initial)
        sizes[update] = (first.assignment > 0).sum(1).tolist()
    assert sizes[True] == [[9, 3], [9, 3]]
    assert all(max(image) < 9 for image in sizes[False])


def test_positions_part_what_looks_alike():
    grid = TokenGrid.tiling(1, 8, (8, 64))
    geometry = from_box(torch.tensor([[0.0, 0, 64, 8], [0, 0, 64, 8]]), (8, 64), (8, 64))
    tokens = Tokens(torch.ones(2, 8, 3), geometry, grid)
    first, _ = RefinedJointClusters(2)(tokens, tokens, initial=torch.tensor([[0, 7], [7, 0]]))
    assert first.assignment[0].argmax(-1).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert first.assignment[1].argmax(-1).tolist() == [1, 1, 1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
def test_bad_tokens_are_as_if_they_were_not_there(bad):
    g = torch.Generator().manual_seed(3)
    one, two = torch.randn(3, 9, 4, generator=g), torch.randn(3, 7, 4, generator=g)
    dirty = two.clone()
    dirty[0, 5] = bad
    joint = RefinedJointClusters(3, position_weight=0.0)
    initial = torch.tensor([[0, 4, 15]] * 3)
    found = joint(Tokens(one), Tokens(dirty), initial=initial)
    whole = joint(Tokens(one), Tokens(two), initial=initial)
    assert torch.equal(found[1].assignment[1:], whole[1].assignment[1:])
    kept = [0, 1, 2, 3, 4, 6]
    alone = joint(Tokens(one[:1]), Tokens(two[:1, kept]), initial=torch.tensor([[0, 4, 14]]))
    torch.testing.assert_close(found[1].assignment[:1, kept], alone[1].assignment)
    torch.testing.assert_close(found[0].assignment[:1], alone[0].assignment)
    assert found[1].pool(dirty).isfinite().all()


@pytest.mark.parametrize(("b", "s", "t"), [(0, 3, 4), (2, 0, 4), (2, 3, 0), (2, 0, 0), (2, 1, 1)])
def test_empty_and_single(b, s, t):
    first, second = RefinedJointClusters(3, position_weight=0.0)(
        Tokens(torch.ones(b, s, 2)), Tokens(torch.ones(b, t, 2))
    )
    assert first.assignment.shape == (b, s, 3)
    assert second.assignment.shape == (b, t, 3)
    assert bool((first.valid.sum(1) == (1 if s and t else 0)).all())


def test_draws_follow_the_generator():
    tokens = Tokens(torch.randn(6, 12, 4))
    joint = RefinedJointClusters(4, position_weight=0.0)
    draws = [
        joint(tokens, tokens, generator=torch.Generator().manual_seed(seed))[0].assignment
        for seed in (5, 5, 6)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_no_gradient_and_half_precision():
    one, two = torch.randn(2, 9, 4, requires_grad=True), torch.randn(2, 7, 4)
    joint = RefinedJointClusters(3, position_weight=0.0)
    initial = torch.tensor([[0, 4, 15]] * 2)
    assert not joint(Tokens(one), Tokens(two))[0].assignment.requires_grad
    half = joint(Tokens(one.half()), Tokens(two.half()), initial=initial)
    wide = joint(Tokens(one.half().float()), Tokens(two.half().float()), initial=initial)
    assert half[0].assignment.dtype == torch.float32
    assert torch.equal(half[0].assignment, wide[0].assignment)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = joint(Tokens(one), Tokens(two), initial=initial)[0].assignment
    assert torch.equal(cast, joint(Tokens(one), Tokens(two), initial=initial)[0].assignment)


def view(seed, n=(2, 3), d=4):
    size = (8 * n[0], 8 * n[1])
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(2, n[0] * n[1], d, generator=g)
    geometry = random_geometry(view_size=size, seed=seed)
    return Tokens(features, geometry, TokenGrid.tiling(*n, size))


def test_runs_where_no_value_can_be_read():
    # fake tensors have shapes only: whatever asks for a value, as a host sync does, raises
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        views = [
            Tokens(
                fake.from_tensor(v.features),
                CropGeometry(*(fake.from_tensor(part) for part in v.geometry)),
                v.grid,
            )
            for v in (view(0), view(1, (3, 3)))
        ]
        first, second = RefinedJointClusters(4)(*views)
    assert first.assignment.shape == (2, 6, 4)
    assert second.assignment.shape == (2, 9, 4)


def test_compiles_once_for_changing_crops():
    torch._dynamo.reset()
    joint = RefinedJointClusters(3, rounds=2, sinkhorn_iterations=1)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(joint, fullgraph=True, backend=counter)
    initial = torch.tensor([[0, 5, 8], [2, 9, 3]])
    for step in range(10):
        one, two = view(2 * step), view(2 * step + 1)
        found, plain = compiled(one, two, initial=initial), joint(one, two, initial=initial)
        for side in range(2):
            torch.testing.assert_close(found[side].assignment, plain[side].assignment)
            assert torch.equal(found[side].valid, plain[side].valid)
    assert counter.frame_count <= 2


def test_maps_over_a_new_axis():
    joint = RefinedJointClusters(3)
    views = [(view(2 * k), view(2 * k + 1)) for k in range(3)]
    initial = torch.tensor([[0, 5, 8], [2, 9, 3]])

    def run(x, p, y, q):
        one, two = views[0]
        one = Tokens(x, one.geometry._replace(matrix=p), one.grid)
        two = Tokens(y, two.geometry._replace(matrix=q), two.grid)
        return joint(one, two, initial=initial)[0].assignment

    stacked = [
        torch.stack([part(pair[side]) for pair in views])
        for side in range(2)
        for part in (lambda v: v.features, lambda v: v.geometry.matrix)
    ]
    mapped = torch.vmap(run)(*stacked)
    for k, pair in enumerate(views):
        torch.testing.assert_close(mapped[k], joint(*pair, initial=initial)[0].assignment)


def test_modules_are_copied_and_printed():
    joint = RefinedJointClusters(3, rounds=2)
    initial = torch.tensor([[0, 5, 8], [2, 9, 3]])
    wanted = joint(view(0), view(1), initial=initial)[0].assignment
    for other in (copy.deepcopy(joint), pickle.loads(pickle.dumps(joint))):
        assert torch.equal(other(view(0), view(1), initial=initial)[0].assignment, wanted)
    assert repr(joint) == (
        "RefinedJointClusters(num_clusters=3, rounds=2, epsilon=0.05, sinkhorn_iterations=5, "
        "position_weight=1.0, update_masses=True, cost_scale='image')"
    )


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"num_clusters": 0}, "num_clusters"),
        ({"rounds": 0}, "rounds"),
        ({"epsilon": -1.0}, "epsilon"),
        ({"sinkhorn_iterations": 0}, "sinkhorn_iterations"),
        ({"position_weight": math.inf}, "position_weight"),
        ({"cost_scale": "images"}, "cost_scale"),
    ],
)
def test_bad_settings_are_refused(settings, name):
    with pytest.raises(ConfigError, match=f"`{name}`"):
        RefinedJointClusters(**settings)


def test_bad_tokens_are_refused_by_name():
    good = Tokens(torch.zeros(2, 3, 4))
    with pytest.raises(ShapeError, match="no geometry, which a joint clustering"):
        RefinedJointClusters(2)(good, good)
    flat = RefinedJointClusters(2, position_weight=0.0)
    with pytest.raises(ShapeError, match="axis `b`"):
        flat(good, Tokens(torch.zeros(1, 3, 4)))
    with pytest.raises(ShapeError, match="`initial` must have shape"):
        flat(good, good, initial=torch.zeros(2, 3, dtype=torch.int64))

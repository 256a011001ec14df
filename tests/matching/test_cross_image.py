import copy
import importlib.util
import math
import pickle
from pathlib import Path

import pytest
import torch
from helpers.processes import said_by_all
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from local_distill import ShapeError, TokenGrid, Tokens, from_box
from local_distill.distributed import all_gather_rows
from local_distill.errors import ConfigError
from local_distill.kernels import block_length
from local_distill.matching.cross_image import CrossImageQueue

WORKER = Path(__file__).with_name("queue_worker.py")
SETTINGS = {"num_objects": 3, "feature_dim": 4}


class Naive:
    """The queue as a list of images, newest last; float64 loops."""

    def __init__(self, num_images, normalize, cycle):
        self.num_images, self.normalize, self.cycle = num_images, normalize, cycle
        self.images = []  # (objects: [(x, y) or None], image id)
        self.skipped = 0

    def update(self, one, two, valid, ids):
        for image in range(one.shape[0]):
            objects = []
            for i in range(one.shape[1]):
                x, y = one[image, i].tolist(), two[image, i].tolist()
                good = direction(x) is not None and direction(y) is not None
                wanted = bool(valid[image, i])
                self.skipped += wanted and not good
                objects.append((x, y) if wanted and good else None)
            if image < self.num_images:
                self.images.append((objects, int(ids[image])))
        self.images = self.images[-self.num_images :]

    def match(self, one, two, view, ids):
        """[image][i] of (x row, y row, cost) or None."""
        b, n = one.shape[:2]
        candidates = [
            (o[view], o[1 - view], name)
            for objects, name in self.images
            for o in objects
            if o is not None
        ]
        others = [
            (image, i, direction(two[image, i].tolist())) for image in range(b) for i in range(n)
        ]
        others = [other for other in others if other[2] is not None]
        result = []
        for image in range(b):
            row = []
            for i in range(n):
                x = direction(one[image, i].tolist())
                free = [c for c in candidates if ids is None or c[2] != int(ids[image])]
                if x is None or not free:
                    row.append(None)
                    continue
                best = max(free, key=lambda c: dot(x, direction(c[0]) if self.normalize else c[0]))
                if self.cycle is not None:
                    back = direction(best[1])
                    homes = [o for o in others if self.cycle == "batch" or o[0] == image]
                    home = max(homes, key=lambda o: dot(back, o[2]), default=(None, None, None))
                    if home[:2] != (image, i):
                        row.append(None)
                        continue
                row.append((best[0], best[1], 1 - dot(x, direction(best[0]))))
            result.append(row)
        return result


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def direction(a):
    norm = math.sqrt(dot(a, a))
    return [x / norm for x in a] if math.isfinite(norm) and norm > 0 else None


@given(
    st.integers(1, 5), st.integers(1, 3), st.lists(st.integers(0, 4), min_size=1, max_size=5),
    st.booleans(), st.sampled_from(["batch", "image", None]), st.booleans(), st.integers(0, 9999),
)  # fmt: skip
def test_matches_and_state_are_those_of_a_list(
    num_images, n, batches, normalize, cycle, use_ids, seed
):
    g = torch.Generator().manual_seed(seed)
    queue = CrossImageQueue(
        num_images, num_objects=n, feature_dim=3, normalize=normalize, cycle=cycle
    ).double()
    naive = Naive(num_images, normalize, cycle)
    for b in batches:
        one = torch.randn(b, n, 3, generator=g, dtype=torch.float64)
        two = one + 0.5 * torch.randn(b, n, 3, generator=g, dtype=torch.float64)
        for bad in (math.nan, 0.0):
            one = torch.where(torch.rand(b, n, 1, generator=g) < 0.1, bad, one)
        valid = torch.rand(b, n, generator=g) > 0.2
        ids = torch.randint(0, 4, (b,), generator=g)
        for view, sides in ((0, (one, two)), (1, (two, one))):
            matches = queue(*map(Tokens, sides), view=view, image_id=ids if use_ids else None)
            found = matches.gather(queue.rows(view).expand(b, -1, -1))
            wanted = naive.match(*sides, view, ids if use_ids else None)
            for image in range(b):
                for i, match in enumerate(wanted[image]):
                    assert bool(matches.matched[image, i]) == (match is not None)
                    cost = float(matches.cost[image, i])
                    if match is None:
                        assert cost == math.inf
                    else:
                        assert found[image, i].tolist() == match[0]
                        assert cost == pytest.approx(match[2], abs=1e-12)
        queue.update(Tokens(one), Tokens(two), valid=valid, image_id=ids)
        naive.update(one, two, valid, ids)
        assert int(queue.skipped) == naive.skipped
        assert int(queue.count) == len(naive.images)
        held = sorted(o for objects, _ in naive.images for o in objects if o is not None)
        kept = queue.valid.flatten()
        mine = zip(queue.rows(0)[kept].tolist(), queue.rows(1)[kept].tolist(), strict=True)
        assert sorted(mine) == held


def filled(b=4, n=3, d=4, seed=0, **settings):
    g = torch.Generator().manual_seed(seed)
    queue = CrossImageQueue(6, num_objects=n, feature_dim=d, **settings)
    one = torch.randn(b, n, d, generator=g)
    two = one + 0.1 * torch.randn(b, n, d, generator=g)
    queue.update(Tokens(one), Tokens(two))
    return queue, one, two


def test_an_empty_queue_matches_nothing_and_half_a_queue_only_what_is_there():
    queue = CrossImageQueue(5, **SETTINGS)
    tokens = Tokens(torch.randn(2, 3, 4))
    matches = queue(tokens, tokens)
    assert not matches.matched.any()
    assert bool((matches.cost == math.inf).all())
    queue, one, two = filled()
    matches = queue(Tokens(one), Tokens(two))  # each finds itself
    assert torch.equal(matches.teacher_index[..., 0], torch.arange(12).view(4, 3))
    assert bool(matches.matched.all())
    assert float(matches.cost.max()) < 1e-6
    # opposite to all that is there: the empty rows, whose product is 0, would be nearer
    away = -one.mean((0, 1)).expand(2, 3, 4)
    assert int(queue(Tokens(away), Tokens(away)).teacher_index.max()) < 12


def test_rows_of_the_same_image_are_left_out():
    queue = CrossImageQueue(6, **SETTINGS)
    one = torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([3, 8, 5, 0])
    queue.update(Tokens(one), Tokens(one), image_id=ids)
    found = queue(Tokens(one), Tokens(one), image_id=ids).teacher_index[..., 0] // 3
    assert bool((found != torch.arange(4)[:, None]).all())
    found = queue(Tokens(one), Tokens(one), image_id=ids + 100).teacher_index[..., 0] // 3
    assert torch.equal(found, torch.arange(4)[:, None].expand(4, 3))


def test_only_the_way_back_that_leads_home_is_kept():
    queue = CrossImageQueue(1, num_objects=2, feature_dim=2)
    east, north = [1.0, 0.0], [0.0, 1.0]
    queue.update(Tokens(torch.tensor([[east, north]])), Tokens(torch.tensor([[north, east]])))
    # out in view 0: east → row 0, which in view 1 is north: the teacher's object there is 1
    one, two = torch.tensor([[east, north]]), torch.tensor([[east, north]])
    assert not queue(Tokens(one), Tokens(two)).matched.any()
    assert queue(Tokens(one), Tokens(two.flip(1))).matched.all()
    # from the other view the rows' roles are changed
    assert queue(Tokens(two.flip(1)), Tokens(one), view=1).matched.all()
    loose = CrossImageQueue(1, num_objects=2, feature_dim=2, cycle=None)
    loose.load_state_dict(queue.state_dict())
    assert loose(Tokens(one), Tokens(two)).matched.all()


def test_another_images_object_may_stand_in_the_way():
    queue = CrossImageQueue(1, num_objects=1, feature_dim=2)
    queue.update(Tokens(torch.tensor([[[1.0, 0.0]]])), Tokens(torch.tensor([[[1.0, 0.0]]])))
    objects = Tokens(torch.tensor([[[1.0, 0.2]], [[1.0, 0.0]]]))
    assert queue(objects, objects).matched.tolist() == [[False], [True]]
    queue.cycle = "image"
    assert queue(objects, objects).matched.tolist() == [[True], [True]]
    dirty = Tokens(torch.tensor([[[1.0, 0.2]], [[math.nan, 0.0]]]))
    queue.cycle = "batch"
    assert queue(dirty, dirty).matched.tolist() == [[True], [False]]


def test_the_oldest_images_go_first():
    queue = CrossImageQueue(3, num_objects=1, feature_dim=1)
    for start in (1.0, 3.0):
        one = torch.tensor([[[start]], [[start + 1]]])
        queue.update(Tokens(one), Tokens(-one))
    assert sorted(queue.rows(0).flatten().tolist()) == [2.0, 3.0, 4.0]
    assert sorted(queue.rows(1).flatten().tolist()) == [-4.0, -3.0, -2.0]
    assert int(queue.count) == 3
    many = torch.arange(10.0, 15.0).view(5, 1, 1)
    queue.update(Tokens(many), Tokens(many))  # more than it holds: the first, as published
    assert sorted(queue.rows(0).flatten().tolist()) == [10.0, 11.0, 12.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("side", [0, 1])
def test_bad_objects_never_enter_and_are_counted(bad, dtype, side):
    queue = CrossImageQueue(4, **SETTINGS)
    sides = [torch.randn(2, 3, 4).to(dtype) for _ in range(2)]
    sides[side][1, 2] = bad
    queue.update(*map(Tokens, sides))
    assert int(queue.skipped) == 1
    assert queue.valid[:2].tolist() == [[True] * 3, [True, True, False]]
    assert all(part.isfinite().all() for part in queue.state_dict().values())
    valid = torch.tensor([[True] * 3, [True, True, False]])
    queue.update(*map(Tokens, sides), valid=valid)
    assert int(queue.skipped) == 1  # left out as the caller said, not skipped


def test_what_is_too_large_for_the_state_does_not_enter():
    queue = CrossImageQueue(4, **SETTINGS)
    one = torch.full((2, 3, 4), 1.0, dtype=torch.float64)
    one[0, 0], one[0, 1] = 1e300, 1e-300
    queue.update(Tokens(one), Tokens(one))
    assert int(queue.skipped) == 2
    assert queue.features.isfinite().all()


def test_tokens_outside_the_source_neither_enter_nor_match():
    grid = TokenGrid.tiling(1, 3, (8, 24))
    padded = from_box(torch.tensor([[-8.0, 0, 16, 8], [0, 0, 24, 8]]), (8, 24), (8, 24))
    tokens = Tokens(torch.randn(2, 3, 4), padded, grid)
    queue = CrossImageQueue(2, **SETTINGS)
    queue.update(tokens, tokens)
    assert queue.valid.tolist() == [[False, True, True], [True] * 3]
    assert int(queue.skipped) == 0
    assert queue(tokens, tokens).matched.tolist() == [[False, True, True], [True] * 3]


def test_forward_changes_nothing_in_any_mode():
    queue, one, two = filled()
    before = copy.deepcopy(queue.state_dict())
    for training in (True, False):
        queue.train(training)
        queue(Tokens(one.requires_grad_()), Tokens(two))
        with torch.no_grad():
            queue(Tokens(one), Tokens(two), view=1)
        with torch.inference_mode():
            queue(Tokens(one.detach().clone()), Tokens(two.clone()))
    assert all(torch.equal(before[name], part) for name, part in queue.state_dict().items())


def test_an_update_after_use_does_not_change_what_was_found():
    queue, one, two = filled()
    matches = queue(Tokens(one), Tokens(two))
    found = matches.gather(queue.rows().expand(4, -1, -1))
    before = found.clone(), *(part.clone() for part in matches)
    queue.update(Tokens(torch.randn(6, 3, 4)), Tokens(torch.randn(6, 3, 4)))
    assert all(torch.equal(a, b) for a, b in zip((found, *matches), before, strict=True))


def test_state_goes_on_from_a_checkpoint():
    g = torch.Generator().manual_seed(1)
    batches = [torch.randn(4, 3, 4, generator=g) for _ in range(4)]
    one = CrossImageQueue(6, **SETTINGS)
    for batch in batches[:2]:
        one.update(Tokens(batch), Tokens(batch))
    two = CrossImageQueue(6, **SETTINGS)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    queues = [one, two, copy.deepcopy(one), pickle.loads(pickle.dumps(one))]
    for batch in batches[2:]:
        for queue in queues:
            queue.update(Tokens(batch), Tokens(batch))
    for queue in queues[1:]:
        for name, part in one.state_dict().items():
            assert torch.equal(queue.state_dict()[name], part)
    assert set(one.state_dict()) == {
        "features", "valid", "image_id", "position", "count", "skipped"
    }  # fmt: skip


def test_half_leaves_the_state_in_float32():
    queue, one, two = filled()
    before = queue.features.clone()
    queue.half().to(torch.bfloat16)
    assert queue.features.dtype == torch.float32
    assert torch.equal(queue.features, before)
    assert queue.valid.dtype == torch.bool
    half = queue(Tokens(one.half()), Tokens(two.half()))
    wide = queue(Tokens(one.half().float()), Tokens(two.half().float()))
    assert all(torch.equal(a, b) for a, b in zip(half, wide, strict=True))
    assert half.cost.dtype == torch.float32
    assert queue.double().features.dtype == torch.float64
    assert queue(Tokens(one), Tokens(two)).cost.dtype == torch.float64


def test_no_gradient_and_inputs_are_left_alone():
    queue, one, two = filled()
    before = one.clone(), two.clone()
    matches = queue(Tokens(one.requires_grad_()), Tokens(two.requires_grad_()))
    assert not matches.weight.requires_grad
    assert not matches.cost.requires_grad
    queue.update(Tokens(one), Tokens(two))
    assert not queue.features.requires_grad
    assert torch.equal(one.detach(), before[0])
    assert torch.equal(two.detach(), before[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = queue(Tokens(one), Tokens(two))
    assert torch.equal(cast.cost, queue(Tokens(one), Tokens(two)).cost)
    with torch.inference_mode():
        frozen = Tokens(before[0].clone()), Tokens(before[1].clone())
    queue.update(*frozen)
    assert torch.equal(queue(*frozen).teacher_index, queue(Tokens(one), Tokens(two)).teacher_index)


def test_blocks_of_rows_find_the_same():
    g = torch.Generator().manual_seed(0)
    queue = CrossImageQueue(400, num_objects=10, feature_dim=8, cycle=None)
    rows = torch.randn(400, 10, 8, generator=g)
    rows[350] = rows[20]  # equal rows, in another block: the lowest is taken
    queue.update(Tokens(rows), Tokens(rows))
    x = torch.randn(30, 10, 8, generator=g)
    x[0] = rows[20]
    assert block_length((2 * 300 + 24) * 4, x.device) < 4000
    found = queue(Tokens(x), Tokens(x))
    unit = torch.nn.functional.normalize
    scores = unit(x, dim=-1).double() @ unit(queue.rows(), dim=-1).double().T
    reached = scores.gather(2, found.teacher_index)[..., 0]
    torch.testing.assert_close(reached, scores.amax(-1), rtol=0, atol=1e-6)
    assert torch.equal(found.teacher_index[0, :, 0], torch.arange(200, 210))


@pytest.mark.parametrize("b", [0, 1, 2])
def test_empty_and_single_batches(b):
    queue, _, _ = filled()
    tokens = Tokens(torch.ones(b, 3, 4))
    matches = queue(tokens, tokens)
    assert matches.teacher_index.shape == (b, 3, 1)
    assert matches.cost.shape == (b, 3)
    before = int(queue.count)
    queue.update(tokens, tokens)
    assert int(queue.count) == before + b


def test_runs_where_no_value_can_be_read():
    # fake tensors have shapes only: whatever asks for a value, as a host sync does, raises
    with FakeTensorMode():
        queue = CrossImageQueue(5, **SETTINGS)
        tokens, ids = Tokens(torch.zeros(2, 3, 4)), torch.zeros(2, dtype=torch.int64)
        with pytest.raises(DataDependentOutputException):
            float(tokens.features.sum())
        queue.update(tokens, tokens, image_id=ids)
        matches = queue(tokens, tokens, image_id=ids)
    assert matches.weight.shape == (2, 3, 1)


def test_compiles():
    torch._dynamo.reset()
    plain, queue = CrossImageQueue(5, **SETTINGS), CrossImageQueue(5, **SETTINGS)
    matched = CompileCounterWithBackend("inductor")
    updated = CompileCounterWithBackend("inductor")
    forward = torch.compile(queue, fullgraph=True, backend=matched)
    update = torch.compile(queue.update, fullgraph=True, backend=updated)
    for _ in range(10):
        one = torch.randn(2, 3, 4)
        tokens = Tokens(one), Tokens(one + 0.3 * torch.randn(2, 3, 4))
        found, wanted = forward(*tokens), plain(*tokens)
        assert torch.equal(found.matched, wanted.matched)
        assert torch.equal(found.teacher_index[found.matched], wanted.teacher_index[found.matched])
        torch.testing.assert_close(found.cost, wanted.cost)
        update(*tokens)
        plain.update(*tokens)
    assert torch.equal(queue.features, plain.features)
    assert int(queue.position) == int(plain.position) == 0
    assert matched.frame_count <= 2
    assert updated.frame_count <= 2


def test_maps_over_a_new_axis():
    queue, one, two = filled(cycle="image")
    mapped = torch.vmap(lambda x, y: queue(Tokens(x[None]), Tokens(y[None])).teacher_index[0])(
        one, two
    )
    assert torch.equal(mapped, queue(Tokens(one), Tokens(two)).teacher_index)


def test_bad_input_is_refused_by_name():
    for settings, name in (
        ({"num_images": 0}, "num_images"),
        ({"num_objects": 0}, "num_objects"),
        ({"feature_dim": 0}, "feature_dim"),
        ({"cycle": "all"}, "cycle"),
    ):
        with pytest.raises(ConfigError, match=f"`{name}`"):
            CrossImageQueue(**{"num_images": 2, **SETTINGS, **settings})
    queue = CrossImageQueue(2, **SETTINGS)
    good = Tokens(torch.ones(2, 3, 4))
    with pytest.raises(ShapeError, match="axis `b`"):
        queue(good, Tokens(torch.ones(1, 3, 4)))
    with pytest.raises(ShapeError, match="axis `n`"):
        queue(good, Tokens(torch.ones(2, 4, 4)))
    with pytest.raises(ShapeError, match="feature_dim=4"):
        queue(Tokens(torch.ones(2, 3, 5)), Tokens(torch.ones(2, 3, 5)))
    with pytest.raises(ShapeError, match="`student` has no features"):
        queue(Tokens(), good)
    with pytest.raises(ConfigError, match="`view`"):
        queue(good, good, view=2)
    with pytest.raises(ShapeError, match="axis `b` is 2"):
        queue(good, good, image_id=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ShapeError, match="`image_id` must be int64"):
        queue(good, good, image_id=torch.zeros(2))
    with pytest.raises(ShapeError, match="num_objects=3"):
        queue.update(Tokens(torch.ones(2, 2, 4)), Tokens(torch.ones(2, 2, 4)))
    with pytest.raises(ShapeError, match="`valid`"):
        queue.update(good, good, valid=torch.ones(2, 4, dtype=torch.bool))
    assert int(queue.count) == 0
    assert repr(queue) == (
        "CrossImageQueue(num_images=2, num_objects=3, feature_dim=4, normalize=True, cycle='batch')"
    )


@pytest.mark.parametrize("sizes", [[3, 1], [4, 0]], ids=str)
def test_queues_of_all_processes_are_that_of_one(sizes):
    spec = importlib.util.spec_from_file_location("queue_worker", WORKER)
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    alone = CrossImageQueue(worker.IMAGES, num_objects=worker.OBJECTS, feature_dim=worker.DIM)
    for one, two, valid, ids in worker.steps(sizes):
        alone.update(Tokens(one), Tokens(two), valid=valid, image_id=ids)
    assert int(alone.skipped) > 0
    wanted = {name: part.tolist() for name, part in alone.state_dict().items()}
    for result in said_by_all(WORKER, len(sizes), sizes=sizes):
        assert result["state"] == wanted  # to the bit
        assert result["gathered"] == [[float(r)] * 2 for r, k in enumerate(sizes) for _ in range(k)]
        assert result["flags"] == [r == 1 for r, k in enumerate(sizes) for _ in range(k)]
        assert not result["requires_grad"]


def test_gathering_alone_copies_the_rows():
    rows = torch.randn(3, 2, requires_grad=True)
    gathered = all_gather_rows(rows)
    assert torch.equal(gathered, rows)
    assert not gathered.requires_grad
    assert gathered.data_ptr() != rows.data_ptr()

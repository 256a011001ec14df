"""SinkhornKnopp: the published algorithm, where that has finite numbers, and beyond."""

import copy
import functools
import importlib.util
import math
from pathlib import Path

import pytest
import torch
from helpers.processes import said_by_all
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from local_distill import Centering, ConfigError, GlobalDistillationLoss, ShapeError
from local_distill.kernels import byte_budget
from local_distill.targets import SinkhornKnopp
from local_distill.testing import targets_test
from local_distill.testing.oracles import sinkhorn_knopp_probs

WORKER = Path(__file__).with_name("sinkhorn_worker.py")

test_kit = targets_test(SinkhornKnopp, max_examples=12)
test_kit_of_one_iteration = targets_test(lambda c: SinkhornKnopp(c, 1), max_examples=4)


def published(rows, temp, iterations):
    """The papers' algorithm as it stands, without logarithms, in plain loops: [row][prototype]."""
    n, c = len(rows), len(rows[0])
    q = [[math.exp(rows[i][k] / temp) for i in range(n)] for k in range(c)]
    whole = sum(map(sum, q))
    q = [[value / whole for value in line] for line in q]
    for _ in range(iterations):
        for k in range(c):
            total = sum(q[k])
            q[k] = [value / total / c for value in q[k]]
        for i in range(n):
            total = sum(q[k][i] for k in range(c))
            for k in range(c):
                q[k][i] = q[k][i] / total / n
    return [[q[k][i] * n for k in range(c)] for i in range(n)]


def probs_of(targets, logits, temp, valid=None):
    return [each.probs() for each in targets(logits, teacher_temp=temp, valid=valid)]


def rows_of(views):
    return torch.cat([view.reshape(-1, view.shape[-1]) for view in views])


@st.composite
def batches(draw, max_c=7):
    """Views of different numbers of tokens, of normal logits with a tilt, in float64."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    b, c = draw(st.integers(1, 3)), draw(st.integers(1, max_c))
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    local, scale = draw(st.booleans()), draw(st.sampled_from([0.1, 1.0, 2.0]))
    tilt = torch.linspace(-1, 1, c, dtype=torch.float64)
    return [
        scale * (torch.randn((b, n, c) if local else (b, c), generator=g).double() + tilt)
        for n in sizes
    ]


@given(batches(), st.integers(1, 5), st.sampled_from([0.04, 0.1, 1.0]))
def test_is_the_published_algorithm_over_all_views_together(logits, iterations, temp):
    found = rows_of(probs_of(SinkhornKnopp(logits[0].shape[-1], iterations), logits, temp))
    wanted = torch.tensor(
        published(rows_of(logits).tolist(), temp, iterations), dtype=torch.float64
    )
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


# Of DINOv2's `sinkhorn_knopp_teacher` (dino_clstoken_loss.py, 3 iterations) in float64 at a teacher
# temperature of 0.3, on the logits of the test below.
DINOV2 = [
    [5.508732750521e-01, 4.040201178338e-01, 4.510660711405e-02],
    [1.067592267698e-01, 6.286931243639e-05, 8.931779039178e-01],
    [2.815993998809e-01, 6.514053637058e-01, 6.699523641335e-02],
    [2.716188068367e-01, 5.984976835077e-05, 7.283213433949e-01],
]


def test_gives_dinov2s_numbers():
    logits = torch.arange(1, 13, dtype=torch.float64).sin().reshape(4, 3)
    logits = logits * torch.tensor([1.0, 2.0, 0.5]) + torch.tensor([1.0, 0.0, 0.0])
    for views in ([logits], [logits[:3], logits[3:]]):
        found = rows_of(probs_of(SinkhornKnopp(3), views, 0.3))
        wide = torch.tensor(DINOV2, dtype=torch.float64)
        torch.testing.assert_close(found, wide, rtol=1e-10, atol=0)


@given(batches(), st.data())
def test_is_the_shipped_oracle_with_rows_left_out(logits, data):
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    valid = [torch.rand(view.shape[:-1], generator=g) > 0.4 for view in logits]
    valid[-1] = data.draw(st.sampled_from([valid[-1], None]))
    dirty = [view.clone() for view in logits]
    dirty[0].view(-1)[data.draw(st.integers(0, dirty[0].numel() - 1))] = data.draw(
        st.sampled_from([torch.nan, torch.inf, -torch.inf, 0.5])
    )
    found = probs_of(SinkhornKnopp(logits[0].shape[-1]), dirty, 0.1, valid)
    wanted = sinkhorn_knopp_probs(dirty, 0.1, valid=valid)
    for one, two in zip(found, wanted, strict=True):
        two = torch.tensor(two, dtype=torch.float64).reshape(one.shape)
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12, equal_nan=True)


@given(batches())
def test_many_iterations_share_the_rows_evenly(logits):
    c = logits[0].shape[-1]
    rows = rows_of(probs_of(SinkhornKnopp(c, 150), logits, 2.0))
    torch.testing.assert_close(rows.sum(-1), torch.ones(len(rows)).double())
    shares = torch.full((c,), len(rows) / c, dtype=torch.float64)
    torch.testing.assert_close(rows.sum(0), shares, rtol=1e-3, atol=0)


def test_beats_the_softmax_where_all_want_one_prototype():
    logits = [torch.randn(32, 4) + torch.tensor([8.0, 0, 0, 0])]
    plain = (logits[0] / 0.1).softmax(-1).argmax(-1)
    found = probs_of(SinkhornKnopp(4), logits, 0.1)[0].argmax(-1)
    assert plain.unique().tolist() == [0]
    assert found.unique().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0, 6e4])
def test_large_logits_at_a_low_temperature(dtype, scale):
    g = torch.Generator().manual_seed(1)
    logits = [(torch.rand(3, n, 6, generator=g) * 2 - 1) * scale for n in (4, 2)]
    logits = [view.clamp(-scale, scale).to(dtype) for view in logits]
    targets = SinkhornKnopp(6)(logits, teacher_temp=0.04)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert targets[0].offset.dtype == wide
    assert targets[0].offset.isfinite().all()
    wanted = sinkhorn_knopp_probs(logits, 0.04)
    # of the largest score, which is what a number of that dtype can say of it
    error = max(1e-5 if wide == torch.float32 else 1e-12, torch.finfo(wide).eps * 4)
    for view, target in enumerate(targets):
        probs = target.probs()
        assert probs.dtype == wide
        assert probs.isfinite().all()
        truth = torch.tensor(wanted[view], dtype=torch.float64).reshape(probs.shape)
        if scale <= 10:
            torch.testing.assert_close(probs.double(), truth, rtol=0, atol=error * scale / 0.04)
        else:  # whoever is first by more than the rounding is first
            sure = truth.amax(-1) > 0.999
            assert torch.equal(probs.argmax(-1)[sure], truth.argmax(-1)[sure])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e37, 1e38])
def test_a_bad_row_leaves_the_others_alone(bad):
    logits = [torch.randn(2, 3, 4), torch.randn(2, 5, 4)]
    targets = SinkhornKnopp(4)
    dirty = [logits[0].clone(), logits[1]]
    dirty[0][1, 2, 3] = bad
    without = [torch.ones(2, 3, dtype=torch.bool), None]
    without[0][1, 2] = False
    found = targets(dirty, teacher_temp=0.04)
    wanted = targets(logits, teacher_temp=0.04, valid=without)
    assert torch.equal(found[0].offset, wanted[0].offset)
    assert found[0].offset.isfinite().all()
    assert torch.equal(found[1].probs(), wanted[1].probs())


@pytest.mark.parametrize("shape", [(0, 4), (0, 3, 4), (2, 0, 4), (2, 3, 4)])
def test_without_rows_that_count_it_is_a_softmax(shape):
    logits = torch.randn(shape)
    none = torch.zeros(shape[:-1], dtype=torch.bool)
    for valid in ([none], None):
        if valid is None and logits.numel():
            continue
        target = SinkhornKnopp(4)([logits], teacher_temp=0.1, valid=valid)[0]
        assert target.offset.tolist() == [0.0] * 4
        assert torch.equal(target.probs(), (logits / 0.1).softmax(-1))
    assert SinkhornKnopp(4)([], teacher_temp=0.1) == []


def test_a_prototype_that_nobody_wants_keeps_a_finite_factor():
    logits = torch.zeros(4, 3)
    logits[:, 2] = -6e4  # exp of it is 0 in any dtype
    target = SinkhornKnopp(3)([logits], teacher_temp=0.04)[0]
    assert target.offset.isfinite().all()
    torch.testing.assert_close(target.probs(), torch.full((4, 3), 1 / 3), rtol=0.2, atol=0)


def test_blocks_of_rows_are_no_other_rows():
    g = torch.Generator().manual_seed(4)
    logits = [torch.randn(3, 700, 128, generator=g), torch.randn(3, 90, 128, generator=g).half()]
    assert logits[0].numel() * 16 > byte_budget(logits[0].device)  # several blocks
    valid = [torch.rand(view.shape[:-1], generator=g) > 0.5 for view in logits]
    found = SinkhornKnopp(128)(logits, teacher_temp=0.07, valid=valid)[0].offset
    kept = [view[keep].double() for view, keep in zip(logits, valid, strict=True)]
    scores = torch.cat(kept) / 0.07
    offset = -scores.logsumexp(0)
    for _ in range(2):
        offset = offset - (scores + offset).log_softmax(-1).logsumexp(0)
    torch.testing.assert_close(
        found.double(), offset, rtol=0, atol=1e-5 * float(scores.abs().max())
    )


class Allocations(TorchDispatchMode):
    """The most bytes that one operation's result took."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        owned = {part.untyped_storage().data_ptr() for part in args if torch.is_tensor(part)}
        if torch.is_tensor(result) and result.untyped_storage().data_ptr() not in owned:
            self.most = max(self.most, result.untyped_storage().nbytes())
        return result


def test_makes_no_table_of_the_logits_size():
    logits = [torch.randn(2, 4000, 256).half() for _ in range(2)]
    with Allocations() as seen:
        SinkhornKnopp(256)(logits, teacher_temp=0.1)
    assert 0 < seen.most <= byte_budget(logits[0].device) // 2
    assert logits[0].numel() * 4 > byte_budget(logits[0].device)


def test_trains_through_the_loss_and_is_without_state():
    targets = SinkhornKnopp(5)
    loss = GlobalDistillationLoss(targets)
    student = [torch.randn(4, 5, requires_grad=True) for _ in range(2)]
    teacher = [torch.randn(4, 5, requires_grad=True) for _ in range(2)]
    value = loss(student, teacher, teacher_temp=0.1)
    value.backward()
    assert student[0].grad.abs().sum() > 0
    assert teacher[0].grad is None
    assert targets.state_dict() == {}
    assert list(targets.buffers()) == []
    wanted = probs_of(targets, teacher, 0.1)
    by_hand = -sum(
        (wanted[q] * (student[v] / 0.1).log_softmax(-1)).sum(-1).mean() for v, q in ((0, 1), (1, 0))
    )
    torch.testing.assert_close(value, by_hand / 2)


def test_runs_where_no_value_can_be_read():
    # fake tensors have shapes only: whatever asks for a value, as a host sync does, raises
    with FakeTensorMode():
        logits, valid = [torch.zeros(2, 3, 4)], [torch.ones(2, 3, dtype=torch.bool)]
        target = SinkhornKnopp(4)(logits, teacher_temp=0.1, valid=valid)[0]
    assert target.offset.shape == (4,)


def test_goes_where_centering_goes():
    for targets in (SinkhornKnopp(3), Centering(3)):
        other = copy.deepcopy(targets)
        logits = [torch.randn(2, 4, 3)]
        with targets.accumulate(), targets.accumulate(False):
            targets.update(logits, [torch.ones(2, 4, dtype=torch.bool)])
        assert other(logits, teacher_temp=0.1)[0].logits.shape == (2, 4, 3)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_to_one_graph(backend):
    torch.compiler.reset()
    targets = SinkhornKnopp(6)
    compiled = torch.compile(
        lambda logits, valid: [t.probs() for t in targets(logits, teacher_temp=0.1, valid=valid)],
        fullgraph=True,
        backend=backend,
    )
    for bad in (0.0, torch.nan):
        logits = [torch.randn(2, 5, 6), torch.randn(2, 3, 6)]
        logits[0][0, 0] += bad
        valid = [None, torch.rand(2, 3) > 0.3]
        for one, two in zip(
            compiled(logits, valid), probs_of(targets, logits, 0.1, valid), strict=True
        ):
            torch.testing.assert_close(one, two, equal_nan=True)


def test_bad_settings_and_shapes_are_refused():
    with pytest.raises(ConfigError, match="num_prototypes"):
        SinkhornKnopp(0)
    for iterations in (0, 2.5, True):
        with pytest.raises(ConfigError, match="iterations"):
            SinkhornKnopp(3, iterations)
    targets = SinkhornKnopp(3, 2)
    assert repr(targets) == "SinkhornKnopp(num_prototypes=3, iterations=2)"
    good = torch.randn(2, 3)
    for call in (functools.partial(targets, teacher_temp=0.1), targets.update):
        with pytest.raises(ShapeError, match="must be a list"):
            call(good)
        with pytest.raises(ShapeError, match=r"axis `c` is 4 in `teacher_logits\[1\]`"):
            call([good, torch.randn(2, 4)])
        with pytest.raises(ShapeError, match="`valid` has 2 views"):
            call([good], valid=[None, None])
        with pytest.raises(ShapeError, match=r"`valid\[0\]` must have shape \(2,\)"):
            call([good], valid=[torch.ones(1, dtype=torch.bool)])
        with pytest.raises(ShapeError, match=r"`valid\[0\]` must be bool, got torch.float32"):
            call([good], valid=[torch.ones(2)])
    with pytest.raises(ConfigError, match="teacher_temp"):
        targets([good], teacher_temp=0.0)


def run_processes(cases):
    """What every rank says of every case."""
    ranks = len(cases[0][0])
    said = said_by_all(WORKER, ranks, ranks=ranks, cases=cases)
    return list(zip(*said, strict=True))


CASES = [([0, 0, 0], 1), ([0, 8, 0], 1), ([5, 1, 2], 1e3), ([3, 3, 2], 1)]


def test_processes_share_one_offset():
    spec = importlib.util.spec_from_file_location("sinkhorn_worker", WORKER)
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    for (sizes, scale), results in zip(CASES, run_processes(CASES), strict=True):
        logits, valid = worker.batch(sum(sizes), scale)
        whole = worker.share_of(logits, valid, sizes, range(len(sizes)))
        for rank, result in enumerate(results):
            assert result["together"] == results[0]["together"]  # to the bit
            assert result["together"] == pytest.approx(whole, rel=1e-10, abs=1e-10)
            alone = worker.share_of(logits, valid, sizes, [rank])
            assert result["alone"] == [alone, alone]
            if min(sizes) > 0:
                assert alone != pytest.approx(whole, rel=1e-3)
    pair = worker.share_of(logits, valid, sizes, [0, 1])
    assert results[0]["pair"] == results[1]["pair"] == pytest.approx(pair, rel=1e-10)

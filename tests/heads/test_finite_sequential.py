import copy
import math

import pytest
import torch
from torch import nn

from local_distill import EmaTeacher, ProjectionHead
from local_distill._finite_sequential import FiniteSequential
from local_distill.layer_heads import LayerHeads
from local_distill.losses.pixel_propagation import PixelPropagation


def layers():
    return [
        nn.Linear(3, 4),
        nn.BatchNorm1d(4),
        nn.ReLU(inplace=True),
        nn.Linear(4, 2),
        nn.BatchNorm1d(2, affine=False),
    ]


def pair():
    """The guarded layers, and the same ones in a plain row."""
    guarded = FiniteSequential(*layers())
    return guarded, nn.Sequential(*copy.deepcopy(list(guarded)))


def same_state(guarded, plain):
    state = guarded.state_dict()
    state.pop("skipped")
    assert state.keys() == plain.state_dict().keys()
    for name, value in plain.state_dict().items():
        assert torch.equal(state[name], value), name


def spoilt(rows, value=math.nan):
    rows = rows.clone()
    rows[1, 0] = value
    return rows


def test_finite_batches_are_as_in_nn_sequential():
    guarded, plain = pair()
    # two passes before the backward pass, as two views have them
    one, two = torch.randn(6, 3), torch.randn(5, 3)
    ours = guarded(one).sum() + guarded(two).pow(2).sum()
    theirs = plain(one).sum() + plain(two).pow(2).sum()
    assert torch.equal(ours, theirs)
    ours.backward()
    theirs.backward()
    for ours, theirs in zip(guarded.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    same_state(guarded, plain)
    assert int(guarded[1].num_batches_tracked) == 2
    assert torch.equal(guarded.eval()(one), plain.eval()(one))
    assert int(guarded.skipped) == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
def test_a_bad_batch_leaves_no_trace_but_in_the_count(value):
    guarded, plain = pair()
    for rows in (torch.randn(6, 3), torch.randn(6, 3)):
        guarded(spoilt(rows, value)).sum().backward()
        guarded(rows)
        plain(rows)
    same_state(guarded, plain)
    assert int(guarded.skipped) == 2
    assert int(guarded[1].num_batches_tracked) == 2
    with torch.no_grad():
        assert guarded(spoilt(torch.randn(6, 3))).isnan().any()  # it is not hidden
        assert guarded.eval()(torch.randn(6, 3)).isfinite().all()
        before = copy.deepcopy(guarded.state_dict())
        guarded(spoilt(torch.randn(6, 3)))
    assert all(torch.equal(part, before[name]) for name, part in guarded.state_dict().items())


def test_all_norms_of_a_pass_or_none():
    guarded, _ = pair()
    with torch.no_grad():
        guarded[3].weight.fill_(math.inf)  # the first BatchNorm's batch is finite
    guarded(torch.randn(6, 3))
    assert guarded[1].running_mean.eq(0).all()
    assert guarded[4].running_var.eq(1).all()
    assert int(guarded.skipped) == 1
    guarded[4].eval().running_mean.fill_(math.nan)  # frozen: it is not asked
    guarded(torch.randn(6, 3))
    assert guarded[1].running_mean.ne(0).any()
    assert int(guarded.skipped) == 1


def test_synchronized_norms_are_guarded_too():
    guarded, plain = pair()
    guarded = nn.SyncBatchNorm.convert_sync_batchnorm(guarded)
    assert [type(layer).__name__ for layer in guarded].count("SyncBatchNorm") == 2
    rows = torch.randn(6, 3)
    guarded(spoilt(rows))
    guarded(rows)
    plain(rows)
    same_state(guarded, plain)
    assert int(guarded.skipped) == 1


def test_compiled():
    guarded, plain = pair()
    compiled = torch.compile(guarded, fullgraph=True, backend="aot_eager")
    rows = torch.randn(6, 3)
    compiled(spoilt(rows))
    compiled(rows).sum().backward()
    plain(rows)
    same_state(guarded, plain)
    assert int(guarded.skipped) == 1


def test_state_of_plain_layers_loads_and_copies_are_their_own():
    guarded, plain = pair()
    guarded(spoilt(torch.randn(6, 3)))
    copied = copy.deepcopy(guarded)
    other = FiniteSequential(*layers())
    other.load_state_dict(guarded.state_dict())
    guarded(spoilt(torch.randn(6, 3)))
    assert int(copied.skipped) == int(other.skipped) == 1
    plain(torch.randn(6, 3))
    guarded.load_state_dict(plain.state_dict())
    same_state(guarded, plain)
    assert int(guarded.skipped) == 0


@pytest.mark.parametrize("method", ["moco", "byol", "simclr"])
def test_a_teacher_of_layer_heads_goes_on_after_a_bad_batch(method):
    student = LayerHeads(3, 2, method=method, hidden_dim=4, last_hidden_dim=5, out_dim=2)
    teacher = EmaTeacher(student)
    good = torch.randn(2, 6, 3)
    student(torch.stack([spoilt(part) for part in good]))
    # every projector once, every predictor twice: its detached pass
    assert int(student.skipped) == (2 if method == "simclr" else 6)
    student(good)
    with torch.no_grad():
        for part in student.parameters():
            part.add_(1)
    before = copy.deepcopy(teacher.module.state_dict())
    teacher.update(student, momentum=0.5)
    assert int(teacher.skipped) == 0
    for name, part in teacher.module.named_parameters():
        torch.testing.assert_close(part, before[name] + 0.5)
    for name, part in teacher.module.named_buffers():
        assert torch.equal(part, student.get_buffer(name))
    assert teacher.module.project_last(good[-1]).isfinite().all()
    with torch.no_grad():
        assert student.eval()(good).predictions.isfinite().all()


def test_a_teacher_of_a_projection_head_goes_on_after_a_bad_batch():
    student = ProjectionHead(3, 4, hidden_dim=5, bottleneck_dim=2, batch_norm=True)
    teacher = EmaTeacher(student)
    teacher(spoilt(torch.randn(6, 3)))  # in training the teacher has statistics as well
    student(spoilt(torch.randn(6, 3)))
    assert int(student.mlp.skipped) == int(teacher.module.mlp.skipped) == 1
    student(torch.randn(2, 3, 3))
    teacher.update(student, momentum=0.9)
    assert int(teacher.skipped) == 0
    assert torch.equal(teacher.module.mlp[1].running_mean, student.mlp[1].running_mean)
    assert teacher.eval()(torch.randn(6, 3)).isfinite().all()
    assert "mlp.skipped" not in ProjectionHead(3, 4).state_dict()
    old = student.state_dict()
    del old["mlp.skipped"]
    student.load_state_dict(old)
    assert int(student.mlp.skipped) == 0
    assert "mlp.skipped" not in old


def test_pixel_propagation_goes_on_after_a_bad_batch():
    propagate = PixelPropagation(dim=3, num_layers=2)
    propagate(spoilt(torch.randn(2, 4, 3)))
    assert int(propagate.transform.skipped) == 1
    assert propagate.eval()(torch.randn(2, 4, 3)).isfinite().all()
    assert not PixelPropagation(dim=3, num_layers=1).state_dict().keys() & {"transform.skipped"}

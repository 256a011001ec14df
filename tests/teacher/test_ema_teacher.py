import copy
import math

import pytest
import torch
from torch import nn

from local_distill import ConfigError, EmaTeacher, ShapeError


def network():
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))


def test_weights_follow_and_buffers_are_copied():
    student = network()
    teacher = EmaTeacher(student)
    start = copy.deepcopy(teacher.module.state_dict())
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter))
    student(torch.randn(4, 3))
    teacher.update(student, momentum=0.9)
    for name, value in teacher.module.named_parameters():
        wanted = 0.9 * start[name] + 0.1 * dict(student.named_parameters())[name]
        torch.testing.assert_close(value, wanted)
        assert not value.requires_grad
    for name, value in teacher.module.named_buffers():
        assert torch.equal(value, dict(student.named_buffers())[name])


def test_the_ends_of_the_momentum():
    student = network()
    teacher = EmaTeacher(student)
    with torch.no_grad():
        student[0].weight.add_(1.0)
    before = teacher.module[0].weight.clone()
    teacher.update(student, momentum=1.0)
    assert torch.equal(teacher.module[0].weight, before)
    teacher.update(student, momentum=0.0)
    assert torch.equal(teacher.module[0].weight, student[0].weight)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["parameter", "buffer"])
def test_nothing_moves_where_anything_is_not_finite(bad, where):
    student = network()
    teacher = EmaTeacher(student)
    before = copy.deepcopy(teacher.module.state_dict())
    with torch.no_grad():
        student[0].weight.add_(1.0)
        (student[2].weight if where == "parameter" else student[1].running_mean).view(-1)[0] = bad
    teacher.update(student, momentum=0.5)
    assert all(torch.equal(before[k], v) for k, v in teacher.module.state_dict().items())
    assert int(teacher.skipped) == 1


def test_calling_it_makes_no_graph_and_it_shares_no_memory():
    student = network().eval()
    teacher = EmaTeacher(student)
    x = torch.randn(4, 3, requires_grad=True)
    assert not teacher(x).requires_grad
    torch.testing.assert_close(teacher(x), student(x).detach())
    pointers = {p.data_ptr() for p in student.parameters()}
    assert pointers.isdisjoint(p.data_ptr() for p in teacher.parameters())


def test_state_dict_goes_on():
    student = network()
    one, two = EmaTeacher(student), EmaTeacher(network())
    two.load_state_dict(one.state_dict())
    with torch.no_grad():
        student[0].weight.add_(1.0)
    for teacher in (one, two, copy.deepcopy(one)):
        teacher.update(student, momentum=0.5)
    assert torch.equal(one.module[0].weight, two.module[0].weight)


def test_it_copies_weight_normed_heads():
    from local_distill import ProjectionHead

    head = ProjectionHead(4, 6, hidden_dim=5, bottleneck_dim=3)
    teacher = EmaTeacher(head)
    x = torch.randn(2, 4)
    torch.testing.assert_close(teacher(x), head(x).detach())
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.requires_grad)
    teacher.update(head, momentum=0.0)
    torch.testing.assert_close(teacher(x), head(x).detach())


def test_other_networks_and_momenta_are_refused():
    teacher = EmaTeacher(network())
    with pytest.raises(ShapeError, match=r"`0\.bias`"):
        teacher.update(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), 0.9)
    with pytest.raises(ShapeError, match="wrappers"):
        teacher.update(nn.Sequential(network()), 0.9)
    for momentum in (-0.1, 1.1, math.nan):
        with pytest.raises(ConfigError, match="momentum"):
            teacher.update(network(), momentum)

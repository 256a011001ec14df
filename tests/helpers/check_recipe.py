"""What is asked of every recipe that takes views of student and teacher."""

import copy

import pytest
import torch

from helpers.recipe_views import gradient_numbers, leaves

# How many views student and teacher see; the teacher's are the first of the student's.
VIEW_COUNTS = [(2, 2), (4, 2), (1, 2), (2, 3), (4, 1)]


def check_golden(golden, step, phases=(0.0, 0.7)):
    """Steps give the published loss and gradient; ``step(phase)``: terms, and what has a gradient.

    One step after the other, so that the state that a step leaves is looked at by the next.
    """
    for phase, (value, gradient) in zip(phases, golden, strict=True):
        terms, live = step(phase)
        terms.loss.backward()
        assert float(terms.loss.detach()) == pytest.approx(value, rel=1e-6)
        assert gradient_numbers(live) == pytest.approx(gradient, rel=1e-6)


def check_teacher_is_still(loss, student, teacher, **more):
    """Nothing flows to the teacher, something to all of the student and to the recipe's own."""
    loss(student, teacher, **more).loss.backward()
    assert all(x.grad is None for x in leaves(teacher))
    assert all(x.grad.abs().sum() > 0 for x in [*leaves(student), *loss.parameters()])


def check_all_pairs(terms, students, teachers, global_weight, local_weight):
    """Every student view meets every other teacher view, and the terms sum up."""
    assert terms.loss.isfinite()
    assert len(terms.matches) == students * teachers - min(students, teachers)
    weighted = global_weight * terms.global_loss + local_weight * terms.local_loss
    torch.testing.assert_close(terms.loss, weighted)


def check_checkpoint(make, step, **more):
    """A step's state, loaded or copied, goes on alike; and it matters. Returns the recipe."""
    loss, later = make(), make()
    loss(*step, **more)
    later.load_state_dict(loss.state_dict())
    value = loss.eval()(*step, **more).loss
    for other in (later, copy.deepcopy(loss)):
        assert torch.equal(value, other.eval()(*step, **more).loss)
    assert value != make().eval()(*step, **more).loss
    return loss


def check_two_centers(*parts):
    """Both have learnt, and not from each other's logits."""
    centers = [part.targets.center for part in parts]
    assert not torch.equal(*centers)
    assert all(center.abs().sum() > 0 for center in centers)


def check_compiles(loss, step, times=2, **more):
    """One graph, whose values are those without it while the state moves on."""
    compiled = torch.compile(copy.deepcopy(loss), fullgraph=True, backend="eager")
    for _ in range(times):
        expected = loss(*step, **more).loss
        torch.testing.assert_close(compiled(*step, **more).loss, expected)

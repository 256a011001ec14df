"""Every property of losses has a wrong loss that it sees, and that no other property sees."""

import copy
import functools

import pytest
import torch
from helpers.drawn import drawn, slow_for
from helpers.wrong_losses import WRONG, AllPairs, Right

from local_distill.testing.check_loss import check_loss, loss_properties
from local_distill.testing.loss_properties import loss_examples
from local_distill.testing.properties import PropertyFailed

KINDS = ("local", "global")


@functools.cache
def some_examples(kind):
    return drawn(loss_examples(kind), 3)


@pytest.fixture(autouse=True)
def traced_only(monkeypatch):
    """Graphs are captured as ever, and then run as they are: half the time of this file."""
    compile_ = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda *args, **settings: compile_(*args, **settings | {"backend": "eager"}),
    )


def failing(loss, kind, leave_out=()):
    """The names of the properties that a loss does not keep, by the same few examples each."""
    found = set()
    for one in loss_properties(kind):
        if one.name in leave_out:
            continue
        examples = some_examples(kind)
        if one.max_examples == 1:  # compiling: the example of the smallest graph
            examples = sorted(examples, key=lambda example: len(example.matches or ()))[:1]
        # copies, as wrong losses write into their inputs
        examples = copy.deepcopy(examples)
        try:
            check_loss(loss, kind=kind, properties=[one.name], examples=examples)
        except PropertyFailed:
            found.add(one.name)
    return found


def test_every_property_has_a_wrong_loss():
    assert set(WRONG) == {one.name for kind in KINDS for one in loss_properties(kind)}


def test_what_the_wrong_losses_are_made_of_is_right():
    assert failing(Right, "local") == set()


@pytest.mark.parametrize("name", WRONG)
def test_exactly_this_property_sees_it(name):
    kind = "global" if WRONG[name] is AllPairs else "local"
    assert failing(WRONG[name], kind, slow_for(name)) == {name}

"""`check_loss`: right losses pass, and what it says of wrong ones can be run again."""

import re

import pytest
import torch
from helpers.wrong_losses import MasksTooLate, PairsAreSummed, Right

from local_distill import (
    Centering,
    ConfigError,
    GlobalDistillationLoss,
    LocalDistillationLoss,
)
from local_distill.testing import LossExample, PropertyFailed, check_loss
from local_distill.testing.check_loss import loss_kind, loss_properties, loss_test

test_local_matched = loss_test(lambda c: LocalDistillationLoss(Centering(c)), max_examples=15)
test_local_all = loss_test(
    lambda c: LocalDistillationLoss(Centering(c), normalize="all", student_temp=0.2),
    max_examples=8,
)
test_local_image = loss_test(
    lambda c: LocalDistillationLoss(Centering(c, momentum=0.5), normalize="image"), max_examples=8
)
test_global = loss_test(lambda c: GlobalDistillationLoss(Centering(c)), max_examples=15)
test_strict_xfail = loss_test(
    MasksTooLate,
    kind="local",
    xfail={"unmatched_student_tokens_may_be_nan": "the mask comes after the product"},
    max_examples=2,
)


def summed(c):
    class Summed(GlobalDistillationLoss):
        def forward(self, student_logits, teacher_logits, *, teacher_temp, pairs=None):
            value = super().forward(
                student_logits, teacher_logits, teacher_temp=teacher_temp, pairs=pairs
            )
            return value * (len(student_logits) if pairs is None else len(list(pairs)))

    return Summed(Centering(c))


def test_global_losses_are_searched_too():
    with pytest.raises(PropertyFailed, match="pairs_are_averaged"):
        check_loss(summed, properties=["pairs_are_averaged"], max_examples=5)


def test_a_loss_without_temperature_is_asked_for_the_direction_alone():
    class Nameless(Right):
        def __init__(self, c):
            super().__init__(c)
            self.own_temp = self.student_temp
            del self.student_temp

        def forward(self, *views, **settings):
            self.student_temp = self.own_temp
            try:
                return super().forward(*views, **settings)
            finally:
                del self.student_temp

    class Turned(Nameless):
        def before(self, step):
            return step._replace(temp=step.temp * 2)

    name = "the_target_is_the_minimum"
    assert check_loss(Nameless, properties=[name], max_examples=5) == [name]
    with pytest.raises(PropertyFailed, match="direction of the gradient"):
        check_loss(Turned, properties=[name], max_examples=5)


def test_a_failure_is_small_and_its_snippet_repeats_it():
    name = "pairs_are_averaged"
    with pytest.raises(PropertyFailed) as caught:
        check_loss(PairsAreSummed, properties=[name], max_examples=5)
    message = str(caught.value)
    assert "2 pairs of views" in message
    snippet = message.split("to repeat:\n\n")[1]
    code = "\n".join(line.removeprefix("    ") for line in snippet.splitlines())
    code = re.sub(r"subject = \.\.\..*", "", code)
    with pytest.raises(PropertyFailed, match=name):
        exec(code, {"subject": PairsAreSummed})
    exec(code, {"subject": Right})


def test_given_examples_are_looked_at_instead_of_drawn_ones():
    flat = LossExample([torch.zeros(2, 3)] * 2, [torch.zeros(2, 3)] * 2)
    name = "pairs_are_averaged"
    assert check_loss(lambda c: summed(c), kind="global", properties=[], examples=[flat]) == []
    with pytest.raises(PropertyFailed):
        check_loss(summed, kind="global", properties=[name], examples=[flat])


def test_kinds_are_found_out():
    assert loss_kind(Right) == "local"
    assert loss_kind(summed) == "global"
    with pytest.raises(ConfigError, match="serves neither"):
        loss_kind(lambda c: torch.nn.Linear(c, c))
    with pytest.raises(ConfigError, match='"local" or "global"'):
        loss_properties("both")


def test_what_is_no_factory_is_refused():
    with pytest.raises(ConfigError, match=r"lambda c: MyLoss\(Centering\(c\)\)"):
        check_loss(LocalDistillationLoss(Centering(3)))
    with pytest.raises(ConfigError, match="must make a loss"):
        check_loss(None)
    with pytest.raises(ConfigError, match="did you mean pairs_are_averaged"):
        check_loss(Right, properties=["pairs_are_average"])
    with pytest.raises(PropertyFailed, match="no Module"):
        check_loss(
            lambda c: lambda *a, **k: None,
            kind="local",
            properties=["pairs_are_averaged"],
            max_examples=1,
        )


def test_there_are_enough_properties():
    local = {one.name for one in loss_properties("local")}
    whole = {one.name for one in loss_properties("global")}
    assert len(local) >= 40
    assert len(whole) >= 30
    assert len(whole - local) == 1

"""The losses' table of faults: no wrong cell, a page that is true, and rows that can fail."""

import pytest
import torch
from helpers.fault_page import GROUPS, columns_of_the_page, ensure_true_column, make_faults
from helpers.faulty_losses import LOSSES, right, subject

from local_distill.errors import ConfigError
from local_distill.testing import LossSubject, fault_table, loss_faults
from local_distill.testing.loss_faults._cases import CASES


def test_the_page_has_all_losses_and_targets():
    page = columns_of_the_page()
    assert list(page) == [*make_faults.SUBJECTS, *make_faults.TARGETS]
    assert not any("WRONG" in column.values() for column in page.values())


@pytest.mark.parametrize("name", make_faults.SUBJECTS)
def test_a_losss_column_is_true_and_nothing_in_it_is_wrong(name):
    ensure_true_column(name)


def outcome_of(loss, fault):
    """The result of one row."""
    others = {other: "" for _, other in CASES.names() if other != fault}
    return {result.fault: result for result in loss_faults(loss, not_applicable=others)}[fault]


@pytest.mark.parametrize("fault", [fault for _, fault in CASES.names()])
def test_a_planted_fault_is_seen(fault):
    # the compile rows stop at the first graph: no code is generated
    assert outcome_of(LOSSES[fault], fault).outcome == "WRONG"


def test_without_the_planted_faults_all_is_right():
    # and without an oracle
    results = loss_faults(subject(), groups=GROUPS)
    assert {result.outcome for result in results} == {"right", "refused"}


def test_a_loss_that_looks_at_the_order_of_images_needs_an_oracle():
    def first_image(loss, step):
        return right(loss, step) + step.student[0][:1].square().sum()

    result = outcome_of(subject(first_image), "float32")
    assert result.outcome == "WRONG"
    assert "order of the images" in result.detail


class Agreement(torch.nn.Module):
    def forward(self, student, teacher):
        return -(student[0] * teacher[1]).sum() - (student[1] * teacher[0]).sum()


def test_graphs_are_counted():
    def agree(loss, step):
        return loss(step.student, step.teacher)

    def agree_for_this_temperature(loss, step):
        times = len(range(int(step.temp * 50)))  # a whole number, with a graph for each
        return agree(loss, step) * times

    one = LossSubject(lambda c: Agreement(), agree)
    assert outcome_of(one, "aot_eager, ten steps").outcome == "right"
    many = outcome_of(one._replace(call=agree_for_this_temperature), "aot_eager, ten steps")
    assert many.outcome == "WRONG"
    assert "graphs over ten steps" in many.detail


def test_a_refusal_is_no_wrong_cell_and_says_what_it_is():
    result = outcome_of(make_faults.SUBJECTS["Local"], "student c = 1 against c = 16")
    assert result.outcome == "refused"
    assert "axis `c` is 1" in result.detail
    assert "| refused |" in fault_table({"Local": [result]})


def test_what_comes_out_must_be_a_scalar_on_the_students_graph():
    for call in (
        lambda loss, step: right(loss, step)[None],
        lambda loss, step: right(loss, step).detach(),
        lambda loss, step: float(right(loss, step)),
    ):
        result = outcome_of(subject(call), "float32")
        assert result.outcome == "WRONG", result


def test_a_gradient_is_held_to_the_oracle():
    spoilt = make_faults.SUBJECTS["Local"]._replace(
        call=lambda loss, step: Doubled.apply(right(loss, step))
    )
    result = outcome_of(spoilt, "float32")
    assert "the gradient of view 0" in result.detail


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, slope):
        return 2 * slope


def test_unknown_groups_and_faults_are_refused():
    with pytest.raises(ConfigError, match="compile"):
        loss_faults(subject(), groups=["compiling"])
    with pytest.raises(ConfigError, match="one view"):
        loss_faults(subject(), not_applicable={"two views": "typo"})

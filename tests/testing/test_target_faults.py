"""The targets' table of faults: no wrong cell, a page that is true, and rows that can fail."""

import pytest
from helpers import step_oracles
from helpers.fault_page import ensure_true_column, make_faults
from helpers.faulty_losses import TARGETS

from local_distill import Centering
from local_distill.errors import ConfigError
from local_distill.testing import target_faults
from local_distill.testing.target_faults import _CASES


@pytest.mark.parametrize("name", make_faults.TARGETS)
def test_a_column_is_true_and_nothing_in_it_is_wrong(name):
    ensure_true_column(name)


@pytest.mark.parametrize("fault", [fault for _, fault in _CASES.names()])
def test_a_planted_fault_is_seen(fault):
    others = {other: "" for _, other in _CASES.names() if other != fault}
    oracle = step_oracles.moving_center
    results = target_faults(TARGETS[fault], oracle=oracle, not_applicable=others)
    assert {result.fault: result.outcome for result in results}[fault] == "WRONG"


def test_centering_is_right_without_an_oracle():
    results = target_faults(Centering, groups=["numbers", "views", "layout", "state"])
    assert {result.outcome for result in results} == {"right", "refused"}


def test_centering_is_compiled_in_one_graph():
    results = target_faults(
        Centering, groups=["compile"], not_applicable={"inductor, ten steps": "takes long"}
    )
    assert [result.outcome for result in results] == ["right", "-"]


def test_unknown_groups_are_refused():
    with pytest.raises(ConfigError, match="compile"):
        target_faults(Centering, groups=["compiling"])

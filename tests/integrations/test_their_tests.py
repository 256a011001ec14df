"""Others' tests on our parts: the adapters, the counts, and the proof of every verdict."""

import importlib
import inspect
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))  # the benchmarks are outside of the package

from benchmarks.integrations.swap_plugin import SWAPS
from benchmarks.integrations.their_tests import (
    failures_table,
    name_of,
    passes_table,
    unexplained,
)
from benchmarks.integrations.their_tests_verdicts import VERDICTS, Verdict

PROOFS = {verdict.proof for verdicts in VERDICTS.values() for verdict in verdicts.values()}


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module, names in SWAPS.items() for name in names]
)
def test_an_adapter_has_no_argument_that_theirs_has_not(module, name):
    theirs = inspect.signature(getattr(importlib.import_module(module), name))
    ours = inspect.signature(SWAPS[module][name])
    assert ours.parameters
    assert list(ours.parameters) == [arg for arg in theirs.parameters if arg in ours.parameters]


@pytest.mark.parametrize("proof", sorted(PROOFS, key=lambda proof: proof.__name__))
def test_the_proof_holds(proof):
    assert proof()


def record(test, outcome, ran=1):
    return {"test": f"tests/loss/test_x.py::TestX::{test}", "outcome": outcome, "ran": ran}


def test_only_tests_in_which_ours_ran_are_counted():
    records = [record("a", "passed"), record("b", "passed", ran=0), record("c", "failed")]
    table = passes_table([*records, record("d", "skipped")])
    assert "| `tests/loss/test_x.py` | 1 | 2 | 1 |" in table
    assert "| *all* | 1 | 2 | 1 |" in table


def test_what_is_not_explained_is_told_and_so_is_what_does_not_fail():
    verdict = Verdict("theirs", "so it is", lambda: "seen")
    records = [record("a", "failed"), record("b", "passed")]
    assert name_of(records[0]["test"]) == "test_x.py::a"
    assert unexplained(records, {"test_x.py::a": verdict}) == []
    assert len(unexplained(records, {"test_x.py::b": verdict})) == 2
    assert "| `test_x.py::a` | theirs | so it is | seen |" in failures_table(
        {"test_x.py::a": verdict}
    )

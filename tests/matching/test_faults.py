"""The table of faults: no matcher has a wrong cell, and the documentation's page is true."""

import importlib.util
from pathlib import Path

import pytest
import torch

from local_distill import LocalDistillError, Matches
from local_distill.errors import ConfigError
from local_distill.testing import fault_table, matcher_faults

DOCS = Path(__file__).parents[2] / "docs" / "matching"
_spec = importlib.util.spec_from_file_location("make_faults", DOCS / "make_faults.py")
make_faults = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make_faults)

GROUPS = ["numbers", "tokens", "geometry", "views", "layout"]  # compiling has tests of its own


def columns_of_the_page():
    lines = (DOCS / "faults.md").read_text("utf-8").splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    header, *cells = rows
    faults = [row[0] for row in cells]
    return {
        name: dict(zip(faults, (row[place] for row in cells), strict=True))
        for place, name in enumerate(header)
        if place
    }


PAGE = columns_of_the_page()


def test_the_page_has_all_matchers():
    assert list(PAGE) == list(make_faults.MATCHERS)


# Clipping takes half a minute for its column; the page has it, and test_overlap.py its answers.
@pytest.mark.parametrize("name", [name for name in make_faults.MATCHERS if "clip" not in name])
def test_a_matchers_column_is_true_and_nothing_in_it_is_wrong(name):
    results = matcher_faults(
        make_faults.MATCHERS[name],
        groups=GROUPS,
        not_applicable=make_faults.NOT_APPLICABLE.get(name),
    )
    wrong = [result for result in results if result.outcome == "WRONG"]
    assert not wrong
    found = {f"{result.group}: {result.fault}": result.outcome for result in results}
    page = {fault: cell for fault, cell in PAGE[name].items() if not fault.startswith("compile")}
    assert found == page


def test_a_refusal_says_what_to_do():
    results = matcher_faults(make_faults.MATCHERS["Nearest"], groups=["geometry"])
    said = {result.fault: result.detail for result in results if result.outcome == "refused"}
    assert 'method="search"' in said["perspective"]
    assert "singular" in said["singular matrix"]


def test_a_faulty_matcher_is_told_of():
    def product(student, teacher):
        score, index = (student.features @ teacher.features.mT).max(-1)
        return Matches(index[..., None], torch.ones_like(score)[..., None], 1 - score)

    results = matcher_faults(product, groups=["numbers", "tokens"])
    wrong = {result.fault: result.detail for result in results if result.outcome == "WRONG"}
    assert {"NaN in a teacher token", "t = 0", "bfloat16 features"} <= set(wrong)
    assert "| WRONG |" in fault_table({"product": results})


def test_unknown_groups_and_faults_are_refused():
    matcher = make_faults.MATCHERS["Nearest"]
    with pytest.raises(ConfigError, match="compile"):
        matcher_faults(matcher, groups=["compiling"])
    with pytest.raises(LocalDistillError, match="perspective"):
        matcher_faults(matcher, not_applicable={"perspectives": "typo"})

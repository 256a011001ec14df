"""What the pages on other people's libraries say of their length is true."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
sys.path.insert(0, str(ROOT))  # the benchmarks are outside of the package

from benchmarks.integrations import lightly_trial, solo_trial  # noqa: E402
from benchmarks.integrations.trial import lines_of_code  # noqa: E402

_spec = importlib.util.spec_from_file_location("run_page", DOCS / "run_page.py")
run_page = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(run_page)


def our_lines(page):
    """The lines that are marked as ours, those that replace one of theirs among them."""
    blocks = run_page.code_blocks(DOCS / "integrations" / page)
    return [line for block in blocks for line in block.splitlines() if line.endswith("# +")]


@pytest.mark.parametrize("page", ["lightly.md", "lightning.md", "transformers.md"])
def test_it_takes_as_many_lines_as_the_page_says(page):
    text = (DOCS / "integrations" / page).read_text("utf-8")
    assert f"**{len(our_lines(page))} lines" in text
    assert len(our_lines(page)) <= 12


@pytest.mark.parametrize("example", lightly_trial.OURS)
def test_the_trial_puts_as_many_lines_into_lightlys_example(example):
    changes = lightly_trial.OURS[example]
    lines = [line for change in changes for line in change.lines]
    assert len(lines) == (11 if example == lightly_trial.PLAIN else 12)
    assert max(map(len, lines)) + 8 <= 100, "a line that is two in one"
    assert sum(change.place == "instead" for change in changes) == 2


@pytest.mark.parametrize("page", ["lightly.md", "lightning.md", "transformers.md"])
def test_every_use_of_the_library_in_the_loop_is_marked(page):
    loop = run_page.code_blocks(DOCS / "integrations" / page)[0]
    ours = [line for line in loop.splitlines() if re.search(r"\bld\b", line)]
    if page == "transformers.md":  # its self-distillation of whole views is made of our parts too
        ours = [line for line in ours if "Local" in line or "Tokens" in line or "match" in line]
    assert ours
    assert [line for line in ours if not line.endswith("# +")] == []


def test_the_solo_learn_page_shows_what_was_tried():
    text = (DOCS / "integrations" / "solo-learn.md").read_text("utf-8")
    assert f"```text\n{solo_trial.SUBCLASS}```" in text
    for change in solo_trial.OURS:
        for line in change.lines:
            assert line in text
    count = lines_of_code(solo_trial.SUBCLASS.partition("class ")[2].splitlines())
    assert count == 29 <= 40
    assert f"{count} lines" in text

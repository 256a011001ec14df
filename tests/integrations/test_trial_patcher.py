"""What the trials on others' code stand on: lines put where they belong, counted, and shown."""

import math
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # the benchmarks are outside of the package

from benchmarks.integrations import dino_trial, dinov2_trial  # noqa: E402
from benchmarks.integrations.trial import Change, Count, apply_changes, fall  # noqa: E402

THEIRS = "def train():\n    for images in loader:\n        loss = model(images)\n"


@pytest.fixture
def code(tmp_path):
    (tmp_path / "main.py").write_text(THEIRS)
    return tmp_path


def test_lines_go_before_after_and_instead_with_the_indentation_of_theirs(code):
    count = apply_changes(
        code,
        [
            Change("main.py", "def train", "before", ("import ours", "")),
            Change("main.py", "for images", "instead", ("for images, where in loader:",)),
            Change("main.py", "loss = model", "after", ("# why", "if where:", "    loss += 1")),
        ],
    )
    assert (code / "main.py").read_text() == (
        "import ours\n\ndef train():\n    for images, where in loader:\n"
        "        loss = model(images)\n        # why\n        if where:\n            loss += 1\n"
    )
    assert count == Count(added=4, removed=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (Change("main.py", "nowhere", "after", ("x",)), "'nowhere' is in 0 lines"),
        (Change("main.py", "images", "after", ("x",)), "'images' is in 2 lines"),
        (Change("main.py", "def", "beside", ("x",)), "`place` is 'beside'"),
    ],
)
def test_what_cannot_be_placed_is_refused_and_nothing_is_written(code, change, message):
    with pytest.raises(ValueError, match=message):
        apply_changes(code, [change])
    assert (code / "main.py").read_text() == THEIRS


def test_a_fall_is_that_of_the_fifths_and_nan_is_none():
    series = [10.0, 9, 8, 7, 6, 5, 4, 3, 2, 1]
    assert fall(series) == (10, 9.5, 1.5)
    assert fall(series).falling
    assert fall([0.0, 0, *series], after=2) == fall(series)
    assert not fall(series[::-1]).falling
    assert not fall([*series, math.nan]).falling
    with pytest.raises(ValueError, match="at least 5"):
        fall(series[:4])


@pytest.mark.parametrize(("trial", "page"), [(dino_trial, "dino.md"), (dinov2_trial, "dinov2.md")])
def test_the_page_shows_the_lines_that_the_trial_puts_in(trial, page):
    shown = [line.strip() for line in (ROOT / "docs/integrations" / page).read_text().splitlines()]
    ours = [line.strip() for change in trial.OURS for line in change.lines if line]
    assert [line for line in ours if line not in shown] == []


def test_added_lines_of_dino_are_ten_and_one_is_removed():
    lines = [line for change in dino_trial.OURS for line in change.lines if line]
    assert len(lines) == 10
    assert sum(change.place == "instead" for change in dino_trial.OURS) == 1

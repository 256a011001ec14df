"""The page that walks through the loop shows the loop."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "training" / "loop.md").read_text("utf-8")
LOOP = (ROOT / "local_distill" / "training" / "trainer.py").read_text("utf-8")


def test_every_excerpt_is_in_the_file_and_in_order():
    excerpts = re.findall(r"^```py\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert len(excerpts) > 12
    places = []
    for excerpt in excerpts:
        assert excerpt in LOOP, f"not in trainer.py:\n{excerpt}"
        places.append(LOOP.index(excerpt))
    assert places == sorted(places)


def test_the_loop_can_be_read_in_ten_minutes():
    """From the end of its docstring, at a line every four seconds."""
    body = LOOP.split('"""')[-1]
    assert len([line for line in body.splitlines() if line.strip()]) < 120
    assert len(LOOP.splitlines()) < 230

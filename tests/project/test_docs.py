"""The code on the documentation's pages runs, and the pages that are linked are there."""

import re
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = ["index.md", "getting-started.md", "conventions.md"]


@pytest.mark.parametrize("page", [*PAGES, "../README.md"])
def test_code_on_the_page_runs(page):
    blocks = BLOCK.findall((DOCS / page).read_text("utf-8"))
    assert blocks
    torch.manual_seed(0)
    names = {}
    for number, block in enumerate(blocks):  # later blocks go on from earlier ones
        exec(compile(block, f"{page}, block {number}", "exec"), names)


def test_no_other_page_has_code_that_nobody_runs():
    with_code = [
        str(path.relative_to(DOCS))
        for path in sorted(DOCS.rglob("*.md"))
        if BLOCK.search(path.read_text("utf-8"))
    ]
    assert sorted(with_code) == sorted(PAGES)


@pytest.mark.parametrize("picture", sorted(DOCS.glob("pictures/*.png")), ids=lambda path: path.stem)
def test_every_picture_has_the_script_that_draws_it(picture):
    scripts = [path.read_text("utf-8") for path in picture.parent.glob("make_*.py")]
    assert any(picture.name in script for script in scripts)

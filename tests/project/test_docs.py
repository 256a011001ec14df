"""The code on the documentation's pages runs, and the pages that are linked are there."""

import importlib.util
import random
import re
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from local_distill.transforms.transform_classes import transform_table

DOCS = Path(__file__).parents[2] / "docs"
FENCE = re.compile(r"^```python$", re.MULTILINE)

_spec = importlib.util.spec_from_file_location("run_page", DOCS / "run_page.py")
run_page = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(run_page)

PAGES = sorted(
    str(path.relative_to(DOCS))
    for path in [*DOCS.rglob("*.md"), DOCS / "../README.md"]
    if FENCE.search(path.read_text("utf-8"))
)


def test_the_pages_with_code_are_found():
    assert {"index.md", "getting-started.md", "conventions.md", "../README.md"} <= set(PAGES)


def test_a_text_block_is_what_the_code_before_it_prints(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("""
```python
print("loss", 1.23)
```

```text
loss 1.25
```

```python
print(2)
```
""")
    run_page.run(page)
    page.write_text(page.read_text().replace("1.25", "1.5"))
    with pytest.raises(AssertionError, match="block 1 prints"):
        run_page.run(page)
    assert not run_page.is_like("loss 1.23\n2", "loss 1.23")
    assert not run_page.is_like("gain 1.23", "loss 1.23")
    assert run_page.is_like("[1,\n 2]", "[1, 2]")
    assert run_page.is_like("a\nb\nc", "a\n...")
    assert not run_page.is_like("b\nb\nc", "a\n...")


@pytest.mark.parametrize("page", PAGES)
def test_code_on_the_page_runs_and_draws_the_pictures_that_are_there(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - what lightly draws from
    torch.manual_seed(0)
    run_page.run(DOCS / page)
    for drawn in tmp_path.glob("*.png"):
        with PIL.Image.open(drawn) as new, PIL.Image.open(DOCS / "pictures" / drawn.name) as old:
            assert new.size == old.size, drawn.name
            apart = np.asarray(new.convert("RGB"), float) - np.asarray(old.convert("RGB"), float)
        # fonts and line ends differ a little between releases of matplotlib
        assert np.abs(apart).mean() < 4, f"{drawn.name}: run docs/run_page.py {page} and look"


@pytest.mark.parametrize("picture", sorted(DOCS.glob("pictures/*.png")), ids=lambda path: path.stem)
def test_every_picture_has_the_code_that_draws_it(picture):
    scripts = [path.read_text("utf-8") for path in picture.parent.glob("make_*.py")]
    blocks = [block for page in PAGES for block in run_page.code_blocks(DOCS / page)]
    assert any(picture.name in code for code in (*scripts, *blocks))


def test_the_table_of_transform_classes_is_the_one_that_track_goes_by():
    page = (DOCS / "views" / "transform-classes.md").read_text("utf-8")
    assert transform_table().strip() in page

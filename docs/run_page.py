"""Runs the code of a page, and keeps its pictures in docs/pictures: docs/run_page.py PAGE."""

import os
import re
import shutil
import sys
import tempfile
import types
from pathlib import Path

DOCS = Path(__file__).resolve().parent
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def code_blocks(page: Path) -> list[str]:
    """The page's Python, block by block; later blocks go on from earlier ones."""
    return BLOCK.findall(page.read_text("utf-8"))


def run(page: Path) -> None:
    """Execute the page's blocks in one namespace, in the current directory."""
    # a module like any other, so that what the page defines can be pickled
    module = types.ModuleType("__page__")
    sys.modules[module.__name__] = module
    for number, block in enumerate(code_blocks(page), 1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), module.__dict__)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not (DOCS / sys.argv[1]).is_file():
        sys.exit(f"usage: {sys.argv[0]} PAGE, a file below docs/ such as half-pixel-traps.md")
    page = DOCS / sys.argv[1]
    with tempfile.TemporaryDirectory() as folder:  # pages leave more than pictures behind
        os.chdir(folder)
        run(page)
        for picture in Path(folder).glob("*.png"):
            shutil.copy(picture, DOCS / "pictures")
        os.chdir(DOCS)

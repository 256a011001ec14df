"""Runs the code of a page, and keeps its pictures in docs/pictures: docs/run_page.py PAGE.

A text block that follows a Python block is what that block prints. Its words have to be those, its
numbers nearly so; a line with "not compared" before it, in a comment, says that it is not.
"""

import contextlib
import io
import math
import os
import re
import shutil
import sys
import tempfile
import types
from pathlib import Path

DOCS = Path(__file__).resolve().parent
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)")


def code_blocks(page: Path) -> list[str]:
    """The page's Python, block by block; later blocks go on from earlier ones."""
    return [code for code, _ in blocks_and_prints(page)]


def blocks_and_prints(page: Path) -> list[tuple[str, str | None]]:
    """The page's Python, and what it says that each block prints, None where it says nothing."""
    text = page.read_text("utf-8")
    fences = list(FENCE.finditer(text))
    found = []
    for fence, after in zip(fences, [*fences[1:], None], strict=True):
        if fence[1] != "python":
            continue
        prints = None
        if after is not None and after[1] == "text":
            between = text[fence.end() : after.start()]
            if "not compared" not in between:
                prints = after[2]
        found.append((fence[2], prints))
    return found


def run(page: Path) -> None:
    """Execute the page's blocks in one namespace, in the current directory."""
    # a module like any other, so that what the page defines can be pickled
    module = types.ModuleType("__page__")
    sys.modules[module.__name__] = module
    for number, (block, says) in enumerate(blocks_and_prints(page), 1):
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                exec(compile(block, f"{page.name}, block {number}", "exec"), module.__dict__)
        finally:  # whoever runs a page by hand sees it too
            print(printed.getvalue(), end="")
        if says is not None:
            assert is_like(printed.getvalue(), says), (
                f"{page.name} says that block {number} prints\n{says}\nit prints\n"
                f"{printed.getvalue()}"
            )


def is_like(printed: str, says: str) -> bool:
    """Whether the words are the same and the numbers nearly: machines round in other orders.

    A last line "..." stands for all that follows.
    """
    lines = says.strip().splitlines()
    if lines and lines[-1].strip() == "...":
        says = "\n".join(lines[:-1])
        printed = "\n".join(printed.strip().splitlines()[: len(lines) - 1])
    one, other = NUMBER.split(printed.strip()), NUMBER.split(says.strip())
    return len(one) == len(other) and all(
        math.isclose(float(a), float(b), rel_tol=0.05, abs_tol=0.02)
        if number % 2
        else a.split() == b.split()
        for number, (a, b) in enumerate(zip(one, other, strict=True))
    )


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

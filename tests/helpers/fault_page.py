"""The page docs/losses/faults.md, and the script that prints it."""

import importlib.util
import sys
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs" / "losses"
_spec = importlib.util.spec_from_file_location("make_loss_faults", DOCS / "make_faults.py")
make_faults = importlib.util.module_from_spec(_spec)
_path = list(sys.path)
_spec.loader.exec_module(make_faults)
sys.path[:] = _path  # the script finds the helpers by itself

GROUPS = ["numbers", "tokens", "views", "layout", "state"]  # compiling takes minutes for all


def columns_of_the_page():
    """{name: {row: cell}} of both tables."""
    columns, header = {}, None
    for line in (DOCS / "faults.md").read_text("utf-8").splitlines():
        if not line.startswith("|"):
            header = None
        elif not line.startswith("|--"):
            row, *cells = line.strip("| ").split(" | ")
            if header is None:
                header = cells
                continue
            for name, cell in zip(header, cells, strict=True):
                columns.setdefault(name, {})[row] = cell
    return columns


def ensure_true_column(name):
    """All but the compile rows of a column are as printed, and none is wrong."""
    groups = GROUPS if name in make_faults.SUBJECTS else [g for g in GROUPS if g != "tokens"]
    results = make_faults.results_of(name, groups)
    wrong = [result for result in results if result.outcome == "WRONG"]
    assert not wrong
    found = {f"{result.group}: {result.fault}": result.outcome for result in results}
    page = columns_of_the_page()[name]
    assert found == {row: cell for row, cell in page.items() if not row.startswith("compile")}

"""Lightly's and kornia's own tests, run on our parts, with what to think of each that fails.

    git clone https://github.com/lightly-ai/lightly
    git clone https://github.com/kornia/kornia
    python -m benchmarks.integrations.their_tests --lightly lightly --kornia kornia

A test counts if a part of ours ran in it. One that fails needs a verdict in
`their_tests_verdicts.py`, whose proof is run here; a failure without one, or a verdict without its
failure, ends the script with an error. ``--page`` puts the tables into a page.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.integrations.their_tests_verdicts import VERDICTS, Verdict
from benchmarks.integrations.trial import commit_of
from benchmarks.study.page import update_page

__all__ = ["SUITES", "failures_table", "passes_table", "unexplained"]

SUITES = {
    "lightly": [
        *(f"tests/loss/test_{name}_loss.py" for name in ("dino", "ibot", "koleo", "vicreg")),
        *("tests/loss/test_vicregl_loss.py", "tests/models/modules/test_center.py"),
        *("tests/models/test_ModelUtils.py", "-k", "not ModelUtils or nearest_n or similar"),
    ],
    "kornia": ["tests/feature/test_matching.py", "-k", "MatchNN or MatchMNN or MatchSMNN"],
}
"""What of theirs is run: arguments of pytest."""


def run_suite(library: str, clone: Path) -> list[dict[str, Any]]:
    """Their tests on our parts, as the plugin wrote them down."""
    root = Path(__file__).parents[2]
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.jsonl"
        paths = os.pathsep.join((str(clone.resolve()), str(root)))
        environment = {
            **os.environ,
            "PYTHONPATH": paths,
            "SWAP_LIBRARY": library,
            "SWAP_RECORD": str(record),
        }
        plugin = ["-p", "benchmarks.integrations.swap_plugin", "-p", "no:cacheprovider", "-q"]
        command = [sys.executable, "-m", "pytest", *plugin, *SUITES[library]]
        done = subprocess.run(
            command, cwd=clone, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode not in (0, 1) or not record.exists():  # 1: tests failed, as some do
            raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
        return [json.loads(line) for line in record.read_text("utf-8").splitlines()]


def name_of(test: str) -> str:
    """Their file and test, without folders: ``test_dino_loss.py::test_single_view_raises``."""
    parts = test.split("::")
    return f"{parts[0].rpartition('/')[2]}::{parts[-1]}"


def passes_table(records: list[dict[str, Any]]) -> str:
    """By file: how many of the tests in which a part of ours ran pass."""
    lines = ["| their file | pass | of | skipped |", "| --- | --- | --- | --- |"]
    reached = [record for record in records if record["ran"] or record["outcome"] == "failed"]
    total: Counter[str] = Counter()
    for file in dict.fromkeys(record["test"].split("::")[0] for record in reached):
        mine = [record for record in reached if record["test"].startswith(f"{file}::")]
        count = Counter(record["outcome"] for record in mine)
        total += count
        tried = count["passed"] + count["failed"]
        lines.append(f"| `{file}` | {count['passed']} | {tried} | {count['skipped']} |")
    tried = total["passed"] + total["failed"]
    lines.append(f"| *all* | {total['passed']} | {tried} | {total['skipped']} |")
    return "\n".join(lines)


def unexplained(records: list[dict[str, Any]], verdicts: dict[str, Verdict]) -> list[str]:
    """Failures without a verdict, and verdicts of tests that do not fail."""
    failed = {name_of(record["test"]) for record in records if record["outcome"] == "failed"}
    return [
        *(f"{name} fails, and nobody says why" for name in sorted(failed - verdicts.keys())),
        *(f"{name} does not fail any more" for name in sorted(verdicts.keys() - failed)),
    ]


def failures_table(verdicts: dict[str, Verdict]) -> str:
    """Each failure with its verdict and what its proof says, which is run here."""
    lines = ["| their test | whose fault | why | shown |", "| --- | --- | --- | --- |"]
    said: dict[Any, str] = {}
    for name, verdict in verdicts.items():
        if verdict.proof not in said:
            said[verdict.proof] = verdict.proof()
        test = name.replace("|", "\\|")
        lines.append(f"| `{test}` | {verdict.whose} | {verdict.why} | {said[verdict.proof]} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for library in SUITES:
        parser.add_argument(f"--{library}", type=Path, help=f"a clone of {library}")
    parser.add_argument("--page", type=Path, help="a Markdown page whose tables are made anew")
    options = parser.parse_args()
    tables = {}
    for library in SUITES:
        clone: Path | None = getattr(options, library)
        if clone is None:
            continue
        print(f"{library} at {commit_of(clone)}", file=sys.stderr)
        records = run_suite(library, clone)
        verdicts = VERDICTS[library]
        if surprises := unexplained(records, verdicts):
            raise SystemExit("\n".join(surprises))
        tables[f"{library}: passes"] = passes_table(records)
        tables[f"{library}: failures"] = failures_table(verdicts)
    if not tables:
        parser.error("give a clone: --lightly or --kornia")
    print("\n\n".join(f"**{title}**\n\n{table}" for title, table in tables.items()))
    if options.page is not None:
        text = options.page.read_text("utf-8")
        options.page.write_text(update_page(text, tables), "utf-8")


if __name__ == "__main__":
    main()

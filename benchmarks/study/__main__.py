"""``python -m benchmarks.study``: see the package."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.study.page import update_page
from benchmarks.study.pieces import tasks_of
from benchmarks.study.presets import PRESETS
from benchmarks.study.results_file import read_records
from benchmarks.study.running import run_tasks
from benchmarks.study.settings import Preset
from benchmarks.study.tables import all_tables, preset_tables
from benchmarks.study.tuning import is_tuned, planned_finals, tuning_pieces

RESULTS = Path(__file__).parent / "results"


def run_study(preset: Preset, results: Path, *, jobs: int = 2, until: float | None = None) -> bool:
    """Run what is missing: the tuning first, then the finals with what it chose.

    Args:
        preset: the settings.
        results: the file of results; what is in there is not run again.
        jobs: processes; 0: this one alone.
        until: `time.time()` after which no further piece is begun.

    Returns:
        Whether all of it is there.
    """
    there = read_records(results, preset)
    while not all(is_tuned(study, there) for study in preset.studies):
        tuning = [piece for study in preset.studies for piece in tuning_pieces(study, there)]
        run_tasks(
            preset, tasks_of(preset, tuning), results, jobs=jobs, description="tuning", until=until
        )
        there = read_records(results, preset)
        if not there.keys() >= set(tuning):
            return False
    finals = [piece for study in preset.studies for piece in planned_finals(study, there)]
    run_tasks(
        preset, tasks_of(preset, finals), results, jobs=jobs, description="finals", until=until
    )
    return read_records(results, preset).keys() >= set(finals)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu")
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each")
    parser.add_argument(
        "--results", type=Path, help="default: results/PRESET.jsonl beside the code"
    )
    parser.add_argument("--minutes", type=float, help="begin no piece after so many")
    parser.add_argument("--tables", action="store_true", help="run nothing, print the tables")
    parser.add_argument("--page", type=Path, help="a Markdown page whose tables are made anew")
    options = parser.parse_args(arguments)
    preset = PRESETS[options.preset]
    results = options.results or RESULTS / f"{preset.name}.jsonl"
    complete = True
    if not options.tables:
        until = None if options.minutes is None else time.time() + 60 * options.minutes
        complete = run_study(preset, results, jobs=options.jobs, until=until)
    records = read_records(results, preset)
    print(all_tables(preset, records))
    if options.page is not None:
        text = options.page.read_text(encoding="utf-8")
        tables = preset_tables(preset, records)
        options.page.write_text(update_page(text, tables), encoding="utf-8")
    if not complete:
        print("not all of it is there yet: the same command goes on", file=sys.stderr)
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())

"""Two reports, compared by the ratios to their own references."""

from __future__ import annotations

import math
from typing import NamedTuple

from local_distill.benchmarking.report import Report
from local_distill.benchmarking.rows import Row
from local_distill.errors import ConfigError, DataError

__all__ = ["Change", "Comparison", "compare_reports", "comparison_table"]


class Change(NamedTuple):
    """One row of both reports.

    Attributes:
        name: suite, case and way.
        time: the ratio to the reference before and after.
        memory: the same of peak memory; None where there is none in either.
        worse: what is beyond the tolerance, as words; empty: nothing.
    """

    name: str
    time: tuple[float, float]
    memory: tuple[float, float] | None
    worse: tuple[str, ...]


class Comparison(NamedTuple):
    """What two reports have in common, and what not.

    Attributes:
        changes: rows of both.
        only_before: names of rows that only the first has, or could measure.
        only_after: names of rows that only the second has, or could measure.
        notes: settings and machine that differ.
    """

    changes: list[Change]
    only_before: list[str]
    only_after: list[str]
    notes: list[str]

    @property
    def regressions(self) -> list[Change]:
        """Rows beyond the tolerance."""
        return [change for change in self.changes if change.worse]


def compare_reports(before: Report, after: Report, *, tolerance: float = 1.25) -> Comparison:
    """Which rows' ratios to the reference grew by more than the tolerance; seconds do not count.

    Convention: the reference's own row, 1 in both, and rows that name another reference in the two
    are left out.

    Args:
        before: the older report.
        after: the newer.
        tolerance: how many times as large a ratio may be, at least 1; of time and of peak memory.

    Raises:
        ConfigError: a tolerance below 1.
        DataError: no row that both could measure.
    """
    if not (math.isfinite(tolerance) and tolerance >= 1):
        raise ConfigError(f"`tolerance` must be at least 1, got {tolerance}")
    old, new = _measured(before), _measured(after)
    both = [key for key in old if key in new]
    if not both:
        raise DataError("the reports have no measured row in common: nothing to compare")
    changes = [_change(old[key], new[key], tolerance) for key in both]
    return Comparison(
        changes,
        [_name(key) for key in old if key not in new],
        [_name(key) for key in new if key not in old],
        _differences(before, after),
    )


Key = tuple[str, str, str, str]


def _measured(report: Report) -> dict[Key, Row]:
    return {
        (*row.key, row.reference): row
        for row in report.rows
        if row.ratio is not None and row.way != row.reference
    }


def _name(key: Key) -> str:
    suite, case, way, reference = key
    return f"{suite} / {case} / {way} (of {reference})"


def _change(old: Row, new: Row, tolerance: float) -> Change:
    assert old.ratio is not None
    assert new.ratio is not None
    time = (old.ratio.median, new.ratio.median)
    memory = None
    if old.peak_ratio is not None and new.peak_ratio is not None:
        memory = (old.peak_ratio, new.peak_ratio)
    pairs = [("time", time), *([] if memory is None else [("memory", memory)])]
    worse = tuple(what for what, (was, is_) in pairs if is_ > was * tolerance)
    return Change(f"{old.case} / {old.way}", time, memory, worse)


def _differences(before: Report, after: Report) -> list[str]:
    notes = []
    for title, old, new in (
        ("settings", before.settings, after.settings),
        ("machine", before.machine._asdict(), after.machine._asdict()),
    ):
        notes += [
            f"{title}: {name} was {old[name]}, is {new[name]}"
            for name in old
            if old[name] != new[name] and name != "load"
        ]
    return notes


def comparison_table(found: Comparison, tolerance: float) -> str:
    """All of it in words."""
    lines = [f"note: {note}" for note in found.notes]
    width = max(len(change.name) for change in found.changes) + 2
    lines.append(f"{'of the reference':<{width}}{'time':>20}{'memory':>20}")
    for change in found.changes:
        time, memory = _arrow(change.time), "" if change.memory is None else _arrow(change.memory)
        verdict = f"  WORSE: {' and '.join(change.worse)}" if change.worse else ""
        lines.append(f"{change.name:<{width}}{time:>20}{memory:>20}{verdict}")
    lines += [f"only in the first: {name}" for name in found.only_before]
    lines += [f"only in the second: {name}" for name in found.only_after]
    count = len(found.regressions)
    lines.append(
        f"{count} of {len(found.changes)} rows are worse than {tolerance:g} times"
        if count
        else f"none of {len(found.changes)} rows is worse than {tolerance:g} times"
    )
    return "\n".join(lines)


def _arrow(pair: tuple[float, float]) -> str:
    return f"{pair[0]:.3g} → {pair[1]:.3g}"

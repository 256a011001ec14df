"""The printed table, a case at a time."""

from __future__ import annotations

from collections.abc import Sequence

from local_distill.benchmarking.machine import Machine, Rates
from local_distill.benchmarking.rows import Row

__all__ = ["case_table", "headline", "human_bytes", "human_seconds", "threads_in_words"]

_COLUMNS = ("time", "10–90 %", "of reference", "10–90 %", "peak", "of ref.", "bandw.", "product")
_WIDTHS = (10, 18, 13, 18, 11, 10, 8, 9)


def headline(machine: Machine, rates: Rates) -> str:
    """What was measured on."""
    device = "" if machine.device == "cpu" else f"{machine.device}; "
    load = "" if machine.load is None else f", load {machine.load}"
    return (
        f"{device}{machine.processor}, {machine.cores} cores, "
        f"{threads_in_words(machine.threads)}{load}, torch {machine.torch}\n"
        f"copies {rates.copy_bytes / 1e9:.1f} GB/s, multiplies {rates.product_flops / 1e9:,.0f} "
        "GFLOP/s"
    )


def case_table(rows: Sequence[Row]) -> str:
    """The rows of one case, the reference marked."""
    width = max(len(row.way) for row in rows) + 2
    titles = "".join(title.rjust(size) for title, size in zip(_COLUMNS, _WIDTHS, strict=True))
    lines = [rows[0].case, " " * width + titles]
    for row in rows:
        mark = "* " if row.way == row.reference else "  "
        if row.seconds is None:
            lines.append(f"{(mark + row.way).ljust(width)}  not measured: {row.failed}")
            continue
        cells = "".join(cell.rjust(size) for cell, size in zip(_cells(row), _WIDTHS, strict=True))
        lines.append((mark + row.way).ljust(width) + cells)
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    assert row.seconds is not None
    ratio = row.ratio
    return (
        human_seconds(row.seconds.median),
        f"{human_seconds(row.seconds.low)}–{human_seconds(row.seconds.high)}",
        "" if ratio is None else f"{ratio.median:.3g} ×",
        "" if ratio is None else f"{ratio.low:.3g}–{ratio.high:.3g}",
        "" if row.peak_bytes is None else human_bytes(row.peak_bytes),
        "" if row.peak_ratio is None else f"{row.peak_ratio:.3g} ×",
        "" if row.bandwidth_fraction is None else f"{row.bandwidth_fraction:.1%}",
        "" if row.product_fraction is None else f"{row.product_fraction:.1%}",
    )


def threads_in_words(count: int) -> str:
    """Such as "1 thread"."""
    return "1 thread" if count == 1 else f"{count} threads"


def human_seconds(seconds: float) -> str:
    """Three digits and a unit.

    Example:
        >>> human_seconds(0.0123), human_seconds(12.3), human_seconds(4.56e-6)
        ('12.3ms', '12.3s', '4.56µs')
    """
    for factor, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= factor:
            return f"{seconds / factor:.3g}{unit}"
    return f"{seconds / 1e-6:.3g}µs"


def human_bytes(count: float) -> str:
    """Three digits and a unit.

    Example:
        >>> human_bytes(3 * 2**20), human_bytes(100), human_bytes(1.5 * 2**30)
        ('3 MiB', '0.0977 KiB', '1.5 GiB')
    """
    for factor, unit in ((2**30, "GiB"), (2**20, "MiB")):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count / 2**10:.3g} KiB"

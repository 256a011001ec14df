"""A picture of a report: how near each way comes to the machine's roof, and ratios as bars."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from local_distill.benchmarking.report import Report
from local_distill.benchmarking.rows import Row
from local_distill.benchmarking.table import threads_in_words
from local_distill.errors import ConfigError, DataError, require_extra
from local_distill.viz.figures import new_figure, view_colors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["check_plot_path", "draw_report", "plot_report"]

_MARKERS = "osD^vP*X<>"
_BAR = 0.21  # inches


def check_plot_path(path: str | Path) -> None:
    """Say beforehand what would fail after the measuring.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ConfigError: a file ending that matplotlib does not write.
    """
    figure = new_figure(1, 1)
    kinds = figure.canvas.get_supported_filetypes()
    ending = Path(path).suffix.removeprefix(".").lower()
    if ending not in kinds:
        raise ConfigError(f"--plot {path}: no picture ends in {ending!r}; use .png, .svg or .pdf")


def plot_report(report: Report, path: str | Path) -> None:
    """Draw it and write it to a file.

    Raises:
        MissingExtraError: matplotlib is not installed.
        DataError: nothing was measured.
    """
    draw_report(report).savefig(path, dpi=110)


def draw_report(report: Report) -> Figure:
    """A roofline on the left, where the suite has flops by formula; the ratios on the right."""
    rows = [row for row in report.rows if row.seconds is not None]
    if not rows:
        raise DataError("nothing was measured: there is nothing to draw")
    cases = list(dict.fromkeys(row.case for row in rows))
    colors = dict(zip(cases, view_colors(len(cases)), strict=True))
    with_flops = any(row.flops > 0 for row in rows)
    height = max(5.0, 1.6 + _BAR * (len(rows) + 2 * len(cases)))
    figure = new_figure(14 if with_flops else 8, height)
    if with_flops:
        left, right = figure.subplots(1, 2, width_ratios=(1.0, 1.1))
        _roofline(left, report, rows, colors)
    else:
        right = figure.subplots()
    _bars(right, rows, colors)
    figure.suptitle(
        f"local-distill bench {report.suite}: {_device(report)}, {report.settings['dtype']}, "
        f"torch {report.machine.torch}"
    )
    return figure


def _device(report: Report) -> str:
    machine = report.machine
    if machine.device != "cpu":
        return machine.device
    return f"{machine.processor}, {threads_in_words(machine.threads)}"


def _roofline(axes: Any, report: Report, rows: list[Row], colors: dict[str, Any]) -> None:
    """Flops a second over flops a byte, both by formula; a way on the roof cannot be faster."""
    peak, speed = report.rates.product_flops, report.rates.copy_bytes
    rows = [row for row in rows if row.flops > 0]
    intensities = [row.flops / row.bytes for row in rows]
    ridge = peak / speed
    low, high = min(*intensities, ridge) / 4, max(*intensities, ridge) * 4
    axes.plot([low, ridge, high], [low * speed, peak, peak], color="0.2", lw=1.5)
    # All ways of a case stand above each other: the best is named here, the bars name the others.
    for number, case in enumerate(colors):
        own = [row for row in rows if row.case == case]
        if not own:
            continue
        x = [row.flops / row.bytes for row in own]
        y = [row.flops / row.seconds.median for row in own if row.seconds is not None]
        marker = _MARKERS[number % len(_MARKERS)]
        axes.scatter(x, y, s=34, color=[colors[case]], marker=marker, alpha=0.75, label=case)
        best = max(range(len(own)), key=y.__getitem__)
        to_the_left = x[best] ** 2 > low * high  # of the middle
        axes.annotate(
            own[best].way,
            (x[best], y[best]),
            (-7 if to_the_left else 7, -2),
            textcoords="offset points",
            fontsize=7,
            ha="right" if to_the_left else "left",
        )
    axes.set(xscale="log", yscale="log", xlim=(low, high))
    axes.set_xlabel("flops a byte of the question, by formula")
    axes.set_ylabel("flops of the question a second")
    axes.set_title(
        f"roof: copies {speed / 1e9:.1f} GB/s, multiplies {peak / 1e9:,.0f} GFLOP/s", fontsize=10
    )
    axes.grid(alpha=0.25, which="major")
    axes.legend(fontsize=7, loc="lower right")


def _bars(axes: Any, rows: list[Row], colors: dict[str, Any]) -> None:
    """Time of each way over its reference's, with 10 to 90 %."""
    place, places, labels = 0.0, [], []
    for case, color in colors.items():
        axes.text(0.0, place - 0.1, case, transform=axes.get_yaxis_transform(), fontsize=8,
                  color=color, va="center", weight="bold")  # fmt: skip
        place += 1
        for row in (row for row in rows if row.case == case and row.ratio is not None):
            assert row.ratio is not None
            median, low, high = row.ratio
            axes.barh(place, median - 1, left=1.0, color=color, alpha=0.85)
            axes.plot([low, high], [place, place], color="0.15", lw=1)
            faster = median < 1
            axes.annotate(
                f"{median:.3g}",
                (min(median, low) if faster else max(median, high), place),
                (-4 if faster else 4, 0),
                textcoords="offset points",
                ha="right" if faster else "left",
                va="center",
                fontsize=7,
            )
            places.append(place)
            labels.append(row.way)
            place += 1
        place += 0.6
    axes.axvline(1.0, color="0.2", lw=0.8)
    axes.set_xscale("log")
    _plain_ticks(axes.xaxis)
    axes.set_yticks(places, labels, fontsize=7)
    axes.set_ylim(place, -0.8)
    axes.margins(x=0.15)
    axes.set_title("time, times the reference's (line: 10 to 90 % of the repeats)", fontsize=10)


def _plain_ticks(axis: Any) -> None:
    """1, 2 and 5 of each decade as plain numbers; powers of ten alone would say too little."""
    ticker = require_extra("matplotlib.ticker", "train")
    axis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(ticker.NullLocator())
    axis.set_tick_params(labelsize=8)

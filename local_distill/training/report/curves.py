"""Curves as inline SVG that takes its colours from the page, so that it is legible on any."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from local_distill.errors import require_extra
from local_distill.viz.figures import new_figure

__all__ = ["LINE_COLORS", "Curve", "Panel", "curve_svg", "metric_panels", "with_own_ids"]

Points = Sequence[tuple[float, float]]

# Drawn in these colours, written as the page's variables: matplotlib knows no variables.
_INK, _FAINT = "#010203", "#010204"
_LINES = tuple(f"#0102{number:02x}" for number in range(16, 24))
LINE_COLORS = len(_LINES)

# More points than these are not seen at the width of a panel, and make the page heavy.
_MOST_POINTS = 400

# (title, what the names end with, unit) of the panels that hold several metrics, in this order.
_GROUPS = (
    ("Loss", ("loss",), "nats"),
    ("Entropy of the teacher", ("entropy",), "nats"),
    ("What the teacher tells apart", ("information", "teacher_kl"), "nats"),
    ("Prototypes in use", ("prototype_usage", "effective_usage"), "share"),
    ("Spread of the features", ("feature_std",), ""),
    ("Matching", ("coverage", "mutual_rate", "distinct_share"), "share of tokens"),
    ("Gradient", ("gradient_norm",), "norm"),
    ("Learning rate", ("lr",), ""),
    ("Weight decay", ("weight_decay",), ""),
    ("Temperature of the teacher", ("teacher_temp",), ""),
    ("Momentum of the teacher", ("teacher_momentum",), ""),
)


class Curve(NamedTuple):
    """One line of a panel.

    Attributes:
        name: in the legend.
        points: (x, y) by rising x; y may be NaN or infinite.
    """

    name: str
    points: Points


class Panel(NamedTuple):
    """A drawn panel.

    Attributes:
        title: above it.
        curves: what is drawn, in the order of the line colours.
        svg: the picture, an ``<svg>`` element to put into a page.
    """

    title: str
    curves: list[Curve]
    svg: str


def metric_panels(
    metrics: Sequence[Mapping[str, Any]], *, entropy_limit: float | None = None
) -> list[Panel]:
    """Draw every number of a run's log over the steps, with the epochs above where they are known.

    Args:
        metrics: the lines, by rising step.
        entropy_limit: ln c, drawn beside the teacher's entropy.

    Returns:
        Losses first, then what is known of the rest, then each other number by itself.

    Example:
        >>> panels = metric_panels([{"step": i, "loss": 1 / (i + 1), "lr": 0.1} for i in range(9)])
        >>> [panel.title for panel in panels]
        ['Loss', 'Learning rate']
    """
    curves = _curves(metrics)
    epochs = _epochs(metrics)
    panels = []
    for title, ends, unit in _GROUPS:
        found = [curve for name, curve in curves.items() if _ends(name, ends)]
        for curve in found:
            del curves[curve.name]
        limit = entropy_limit if "entropy" in ends else None
        for start in range(0, len(found), LINE_COLORS):
            part = found[start : start + LINE_COLORS]
            panels.append(
                Panel(
                    title,
                    part,
                    curve_svg(
                        part,
                        y_label=unit,
                        epochs=epochs,
                        limit=limit,
                        log_scale=title == "Gradient",
                    ),
                )
            )
    for name, curve in curves.items():
        panels.append(Panel(name, [curve], curve_svg([curve], epochs=epochs, log_scale=True)))
    return panels


def curve_svg(
    curves: Sequence[Curve],
    *,
    x_label: str = "step",
    y_label: str = "",
    epochs: tuple[float, float] | None = None,
    limit: float | None = None,
    markers: bool = False,
    log_scale: bool = False,
) -> str:
    """Draw lines into one panel; its colours are the page's ``--ink``, ``--faint``, ``--line-0`` ….

    Of long curves the means of neighbouring points are drawn, within the band of their least and
    greatest. Points that are not finite are marked at the foot.

    Args:
        curves: at most eight.
        x_label: below.
        y_label: at the side.
        epochs: those of one step and those at step 0, for a second axis above; None: no such axis.
        limit: a dashed level.
        markers: a dot at each point, for curves of few points.
        log_scale: a logarithmic axis where positive values differ by more than a factor of 100.

    Returns:
        An ``<svg>`` element whose text is text.

    Example:
        >>> svg = curve_svg([Curve("accuracy", [(0, 0.1), (1, 0.4)])], x_label="layer")
        >>> svg.startswith("<svg"), "layer" in svg, "http" in svg
        (True, True, False)
    """
    matplotlib: Any = require_extra("matplotlib", "train")
    figure = new_figure(4.6, 2.5)
    ax: Any = figure.subplots()
    foot = ax.get_xaxis_transform()
    highest, lowest = -math.inf, math.inf
    for curve, color in zip(curves, _LINES, strict=False):
        x, y = _arrays(curve.points)
        finite = np.isfinite(y)
        if not finite.all():
            odd = ~finite
            ax.plot(
                x[odd], np.full(int(odd.sum()), 0.02), "x", color=color, transform=foot, ms=5,
                clip_on=False,
            )  # fmt: skip
        x, y = x[finite], y[finite]
        if not len(x):
            continue
        highest, lowest = max(highest, y.max()), min(lowest, y.min())
        x, mean, least, greatest = _thinned(x, y)
        if len(mean) < len(y):
            ax.fill_between(x, least, greatest, color=color, alpha=0.22, linewidth=0)
        mark = "o" if markers or len(x) == 1 else None
        ax.plot(x, mean, color=color, linewidth=1.6, marker=mark, markersize=4)
    if limit is not None:
        ax.axhline(limit, color=_INK, linewidth=0.9, linestyle=(0, (5, 4)))
    if log_scale and lowest > 0 and highest > 100 * lowest:
        ax.set_yscale("log")
    _dress(ax, x_label, y_label, markers)
    if epochs is not None:
        slope, start = epochs
        top = ax.secondary_xaxis(
            "top", functions=(lambda x: start + slope * x, lambda epoch: (epoch - start) / slope)
        )
        top.tick_params(colors=_INK, labelsize=8, length=3)
        top.set_xlabel("epoch", fontsize=8, color=_INK, labelpad=3)
        top.spines["top"].set_color(_FAINT)
    drawn = io.StringIO()
    # a fixed salt: the same picture each time
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "curves"}):
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    return _for_page(drawn.getvalue())


def with_own_ids(html: str) -> str:
    """Number the ids of a page's pictures, so that no two of them share one.

    Example:
        >>> with_own_ids('<svg><g id="a"/><use href="#a"/></svg><svg><g id="a"/></svg>')
        '<svg><g id="s0-a"/><use href="#s0-a"/></svg><svg><g id="s1-a"/></svg>'
    """
    numbers = itertools.count()

    def numbered(found: re.Match[str]) -> str:
        own = f"s{next(numbers)}-"
        return re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{own}", found[0])

    return re.sub(r"<svg.*?</svg>", numbered, html, flags=re.DOTALL)


def _dress(ax: Any, x_label: str, y_label: str, whole: bool) -> None:
    ticker = require_extra("matplotlib.ticker", "train")
    ax.set_xlabel(x_label, fontsize=8, color=_INK, labelpad=2)
    ax.set_ylabel(y_label, fontsize=8, color=_INK, labelpad=3)
    ax.tick_params(colors=_INK, labelsize=8, length=3, which="both")
    ax.grid(color=_FAINT, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.margins(x=0.02)
    ax.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=whole))
    if ax.get_yscale() == "linear":
        ax.yaxis.set_major_locator(ticker.MaxNLocator(5))
        # whole numbers at the ticks: a factor above the axis would stand among the epochs
        ax.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:.4g}"))
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_FAINT)


def _for_page(svg: str) -> str:
    """Only the element, sized by the page, without addresses, in the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(?::\w+)?="[^"]*"', "", svg)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    used = set(re.findall(r"#([\w-]+)", svg))
    svg = re.sub(r' id="([\w-]+)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = svg.replace(_INK, "var(--ink)").replace(_FAINT, "var(--faint)")
    for number, color in enumerate(_LINES):
        svg = svg.replace(color, f"var(--line-{number})")
    return svg.strip()


def _curves(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    points: dict[str, list[tuple[float, float]]] = {}
    for line in metrics:
        for name, value in line.items():
            if name in ("step", "epoch") or isinstance(value, bool):
                continue
            if isinstance(value, (int, float)):
                points.setdefault(name, []).append((line["step"], float(value)))
    return {name: Curve(name, found) for name, found in points.items()}


def _epochs(metrics: Sequence[Mapping[str, Any]]) -> tuple[float, float] | None:
    """Epochs of one step, and those at step 0, by the first and the last line that tell."""
    told = [
        (line["step"], float(line["epoch"]))
        for line in metrics
        if isinstance(line.get("epoch"), (int, float)) and math.isfinite(line["epoch"])
    ]
    if len(told) < 2 or told[-1][1] <= told[0][1]:
        return None
    (first_step, first), (last_step, last) = told[0], told[-1]
    slope = (last - first) / (last_step - first_step)
    return slope, first - slope * first_step


def _ends(name: str, ends: Sequence[str]) -> bool:
    return any(name == end or name.endswith(f"_{end}") for end in ends)


def _arrays(points: Points) -> tuple[np.ndarray, np.ndarray]:
    both = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """x, mean, least and greatest y of runs of neighbouring points."""
    size = math.ceil(len(x) / _MOST_POINTS)
    if size <= 1:
        return x, y, y, y
    starts = np.arange(0, len(x), size)
    counts = np.diff(np.append(starts, len(x)))
    mean = np.add.reduceat(y, starts) / counts
    at = np.add.reduceat(x, starts) / counts
    return at, mean, np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts)

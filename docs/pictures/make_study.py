"""Draws the pictures of docs/training/study.md from the committed results; trains nothing.

python docs/pictures/make_study.py [PRESET]
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.study.pieces import UNTRAINED  # noqa: E402
from benchmarks.study.presets import PRESETS  # noqa: E402
from benchmarks.study.results_file import read_records  # noqa: E402
from benchmarks.study.summary import (  # noqa: E402
    chosen_finals,
    comparisons,
    score_interval,
    scores_by_seed,
    seeds_done,
)

COLORS = {
    "vanilla": "#555555",
    "similarity": "#d1495b",
    "geometric": "#00798c",
    "hybrid": "#edae49",
    "last": "#555555",
    "every": "#00798c",
}
NAMES = {
    "vanilla": "no local loss",
    "similarity": "similarity",
    "geometric": "geometry",
    "hybrid": "hybrid",
    "last": "last layer alone (MoCo v3)",
    "every": "every layer (SDSSL)",
}
MEASURES = {
    "knn": "k-NN accuracy, global token",
    "miou": "linear segmentation, mIoU",
    "error": "correspondence error, cells (lower is better)",
}
PAIRS = (("similarity", "vanilla"), ("geometric", "vanilla"), ("hybrid", "vanilla"))


def scores(study, finals):
    """Each measure over the share of the scenes: means, intervals, and the seeds one by one."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    for panel, (measure, title) in zip(figure.subplots(1, 3), MEASURES.items(), strict=True):
        for number, variant in enumerate(study.variants):
            nudge = 1.06 ** (number - (len(study.variants) - 1) / 2)
            x, mean, low, high = [], [], [], []
            for share in study.shares:
                interval = score_interval(study, finals, variant, share, measure)
                if interval is None:
                    continue
                x.append(100 * share * nudge)
                mean.append(interval.mean)
                low.append(interval.mean - interval.low)
                high.append(interval.high - interval.mean)
                seeds = scores_by_seed(study, finals, variant, share, measure).values()
                panel.scatter(
                    [x[-1]] * len(seeds), seeds, s=9, color=COLORS[variant], alpha=0.35, lw=0
                )
            panel.errorbar(
                x, mean, np.array([low, high]), color=COLORS[variant], label=NAMES[variant],
                marker="o", markersize=4, capsize=3, linewidth=1.4,
            )  # fmt: skip
        level = score_interval(study, finals, UNTRAINED, 0.0, measure)
        if level is not None:
            panel.axhline(level.mean, color="#aaaaaa", linestyle=":", label="untrained")
        _share_axis(panel, study)
        panel.set_title(title, fontsize=10)
    figure.axes[0].legend(fontsize=8)
    figure.savefig(HERE / "study-scores.png", dpi=120)


def differences(study, finals):
    """Each way of matching less no local loss, at equal seed."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    for panel, (measure, title) in zip(figure.subplots(1, 3), MEASURES.items(), strict=True):
        found = comparisons(study, finals, measure, PAIRS)
        for number, (variant, _) in enumerate(PAIRS):
            rows = [row for row in found if row.variant == variant]
            nudge = 1.1 ** (number - 1)
            x = [100 * row.share * nudge for row in rows]
            y = [row.difference.mean for row in rows]
            half = [row.difference.high - row.difference.mean for row in rows]
            panel.errorbar(
                x, y, half, color=COLORS[variant], label=NAMES[variant],
                fmt="o", markersize=5, capsize=4, linewidth=1.4,
            )  # fmt: skip
        panel.axhline(0, color="#555555", linewidth=1)
        _share_axis(panel, study)
        panel.set_title(f"{title}:\nless that without local loss", fontsize=10)
    figure.axes[0].legend(fontsize=8)
    figure.savefig(HERE / "study-differences.png", dpi=120)


def layers(study, finals):
    """Accuracy by layer, and SDSSL's gain by layer at equal seed."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    share = study.shares[-1]
    depth = next(len(record["scores"]["knn_layers"]) for record in finals.values())
    blocks = np.arange(1, depth + 1)
    curves, gains = figure.subplots(1, 2)
    for measure, style, name in (("knn_layers", "-", "k-NN"), ("linear_layers", "--", "linear")):
        for number, variant in enumerate(study.variants):
            found = [
                score_interval(study, finals, variant, share, measure, layer)
                for layer in range(depth)
            ]
            y = [interval.mean for interval in found]
            half = [interval.high - interval.mean for interval in found]
            curves.errorbar(
                blocks + 0.04 * number, y, half, linestyle=style, color=COLORS[variant],
                marker="o", markersize=4, capsize=3, label=f"{NAMES[variant]}, {name}",
            )  # fmt: skip
        rows = comparisons(study, finals, measure, [study.variants[::-1]], range(depth))
        rows = [row for row in rows if row.share == share]
        y = [row.difference.mean for row in rows]
        half = [row.difference.high - row.difference.mean for row in rows]
        gains.errorbar(
            blocks + 0.05 * (style == "--"), y, half, color=COLORS["every"], fmt="o" if style == "-"
            else "s", markersize=5, capsize=4, label=name, markerfacecolor=None if style == "-"
            else "white",
        )  # fmt: skip
    curves.set_ylim(bottom=0.3)  # room for the legend
    curves.set_title("accuracy of each block's global token", fontsize=10)
    gains.set_title("every layer taught less last layer alone", fontsize=10)
    gains.axhline(0, color="#555555", linewidth=1)
    for panel in (curves, gains):
        panel.set_xticks(blocks)
        panel.set_xlabel("block")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    figure.savefig(HERE / "study-layers.png", dpi=120)


def _share_axis(panel, study):
    panel.set_xscale("log")
    panel.set_xticks([100 * share for share in study.shares])
    panel.set_xticklabels([f"{share:.0%}" for share in study.shares])
    panel.minorticks_off()
    panel.set_xlabel("share of the scenes")
    panel.grid(alpha=0.3)


def main(preset_name="cpu"):
    preset = PRESETS[preset_name]
    records = read_records(ROOT / f"benchmarks/study/results/{preset_name}.jsonl", preset)
    for name, pictures in (("matching", (scores, differences)), ("layers", (layers,))):
        study = preset.study(name)
        finals = chosen_finals(study, records)
        done = tuple(share for share in study.shares if seeds_done(study, finals, share) > 1)
        study = dataclasses.replace(study, shares=done)
        if not done:
            print(f"{name}: fewer than two whole seeds, nothing to draw", file=sys.stderr)
            continue
        for picture in pictures:
            picture(study, finals)


if __name__ == "__main__":
    main(*sys.argv[1:])

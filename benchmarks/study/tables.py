"""The tables of docs/training/study.md, from the results alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.study.intervals import Interval, mean_interval
from benchmarks.study.pieces import UNTRAINED, Piece
from benchmarks.study.scoring import MEASURES
from benchmarks.study.settings import Preset, Study
from benchmarks.study.summary import (
    chosen_finals,
    comparisons,
    score_interval,
    scores_by_seed,
    seeds_done,
)
from benchmarks.study.tuning import choices, criterion_table, is_tuned, tuning_pieces

__all__ = ["all_tables", "preset_tables", "study_tables"]

Records = Mapping[Piece, Mapping[str, Any]]

# What is asked: each way of matching against none, and against each other.
PAIRS = (
    ("similarity", "vanilla"),
    ("geometric", "vanilla"),
    ("hybrid", "vanilla"),
    ("geometric", "similarity"),
    ("hybrid", "geometric"),
)


def all_tables(preset: Preset, records: Records) -> str:
    """Every table of a preset's results, one after the other, as Markdown."""
    tables = preset_tables(preset, records)
    return "\n\n".join(f"**{title}**\n\n{table}" for title, table in tables.items())


def preset_tables(preset: Preset, records: Records) -> dict[str, str]:
    """The tables of all its studies, by title."""
    tables: dict[str, str] = {}
    for study in preset.studies:
        tables.update(study_tables(study, records))
    return tables


def study_tables(study: Study, records: Records) -> dict[str, str]:
    """The tables of one study by title; shares with fewer than two whole seeds are left out."""
    if not is_tuned(study, records):
        pieces = tuning_pieces(study, records)
        done = sum(piece in records for piece in pieces)
        return {f"{study.name}: tuning": f"{done} of at least {len(pieces)} pieces"}
    finals = chosen_finals(study, records)
    study = dataclasses.replace(
        study, shares=tuple(s for s in study.shares if seeds_done(study, finals, s) > 1)
    )
    if not study.shares:
        return {f"{study.name}: tuning": _tuning(study, records)}
    tables = {f"{study.name}: tuning": _tuning(study, records)}
    if study.name == "layers":
        for measure, title in (("knn_layers", "k-NN"), ("linear_layers", "linear")):
            tables[f"{study.name}: {title} accuracy by layer"] = _layers(study, finals, measure)
    else:
        for measure, title in MEASURES.items():
            tables[f"{study.name}: {title}"] = _scores(study, finals, measure)
            tables[f"{study.name}: {title}, differences"] = _differences(study, finals, measure)
        tables[f"{study.name}: scarce less plenty"] = _scarcity(study, finals)
        tables[f"{study.name}: matches in training"] = _matches(study, finals)
        tables[f"{study.name}: information"] = _information(study, finals)
        tables[f"{study.name}: runs"] = _runs(study, finals)
    return tables


def _tuning(study: Study, records: Records) -> str:
    """The criterion's mean over the runs that were tuned on, and from the least to the largest."""
    best = choices(study, records)
    found = {variant: criterion_table(study, records, variant) for variant in study.variants}
    first = study.temps[0]
    rates = sorted({lr for table in found.values() for lr, temp in table if temp == first})
    temps = sorted({temp for table in found.values() for _, temp in table} - {first})
    rows = []
    for variant, table in found.items():
        # a temperature was tried at the variant's own best rate
        settings = [(rate, first) for rate in rates]
        settings += [(best[variant].lr, temp) for temp in temps]
        row = [variant]
        for setting in settings:
            values = table.get(setting)
            if values is None:
                row.append("")
                continue
            mean = f"{sum(values) / len(values):.3f}"
            if setting == best[variant][:2]:
                mean = f"**{mean}**"
            several = f" ({min(values):.3f}-{max(values):.3f})" if len(values) > 1 else ""
            row.append(mean + several)
        rows.append(row)
    edges = [
        f"{variant} ({' and '.join(choice.at_edge)})"
        for variant, choice in best.items()
        if choice.at_edge
    ]
    note = f"\n\nBest at the edge of what was tried: {'; '.join(edges) or 'none'}."
    head = [f"lr {rate:g}, temp {first:g}" for rate in rates]
    head += [f"best lr, temp {temp:g}" for temp in temps]
    return _table(["", *head], rows) + note


def _scores(study: Study, finals: Records, measure: str) -> str:
    rows = []
    shares = study.shares
    for variant in (UNTRAINED, *study.variants):
        cells = [score_interval(study, finals, variant, share, measure) for share in shares]
        rows.append([variant, *map(_interval, cells)])
    rows.append(["*seeds*", *(str(seeds_done(study, finals, share)) for share in shares)])
    return _table(["", *(f"{share:.0%}" for share in study.shares)], rows)


def _differences(study: Study, finals: Records, measure: str) -> str:
    found = comparisons(study, finals, measure, PAIRS)
    rows = []
    for variant, other in PAIRS:
        cells = []
        for share in study.shares:
            row = next(
                (r for r in found if (r.variant, r.other, r.share) == (variant, other, share)), None
            )
            cells.append("" if row is None else f"{_signed(row.difference)}, p {row.p:.2g}")
        rows.append([f"{variant} − {other}", *cells])
    return _table(["", *(f"{share:.0%}" for share in study.shares)], rows)


def _scarcity(study: Study, finals: Records) -> str:
    """Whether a way of matching gains or loses where data gets scarce, at equal seed."""
    few, many = study.shares[0], study.shares[-1]
    rows = []
    for variant, other in PAIRS:
        cells = []
        for measure in MEASURES:
            change = [
                scores_by_seed(study, finals, name, share, measure)
                for share in (few, many)
                for name in (variant, other)
            ]
            seeds = sorted(set.intersection(*(set(values) for values in change)))
            if len(seeds) < 2:
                cells.append("")
                continue
            interval = mean_interval(
                [
                    (change[0][seed] - change[1][seed]) - (change[2][seed] - change[3][seed])
                    for seed in seeds
                ]
            )
            cells.append(f"{_signed(interval)}, p {interval.p:.2g}")
        rows.append([f"{variant} − {other}", *cells])
    return _table([f"{few:.0%} less {many:.0%}", *MEASURES.values()], rows)


def _layers(study: Study, finals: Records, measure: str) -> str:
    depth = next((len(record["scores"][measure]) for record in finals.values()), 0)
    rows = []
    for share in study.shares:
        for variant in (UNTRAINED, *study.variants):
            cells = [
                score_interval(study, finals, variant, share, measure, layer)
                for layer in range(depth)
            ]
            rows.append([f"{share:.0%}", variant, *map(_interval, cells)])
    one, other = study.variants[1], study.variants[0]
    found = comparisons(study, finals, measure, [(one, other)], range(depth))
    for share in study.shares:
        cells = [f"{_signed(row.difference)}, p {row.p:.2g}" for row in found if row.share == share]
        rows.append([f"{share:.0%}", f"{one} − {other}", *cells])
    return _table(["share", "", *(f"block {layer + 1}" for layer in range(depth))], rows)


def _matches(study: Study, finals: Records) -> str:
    rows = []
    for variant in study.variants[1:]:
        for name, title in (
            ("matched", "tokens matched"),
            ("true_early", "matches true, first fifth of the steps"),
            ("true_late", "matches true, last fifth"),
        ):
            cells = [score_interval(study, finals, variant, share, name) for share in study.shares]
            rows.append([variant, title, *map(_interval, cells)])
    return _table(["", "", *(f"{share:.0%}" for share in study.shares)], rows)


def _information(study: Study, finals: Records) -> str:
    """Of the teacher's distributions of whole views at the end, seed by seed: 0 is a collapse."""
    rows = []
    for variant in study.variants:
        cells = []
        for share in study.shares:
            values = scores_by_seed(study, finals, variant, share, "information").values()
            cells.append(" ".join(f"{value:.2f}" for value in values))
        rows.append([variant, *cells])
    return _table(["", *(f"{share:.0%}" for share in study.shares)], rows)


def _runs(study: Study, finals: Records) -> str:
    """What a factor on the loss could change, by way of clipping."""
    rows = []
    for variant in study.variants:
        mine = [record for piece, record in finals.items() if piece.variant == variant]
        if mine:
            norms = [record["training"]["gradient_norm"] for record in mine]
            clipped = [record["training"]["clipped"] for record in mine]
            rows.append(
                [
                    variant,
                    f"{sum(norms) / len(norms):.2f} (largest {max(norms):.2f})",
                    f"{sum(clipped) / len(clipped):.1%}",
                    str(len(mine)),
                ]
            )
    return _table(["", "mean norm of the gradient", "steps clipped", "runs"], rows)


def _interval(interval: Interval | None) -> str:
    if interval is None:
        return ""
    if interval.count == 1:
        return f"{interval.mean:.3f}"
    return f"{interval.mean:.3f} ± {interval.high - interval.mean:.3f}"


def _signed(interval: Interval) -> str:
    return f"{interval.mean:+.3f} ± {interval.high - interval.mean:.3f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

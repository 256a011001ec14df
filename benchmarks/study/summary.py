"""What the final pieces say: scores by variant, share and seed, and their comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.study.intervals import Interval, holm, mean_interval, paired_difference
from benchmarks.study.pieces import UNTRAINED, Piece
from benchmarks.study.settings import Study
from benchmarks.study.tuning import is_tuned, planned_finals

__all__ = [
    "Comparison",
    "chosen_finals",
    "comparisons",
    "score_interval",
    "scores_by_seed",
    "seeds_done",
]

Records = Mapping[Piece, Mapping[str, Any]]


class Comparison(NamedTuple):
    """One variant against another at one share.

    Attributes:
        variant: the one.
        other: the other.
        share: of the scenes.
        difference: of the one less the other.
        p: of no difference, after Holm's correction over all comparisons of a measure.
    """

    variant: str
    other: str
    share: float
    difference: Interval
    p: float


def chosen_finals(study: Study, records: Records) -> dict[Piece, Mapping[str, Any]]:
    """The final pieces with the settings that tuning chose; none before it is complete."""
    if not is_tuned(study, records):
        return {}
    return {piece: records[piece] for piece in planned_finals(study, records) if piece in records}


def seeds_done(study: Study, finals: Records, share: float) -> int:
    """How many seeds have every variant at a share."""
    there = [
        {piece.seed for piece in finals if (piece.variant, piece.share) == (variant, share)}
        for variant in study.variants
    ]
    return len(set.intersection(*there))


def scores_by_seed(
    study: Study,
    records: Records,
    variant: str,
    share: float,
    measure: str,
    layer: int | None = None,
) -> dict[int, float]:
    """A measure of the final pieces by seed, of the settings that tuning chose.

    Args:
        study: the study.
        records: of `chosen_finals`.
        variant: which; the untrained one is the same at all shares.
        share: of the scenes.
        measure: a name of ``scores``, or of ``training``.
        layer: which one, of a measure that has one number a layer.
    """
    found = {}
    for piece, record in records.items():
        if (piece.study, piece.role, piece.variant) != (study.name, "final", variant):
            continue
        if piece.share != share and variant != UNTRAINED:
            continue
        value = {**record["training"], **record["scores"]}[measure]
        found[piece.seed] = value if layer is None else value[layer]
    return dict(sorted(found.items()))


def score_interval(
    study: Study,
    records: Records,
    variant: str,
    share: float,
    measure: str,
    layer: int | None = None,
) -> Interval | None:
    """Its mean over the seeds; None where there is none."""
    values = scores_by_seed(study, records, variant, share, measure, layer)
    return mean_interval(list(values.values())) if values else None


def comparisons(
    study: Study,
    records: Records,
    measure: str,
    pairs: Sequence[tuple[str, str]],
    layers: Sequence[int | None] = (None,),
) -> list[Comparison]:
    """Differences at equal seed of all pairs of variants, at every share, and of every layer.

    Holm's correction is over all that is given back.
    """
    rows = []
    for share in study.shares:
        for variant, other in pairs:
            for layer in layers:
                ones = scores_by_seed(study, records, variant, share, measure, layer)
                twos = scores_by_seed(study, records, other, share, measure, layer)
                both = sorted(ones.keys() & twos.keys())
                if len(both) > 1:
                    difference = paired_difference(
                        [ones[seed] for seed in both], [twos[seed] for seed in both]
                    )
                    rows.append(Comparison(variant, other, share, difference, difference.p))
    corrected = holm([row.p for row in rows])
    return [row._replace(p=p) for row, p in zip(rows, corrected, strict=True)]

"""Which learning rate and temperature a variant gets: those best on validation scenes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from benchmarks.study.pieces import Piece, tuning_pieces
from benchmarks.study.settings import Study

__all__ = ["Choice", "choices", "criterion_table"]


class Choice(NamedTuple):
    """The settings of one variant, at all shares.

    Attributes:
        lr: learning rate.
        temp: temperature.
        value: mean of the criterion over the runs that were tuned on.
        at_edge: which of "lr" and "temp" are the largest or the smallest that were tried, the
            other being as it is.
    """

    lr: float
    temp: float
    value: float
    at_edge: tuple[str, ...]


def criterion_table(
    study: Study, records: Mapping[Piece, Mapping[str, Any]], variant: str
) -> dict[tuple[float, float], list[float]]:
    """By learning rate and temperature the criterion of each run that was tuned on, in order.

    The criterion is the plain mean of the study's measures, all of them shares in [0, 1].
    """
    table: dict[tuple[float, float], list[float]] = {}
    for piece in tuning_pieces(study):
        if piece.variant == variant:
            scores = records[piece]["scores"]
            value = sum(scores[name] for name in study.criterion) / len(study.criterion)
            table.setdefault((piece.lr, piece.temp), []).append(value)
    return table


def choices(study: Study, records: Mapping[Piece, Mapping[str, Any]]) -> dict[str, Choice]:
    """By variant the settings with the largest mean over the runs that were tuned on."""
    found = {}
    for variant in study.variants:
        table = {
            setting: sum(values) / len(values)
            for setting, values in criterion_table(study, records, variant).items()
        }
        lr, temp = max(table, key=lambda setting: table[setting])
        edges = (
            ("lr", lr, [rate for rate, other in study.tried if other == temp]),
            ("temp", temp, [other for rate, other in study.tried if rate == lr]),
        )
        at_edge = tuple(
            name
            for name, value, tried in edges
            if len(tried) > 1 and value in (min(tried), max(tried))
        )
        found[variant] = Choice(lr, temp, table[lr, temp], at_edge)
    return found

"""Which learning rate and temperature a variant gets: those best on validation scenes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.study.pieces import Piece, final_pieces
from benchmarks.study.settings import Study

__all__ = [
    "Choice",
    "choices",
    "criterion_table",
    "is_tuned",
    "planned_finals",
    "search",
    "tuning_pieces",
]

Records = Mapping[Piece, Mapping[str, Any]]


class Choice(NamedTuple):
    """The settings of one variant, at all shares.

    Attributes:
        lr: learning rate.
        temp: temperature.
        value: mean of the criterion over the runs that were tuned on.
        at_edge: which of "lr" and "temp" are the largest or the smallest that were tried.
    """

    lr: float
    temp: float
    value: float
    at_edge: tuple[str, ...]


def search(
    start: Sequence[float], value: Callable[[float], float | None], extensions: int
) -> tuple[list[float], float | None]:
    """Look for the best of some numbers, and further on while the best is at an end.

    Args:
        start: what is tried first.
        value: of a number; None where it is not known yet.
        extensions: twice the largest, or half the smallest, is added so many times at most.

    Returns:
        All that is to be tried as far as can be said, rising, and the best; None until all of
        them are known.

    Example:
        >>> search([1.0, 2.0], lambda number: -abs(number - 4.0), extensions=3)
        ([1.0, 2.0, 4.0, 8.0], 4.0)
        >>> search([1.0, 2.0], {1.0: 0.5, 2.0: 0.7}.get, extensions=3)
        ([1.0, 2.0, 4.0], None)
    """
    tried = sorted(start)
    for left in range(extensions, -1, -1):
        values = {number: value(number) for number in tried}
        known = {number: found for number, found in values.items() if found is not None}
        if len(known) < len(tried):
            return tried, None
        best = max(known, key=lambda number: known[number])
        if not left or tried[0] < best < tried[-1]:
            break
        # half of the smallest comes first in the table, as it is the smallest
        tried = [*tried, 2 * best] if best == tried[-1] else [best / 2, *tried]
    return tried, best


def tuning_pieces(study: Study, records: Records) -> list[Piece]:
    """All that is to be tried as far as the records tell: more of them may ask for more.

    Example:
        >>> from benchmarks.study.presets import PRESETS
        >>> study = PRESETS["smoke"].study("matching")
        >>> rates = {piece.lr for piece in tuning_pieces(study, {})}
        >>> rates == set(study.rates)  # temperatures wait for the best of these
        True
    """
    settings = [
        (variant, setting)
        for variant in study.variants
        for setting in _plan(study, records, variant)[0]
    ]
    return [
        Piece(study.name, "tune", variant, share, seed, lr, temp)
        for (share, seed), (variant, (lr, temp)) in itertools.product(study.tuned_on, settings)
    ]


def is_tuned(study: Study, records: Records) -> bool:
    """Whether nothing is left to be tried."""
    return all(_plan(study, records, variant)[1] is not None for variant in study.variants)


def criterion_table(
    study: Study, records: Records, variant: str
) -> dict[tuple[float, float], list[float]]:
    """By learning rate and temperature the criterion of each run that was tuned on, in order.

    The criterion is the plain mean of the study's measures, all of them shares in [0, 1].
    """
    return {
        setting: _values(study, records, variant, *setting)
        for setting in _plan(study, records, variant)[0]
    }


def choices(study: Study, records: Records) -> dict[str, Choice]:
    """By variant the settings with the largest mean over the runs that were tuned on.

    Raises:
        ValueError: the tuning is not complete.
    """
    found = {}
    for variant in study.variants:
        choice = _plan(study, records, variant)[1]
        if choice is None:
            raise ValueError(
                f"records of {study.name!r} do not have all tuning runs of {variant!r} yet; "
                "run the study until `is_tuned`"
            )
        found[variant] = choice
    return found


def planned_finals(study: Study, records: Records) -> list[Piece]:
    """Every final piece, with the settings that tuning chose.

    Raises:
        ValueError: the tuning is not complete.
    """
    chosen = {name: (best.lr, best.temp) for name, best in choices(study, records).items()}
    return final_pieces(study, chosen)


def _plan(
    study: Study, records: Records, variant: str
) -> tuple[list[tuple[float, float]], Choice | None]:
    """Settings to try: rates at the first temperature, then temperatures at the best rate."""

    def mean(lr: float, temp: float) -> float | None:
        values = _values(study, records, variant, lr, temp)
        return sum(values) / len(values) if len(values) == len(study.tuned_on) else None

    first = study.temps[0]
    rates, lr = search(study.rates, lambda rate: mean(rate, first), study.extensions)
    settings = [(rate, first) for rate in rates]
    if lr is None:
        return settings, None
    temps, temp = search(study.temps, lambda other: mean(lr, other), study.extensions)
    settings += [(lr, other) for other in temps if other != first]
    if temp is None:
        return settings, None
    value = mean(lr, temp)
    assert value is not None
    at_edge = tuple(
        name
        for name, chosen, tried in (("lr", lr, rates), ("temp", temp, temps))
        if len(tried) > 1 and chosen in (tried[0], tried[-1])
    )
    return settings, Choice(lr, temp, value, at_edge)


def _values(study: Study, records: Records, variant: str, lr: float, temp: float) -> list[float]:
    values = []
    for share, seed in study.tuned_on:
        record = records.get(Piece(study.name, "tune", variant, share, seed, lr, temp))
        if record is not None:
            scores = record["scores"]
            values.append(sum(scores[name] for name in study.criterion) / len(study.criterion))
    return values

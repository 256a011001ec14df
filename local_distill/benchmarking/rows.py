"""One measured way: what it took, and how that compares."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch

from local_distill.benchmarking.cases import Case, Way
from local_distill.benchmarking.machine import Rates
from local_distill.benchmarking.memory import peak_bytes
from local_distill.benchmarking.timing import Spread, device_clock, ratios, spread, take_turns

__all__ = ["OUT_OF_MEMORY", "Row", "measure_case"]

OUT_OF_MEMORY = "out of memory"


class Row(NamedTuple):
    """What was measured of one way of a case.

    Attributes:
        suite: the suite's name.
        case: the case's name.
        way: the way's name.
        reference: name of the way it is compared with.
        seconds: of one call; None where it failed.
        ratio: seconds over the reference's, of each repeat; None where either failed.
        peak_bytes: the most that a call has alive; None where it failed.
        peak_ratio: that over the reference's; None where either failed or the reference has none.
        flops: what the question takes, by formula; 0 where there is no formula.
        bytes: the same, of reading and writing.
        product_fraction: flops a second, of the machine's product rate; None without flops.
        bandwidth_fraction: bytes a second, of the machine's copy bandwidth.
        failed: why it could not be measured, or None.
    """

    suite: str
    case: str
    way: str
    reference: str
    seconds: Spread | None
    ratio: Spread | None
    peak_bytes: int | None
    peak_ratio: float | None
    flops: float
    bytes: float
    product_fraction: float | None
    bandwidth_fraction: float | None
    failed: str | None

    @property
    def key(self) -> tuple[str, str, str]:
        """What is one and the same row in two reports."""
        return self.suite, self.case, self.way


def measure_case(
    case: Case,
    rates: Rates,
    device: torch.device,
    *,
    repeats: int,
    least_seconds: float,
    after_turn: Callable[[], None] = lambda: None,
) -> list[Row]:
    """Try each way, time them in turns, and take their peak memory.

    A way that fails at its first call, or by the case's check, is reported as such and left out.
    """
    failed = dict(_first_calls(case.ways))
    if case.reference not in failed and case.check is not None:
        failed |= case.check() or {}
    ways = {name: way for name, way in case.ways.items() if name not in failed}
    taken = take_turns(
        ways,
        repeats=repeats,
        least_seconds=least_seconds,
        clock=device_clock(device),
        after_turn=after_turn,
    )
    peaks = {name: peak_bytes(way, device) for name, way in ways.items()}
    return [_row(case, name, taken, peaks, rates, failed.get(name)) for name in case.ways]


def _first_calls(ways: Mapping[str, Way]) -> Iterator[tuple[str, str]]:
    for name, way in ways.items():
        try:
            way()
        except Exception as error:
            yield name, _reason(error)


def _reason(error: Exception) -> str:
    said = str(error)
    if isinstance(error, torch.OutOfMemoryError) or re.search(r"can't allocate memory", said):
        return OUT_OF_MEMORY
    return f"{type(error).__name__}: {said.partition(chr(10))[0]}"[:200]


def _row(
    case: Case,
    name: str,
    taken: Mapping[str, list[float]],
    peaks: Mapping[str, int],
    rates: Rates,
    failed: str | None,
) -> Row:
    seconds = spread(taken[name]) if name in taken else None
    ratio = peak_ratio = product = bandwidth = None
    if name in taken and case.reference in taken:
        ratio = ratios(taken[name], taken[case.reference])
        if peaks[case.reference] > 0:
            peak_ratio = peaks[name] / peaks[case.reference]
    if seconds is not None:
        bandwidth = case.work.bytes / seconds.median / rates.copy_bytes
        if case.work.flops > 0:
            product = case.work.flops / seconds.median / rates.product_flops
    return Row(
        case.suite,
        case.name,
        name,
        case.reference,
        seconds,
        ratio,
        peaks.get(name),
        peak_ratio,
        case.work.flops,
        case.work.bytes,
        product,
        bandwidth,
        failed,
    )

"""Time: ways take turns, and are compared within each turn."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from local_distill._check import check_at_least
from local_distill.benchmarking.cases import Way
from local_distill.errors import ShapeError

__all__ = ["Clock", "Spread", "calls_to_fill", "device_clock", "ratios", "spread", "take_turns"]

_MOST_CALLS = 100_000
_SURELY = 20  # times the least time: a call as slow as that is not slow by chance


class Clock(NamedTuple):
    """How time is told: ``now`` in seconds, ``wait`` until the device has done what it was told."""

    now: Callable[[], float]
    wait: Callable[[], None]


def device_clock(device: torch.device) -> Clock:
    """Wall time; on CUDA the device is waited for."""
    if device.type == "cuda":
        return Clock(time.perf_counter, lambda: torch.cuda.synchronize(device))
    return Clock(time.perf_counter, lambda: None)


class Spread(NamedTuple):
    """The middle of some values, and what 10 % and 90 % of them lie below."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Median, 10 % and 90 %; between two values in proportion, never outside of them.

    Example:
        >>> spread([3.0, 1.0, 2.0])
        Spread(median=2.0, low=1.2, high=2.8)
    """
    if len(values) == 1:
        return Spread(*[float(values[0])] * 3)
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    median = statistics.median(values)
    # rounding may take them a last digit too far
    low = min(max(tenths[0], min(values)), median)
    return Spread(median, low, max(min(tenths[-1], max(values)), median))


def ratios(values: Sequence[float], reference: Sequence[float]) -> Spread:
    """The spread of each turn's value over the reference's of the same turn.

    Slow moments of the machine hit both, and fall out.

    Example:
        >>> ratios([1.0, 10.0, 1.0], [2.0, 20.0, 2.0])
        Spread(median=0.5, low=0.5, high=0.5)
    """
    if len(values) != len(reference):
        raise ShapeError(f"`values` has {len(values)} turns but `reference` has {len(reference)}")
    return spread([one / other for one, other in zip(values, reference, strict=True)])


def calls_to_fill(way: Way, least_seconds: float, clock: Clock) -> int:
    """How many calls, one straight after the other, take at least that long."""
    calls = 1
    if _seconds(way, calls, clock) > _SURELY * least_seconds:
        return calls
    # The first one may have been slow for what the way before it did to the caches.
    while True:
        taken = _seconds(way, calls, clock) * calls
        if taken >= least_seconds or calls >= _MOST_CALLS:
            return min(calls, _MOST_CALLS)
        # A little more than in proportion, and at most ten times as many at once.
        wanted = 1.1 * calls * least_seconds / taken if taken > 0 else 10 * calls
        calls = max(calls + 1, min(int(wanted), 10 * calls))


def take_turns(
    ways: Mapping[str, Way],
    *,
    repeats: int,
    least_seconds: float = 0.05,
    clock: Clock,
    after_turn: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Time each way once in every repeat, in an order drawn anew.

    Within a repeat a quick way is called as often as keeps it busy for ``least_seconds``, after a
    call that is not timed: it pays for the caches and the memory that the way before took away.
    What takes that long by one call is called once.

    Args:
        ways: what to time, already called once.
        repeats: how often each is timed, at least once.
        least_seconds: how long each is kept busy for within a repeat.
        clock: see `device_clock`.
        after_turn: called whenever a way has been timed.

    Returns:
        Seconds of a call, in each of the repeats, by way.

    Raises:
        ConfigError: less than one repeat.
    """
    check_at_least("repeats", repeats, 1)
    calls = {name: calls_to_fill(way, least_seconds, clock) for name, way in ways.items()}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    order = random.Random(0)
    for _ in range(repeats):
        for name in order.sample(list(ways), len(ways)):
            if calls[name] > 1:
                ways[name]()
            taken[name].append(_seconds(ways[name], calls[name], clock))
            after_turn()
    return taken


def _seconds(way: Way, calls: int, clock: Clock) -> float:
    """Of one call, the mean of these."""
    clock.wait()
    start = clock.now()
    for _ in range(calls):
        way()
    clock.wait()
    return (clock.now() - start) / calls

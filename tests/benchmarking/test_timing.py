"""The arithmetic of timing, by a clock that only the ways move."""

import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from local_distill.benchmarking.timing import (
    Clock,
    Spread,
    calls_to_fill,
    device_clock,
    ratios,
    spread,
    take_turns,
)
from local_distill.errors import ConfigError, ShapeError


class FakeTime:
    """A machine: ways take the seconds they say, at once or when they are waited for."""

    def __init__(self):
        self.seconds = self.pending = 0.0
        self.log = []
        self.clock = Clock(lambda: self.seconds, self.wait)

    def wait(self):
        self.seconds += self.pending
        self.pending = 0.0

    def way(self, name, seconds, *, later=False):
        """``seconds``: a number, or a function of how many calls there were before."""
        calls = []

        def run():
            taken = seconds(len(calls)) if callable(seconds) else seconds
            calls.append(taken)
            self.log.append(name)
            if later:
                self.pending += taken
            else:
                self.seconds += taken

        return run


def test_each_way_gets_its_own_seconds():
    time = FakeTime()
    ways = {"one": time.way("one", 1.0), "two": time.way("two", 2.5)}
    assert take_turns(ways, repeats=3, least_seconds=0.5, clock=time.clock) == {
        "one": [1.0] * 3,
        "two": [2.5] * 3,
    }


def test_every_way_has_one_turn_a_repeat_and_the_order_changes():
    time = FakeTime()
    names = list("abcd")
    ways = {name: time.way(name, 1.0) for name in names}
    take_turns(ways, repeats=8, least_seconds=0.5, clock=time.clock)
    log = time.log[-4 * 8 :]  # after the calls that find out how long each takes
    turns = [log[start : start + 4] for start in range(0, len(log), 4)]
    assert all(sorted(turn) == names for turn in turns)
    assert len({tuple(turn) for turn in turns}) > 3


def test_a_slow_moment_falls_out_of_the_ratio():
    time = FakeTime()
    moments = {"slow": 1.0}

    def seconds(base):
        return lambda _: base * moments["slow"]

    ways = {"plain": time.way("plain", seconds(1.0)), "ours": time.way("ours", seconds(0.25))}
    turns = []

    def after_turn():
        turns.append(None)
        moments["slow"] = 1.0 + len(turns) // 2  # another speed in every repeat

    taken = take_turns(ways, repeats=5, least_seconds=0.0, clock=time.clock, after_turn=after_turn)
    assert len(set(taken["plain"])) == 5
    assert ratios(taken["ours"], taken["plain"]) == Spread(0.25, 0.25, 0.25)


def test_a_quick_way_is_kept_busy_and_its_first_call_is_not_counted():
    time = FakeTime()

    def seconds(_):  # the call after another way's turn finds cold caches
        cold = len(time.log) == 0 or time.log[-1] != "quick"
        return 0.5 if cold else 0.01

    ways = {"quick": time.way("quick", seconds), "other": time.way("other", 1.0)}
    taken = take_turns(ways, repeats=4, least_seconds=0.1, clock=time.clock)
    assert taken["quick"] == pytest.approx([0.01] * 4)
    runs = "".join("q" if name == "quick" else " " for name in time.log).split()
    assert min(len(run) for run in runs[1:]) >= 10


def test_what_a_device_does_later_is_counted():
    time = FakeTime()
    ways = {"now": time.way("now", 1.0), "later": time.way("later", 2.0, later=True)}
    taken = take_turns(ways, repeats=2, least_seconds=0.1, clock=time.clock)
    assert taken == {"now": [1.0, 1.0], "later": [2.0, 2.0]}


@pytest.mark.parametrize(
    ("seconds", "least", "wanted"),
    [(1.0, 0.5, 1), (0.03125, 0.25, 8), (0.0009765625, 0.25, 256)],
)
def test_calls_to_fill_reaches_the_time_and_not_much_more(seconds, least, wanted):
    time = FakeTime()
    calls = calls_to_fill(time.way("it", seconds), least, time.clock)
    assert wanted <= calls <= 1.5 * wanted + 1


def test_calls_to_fill_ends_where_nothing_takes_time():
    time = FakeTime()
    assert 1 <= calls_to_fill(time.way("it", 0.0), 1.0, time.clock) <= 1_000_000


def test_a_single_value_has_no_spread():
    assert spread([2.0]) == Spread(2.0, 2.0, 2.0)


@given(st.lists(st.floats(1e-9, 1e3), min_size=1, max_size=30))
def test_the_spread_lies_within_the_values(values):
    found = spread(values)
    assert min(values) <= found.low <= found.median <= found.high <= max(values)
    assert found.median == statistics.median(values)


def test_ten_percent_lie_below_low_and_above_high():
    found = spread([float(value) for value in range(101)])
    assert found == Spread(50.0, 10.0, 90.0)


def test_ratios_need_the_same_repeats():
    with pytest.raises(ShapeError, match=r"`values` has 2 turns but `reference` has 3"):
        ratios([1.0, 2.0], [1.0, 2.0, 3.0])


def test_no_repeat_is_refused():
    with pytest.raises(ConfigError, match="repeats"):
        take_turns({}, repeats=0, clock=device_clock(torch.device("cpu")))


def test_the_real_clock_goes_on():
    clock = device_clock(torch.device("cpu"))
    before = clock.now()
    clock.wait()
    assert clock.now() >= before

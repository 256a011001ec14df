import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from local_distill import schedules
from local_distill.errors import ConfigError

VALUES = st.floats(-10, 10)


@given(st.integers(0, 200), VALUES, VALUES, st.integers(1, 100))
def test_both_go_from_start_to_end_and_stay(step, start, end, total):
    for schedule in (schedules.linear, schedules.cosine):
        assert schedule(0, start=start, end=end, total=total) == pytest.approx(start)
        assert schedule(total, start=start, end=end, total=total) == pytest.approx(end)
        value = schedule(step, start=start, end=end, total=total)
        assert min(start, end) - 1e-9 <= value <= max(start, end) + 1e-9
        if step >= total:
            assert value == pytest.approx(end)


@given(st.integers(0, 99))
def test_cosine_is_dinos(step):
    # DINO's scheduler: final + (base - final)/2 · (1 + cos(π·i / n)) over n steps
    wanted = 1.0 + 0.5 * (0.996 - 1.0) * (1 + math.cos(math.pi * step / 100))
    assert schedules.cosine(step, start=0.996, end=1.0, total=100) == pytest.approx(wanted)


@given(st.integers(0, 300), st.integers(0, 50), st.integers(50, 200))
def test_warmup_then_cosine(step, warmup, total):
    value = schedules.warmup_cosine(step, peak=2.0, end=0.5, warmup=warmup, total=total)
    if step < warmup:
        assert value == pytest.approx(2.0 * step / warmup)
    elif step >= total:
        assert value == pytest.approx(0.5)
    else:
        share = (step - warmup) / (total - warmup)
        assert value == pytest.approx(0.5 + 1.5 * (1 + math.cos(math.pi * share)) / 2)


def test_bad_steps_are_refused():
    with pytest.raises(ConfigError, match="`step`"):
        schedules.linear(-1, start=0, end=1, total=3)
    with pytest.raises(ConfigError, match="`total`"):
        schedules.cosine(1, start=0, end=1, total=math.nan)
    with pytest.raises(ConfigError, match="`warmup`"):
        schedules.warmup_cosine(1, peak=1, end=0, warmup=9, total=5)

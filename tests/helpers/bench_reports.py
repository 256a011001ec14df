"""Reports of benchmarks that nobody measured."""

from local_distill.benchmarking.machine import Machine, Rates
from local_distill.benchmarking.report import Report
from local_distill.benchmarking.rows import Row
from local_distill.benchmarking.timing import Spread

SETTINGS = {
    "sizes": None,
    "batch": 2,
    "prototypes": 8,
    "device": "cpu",
    "dtype": "float32",
    "matchers": [],
    "repeats": 3,
    "least_seconds": 0.0,
    "quick": True,
}
MACHINE = Machine("abacus", 2, 1, "cpu", "Linux x86_64", 0.5, "3.12.0", "2.15.0")


def row(way, ratio=1.0, *, case="a case", memory=1.0, reference="plain", seconds=0.25):
    around = Spread(ratio, ratio * 0.9, ratio * 1.1)
    time = Spread(seconds, seconds * 0.9, seconds * 1.1)
    measured = (time, around, 4096, memory)
    return Row("matchers", case, way, reference, *measured, 1e9, 1e8, 0.5, 0.25, None)


def failed_row(way, reason="RuntimeError: no"):
    nothing = (None,) * 4
    return Row("matchers", "a case", way, "plain", *nothing, 1e9, 1e8, None, None, reason)


def report(*rows, machine=MACHINE, **settings):
    return Report(
        "matchers",
        "2026-01-01T00:00:00+00:00",
        "0.1.0",
        {**SETTINGS, **settings},
        machine,
        Rates(1e10, 1e11),
        {"kornia": None, "lightly": "1.6.0"},
        list(rows),
    )

"""Benchmarks: the command ``local-distill bench`` and its parts.

A suite is a function from `Settings` to `Case`s, each of one question and the ways of answering it;
the ways take turns, and are compared with a plain reference in the same turn. Core dependencies
alone; tqdm, matplotlib and other libraries are used where they are installed.
"""

from local_distill.benchmarking.cases import Case, Settings, Work
from local_distill.benchmarking.comparing import compare_reports
from local_distill.benchmarking.machine import measure_rates
from local_distill.benchmarking.memory import peak_bytes
from local_distill.benchmarking.report import Report, read_report, write_report
from local_distill.benchmarking.rows import Row, measure_case
from local_distill.benchmarking.sizes import SIZES, Size, Step, step
from local_distill.benchmarking.timing import Clock, Spread, device_clock, take_turns

__all__ = [
    "SIZES",
    "Case",
    "Clock",
    "Report",
    "Row",
    "Settings",
    "Size",
    "Spread",
    "Step",
    "Work",
    "compare_reports",
    "device_clock",
    "measure_case",
    "measure_rates",
    "peak_bytes",
    "read_report",
    "step",
    "take_turns",
    "write_report",
]

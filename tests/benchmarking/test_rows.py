"""A case becomes rows: numbers, fractions, failures."""

import pytest
import torch

from local_distill.benchmarking.cases import Case, Work
from local_distill.benchmarking.machine import Rates, describe_machine, measure_rates
from local_distill.benchmarking.memory import peak_bytes
from local_distill.benchmarking.rows import OUT_OF_MEMORY, measure_case
from local_distill.benchmarking.table import case_table, headline
from local_distill.errors import DataError

CPU = torch.device("cpu")
RATES = Rates(copy_bytes=1e9, product_flops=1e10)


def measured(ways, work=None, check=None):
    case = Case("suite", "case", ways, "plain", work or Work(1e6, 1e5), check)
    return measure_case(case, RATES, CPU, repeats=3, least_seconds=0.0)


def test_fractions_are_of_the_measured_rates():
    plain, ours = measured({"plain": lambda: torch.ones(64), "ours": lambda: torch.ones(128)})
    for row in (plain, ours):
        seconds = row.seconds.median
        assert row.bandwidth_fraction == pytest.approx(1e5 / seconds / 1e9)
        assert row.product_fraction == pytest.approx(1e6 / seconds / 1e10)
    assert plain.ratio == (1.0, 1.0, 1.0)
    assert (plain.peak_bytes, ours.peak_bytes, ours.peak_ratio) == (256, 512, 2.0)


def test_without_flops_there_is_no_product_fraction():
    (row,) = measured({"plain": lambda: None}, Work(0.0, 1e5))
    assert row.product_fraction is None
    assert row.peak_bytes == 0
    assert row.peak_ratio is None  # over nothing


def refuse():
    raise RuntimeError("no such luck\nand a long story")


def exhaust():
    raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")


def test_a_way_that_fails_is_said_and_the_others_are_measured():
    plain, broken, large = measured({"plain": lambda: 1, "broken": refuse, "large": exhaust})
    assert plain.seconds is not None
    assert (broken.seconds, broken.ratio, broken.peak_bytes) == (None, None, None)
    assert broken.failed == "RuntimeError: no such luck"
    assert large.failed == OUT_OF_MEMORY
    table = case_table([plain, broken, large])
    assert "not measured: RuntimeError: no such luck" in table
    assert "* plain" in table


def test_without_its_reference_a_way_has_no_ratio():
    _, ours = measured({"plain": refuse, "ours": lambda: 1})
    assert ours.seconds is not None
    assert ours.ratio is None
    assert "ours" in case_table([ours])


def test_the_check_comes_before_the_timing():
    calls = []

    def check():
        raise DataError("the ways do not agree")

    with pytest.raises(DataError, match="do not agree"):
        measured({"plain": lambda: calls.append(1)}, check=check)
    assert len(calls) == 1


def test_a_way_that_does_not_agree_is_not_timed():
    calls = []
    ways = {"plain": lambda: 1, "wrong": lambda: calls.append(1)}
    plain, wrong = measured(ways, check=lambda: {"wrong": "gives 2, plain 1"})
    assert len(calls) == 1  # the first call alone
    assert (wrong.seconds, wrong.failed) == (None, "gives 2, plain 1")
    assert plain.seconds is not None


def test_peak_memory_is_the_most_that_is_alive():
    def run():
        first = torch.ones(1000)  # 4,000 bytes
        second = first.clone()  # 8,000 alive
        del first
        return torch.cat((second, second))  # 4,000 and 8,000 more

    assert peak_bytes(run, CPU) == 12_000


def test_what_was_there_before_does_not_count():
    kept = torch.ones(100_000)
    assert peak_bytes(lambda: kept[:10].clone(), CPU) == 40


def test_the_machine_is_described_without_names():
    machine = describe_machine(CPU)
    assert machine.device == "cpu"
    assert machine.processor
    assert machine.cores >= 1
    assert machine.threads == torch.get_num_threads()
    assert torch.__version__ in headline(machine, RATES)
    assert "10 GFLOP/s" in headline(machine, RATES)


def test_rates_are_measured():
    rates = measure_rates(CPU, torch.float32, repeats=1, quick=True)
    assert rates.copy_bytes > 1e7
    assert rates.product_flops > 1e7

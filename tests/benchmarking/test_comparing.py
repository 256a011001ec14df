"""Two reports: what got worse, what is the same, what only one of them has."""

import pytest
from helpers.bench_reports import MACHINE, failed_row, report, row

from local_distill.benchmarking.command import main
from local_distill.benchmarking.comparing import compare_reports
from local_distill.benchmarking.report import write_report
from local_distill.errors import ConfigError, DataError


def compared(tmp_path, before, after, *more):
    paths = []
    for name, made in (("before", before), ("after", after)):
        paths.append(str(tmp_path / f"{name}.json"))
        write_report(made, paths[-1])
    return main(["compare", *paths, *more])


def test_the_same_report_is_no_regression(tmp_path, capsys):
    made = report(row("plain"), row("ours", 0.5))
    assert compared(tmp_path, made, made) == 0
    assert "none of 1 rows is worse than 1.25 times" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("ratio", "memory", "status", "said"),
    [
        (0.624, 1.0, 0, "none of 1"),
        (0.626, 1.0, 1, "WORSE: time"),
        (0.1, 1.26, 1, "WORSE: memory"),
        (0.7, 1.3, 1, "WORSE: time and memory"),
        (0.1, 0.1, 0, "none of 1"),
    ],
)
def test_a_ratio_beyond_the_tolerance_is(tmp_path, capsys, ratio, memory, status, said):
    before = report(row("plain"), row("ours", 0.5))
    after = report(row("plain"), row("ours", ratio, memory=memory))
    assert compared(tmp_path, before, after) == status
    assert said in capsys.readouterr().out


def test_the_tolerance_is_the_callers(tmp_path):
    before, after = (report(row("plain"), row("ours", ratio)) for ratio in (0.5, 0.9))
    assert compared(tmp_path, before, after, "--tolerance", "2") == 0
    assert compared(tmp_path, before, after, "--tolerance", "1.7") == 1


def test_seconds_do_not_count(tmp_path):
    before = report(row("plain", seconds=1.0), row("ours", 0.5, seconds=0.5))
    after = report(row("plain", seconds=9.0), row("ours", 0.5, seconds=4.5))
    assert compared(tmp_path, before, after) == 0


def test_what_only_one_has_is_said(tmp_path, capsys):
    before = report(row("plain"), row("ours", 0.5), row("old", 0.5), row("broken", 2.0))
    after = report(row("plain"), row("ours", 0.5), row("new", 9.0), failed_row("broken"))
    assert compared(tmp_path, before, after) == 0
    text = capsys.readouterr().out
    assert "only in the first: matchers / a case / old (of plain)" in text
    assert "only in the first: matchers / a case / broken (of plain)" in text
    assert "only in the second: matchers / a case / new (of plain)" in text


def test_another_reference_is_another_row():
    before = report(row("plain"), row("ours", 0.5), row("own", 1.0))
    after = report(row("plain"), row("ours", 0.5, reference="other"), row("own", 1.0))
    found = compare_reports(before, after)
    assert [change.name for change in found.changes] == ["a case / own"]
    assert (len(found.only_before), len(found.only_after)) == (1, 1)


def test_other_settings_and_machines_are_noted(tmp_path, capsys):
    before = report(row("plain"), row("ours"))
    after = report(row("plain"), row("ours"), batch=4, machine=MACHINE._replace(threads=2, load=9))
    assert compared(tmp_path, before, after) == 0
    text = capsys.readouterr().out
    assert "settings: batch was 2, is 4" in text
    assert "machine: threads was 1, is 2" in text
    assert "load" not in text


def test_bad_input_is_neither_a_pass_nor_a_regression(tmp_path, capsys):
    good = report(row("plain"), row("ours"))
    assert compared(tmp_path, good, report(row("plain"), row("theirs"))) == 2
    assert "no measured row in common" in capsys.readouterr().err
    assert compared(tmp_path, good, good, "--tolerance", "0.5") == 2
    (tmp_path / "after.json").write_text("{")
    assert main(["compare", str(tmp_path / "before.json"), str(tmp_path / "after.json")]) == 2
    assert main(["compare", str(tmp_path / "before.json"), str(tmp_path / "none.json")]) == 2
    text = capsys.readouterr().err
    assert text.count("error: ") == 3
    assert len(text.splitlines()) == 3


def test_bad_arguments_raise_from_python():
    good = report(row("plain"), row("ours"))
    with pytest.raises(ConfigError, match="tolerance"):
        compare_reports(good, good, tolerance=float("nan"))
    with pytest.raises(DataError, match="nothing to compare"):
        compare_reports(report(row("plain")), report(row("plain")))

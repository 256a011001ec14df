"""Reports are written and read back; what is no report, or another's, is refused in words."""

import json

import pytest
from helpers.bench_reports import failed_row, report, row

from local_distill.benchmarking.report import read_report, write_report
from local_distill.benchmarking.schema import check_against, report_schema
from local_distill.errors import DataError


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "report.json"
    write_report(report(row("plain"), row("ours", 0.5), failed_row("theirs")), path)
    return path


def test_what_was_written_is_read(written):
    wanted = report(row("plain"), row("ours", 0.5), failed_row("theirs"))
    assert read_report(written) == wanted
    assert [path.name for path in written.parent.iterdir()] == ["report.json"]


def test_the_schema_describes_every_field():
    schema = report_schema()
    made = report(row("plain")).to_json()
    assert list(schema["properties"]) == list(made)
    assert list(schema["$defs"]["row"]["properties"]) == list(made["rows"][0])
    for part in ("settings", "machine", "rates"):
        assert set(schema["properties"][part]["properties"]) == set(made[part])


def changed(path, *keys, value):
    data = json.loads(path.read_text())
    place = data
    for key in keys[:-1]:
        place = place[key]
    if value is ...:
        del place[keys[-1]]
    else:
        place[keys[-1]] = value
    path.write_text(json.dumps(data))
    return path


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("schema_version",), 2, r"schema version 2, this reads 1.*measure again"),
        (("schema_version",), ..., r"schema version None, this reads 1"),
        (("schema",), "else", r"is no report of `local-distill bench`"),
        (("rows",), ..., r"report has no `rows`"),
        (("rows", 1, "seconds", "median"), "fast", r"report.rows\[1\].seconds.median is 'fast'"),
        (("rows", 1, "seconds", "median"), -1.0, r"median is -1.0, wanted at least 0"),
        (("rows", 1, "seconds", "median"), float("nan"), r"median is nan, wanted a finite number"),
        (("rows", 1, "seconds"), ..., r"report.rows\[1\] has no `seconds`"),
        (("rows", 1, "speed"), 3, r"report.rows\[1\] has a field `speed`"),
        (("rows", 1, "peak_bytes"), True, r"peak_bytes is True, wanted integer or null"),
        (("rows", 1, "way"), "plain", r"two rows of matchers / a case / plain"),
        (("rates", "copy_bytes"), 0, r"copy_bytes is 0, wanted above 0"),
        (("settings", "batch"), 0, r"settings.batch is 0, wanted at least 1"),
        (("libraries", "kornia"), 3, r"libraries.kornia is 3, wanted string or null"),
        (("rows",), {}, r"report.rows is \{\}, wanted array"),
    ],
)
def test_a_changed_file_is_refused(written, keys, value, message):
    with pytest.raises(DataError, match=message) as raised:
        read_report(changed(written, *keys, value=value))
    assert str(written) in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is no JSON"), ("[1]", "is no report"), ("", "is no JSON"), ("null", "is no report")],
)
def test_a_broken_file_is_refused(tmp_path, text, message):
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_report(path)


def test_no_file_and_no_text_are_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_report(tmp_path / "none.json")
    path = tmp_path / "picture.json"
    path.write_bytes(b"\x89PNG\xff")
    with pytest.raises(DataError, match="is no JSON"):
        read_report(path)


def test_a_number_that_json_cannot_say_is_not_written(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("what was there")
    with pytest.raises(DataError, match="finite"):
        write_report(report(row("plain", float("inf"))), path)
    assert path.read_text() == "what was there"


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "integer"}, 3, 3.5),
        ({"type": "number"}, 3, False),
        ({"type": ["string", "null"]}, None, 1),
        ({"const": "a"}, "a", "b"),
        ({"type": "object", "additionalProperties": {"type": "null"}}, {"a": None}, {"a": 1}),
        ({"anyOf": [{"type": "null"}, {"type": "string"}]}, "a", 1),
    ],
)
def test_the_checker_of_schemas(schema, good, bad):
    check_against(schema, good)
    with pytest.raises(DataError, match="wanted"):
        check_against(schema, bad)

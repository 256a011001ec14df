"""The page about the schema has every field of it."""

from pathlib import Path

import pytest

from local_distill.benchmarking.schema import SCHEMA_VERSION, report_schema

PAGE = (Path(__file__).parents[2] / "docs/benchmarks/schema.md").read_text("utf-8")
PARTS = {
    "The report": report_schema()["properties"],
    **{
        part: report_schema()["properties"][part]["properties"]
        for part in ("settings", "machine", "rates")
    },
    "rows": report_schema()["$defs"]["row"]["properties"],
}


@pytest.mark.parametrize("part", PARTS)
def test_every_field_is_on_the_page(part):
    section = PAGE.partition(f"## {part}\n")[2].partition("\n## ")[0]
    named = [line.split("`")[1] for line in section.splitlines() if line.startswith("| `")]
    assert named == list(PARTS[part])


def test_the_page_names_the_version():
    assert f"`schema_version` is {SCHEMA_VERSION}." in PAGE
    assert report_schema()["properties"]["schema_version"]["const"] == SCHEMA_VERSION

"""A report: everything one run found, written as JSON and read back."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from local_distill.benchmarking.cases import Settings
from local_distill.benchmarking.machine import Machine, Rates
from local_distill.benchmarking.rows import Row
from local_distill.benchmarking.schema import SCHEMA_VERSION, check_against, report_schema
from local_distill.benchmarking.timing import Spread
from local_distill.errors import DataError

__all__ = ["Report", "describe_settings", "now", "read_report", "write_report"]

_KIND = "local_distill.benchmark"


class Report(NamedTuple):
    """What one run found; the fields are those of ``schema.json``."""

    suite: str
    created: str
    local_distill: str
    settings: dict[str, Any]
    machine: Machine
    rates: Rates
    libraries: dict[str, str | None]
    rows: list[Row]

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists."""
        return {
            "schema": _KIND,
            "schema_version": SCHEMA_VERSION,
            **self._asdict(),
            "machine": self.machine._asdict(),
            "rates": self.rates._asdict(),
            "rows": [_row_to_json(row) for row in self.rows],
        }


def now() -> str:
    """UTC, ISO 8601, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def describe_settings(settings: Settings, repeats: int, least_seconds: float) -> dict[str, Any]:
    """The settings as JSON has them."""
    return {
        "sizes": None if settings.sizes is None else list(settings.sizes),
        "batch": settings.batch,
        "prototypes": settings.prototypes,
        "device": str(settings.device),
        "dtype": str(settings.dtype).removeprefix("torch."),
        "matchers": list(settings.matchers),
        "repeats": repeats,
        "least_seconds": least_seconds,
        "quick": settings.quick,
    }


def write_report(report: Report, path: str | Path) -> None:
    """Write it as JSON, in place of what is there; checked against the schema first.

    Raises:
        DataError: a number that JSON cannot say, or a report that the schema does not allow.
    """
    data = report.to_json()
    check_against(report_schema(), json.loads(json.dumps(data)))
    text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    part.write_text(f"{text}\n", "utf-8")
    part.replace(path)


def read_report(path: str | Path) -> Report:
    """Read back what `write_report` wrote.

    Raises:
        DataError: no such file, no JSON, no report, one of another schema version, or a broken one.
    """
    try:
        data = json.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # of JSON and of UTF-8
        raise DataError(f"{path} is no JSON: {error}") from error
    if not isinstance(data, dict) or data.get("schema") != _KIND:
        raise DataError(f"{path} is no report of `local-distill bench`")
    version = data.get("schema_version")
    if version != SCHEMA_VERSION:
        raise DataError(
            f"{path} has schema version {version}, this reads {SCHEMA_VERSION}: measure again, or "
            f"use the local_distill that wrote it ({data.get('local_distill')})"
        )
    try:
        check_against(report_schema(), data)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    fields = {name: data[name] for name in Report._fields}
    fields["machine"] = Machine(**data["machine"])
    fields["rates"] = Rates(**data["rates"])
    fields["rows"] = [_row_from_json(row) for row in data["rows"]]
    _check_keys(path, fields["rows"])
    return Report(**fields)


def _check_keys(path: str | Path, rows: Sequence[Row]) -> None:
    seen = set()
    for row in rows:
        if row.key in seen:
            raise DataError(f"{path}: two rows of {' / '.join(row.key)}")
        seen.add(row.key)


def _row_to_json(row: Row) -> dict[str, Any]:
    values = row._asdict()
    for name in ("seconds", "ratio"):
        values[name] = None if values[name] is None else values[name]._asdict()
    return values


def _row_from_json(values: dict[str, Any]) -> Row:
    values = dict(values)
    for name in ("seconds", "ratio"):
        values[name] = None if values[name] is None else Spread(**values[name])
    return Row(**values)

"""The written form of a report, and whether some JSON has it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from local_distill.errors import DataError

__all__ = ["SCHEMA_VERSION", "check_against", "report_schema"]

SCHEMA_VERSION = 1

_TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "number": (int, float),
    "integer": int,
    "boolean": bool,
    "null": type(None),
}


def report_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of a report, from ``schema.json`` beside this file."""
    text = (Path(__file__).parent / "schema.json").read_text("utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def check_against(schema: Mapping[str, Any], value: object, place: str = "report") -> None:
    """Refuse what does not fit; knows the part of JSON Schema that ``schema.json`` uses.

    Raises:
        DataError: the message says where, what came and what was wanted.

    Example:
        >>> check_against({"type": "array", "items": {"type": "number"}}, [1, "2"])
        Traceback (most recent call last):
        ...
        local_distill.errors.DataError: report[1] is '2', wanted number
    """
    _check(schema, value, place, schema)


def _check(schema: Mapping[str, Any], value: object, place: str, root: Mapping[str, Any]) -> None:
    if "$ref" in schema:
        _check(root["$defs"][schema["$ref"].rpartition("/")[2]], value, place, root)
        return
    if "anyOf" in schema:
        _check_any(schema["anyOf"], value, place, root)
        return
    if "const" in schema and value != schema["const"]:
        raise DataError(f"{place} is {_short(value)}, wanted {schema['const']!r}")
    wanted = schema.get("type", list(_TYPES))
    kinds = [wanted] if isinstance(wanted, str) else wanted
    if not any(_is(kind, value) for kind in kinds):
        raise DataError(f"{place} is {_short(value)}, wanted {' or '.join(kinds)}")
    if isinstance(value, int | float) and not isinstance(value, bool):
        _check_number(schema, value, place)
    if isinstance(value, list) and "items" in schema:
        for number, item in enumerate(value):
            _check(schema["items"], item, f"{place}[{number}]", root)
    if isinstance(value, dict):
        _check_fields(schema, value, place, root)


def _check_any(
    schemas: list[Mapping[str, Any]], value: object, place: str, root: Mapping[str, Any]
) -> None:
    *others, last = schemas
    for schema in others:
        try:
            _check(schema, value, place, root)
        except DataError:
            continue
        return
    _check(last, value, place, root)  # the one that says most of what is wrong


def _check_number(schema: Mapping[str, Any], value: float, place: str) -> None:
    if not math.isfinite(value):
        raise DataError(f"{place} is {value}, wanted a finite number")
    if value < schema.get("minimum", -math.inf):
        raise DataError(f"{place} is {value}, wanted at least {schema['minimum']}")
    if value <= schema.get("exclusiveMinimum", -math.inf):
        raise DataError(f"{place} is {value}, wanted above {schema['exclusiveMinimum']}")


def _check_fields(
    schema: Mapping[str, Any], value: Mapping[str, Any], place: str, root: Mapping[str, Any]
) -> None:
    missing = [name for name in schema.get("required", []) if name not in value]
    if missing:
        raise DataError(f"{place} has no `{missing[0]}`")
    fields = schema.get("properties", {})
    rest = schema.get("additionalProperties", True)
    for name, item in value.items():
        if name in fields:
            _check(fields[name], item, f"{place}.{name}", root)
        elif rest is False:
            raise DataError(f"{place} has a field `{name}` that the schema does not know")
        elif isinstance(rest, dict):
            _check(rest, item, f"{place}.{name}", root)


def _is(kind: str, value: object) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    return isinstance(value, _TYPES[kind])


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."

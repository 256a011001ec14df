"""Any JSON of results as tables and curves: numbers by name, rows of them, one a layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeGuard

from local_distill.training.report.curves import LINE_COLORS, Curve, curve_svg
from local_distill.training.report.html import number_text, table, text
from local_distill.training.report.read_run import is_number

__all__ = ["evaluation_html", "is_numbers", "legend", "side_by_side"]

# Lists longer than this are not results a reader wants to see number by number.
_LONGEST = 64


def evaluation_html(value: Any, *, depth: int = 4) -> str:
    """Show results of any shape.

    What `local-distill eval` writes has a form of its own. Else numbers and texts of one level
    become a table of two columns; mappings and lists of mappings with the same kind of content
    become the rows of one table; lists of numbers become curves (and a table), taken as one number
    a layer.

    Args:
        value: what was in the JSON file.
        depth: deeper levels are written as JSON names them, with dots.

    Example:
        >>> html = evaluation_html({"knn": 0.5, "layers": {"knn": [0.2, 0.5]}})
        >>> "<svg" in html, "0.5" in html
        (True, True)
    """
    if not _is_record(value):
        return "".join(_parts(value, depth))
    rest = {key: cell for key, cell in value.items() if key not in ("numbers", "layers")}
    about = "".join(_parts(rest, depth))
    layers = {"by layer": value["layers"]} if value.get("layers") else {}
    return (
        f'<div class="result"><div>{_measures({"value": value["numbers"]})}</div>'
        f"<div>{''.join(_parts(layers, depth - 1))}</div></div>"
        + (f"<details><summary>settings and counts</summary>{about}</details>" if about else "")
    )


def side_by_side(evaluations: Mapping[str, Any]) -> str:
    """One table of all results of `local-distill eval`, a column each; empty for fewer than two."""
    records = {name: value["numbers"] for name, value in evaluations.items() if _is_record(value)}
    return f"<h3>Side by side</h3>{_measures(records)}" if len(records) > 1 else ""


def _is_record(value: Any) -> bool:
    """Whether this is what `local-distill eval` writes: "task/measure" → number under "numbers"."""
    return isinstance(value, Mapping) and isinstance(value.get("numbers"), Mapping)


def _measures(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """Rows of task and measure; for one column also what would be scored without features.

    Such levels have names of their own: "knn/majority", "dense/majority_miou",
    "correspondence/same_place_median". Numbers by layer are left to their curve.
    """
    names = list(dict.fromkeys(key for numbers in columns.values() for key in numbers))
    shown = [key for key in names if not key.startswith("layers/") and not _is_level(key)]
    one = next(iter(columns.values())) if len(columns) == 1 else {}
    beside = {
        title: {key: next((n for n in candidates(key) if n in one), None) for key in shown}
        for title, candidates in _LEVELS.items()
    }
    beside = {title: found for title, found in beside.items() if any(found.values())}
    rows = []
    for key in shown:
        task, _, measure = key.rpartition("/")
        cells = [numbers.get(key) for numbers in columns.values()]
        levels = [one.get(found[key] or "", "") for found in beside.values()]
        rows.append([task, measure.replace("_", " "), *cells, *levels])
    return table(["task", "measure", *columns, *beside], rows, labels=2)


def _is_level(key: str) -> bool:
    return key.rpartition("/")[2].startswith(("majority", "chance_", "same_place_"))


def _no_features(key: str) -> list[str]:
    task, _, measure = key.rpartition("/")
    found = [f"{task}/majority_{measure}", f"{task}/chance_{measure}"]
    # the commonest class is no level of a regularisation's strength
    return found if measure.endswith(("_train", "_strength")) else [*found, f"{task}/majority"]


def _same_place(key: str) -> list[str]:
    task, _, measure = key.rpartition("/")
    return [f"{task}/same_place_{measure}"]


# What knowing nothing, and what taking the token at the same place of the view, would score.
_LEVELS = {"without features": _no_features, "same place": _same_place}


def _parts(value: Any, depth: int) -> Iterator[str]:
    if isinstance(value, list) and not is_numbers(value):
        if value and all(isinstance(row, Mapping) for row in value):
            yield from _rows([(str(i), row) for i, row in enumerate(value)], depth, numbered=True)
        else:
            yield table(["", "value"], [(i, _plain(cell)) for i, cell in enumerate(value)])
        return
    if not isinstance(value, Mapping):
        value = {"value": value}
    plain = [(name, cell) for name, cell in value.items() if not isinstance(cell, (Mapping, list))]
    lists = {name: cell for name, cell in value.items() if is_numbers(cell)}
    rows = {
        name: cell
        for name, cell in value.items()
        if isinstance(cell, Mapping) and cell and all(map(_is_cell, cell.values()))
    }
    done = {name for name, _ in plain} | lists.keys() | rows.keys()
    if plain:
        yield table(["", "value"], plain, kind="pairs")
    if len(rows) == 1:
        name, row = next(iter(rows.items()))
        yield _heading(name, depth) + table(["", "value"], row.items(), kind="pairs")
    elif rows:
        yield from _rows(list(rows.items()), depth)
    yield from _curves(lists)
    for name, cell in value.items():
        if name in done or cell in ({}, []):
            continue
        if depth <= 0:
            yield table(["", "value"], [(name, _plain(cell))])
        else:
            yield _heading(name, depth) + "".join(_parts(cell, depth - 1))


def _rows(
    rows: Sequence[tuple[str, Mapping[str, Any]]], depth: int, *, numbered: bool = False
) -> Iterator[str]:
    columns = list(
        dict.fromkeys(name for _, row in rows for name, cell in row.items() if _is_cell(cell))
    )
    # texts to the left, numbers to the right
    words = [c for c in columns if any(isinstance(row.get(c), str) for _, row in rows)]
    order = words + [c for c in columns if c not in words]
    head = order if numbered else ["", *order]
    body = [
        ([] if numbered else [name]) + [row.get(column, "") for column in order]
        for name, row in rows
    ]
    yield table(head, body, labels=len(head) - len(order) + len(words))
    x = next((c for c in ("layer", "depth", "step") if c in columns and c not in words), None)
    others = [c for c in columns if c not in (x, *words)]
    if x is not None and others and len(rows) > 1:
        points = {c: [(row.get(x), row.get(c)) for _, row in rows] for c in others}
        curves = [Curve(c, sorted(filter(_is_point, pairs))) for c, pairs in points.items()]
        yield _chart([curve for curve in curves if len(curve.points) > 1], x)
    for name, row in rows:
        deeper = {key: cell for key, cell in row.items() if not _is_cell(cell)}
        if deeper and depth > 0:
            yield _heading(name, depth) + "".join(_parts(deeper, depth - 1))


def _curves(lists: Mapping[str, Sequence[float]]) -> Iterator[str]:
    by_length: dict[int, dict[str, Sequence[float]]] = {}
    for name, values in lists.items():
        by_length.setdefault(len(values), {})[name] = values
    for length, group in by_length.items():
        # blocks are counted from 1, as papers count them
        yield _chart([Curve(n, list(enumerate(values, 1))) for n, values in group.items()], "layer")
        yield table(["layer", *map(str, range(1, length + 1))], [(n, *v) for n, v in group.items()])


def _chart(curves: Sequence[Curve], x_label: str) -> str:
    pieces = []
    for start in range(0, len(curves), LINE_COLORS):
        part = curves[start : start + LINE_COLORS]
        svg = curve_svg(part, x_label=x_label, markers=True)
        pieces.append(f'<figure class="panel">{svg}{legend(part)}</figure>')
    return "".join(pieces)


def legend(curves: Sequence[Curve]) -> str:
    """Names in the colours of their lines, each with its last value."""
    entries = "".join(
        f'<li><i style="background: var(--line-{number})"></i>{text(curve.name)} '
        f"<b>{text(number_text(curve.points[-1][1]) if curve.points else '–')}</b></li>"
        for number, curve in enumerate(curves)
    )
    return f'<ul class="legend">{entries}</ul>'


def is_numbers(value: Any) -> bool:
    """Whether a JSON value is a list of numbers worth a curve."""
    return isinstance(value, list) and 1 < len(value) <= _LONGEST and all(map(is_number, value))


def _is_cell(value: Any) -> bool:
    return not isinstance(value, (Mapping, list))


def _is_point(pair: tuple[Any, Any]) -> TypeGuard[tuple[float, float]]:
    return is_number(pair[0]) and is_number(pair[1])


def _plain(value: Any) -> Any:
    return value if _is_cell(value) else str(value)


def _heading(name: str, depth: int) -> str:
    level = "h3" if depth >= 4 else "h4"
    return f"<{level}>{text(name)}</{level}>"

"""Images that a text, CSV or JSON-lines file lists."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from local_distill.errors import DataError, require_extra
from local_distill.training.data.decoding import DEFAULT_LIMITS, ImageLimits
from local_distill.training.data.named_files import NamedFiles

__all__ = ["LIST_SUFFIXES", "ImageList"]

LIST_SUFFIXES = frozenset((".txt", ".tsv", ".csv", ".jsonl"))
_PATH_KEYS = ("path", "image", "file", "file_name", "filename")
# Line number, path, label as text or None.
_Row = tuple[int, str, str | None]


class ImageList(NamedFiles):
    r"""The images of a list, with labels where the list has them.

    Convention: paths are relative to the list's folder. UTF-8; bytes that are not survive.

    - ``.txt``, ``.tsv``: one path a line, then perhaps a tab and a label. Empty lines and lines
      that start with ``#`` are left out.
    - ``.csv``: with a header; the column ``path`` (or ``image``, ``file``, ``file_name``,
      ``filename``) and perhaps ``label``.
    - ``.jsonl``: one object a line, with the same keys.

    Labels are class numbers from 0 on, or else class names, which are sorted. Either all rows have
    one, or none has: then all labels are 0.

    Args:
        path: of the list.
        transform: applied to each RGB PIL image.
        report: a JSON-lines file that bad images are added to; None: only the log.
        most_bad: share of bad images among those looked at that stops the run; see `BadImages`.
        limits: of pixels and bytes, checked before decoding.

    Attributes:
        classes: class names, or the numbers as text; empty without labels.
        targets: the labels.
        paths: the files, as listed.

    Raises:
        DataError: no such list, nothing in it, or a line that cannot be read; it names the line.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("RGB", (8, 6)).save(f"{folder}/a.png")
        ...     _ = Path(folder, "list.txt").write_text("a.png\tdog\na.png\tcat\n")
        ...     images = ImageList(f"{folder}/list.txt")
        ...     images.classes, images.targets, images[0][0].size
        (['cat', 'dog'], [1, 0], (8, 6))
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        transform: Callable[[Any], Any] | None = None,
        report: str | os.PathLike[str] | None = None,
        most_bad: float = 0.1,
        limits: ImageLimits = DEFAULT_LIMITS,
    ) -> None:
        self.path = Path(path)
        readers = {".csv": _csv_rows, ".jsonl": _json_rows}
        require_extra("PIL", "vision")
        try:
            rows = list(readers.get(self.path.suffix.lower(), _text_rows)(self.path))
        except (OSError, csv.Error) as error:
            raise DataError(f"the list {str(self.path)!r} cannot be read: {error}") from error
        if not rows:
            raise DataError(f"the list {str(self.path)!r} names no image")
        labels, classes = _labels(self.path, rows)
        super().__init__(
            *(self.path.parent, (name for _, name, _ in rows), labels, classes),
            transform=transform,
            report=report,
            most_bad=most_bad,
            limits=limits,
        )


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    # surrogateescape: file names need not be text
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        for number, line in enumerate(stream, 1):
            yield number, line.rstrip("\r\n")


def _text_rows(path: Path) -> Iterator[_Row]:
    for number, line in _lines(path):
        if line.strip() and not line.startswith("#"):
            name, tab, label = line.partition("\t")
            yield number, name, label.strip() if tab else None


def _csv_rows(path: Path) -> Iterator[_Row]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        reader = csv.DictReader(stream)
        for row in reader:
            yield _row(path, reader.line_num, row)


def _json_rows(path: Path) -> Iterator[_Row]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{str(path)!r}, line {number}: no JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(
                f'{str(path)!r}, line {number}: wanted an object such as {{"path": "a.jpg", '
                f'"label": 3}}, got {line[:80]!r}'
            )
        yield _row(path, number, row)


def _row(path: Path, number: int, row: dict[Any, Any]) -> _Row:
    name = next((row[key] for key in _PATH_KEYS if row.get(key)), None)
    if not isinstance(name, str):
        raise DataError(
            f"{str(path)!r}, line {number}: no path; wanted one of the columns "
            f"{', '.join(_PATH_KEYS)}, got {', '.join(str(key) for key in row)}"
        )
    label = row.get("label")
    return number, name, None if label in (None, "") else str(label)


def _labels(path: Path, rows: list[_Row]) -> tuple[list[int], list[str]]:
    without = [number for number, _, label in rows if label is None]
    if len(without) == len(rows):
        return [0] * len(rows), []
    if without:
        raise DataError(
            f"{str(path)!r}, line {without[0]}: no label, but {len(rows) - len(without)} of "
            f"{len(rows)} images have one: give all of them a label, or none"
        )
    texts = [label or "" for _, _, label in rows]
    if all(text.isdecimal() for text in texts):
        numbers = [int(text) for text in texts]
        return numbers, [str(i) for i in range(max(numbers) + 1)]
    names = sorted(set(texts))
    number_of = {name: i for i, name in enumerate(names)}
    return [number_of[text] for text in texts], names

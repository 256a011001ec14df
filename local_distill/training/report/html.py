"""Pieces of a page; every text goes through `text`, so that no name in a run becomes markup."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from local_distill.errors import require_extra

__all__ = ["bytes_text", "flat", "image_uri", "number_text", "table", "text"]


def text(value: Any) -> str:
    """A value as text of a page or of an attribute.

    Example:
        >>> text('<b> & "c"')
        '&lt;b&gt; &amp; &quot;c&quot;'
    """
    # file names that are no UTF-8 come as lone surrogates, which cannot be written
    return html.escape(str(value).encode("utf-8", "replace").decode("utf-8"), quote=True)


def number_text(value: Any) -> str:
    """A JSON value as a reader wants it: four digits, words for what is no number.

    Example:
        >>> number_text(0.123456), number_text(1200000), number_text(True), number_text(None)
        ('0.1235', '1,200,000', 'yes', '–')
    """
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 100_000 else str(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            return "NaN" if math.isnan(value) else ("∞" if value > 0 else "−∞")
        return f"{value:.4g}"
    return str(value)


def bytes_text(size: int) -> str:
    """A file's size.

    Example:
        >>> bytes_text(3 * 2**20 + 2**19), bytes_text(900)
        ('3.5 MiB', '900 B')
    """
    value, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{size} B" if unit == "B" else f"{value:.1f} {unit}"


def table(
    head: Sequence[str], rows: Iterable[Sequence[Any]], *, labels: int = 1, kind: str = ""
) -> str:
    """A table that scrolls by itself where a phone is too narrow for it.

    Args:
        head: the columns' titles.
        rows: a value a column; numbers are written by `number_text`.
        labels: so many columns on the left are text, the others are set as numbers.
        kind: a CSS class.
    """
    titles = "".join(
        f'<th scope="col"{"" if i < labels else " class=n"}>{text(title)}</th>'
        for i, title in enumerate(head)
    )
    body = "".join(
        "<tr>"
        + "".join(
            f"<td>{text(number_text(cell))}</td>"
            if i < labels
            else f"<td class=n>{text(number_text(cell))}</td>"
            for i, cell in enumerate(row)
        )
        + "</tr>\n"
        for row in rows
    )
    return (
        f'<div class="scroll"><table class="{text(kind)}"><thead><tr>{titles}</tr></thead>'
        f"<tbody>\n{body}</tbody></table></div>"
    )


def flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted name, value) of nested settings, lists whole.

    Example:
        >>> flat({"a": {"b": 1, "c": [2, 3]}, "d": {}})
        [('a.b', 1), ('a.c', [2, 3]), ('d', {})]
    """
    found: list[tuple[str, Any]] = []
    for name, part in value.items():
        dotted = f"{prefix}.{name}" if prefix else str(name)
        if isinstance(part, Mapping) and part:
            found += flat(part, dotted)
        else:
            found.append((dotted, part))
    return found


def image_uri(path: Path, *, most_pixels: int = 1100) -> tuple[str, int, int]:
    """A picture as a data URI, no wider than need be.

    Args:
        path: the file.
        most_pixels: the width to which a wider picture is reduced.

    Returns:
        The URI, width and height in pixels.

    Raises:
        OSError: the file is no picture, or a damaged one.
    """
    pillow = require_extra("PIL.Image", "vision")
    features = require_extra("PIL.features", "vision")
    try:
        with pillow.open(path) as opened:
            image = opened.convert("RGB")
    except (ValueError, SyntaxError, pillow.DecompressionBombError) as error:
        raise OSError(f"not a picture: {error}") from error
    if image.width > most_pixels:
        height = max(1, round(image.height * most_pixels / image.width))
        image = image.resize((most_pixels, height), pillow.Resampling.LANCZOS)
    target = io.BytesIO()
    if features.check("webp"):
        kind = "webp"
        image.save(target, "WEBP", quality=82, method=4)
    else:
        kind = "png"
        image.quantize(128).save(target, "PNG", optimize=True)
    data = base64.b64encode(target.getvalue()).decode("ascii")
    return f"data:image/{kind};base64,{data}", image.width, image.height

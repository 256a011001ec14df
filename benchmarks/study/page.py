"""Puts the tables into their places on a page, so that no number is copied by hand."""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = ["update_page"]

# A comment before a place names its table; the place ends at the comment after it.
_PLACE = re.compile(r"(<!-- table: (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def update_page(text: str, tables: Mapping[str, str]) -> str:
    r"""The page with today's tables.

    Args:
        text: of the page.
        tables: Markdown by title.

    Raises:
        KeyError: the page names a table that there is not.

    Example:
        >>> update_page("<!-- table: one -->\nold\n<!-- end -->", {"one": "| new |"})
        '<!-- table: one -->\n\n| new |\n\n<!-- end -->'
    """
    return _PLACE.sub(lambda found: f"{found[1]}\n{tables[found[2]]}\n\n{found[3]}", text)

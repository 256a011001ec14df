"""Docstrings have formulas as `.. math:: …`, for plain readers; the pages set them apart."""

import re

FORMULA = re.compile(r"<p>\.\. math::\s*(.*?)</p>", re.DOTALL)


def on_page_content(html: str, **_: object) -> str:
    """Called by mkdocs with every rendered page."""
    return FORMULA.sub(r'<p class="formula">\1</p>', html)

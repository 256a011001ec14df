"""Reads docstrings' `Example:` as the section `Examples:`, whose doctests are shown as code."""

import re
from typing import Any

import griffe

HEADING = re.compile(r"^([ \t]*)Example:[ \t]*$", re.MULTILINE)


class ExamplesExtension(griffe.Extension):
    """Renames the heading in every docstring that is collected."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe with every module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = HEADING.sub(r"\1Examples:", obj.docstring.value)

"""Reads docstrings as the pages show them: `Example:` as `Examples:`, remarks as paragraphs."""

import re
from typing import Any

import griffe

HEADING = re.compile(r"^([ \t]*)Example:[ \t]*$", re.MULTILINE)
# griffe takes a word with a colon and an indented line for a box with its first line as the title.
REMARK = re.compile(
    r"^(Convention|Source|Deviations[^:\n]*):[ \t]*\n?([^\n]*(?:\n[ \t]+\S[^\n]*)*)", re.MULTILINE
)


def _paragraph(remark: re.Match[str]) -> str:
    text = "\n".join(line.strip() for line in remark[2].splitlines())
    return f"**{remark[1]}:** {text}"


class ExamplesExtension(griffe.Extension):
    """Rewrites every docstring that is collected."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe with every module, class, function and attribute."""
        if obj.docstring:
            value = HEADING.sub(r"\1Examples:", obj.docstring.value)
            obj.docstring.value = REMARK.sub(_paragraph, value)

"""Names that are imported when they are first asked for, because they need an extra."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(module: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """A module's ``__getattr__`` (PEP 562) that fetches these names from their homes.

    Args:
        module: the module's ``__name__``.
        homes: dotted module of each name.

    Example:
        >>> fetch = lazy_names("here", {"sqrt": "math"})
        >>> fetch("sqrt")(9.0)
        3.0
        >>> fetch("cube")
        Traceback (most recent call last):
        ...
        AttributeError: module 'here' has no attribute 'cube'
    """

    def fetch(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return getattr(importlib.import_module(homes[name]), name)

    return fetch

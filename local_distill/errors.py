"""The package's errors: all are ``ValueError``, all say what came and what was wanted."""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = [
    "ConfigError",
    "DataError",
    "GeometryError",
    "LocalDistillError",
    "MissingExtraError",
    "ShapeError",
    "require_extra",
]


class LocalDistillError(ValueError):
    """Base of every error that this package raises on purpose."""


class ShapeError(LocalDistillError):
    """A tensor whose shape or dtype does not fit; names the argument and the axis."""


class GeometryError(LocalDistillError):
    """A geometry that cannot be: singular, non-finite, of negative size, or in the wrong dtype."""


class ConfigError(LocalDistillError):
    """A setting, or a combination of settings, that cannot work."""


class DataError(LocalDistillError):
    """A data source that cannot be read, such as a folder without images."""


class MissingExtraError(LocalDistillError, ImportError):
    """An optional dependency is needed and absent; the message says which extra brings it.

    It is an ``ImportError`` as well, so that code which probes for optional parts keeps working.
    """


def require_extra(module: str, extra: str) -> ModuleType:
    """Import an optional dependency, or say which extra installs it.

    Args:
        module: dotted name of the module to import.
        extra: the extra of this package that brings it, such as ``"vision"``.

    Returns:
        The imported module.

    Raises:
        MissingExtraError: the module is not installed.

    Example:
        >>> require_extra("json", "vision").__name__
        'json'
        >>> require_extra("no_such_module", "vision")
        Traceback (most recent call last):
        ...
        local_distill.errors.MissingExtraError: `no_such_module` is not installed; \
it comes with the extra `vision`: pip install "local-distill[vision]"
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        root = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != root:
            raise  # the module is there, one of its own imports is broken: not ours to hide
        raise MissingExtraError(
            f"`{root}` is not installed; it comes with the extra `{extra}`: "
            f'pip install "local-distill[{extra}]"'
        ) from error

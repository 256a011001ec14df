"""A matcher by its import path: a class, an instance, a function, or a function that makes one."""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
from pathlib import Path
from typing import Any

from torch import nn

from local_distill.benchmarking.sizes import Step
from local_distill.errors import ConfigError
from local_distill.structures import Matcher, Matches, Tokens

__all__ = ["find_by_path", "matcher_by_path", "works_without_features"]


def find_by_path(path: str) -> Any:
    """What ``package.module.name`` names; modules in the current folder are found too.

    Raises:
        ConfigError: nothing is there; the message says how far the path led.

    Example:
        >>> find_by_path("local_distill.NearestMatcher").__name__
        'NearestMatcher'
        >>> find_by_path("local_distill.NearestMacher")
        Traceback (most recent call last):
        ...
        local_distill.errors.ConfigError: no `NearestMacher` in `local_distill`: \
did you mean `NearestMatcher`?
    """
    parts = path.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise ConfigError(f"{path!r} is no import path; write package.module.Name")
    module, rest = _import_as_far_as_it_goes(parts)
    value: Any = module
    reached = module.__name__
    for name in rest:
        if not hasattr(value, name):
            raise ConfigError(f"no `{name}` in `{reached}`{_closest(name, value)}")
        value = getattr(value, name)
        reached = f"{reached}.{name}"
    return value


def _import_as_far_as_it_goes(parts: list[str]) -> tuple[Any, list[str]]:
    here = str(Path.cwd())
    sys.path.insert(0, here)  # as `python -m` does, and a console script does not
    try:
        for count in range(len(parts) - 1, 0, -1):
            name = ".".join(parts[:count])
            try:
                return importlib.import_module(name), parts[count:]
            except ModuleNotFoundError as error:
                if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                    raise ConfigError(f"`{name}` cannot be imported: {error}") from error
            except Exception as error:
                said = f"{type(error).__name__}: {error}"
                raise ConfigError(f"`{name}` cannot be imported: {said}") from error
    finally:
        sys.path.remove(here)
    raise ConfigError(f"no module `{parts[0]}`: is it installed, or in this folder?")


def _closest(name: str, value: Any) -> str:
    near = difflib.get_close_matches(name, dir(value), 1)
    return f": did you mean `{near[0]}`?" if near else ""


def matcher_by_path(path: str) -> Matcher:
    """The matcher there; what can be called without arguments is called, and gives the matcher.

    Raises:
        ConfigError: nothing is there, or no matcher.

    Example:
        >>> matcher_by_path("local_distill.NearestMatcher")
        NearestMatcher(max_distance=0.5, method='lattice')
    """
    value = find_by_path(path)
    if _takes(value) or inspect.isclass(value):
        try:
            value = value()
        except Exception as error:
            raise ConfigError(
                f"`{path}()` failed: {type(error).__name__}: {error}; give a class that needs no "
                "arguments, an instance, or a function that makes one"
            ) from error
    empty = Tokens()
    if not callable(value) or not _takes(value, empty, empty):
        raise ConfigError(
            f"`{path}` is no matcher: it has to be called with the student's and the teacher's "
            f"Tokens, got {type(value).__name__}"
        )
    matcher: Matcher = value
    return matcher


def _takes(value: Any, *arguments: Any) -> bool:
    """Whether it can be called with these, as far as its signature says."""
    if isinstance(value, nn.Module):
        value = value.forward
    try:
        inspect.signature(value).bind(*arguments)
    except TypeError:
        return False
    except ValueError:  # built in, without a signature
        return bool(arguments)
    return True


def works_without_features(name: str, matcher: Matcher, step: Step) -> bool:
    """Whether geometry is all it needs; tried on the first pair of the step.

    Raises:
        ConfigError: it works neither way, or gives no `Matches` of the right shape.
    """
    v, q = step.pairs[-1]
    bare = step.without_features()
    try:
        found = matcher(bare.student[v], bare.teacher[q])
        alone = True
    except Exception:  # whatever it says of features that are not there
        alone = False
    if not alone:
        try:
            found = matcher(step.student[v], step.teacher[q])
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            raise ConfigError(f"`{name}` cannot match a step's tokens: {said}") from error
    _check_answer(name, found, step.student[v])
    return alone


def _check_answer(name: str, found: object, student: Tokens) -> None:
    if not isinstance(found, Matches):
        raise ConfigError(f"`{name}` gave {type(found).__name__}, wanted `Matches`")
    assert student.geometry is not None
    wanted = (student.geometry.matrix.shape[0], student.num_tokens)
    for part, shape in (
        ("cost", found.cost.shape),
        ("teacher_index", found.teacher_index.shape[:2]),
        ("weight", found.weight.shape[:2]),
    ):
        if tuple(shape) != wanted:
            raise ConfigError(
                f"`{name}` gave `{part}` for (b, s) = {tuple(shape)}, wanted {wanted}"
            )

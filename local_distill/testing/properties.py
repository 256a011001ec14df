"""What a property is, how examples are searched for one that breaks it, and what is then said."""

from __future__ import annotations

import difflib
import re
import textwrap
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, given
from hypothesis.errors import Flaky, UnsatisfiedAssumption
from hypothesis.strategies import SearchStrategy

from local_distill.errors import ConfigError, require_extra
from local_distill.testing.snippets import to_code

__all__ = ["Property", "PropertyFailed", "check_properties", "ensure", "properties_test"]


class PropertyFailed(AssertionError):
    """A property does not hold; the message says which, of what, and how to see it again."""


def ensure(holds: bool, message: str) -> None:
    """Raise AssertionError with this message unless it holds; unlike assert, under -O too."""
    if not holds:
        raise AssertionError(message)


@dataclass(frozen=True)
class Property:
    """One thing that has to hold for every example.

    Attributes:
        name: what to call it in ``xfail`` and on the command line.
        summary: one sentence, for the failure's message and the documentation.
        check: called with the subject and an example; raises AssertionError where it is broken, and
            returns early from an example that it has nothing to say of.
        examples: hypothesis strategy of its examples, NamedTuples that `to_code` can print.
        max_examples: at most so many, for a slow one; None: as many as the caller asks for.
    """

    name: str
    summary: str
    check: Callable[[Any, Any], None]
    examples: SearchStrategy[Any]
    max_examples: int | None = None


def check_properties(
    subject: Any,
    properties: Sequence[Property],
    *,
    checker: str,
    settings: Mapping[str, str] | None = None,
    names: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    examples: Iterable[Any] | None = None,
    max_examples: int = 20,
) -> list[str]:
    """Check the properties one after another, and tell of all that fail.

    Args:
        subject: what is tested.
        properties: those that apply to it.
        checker: the caller's name, for the snippet, such as ``"check_matcher"``.
        settings: further arguments of the caller that the snippet has to give again.
        names: only these; all by default.
        exclude: names of those to leave out.
        examples: look at these instead of searching.
        max_examples: how many examples to try for each property.

    Returns:
        The names of the properties that hold.

    Raises:
        PropertyFailed: with one paragraph for every property that fails.
        ConfigError: an unknown name.
    """
    __tracebackhide__ = True
    left_out = _named(properties, exclude)
    chosen = [one for one in _named(properties, names) if one not in left_out]
    examples = None if examples is None else list(examples)  # each property looks at all of them
    call = checker + "(subject" + "".join(f', {k}="{v}"' for k, v in (settings or {}).items())
    failures: list[tuple[str, PropertyFailed]] = []
    for one in chosen:
        try:
            _check_one(subject, one, call, examples, max_examples)
        except PropertyFailed as failure:
            failures.append((one.name, failure))
    if len(failures) == 1:
        raise failures[0][1]
    if failures:
        listing = ", ".join(name for name, _ in failures)
        text = "\n\n".join(str(failure) for _, failure in failures)
        raise PropertyFailed(
            f"{len(failures)} of {len(chosen)} properties fail: {listing}\n\n{text}"
        ) from failures[0][1]
    return [one.name for one in chosen]


def properties_test(
    subject: Any,
    properties: Sequence[Property],
    check: Callable[[str], object],
    *,
    xfail: Mapping[str, str],
    exclude: Iterable[str] = (),
) -> Callable[[str], None]:
    """A pytest test with one id a property.

    Args:
        subject: what is tested, for the ids' sake.
        properties: those that apply to it.
        check: runs the property of that name.
        xfail: ``{name: reason}`` of properties that are known to fail; the test fails if they hold.
        exclude: names of those to leave out.
    """
    pytest = require_extra("pytest", "testing")
    _named(properties, xfail)
    left_out = _named(properties, exclude)
    params = [
        pytest.param(
            one.name,
            id=one.name,
            marks=[pytest.mark.xfail(reason=xfail[one.name], raises=PropertyFailed, strict=True)]
            if one.name in xfail
            else [],
        )
        for one in properties
        if one not in left_out
    ]

    def test_property(name: str) -> None:
        check(name)

    test_property.__doc__ = f"The properties of {_short(subject)}, one by one."
    parametrized: Callable[[str], None] = pytest.mark.parametrize("name", params)(test_property)
    return parametrized


def _named(properties: Sequence[Property], names: Iterable[str] | None) -> list[Property]:
    if names is None:
        return list(properties)
    known = {one.name: one for one in properties}
    chosen = []
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            hint = f"did you mean {', '.join(close)}?" if close else f"there are {', '.join(known)}"
            raise ConfigError(f"no property {name!r} applies here; {hint}")
        chosen.append(known[name])
    return chosen


def _check_one(
    subject: Any, one: Property, call: str, examples: Iterable[Any] | None, max_examples: int
) -> None:
    __tracebackhide__ = True  # pytest then shows the message, not the search that led to it
    failures: list[PropertyFailed] = []

    def run(example: Any) -> None:
        __tracebackhide__ = True
        try:
            one.check(subject, example)
        except UnsatisfiedAssumption:
            raise
        except Exception as error:
            failures.append(PropertyFailed(_message(subject, one, call, example, error)))
            raise failures[-1] from error

    if examples is not None:
        for example in examples:
            run(example)
        return
    search = hypothesis.settings(
        deadline=None,  # machines differ, and a timed check proves nothing
        database=None,  # its keys are made from `run`, which all properties share
        derandomize=True,  # what fails once fails again
        report_multiple_bugs=False,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
        # explanations go into the notes that are left out below, and take longer than the search
        phases=[one for one in hypothesis.settings().phases if one != Phase.explain],
        max_examples=min(max_examples, one.max_examples or max_examples),
    )
    try:
        search(given(one.examples)(run))()
    except PropertyFailed as failure:
        # hypothesis adds a note with the example, which the message has in a form that can be run
        failure.__notes__ = []
        raise
    except Flaky as error:
        # the subject remembers, or draws at random: what failed was seen to hold as well
        raise PropertyFailed(
            f"{failures[-1]}\n\n    The same example held at another try: the outcome depends on "
            "more than the example."
        ) from error


def _message(subject: Any, one: Property, call: str, example: Any, error: Exception) -> str:
    said = str(error).strip() or type(error).__name__
    if not isinstance(error, AssertionError):
        where = traceback.extract_tb(error.__traceback__)[-1]
        said = f"{type(error).__name__}: {said} ({where.filename}:{where.lineno})"
    code = to_code(example)
    imports = ["CropGeometry", "Matches", "TeacherTargets", "TokenGrid", "Tokens", "ViewOutput"]
    used = [name for name in imports if f"{name}(" in code]
    checker = call.partition("(")[0]
    lines = [
        "import torch",
        "from torch import inf, nan",
        *([f"from local_distill import {', '.join(used)}"] if used else []),
        f"from local_distill.testing import {type(example).__name__}, {checker}",
        "",
        f"subject = ...  # {_short(subject)}",
        f"example = {code}",
        f'{call}, properties=["{one.name}"], examples=[example])',
    ]
    snippet = textwrap.indent("\n".join(lines), "    ")
    return (
        f"{one.name}: {one.summary}\nbroken by {_short(subject)}: {said}\nto repeat:\n\n{snippet}"
    )


def _short(subject: Any) -> str:
    name = getattr(subject, "__qualname__", None)
    if name is not None:  # a function: its repr has an address where its module should be
        return f"{subject.__module__}.{name}"
    text = " ".join(repr(subject).split())
    # what has no repr of its own, or holds a function, as a partial does
    text = re.sub(r"<(?:function )?(\S+)(?: object)? at 0x[0-9a-fA-F]+>", r"\1", text)
    return text if len(text) <= 200 else text[:197] + "..."

"""Tables of faults: what a component makes of each kind of bad or extreme input.

Properties are searched for counter-examples; here each row is one fixed case, so that the whole
table can be read at a glance, and printed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from local_distill.errors import ConfigError, LocalDistillError

__all__ = ["FaultCases", "FaultResult", "NotApplicable", "fault_table"]


class FaultResult(NamedTuple):
    """What a component made of one fault.

    Attributes:
        group: the kind of fault: numbers, tokens, geometry, views, layout, state, compile.
        fault: the case.
        outcome: ``"right"``, ``"refused"`` (a `LocalDistillError`), ``"-"`` (does not apply), or
            ``"WRONG"``.
        detail: the error's message, the reason why it does not apply, or what is wrong.
    """

    group: str
    fault: str
    outcome: str
    detail: str


class NotApplicable(Exception):
    """Raised by a case that is no fault for the component; the message is the reason."""


Case = Callable[..., None]


class FaultCases:
    """The cases of one kind of component, in the order in which they are declared.

    A case is called with the component. It returns where the answer is right, and raises
    `NotApplicable`, what the component raised, or an AssertionError that says what is wrong.

    Example:
        >>> cases = FaultCases()
        >>> @cases.case("numbers", "a negative number")
        ... def negative(root):
        ...     assert root(-1.0) != root(-1.0), "no NaN came out"
        >>> [result.outcome for result in cases.run(lambda x: x)]
        ['WRONG']
    """

    def __init__(self) -> None:
        self._cases: list[tuple[str, str, Case]] = []

    def case(self, group: str, fault: str) -> Callable[[Case], Case]:
        """Declare a case, as a decorator."""

        def declare(case: Case) -> Case:
            self._cases.append((group, fault, case))
            return case

        return declare

    def names(self) -> list[tuple[str, str]]:
        """(group, fault) of every case."""
        return [(group, fault) for group, fault, _ in self._cases]

    def run(
        self,
        *subject: Any,
        groups: Iterable[str] | None = None,
        not_applicable: Mapping[str, str] | None = None,
    ) -> list[FaultResult]:
        """Try every case on a component.

        Args:
            subject: what the cases are called with.
            groups: only these groups; None: all.
            not_applicable: ``{fault: reason}`` of cases that are no fault for this component.

        Raises:
            ConfigError: a group or a fault that does not exist.
        """
        wanted = _known("groups", groups, [group for group, _, _ in self._cases])
        without = dict(not_applicable or {})
        _known("not_applicable", without, [fault for _, fault, _ in self._cases])
        results = []
        for group, fault, case in self._cases:
            if group not in wanted:
                continue
            detail = ""
            try:
                if fault in without:
                    raise NotApplicable(without[fault])
                case(*subject)
                outcome = "right"
            except NotApplicable as reason:
                outcome, detail = "-", str(reason)
            except LocalDistillError as error:
                outcome, detail = "refused", str(error)
            except Exception as error:  # whatever else comes is what the table is there to show
                outcome, detail = "WRONG", f"{type(error).__name__}: {error}"
            results.append(FaultResult(group, fault, outcome, detail))
        return results


def fault_table(columns: Mapping[str, Callable[..., Any] | Sequence[FaultResult]]) -> str:
    """The faults of several components as a Markdown table, one column each.

    Args:
        columns: ``{name: results}`` of `matcher_faults`, `loss_faults` or `target_faults`, all of
            the same groups; instead of results a matcher.

    Example:
        >>> from local_distill import NearestMatcher
        >>> from local_distill.testing import matcher_faults
        >>> print(fault_table({"Nearest": matcher_faults(NearestMatcher(), groups=["views"])[:2]}))
        | fault | Nearest |
        |---|---|
        | views: batch of 1 | right |
        | views: batch of 0 | right |
    """
    from local_distill.testing.matcher_faults import matcher_faults  # it imports this module

    results = {
        name: matcher_faults(given) if callable(given) else list(given)
        for name, given in columns.items()
    }
    lines = [f"| fault | {' | '.join(results)} |", f"|---|{'---|' * len(results)}"]
    for row in zip(*results.values(), strict=True):
        cells = " | ".join(result.outcome for result in row)
        lines.append(f"| {row[0].group}: {row[0].fault} | {cells} |")
    return "\n".join(lines)


def _known(name: str, given: Iterable[str] | None, known: Sequence[str]) -> list[str]:
    chosen = list(dict.fromkeys(known)) if given is None else list(given)
    for one in chosen:
        if one not in known:
            raise ConfigError(f"`{name}` holds {one!r}; there are {list(dict.fromkeys(known))}")
    return chosen

"""The test kit for targets: one call checks all properties, one line makes them pytest tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from local_distill.errors import ConfigError
from local_distill.testing.properties import Property, check_properties, properties_test
from local_distill.testing.target_properties import REGISTRY, TargetsExample, TargetsFactory

__all__ = ["check_targets", "targets_properties", "targets_test"]


def check_targets(
    targets: TargetsFactory,
    *,
    properties: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    examples: Iterable[TargetsExample] | None = None,
    max_examples: int = 20,
) -> list[str]:
    """Check that targets keep what the losses rely on, and tell of all that they do not.

    Args:
        targets: makes targets for a number of prototypes, such as the class `Centering` or
            ``lambda c: MyTargets(c, momentum=0.99)``: Modules with the methods of the `Targets`
            protocol. Every call that is checked gets new ones.
        properties: names of the properties to check; by default all, see `targets_properties`.
        exclude: names of properties to leave out, such as one that takes too long here.
        examples: look at these instead of searching: what a failure's snippet does.
        max_examples: how many examples to try for each property.

    Returns:
        The names of the properties that hold.

    Raises:
        PropertyFailed: an AssertionError that names each property that fails, the smallest example
            found, and the lines that repeat it.
        ConfigError: an unknown property, or what is no factory of targets.

    Example:
        >>> from local_distill import Centering
        >>> check_targets(Centering, properties=["probs_are_distributions"])
        ['probs_are_distributions']
    """
    return check_properties(
        _factory(targets),
        targets_properties(),
        checker="check_targets",
        names=properties,
        exclude=exclude,
        examples=examples,
        max_examples=max_examples,
    )


def targets_test(
    targets: TargetsFactory,
    *,
    xfail: Mapping[str, str] | None = None,
    exclude: Iterable[str] = (),
    max_examples: int = 20,
) -> Callable[[str], None]:
    """A pytest test of targets, with one id for each property.

    Args:
        targets: see `check_targets`.
        xfail: ``{name: reason}`` of the properties that they are known not to keep. Strict: the
            test fails once they keep them.
        exclude: names of properties to leave out, such as one that takes too long here.
        max_examples: how many examples to try for each property.

    Returns:
        A test function. Assign it to a name that starts with ``test_``.

    Raises:
        ConfigError: an unknown property in ``xfail`` or ``exclude``.
        MissingExtraError: pytest is not installed.

    Example:
        >>> from local_distill import Centering
        >>> test_centering = targets_test(Centering)
        >>> test_centering("forward_changes_no_state")  # pytest calls it for every property
    """
    _factory(targets)

    def check(name: str) -> object:
        return check_targets(targets, properties=[name], max_examples=max_examples)

    return properties_test(targets, targets_properties(), check, xfail=xfail or {}, exclude=exclude)


def targets_properties() -> list[Property]:
    """The properties that targets have to keep.

    Example:
        >>> len(targets_properties()) >= 12
        True
    """
    return list(REGISTRY)


def _factory(targets: Any) -> TargetsFactory:
    if isinstance(targets, nn.Module) or not callable(targets):
        raise ConfigError(
            f"`targets` must make targets for a number of prototypes, got "
            f"{type(targets).__name__}; wrap it: check_targets(lambda c: MyTargets(c))"
        )
    return targets  # type: ignore[no-any-return]

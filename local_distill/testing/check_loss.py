"""The test kit for losses: one call checks all properties, one line makes them pytest tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from local_distill.errors import ConfigError
from local_distill.structures import Matches
from local_distill.testing.loss_properties import REGISTRY, LossExample, LossFactory, LossKind
from local_distill.testing.loss_properties._running import call
from local_distill.testing.properties import Property, check_properties, properties_test

__all__ = ["check_loss", "loss_kind", "loss_properties", "loss_test"]


def check_loss(
    loss: LossFactory,
    *,
    kind: LossKind | None = None,
    properties: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    examples: Iterable[LossExample] | None = None,
    max_examples: int = 20,
) -> list[str]:
    """Check that a loss keeps what training relies on, and tell of all that it does not.

    Args:
        loss: makes a loss for a number of prototypes: ``lambda c: MyLoss(Centering(c))``. Every
            call that is checked gets a new one, so that no state of one comes into the next. The
            loss is a Module with ``forward(student_logits, teacher_logits, matches, *,
            teacher_temp, teacher_valid=None)``, local, or ``forward(student_logits,
            teacher_logits, *, teacher_temp, pairs=None)``, global. Where it has attributes
            ``targets`` and ``student_temp``, one property makes use of them.
        kind: ``"local"`` or ``"global"``; found out by trying where not given.
        properties: names of the properties to check; by default all that apply, see
            `loss_properties`.
        exclude: names of properties to leave out, such as one that takes too long here.
        examples: look at these instead of searching: what a failure's snippet does.
        max_examples: how many examples to try for each property.

    Returns:
        The names of the properties that hold.

    Raises:
        PropertyFailed: an AssertionError that names each property that fails, the smallest example
            found, and the lines that repeat it.
        ConfigError: an unknown property or kind, or what is no factory of losses.

    Example:
        >>> from local_distill import Centering, LocalDistillationLoss
        >>> check_loss(lambda c: LocalDistillationLoss(Centering(c)),
        ...            properties=["unmatched_student_tokens_may_be_nan"])
        ['unmatched_student_tokens_may_be_nan']
    """
    return check_properties(
        _factory(loss),
        loss_properties(kind or loss_kind(loss)),
        checker="check_loss",
        names=properties,
        exclude=exclude,
        examples=examples,
        max_examples=max_examples,
    )


def loss_test(
    loss: LossFactory,
    *,
    kind: LossKind | None = None,
    xfail: Mapping[str, str] | None = None,
    exclude: Iterable[str] = (),
    max_examples: int = 20,
) -> Callable[[str], None]:
    """A pytest test of a loss, with one id for each property.

    Args:
        loss: see `check_loss`.
        kind: see `check_loss`.
        xfail: ``{name: reason}`` of the properties that it is known not to keep. Strict: the test
            fails once it keeps them.
        exclude: names of properties to leave out, such as one that takes too long here.
        max_examples: how many examples to try for each property.

    Returns:
        A test function. Assign it to a name that starts with ``test_``.

    Raises:
        ConfigError: an unknown property in ``xfail`` or ``exclude``.
        MissingExtraError: pytest is not installed.

    Example:
        >>> from local_distill import Centering, GlobalDistillationLoss
        >>> test_loss = loss_test(lambda c: GlobalDistillationLoss(Centering(c)))
        >>> test_loss("pairs_are_averaged")  # pytest calls it for every property
    """
    known = kind or loss_kind(loss)

    def check(name: str) -> object:
        return check_loss(loss, kind=known, properties=[name], max_examples=max_examples)

    return properties_test(loss, loss_properties(known), check, xfail=xfail or {}, exclude=exclude)


def loss_properties(kind: LossKind) -> list[Property]:
    """The properties that losses of this kind have to keep.

    Args:
        kind: ``"local"`` or ``"global"``.

    Raises:
        ConfigError: an unknown kind.

    Example:
        >>> len(loss_properties("local")) >= 20, len(loss_properties("global")) >= 20
        (True, True)
    """
    if kind not in ("local", "global"):
        raise ConfigError(f'`kind` must be "local" or "global", got {kind!r}')
    return [
        Property(one.name, one.summary, one.check, one.examples(kind), one.max_examples)
        for one in REGISTRY
        if kind in one.kinds
    ]


def loss_kind(loss: LossFactory) -> LossKind:
    """Find out by trying which of the two signatures a loss has.

    Raises:
        ConfigError: it has neither; the last error is the cause.

    Example:
        >>> from local_distill import Centering, GlobalDistillationLoss
        >>> loss_kind(lambda c: GlobalDistillationLoss(Centering(c)))
        'global'
    """
    make = _factory(loss)
    matches = {(0, 1): Matches.identity(torch.ones(2, 3, dtype=torch.bool))}
    numbers = torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    views, whole = list(numbers), list(numbers[:, :, 0])
    tries: dict[LossKind, LossExample] = {
        "local": LossExample(views, views, matches),
        "global": LossExample(whole, whole),
    }
    last: Exception | None = None
    for kind, example in tries.items():
        try:
            call(make(4), example)
        except Exception as error:  # any error means that it is not of this kind
            last = error
        else:
            return kind
    raise ConfigError(
        "the loss serves neither (student_logits, teacher_logits, matches, teacher_temp=...) nor "
        "(student_logits, teacher_logits, teacher_temp=...); the last error was "
        f"{type(last).__name__}: {last}"
    ) from last


def _factory(loss: Any) -> LossFactory:
    if isinstance(loss, nn.Module) or not callable(loss):
        raise ConfigError(
            f"`loss` must make a loss for a number of prototypes, got {type(loss).__name__}; "
            "wrap it: check_loss(lambda c: MyLoss(Centering(c)))"
        )
    return loss  # type: ignore[no-any-return]

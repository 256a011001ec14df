"""Inputs that do not fit are refused by name, and no state moves."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from local_distill.testing.target_properties._registry import (
    TargetsExample,
    TargetsFactory,
    ensure_same_state,
    make,
    state_of,
    targets_property,
)

__all__ = [
    "bare_tensors_are_refused",
    "integer_logits_are_refused",
    "prototypes_that_differ_are_refused",
    "temperatures_must_be_above_zero",
    "valid_that_does_not_fit_is_refused",
]


@targets_property(max_examples=5)
def bare_tensors_are_refused(factory: TargetsFactory, example: TargetsExample) -> None:
    """A tensor in place of a list of views would be cut along its batch: a ValueError."""
    # with one axis more, so that its parts look like views
    bare = example.teacher_logits[0][None]
    _ensure_both_refuse(factory, example, bare, "a bare tensor")


@targets_property(max_examples=5)
def integer_logits_are_refused(factory: TargetsFactory, example: TargetsExample) -> None:
    """Logits that are whole numbers are a mistake: a ValueError."""
    whole = [part.long() for part in example.teacher_logits]
    _ensure_both_refuse(factory, example, whole, "int64 logits")


@targets_property(max_examples=5)
def prototypes_that_differ_are_refused(factory: TargetsFactory, example: TargetsExample) -> None:
    """Logits of another width than the targets were made for, 1 among them, are a ValueError."""
    for c in (1, example.teacher_logits[0].shape[-1] - 1):
        narrow = [part[..., :c] for part in example.teacher_logits]
        _ensure_both_refuse(factory, example, narrow, f"{c} prototypes")


@targets_property(max_examples=5)
def temperatures_must_be_above_zero(factory: TargetsFactory, example: TargetsExample) -> None:
    """A teacher temperature of 0, below, or NaN is an error that is a ValueError."""
    for temp in (0.0, -0.1, float("nan")):
        ask = functools.partial(_ask, logits=example.teacher_logits, temp=temp)
        _ensure_refused(factory, example, ask, f"teacher_temp = {temp}")


@targets_property(max_examples=5)
def valid_that_does_not_fit_is_refused(factory: TargetsFactory, example: TargetsExample) -> None:
    """`valid` of one image, of fewer views, or of numbers, is a ValueError, not a broadcast."""
    logits = example.teacher_logits
    kept = [part[..., 0].isfinite() for part in logits]
    for what, valid in (
        ("1 image", [part[:1] for part in kept]),
        ("a view less", kept[1:]),
        ("float32", [part.float() for part in kept]),
    ):
        update = functools.partial(_update, logits=logits, valid=valid)
        _ensure_refused(factory, example, update, f"`valid` of {what}")


def _ensure_both_refuse(
    factory: TargetsFactory, example: TargetsExample, logits: Any, what: str
) -> None:
    update = functools.partial(_update, logits=logits, valid=None)
    _ensure_refused(factory, example, update, f"update, {what}")
    ask = functools.partial(_ask, logits=logits, temp=example.teacher_temp)
    _ensure_refused(factory, example, ask, f"a call, {what}")


def _ask(targets: Any, logits: Any, temp: float) -> object:
    return targets(logits, teacher_temp=temp)


def _update(targets: Any, logits: Any, valid: Any) -> object:
    return targets.update(logits, valid)


def _ensure_refused(
    factory: TargetsFactory, example: TargetsExample, action: Callable[[Any], object], what: str
) -> None:
    targets = make(factory, example)
    before = state_of(targets)
    try:
        action(targets)
    except ValueError:
        ensure_same_state(state_of(targets), before, f"{what}, refused")
        return
    except Exception as error:
        kind = type(error).__name__
        raise AssertionError(f"{what}: {kind} ({error}) instead of a ValueError") from error
    raise AssertionError(f"{what}: no error")

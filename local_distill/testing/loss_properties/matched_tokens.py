"""Tokens of which no match speaks, and steps without any match."""

from __future__ import annotations

import torch

from local_distill.testing.loss_properties._changing import (
    doubled,
    filled,
    map_matches,
    matches_of,
    unmatched,
    unreferenced,
)
from local_distill.testing.loss_properties._registry import (
    LOCAL,
    LossExample,
    LossFactory,
    loss_property,
)
from local_distill.testing.loss_properties._running import (
    ensure_close,
    first_gradients,
    first_value,
)
from local_distill.testing.properties import ensure

__all__ = [
    "a_step_without_matches_costs_nothing",
    "unmatched_student_tokens_do_not_matter",
    "unmatched_student_tokens_may_be_nan",
    "unreferenced_teacher_tokens_may_be_nan",
]


@loss_property(kinds=LOCAL)
def unmatched_student_tokens_do_not_matter(factory: LossFactory, example: LossExample) -> None:
    """A student token without a match gets a gradient of zero, and its logits change nothing."""
    example = doubled(example)
    free = unmatched(example)
    value, gradients = first_gradients(factory, example)
    for v, gradient in enumerate(gradients):
        largest = float(gradient[free[v]].abs().sum())
        ensure(largest == 0, f"unmatched tokens of student_logits[{v}] get a gradient")
    tilt = torch.arange(example.student_logits[0].shape[-1], dtype=torch.float64)
    changed = [
        torch.where(rows[..., None], tilt, logits)
        for logits, rows in zip(example.student_logits, free, strict=True)
    ]
    found = first_value(factory, example._replace(student_logits=changed))
    ensure_close(found, value, "other logits of unmatched student tokens")


@loss_property(kinds=LOCAL)
def unmatched_student_tokens_may_be_nan(factory: LossFactory, example: LossExample) -> None:
    """NaN and infinity in student tokens without a match reach neither the loss nor a gradient."""
    free = unmatched(example)
    for bad in (torch.nan, torch.inf, -torch.inf):
        views = filled(example.student_logits, free, bad)
        value, gradients = first_gradients(factory, example._replace(student_logits=views))
        ensure(abs(value) < torch.inf, f"the loss is {value} beside {bad} in an unmatched token")
        for v, gradient in enumerate(gradients):
            good = bool(gradient.isfinite().all())
            ensure(good, f"a gradient of student_logits[{v}] is not finite beside {bad}")


@loss_property(kinds=LOCAL)
def unreferenced_teacher_tokens_may_be_nan(factory: LossFactory, example: LossExample) -> None:
    """NaN and infinity in teacher tokens that no match refers to reach nothing."""
    free = unreferenced(example)
    for bad in (torch.nan, torch.inf, -torch.inf):
        views = filled(example.teacher_logits, free, bad)
        value, gradients = first_gradients(factory, example._replace(teacher_logits=views))
        ensure(abs(value) < torch.inf, f"the loss is {value} beside {bad} in an unread token")
        for v, gradient in enumerate(gradients):
            good = bool(gradient.isfinite().all())
            ensure(good, f"a gradient of student_logits[{v}] is not finite beside {bad}")


@loss_property(kinds=LOCAL)
def a_step_without_matches_costs_nothing(factory: LossFactory, example: LossExample) -> None:
    """Without any match the loss is 0 and so are the gradients; one image without is no harm."""
    weight = {pair: found.weight for pair, found in matches_of(example).items()}
    nothing = {pair: torch.zeros_like(part) for pair, part in weight.items()}
    steps = {
        "weights of 0": map_matches(example, weight=nothing),
        "no pairs at all": example._replace(matches={}),
    }
    for what, step in steps.items():
        value, gradients = first_gradients(factory, step)
        ensure(value == 0, f"{what}: the loss is {value}")
        for v, gradient in enumerate(gradients):
            ensure(bool((gradient == 0).all()), f"{what}: student_logits[{v}] gets a gradient")
    rows = torch.arange(next(iter(weight.values())).shape[0])[:, None, None]
    but_first = {pair: torch.where(rows == 0, 0.0, part) for pair, part in weight.items()}
    value, gradients = first_gradients(factory, map_matches(example, weight=but_first))
    ensure(abs(value) < torch.inf, f"one image without matches: the loss is {value}")
    for gradient in gradients:
        ensure(bool((gradient[0] == 0).all()), "an image without matches gets a gradient")
        ensure(bool(gradient.isfinite().all()), "a gradient is not finite")

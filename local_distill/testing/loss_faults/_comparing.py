"""Running a loss on a step, and holding what it gives to the truth."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from local_distill.testing.fault_tables import NotApplicable
from local_distill.testing.loss_faults._subject import (
    DIM,
    LossStep,
    LossSubject,
    cast,
    drawn,
    images_of,
)
from local_distill.testing.loss_properties._running import ensure_same_state, state_of
from local_distill.testing.properties import ensure


class Outcome(NamedTuple):
    """A loss, and its gradient by each student view."""

    value: Tensor
    slopes: list[Tensor]


def new(subject: LossSubject, dim: int = DIM, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A loss in its first state, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        loss = subject.make(dim)
    return loss.double() if dtype == torch.float64 else loss


def trained(subject: LossSubject) -> nn.Module:
    """A loss after one step."""
    loss = new(subject)
    measured(subject, loss, drawn(subject, 1))
    return loss


def value_of(subject: LossSubject, loss: Any, step: LossStep) -> Tensor:
    """The scalar, whatever else may be wrong with it."""
    value = subject.call(loss, step)
    ensure(isinstance(value, Tensor), f"got {type(value).__name__}, no tensor")
    ensure(value.dim() == 0, f"got a tensor of shape {tuple(value.shape)}, no scalar")
    return value


def with_leaves(step: LossStep) -> LossStep:
    """The step with students that ask for a gradient, in their layout."""
    return step._replace(student=[view.detach().requires_grad_() for view in step.student])


def measured(subject: LossSubject, loss: Any, step: LossStep) -> Outcome:
    """One training step, forward and backward."""
    step = with_leaves(step)
    value = value_of(subject, loss, step)
    ensure(value.requires_grad, "the loss hangs on no student, so there is no gradient")
    return Outcome(value.detach(), slopes_of(value, step.student))


def slopes_of(value: Tensor, views: list[Tensor]) -> list[Tensor]:
    """The gradient by each view; zeros where there is none."""
    found = torch.autograd.grad(value, views, allow_unused=True)
    return [
        torch.zeros_like(view) if slope is None else slope
        for view, slope in zip(views, found, strict=True)
    ]


def truth(subject: LossSubject, step: LossStep) -> Outcome:
    """What a new loss has to give, in float64."""
    step = cast(step, torch.float64)
    if subject.oracle is not None:
        leaves = with_leaves(step)
        value = subject.oracle(leaves)
        slopes = (
            slopes_of(value, leaves.student)
            if value.requires_grad
            else [torch.zeros_like(view) for view in leaves.student]
        )
        return Outcome(value.detach(), slopes)
    dim = (step.teacher or step.student)[0].shape[-1]
    outcome = measured(subject, new(subject, dim, torch.float64), step)
    order = list(range(step.student[0].shape[0]))[::-1]
    turned = measured(subject, new(subject, dim, torch.float64), images_of(step, order)).value
    off = float((turned - outcome.value).abs())
    ensure(
        off <= 1e-9 * max(1.0, float(outcome.value.abs())),
        f"in float64 the loss changes by {off:.3g} with the order of the images",
    )
    return outcome


def ensure_right(subject: LossSubject, step: LossStep, what: str) -> Outcome:
    """Run a new loss on the step; value and gradient must be the truth."""
    dtype = step.student[0].dtype
    dim = (step.teacher or step.student)[0].shape[-1]
    outcome = measured(subject, new(subject, dim, dtype), step)
    ensure_true(outcome, truth(subject, step), step, what)
    return outcome


def ensure_right_as_rounded(subject: LossSubject, step: LossStep, what: str) -> None:
    """`ensure_right` for numbers so large that float32 rounds what they say.

    A teacher's logit of 60,000 over a temperature of 0.1 is known to 0.03 only, and where targets
    balance the prototypes, as Sinkhorn-Knopp does, they bring such logits to a tie. So the loss may
    be off by a part of that rounding; without a temperature by no more than elsewhere.
    """
    outcome = measured(subject, new(subject, dtype=step.student[0].dtype), step)
    slack = 0.0
    if looks_at_temp(subject):
        largest = max(float(view.double().abs().amax()) for view in step.teacher)
        slack = 2.0**-26 * largest / step.temp
    ensure_true(outcome, truth(subject, step), step, what, slack=slack)


def _parts(one: Outcome, two: Outcome) -> list[tuple[Tensor, Tensor]]:
    return [(one.value, two.value), *zip(one.slopes, two.slopes, strict=True)]


def ensure_true(
    outcome: Outcome, wanted: Outcome, step: LossStep, what: str, *, slack: float = 0.0
) -> None:
    """Refuse a value off by 1e-5, and a gradient that is not what its dtype can say of the truth.

    All dtypes are to be worked out in at least float32, so the value's bound is the same in all.

    Args:
        outcome: what the loss gave.
        wanted: what it had to give.
        step: which step.
        what: its name, for the message.
        slack: an error that is allowed besides, as a share.
    """
    dtype = step.student[0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    ensure(outcome.value.dtype == wide, f"{what}: the loss is {outcome.value.dtype}, not {wide}")
    # A teacher in float32 knows no more than float32 does.
    wide_teacher = all(view.dtype == torch.float64 for view in step.teacher)
    exact = slack + (1e-9 if dtype == torch.float64 and wide_teacher else 1e-5)
    found, right = float(outcome.value), float(wanted.value)
    ensure(
        abs(found - right) <= exact * max(1.0, abs(right)),
        f"{what}: the loss is {found:.9g} instead of {right:.9g}",
    )
    info = torch.finfo(dtype)
    # Slopes may be what is left of larger terms that cancel.
    longest = max(
        [float(view.double().abs().amax()) for view in step.student if view.numel()] + [1]
    )
    steepest = max(
        [float(slope.abs().amax()) for slope in wanted.slopes if slope.numel()] + [0.1 / longest]
    )
    share = 2 * max(info.eps, exact)
    atol = share * min(steepest, info.max) + info.tiny * info.eps
    for view, (slope, right_slope) in enumerate(zip(outcome.slopes, wanted.slopes, strict=True)):
        ensure(slope.dtype == dtype, f"{what}: the gradient of view {view} is {slope.dtype}")
        close = torch.isclose(slope.double(), right_slope.double(), rtol=share, atol=atol)
        # What is larger than all that the dtype has can only come out as not finite: infinite, or
        # NaN where parts of it cancel.
        close = close | ((right_slope.abs() > info.max) & ~slope.isfinite())
        if not bool(close.all()):
            place = tuple((~close).nonzero()[0].tolist())
            ensure(
                False,
                f"{what}: the gradient of view {view} is {float(slope[place]):.9g} at "
                f"{list(place)} instead of {float(right_slope[place]):.9g}",
            )


def ensure_equal(found: Outcome, wanted: Outcome, what: str, *, share: float = 0.0) -> None:
    """Refuse outcomes that differ, by default to the bit, else by a share of the largest number."""
    for number, (one, two) in enumerate(_parts(found, wanted)):
        name = "the loss" if number == 0 else f"the gradient of view {number - 1}"
        ensure(one.shape == two.shape, f"{what}: {name} has shape {tuple(one.shape)}")
        most = float(two.abs().amax()) if two.numel() else 0.0
        same = torch.equal(one, two) or (
            share > 0
            and torch.allclose(one.double(), two.double(), rtol=share, atol=share * max(most, 1e-6))
        )
        if not same:
            ensure(False, f"{what}: {name} is {one.tolist()} instead of {two.tolist()}")


def outcomes_alike(found: Outcome, wanted: Outcome, share: float = 0.0) -> bool:
    """Whether `ensure_equal` would let them pass."""
    try:
        ensure_equal(found, wanted, "", share=share)
    except AssertionError:
        return False
    return True


def ensure_finite_state(loss: nn.Module, what: str) -> None:
    """Refuse a NaN or an infinity in what a checkpoint would hold."""
    for name, part in state_of(loss).items():
        ensure(bool(part.isfinite().all()), f"{what}: `{name}` of the state is not finite")


def ensure_state_stays(loss: nn.Module, action: Callable[[], object], what: str) -> None:
    """Refuse an action that changes the state by a bit."""
    before = state_of(loss)
    action()
    ensure_same_state(state_of(loss), before, what)


def has_teacher(subject: LossSubject) -> bool:
    """Whether the value depends on the teacher's views."""
    step = drawn(subject)
    return _depends(subject, step, step._replace(teacher=drawn(subject, 9).teacher))


def needs_teacher(subject: LossSubject) -> None:
    """Leave the case out for losses whose views are all of the student."""
    if not has_teacher(subject):
        raise NotApplicable("there is no teacher")


def needs_tokens(subject: LossSubject) -> None:
    """Leave the case out for losses of whole views."""
    if not subject.tokens:
        raise NotApplicable("takes whole views")


def needs_state(subject: LossSubject) -> None:
    """Leave the case out for losses that keep nothing from step to step."""
    if not state_of(new(subject)):
        raise NotApplicable("keeps no state")


def looks_at_temp(subject: LossSubject) -> bool:
    """Whether the step's temperature goes into the value."""
    step = drawn(subject)
    return _depends(subject, step, step._replace(temp=0.5))


def _depends(subject: LossSubject, one: LossStep, two: LossStep) -> bool:
    loss = trained(subject)
    values = [value_of(subject, copy.deepcopy(loss), step).detach() for step in (one, two)]
    return not torch.equal(*values)

"""What a loss remembers from step to step: the state of its targets."""

from __future__ import annotations

import copy
import io

import torch
from torch import Tensor, nn

from local_distill.testing.loss_properties._changing import redrawn, unreferenced
from local_distill.testing.loss_properties._registry import (
    ANY,
    LOCAL,
    LossExample,
    LossFactory,
    loss_property,
)
from local_distill.testing.loss_properties._running import (
    call,
    ensure_close,
    ensure_same_state,
    make,
    state_of,
)
from local_distill.testing.properties import ensure

__all__ = [
    "a_checkpoint_goes_on_alike",
    "a_copy_learns_for_itself",
    "a_nan_teacher_never_enters_the_state",
    "casting_does_not_round_the_state",
    "evaluation_leaves_the_state_alone",
    "no_grad_leaves_the_state_alone",
    "teacher_tokens_that_are_not_valid_stay_out",
    "the_state_moves_after_use",
]


@loss_property(kinds=ANY)
def evaluation_leaves_the_state_alone(factory: LossFactory, example: LossExample) -> None:
    """In eval() a call changes no state."""
    loss = _trained(factory, example).eval()
    before = state_of(loss)
    call(loss, redrawn(example, 2))
    ensure_same_state(state_of(loss), before, "after a call in eval()")


@loss_property(kinds=ANY)
def no_grad_leaves_the_state_alone(factory: LossFactory, example: LossExample) -> None:
    """Under no_grad a call changes no state, in training mode either."""
    loss = _trained(factory, example)
    before = state_of(loss)
    with torch.no_grad():
        call(loss, redrawn(example, 2))
    ensure_same_state(state_of(loss), before, "after a call under no_grad")


@loss_property(kinds=ANY)
def the_state_moves_after_use(factory: LossFactory, example: LossExample) -> None:
    """A training step returns what evaluation returns from the same state: it is updated after."""
    step = redrawn(example, 2)
    wanted = float(call(_trained(factory, example).eval(), step).detach())
    found = float(call(_trained(factory, example), step).detach())
    ensure_close(found, wanted, "in training", rtol=1e-4)


@loss_property(kinds=ANY)
def a_nan_teacher_never_enters_the_state(factory: LossFactory, example: LossExample) -> None:
    """After a step with NaN or infinity in a teacher row the state is finite, and goes on."""
    for bad in (torch.nan, torch.inf, -torch.inf):
        loss = _trained(factory, example)
        spoilt = [logits.clone() for logits in example.teacher_logits]
        for logits in spoilt:
            logits.view(-1)[example.seed % logits.numel()] = bad
        call(loss, example._replace(teacher_logits=spoilt))
        for name, part in state_of(loss).items():
            ensure(bool(part.isfinite().all()), f"`{name}` is not finite after {bad} in a teacher")
        value = float(call(loss, redrawn(example, 2)).detach())
        ensure(abs(value) < torch.inf, f"after {bad} in a teacher the next loss is {value}")


@loss_property(kinds=ANY)
def a_checkpoint_goes_on_alike(factory: LossFactory, example: LossExample) -> None:
    """A loss that takes over a state_dict in the middle of training goes on as the first one."""
    first = _trained(factory, example)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = make(factory, example)
    second.load_state_dict(torch.load(file, weights_only=True))
    for number in (2, 3):
        step = redrawn(example, number)
        wanted, found = (float(call(loss, step).detach()) for loss in (first, second))
        ensure_close(found, wanted, "a loss from a checkpoint")


@loss_property(kinds=ANY)
def a_copy_learns_for_itself(factory: LossFactory, example: LossExample) -> None:
    """A deep copy starts from the same state, and its steps leave the original alone."""
    loss = _trained(factory, example)
    before = state_of(loss)
    other = copy.deepcopy(loss)
    ensure_same_state(state_of(other), before, "a deep copy")
    call(other, redrawn(example, 2))
    ensure_same_state(state_of(loss), before, "after a step of a deep copy")


@loss_property(kinds=ANY)
def casting_does_not_round_the_state(factory: LossFactory, example: LossExample) -> None:
    """half() and to(bfloat16), meant for a network around it, leave the state's numbers alone."""
    for dtype in (torch.float16, torch.bfloat16):
        loss = _trained(factory, example)
        before = _buffers(loss)
        loss.to(dtype)
        for name, part in _buffers(loss).items():
            ensure(torch.equal(part.to(before[name]), before[name]), f"`{name}` lost to {dtype}")


@loss_property(kinds=LOCAL)
def teacher_tokens_that_are_not_valid_stay_out(factory: LossFactory, example: LossExample) -> None:
    """Teacher tokens that `teacher_valid` excludes do not change what the state becomes."""
    free = unreferenced(example)
    states = []
    for extra in (0.0, 3.0):
        loss = make(factory, example)
        views = [
            torch.where(rows[..., None], logits + extra, logits)
            for logits, rows in zip(example.teacher_logits, free, strict=True)
        ]
        loss(
            example.student_logits,
            views,
            example.matches,
            teacher_temp=example.teacher_temp,
            teacher_valid=[~rows for rows in free],
        )
        states.append(state_of(loss))
    ensure_same_state(states[1], states[0], "with other teacher tokens that are not valid")


def _trained(factory: LossFactory, example: LossExample) -> nn.Module:
    """A loss after a step of logits that have a mean."""
    loss = make(factory, example)
    call(loss, redrawn(example, 1))
    return loss


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    return {
        name: part.detach().clone()
        for name, part in module.named_buffers()
        if part.is_floating_point()
    }

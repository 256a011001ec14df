"""What a loss keeps from step to step."""

from __future__ import annotations

import copy
import io

import torch
from torch import nn

from local_distill.testing.loss_faults._cases import CASES
from local_distill.testing.loss_faults._comparing import (
    Outcome,
    ensure_equal,
    ensure_state_stays,
    measured,
    needs_state,
    new,
    slopes_of,
    trained,
    value_of,
    with_leaves,
)
from local_distill.testing.loss_faults._subject import LossSubject, drawn
from local_distill.testing.properties import ensure


@CASES.case("state", "eval() leaves it alone")
def _evaluation(subject: LossSubject) -> None:
    needs_state(subject)
    loss = trained(subject).eval()
    ensure_state_stays(
        loss, lambda: measured(subject, loss, drawn(subject, 2)), "after a call in eval()"
    )


@CASES.case("state", "no_grad leaves it alone")
def _no_grad(subject: LossSubject) -> None:
    needs_state(subject)
    loss = trained(subject)
    with torch.no_grad():
        ensure_state_stays(
            loss, lambda: value_of(subject, loss, drawn(subject, 2)), "after a call under no_grad"
        )


@CASES.case("state", "two forwards before one backward")
def _accumulated(subject: LossSubject) -> None:
    apart, together = trained(subject), trained(subject)
    steps = [with_leaves(drawn(subject, seed)) for seed in (2, 3)]
    wanted = [measured(subject, apart, step) for step in steps]
    values = [value_of(subject, together, step) for step in steps]
    slopes = slopes_of(values[0] + values[1], [view for step in steps for view in step.student])
    views = len(steps[0].student)
    found = [
        Outcome(values[0].detach(), slopes[:views]),
        Outcome(values[1].detach(), slopes[views:]),
    ]
    for number, (one, two) in enumerate(zip(found, wanted, strict=True)):
        ensure_equal(one, two, f"forward {number + 1} of two", share=1e-6)


@CASES.case("state", "deepcopy")
def _copied(subject: LossSubject) -> None:
    first = trained(subject)
    second = copy.deepcopy(first)
    ensure_state_stays(
        first, lambda: measured(subject, second, drawn(subject, 2)), "after a step of a deep copy"
    )
    wanted = measured(subject, trained(subject), drawn(subject, 3))
    ensure_equal(measured(subject, first, drawn(subject, 3)), wanted, "the original's next step")
    _goes_on(subject, trained(subject), copy.deepcopy(trained(subject)), "a deep copy")


@CASES.case("state", "state_dict in mid-training, and on")
def _restored(subject: LossSubject) -> None:
    first, second = trained(subject), new(subject)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    _goes_on(subject, first, second, "from a checkpoint")


@CASES.case("state", "half() and to(bfloat16)")
def _halved(subject: LossSubject) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        loss = trained(subject)
        before = {name: part.clone() for name, part in loss.named_buffers()}
        loss.half() if dtype == torch.float16 else loss.to(dtype)
        for name, part in loss.named_buffers():
            if before[name].is_floating_point():
                ensure(torch.equal(part, before[name]), f"`{name}` is rounded by to({dtype})")
        if not list(loss.parameters()):
            _goes_on(subject, trained(subject), loss, f"after to({dtype})")


def _goes_on(subject: LossSubject, first: nn.Module, second: nn.Module, what: str) -> None:
    for seed in (2, 3):
        step = drawn(subject, seed)
        wanted = measured(subject, first, step)
        ensure_equal(measured(subject, second, step), wanted, f"{what}, a later step")

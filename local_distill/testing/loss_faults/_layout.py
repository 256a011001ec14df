"""How tensors lie in memory, and what autograd knows of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from local_distill.structures import Matches
from local_distill.testing.loss_faults._cases import CASES
from local_distill.testing.loss_faults._comparing import (
    ensure_equal,
    measured,
    needs_teacher,
    needs_tokens,
    new,
    value_of,
    with_leaves,
)
from local_distill.testing.loss_faults._subject import LossStep, LossSubject, drawn, mapped
from local_distill.testing.properties import ensure


def _laid_out(subject: LossSubject, step: LossStep, lay: Callable[[Tensor], Tensor]) -> None:
    odd = mapped(step, lay)
    whole = mapped(step, lambda view: view.clone(memory_format=torch.contiguous_format))
    wanted = measured(subject, new(subject), whole)
    found = measured(subject, new(subject), odd)
    ensure_equal(found, wanted, "in another layout", share=1e-5)


@CASES.case("layout", "non-contiguous")
def _strided(subject: LossSubject) -> None:
    step = drawn(subject, 31)
    _laid_out(subject, step, lambda view: view.transpose(0, -1).contiguous().transpose(0, -1))
    _laid_out(subject, step, lambda view: view.repeat_interleave(2, -1)[..., ::2])


@CASES.case("layout", "expanded")
def _expanded(subject: LossSubject) -> None:
    step = drawn(subject, 32)

    def first(values: Tensor) -> Tensor:
        return values[:1].expand_as(values)

    same = {pair: Matches(*map(first, found)) for pair, found in step.matches.items()}
    step = step._replace(matches=same, valid=[first(keep) for keep in step.valid])
    _laid_out(subject, mapped(step, first), first)


@CASES.case("layout", "feature maps, channels first and last")
def _feature_maps(subject: LossSubject) -> None:
    needs_tokens(subject)
    for memory in (torch.contiguous_format, torch.channels_last):

        def lay(view: Tensor, memory: torch.memory_format = memory) -> Tensor:
            return view.mT[..., None].contiguous(memory_format=memory).flatten(2).mT

        _laid_out(subject, drawn(subject, 33), lay)


@CASES.case("layout", "teacher that requires a gradient")
def _live_teacher(subject: LossSubject) -> None:
    needs_teacher(subject)
    step = with_leaves(drawn(subject, 34))
    step = step._replace(teacher=[view.requires_grad_() for view in step.teacher])
    value = value_of(subject, new(subject), step)
    views = [*step.student, *step.teacher]
    slopes = torch.autograd.grad(value, views, allow_unused=True)
    for view, slope in enumerate(slopes[len(step.student) :]):
        live = slope is not None and bool(slope.any())
        ensure(not live, f"teacher view {view} receives a gradient")


@CASES.case("layout", "inference_mode tensors")
def _inference(subject: LossSubject) -> None:
    step = drawn(subject, 35)
    wanted = measured(subject, new(subject), step)
    with torch.inference_mode():
        made = mapped(step, torch.clone)
        value = value_of(subject, new(subject), made)
    near = torch.allclose(value, wanted.value, rtol=1e-5, atol=1e-6)
    ensure(near, f"in inference mode the loss is {float(value)} instead of {float(wanted.value)}")
    # As from a teacher that ran in inference mode.
    found = measured(subject, new(subject), step._replace(teacher=made.teacher))
    ensure_equal(found, wanted, "with a teacher from inference mode")

"""Precision, extreme values, small sizes, and the ways in which torch runs the same code."""

from __future__ import annotations

import torch

from local_distill.structures import Matches
from local_distill.testing.loss_properties._changing import cast, doubled
from local_distill.testing.loss_properties._registry import (
    ANY,
    LossExample,
    LossFactory,
    loss_property,
)
from local_distill.testing.loss_properties._running import (
    call,
    ensure_alike,
    ensure_close,
    first_gradients,
    first_value,
    make,
    state_of,
    student_gradients,
    with_leaves,
)
from local_distill.testing.properties import ensure

__all__ = [
    "an_empty_batch_costs_nothing",
    "autocast_changes_nothing",
    "compiles_without_graph_breaks",
    "float32_agrees_with_float64",
    "half_precision_logits_agree_with_float32",
    "large_logits_stay_finite",
    "one_prototype_costs_nothing",
]


@loss_property(kinds=ANY)
def half_precision_logits_agree_with_float32(factory: LossFactory, example: LossExample) -> None:
    """bfloat16 and float16 logits give the loss of float32 on the same values, in float32."""
    for dtype in (torch.bfloat16, torch.float16):
        half = cast(example, dtype)
        full = cast(half, torch.float32)
        loss = make(factory, example)
        largest = max(float(logits.abs().max()) for logits in full.student_logits)
        # what float32 can tell: its rounding of the largest student logit over its temperature
        slack = 1e-5 * max(1.0, largest / float(getattr(loss, "student_temp", 1.0)))
        value, gradients = student_gradients(loss, half)
        wanted, references = first_gradients(factory, full)
        ensure_close(value, wanted, f"{dtype} logits", rtol=0.0, atol=slack)
        kind = call(make(factory, example), half).dtype
        ensure(kind in (torch.float32, torch.float64), f"the loss is {kind} for {dtype} logits")
        for v, (gradient, reference) in enumerate(zip(gradients, references, strict=True)):
            # the gradient itself is rounded to the logits' type
            most = float(reference.abs().max())
            what = f"gradient of student_logits[{v}] in {dtype}"
            ensure_alike(gradient, reference, what, rtol=1e-2, atol=1e-3 * most)


@loss_property(kinds=ANY)
def float32_agrees_with_float64(factory: LossFactory, example: LossExample) -> None:
    """The same values in float64 give the same loss, up to rounding."""
    wanted = first_value(factory, doubled(example))
    ensure_close(first_value(factory, example), wanted, "float32 logits", rtol=1e-4, atol=1e-4)


@loss_property(kinds=ANY)
def autocast_changes_nothing(factory: LossFactory, example: LossExample) -> None:
    """Under autocast the loss is the same: no product in it is rounded."""
    wanted = first_value(factory, example)
    loss = make(factory, example)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = call(loss, example)
    ensure_close(float(value.detach()), wanted, "under autocast")


@loss_property(kinds=ANY)
def large_logits_stay_finite(factory: LossFactory, example: LossExample) -> None:
    """Logits of ±60,000 in float16 and float32 give a finite loss, gradient and state."""
    for dtype in (torch.float16, torch.float32):
        step = cast(example, dtype)
        large = step._replace(
            student_logits=[torch.where(x >= 0, 6e4, -6e4).to(dtype) for x in step.student_logits],
            teacher_logits=[torch.where(x >= 0, 6e4, -6e4).to(dtype) for x in step.teacher_logits],
        )
        loss = make(factory, example)
        value, gradients = student_gradients(loss, large)
        ensure(abs(value) < torch.inf, f"the loss is {value} for {dtype} logits of ±60,000")
        for v, gradient in enumerate(gradients):
            good = bool(gradient.isfinite().all())
            ensure(good, f"a gradient of student_logits[{v}] is not finite at ±60,000")
        for name, part in state_of(loss).items():
            ensure(bool(part.isfinite().all()), f"`{name}` is not finite after ±60,000")


@loss_property(kinds=ANY, max_examples=5)
def one_prototype_costs_nothing(factory: LossFactory, example: LossExample) -> None:
    """With c = 1 there is nothing to tell apart: the loss is 0."""
    step = example._replace(
        student_logits=[logits[..., :1] for logits in example.student_logits],
        teacher_logits=[logits[..., :1] for logits in example.teacher_logits],
    )
    value, gradients = first_gradients(factory, step)
    ensure_close(value, 0.0, "c = 1")
    for gradient in gradients:
        ensure(bool(gradient.isfinite().all()), "a gradient is not finite")


@loss_property(kinds=ANY, max_examples=5)
def an_empty_batch_costs_nothing(factory: LossFactory, example: LossExample) -> None:
    """A batch of no images gives a loss of 0 and leaves the state finite."""
    step = example._replace(
        student_logits=[logits[:0] for logits in example.student_logits],
        teacher_logits=[logits[:0] for logits in example.teacher_logits],
    )
    if example.matches is not None:
        matches = {p: Matches(*(part[:0] for part in m)) for p, m in example.matches.items()}
        step = step._replace(matches=matches)
    loss = make(factory, example)
    value, _ = student_gradients(loss, step)
    ensure(value == 0, f"the loss of an empty batch is {value}")
    for name, part in state_of(loss).items():
        ensure(bool(part.isfinite().all()), f"`{name}` is not finite after an empty batch")


@loss_property(kinds=ANY, max_examples=1)
def compiles_without_graph_breaks(factory: LossFactory, example: LossExample) -> None:
    """torch.compile(fullgraph=True) gives the same loss and gradient."""
    wanted, references = first_gradients(factory, example)
    torch.compiler.reset()
    loss = make(factory, example)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    step = with_leaves(example)
    value = call(compiled, step)
    ensure_close(float(value.detach()), wanted, "compiled")
    torch.autograd.backward(value.sum())
    for logits, reference in zip(step.student_logits, references, strict=True):
        gradient = torch.zeros_like(logits) if logits.grad is None else logits.grad
        ensure_alike(gradient, reference, "compiled gradient")
